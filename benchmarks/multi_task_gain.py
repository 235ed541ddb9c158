# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""One network for several tasks against networks for one task each, out of the folders that evaluations wrote.

    python benchmarks/multi_task_gain.py runs/all/evaluation_test --single runs/organs/evaluation_test \\
        runs/nodule/evaluation_test

The first score of each task counts: Dice of masks, F1 of boundaries, MAE of distances, AUC of image-level classes. The
single-task score of a task is that of the folder with the fewest tasks that has it: a boundary and a distance follow
from a mask and are always trained with it. The gain is the mean relative change, in which more is better.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medmoe.errors import DataError, MedMoEError
from medmoe.inference.evaluation import read_cases, tasks_in
from medmoe.inference.task_metrics import LOWER_IS_BETTER, SCORES, metric_name, multi_task_gain


def scores(multi: dict[str, Any], singles: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float, bool]]:
    """For each task's first score: of the network for all, of that for one, and whether less is better.

    Raises:
        DataError: a task has no score in one of the two.
    """
    found = {}
    fewest_first = sorted(singles, key=lambda content: len(content["tasks"]))
    for task in tasks_in(multi):
        score = next(iter(SCORES[task.kind]))
        name = metric_name(task, score)
        alone = [content["mean"][name] for content in fewest_first if content["mean"].get(name) is not None]
        if multi["mean"].get(name) is None or not alone:
            where = "the single-task folders" if not alone else "the folder of all tasks"
            raise DataError(f"{where} have no {name}: evaluate a network for the task {task.name} as well")
        found[name.removeprefix("val_")] = multi["mean"][name], alone[0], score in LOWER_IS_BETTER
    return found


def table(found: dict[str, tuple[float, float, bool]]) -> str:
    """The scores side by side, and the gain."""
    width = max(map(len, found))
    lines = [f"{'':<{width}}{'single':>9}{'multi':>9}{'change':>9}"]
    for name, (multi, single, lower) in found.items():
        change = multi_task_gain({name: multi}, {name: single}, [name] if lower else [])
        lines.append(f"{name:<{width}}{single:>9.3f}{multi:>9.3f}{change:>+9.1%}" + "  (less is better)" * lower)
    both = [{name: row[column] for name, row in found.items()} for column in (0, 1)]
    gain = multi_task_gain(*both, [name for name, row in found.items() if row[2]])
    return "\n".join([*lines, f"multi-task gain: {gain:+.2%}"])


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("multi", type=Path, help="evaluation folder of the network for all tasks")
    parser.add_argument("--single", type=Path, nargs="+", required=True, help="evaluation folders of the others")
    options = parser.parse_args(arguments)
    try:
        print(table(scores(read_cases(options.multi), [read_cases(folder) for folder in options.single])))
    except (MedMoEError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
