# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoints: one safetensors file with what trains and where it came from, and all that it takes to resume.

``best.safetensors`` holds the trained tensors alone. ``last.safetensors`` also holds, below reserved prefixes, the
optimizer's state by parameter name (``optimizer.<parameter>.<key>``) and the random number generators (``rng.*``).
The header has one entry, ``medmoe``, in JSON: ``metadata`` (settings, experts with the sha256 of their weights, tasks,
conditions, epoch and metric), ``state`` for resuming, and ``checksum``, the sha256 over all tensors. Equal trainings
give equal files.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import medmoe
from medmoe.conditions import Schema
from medmoe.errors import CheckpointError, ConfigError
from medmoe.experts.weights import checksum
from medmoe.files import atomic_path
from medmoe.networks.cost import trained_tensors
from medmoe.tasks import Task
from medmoe.training.mismatch import (
    condition_problems,
    expert_problems,
    setting_problems,
    task_problems,
    tensor_problems,
)

logger = logging.getLogger(__name__)

FORMAT = 1
BEST, LAST = "best.safetensors", "last.safetensors"
RUN_FILES = (BEST, LAST, "run.json", "metrics.jsonl")
RESERVED = ("optimizer.", "rng.")


@dataclass(frozen=True)
class Metadata:
    """What the header of a checkpoint says.

    Attributes:
        settings: the bundle's top-level settings, literals only.
        experts: name, sha256 and domain of every expert, in order.
        tasks: the fields of every :class:`medmoe.tasks.Task`, in order.
        conditions: a :class:`medmoe.conditions.Schema` in JSON; ``None`` without conditions.
        epoch: epochs that were finished, from 1.
        metric_name: the validation metric that chose the best checkpoint; empty without validation.
        metric: its value at ``epoch``; ``None`` without validation.
        medmoe_version: that wrote the file.
        format: version of this layout.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    experts: list[dict[str, str]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    conditions: dict[str, Any] | None = None
    epoch: int = 0
    metric_name: str = ""
    metric: float | None = None
    medmoe_version: str = medmoe.__version__
    format: int = FORMAT


def literals(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``settings`` that JSON can hold, as it gives them back (a tuple becomes a list)."""
    result = {}
    for key, value in settings.items():
        try:
            result[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return result


def expert_identities(network: nn.Module) -> list[dict[str, str]]:
    """Name, sha256 and domain of every expert of ``network``, in order."""
    experts: Iterable[Any] = getattr(network, "experts", ())
    return [{"name": expert.name, "sha256": expert.sha256, "domain": expert.domain} for expert in experts]


def descriptions(network: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of ``network`` beside its tensors, as JSON gives it back."""
    tasks: Iterable[Any] = getattr(network, "tasks", ())
    schema: Any = getattr(network, "schema", None)
    described = {
        "experts": expert_identities(network),
        "tasks": [asdict(task) for task in tasks],
        "conditions": None if schema is None else schema.to_json(),
    }
    return dict(json.loads(json.dumps(described)))


def save_checkpoint(
    path: str | os.PathLike[str],
    network: nn.Module,
    metadata: Metadata,
    extra: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Writes what trains in ``network`` to ``path``; a failure leaves the file that was there.

    Args:
        path: a ``.safetensors`` file.
        network: with ``experts``, and where it has them ``tasks`` and a ``schema`` of conditions.
        metadata: its experts, tasks and conditions are replaced by those of ``network``.
        extra: further tensors, named below ``optimizer.`` or ``rng.``.
        state: further JSON values, for resuming.

    Raises:
        CheckpointError: where the disk is full or the folder cannot be written.
    """
    tensors = {**trained_tensors(network, copy=True), **(extra or {})}
    described = {**asdict(metadata), **descriptions(network)}
    header = {"metadata": described, "state": state or {}, "checksum": checksum(tensors)}
    content = save(tensors, metadata={"medmoe": json.dumps(header)})
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        kept = "the checkpoint of before is intact" if Path(path).exists() else "nothing was left behind"
        raise CheckpointError(
            f"cannot write checkpoint {path} ({len(content) / 1e6:.1f} MB): {error.strerror or error}; {kept}. "
            "Make room or choose another --output_dir, then go on with --resume True."
        ) from error


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """The metadata of checkpoint ``path``, without reading its tensors.

    Raises:
        CheckpointError: where the file is missing, damaged, or not a checkpoint of medmoe.
    """
    return parse_metadata(path, read_header(path))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON in the header of a checkpoint; a CheckpointError where there is none."""
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint {path}; train first, or name another with --checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        if "medmoe" not in header:
            raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of medmoe")
        return dict(json.loads(header["medmoe"]))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise damaged(path, str(error)) from error


def parse_metadata(path: str | os.PathLike[str], header: Mapping[str, Any]) -> Metadata:
    """The metadata in ``header``; a CheckpointError where they are of a later format."""
    try:
        described = header["metadata"]
        if described["format"] > FORMAT:
            version = described["medmoe_version"]
            raise CheckpointError(f"{path} was written by medmoe {version}; upgrade medmoe to read it")
        return Metadata(**described)
    except (TypeError, KeyError) as error:
        raise damaged(path, str(error)) from error


def tasks_of(path: str | os.PathLike[str]) -> list[Task]:
    """The tasks that checkpoint ``path`` was trained for."""
    return [Task(**{**entry, "names": tuple(entry["names"])}) for entry in read_metadata(path).tasks]


def conditions_of(path: str | os.PathLike[str], text_encoder: str = "") -> Schema | None:
    """The conditions of checkpoint ``path``, with means and categories of its training cases; ``None`` without any.

    Args:
        path: a best or last checkpoint.
        text_encoder: where the encoder of its texts is on this machine; empty where it is as in training. That it is
            the same is checked when a text is encoded.
    """
    content = read_metadata(path).conditions
    if content is None:
        return None
    schema = Schema.from_json(content)
    return replace(schema, text_encoder=text_encoder) if text_encoder and schema.of_kind("text") else schema


def damaged(path: str | os.PathLike[str], detail: str) -> CheckpointError:
    """The error for a file that is cut off or altered."""
    return CheckpointError(f"checkpoint {path} is damaged ({detail}); use another checkpoint or copy the file again")


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Metadata, dict[str, Any]]:
    """All tensors on the CPU, the metadata, and the state for resuming (empty in a best checkpoint).

    Raises:
        CheckpointError: where the file is missing, damaged, or not a checkpoint of medmoe.
    """
    header = read_header(path)
    metadata = parse_metadata(path, header)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error
    if checksum(tensors) != header.get("checksum"):
        raise damaged(path, "the tensors do not match their checksum")
    return tensors, metadata, dict(header.get("state", {}))


def load_checkpoint(
    path: str | os.PathLike[str], network: nn.Module, settings: Mapping[str, Any] | None = None
) -> Metadata:
    """Puts the trained tensors of ``path`` into ``network``, all of them or none.

    Args:
        path: a best or last checkpoint.
        network: built with the same settings and experts.
        settings: of this run; where they are given, those that shape the network or what it sees must be the
            checkpoint's.

    Raises:
        CheckpointError: where the file is damaged, or belongs to other experts, classes or settings; it lists all
            differences and gives the overrides that remove them.
    """
    tensors, metadata, _ = read_checkpoint(path)
    put_tensors(path, network, tensors, metadata, settings)
    return metadata


def put_tensors(
    path: str | os.PathLike[str],
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    settings: Mapping[str, Any] | None,
) -> None:
    """Checks the checkpoint against ``network`` and copies its trained tensors; see :func:`load_checkpoint`."""
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(RESERVED)}
    own = trained_tensors(network)
    problems = expert_problems(metadata.experts, expert_identities(network))
    problems += setting_problems(metadata.settings, literals(settings or {}))
    described = descriptions(network)
    problems = problems or task_problems(metadata.tasks, described["tasks"])
    problems = problems or condition_problems(metadata.conditions, described["conditions"])
    problems = problems or tensor_problems(trained, own)
    if problems:
        raise CheckpointError(f"checkpoint {path} does not fit this network:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, tensor in trained.items():
            own[name].copy_(tensor)


def names_in_order(network: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its state."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_tensors(network: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state (moments, step counts) as CPU tensors ``optimizer.<parameter>.<key>``."""
    states = optimizer.state_dict()["state"]
    return {
        f"optimizer.{name}.{key}": value.detach().cpu().contiguous()
        for index, name in enumerate(names_in_order(network, optimizer))
        for key, value in states.get(index, {}).items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(network: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`optimizer_tensors` gave; learning rates and decay stay those of ``optimizer``."""
    index = {name: position for position, name in enumerate(names_in_order(network, optimizer))}
    states: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        if full.startswith("optimizer."):
            name, key = full.removeprefix("optimizer.").rsplit(".", 1)
            states.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def rng_tensors() -> dict[str, Tensor]:
    """States of PyTorch's generators: the CPU's, and every CUDA device's once CUDA is in use."""
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states.update({f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    return states


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what :func:`rng_tensors` gave, for the devices that this machine has."""
    torch.set_rng_state(tensors["rng.cpu"])
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)


def replay(scheduler: LRScheduler, steps: int) -> None:
    """Steps a new ``scheduler`` to where it was, so that changed learning rates or lengths take effect."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        for _ in range(steps):
            scheduler.step()


def prepare_output_dir(output_dir: str | os.PathLike[str], resume: bool = False) -> Path:
    """Makes ``output_dir`` ready; a run that it holds is renamed to ``output_dir.1``, ``.2``, ... unless it is resumed.

    Raises:
        CheckpointError: where ``resume`` is set and there is no last checkpoint.
        ConfigError: where the folder to be renamed is, or holds, the current one.
    """
    folder = Path(output_dir)
    if resume:
        if not (folder / LAST).is_file():
            raise CheckpointError(f"there is nothing to resume in {folder}: no {LAST}; start without --resume")
        for leftover in folder.glob(".partial-*"):  # of a writer that was killed
            leftover.unlink()
    elif any((folder / name).exists() for name in RUN_FILES):
        if Path.cwd().is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder} holds a run and is the current folder; choose another --output_dir")
        number = next(n for n in range(1, 1_000_000) if not folder.with_name(f"{folder.name}.{n}").exists())
        kept = folder.with_name(f"{folder.name}.{number}")
        shutil.move(folder, kept)
        logger.warning("the previous run in %s was kept as %s", folder, kept)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class CheckpointHandler:
    """Saves ``last.safetensors`` after every epoch and ``best.safetensors`` after the best validation; resumes.

    Attach it to the trainer, after the handler that validates. With ``resume`` the network, the optimizer, the
    scheduler and the trainer's epoch are restored when it is attached, the random state when the next epoch starts.

    Args:
        network: that trains, already on its device.
        optimizer: over the parameters of ``network``.
        output_dir: where the checkpoints are.
        settings: the bundle's top-level settings, for the metadata.
        scheduler: that steps with the optimizer.
        evaluator: the validation engine, whose key metric (larger is better) chooses the best checkpoint; without one
            the last is the best.
        resume: whether to go on from ``last.safetensors``.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        output_dir: str | os.PathLike[str],
        settings: Mapping[str, Any],
        scheduler: LRScheduler | None = None,
        evaluator: Engine | None = None,
        resume: bool = False,
    ) -> None:
        self.network, self.optimizer, self.scheduler, self.evaluator = network, optimizer, scheduler, evaluator
        self.folder, self.settings, self.resume = Path(output_dir), literals(settings), resume
        self.best_metric: float | None = None
        self.best_epoch = 0
        self.rng: dict[str, Tensor] = {}

    def attach(self, trainer: Engine) -> None:
        """Registers with ``trainer``, and resumes."""
        if self.resume:
            self.restore(trainer)
        trainer.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def restore(self, trainer: Engine) -> None:
        """Puts network, optimizer, scheduler and the trainer's counters back to the last finished epoch."""
        path = self.folder / LAST
        tensors, metadata, state = read_checkpoint(path)
        if not state:
            raise CheckpointError(f"{path} holds no training state, so that it cannot be resumed")
        put_tensors(path, self.network, tensors, metadata, self.settings)
        length, max_epochs = trainer.state.epoch_length, trainer.state.max_epochs
        if length != state["epoch_length"]:
            raise ConfigError(
                f"an epoch has {length} steps here and had {state['epoch_length']} in {path}: resume with the same "
                "data, --batch_size and --steps_per_epoch"
            )
        if max_epochs is not None and metadata.epoch >= max_epochs:
            raise ConfigError(
                f"{self.folder} is already trained for {metadata.epoch} epochs and max_epochs is {max_epochs}: nothing "
                "is left to do; pass a larger --max_epochs, or evaluate"
            )
        restore_optimizer(self.network, self.optimizer, tensors)
        if self.scheduler is not None:
            replay(self.scheduler, state["scheduler_steps"])
        self.best_metric, self.best_epoch = state["best_metric"], state["best_epoch"]
        if self.evaluator is not None and self.best_metric is not None:
            state_of: Any = self.evaluator.state
            state_of.best_metric, state_of.best_metric_epoch = self.best_metric, self.best_epoch
        self.rng = {name: tensor for name, tensor in tensors.items() if name.startswith("rng.")}
        trainer.state.epoch, trainer.state.iteration = metadata.epoch, metadata.epoch * state["epoch_length"]
        logger.info("resuming %s after epoch %d", self.folder, metadata.epoch)

    def start_epoch(self, trainer: Engine) -> None:
        """Restores the random state, once, where nothing draws any more before the first batch."""
        if self.rng:
            restore_rng(self.rng)
            self.rng = {}

    def validated(self, trainer: Engine) -> tuple[str, float | None]:
        """Name and value of the key metric, if this epoch was validated; a NaN counts as the worst."""
        state = getattr(self.evaluator, "state", None)
        if state is None or state.key_metric_name is None or state.epoch != trainer.state.epoch:
            return "", None
        value = float(state.metrics[state.key_metric_name])
        return state.key_metric_name, -math.inf if math.isnan(value) else value

    def save(self, trainer: Engine) -> None:
        """Writes the best checkpoint, if this epoch is, and then the last one."""
        epoch = trainer.state.epoch
        name, metric = self.validated(trainer)
        metadata = Metadata(settings=self.settings, epoch=epoch, metric_name=name, metric=metric)
        better = metric is not None and (self.best_metric is None or metric > self.best_metric)
        if self.evaluator is None or better:
            self.best_metric, self.best_epoch = metric, epoch
            save_checkpoint(self.folder / BEST, self.network, metadata)
        state = {
            "epoch_length": trainer.state.epoch_length,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
            "scheduler_steps": 0 if self.scheduler is None else self.scheduler.last_epoch,
        }
        extra = {**optimizer_tensors(self.network, self.optimizer), **rng_tensors()}
        save_checkpoint(self.folder / LAST, self.network, metadata, extra, state)
