# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What is said at the end of an evaluation, out of the folder that its handlers wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from medmoe.training.handlers import cell
from medmoe.training.tracking import add_to_run

CASES, OVERLAYS = "cases", "overlays"


def read_cases(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``cases.json``, as :class:`medmoe.inference.CaseTable` writes it."""
    content: dict[str, Any] = json.loads((Path(folder) / f"{CASES}.json").read_text(encoding="utf-8"))
    return content


def summary(folder: str | os.PathLike[str], checkpoint: str | os.PathLike[str], split: str) -> str:
    """A table with a row for each class and their mean, and where there is more to see."""
    content = read_cases(folder)
    columns = {}
    for name, mean in content["mean"].items():
        own = name.replace("mean_", "") + "_"
        classes = {key.removeprefix(own): value for key, value in content["classes"].items() if key.startswith(own)}
        columns[own.strip("_").removeprefix("val_")] = {**classes, "mean": mean}
    rows = list(next(iter(columns.values())))
    width = max(map(len, rows))
    lines = [f"{len(content['cases'])} {split} cases, {checkpoint}"]
    lines.append(" " * width + "".join(f"{metric:>9}" for metric in columns))
    lines += [f"{row:<{width}}" + "".join(cell(column[row]) for column in columns.values()) for row in rows]
    lines.append(f"every case: {Path(folder) / CASES}.csv (hd95 in mm, in pixels for pictures)")
    lines.append(f"pictures (image, truth, prediction): {Path(folder) / OVERLAYS}")
    return "\n".join(lines)


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
