# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Handlers for MONAI's engines: progress, the local log of metrics, epochs of the sampler, interrupts and failures.

Ignite swallows an exception as soon as anything listens to ``EXCEPTION_RAISED`` and does not raise again, fires that
event twice for an error within an iteration, and stops at the first listener that raises. :func:`on_failure` gives all
handlers of an engine one listener that gets this right.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Evaluator, IterationEvents
from monai.engines.workflow import Workflow
from monai.handlers import ValidationHandler
from torch import Tensor, nn
from torch.optim import Optimizer

from medmoe.errors import MedMoEError
from medmoe.files import finite, write_text
from medmoe.moe.routing import RoutingRecord, flat_metrics
from medmoe.progress import Progress, clock
from medmoe.training.checkpoint import BEST, LAST

logger = logging.getLogger(__name__)

TELLING = re.compile(r"(^|_)(dice|f1|mae|auc|balanced_accuracy)(_|$)")
"""Names of the metrics that a summary shows."""
FailureAction = Callable[[BaseException], BaseException | None]
"""Cleans up after a failed run; may return another exception to be raised in place of the one it is given."""


class _Failure:
    """The one listener for a failing engine: runs every action once, then raises."""

    def __init__(self) -> None:
        self.actions: list[FailureAction] = []
        self.handled: BaseException | None = None

    def __call__(self, engine: Workflow, error: BaseException) -> NoReturn:
        if error is self.handled:
            raise error
        for action in self.actions:
            try:
                error = action(error) or error
            except Exception:
                logger.exception("cleaning up after a failed run failed")
        self.handled = error
        raise error


def on_failure(engine: Workflow, action: FailureAction) -> None:
    """Has ``action`` called once when a run of ``engine`` fails or is interrupted; the error then goes on."""
    failure = getattr(engine.state, "failure", None)
    if failure is None:
        failure = engine.state.failure = _Failure()
        engine.add_event_handler(Events.EXCEPTION_RAISED, failure)
    failure.actions.append(action)


class Validation(ValidationHandler):
    """Validates before the first epoch (as epoch 0; not when resuming), every ``interval`` epochs and after the last.

    Put it first among the trainer's handlers: the others read the metrics of the epoch.

    Args:
        validator: MONAI's evaluator.
        interval: epochs between two validations, at least 1.
        before: whether to validate before training.
    """

    def __init__(self, validator: Evaluator, interval: int = 1, before: bool = True) -> None:
        super().__init__(interval, validator)
        self.before = before

    def attach(self, engine: Workflow) -> None:
        """Registers with the trainer."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish_epoch)

    def start(self, engine: Workflow) -> None:
        """Validates the untrained network."""
        if self.before and engine.state.epoch == 0:
            self(engine)

    def finish_epoch(self, engine: Workflow) -> None:
        """Validates when it is time."""
        if engine.state.epoch % self.interval == 0 or engine.state.epoch == engine.state.max_epochs:
            self(engine)


class SetEpoch:
    """Tells the sampler of the trainer's loader which epoch begins, so that a resumed run draws the same samples."""

    def attach(self, trainer: Workflow) -> None:
        """Registers with ``trainer``, whose loader's sampler must have ``set_epoch``."""
        loader: Any = trainer.data_loader
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: loader.sampler.set_epoch(engine.state.epoch))


class FiniteLoss:
    """Stops the training at a loss that is NaN or infinite, before it reaches the weights."""

    def attach(self, trainer: Workflow) -> None:
        """Registers with MONAI's ``trainer``."""
        trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, trainer: Workflow) -> None:
        loss = trainer.state.output["loss"].item()
        if math.isfinite(loss):
            return
        batch = trainer.state.batch
        cases = ", ".join(map(str, batch.get("case", []))) if isinstance(batch, Mapping) else ""
        raise MedMoEError(
            f"the loss became {loss} at step {trainer.state.iteration} (epoch {trainer.state.epoch})"
            + (f" on {cases}" if cases else "")
            + "; the weights and checkpoints of before are intact. Lower --lr and --prompt_lr, or look at these cases."
        )


