# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Dice, IoU and HD95 of every case and class, as MONAI metrics for an evaluator.

Predictions and labels are one-hot (K, H, W[, D]) on the grid of the label's file. Class 0, background, is not judged.

* A class that is in neither the label nor the prediction of a case is not judged there: NaN, left out of all means.
* A class that is in one of the two only has Dice 0, IoU 0, and as HD95 the diagonal of the image: a finite distance
  that none can exceed, so that predicting nothing never looks better than predicting badly.
* HD95 is the larger of the two 95th percentiles of the distances from the voxels on the border of one mask to the
  border of the other. It is in millimeters, by the affine of the label; for pictures without one, in pixels.
* A class's mean is over cases; the mean of a metric is the mean of its classes' means.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import CumulativeIterationMetric
from monai.utils import string_list_all_gather
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

from medmoe.errors import ConfigError, DataError
from medmoe.files import finite, write_text

RULES = (
    "A class that is in neither label nor prediction is not counted (empty). In one of them only: Dice 0, IoU 0, HD95 "
    "the diagonal of the image. HD95 in mm (pixels for pictures). Means are over cases, then over classes."
)


def dice(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Dice of boolean masks (K, ...) -> (K,) float64; NaN where both are empty."""
    common, sizes = _overlap(prediction, label)
    return 2 * common / sizes


def iou(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boolean masks (K, ...) -> (K,) float64; NaN where both are empty."""
    common, sizes = _overlap(prediction, label)
    return common / (sizes - common)


def _overlap(prediction: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Voxels in both masks, and the sum of their sizes."""
    both, one, other = ((mask.flatten(1).sum(1).double()) for mask in (prediction & label, prediction, label))
    return both, one + other


def hd95(prediction: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
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


class PerClass(CumulativeIterationMetric):
    """A MONAI metric out of a score of boolean masks: keeps (cases, foreground classes), and aggregates by their means.

    Args:
        score: such as :func:`dice`, from masks (K, ...) of prediction and label to (K,).
    """

    def __init__(self, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.score = score

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if y is None or y_pred.shape != y.shape:
            found = None if y is None else tuple(y.shape)
            raise DataError(f"The prediction is {tuple(y_pred.shape)} and the label is {found}: expected one grid.")
        return torch.stack([self.score(p[1:] > 0.5, t[1:] > 0.5).cpu() for p, t in zip(y_pred, y, strict=True)])

    def aggregate(self) -> torch.Tensor:
        """The mean over classes of their means over cases; NaN if no class was judged."""
        return class_means(self.get_buffer()).nanmean()


def class_means(values: torch.Tensor) -> torch.Tensor:
    """Means (K,) over the cases (cases, K) in which a class was judged."""
    return values.double().nanmean(0)


class _PerCase(IgniteMetricHandler):
    """Attaches a score to an evaluator whose output holds one-hot ``pred`` and ``label``."""

    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def __init__(self, output_transform: Callable[..., Any] | None = None) -> None:
        transform = output_transform or from_engine(["pred", "label"])
        super().__init__(metric_fn=PerClass(type(self).score), output_transform=transform, save_details=True)


class CaseDice(_PerCase):
    """Mean Dice, the usual key metric: ``{"val_mean_dice": CaseDice()}``."""

    score = staticmethod(dice)


class CaseIoU(_PerCase):
    """Mean intersection over union: ``{"val_mean_iou": CaseIoU()}``."""

    score = staticmethod(iou)


class CaseHD95(_PerCase):
    """Mean HD95 in millimeters, pixels for pictures: ``{"val_mean_hd95": CaseHD95()}``."""

    score = staticmethod(hd95)


def foreground_names(num_classes: int, class_names: Sequence[str] = ()) -> list[str]:
    """Names of classes 1 to ``num_classes`` - 1, fit for metric names; ``class_names`` may start with the background's.

    Raises:
        ConfigError: there is not one name for each class, or two are the same.
    """
    if len(class_names) not in (0, num_classes - 1, num_classes):
        raise ConfigError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}: {class_names}.")
    names = list(class_names)[-(num_classes - 1) :] or [f"class_{index}" for index in range(1, num_classes)]
    names = [re.sub(r"[^\w.-]+", "_", name) for name in names]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two classes have one name: {names}. Every class needs a name of its own.")
    return names


class CaseTable:
    """Means of each class in ``engine.state.metrics``, and a table of all cases as CSV and JSON.

    It reads the details that :class:`CaseDice` and its like leave in the evaluator: from ``val_mean_dice`` come
    ``val_dice_<class>``. Put it before handlers that log metrics. Cases are named by ``case`` of the batch.

    Args:
        num_classes: channels of the predictions.
        class_names: see :func:`foreground_names`.
        output: files ``output``.csv and ``output``.json, written whole at the end of each epoch; ``None`` for none.
    """

    def __init__(
        self, num_classes: int, class_names: Sequence[str] = (), output: str | os.PathLike[str] | None = None
    ) -> None:
        self.names = foreground_names(num_classes, class_names)
        self.output = None if output is None else Path(output)
        self.cases: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Registers with a MONAI evaluator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        """Forgets the cases of the last epoch."""
        self.cases = []

    def collect(self, engine: Engine) -> None:
        """Notes the names of the batch's cases."""
        batch: Any = engine.state.batch
        self.cases += [str(item["case"]) for item in batch]

    def finish(self, engine: Engine) -> None:
        """Adds the means of the classes to the metrics, and writes the files."""
        state: Any = engine.state
        cases = string_list_all_gather(self.cases)
        tables = {name.replace("mean_", ""): values for name, values in state.metric_details.items()}
        means = {
            f"{metric}_{name}": float(value)
            for metric, values in tables.items()
            for name, value in zip(self.names, class_means(values), strict=True)
        }
        state.metrics.update(means)
        if self.output is not None and state.rank == 0:
            columns = {
                f"{metric}_{name}": values[:, k].tolist()
                for metric, values in tables.items()
                for k, name in enumerate(self.names)
            }
            overall = {name: float(state.metrics[name]) for name in state.metric_details}
            write_table(self.output, cases, columns, means, overall)


def write_table(
    output: Path,
    cases: Sequence[str],
    columns: dict[str, list[float]],
    means: dict[str, float],
    overall: dict[str, float],
) -> None:
    """Writes ``output``.csv, a row a case and a last one of means, and ``output``.json. Not judged is empty."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    named = list(zip(cases, rows, strict=True))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *columns])
    for case, row in [*named, ("mean", means)]:
        table.writerow([case, *("" if math.isnan(row[column]) else f"{row[column]:.6f}" for column in columns)])
    write_text(output.with_name(output.name + ".csv"), text.getvalue())
    named_rows = [{"case": case, **row} for case, row in named]
    content = finite({"rules": RULES, "mean": overall, "classes": means, "cases": named_rows})
    write_text(output.with_name(output.name + ".json"), json.dumps(content, indent=1, allow_nan=False) + "\n")
