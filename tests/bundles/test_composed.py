# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The bundles of several tasks and conditions from beginning to end: train, be cut off, resume, evaluate, predict."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from bundle_runs import (
    COMPOSED,
    EVALUATE,
    INFERENCE,
    TINY_EXPERTS,
    TRAIN,
    PowerCut,
    cut,
    error_of,
    part,
    rows_of,
    run,
    settings_of,
    write_cases,
)
from PIL import Image

from medmoe.inference.predict import predict
from medmoe.tasks import Task
from medmoe.training.checkpoint import LAST, conditions_of, read_checkpoint, read_metadata, tasks_of

METRICS = {"classes": "mean_dice", "labels": "mean_dice", "boundary": "mean_f1", "distance": "mean_mae", "image": "auc"}
ROUTERS = {
    "pmoe_multitask": {"pmoe", "fgmoe"},
    "pmoe_multimodal": {"pmoe", "mope"},
    "pmoe_full": {"pmoe", "mope", "adaroute", "fgmoe"},
    "pmoe_cls": {"pmoe"},
}


WITH_TASKS = [bundle for bundle in COMPOSED if "tasks" in settings_of(bundle)]


class Run(NamedTuple):
    """A bundle that was trained: what it says itself, and what it was run with."""

    bundle: Path
    own: dict[str, Any]
    data: Path
    folder: Path
    settings: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def tasks(self) -> list[Task]:
        return tasks_of(self.checkpoint)

    @property
    def masks(self) -> list[str]:
        """The ends of the names of the masks of a case."""
        main = next((task for task in self.tasks if task.kind in ("classes", "labels")), None)
        if main is None:
            return []
        return [""] if main.kind == "classes" else ["_" + name.replace(" ", "_") for name in main.names]


@pytest.fixture(scope="module", params=COMPOSED, ids=lambda bundle: bundle.stem)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    bundle, folder = request.param, tmp_path_factory.mktemp(request.param.stem)
    own = settings_of(bundle)
    data = write_cases(folder / "data", own)
    settings = {**TINY_EXPERTS, "resize": [32, 32], "dataset_dir": str(data), "output_dir": str(folder / "run")}
    settings["val_interval"] = 2
    run(bundle, **settings)
    return Run(bundle, own, data, folder / "run", settings)


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_it_trains_all_of_its_tasks(trained: Run) -> None:
    rows = rows_of(trained.folder)
    assert [row["epoch"] for row in rows] == [0, 1, 2] and np.isfinite(rows[-1]["losses"]).all()
    assert set(rows[-1]["terms"]) >= {task.name for task in trained.tasks}
    prefix = {task.name: "val_" if task.name == "label" else f"val_{task.name}_" for task in trained.tasks}
    assert {prefix[task.name] + METRICS[task.kind] for task in trained.tasks} <= set(rows[-1]["metrics"])
    assert {name.split("/")[1] for name in rows[-1]["routing"]} == ROUTERS[trained.bundle.stem]
    schema = conditions_of(trained.checkpoint)
    known = [column.name for column in schema.columns] if schema else []
    assert known == [item["name"] for item in trained.own.get("conditions") or ()]
    record = json.loads((trained.folder / "run.json").read_text())
    assert record["settings"]["resize"] == [32, 32] and record["cost"]


