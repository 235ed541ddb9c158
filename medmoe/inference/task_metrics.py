# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The scores of every task as MONAI metrics for an evaluator, and a table of all cases.

An evaluator's output holds, case by case and after :class:`medmoe.data.postprocess.TaskResults`, for each task:

============  ===============================  ==================================================
kind          ``pred_<task>``                  ``target_<task>``
============  ===============================  ==================================================
classes       probabilities (K, ...)           classes (1, ...), 255 not labelled
labels        probabilities (C, ...)           0, 1, 255 not labelled (C, ...)
boundary      probabilities (C, ...)           0, 1, 255 not labelled (C, ...)
distance      (C, ...) by ``DISTANCE_LIMIT``   the same, NaN not labelled
image         probabilities (C,)               a class, -1 not labelled
============  ===============================  ==================================================

The class with the highest probability is taken; labels and boundaries are where it is at least 0.5.

Metrics are called ``val_<task>_mean_dice`` and so on, and those of plain segmentation, whose task is called "label",
``val_mean_dice``. Means of dense tasks are over cases, then over classes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.utils import string_list_all_gather
from torch import Tensor

from medmoe.errors import ConfigError, DataError
from medmoe.files import finite, plain_name, write_text
from medmoe.inference import metrics
from medmoe.tasks import UNLABELLED, Task

Score = Callable[[Tensor, Tensor], Any]

MASK_SCORES: dict[str, Score] = {"mean_dice": metrics.dice, "mean_iou": metrics.iou, "mean_hd95": metrics.hd95}
SCORES: dict[str, dict[str, Score]] = {
    "classes": MASK_SCORES,
    "labels": MASK_SCORES,
    "boundary": {"mean_f1": metrics.boundary_f1},
    "distance": {"mean_mae": metrics.distance_error},
    "image": {
        "auc": metrics.auc,
        "balanced_accuracy": metrics.balanced_accuracy,
        "accuracy": metrics.accuracy,
        "cross_entropy": metrics.cross_entropy,
    },
}
"""Scores by kind of task, the one to look at first."""
LOWER_IS_BETTER = ("mean_hd95", "mean_mae", "cross_entropy")
RULES = (
    "A class that is in neither label nor prediction is not counted (empty), nor what is not labelled. In one of them "
    "only: Dice 0, IoU 0, F1 0, HD95 the diagonal of the image. HD95 in mm (pixels for pictures), F1 of boundaries "
    f"within {metrics.TOLERANCE:g} voxels, MAE of distances in voxels. Means are over cases, then over classes."
)


def metric_name(task: Task, score: str) -> str:
    """Such as ``val_organs_mean_dice``, or ``val_mean_dice`` for the task of plain segmentation."""
    return f"val_{score}" if task.name == "label" else f"val_{task.name}_{score}"


def column_name(task: Task, score: str, name: str) -> str:
    """The name of a score's mean for one class, such as ``val_organs_dice_heart``."""
    return f"{metric_name(task, score.removeprefix('mean_'))}_{name}"


def column_names(names: Sequence[str]) -> list[str]:
    """Names of channels, fit for names of metrics.

    Raises:
        ConfigError: two become the same.
    """
    names = [plain_name(name) for name in names]
    if len(set(names)) < len(names):
        raise ConfigError(f"Two classes have one name: {names}. Every class needs a name of its own.")
    return names


