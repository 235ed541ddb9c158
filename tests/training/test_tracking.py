# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events
from mlflow import MlflowClient
from mlflow.entities import Run
from training.toy import SETTINGS, STEPS
from training.toy_engines import engines

from medmoe.training.checkpoint import CheckpointHandler
from medmoe.training.handlers import InterruptHandler, MetricsLog, SetEpoch, Validation, read_rows
from medmoe.training.pictures import Overlays
from medmoe.training.routing_curves import RoutingPictures
from medmoe.training.tracking import Tracker, connect, flat_settings, metric_values, redact


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite store in a folder with a space, whose tables take a second to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('ml flow')}/runs of mine/mlflow.db"


def train(
    folder: Path, uri: str, epochs: int = 3, resume: bool = False, extra: Any = (), experiment: str = "toy experiment"
) -> Tracker:
    parts = engines(epochs)
    log = MetricsLog(folder, parts.optimizer, parts.evaluator, parts.network)
    Overlays(folder, parts.network.tasks, first=1, worst=1).attach(parts.evaluator)  # type: ignore[arg-type]
    tracker = Tracker(uri, experiment, log, folder, SETTINGS)
    saver = CheckpointHandler(
        parts.network, parts.optimizer, folder, SETTINGS, parts.scheduler, parts.evaluator, resume=resume
    )
    handlers = [
        Validation(parts.evaluator),
        log,
        saver,
        SetEpoch(),
        InterruptHandler(folder),
        RoutingPictures(log, folder),
    ]
    folder.mkdir(exist_ok=True)
    try:
        parts.trainer([*handlers, *extra, tracker]).run()
    finally:
        train.tracker = tracker  # type: ignore[attr-defined]
    return tracker


def run_of(uri: str, tracker: Tracker) -> tuple[MlflowClient, Run]:
    client = MlflowClient(tracking_uri=uri)
    return client, client.get_run(tracker.run_id)


class Raise:
    """Raises ``error`` in the second step of ``epoch``."""

    def __init__(self, epoch: int, error: BaseException) -> None:
        self.step, self.error = (epoch - 1) * STEPS + 2, error

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.step), self)

    def __call__(self, engine: Any) -> None:
        raise self.error


def artifacts(client: MlflowClient, run_id: str) -> set[str]:
    top = client.list_artifacts(run_id)
    inside = [file for entry in top if entry.is_dir for file in client.list_artifacts(run_id, entry.path)]
    return {entry.path for entry in [*top, *inside] if not entry.is_dir}


def check_finished(uri: str, tracker: Tracker, folder: Path, epochs: int) -> None:
    """All that a finished run must have in MLflow."""
    client, run = run_of(uri, tracker)
    assert run.info.status == "FINISHED" and run.info.run_name.startswith(f"{tracker.experiment}-2")
    assert (
        run.data.params["general_lora"] == "2" and run.data.params["class_names"] == '["background", "gray", "white"]'
    )
    rows = read_rows(folder)
    history = client.get_metric_history(tracker.run_id, "val_mean_dice")
    assert {m.step: m.value for m in history} == {row["epoch"]: row["metrics"]["val_mean_dice"] for row in rows}
    steps = client.get_metric_history(tracker.run_id, "train/step_loss")
    assert [m.value for m in sorted(steps, key=lambda m: m.step)] == [
        loss for row in rows[1:] for loss in row["losses"]
    ]
    assert len(steps) == epochs * STEPS and {m.step for m in steps} == set(range(1, epochs * STEPS + 1))
    assert run.data.metrics["routing/pmoe/medical/site03/usage/general"] == 0.2
    assert run.data.metrics["routing/pmoe/general/site02/entropy"] == pytest.approx(0.32)
    assert artifacts(client, tracker.run_id) == {
        "best.safetensors",
        "metrics.jsonl",
        "routing_curves.png",
        "routing_pmoe.png",
        "overlays/first_1.png",
        "overlays/worst_1.png",
    }


def test_a_finished_run_in_a_sqlite_store_in_a_folder_with_a_space(tmp_path: Path, store: str) -> None:
    tracker = train(tmp_path, store)
    check_finished(store, tracker, tmp_path, 3)
    folder = Path(store.removeprefix("sqlite:///")).parent
    found = list(folder.rglob("best.safetensors"))
    assert [path.read_bytes() for path in found] == [(tmp_path / "best.safetensors").read_bytes()]
    assert not [path for path in folder.parent.rglob("*") if "%" in str(path)]


