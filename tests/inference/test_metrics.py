# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Metrics against brute force, the rules for absent classes, and the table of cases."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from threshold_network import Threshold

from medmoe.data import Case, CaseDataset, evaluation_preprocessing, loader, postprocessing
from medmoe.errors import ConfigError, DataError
from medmoe.inference.inferer import sliding_window
from medmoe.inference.metrics import CaseDice, CaseHD95, CaseIoU, CaseTable, dice, foreground_names, hd95, iou


def blobs(classes: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Random boolean masks, each a few filled boxes."""
    masks = torch.zeros(classes, *shape, dtype=torch.bool)
    for mask in masks:
        for _ in range(3):
            corners = [sorted(random.sample(range(size + 1), 2)) for size in shape]
            mask[tuple(slice(*corner) for corner in corners)] = True
    return masks


def brute_hd95(one: np.ndarray, other: np.ndarray, spacing: np.ndarray) -> float:
    points = [np.argwhere(mask ^ binary_erosion(mask)) * spacing for mask in (one, other)]
    distances = cdist(*points)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


def turned(spacing: np.ndarray) -> torch.Tensor:
    """An oblique affine with this spacing."""
    rotation, _ = np.linalg.qr(np.random.default_rng(random.getrandbits(32)).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing
    return torch.as_tensor(affine)


@pytest.mark.parametrize("shape", [(17, 14), (11, 9, 7)])
def test_against_brute_force(shape: tuple[int, ...]) -> None:
    for _ in range(5):
        prediction, label = blobs(4, shape), blobs(4, shape)
        spacing = np.array([random.uniform(0.3, 4.0) for _ in range(3)])
        meta = MetaTensor(label.clone(), affine=turned(spacing))
        for k, (one, other) in enumerate(zip(prediction.numpy(), label.numpy(), strict=True)):
            common, union = (one & other).sum(), (one | other).sum()
            assert float(dice(prediction, label)[k]) == pytest.approx(2 * common / (one.sum() + other.sum()), abs=1e-6)
            assert float(iou(prediction, label)[k]) == pytest.approx(common / union, abs=1e-6)
        if len(shape) == 3:
            expected = [brute_hd95(p, t, spacing) for p, t in zip(prediction.numpy(), label.numpy(), strict=True)]
            np.testing.assert_allclose(hd95(MetaTensor(prediction), meta), expected, rtol=1e-9)
        else:
            expected = [brute_hd95(p, t, np.ones(2)) for p, t in zip(prediction.numpy(), label.numpy(), strict=True)]
            np.testing.assert_allclose(hd95(prediction, label), expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hd95_is_monais() -> None:
    prediction, label = blobs(3, (20, 16, 9)), blobs(3, (20, 16, 9))
    expected = compute_hausdorff_distance(
        prediction[None], label[None], include_background=True, percentile=95, spacing=[0.5, 2.0, 3.0]
    )
    affine = torch.diag(torch.tensor([0.5, 2.0, 3.0, 1.0]))
    np.testing.assert_allclose(hd95(prediction, MetaTensor(label, affine=affine)), expected[0], rtol=1e-5)


def test_absent_classes() -> None:
    empty, full = torch.zeros(1, 6, 4, 8, dtype=torch.bool), blobs(1, (6, 4, 8))
    label = MetaTensor(full, affine=torch.diag(torch.tensor([2.0, 0.5, 1.0, 1.0])))
    nothing = MetaTensor(empty, affine=label.affine)
    for score in (dice, iou, hd95):
        assert math.isnan(score(empty, nothing))
    for prediction, truth in ((empty, label), (full, nothing)):
        assert dice(prediction, truth) == 0 and iou(prediction, truth) == 0
        assert hd95(prediction, truth) == pytest.approx(math.hypot(6 * 2, 4 * 0.5, 8 * 1))
    assert dice(full, label) == 1 and iou(full, label) == 1 and hd95(full, label) == 0


def evaluate(pairs: list[tuple[torch.Tensor, torch.Tensor]], *handlers: object) -> SupervisedEvaluator:
    """Runs an evaluator whose network gives the prediction that travels as the image."""
    samples = [
        {"image": MetaTensor(p.float()), "label": MetaTensor(t.float()), "case": f"case {i}"}
        for i, (p, t) in enumerate(pairs)
    ]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(samples, batch_size=2, collate_fn=list_data_collate),
        network=torch.nn.Identity(),
        key_val_metric={"val_mean_dice": CaseDice()},
        additional_metrics={"val_mean_iou": CaseIoU(), "val_mean_hd95": CaseHD95()},
        val_handlers=handlers,
    )
    evaluator.run()
    return evaluator


def test_table_in_an_evaluator(tmp_path: Path) -> None:
    pairs = [(blobs(3, (9, 8)), blobs(3, (9, 8))) for _ in range(5)]
    for p, t in pairs[:2]:
        p[2], t[2] = False, False
    pairs[3][0][2] = False
    table = CaseTable(3, ["background", "left side", "right"], tmp_path / "results" / "cases")
    evaluator = evaluate(pairs, table)
    expected = torch.stack([dice(p[1:], t[1:]) for p, t in pairs])
    assert expected[:, 1].isnan().sum() == 2 and expected[3, 1] == 0
    metrics = evaluator.state.metrics
    assert metrics["val_dice_left_side"] == pytest.approx(float(expected[:, 0].mean()))
    assert metrics["val_dice_right"] == pytest.approx(float(expected[2:, 1].mean()))
    assert metrics["val_mean_dice"] == pytest.approx((metrics["val_dice_left_side"] + metrics["val_dice_right"]) / 2)
    assert evaluator.state.best_metric == metrics["val_mean_dice"]
    content = json.loads((tmp_path / "results" / "cases.json").read_text())
    assert content["mean"].keys() == {"val_mean_dice", "val_mean_iou", "val_mean_hd95"}
    assert content["cases"][0]["case"] == "case 0" and content["cases"][0]["val_dice_right"] is None
    assert content["cases"][3]["val_hd95_right"] == pytest.approx(math.hypot(9, 8))
    with open(tmp_path / "results" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == [f"case {i}" for i in range(5)] + ["mean"]
    assert rows[1]["val_dice_right"] == "" and rows[3]["val_dice_right"] == "0.000000"
    assert float(rows[-1]["val_iou_left_side"]) == pytest.approx(metrics["val_iou_left_side"], abs=1e-6)
    evaluator.run()
    assert len(table.cases) == 5


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
        key_val_metric={"val_mean_dice": CaseDice()},
        additional_metrics={"val_mean_hd95": CaseHD95()},
    )
    evaluator.run()
    assert evaluator.state.metrics["val_mean_hd95"] == pytest.approx(6.0, abs=1e-6 if spacing is None else 1.5)
    assert evaluator.state.metrics["val_mean_dice"] == pytest.approx(4 / 6, abs=1e-6 if spacing is None else 0.05)


def test_table_without_files_only_adds_metrics(tmp_path: Path) -> None:
    evaluator = evaluate([(blobs(2, (5, 5, 5)), blobs(2, (5, 5, 5)))], CaseTable(2))
    assert {"val_dice_class_1", "val_iou_class_1", "val_hd95_class_1"} < evaluator.state.metrics.keys()
    assert not list(tmp_path.iterdir())


def test_prediction_on_another_grid_is_refused() -> None:
    with pytest.raises(DataError, match="expected one grid"):
        CaseDice().metric_fn([torch.zeros(2, 4, 4)], [torch.zeros(2, 4, 5)])


def test_class_names() -> None:
    assert foreground_names(3) == ["class_1", "class_2"]
    assert foreground_names(3, ["a/b", "c"]) == ["a_b", "c"]
    assert foreground_names(2, ["background", "polyp"]) == ["polyp"]
    with pytest.raises(ConfigError, match="num_classes is 3"):
        foreground_names(3, ["only"])
    with pytest.raises(ConfigError, match="one name"):
        foreground_names(3, ["a b", "a_b"])