def masks(task: Task, prediction: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boolean masks (F, ...) of a task's foreground: predicted, true, and where a label says so or not.

    Raises:
        DataError: prediction and label are not on one grid.
    """
    if prediction.shape[1:] != label.shape[1:]:
        raise DataError(
            f"task {task.name}: the prediction is {tuple(prediction.shape)} and the label is {tuple(label.shape)}: "
            "expected one grid."
        )
    known = label != UNLABELLED
    if task.kind != "classes":
        return (prediction >= 0.5) & known, label == 1, known
    highest = prediction.argmax(0, keepdim=True)
    predicted, true = (torch.cat([m == k for k in range(1, task.channels)]) for m in (highest, label))
    return predicted & known, true, known.expand_as(true)


class PerCase(CumulativeIterationMetric):
    """A MONAI metric out of a score of a dense task: keeps (cases, channels), and aggregates by their means."""

    def __init__(self, task: Task, score: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.task, self.score = task, score

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert y is not None
        return torch.stack([self.of(p, t).cpu() for p, t in zip(y_pred, y, strict=True)])

    def of(self, prediction: Tensor, label: Tensor) -> Tensor:
        """The scores (F,) of one case; NaN for a channel that is not labelled there."""
        if self.task.kind == "distance":
            return self.score(prediction, label)
        prediction, label, known = masks(self.task, prediction, label)
        values = self.score(prediction, label)
        return values.masked_fill(~known.flatten(1).any(1).to(values.device), math.nan)

    def aggregate(self) -> Tensor:
        """The mean over channels of their means over cases; NaN if none was judged."""
        return class_means(self.get_buffer()).nanmean()


class OverCases(CumulativeIterationMetric):
    """A MONAI metric out of a score of an image-level task: keeps (cases, C + 1), probabilities and true classes."""

    def __init__(self, score: Callable[[Tensor, Tensor], float]) -> None:
        super().__init__()
        self.score = score

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        assert y is not None
        return torch.cat([y_pred.double(), y.to(y_pred.device).double()], 1).cpu()

    def aggregate(self) -> float:
        """The score of the cases that are labelled; NaN if none is."""
        kept = self.get_buffer()
        kept = kept[kept[:, -1] >= 0]
        return self.score(kept[:, :-1], kept[:, -1].long()) if len(kept) else math.nan


def class_means(values: Tensor) -> Tensor:
    """Means (K,) over the cases (cases, K) in which a class was judged."""
    return values.double().nanmean(0)


def predictions_and_labels(task: Task, output: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], list[Tensor]]:
    """What an evaluator's output says of one task, case by case, on the device of the labels."""
    labels = [item[f"target_{task.name}"] for item in output]
    labels = [torch.as_tensor(label) if task.dense else torch.tensor([int(label)]) for label in labels]
    predictions = [item[f"pred_{task.name}"] for item in output]
    return [p.to(label.device) for p, label in zip(predictions, labels, strict=True)], labels


class TaskMetric(IgniteMetricHandler):
    """One score of one task, attached to a MONAI evaluator.

    Args:
        task: of the network.
        score: of those that :data:`SCORES` has for its kind.
    """

    def __init__(self, task: Task, score: str) -> None:
        function = SCORES[task.kind][score]
        metric = PerCase(task, function) if task.dense else OverCases(function)
        super().__init__(metric, output_transform=partial(predictions_and_labels, task), save_details=True)


def task_metrics(tasks: Sequence[Task]) -> dict[str, TaskMetric]:
    """A metric for each score of each task, by name. The first, larger is better, is to choose the best checkpoint.

    It is that of the first task with masks, which are Dice; without any, of the first task that has a score of which
    more is better.
    """
    ranked = sorted(tasks, key=lambda task: (task.kind not in ("classes", "labels"), task.kind == "distance"))
    main = ranked[0]
    ordered = [main, *(task for task in tasks if task is not main)]
    return {metric_name(task, score): TaskMetric(task, score) for task in ordered for score in SCORES[task.kind]}


def key_metric(tasks: Sequence[Task]) -> dict[str, TaskMetric]:
    """The first of :func:`task_metrics`, for an evaluator's ``key_val_metric``."""
    return dict(list(task_metrics(tasks).items())[:1])


def additional_metrics(tasks: Sequence[Task]) -> dict[str, TaskMetric]:
    """The others of :func:`task_metrics`, for an evaluator's ``additional_metrics``."""
    return dict(list(task_metrics(tasks).items())[1:])


class CaseTable:
    """Means of each class in ``engine.state.metrics``, and a table of all cases and tasks as CSV and JSON.

    It reads the details that the metrics of :func:`task_metrics` leave in the evaluator: from ``val_mean_dice`` come
    ``val_dice_<class>``; of image-level tasks, probabilities and true classes. Put it before handlers that log metrics.
    Cases are named by ``case`` of the batch.

    Args:
        tasks: of the network.
        output: files ``output``.csv and ``output``.json, written whole at the end of each epoch; ``None`` for none.
    """

    def __init__(self, tasks: Sequence[Task], output: str | os.PathLike[str] | None = None) -> None:
        self.tasks = list(tasks)
        self.names = {task.name: column_names(task.foreground) for task in tasks}
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
        columns: dict[str, list[Any]] = {}
        means: dict[str, float] = {}
        for task in self.tasks:
            found = {score: state.metric_details.get(metric_name(task, score)) for score in SCORES[task.kind]}
            details = {score: values for score, values in found.items() if values is not None}
            if not task.dense and details:
                columns |= self.image_columns(task, next(iter(details.values())))
                continue
            for score, values in details.items():
                names = [column_name(task, score, name) for name in self.names[task.name]]
                columns |= dict(zip(names, values.T.tolist(), strict=True))
                means |= dict(zip(names, class_means(values).tolist(), strict=True))
        state.metrics.update(means)
        if self.output is not None and state.rank == 0:
            overall = {name: float(state.metrics[name]) for name in state.metric_details}
            write_table(self.output, self.tasks, cases, columns, means, overall)

    def image_columns(self, task: Task, details: Tensor) -> dict[str, list[Any]]:
        """True classes, empty where nobody says, and probabilities of an image-level task."""
        true = [task.names[index] if index >= 0 else "" for index in details[:, -1].long().tolist()]
        names = [f"{task.name}_probability_{name}" for name in self.names[task.name]]
        return {f"{task.name}_true": true, **dict(zip(names, details[:, :-1].T.tolist(), strict=True))}


def write_table(
    output: Path,
    tasks: Sequence[Task],
    cases: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    means: Mapping[str, float],
    overall: Mapping[str, float],
) -> None:
    """Writes ``output``.csv, a row a case and a last one of means, and ``output``.json. Not judged is empty."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    named = list(zip(cases, rows, strict=True))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case", *columns])
    for case, row in [*named, ("mean", means)]:
        table.writerow([case, *(shown(row.get(column, math.nan)) for column in columns)])
    write_text(output.with_name(output.name + ".csv"), text.getvalue())
    content = {
        "rules": RULES,
        "tasks": [asdict(task) for task in tasks],
        "mean": overall,
        "classes": means,
        "cases": [{"case": case, **row} for case, row in named],
    }
    write_text(output.with_name(output.name + ".json"), json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def shown(value: float | str) -> str:
    """A cell of the table: six decimals, empty for NaN, a text as it is."""
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:.6f}"


def multi_task_gain(
    multi: Mapping[str, float], single: Mapping[str, float], lower_is_better: Sequence[str] = ()
) -> float:
    """Mean relative change against single-task networks, in which more is better for every task.

    1/T sum_t (-1)^{l_t} (M_t - S_t) / S_t, where l_t is 1 for a score of which less is better (Maninis, Radosavovic and
    Kokkinos, CVPR 2019): 0.02 says that one network for all tasks is 2 % better than one for each.

    Args:
        multi: one score of each task of the network for all of them.
        single: the same scores of networks for one task each.
        lower_is_better: names, among those of the scores, of which less is better.

    Raises:
        DataError: not the same scores, or a single-task score that is 0 or not finite.
    """
    if set(multi) != set(single) or not multi:
        raise DataError(f"the scores are not the same: {', '.join(multi) or 'none'} and {', '.join(single) or 'none'}")
    wrong = [name for name, own in single.items() if not (own and math.isfinite(own) and math.isfinite(multi[name]))]
    if wrong:
        raise DataError(f"no relative change can be given of {', '.join(wrong)}: not finite, or 0 for one task alone")
    changes = [(multi[name] - single[name]) / single[name] * (-1 if name in lower_is_better else 1) for name in multi]
    return sum(changes) / len(changes)
