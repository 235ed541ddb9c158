# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The scores of tasks in MONAI's evaluators, the table of cases, and the gain of one network for all tasks."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from threshold_network import Threshold
from torch import Tensor

from medmoe.data import Case, CaseDataset, evaluation_preprocessing, loader, postprocessing
from medmoe.errors import ConfigError, DataError
from medmoe.inference import CaseTable, additional_metrics, key_metric, metrics, sliding_window, task_metrics
from medmoe.inference.metrics import dice
from medmoe.inference.task_metrics import TaskMetric, multi_task_gain
from medmoe.tasks import Task, single_task

TISSUE = Task("tissue", "classes", ("background", "gray", "white"))
ORGANS = Task("organs", "labels", ("left side", "right"))
EDGES = Task("edges", "boundary", ("left side", "right"), of="organs")
FAR = Task("far", "distance", ("left side", "right"), of="organs")
GRADE = Task("grade", "image", ("low", "high"))
EVERY = [TISSUE, ORGANS, EDGES, FAR, GRADE]
PLAIN = single_task(3, ["background", "left side", "right"])
SIZE = (9, 8)


def random_result(task: Task) -> tuple[Any, Any]:
    """A prediction and a target of one case, labelled everywhere."""
    if task.kind == "image":
        return torch.rand(2).softmax(0), int(torch.randint(0, 2, ()))
    if task.kind == "distance":
        return torch.rand(2, *SIZE) * 2 - 1, torch.rand(2, *SIZE) * 2 - 1
    if task.kind == "classes":
        return torch.randn(3, *SIZE).softmax(0), torch.randint(0, 3, (1, *SIZE), dtype=torch.uint8)
    return torch.rand(2, *SIZE), torch.randint(0, 2, (2, *SIZE), dtype=torch.uint8)


Results = dict[str, tuple[Any, Any]]


def evaluate(tasks: Sequence[Task], results: Sequence[Results], *handlers: object) -> SupervisedEvaluator:
    """Runs an evaluator whose postprocessing gives ``results``: predictions and targets by task, case by case."""
    samples = [{"image": torch.zeros(1, 2, 2), "case": f"case {index}"} for index in range(len(results))]
    queue = iter(list(results) * 2)

    def postprocess(data: dict[str, Any]) -> dict[str, Any]:
        result = next(queue)
        predictions = {f"pred_{name}": prediction for name, (prediction, _) in result.items()}
        return {**data, **predictions, **{f"target_{name}": target for name, (_, target) in result.items()}}

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(samples, batch_size=2, collate_fn=list_data_collate),
        network=torch.nn.Identity(),
        postprocessing=postprocess,
        key_val_metric=key_metric(tasks),
        additional_metrics=additional_metrics(tasks),
        val_handlers=handlers,
    )
    evaluator.run()
    return evaluator


def classes(share: float = 0.3) -> Tensor:
    """A mask (1, ...) of background and two classes."""
    return torch.randint(1, 3, (1, *SIZE)) * (torch.rand(1, *SIZE) < share)


def plain_result(prediction: Tensor, label: Tensor) -> Results:
    """The result of plain segmentation whose most probable classes are ``prediction`` (1, ...)."""
    return {"label": (torch.rand(3, *SIZE) + torch.stack([prediction[0] == k for k in range(3)]), label)}


def test_names_and_which_metric_chooses_the_best_checkpoint() -> None:
    assert list(task_metrics(PLAIN)) == ["val_mean_dice", "val_mean_iou", "val_mean_hd95"]
    names = list(task_metrics([FAR, GRADE, EDGES, ORGANS]))
    assert names[:4] == ["val_organs_mean_dice", "val_organs_mean_iou", "val_organs_mean_hd95", "val_far_mean_mae"]
    assert names[4:8] == [f"val_grade_{s}" for s in ("auc", "balanced_accuracy", "accuracy", "cross_entropy")]
    keys = [([FAR, EDGES, GRADE], "val_edges_mean_f1"), ([GRADE, TISSUE], "val_tissue_mean_dice")]
    for tasks, key in [*keys, ([GRADE], "val_grade_auc")]:
        assert list(key_metric(tasks)) == [key]
        assert {key, *additional_metrics(tasks)} == set(task_metrics(tasks)) and key not in additional_metrics(tasks)


