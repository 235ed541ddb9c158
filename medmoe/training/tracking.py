# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""MLflow tracking that a training survives: a server that is away is said once, and asked again after every epoch."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ignite.engine import Events
from monai.engines.workflow import Workflow

from medmoe.errors import one_line
from medmoe.files import write_text
from medmoe.training.checkpoint import BEST
from medmoe.training.handlers import MetricsLog, on_failure

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

ARTIFACTS = (BEST, "run.json", "metrics.jsonl", "routing*.png", "overlays/*.png")
PARAM_LENGTH, PARAM_BATCH, METRIC_BATCH = 500, 100, 1000
SECRET = re.compile(r"token|secret|password|passwd|credential|api_?key", re.IGNORECASE)


def redact(text: str) -> str:
    """``text`` without the user and password of any address in it."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings as MLflow parameters: nested names joined by dots, long values cut, passwords and tokens masked."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{name}.")
        elif SECRET.search(name):
            yield f"{prefix}{name}", "***"
        else:
            text = redact(value if isinstance(value, str) else json.dumps(value))
            yield f"{prefix}{name}", text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 3] + "..."


def metric_values(row: Mapping[str, Any]) -> Iterator[tuple[str, float | None, int]]:
    """Name, value (if finite) and step of every number in a row of ``metrics.jsonl``; losses of steps count by step."""
    epoch = row["epoch"]
    if "loss" in row:
        yield "train/loss", row["loss"], epoch
    first = row["iteration"] - len(row.get("losses", ())) + 1
    for step, loss in enumerate(row.get("losses", ()), first):
        yield "train/step_loss", loss, step
    prefixes = {"terms": "losses/", "lr": "lr/", "metrics": "", "routing": "", "memory": "memory_gib/"}
    for group, prefix in prefixes.items():
        for name, value in row.get(group, {}).items():
            yield prefix + name, value, epoch
    yield "seconds", row["seconds"], epoch


def local_store(uri: str) -> Path | None:
    """The folder of a sqlite store, which may not exist yet; ``None`` for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute().parent if uri.startswith("sqlite:///") else None


