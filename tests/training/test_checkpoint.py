# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import errno
import json
import logging
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import toy
from training.toy import SETTINGS, ToyNetwork, train

from medmoe.conditions import Column, Schema
from medmoe.errors import CheckpointError, ConfigError
from medmoe.experts.weights import checksum
from medmoe.tasks import Task
from medmoe.training.checkpoint import (
    BEST,
    LAST,
    CheckpointHandler,
    Metadata,
    conditions_of,
    load_checkpoint,
    optimizer_tensors,
    prepare_output_dir,
    read_checkpoint,
    read_metadata,
    restore_optimizer,
    save_checkpoint,
    tasks_of,
    trained_tensors,
)
from medmoe.training.mismatch import NETWORK_SETTINGS
from medmoe.training.optim import optimizer


def saved(folder: Path, network: ToyNetwork | None = None, **settings: Any) -> Path:
    path = folder / "model.safetensors"
    metadata = Metadata(settings={**SETTINGS, **settings}, epoch=7, metric_name="val_mean_dice", metric=0.75)
    save_checkpoint(path, network or ToyNetwork(), metadata)
    return path


def test_round_trip_of_what_trains_and_nothing_else(tmp_path: Path) -> None:
    network, other = ToyNetwork(seed=1), ToyNetwork(seed=2)
    network.decoder[0].running_mean += torch.rand(6)
    frozen = {name: p.clone() for name, p in other.named_parameters() if not p.requires_grad}
    metadata = load_checkpoint(saved(tmp_path, network), other, SETTINGS)
    assert metadata.epoch == 7 and metadata.metric == 0.75
    for name, tensor in trained_tensors(network).items():
        assert torch.equal(tensor, trained_tensors(other)[name]), name
    assert all(torch.equal(p, frozen[name]) for name, p in other.named_parameters() if name in frozen)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "decoder.0.running_mean" in names and not [name for name in names if "frozen" in name or "norm" in name]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_metadata_tells_where_it_came_from(tmp_path: Path) -> None:
    network = ToyNetwork()
    metadata = read_metadata(saved(tmp_path, network))
    assert metadata.settings == SETTINGS
    assert [expert["name"] for expert in metadata.experts] == ["general", "medical"]
    assert [expert["sha256"] for expert in metadata.experts] == [expert.sha256 for expert in network.experts]


def several_tasks() -> list[Task]:
    masks = Task("organs", "labels", ("heart", "left lung"), "masks")
    return [masks, Task("edges", "boundary", masks.names, of="organs", weight=0.5)]


def schema(mean: float = 61.25) -> Schema:
    age, sex = Column("age", "number", mean, 1 / 3), Column("sex", "category", values=("F", "M"))
    return Schema((age, sex), "minilm", 384)


def test_tasks_and_conditions_travel_and_come_back_as_they_are(tmp_path: Path) -> None:
    network = ToyNetwork()
    assert tasks_of(saved(tmp_path, network)) == network.tasks and conditions_of(saved(tmp_path, network)) is None
    network.tasks, network.schema = several_tasks(), schema()  # type: ignore[assignment]
    path = saved(tmp_path, network)
    assert tasks_of(path) == several_tasks() and conditions_of(path) == schema()
    assert load_checkpoint(path, network).tasks[1]["weight"] == 0.5


def test_the_text_encoder_may_be_elsewhere_on_another_machine(tmp_path: Path) -> None:
    network = ToyNetwork()
    network.schema = schema()  # type: ignore[assignment]
    assert conditions_of(saved(tmp_path, network), "elsewhere").text_encoder == "minilm"  # there are no texts
    texts = replace(schema(), columns=(*schema().columns, Column("report", "text")), text_sha256="ab" * 32)
    network.schema = texts  # type: ignore[assignment]
    path = saved(tmp_path, network)
    moved = conditions_of(path, "elsewhere")
    assert moved == conditions_of(path, "") == texts and moved.text_sha256 == "ab" * 32
    assert (moved.text_encoder, conditions_of(path).text_encoder) == ("elsewhere", "minilm")


def test_other_tasks_or_conditions_are_errors(tmp_path: Path) -> None:
    network = ToyNetwork()
    network.tasks, network.schema = several_tasks(), schema()  # type: ignore[assignment]
    path = saved(tmp_path, network)
    network.tasks[0] = Task("organs", "labels", ("left lung", "heart"), "elsewhere", weight=3)
    expected = r"tasks organs \(labels, 2 channels: heart, left lung\); edges .*; this network has .*left lung, heart"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(path, network)
    network.tasks, network.schema = several_tasks(), None  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"conditions age \(number\), sex \(category\); this network has none"):
        load_checkpoint(path, network)
    network.schema = schema(60)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="means, categories or text encoder"):
        load_checkpoint(path, network)


def test_a_checkpoint_of_before_there_were_tasks_still_loads(tmp_path: Path) -> None:
    network = ToyNetwork()
    path = saved(tmp_path, network)
    read = read_checkpoint(path)
    old = {name: value for name, value in vars(read[1]).items() if name not in ("tasks", "conditions")}
    header = {"metadata": old, "state": {}, "checksum": checksum(read[0])}
    save_file(read[0], path, {"medmoe": json.dumps(header)})
    assert load_checkpoint(path, network).epoch == 7