def test_table_of_plain_segmentation(tmp_path: Path) -> None:
    pairs = [(classes(), classes()) for _ in range(5)]
    for mask in (*pairs[0], *pairs[1], pairs[3][0]):
        mask[mask == 2] = 1
    table = CaseTable(PLAIN, tmp_path / "results" / "cases")
    evaluator = evaluate(PLAIN, [plain_result(*pair) for pair in pairs], table)
    expected = torch.stack([dice(*(torch.cat([m == 1, m == 2]) for m in pair)) for pair in pairs])
    assert expected[:, 1].isnan().sum() == 2 and expected[3, 1] == 0
    found = evaluator.state.metrics
    assert found["val_dice_left_side"] == pytest.approx(float(expected[:, 0].mean()))
    assert found["val_dice_right"] == pytest.approx(float(expected[2:, 1].mean()))
    assert found["val_mean_dice"] == pytest.approx((found["val_dice_left_side"] + found["val_dice_right"]) / 2)
    assert evaluator.state.best_metric == found["val_mean_dice"]
    content = json.loads((tmp_path / "results" / "cases.json").read_text())
    assert content["mean"].keys() == {"val_mean_dice", "val_mean_iou", "val_mean_hd95"}
    assert content["cases"][0]["case"] == "case 0" and content["cases"][0]["val_dice_right"] is None
    assert content["cases"][3]["val_hd95_right"] == pytest.approx(math.hypot(*SIZE))
    with open(tmp_path / "results" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"case {i}" for i in range(5)] + ["mean"]
    assert rows[1]["val_dice_right"] == "" and rows[3]["val_dice_right"] == "0.000000"
    assert float(rows[-1]["val_iou_left_side"]) == pytest.approx(found["val_iou_left_side"], abs=1e-6)
    evaluator.run()
    assert len(table.cases) == 5


def test_every_task_has_its_scores() -> None:
    results = [{task.name: random_result(task) for task in EVERY} for _ in range(5)]
    results[0]["grade"], results[1]["grade"] = (torch.tensor([0.2, 0.8]), 0), (torch.tensor([0.3, 0.7]), 1)
    found = evaluate(EVERY, results).state.metrics
    assert set(found) == set(task_metrics(EVERY))

    def mean(task: Task, score: Any) -> float:
        pairs = [result[task.name] for result in results]
        return float(torch.stack([score(torch.as_tensor(p), torch.as_tensor(t)) for p, t in pairs]).nanmean(0).mean())

    def of_classes(p: Tensor, t: Tensor) -> Tensor:
        return dice(*(torch.stack([m == k for k in (1, 2)]) for m in (p.argmax(0), t[0])))

    assert found["val_tissue_mean_dice"] == pytest.approx(mean(TISSUE, of_classes))
    assert found["val_organs_mean_dice"] == pytest.approx(mean(ORGANS, lambda p, t: dice(p >= 0.5, t == 1)))
    boundary = mean(EDGES, lambda p, t: metrics.boundary_f1(p >= 0.5, t == 1))
    assert found["val_edges_mean_f1"] == pytest.approx(boundary)
    assert found["val_far_mean_mae"] == pytest.approx(mean(FAR, lambda p, t: (p - t).abs().mean((1, 2)) * 16), rel=1e-5)
    probabilities = torch.stack([result["grade"][0] for result in results])
    grades = torch.tensor([result["grade"][1] for result in results])
    for score in ("auc", "accuracy", "balanced_accuracy", "cross_entropy"):
        assert found[f"val_grade_{score}"] == pytest.approx(getattr(metrics, score)(probabilities, grades)), score