class InterruptHandler:
    """Ctrl-C and SIGTERM end the training with a message that says how to resume, and with exit status 130.

    Args:
        output_dir: where the last checkpoint is.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.folder = Path(output_dir)
        self.previous: Any = None

    def attach(self, trainer: Workflow) -> None:
        """Registers with ``trainer``."""
        trainer.add_event_handler(Events.STARTED, self.start)
        trainer.add_event_handler(Events.COMPLETED, self.stop)
        on_failure(trainer, self.fail)

    def start(self, trainer: Workflow) -> None:
        """Treats SIGTERM like Ctrl-C. Python lets only the main thread do so."""
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self.terminate)

    def terminate(self, number: int, frame: Any) -> NoReturn:
        """What SIGTERM does."""
        raise KeyboardInterrupt

    def stop(self, trainer: Workflow | None = None) -> None:
        """Gives SIGTERM back."""
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
            self.previous = None

    def fail(self, error: BaseException) -> BaseException | None:
        """Turns an interrupt into a message and exit status 130."""
        self.stop()
        if not isinstance(error, KeyboardInterrupt):
            return None
        if (self.folder / LAST).exists():
            text = f"{self.folder / LAST} holds the last finished epoch; the same command with --resume True goes on."
        else:
            text = "no epoch was finished, so that there is nothing to resume: start again."
        print(f"\nInterrupted: {text}", file=sys.stderr, flush=True)
        return SystemExit(130)


class ProgressHandler:
    """One progress bar over a whole run of an engine. A bar that begins within another pauses it.

    Args:
        description: what the engine does.
        metrics: an engine whose key metric is shown too.
    """

    open: ClassVar[list[Progress]] = []

    def __init__(self, description: str, metrics: Workflow | None = None) -> None:
        self.description, self.metrics = description, metrics
        self.progress: Progress | None = None

    def attach(self, engine: Workflow) -> None:
        """Registers with ``engine``."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.advance)
        engine.add_event_handler(Events.COMPLETED, self.stop)
        on_failure(engine, self.stop)

    def start(self, engine: Workflow) -> None:
        """Opens the bar; its total is what remains, so that a resumed run's estimate is right."""
        state = engine.state
        # An evaluator carries the trainer's epoch as its own, and always runs a single one.
        epochs = 1 if isinstance(engine, Evaluator) else state.max_epochs - state.epoch
        total = None if state.epoch_length is None else state.epoch_length * epochs
        self.pause(True)
        self.progress = Progress(self.description, total).__enter__()
        self.open.append(self.progress)

    def pause(self, stop: bool) -> None:
        """Stops or goes on with the bar around this one: a terminal has room for one."""
        bar: Any = self.open[-1].bar if self.open else None
        if bar is not None:
            bar.stop() if stop else bar.start()

    def advance(self, engine: Workflow) -> None:
        """Shows the loss, and the last key metric."""
        if self.progress is not None:
            self.progress.advance(note=self.note(engine))

    def note(self, engine: Workflow) -> str:
        """Such as ``loss 0.4321  val_mean_dice 0.812``."""
        output, notes = engine.state.output, []
        if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
            notes.append(f"loss {output['loss'].item():.4f}")
        if self.metrics is not None:
            name = self.metrics.state.key_metric_name
            if name in self.metrics.state.metrics:
                notes.append(f"{name} {float(self.metrics.state.metrics[name]):.4f}")
        return "  ".join(notes)

    def stop(self, reason: Workflow | BaseException | None = None) -> None:
        """Closes the bar, and goes on with the one around it."""
        if self.progress is None:
            return
        self.progress.__exit__(None, None, None)
        self.open.remove(self.progress)
        self.progress = None
        self.pause(False)


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an engine that are single numbers."""
    flat = {
        name: value.tolist() if isinstance(value, Tensor | np.generic) else value for name, value in metrics.items()
    }
    return {name: float(value) for name, value in flat.items() if isinstance(value, int | float)}


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held so far, in GiB: ``ram``, and ``gpu`` where one is in use."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated() / 2**30
    return peak


def read_rows(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` in ``output_dir``, without a last one that a crash has cut off."""
    path, rows = Path(output_dir) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class MetricsLog:
    """Keeps the numbers of every epoch in ``metrics.jsonl``, whatever becomes of the tracking server.

    One JSON object a line: ``epoch`` (0 is before training), ``iteration``, ``loss`` (mean of the epoch), ``losses``
    (of its steps), ``terms`` (means of the epoch: each task, over the steps in which it had a label,
    ``auxiliary/<name>``, ``log_variance/<task>``), ``lr`` by optimizer group, ``metrics`` (validation), ``routing``,
    ``seconds`` of training so far, ``time`` (of the clock, seconds since 1970), ``memory`` (peak, GiB). A number that
    is not finite is null. A resumed run drops the rows of epochs that it repeats.

    Args:
        output_dir: where the file is written.
        optimizer: whose learning rates are noted.
        evaluator: whose metrics are noted for the epochs that it validates.
        network: whose routing is noted, of the last step of each epoch.
        loss: a :class:`medmoe.training.loss.TaskLoss`, whose terms are noted.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        optimizer: Optimizer | None = None,
        evaluator: Workflow | None = None,
        network: nn.Module | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        self.folder, self.optimizer, self.evaluator, self.network = Path(output_dir), optimizer, evaluator, network
        self.loss = loss
        self.rows: list[dict[str, Any]] = []
        self.routing: list[RoutingRecord] = []
        self.losses: list[float] = []
        self.terms: dict[str, list[float]] = {}
        self.before = 0.0

    def attach(self, trainer: Workflow) -> None:
        """Registers with ``trainer`` and the evaluator."""
        self.started = time.monotonic()
        trainer.add_event_handler(Events.STARTED, self.start)
        trainer.add_event_handler(Events.ITERATION_STARTED, self.start_step)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.finish_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.finish_epoch)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self.validated_before_training)

    def start(self, trainer: Workflow) -> None:
        """Takes up the rows of the run that is resumed."""
        if trainer.state.epoch == 0:
            return
        self.rows = [row for row in read_rows(self.folder) if row["epoch"] <= trainer.state.epoch]
        self.before = self.rows[-1]["seconds"] if self.rows else 0.0
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.rows))

    def start_step(self, trainer: Workflow) -> None:
        """Has the routers keep their weights in the last step of an epoch."""
        if self.network is not None:
            self.network.recording = self.is_last(trainer)  # type: ignore[assignment]

    def is_last(self, trainer: Workflow) -> bool:
        """Whether the current step is the last of its epoch."""
        length = trainer.state.epoch_length
        return length is not None and trainer.state.iteration % length == 0

    def finish_step(self, trainer: Workflow) -> None:
        """Notes the loss and its terms, and the routing after the last step."""
        self.losses.append(trainer.state.output["loss"].item())
        last: dict[str, float] = {} if self.loss is None else self.loss.last  # type: ignore[assignment]
        for name, value in last.items():
            self.terms.setdefault(name, []).append(value)
        if self.network is not None and self.is_last(trainer):
            self.routing = self.network.routing()  # type: ignore[operator]
            self.network.recording = False  # type: ignore[assignment]

    def validated_before_training(self, evaluator: Workflow) -> None:
        """Notes epoch 0."""
        if evaluator.state.epoch == 0:
            self.add({"epoch": 0, "iteration": 0, "metrics": scalars(evaluator.state.metrics)})

    def finish_epoch(self, trainer: Workflow) -> None:
        """Notes a trained epoch."""
        row: dict[str, Any] = {"epoch": trainer.state.epoch, "iteration": trainer.state.iteration}
        row |= {"loss": sum(self.losses) / max(1, len(self.losses)), "losses": self.losses}
        if self.terms:
            row["terms"] = {name: sum(values) / len(values) for name, values in self.terms.items()}
        self.losses, self.terms = [], {}
        if self.optimizer is not None:
            groups = enumerate(self.optimizer.param_groups)
            row["lr"] = {group.get("name", str(index)): group["lr"] for index, group in groups}
        if self.evaluator is not None and self.evaluator.state.epoch == trainer.state.epoch:
            row["metrics"] = scalars(self.evaluator.state.metrics)
        if self.routing:
            row["routing"] = flat_metrics(self.routing)
        self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Appends ``row`` to the file, with time and memory."""
        times = {"seconds": self.before + time.monotonic() - self.started, "time": time.time()}
        row = finite({**row, **times, "memory": peak_memory()})
        self.rows.append(row)
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def summary(output_dir: str | os.PathLike[str], tracking_uri: str = "") -> str:
    """A few lines on a finished run: scores before and after, parameters, time, memory, and where to look.

    Args:
        output_dir: of the run, with ``metrics.jsonl`` and ``run.json``.
        tracking_uri: of MLflow, to name the command that shows the run.
    """
    folder, rows = Path(output_dir), read_rows(output_dir)
    lines = [*score_lines(rows), *parameter_lines(folder)]
    if rows:
        memory = ", ".join(f"{value:.1f} GiB of {name.upper()}" for name, value in rows[-1]["memory"].items())
        lines.append(f"time: {clock(rows[-1]['seconds'])} for {rows[-1]['epoch']} epochs; peak memory: {memory}")
    if (folder / BEST).exists():
        lines.append(f"checkpoint: {folder / BEST} ({(folder / BEST).stat().st_size / 1e6:.1f} MB)")
    if (folder / "overlays").is_dir():
        lines.append(f"pictures (image, truth, prediction): {folder / 'overlays'}")
    if tracking_uri.startswith("http"):
        lines.append(f"MLflow: {tracking_uri}")
    elif tracking_uri:
        lines.append(f"MLflow: mlflow ui --backend-store-uri '{tracking_uri}'")
    return "\n".join(lines)


