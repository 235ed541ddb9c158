# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What is said at the end of an evaluation, out of the folder that its handlers wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmoe.inference.task_metrics import SCORES, column_name, column_names, metric_name
from medmoe.tasks import Task
from medmoe.training.handlers import cell
from medmoe.training.tracking import add_to_run

CASES, OVERLAYS = "cases", "overlays"


def read_cases(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``cases.json``, as :class:`medmoe.inference.CaseTable` writes it."""
    content: dict[str, Any] = json.loads((Path(folder) / f"{CASES}.json").read_text(encoding="utf-8"))
    return content


def tasks_in(content: Mapping[str, Any]) -> list[Task]:
    """The tasks that the content of ``cases.json`` is about."""
    return [Task(**{**entry, "names": tuple(entry["names"])}) for entry in content["tasks"]]


def summary(folder: str | os.PathLike[str], checkpoint: str | os.PathLike[str], split: str) -> str:
    """A table for each task, with a row for each class and their mean, and where there is more to see."""
    content = read_cases(folder)
    tasks = tasks_in(content)
    lines = [f"{len(content['cases'])} {split} cases, {checkpoint}"]
    for task in tasks:
        lines += task_lines(task, content)
    lines.append(f"every case: {Path(folder) / CASES}.csv (hd95 in mm, in pixels for pictures)")
    if (Path(folder) / "routing.csv").exists():
        lines.append(f"how every case was routed: {Path(folder) / 'routing.csv'}")
    if any(task.dense for task in tasks):
        lines.append(f"pictures (image, truth, prediction): {Path(folder) / OVERLAYS}")
    return "\n".join(lines)


def task_lines(task: Task, content: Mapping[str, Any]) -> list[str]:
    """The table of one task: its scores side by side, the classes of a dense one below each other."""
    scores = [score for score in SCORES[task.kind] if metric_name(task, score) in content["mean"]]
    overall = [content["mean"][metric_name(task, score)] for score in scores]
    headings = [score.removeprefix("mean_") for score in scores]
    rows = {"mean" if task.dense else "all cases": overall}
    if task.dense:
        classes = content["classes"]
        names = column_names(task.foreground)
        rows = {name: [classes[column_name(task, score, name)] for score in scores] for name in names} | rows
    title = "" if task.name == "label" else task.name
    width = max(map(len, [*rows, title]))
    sizes = [max(9, len(heading) + 2) for heading in headings]
    lines = [f"{title:<{width}}" + "".join(f"{heading:>{size}}" for heading, size in zip(headings, sizes, strict=True))]
    return lines + [
        f"{name:<{width}}" + "".join(cell(value, size) for value, size in zip(values, sizes, strict=True))
        for name, values in rows.items()
    ]


def track(folder: str | os.PathLike[str], run_dir: str | os.PathLike[str], uri: str, split: str) -> None:
    """Adds the means, named by the split (``test_mean_dice``), and the pictures to the MLflow run of the training.

    Args:
        run_dir: of the training.
        uri: of the MLflow store where that run is; empty for no tracking.
    """
    content = read_cases(folder)
    means = {**content["mean"], **content["classes"]}
    metrics = {f"{split}_{name.removeprefix('val_')}": value for name, value in means.items() if value is not None}
    add_to_run(run_dir, uri, metrics, sorted((Path(folder) / OVERLAYS).glob("*.png")), f"{OVERLAYS}_{split}")
    groups = sorted(Path(folder).glob("routing_by_*.png"))
    if groups:
        add_to_run(run_dir, uri, {}, groups, f"routing_{split}")
