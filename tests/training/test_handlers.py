# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Events
from training.toy import SETTINGS, STEPS
from training.toy_engines import engines

from medmoe import progress
from medmoe.errors import MedMoEError
from medmoe.training.checkpoint import BEST, LAST, CheckpointHandler, read_checkpoint, read_metadata
from medmoe.training.handlers import (
    FiniteLoss,
    InterruptHandler,
    MetricsLog,
    ProgressHandler,
    SetEpoch,
    Validation,
    on_failure,
    read_rows,
    scalars,
    summary,
)


class At:
    """Runs ``action`` when ``event`` happens in ``epoch``, after the handlers before it."""

    def __init__(self, epoch: int, action: Any, event: Any = Events.ITERATION_COMPLETED) -> None:
        self.epoch, self.action, self.event = epoch, action, event

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(self.event, lambda e: self.action() if e.state.epoch == self.epoch else None)


def boom() -> None:
    raise RuntimeError("boom")


def run(folder: Path, epochs: int = 3, resume: bool = False, extra: Any = (), interval: int = 1) -> Any:
    """A training with all handlers of a bundle but tracking and pictures; returns its parts and the log."""
    parts = engines(epochs)
    log = MetricsLog(folder, parts.optimizer, parts.evaluator, parts.network, parts.loss)
    saver = CheckpointHandler(
        parts.network, parts.optimizer, folder, SETTINGS, parts.scheduler, parts.evaluator, resume=resume
    )
    handlers = [Validation(parts.evaluator, interval), log, saver, SetEpoch(), FiniteLoss(), InterruptHandler(folder)]
    folder.mkdir(exist_ok=True)
    parts.trainer([*handlers, *extra]).run()
    return parts, log


def losses(folder: Path) -> list[list[float]]:
    return [row["losses"] for row in read_rows(folder) if row["epoch"]]


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("seconds", "time", "memory")}