def test_no_case_names_are_sent(tmp_path: Path, store: str) -> None:
    tracker = train(tmp_path, store, 1)
    client, run = run_of(store, tracker)
    assert "case0" not in str(run.to_dictionary())
    (tmp_path / "copy").mkdir()
    local = client.download_artifacts(tracker.run_id, "", str(tmp_path / "copy"))
    files = [path for path in Path(local).rglob("*") if path.is_file() and path.suffix != ".png"]
    assert files and not [path for path in files if b"case0" in path.read_bytes()]


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(ValueError("wrong"), ValueError, "FAILED"), (KeyboardInterrupt(), SystemExit, "KILLED")],
)
def test_a_run_that_fails_or_is_interrupted_is_marked(
    tmp_path: Path, store: str, error: BaseException, raised: type[BaseException], status: str
) -> None:
    with pytest.raises(raised):
        train(tmp_path, store, extra=[Raise(2, error)])
    tracker = train.tracker  # type: ignore[attr-defined]
    _, run = run_of(store, tracker)
    assert run.info.status == status
    first = tracker.run_id
    tracker = train(tmp_path, store, resume=True)
    assert tracker.run_id == first
    check_finished(store, tracker, tmp_path, 3)


def test_every_new_training_is_a_run_of_its_own(tmp_path: Path, store: str) -> None:
    one, two = train(tmp_path / "one", store, 1), train(tmp_path / "two", store, 1)
    assert one.run_id != two.run_id and one.run_name != two.run_name


def test_without_a_uri_nothing_is_tracked(tmp_path: Path) -> None:
    tracker = train(tmp_path, "", 1)
    assert tracker.run_id == "" and len(read_rows(tmp_path)) == 2 and not (tmp_path / "mlflow.json").exists()


def test_settings_become_parameters_without_secrets() -> None:
    settings = {
        "lr": 0.1,
        "nested": {"a": [1, 2], "api_key": "abc"},
        "uri": "http://me:word@host:1/x",
        "long": "x" * 1000,
        "nothing": None,
    }
    flat = dict(flat_settings(settings))
    assert flat["lr"] == "0.1" and flat["nested.a"] == "[1, 2]" and flat["nothing"] == "null"
    assert flat["nested.api_key"] == "***" and flat["uri"] == "http://***@host:1/x"
    assert len(flat["long"]) == 500 and flat["long"].endswith("...")
    assert redact("sqlite:///a@b.db") == "sqlite:///a@b.db"


def test_metric_steps() -> None:
    row = {"epoch": 2, "iteration": 4, "loss": 0.5, "losses": [0.6, 0.4], "lr": {"decoder": 0.1}, "seconds": 9.0}
    row["terms"] = {"organs": 0.25, "auxiliary/importance": 0.125}
    assert list(metric_values(row)) == [
        ("train/loss", 0.5, 2),
        ("train/step_loss", 0.6, 3),
        ("train/step_loss", 0.4, 4),
        ("losses/organs", 0.25, 2),
        ("losses/auxiliary/importance", 0.125, 2),
        ("lr/decoder", 0.1, 2),
        ("seconds", 9.0, 2),
    ]


class Server:
    """A real MLflow server on a free port of this machine."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = [
            "--backend-store-uri",
            self.store,
            "--artifacts-destination",
            str(self.folder),
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        log = open(self.folder / "server.log", "ab")
        self.process = subprocess.Popen(
            [*command, "--workers", "1", *store], stdout=log, stderr=log, start_new_session=True
        )
        log.close()
        end = time.monotonic() + 90
        while not self.healthy():
            assert self.process.poll() is None and time.monotonic() < end, (self.folder / "server.log").read_text()
            time.sleep(0.2)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def send(self, number: int) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, store: str) -> Iterator[Server]:
    connect(store).search_experiments()  # makes the tables, which the other tests have made if they ran
    server = Server(tmp_path_factory.mktemp("server"), store)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_a_finished_run_on_a_server(tmp_path: Path, server: Server) -> None:
    tracker = train(tmp_path, server.uri, experiment="on a server")
    check_finished(server.uri, tracker, tmp_path, 3)
    assert list(server.folder.rglob("best.safetensors"))


class AfterEpoch:
    """Runs ``action`` after ``epoch``, before the tracker sends it."""

    def __init__(self, epoch: int, action: Any) -> None:
        self.epoch, self.action = epoch, action

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED(once=self.epoch), self.action)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "medmoe.training.tracking"]


def test_a_server_that_hangs_is_said_once_and_gets_the_rest_when_it_is_back(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    extra = [AfterEpoch(2, lambda: server.send(signal.SIGSTOP)), AfterEpoch(4, lambda: server.send(signal.SIGCONT))]
    with caplog.at_level(logging.WARNING):
        tracker = train(tmp_path, server.uri, 6, extra=extra, experiment="on a server")
    lost, back = warnings_in(caplog)
    assert "cannot be reached" in lost and str(tmp_path / "metrics.jsonl") in lost and "is back" in back
    check_finished(server.uri, tracker, tmp_path, 6)


def test_a_server_that_stays_away_costs_seconds_and_no_metrics(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "mid", server.uri, 4, extra=[AfterEpoch(2, server.stop)])
        assert len(warnings_in(caplog)) == 1
        caplog.clear()
        train(tmp_path / "start", server.uri, 4)
    assert len(warnings_in(caplog)) == 1
    for name in ("mid", "start"):
        assert [row["epoch"] for row in read_rows(tmp_path / name)] == [0, 1, 2, 3, 4]
        assert (tmp_path / name / "last.safetensors").exists()