def test_names_of_plain_classes_may_differ(tmp_path: Path) -> None:
    network = ToyNetwork()
    path = saved(tmp_path, network)
    network.tasks = [Task("label", "classes", ("a", "b", "c"))]
    load_checkpoint(path, network)


def test_frozen_keys_outside_the_experts_are_kept(tmp_path: Path) -> None:
    """MoPE's orthogonal keys are drawn, never trained, and needed again."""
    network, other = ToyNetwork(), ToyNetwork()
    for each in (network, other):
        each.conditioner = torch.nn.Module()  # type: ignore[assignment]
        each.conditioner.register_buffer("key", torch.randn(3, 2))
    load_checkpoint(saved(tmp_path, network), other)
    assert torch.equal(other.conditioner.key, network.conditioner.key)  # type: ignore[arg-type]


def test_other_experts_are_an_error_that_names_both(tmp_path: Path) -> None:
    path, network = saved(tmp_path), ToyNetwork(names=("general", "other"))
    before = {name: tensor.clone() for name, tensor in trained_tensors(network).items()}
    with pytest.raises(CheckpointError, match=r"medical \(sha256 \w{12}\); this network has .*other \(sha256"):
        load_checkpoint(path, network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_tensors(network).items())


def test_same_name_with_other_weights_is_an_error(tmp_path: Path) -> None:
    path, network = saved(tmp_path), ToyNetwork()
    network.experts[1].sha256 = "0" * 64
    with pytest.raises(CheckpointError, match=r"medical \(sha256 000000000000\)"):
        load_checkpoint(path, network)


def test_differences_are_listed_with_the_overrides_that_remove_them(tmp_path: Path) -> None:
    settings = {**SETTINGS, "general_lora": 4, "num_classes": 5, "spacing": [1.0, 1.0], "roi_size": 32}
    with pytest.raises(CheckpointError) as caught:
        path = saved(tmp_path, spacing=None, roi_size=[64, 64])
        load_checkpoint(path, ToyNetwork(rank=4, num_classes=5), settings)
    text = str(caught.value)
    assert "general_lora is 4 here and 2 in the checkpoint" in text
    assert "num_classes is 5 here and 3 in the checkpoint" in text
    last = text.splitlines()[-1].strip()
    assert last == "pass --num_classes 3 --general_lora 2 --spacing '$None' --roi_size '[64, 64]'"
    with pytest.raises(CheckpointError, match=r"experts.0.down.weight has shape \(2, 6\) .*, \(4, 6\) in this"):
        load_checkpoint(path, ToyNetwork(rank=4))


def test_a_setting_that_changes_no_shape_is_still_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass --fusion late"):
        load_checkpoint(saved(tmp_path), ToyNetwork(), {**SETTINGS, "fusion": "gated"})


def test_missing_and_left_over_tensors_are_named(tmp_path: Path) -> None:
    network = ToyNetwork()
    network.extra = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"extra.weight is not in the checkpoint"):
        load_checkpoint(saved(tmp_path), network)
    with pytest.raises(CheckpointError, match=r"extra.bias is in the checkpoint but not in this network"):
        load_checkpoint(saved(tmp_path, network), ToyNetwork())


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path, ToyNetwork())
    position = len(whole) - random.randrange(1, 100)
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        load_checkpoint(path, ToyNetwork())