def connect(uri: str) -> MlflowClient:
    """A client that gives up within seconds rather than minutes, and that reports nothing to MLflow's makers.

    Values that the user has set in the environment are kept.
    """
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    for name, value in {**limits, "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient
    from mlflow.telemetry import set_telemetry_client

    set_telemetry_client()  # MONAI imports mlflow, which decides at import, before the setting above.
    folder = local_store(uri)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


class Tracker:
    """Sends parameters, the rows of a :class:`MetricsLog` and, in the end, files to MLflow.

    The run is marked FINISHED, FAILED or KILLED by how the training ended. A resumed training goes on with its MLflow
    run, whose id is kept in ``mlflow.json``. What could not be sent is sent once the server is back; whether or not it
    comes back, ``metrics.jsonl`` has it all. Names of cases are not sent.

    Put it last among the trainer's handlers.

    Args:
        uri: a tracking URI such as ``sqlite:///runs/mlflow.db`` or ``http://host:5000``; empty for no tracking.
        experiment: name of the MLflow experiment, made where it does not exist.
        log: the metrics log of the same trainer.
        output_dir: of the run.
        settings: the bundle's top-level settings.
        run_name: defaults to the experiment's name, the time, and four random letters.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        log: MetricsLog,
        output_dir: str | os.PathLike[str],
        settings: Mapping[str, Any],
        run_name: str = "",
    ) -> None:
        self.uri, self.experiment, self.log, self.folder = uri, experiment, log, Path(output_dir)
        self.settings = dict(settings)
        self.run_name = run_name or f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        self.client: MlflowClient | None = None
        self.run_id = ""
        self.described = False
        self.sent = 0
        self.away = False

    def attach(self, trainer: Workflow) -> None:
        """Registers with ``trainer``, unless there is no URI."""
        if not self.uri:
            return
        trainer.add_event_handler(Events.STARTED, self.start)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: self.attempt(self.send_rows))
        trainer.add_event_handler(Events.COMPLETED, lambda engine: self.finish("FINISHED"))
        on_failure(trainer, self.fail)

    def attempt(self, action: Callable[[], None]) -> None:
        """Runs ``action``; whatever goes wrong with MLflow is said once and never ends the training."""
        try:
            action()
        except Exception as error:
            if not self.away:
                logger.warning(
                    "MLflow at %s cannot be reached or used (%s). Training goes on; all metrics are in %s and will be "
                    "sent if it comes back.",
                    redact(self.uri),
                    redact(one_line(error))[:300],
                    self.folder / "metrics.jsonl",
                )
            self.away = True
        else:
            if self.away:
                logger.warning("MLflow at %s is back; what it missed was sent.", redact(self.uri))
            self.away = False

    def start(self, trainer: Workflow) -> None:
        """Opens the run."""
        self.attempt(self.send_rows)

    def connected(self) -> MlflowClient:
        """The client, with the run open."""
        if self.client is None:
            self.client = connect(self.uri)
        if not self.run_id:
            self.run_id = self.reopened(self.client)
            self.described = bool(self.run_id)
            self.run_id = self.run_id or self.created(self.client)
        if not self.described:
            self.describe(self.client)
        return self.client

    def reopened(self, client: MlflowClient) -> str:
        """The id of the run that is resumed, marked as running again; empty where there is none."""
        path = self.folder / "mlflow.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if known.get("tracking_uri") != redact(self.uri):
            return ""
        client.update_run(known["run_id"], status="RUNNING")
        self.sent = sum(row["epoch"] <= known["last_epoch"] for row in self.log.rows)
        return str(known["run_id"])

    def created(self, client: MlflowClient) -> str:
        """The id of a new run."""
        found = client.get_experiment_by_name(self.experiment)
        folder = local_store(self.uri)
        # A path, not a URI: MLflow encodes a space in its own default location twice.
        location = None if folder is None else str(folder / "mlartifacts" / self.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self.experiment, location)
        run_id: str = client.create_run(experiment, run_name=self.run_name).info.run_id
        return run_id

    def describe(self, client: MlflowClient) -> None:
        """Sends the settings. MLflow takes the same ones twice, where an answer was lost."""
        from mlflow.entities import Param

        for batch in batches([Param(*pair) for pair in flat_settings(self.settings)], PARAM_BATCH):
            client.log_batch(self.run_id, params=batch)
        self.described = True

    def remember(self) -> None:
        """Notes the run and the last epoch that it has, for a training that resumes."""
        last = max((row["epoch"] for row in self.log.rows[: self.sent]), default=-1)
        known = {"tracking_uri": redact(self.uri), "run_id": self.run_id, "last_epoch": last}
        write_text(self.folder / "mlflow.json", json.dumps(known) + "\n")

    def send_rows(self) -> None:
        """Sends the rows that have not been sent. MLflow ignores what it was sent before and did not confirm."""
        from mlflow.entities import Metric

        client = self.connected()
        rows = self.log.rows[self.sent :]
        metrics = [
            Metric(re.sub(r"[^\w\-./: ]", "_", name), value, int(row["time"] * 1000), step)
            for row in rows
            for name, value, step in metric_values(row)
            if value is not None
        ]
        for batch in batches(metrics, METRIC_BATCH):
            client.log_batch(self.run_id, metrics=batch)
        self.sent += len(rows)
        self.remember()

    def finish(self, status: str) -> None:
        """Sends what is left and closes the run with ``status``."""
        self.attempt(self.send_rows)
        if self.away:
            return
        if status == "FINISHED":
            self.attempt(self.send_files)
        self.attempt(lambda: self.connected().set_terminated(self.run_id, status))

    def send_files(self) -> None:
        """Uploads checkpoint, run record, metrics and pictures."""
        for pattern in ARTIFACTS:
            for path in sorted(self.folder.glob(pattern)):
                parent = path.relative_to(self.folder).parent
                self.connected().log_artifact(self.run_id, str(path), None if parent == Path() else parent.as_posix())

    def fail(self, error: BaseException) -> None:
        """Marks the run as killed by the user, or failed."""
        self.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")


def add_to_run(
    output_dir: str | os.PathLike[str],
    uri: str,
    metrics: Mapping[str, float],
    files: Sequence[Path] = (),
    folder: str | None = None,
) -> None:
    """Adds metrics and files to the MLflow run of the training in ``output_dir``, where it has one at ``uri``.

    Whatever goes wrong with MLflow is a warning.

    Args:
        folder: of the artifacts, where the files go.
    """
    try:
        path = Path(output_dir) / "mlflow.json"
        known = json.loads(path.read_text(encoding="utf-8")) if uri and path.exists() else {}
        if known.get("tracking_uri") != redact(uri):
            return
        from mlflow.entities import Metric

        client, now = connect(uri), int(time.time() * 1000)
        client.log_batch(known["run_id"], metrics=[Metric(*pair, now, 0) for pair in metrics.items()])
        for file in files:
            client.log_artifact(known["run_id"], str(file), folder)
    except Exception as error:
        reason = redact(one_line(error))[:300]
        logger.warning("MLflow at %s did not take %s metrics (%s).", redact(uri), len(metrics), reason)


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """``items`` in runs of at most ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))