def test_what_is_not_labelled_is_not_judged() -> None:
    """Channels without a label are NaN; voxels without one count neither as right nor as wrong."""
    kept = torch.rand(SIZE) < 0.5
    nothing = {"distance": math.nan, "image": -1}
    full, cut = [], []
    for _ in range(3):
        one, other = {}, {}
        for task in EVERY:
            p, t = random_result(task)
            if task.dense and task.kind != "boundary":
                t = torch.where(kept, t, torch.full_like(t, nothing.get(task.kind, 255)))
                other[task.name] = p[..., kept][..., None], t[..., kept][..., None]
            one[task.name] = p, t
        full.append(one)
        cut.append(other)
    dense = [TISSUE, ORGANS, FAR]
    scores = [name for name in task_metrics(dense) if "hd95" not in name]
    found, expected = evaluate(EVERY, full).state.metrics, evaluate(dense, cut).state.metrics
    assert {name: found[name] for name in scores} == pytest.approx({name: expected[name] for name in scores})
    for task in (ORGANS, EDGES, FAR):  # a whole plane
        full[1][task.name][1][0] = nothing.get(task.kind, 255)
    full[1]["tissue"][1][:] = 255
    full[0]["grade"] = full[0]["grade"][0], -1
    state: Any = evaluate(EVERY, full).state
    for name, details in state.metric_details.items():
        if "grade" not in name:
            assert details[1].isnan().tolist() == ([True, True] if "tissue" in name else [True, False]), name
            assert not details[[0, 2]].isnan().any() and math.isfinite(state.metrics[name]), name
    probabilities = torch.stack([result["grade"][0] for result in full[1:]])
    target = torch.tensor([result["grade"][1] for result in full[1:]])
    assert state.metrics["val_grade_cross_entropy"] == pytest.approx(metrics.cross_entropy(probabilities, target))


def test_a_task_that_no_case_is_labelled_for_has_no_score() -> None:
    results = [{"organs": random_result(ORGANS), "grade": (torch.tensor([0.5, 0.5]), -1)} for _ in range(2)]
    for result in results:
        result["organs"][1][:] = 255
    found = evaluate([ORGANS, GRADE], results).state.metrics
    assert len(found) == 7 and all(math.isnan(value) for value in found.values())


def test_table_of_several_tasks(tmp_path: Path) -> None:
    results = [{task.name: random_result(task) for task in EVERY} for _ in range(3)]
    results[2]["grade"] = results[2]["grade"][0], -1
    results[0]["organs"][1][1] = 255
    evaluator = evaluate(EVERY, results, CaseTable(EVERY, tmp_path / "cases"))
    assert evaluator.state.metrics["val_edges_f1_left_side"] > 0
    with open(tmp_path / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    scores = {"tissue": ("dice", "iou", "hd95"), "organs": ("dice", "iou", "hd95"), "edges": ("f1",), "far": ("mae",)}
    names = {"tissue": ("gray", "white")}
    columns = [
        f"val_{t}_{s}_{n}" for t, own in scores.items() for s in own for n in names.get(t, ("left_side", "right"))
    ]
    assert list(rows[0]) == ["case", *columns, "grade_true", "grade_probability_low", "grade_probability_high"]
    assert [row["grade_true"] for row in rows[:2]] == [GRADE.names[result["grade"][1]] for result in results[:2]]
    assert rows[2]["grade_true"] == "" and rows[3]["grade_true"] == "" and rows[3]["grade_probability_low"] == ""
    assert float(rows[1]["grade_probability_high"]) == pytest.approx(float(results[1]["grade"][0][1]), abs=1e-6)
    assert rows[0]["val_organs_dice_right"] == "" and rows[1]["val_organs_dice_right"] != ""
    content = json.loads((tmp_path / "cases.json").read_text())
    assert set(content["mean"]) == set(task_metrics(EVERY))
    assert [task["name"] for task in content["tasks"]] == [task.name for task in EVERY]


def test_image_level_tasks_alone_need_no_mask(tmp_path: Path) -> None:
    results = [{"grade": (torch.tensor([1 - p, p]), t)} for p, t in ((0.1, 0), (0.6, 0), (0.7, 1), (0.9, 1))]
    evaluator = evaluate([GRADE], results, CaseTable([GRADE], tmp_path / "cases"))
    found = evaluator.state.metrics
    assert evaluator.state.best_metric == found["val_grade_auc"] == 1
    assert found["val_grade_accuracy"] == found["val_grade_balanced_accuracy"] == 0.75
    assert (tmp_path / "cases.csv").read_text().splitlines()[2] == "case 1,low,0.400000,0.600000"


@pytest.mark.parametrize("spacing", [None, [1.0, 1.0, 1.0]])
def test_judged_in_millimeters_on_the_grid_of_the_file(tmp_path: Path, spacing: list[float] | None) -> None:
    values = np.zeros((30, 24, 16), np.uint8)
    values[8:20, 6:18, 4:10] = 100
    affine = np.array([[0, -0.8, 0, 5], [-1.25, 0, 0, 90], [0, 0, 3.0, -7], [0, 0, 0, 1.0]])
    shifted = np.roll(values > 0, 2, axis=2).astype(np.uint8)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "image.nii.gz")
    nib.save(nib.Nifti1Image(shifted, affine), tmp_path / "label.nii.gz")
    case = Case(case="a", image=str(tmp_path / "image.nii.gz"), label=str(tmp_path / "label.nii.gz"))
    preprocessing = evaluation_preprocessing(3, 1, spacing, [0, 100])
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader(CaseDataset([case], preprocessing)),
        network=Threshold(0.5),
        inferer=sliding_window(12, 3),
        postprocessing=postprocessing(2, preprocessing),
        key_val_metric=key_metric(single_task(2)),
        additional_metrics=additional_metrics(single_task(2)),
    )
    evaluator.run()
    assert evaluator.state.metrics["val_mean_hd95"] == pytest.approx(6.0, abs=1e-6 if spacing is None else 1.5)
    assert evaluator.state.metrics["val_mean_dice"] == pytest.approx(4 / 6, abs=1e-6 if spacing is None else 0.05)


