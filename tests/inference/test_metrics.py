# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Scores against brute force and scikit-learn, and the rules for absent classes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score

from medmoe.inference import metrics
from medmoe.inference.metrics import boundary_f1, dice, distance_error, hd95, iou
from medmoe.tasks import DISTANCE_LIMIT


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


@pytest.mark.parametrize("shape", [(17, 14), (11, 9, 7)])
def test_boundaries_within_two_voxels_against_brute_force(shape: tuple[int, ...]) -> None:
    prediction, label = torch.rand(4, *shape) < 0.03, torch.rand(4, *shape) < 0.03
    prediction[:, 4, 5], label[:, 4, 6] = True, True
    expected = []
    for one, other in zip(prediction.numpy(), label.numpy(), strict=True):
        near = cdist(np.argwhere(one), np.argwhere(other)) <= 2
        precision, recall = near.any(1).mean(), near.any(0).mean()
        expected.append(2 * precision * recall / (precision + recall))
    np.testing.assert_allclose(boundary_f1(prediction, label), expected)


def test_boundaries_that_are_absent_or_shifted() -> None:
    line = torch.zeros(1, 20, 20, dtype=torch.bool)
    line[:, 8] = True
    nothing = torch.zeros_like(line)
    assert [float(boundary_f1(line.roll(shift, 1), line)) for shift in (0, 2, -2, 3)] == [1, 1, 1, 0]
    assert boundary_f1(line, nothing) == 0 and boundary_f1(nothing, line) == 0
    assert math.isnan(boundary_f1(nothing, nothing))


def test_distances_are_judged_in_voxels_where_they_are_labelled() -> None:
    prediction, target = torch.randn(3, 8, 9), torch.rand(3, 8, 9) * 2 - 1
    target[0, :4], target[2] = math.nan, math.nan
    error = np.abs(prediction.clamp(-1, 1).numpy() - target.numpy()) * DISTANCE_LIMIT
    expected = [np.nanmean(error[0]), error[1].mean()]
    np.testing.assert_allclose(distance_error(prediction, target)[:2], expected, rtol=1e-5)
    assert math.isnan(distance_error(prediction, target)[2])
    assert distance_error(torch.full((1, 4), 7.0), torch.ones(1, 4)) == 0  # what lies beyond the limit is the limit


@pytest.mark.parametrize("classes", [2, 4])
def test_image_scores_are_scikit_learns(classes: int) -> None:
    target = torch.cat([torch.arange(classes), torch.randint(0, classes, (30,))])
    probabilities = torch.randn(len(target), classes).mul(2).round().div(2).double().softmax(1)  # rounded: ties
    p, t = probabilities.numpy(), target.numpy()
    scores = p[:, 1] if classes == 2 else p
    assert metrics.auc(probabilities, target) == pytest.approx(roc_auc_score(t, scores, multi_class="ovr"))
    assert metrics.cross_entropy(probabilities, target) == pytest.approx(log_loss(t, p))
    guess = p.argmax(1)
    assert metrics.accuracy(probabilities, target) == pytest.approx(accuracy_score(t, guess))
    assert metrics.balanced_accuracy(probabilities, target) == pytest.approx(balanced_accuracy_score(t, guess))


def test_auc_counts_pairs_and_needs_both_classes() -> None:
    scores, target = torch.rand(25).double().mul(10).round() / 10, torch.randint(0, 2, (25,))
    target[:2] = torch.tensor([0, 1])
    pairs = [(float(a > b) + float(a == b) / 2) for a in scores[target == 1] for b in scores[target == 0]]
    probabilities = torch.stack([1 - scores, scores], 1)
    assert metrics.auc(probabilities, target) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(metrics.auc(probabilities, torch.ones(25).long()))
    three = torch.rand(3, 3).double()
    expected = [float(three[1, k] > three[0, k]) if k else float(three[0, 0] > three[1, 0]) for k in range(2)]
    assert metrics.auc(three[:2], torch.tensor([0, 1])) == pytest.approx(sum(expected) / 2)  # class 2 never occurs
