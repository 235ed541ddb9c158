# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Scores of predictions: masks, boundaries and distances case by case, image-level classes over all cases.

* A class that is in neither the label nor the prediction of a case is not judged there: NaN, left out of all means.
* A class that is in one of the two only has Dice 0, IoU 0, F1 0, and as HD95 the diagonal of the image: a finite
  distance that none can exceed, so that predicting nothing never looks better than predicting badly.
* HD95 is the larger of the two 95th percentiles of the distances from the voxels on the border of one mask to the
  border of the other. It is in millimeters, by the affine of the label; for pictures without one, in pixels.
* The F1 of a boundary allows 2 voxels between what is predicted and what is true. Predicted boundaries are not thinned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects
from scipy.stats import rankdata
from torch import Tensor

from medmoe.tasks import DISTANCE_LIMIT

TOLERANCE = 2.0
"""Voxels that a predicted boundary may lie from the true one."""


def dice(prediction: Tensor, label: Tensor) -> Tensor:
    """Dice of boolean masks (K, ...) -> (K,) float64; NaN where both are empty."""
    common, sizes = _overlap(prediction, label)
    return 2 * common / sizes


def iou(prediction: Tensor, label: Tensor) -> Tensor:
    """Intersection over union of boolean masks (K, ...) -> (K,) float64; NaN where both are empty."""
    common, sizes = _overlap(prediction, label)
    return common / (sizes - common)


def _overlap(prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Voxels in both masks, and the sum of their sizes."""
    both, one, other = ((mask.flatten(1).sum(1).double()) for mask in (prediction & label, prediction, label))
    return both, one + other


def hd95(prediction: Tensor, label: Tensor) -> Tensor:
    """95th percentile Hausdorff distance of boolean masks (K, H, W[, D]) -> (K,) float64, by the label's affine.

    NaN where both masks are empty, the diagonal of the image where one is.
    """
    shape = tuple(label.shape[1:])
    spacing = [1.0] * len(shape)
    if isinstance(label, MetaTensor):
        spacing = affine_to_spacing(label.affine, len(shape)).tolist()
    diagonal = math.dist([n * s for n, s in zip(shape, spacing, strict=True)], [0.0] * len(shape))
    values = []
    for one, other in zip(np.asarray(prediction.cpu()), np.asarray(label.cpu()), strict=True):
        filled = int(one.any()) + int(other.any())
        values.append(_hd95_of(one, other, spacing) if filled == 2 else (math.nan, diagonal)[filled])
    return torch.tensor(values, dtype=torch.float64)


def _hd95_of(prediction: npt.NDArray[np.bool_], label: npt.NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """HD95 of two masks (H, W[, D]) that both hold something."""
    box = find_objects((prediction | label).astype(np.uint8))[0]
    borders = [mask[box] ^ binary_erosion(mask[box]) for mask in (prediction, label)]
    distances = [distance_transform_edt(~border, spacing) for border in borders]
    return float(max(np.percentile(distances[1][borders[0]], 95), np.percentile(distances[0][borders[1]], 95)))


def boundary_f1(prediction: Tensor, label: Tensor) -> Tensor:
    """F1 of boolean boundaries (K, H, W[, D]) -> (K,) float64 within :data:`TOLERANCE`; NaN where both are empty.

    Precision is the share of predicted voxels near a true one, recall the share of true voxels near a predicted one.
    """
    values = []
    for one, other in zip(np.asarray(prediction.cpu()), np.asarray(label.cpu()), strict=True):
        filled = int(one.any()) + int(other.any())
        values.append(_f1_of(one, other) if filled == 2 else (math.nan, 0.0)[filled])
    return torch.tensor(values, dtype=torch.float64)


def _f1_of(prediction: npt.NDArray[np.bool_], label: npt.NDArray[np.bool_]) -> float:
    """F1 of two boundaries (H, W[, D]) that both hold something."""
    precision = float((distance_transform_edt(~label)[prediction] <= TOLERANCE).mean())
    recall = float((distance_transform_edt(~prediction)[label] <= TOLERANCE).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def distance_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error (K,) float64, in voxels, of distances (K, H, W[, D]) in units of ``DISTANCE_LIMIT``.

    NaN in ``target`` is left out. What is predicted beyond the limit counts as the limit.
    """
    error = (prediction.double().clamp(-1, 1) - target.double()).abs() * DISTANCE_LIMIT
    return error.flatten(1).nanmean(1)


def accuracy(probabilities: Tensor, target: Tensor) -> float:
    """Share of cases whose most probable class is right: probabilities (N, C), classes (N,)."""
    return float((probabilities.argmax(1) == target).double().mean())


def balanced_accuracy(probabilities: Tensor, target: Tensor) -> float:
    """Mean over the classes that occur of the share of their cases that are right."""
    right = (probabilities.argmax(1) == target).double()
    return float(torch.stack([right[target == index].mean() for index in target.unique()]).mean())


def auc(probabilities: Tensor, target: Tensor) -> float:
    """Area under the ROC curve; NaN where all cases are of one class.

    With two classes, that of the second one's probability. With more, the mean over classes of each against the rest,
    without classes that do not occur.
    """
    count = probabilities.shape[1]
    values = [_auc_of(probabilities[:, index], target == index) for index in ([1] if count == 2 else range(count))]
    judged = [value for value in values if not math.isnan(value)]
    return sum(judged) / len(judged) if judged else math.nan


def _auc_of(scores: Tensor, positive: Tensor) -> float:
    """How often a positive has the higher score of a pair (Mann and Whitney's U); ties count half."""
    count = int(positive.sum())
    rest = len(positive) - count
    if not count or not rest:
        return math.nan
    ranks = rankdata(scores.numpy())[positive.numpy()].sum()
    return float((ranks - count * (count + 1) / 2) / (count * rest))


def cross_entropy(probabilities: Tensor, target: Tensor) -> float:
    """Mean of -log of the right class's probability, which is taken to be at least 1e-12."""
    right = probabilities.gather(1, target[:, None]).clamp_min(1e-12)
    return float(-right.log().mean())