def test_hd95_of_classes_is_in_millimeters() -> None:
    label = torch.zeros(1, 20, 12, 4, dtype=torch.uint8)
    label[:, 5:9, 3:9] = 1
    shifted = label.roll(3, 1)[0]
    prediction = torch.stack([(shifted != 1).float(), (shifted == 1).float(), torch.zeros(20, 12, 4)])
    meta = MetaTensor(label, affine=torch.diag(torch.tensor([2.0, 1.0, 5.0, 1.0])))
    state: Any = evaluate([TISSUE], [{"tissue": (MetaTensor(prediction), meta)}]).state
    assert state.metric_details["val_tissue_mean_hd95"][0, 0] == pytest.approx(6.0)


def test_table_without_files_only_adds_metrics(tmp_path: Path) -> None:
    evaluator = evaluate(single_task(3), [plain_result(classes(), classes())], CaseTable(single_task(3)))
    assert {"val_dice_class_1", "val_iou_class_1", "val_hd95_class_2"} < evaluator.state.metrics.keys()
    assert not list(tmp_path.iterdir())


def test_prediction_on_another_grid_is_refused() -> None:
    with pytest.raises(DataError, match=r"task label: .*expected one grid"):
        TaskMetric(single_task(2)[0], "mean_dice").metric_fn([torch.zeros(2, 4, 4)], [torch.zeros(1, 4, 5)])


def test_names_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="one name"):
        CaseTable([Task("organs", "labels", ("a b", "a_b"))])


def test_gain_is_the_mean_relative_change() -> None:
    names = ["dice", "mae", "auc"]
    multi, single = (dict(zip(names, np.random.default_rng().uniform(0.2, 1, 3), strict=True)) for _ in range(2))
    signs = np.array([1, -1, 1])
    m, s = (np.array(list(scores.values())) for scores in (multi, single))
    assert multi_task_gain(multi, single, ["mae"]) == pytest.approx(np.mean(signs * (m - s) / s))
    assert multi_task_gain({"a": 0.88, "b": 3.0}, {"a": 0.8, "b": 4.0}, ["b"]) == pytest.approx((0.1 + 0.25) / 2)
    assert multi_task_gain(single, single, ["mae"]) == 0
    with pytest.raises(DataError, match="not the same: dice, mae, auc and dice"):
        multi_task_gain(multi, {"dice": 1})
    for bad in (0.0, math.nan):
        with pytest.raises(DataError, match="relative change can be given of auc"):
            multi_task_gain(multi, {**single, "auc": bad})