def test_foreign_missing_and_newer_files_are_errors(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of medmoe"):
        read_metadata(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_metadata(tmp_path / "nowhere.safetensors")
    save_checkpoint(tmp_path / "newer.safetensors", ToyNetwork(), Metadata(format=99, medmoe_version="9.9"))
    with pytest.raises(CheckpointError, match=r"written by medmoe 9\.9; upgrade"):
        read_metadata(tmp_path / "newer.safetensors")


def test_a_full_disk_is_one_clear_error_and_the_old_file_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device; the checkpoint of before is intact.*--resume True"
    ):
        saved(tmp_path, ToyNetwork(seed=5))
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_limit_of_the_system_on_the_file_size_is_the_same_error(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            saved(tmp_path, ToyNetwork(seed=5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_optimizer_state_travels_by_parameter_name(tmp_path: Path) -> None:
    network, other = ToyNetwork(), ToyNetwork(seed=9)
    one, two = optimizer(network), optimizer(other)
    for step in range(3):
        network(toy.batch_of(0, step)[0]).square().mean().backward()
        one.step()
    tensors = optimizer_tensors(network, one)
    assert tensors["optimizer.prompter.prompts.step"].item() == 3
    restore_optimizer(other, two, tensors)
    for name, tensor in optimizer_tensors(other, two).items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    losses = train(tmp_path / "whole", 5)
    first = train_until(tmp_path / "cut", 5, epochs_done=3)
    torch.manual_seed(random.randrange(1000))
    second = train(tmp_path / "cut", 5, resume=True)
    assert len(first) == 3 * toy.STEPS and first + second == losses
    assert (tmp_path / "whole" / LAST).read_bytes() == (tmp_path / "cut" / LAST).read_bytes()


def train_until(folder: Path, epochs: int, epochs_done: int) -> list[float]:
    """Trains with the schedule of ``epochs`` and stops, as by a crash, in the epoch after ``epochs_done``."""
    losses: list[float] = []
    draw = toy.batch_of

    def crash(epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if epoch > epochs_done:
            raise RuntimeError("power cut")
        return draw(epoch, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(toy, "batch_of", crash)
        train(folder, epochs, losses=losses)
    return losses


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL at random moments, writing of checkpoints included; the forked children import nothing anew."""
    train(tmp_path / "whole", 8)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medmoe.training.checkpoint"])
    killed = 0
    for attempt in range(30):
        started = (tmp_path / "cut" / LAST).exists()
        options = {"resume": started, "pause": 0.005}
        child = context.Process(target=train, args=(tmp_path / "cut", 8), kwargs=options)
        child.start()
        if killed < 6:
            wait_for_change(tmp_path / "cut" / LAST, child)
            time.sleep(random.uniform(0, 0.05))
            os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            break
        read_checkpoint(tmp_path / "cut" / LAST)
        assert child.exitcode == -signal.SIGKILL, f"attempt {attempt} failed"
    assert killed >= 3
    assert (tmp_path / "whole" / LAST).read_bytes() == (tmp_path / "cut" / LAST).read_bytes()
    assert (tmp_path / "whole" / BEST).read_bytes() == (tmp_path / "cut" / BEST).read_bytes()


def wait_for_change(path: Path, child: Any) -> None:
    """Until ``path`` is written anew, or the child is gone."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while child.is_alive() and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        time.sleep(0.001)


def test_resuming_takes_up_changed_learning_rates_and_lengths(tmp_path: Path) -> None:
    train(tmp_path, 2)
    losses = train(tmp_path, 4, resume=True)
    assert len(losses) == 2 * toy.STEPS
    assert read_checkpoint(tmp_path / LAST)[2]["scheduler_steps"] == 4 * toy.STEPS


def test_resuming_with_nothing_left_or_another_epoch_length_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"already trained for 2 epochs and max_epochs is 2.*larger --max_epochs"):
        train(tmp_path, 2, resume=True)
    monkeypatch.setattr(toy, "STEPS", 3)
    with pytest.raises(ConfigError, match=r"an epoch has 3 steps here and had 4.*--steps_per_epoch"):
        train(tmp_path, 4, resume=True)


def test_the_best_checkpoint_is_that_of_the_best_validated_epoch(tmp_path: Path) -> None:
    network = ToyNetwork()
    scores = {1: 0.5, 2: math.nan, 4: 0.7, 5: 0.6}
    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, key_metric_name="val_mean_dice", metrics={}))
    handler = CheckpointHandler(network, optimizer(network), tmp_path, SETTINGS, evaluator=evaluator)  # type: ignore[arg-type]
    for epoch in range(1, 6):
        if epoch in scores:
            evaluator.state.epoch, evaluator.state.metrics = epoch, {"val_mean_dice": torch.tensor(scores[epoch])}
        handler.save(SimpleNamespace(state=SimpleNamespace(epoch=epoch, epoch_length=1)))  # type: ignore[arg-type]
    best = read_metadata(tmp_path / BEST)
    assert (best.epoch, best.metric_name) == (4, "val_mean_dice") and best.metric == pytest.approx(0.7)
    last = read_checkpoint(tmp_path / LAST)
    assert last[1].epoch == 5 and last[2]["best_epoch"] == 4
    assert not [name for name in load_file(tmp_path / BEST) if name.startswith(("optimizer.", "rng."))]


def test_a_new_run_keeps_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    for number in range(3):
        with caplog.at_level(logging.WARNING):
            prepare_output_dir(folder)
        (folder / "metrics.jsonl").write_text(f"{number}\n")
    assert [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run.1", "run.2", "run")] == [
        "0\n",
        "1\n",
        "2\n",
    ]
    assert "run.2" in caplog.text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    prepare_output_dir(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").exists() and not (tmp_path / "mine.1").exists()


def test_a_folder_that_cannot_be_renamed_or_resumed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*run"):
        prepare_output_dir(tmp_path / "run", resume=True)
    (tmp_path / "run.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the current folder"):
        prepare_output_dir(".")
    train(tmp_path, 1)
    (tmp_path / ".partial-killed.safetensors").touch()
    assert prepare_output_dir(tmp_path, resume=True) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == [BEST, LAST, "run.json"]


def test_the_settings_that_are_compared_exist() -> None:
    from medmoe.training.settings import RULES

    assert set(NETWORK_SETTINGS) <= set(RULES)


def test_checkpoints_are_read_without_importing_monai() -> None:
    code = "import sys, medmoe.training.checkpoint; sys.exit('monai' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