def score_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the telling scores of every task, before training and at the best validated epoch.

    The best one is that of the first metric, which is the validation's key metric.
    """
    validated = [row for row in rows if row.get("metrics")]
    names = [name for name in validated[-1]["metrics"] if TELLING.search(name.lower())] if validated else []
    trained = [row for row in validated if row["epoch"] > 0]
    if not names or not trained:
        return []
    key = next(iter(validated[-1]["metrics"]))
    best = max(trained, key=lambda row: row["metrics"].get(key) or 0.0)
    before = validated[0]["metrics"] if validated[0]["epoch"] == 0 else {}
    labels = {name: name.removeprefix("val_") for name in names}
    width = max(map(len, labels.values()))
    lines = [f"{'':<{width}}{'before':>9}{'after':>9}  (validation, before training and after epoch {best['epoch']})"]
    return lines + [f"{labels[name]:<{width}}{cell(before.get(name))}{cell(best['metrics'][name])}" for name in names]


def cell(value: float | None, width: int = 9) -> str:
    """A score in a column of a printed table; a dash where there is none."""
    return f"{'-' if value is None else f'{value:.3f}':>{width}}"


def parameter_lines(folder: Path) -> list[str]:
    """How many parameters train, by part."""
    if not (folder / "run.json").exists():
        return []
    counts = dict(json.loads((folder / "run.json").read_text(encoding="utf-8")).get("parameters") or {})
    trainable, total = counts.pop("trainable", 0), counts.pop("total", 0)
    parts = ", ".join(f"{name} {count / 1e6:.3f}" for name, count in counts.items())
    return [f"trainable parameters: {trainable / 1e6:.3f} M ({parts}) of {total / 1e6:.1f} M"]