def test_a_resumed_training_repeats_the_losses_metrics_and_weights(tmp_path: Path) -> None:
    run(tmp_path / "whole", 4)
    with pytest.raises(RuntimeError, match="boom"):
        run(tmp_path / "cut", 4, extra=[At(3, boom)])
    assert len(losses(tmp_path / "cut")) == 2
    run(tmp_path / "cut", 4, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4
    for row, other in zip(read_rows(tmp_path / "whole"), read_rows(tmp_path / "cut"), strict=True):
        assert without_clock(row) == without_clock(other)
    assert (tmp_path / "whole" / LAST).read_bytes() == (tmp_path / "cut" / LAST).read_bytes()
    assert (tmp_path / "whole" / BEST).read_bytes() == (tmp_path / "cut" / BEST).read_bytes()


def test_epochs_differ_and_training_helps(tmp_path: Path) -> None:
    _, log = run(tmp_path, 8)
    assert len({tuple(row) for row in losses(tmp_path)}) == 8
    dice = {row["epoch"]: row["metrics"]["val_mean_dice"] for row in log.rows}
    assert read_metadata(tmp_path / BEST).metric == max(score for epoch, score in dice.items() if epoch)
    assert max(dice.values()) > dice[0] + 0.1 and log.rows[-1]["loss"] < log.rows[1]["loss"]


def test_rows_hold_what_a_report_needs(tmp_path: Path) -> None:
    _, log = run(tmp_path, 2)
    assert [row["epoch"] for row in log.rows] == [0, 1, 2] and log.rows == read_rows(tmp_path)
    row = log.rows[2]
    assert row["iteration"] == 2 * STEPS and len(row["losses"]) == STEPS
    assert row["loss"] == pytest.approx(sum(row["losses"]) / STEPS)
    assert set(row["terms"]) == {"label", "auxiliary/balance"}
    assert sum(row["terms"].values()) == pytest.approx(row["loss"], rel=1e-5)
    assert set(row["lr"]) == {"prompts", "adapters", "decoder", "decoder_undecayed"}
    assert row["routing"]["routing/pmoe/medical/site03/usage/medical"] == 0.8
    assert 0 < log.rows[1]["seconds"] < row["seconds"] and row["memory"]["ram"] > 0.05


def test_routing_is_recorded_in_the_last_step_of_an_epoch_only(tmp_path: Path) -> None:
    parts, _ = run(tmp_path, 2)
    assert parts.network.recorded == 2 and parts.network.recording is False


def test_validation_before_training_at_intervals_and_at_the_end(tmp_path: Path) -> None:
    _, log = run(tmp_path, 5, interval=2)
    assert [row["epoch"] for row in log.rows if "metrics" in row] == [0, 2, 4, 5]


def test_a_row_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2, "lo')
    assert [row["epoch"] for row in read_rows(tmp_path)] == [0, 1]
    assert read_rows(tmp_path / "nowhere") == []


def test_only_single_numbers_are_metrics() -> None:
    metrics = {
        "a": torch.tensor(0.5),
        "b": 1,
        "c": torch.rand(3),
        "d": "text",
        "e": {"f": 1.0},
        "g": torch.rand(1).numpy()[0],
    }
    found = scalars(metrics)
    assert set(found) == {"a", "b", "g"} and found["a"] == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path: Path, bad: float) -> None:
    kept: dict[str, Any] = {}

    class Poison:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.GET_BATCH_COMPLETED, self)

        def __call__(self, engine: Any) -> None:
            if engine.state.epoch == 2:
                engine.state.batch["image"] += bad
                kept.update({name: tensor.clone() for name, tensor in engine.network.named_parameters()})
                kept["network"] = engine.network

    with pytest.raises(MedMoEError, match=rf"loss became nan at step {STEPS + 1} \(epoch 2\) on case\d\d; .*--lr"):
        run(tmp_path, extra=[Poison()])
    network = kept.pop("network")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in network.named_parameters())
    assert read_checkpoint(tmp_path / LAST)[1].epoch == 1


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Python's own SIGINT handler: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_resume_and_the_checkpoint_is_valid(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, 4, extra=[At(3, lambda: os.kill(os.getpid(), number))])
    assert caught.value.code == 130 and signal.getsignal(signal.SIGTERM) is before
    text = capfd.readouterr().err
    assert text.count("Interrupted") == 1 and "--resume True" in text and LAST in text
    assert read_checkpoint(tmp_path / LAST)[1].epoch == 2
    run(tmp_path, 4, resume=True)
    assert [row["epoch"] for row in read_rows(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupt_before_the_first_checkpoint_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, extra=[At(1, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert "nothing to resume" in capfd.readouterr().err


@pytest.mark.parametrize(
    "event", [Events.STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED]
)
def test_every_failure_action_runs_once_and_the_error_comes_out(tmp_path: Path, event: Any) -> None:
    seen: list[tuple[str, str]] = []

    class Actions:
        def attach(self, engine: Any) -> None:
            for name in ("one", "two"):
                on_failure(engine, lambda error, name=name: seen.append((name, str(error))))  # type: ignore[misc]
            on_failure(engine, lambda error: boom())  # type: ignore[func-returns-value]

    epoch = {Events.STARTED: 0, Events.COMPLETED: 2}.get(event, 1)

    def fail() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run(tmp_path, 2, extra=[Actions(), At(epoch, fail, event)])
    assert seen == [("one", "wrong"), ("two", "wrong")]


class Line(progress.Progress):
    """A bar that remembers what was done to it."""

    seen: list[str]

    def __enter__(self) -> progress.Progress:
        super().__enter__()
        self.bar = self  # type: ignore[assignment]
        self.seen.append(f"open {self.description} {self.total}")
        return self

    def update(self, *args: Any, **options: Any) -> None:
        self.noted = options["note"]

    task = 0

    def start(self) -> None:
        self.seen.append(f"go on {self.description}")

    def stop(self) -> None:
        self.seen.append(f"stop {self.description} {self.done}")


def test_one_bar_at_a_time_with_totals_and_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Line.seen = []
    monkeypatch.setattr("medmoe.training.handlers.Progress", Line)
    parts = engines(2)
    bar = ProgressHandler("train", parts.evaluator)
    ProgressHandler("validate").attach(parts.evaluator)
    trainer = parts.trainer([Validation(parts.evaluator, 2), bar])
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda e: Line.seen.append(bar.note(e)))
    trainer.run()
    note = Line.seen.pop(3)
    assert note.startswith("loss ") and "val_mean_dice 0." in note
    assert Line.seen == [
        "open validate 5",
        "stop validate 5",
        f"open train {2 * STEPS}",
        f"stop train {2 * STEPS}",
        "open validate 5",
        "stop validate 5",
        "go on train",
        f"stop train {2 * STEPS}",
    ]
    assert ProgressHandler.open == []


def test_a_failing_run_closes_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = engines(2)
    ProgressHandler("validate").attach(parts.evaluator)
    parts.evaluator.add_event_handler(Events.ITERATION_COMPLETED, boom)
    with pytest.raises(RuntimeError, match="boom"):
        parts.trainer([ProgressHandler("train"), Validation(parts.evaluator)]).run()
    assert ProgressHandler.open == []


def test_the_summary_shows_before_and_after_time_and_where_to_look(tmp_path: Path) -> None:
    run(tmp_path, 3)
    counts = {"prompts": 54, "adapters": 48, "trainable": 102, "total": 5_000_000}
    (tmp_path / "run.json").write_text(json.dumps({"parameters": counts}))
    rows = read_rows(tmp_path)
    best = max(rows[1:], key=lambda row: row["metrics"]["val_mean_dice"])
    text = summary(tmp_path, "sqlite:///runs/my flow.db")
    assert f"{rows[0]['metrics']['val_mean_dice']:.3f}" in text
    assert f"{best['metrics']['val_mean_dice']:.3f}" in text and f"after epoch {best['epoch']}" in text
    for part in ("trainable parameters: 0.000 M", "of 5.0 M", "3 epochs", "GiB of RAM", BEST):
        assert part in text
    assert "mlflow ui --backend-store-uri 'sqlite:///runs/my flow.db'" in text


def test_the_summary_shows_the_telling_score_of_every_task(tmp_path: Path) -> None:
    before = {"val_grade_auc": 0.5, "val_organs_mean_dice": 0.9, "val_organs_mean_hd95": 9.0, "val_edges_mean_f1": None}
    rows = [before, {**before, "val_grade_auc": 0.75, "val_edges_mean_f1": 0.25}, {**before, "val_grade_auc": 0.625}]
    common = {"seconds": 1.0, "memory": {"ram": 1.0}}
    lines = [json.dumps({"epoch": epoch, "metrics": row, **common}) for epoch, row in enumerate(rows)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    table = [line.split() for line in summary(tmp_path).splitlines()[:4]]
    assert table[0][-3:] == ["after", "epoch", "1)"]  # the best by the first metric
    assert table[1:] == [
        ["grade_auc", "0.500", "0.750"],
        ["organs_mean_dice", "0.900", "0.900"],
        ["edges_mean_f1", "-", "0.250"],
    ]


def test_a_term_is_averaged_over_the_steps_that_have_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, loss=SimpleNamespace(last={}))  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(state=SimpleNamespace(epoch=1, iteration=3, output={"loss": torch.tensor(1.0)}))
    log.started = 0.0
    for last in ({"a": 1.0, "b": 4.0}, {"a": 2.0}, {"a": 6.0}):
        log.loss.last = last  # type: ignore[union-attr]
        log.finish_step(trainer)
    log.finish_epoch(trainer)
    log.finish_step(trainer)
    log.finish_epoch(trainer)
    assert [row["terms"] for row in log.rows] == [{"a": 3.0, "b": 4.0}, {"a": 6.0}]


def test_the_summary_of_an_unfinished_run_is_no_error(tmp_path: Path) -> None:
    assert summary(tmp_path) == ""