def test_it_resumes_to_the_same_weights(trained: Run, tmp_path: Path) -> None:
    settings = {**trained.settings, "output_dir": str(tmp_path / "run")}
    settings["validate#handlers"] = []  # pictures take most of the time
    with pytest.raises(PowerCut):
        run(trained.bundle, before_run=cut(step=4), **settings)
    run(trained.bundle, resume=True, **settings)
    one, other = (read_checkpoint(folder / LAST)[0] for folder in (trained.folder, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_its_evaluation_repeats_the_validation_of_the_best_epoch(trained: Run, tmp_path: Path) -> None:
    settings = {**trained.settings, "output_dir": str(tmp_path), "checkpoint": str(trained.checkpoint)}
    run(trained.bundle, EVALUATE, **settings, split="validation")
    content = json.loads((tmp_path / "evaluation_validation/cases.json").read_text())
    epoch = read_metadata(trained.checkpoint).epoch
    best = next(row for row in rows_of(trained.folder) if row["epoch"] == epoch)["metrics"]
    for name, value in {**content["mean"], **content["classes"]}.items():
        assert value == pytest.approx(best[name], rel=1e-4, abs=1e-6, nan_ok=True), name
    assert [row["case"] for row in table_of(tmp_path / "evaluation_validation/cases.csv")] == ["case4", "case5", "mean"]


def test_it_predicts_alike_through_the_bundle_and_from_the_checkpoint_alone(trained: Run, tmp_path: Path) -> None:
    """All that shapes the network is in the checkpoint; table and second images are given anew."""
    conditions = {item["kind"]: item["name"] for item in trained.own.get("conditions") or ()}
    given = {"table": str(trained.data / trained.own["table"])} if conditions else {}
    given |= {"condition_dir": str(trained.data / conditions["image"])} if conditions else {}
    settings = {**trained.settings, "dataset_dir": "nowhere", "checkpoint": str(trained.checkpoint), **given}
    images, one, other = trained.data / "images", tmp_path / "bundle", tmp_path / "predicted"
    run(trained.bundle, INFERENCE, kind="infer", **settings, input=str(images), output=str(one))
    written = predict(images, other, trained.checkpoint, **given)
    names = [f"case{index}{end}.png" for index in range(8) for end in trained.masks]
    image_tasks = [task for task in trained.tasks if not task.dense]
    assert [path.name for path in written] == names + ["images.csv"] * bool(image_tasks)
    assert {path.name for path in other.iterdir()} == {path.name for path in written} | {"predictions.json"}
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in written:
        assert path.read_bytes() == (one / path.name).read_bytes(), path.name
    for path in other.glob("*.png"):
        mask = np.asarray(Image.open(path))
        assert mask.shape == (40, 44) and mask.max() <= 1
    for row in table_of(other / "images.csv") if image_tasks else ():
        for task in image_tasks:
            shares = {name: float(row[f"{task.name}: {name}"]) for name in task.names}
            assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
            assert row[task.name] in task.names and shares[row[task.name]] == max(shares.values())


def test_what_is_not_known_of_a_case_may_be_left_out(
    trained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing table, second image, row or value is the null condition that the network learned."""
    conditions = trained.own.get("conditions") or []
    image = trained.data / "images/case0.png"
    before = predict(image, tmp_path / "without", trained.checkpoint)
    assert before and ("missing for all inputs" in caplog.text) == bool(conditions)
    if not conditions:
        return
    columns = [item["name"] for item in conditions if item["kind"] != "image"]
    (tmp_path / "some.csv").write_text(f"case,{columns[1]}\ncase0,another\n")
    caplog.clear()
    predict(image, tmp_path / "some", trained.checkpoint, table=str(tmp_path / "some.csv"))
    assert f"condition {columns[1]}: in 1 of 1 cases the value was never seen in training" in caplog.text
    settings = {**trained.settings, "checkpoint": str(trained.checkpoint), "input": str(image)}
    message = error_of(trained.bundle, INFERENCE, kind="infer", **settings, table="no.csv", condition_dir="no")
    assert "table: there is no 'no.csv'. Give a CSV file with a row for each input" in message
    assert "condition_dir: there is no 'no'. Give a folder with the second images" in message


def test_a_bundle_of_other_tasks_does_not_take_the_checkpoint(trained: Run) -> None:
    settings = {**trained.settings, "checkpoint": str(trained.checkpoint)}
    message = error_of(TRAIN, INFERENCE, kind="infer", **settings, input=str(trained.data / "images"))
    assert "does not fit this network" in message
    for name in ("tasks", "conditions", "decoder"):
        assert (f"{name} is " in message) == (name in trained.own), name


@pytest.mark.parametrize("trained", WITH_TASKS, indirect=True, ids=lambda bundle: bundle.stem)
def test_where_targets_are_and_what_they_weigh_may_change_after_training(trained: Run, tmp_path: Path) -> None:
    tasks = [{**task, "weight": 0.5} for task in trained.own["tasks"]]
    settings = {**trained.settings, "output_dir": str(tmp_path), "checkpoint": str(trained.checkpoint), "tasks": tasks}
    workflow = run(trained.bundle, EVALUATE, **settings)
    assert [task.weight for task in part(workflow, "task_list")] == [0.5] * len(tasks)
    assert (tmp_path / "evaluation_test/cases.json").is_file()
