# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Cases whose images and masks were found get the values of tables, and whatever is nowhere in the data is told."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medmoe.data.datalist import LABEL_FOLDERS, Case, Wanted, stem_of
from medmoe.data.table import Table, is_missing, near, read_table
from medmoe.errors import DataError, some
from medmoe.tasks import Task

logger = logging.getLogger(__name__)

Rows = Mapping[str, Mapping[str, str]]


def completed(cases: Sequence[Case], wanted: Wanted, root: Path, table: str | os.PathLike[str] | None) -> list[Case]:
    """The cases with what the table says of them; those without any target are left out.

    Raises:
        DataError: for all tasks and conditions that are nowhere in the data, and all values that cannot be used.
    """
    if wanted.plain and not wanted.conditions:
        return list(cases)
    source = read_table(table, root) if table else None
    rows = rows_of(source, [case["case"] for case in cases]) if source and _columns(wanted) else {}
    cases = [_with_row(case, rows.get(case["case"], {}), wanted) for case in cases]
    problems = [problem for task in wanted.masks if not wanted.plain for problem in _mask_problems(task, cases, root)]
    problems += [problem for task in wanted.values for problem in _value_problems(task, cases, source)]
    problems += _condition_problems(cases, wanted, source, root)
    if problems:
        raise DataError("\n  - ".join([f"{root} lacks what tasks and conditions need:", *problems]))
    cases = [_with_indices(case, wanted.values) for case in cases]
    return _labelled(cases, wanted.tasks)


def _columns(wanted: Wanted) -> list[str]:
    """The columns that a table may be needed for."""
    return [task.target for task in wanted.values] + wanted.condition_names(images=False)


def rows_of(table: Table, cases: Sequence[str]) -> Rows:
    """The table's rows by case; its case names may be names of files.

    Raises:
        DataError: no case is in the table.
    """
    rows = {stem_of(name): row for name, row in table.rows.items()}
    found = [case for case in cases if case in rows]
    if not found:
        raise DataError(
            f"No case is in {table.path}: cases are called {some(cases, 2)}, its rows "
            f"{some(list(table.rows), 2)}. The case names belong into a column 'case' or 'id', or into the first one."
        )
    if len(found) < len(cases):
        logger.warning("%d of %d cases are not in %s", len(cases) - len(found), len(cases), table.path)
    return rows


def _with_row(case: Case, row: Mapping[str, str], wanted: Wanted) -> Case:
    """The case with the table's texts where ``dataset.json`` has said nothing; None where a value is missing."""

    def value(known: Any, column: str) -> str | None:
        text = str(known) if known is not None else row.get(column)
        return None if is_missing(text) else text

    values = {task.name: value(case.get(task.name), task.target) for task in wanted.values}
    if not wanted.conditions:
        return {**case, **values}
    conditions = case.get("condition", {})
    texts = {name: value(conditions.get(name), name) for name in wanted.condition_names(images=False)}
    return {**case, **values, "condition": {**conditions, **texts}}


def _mask_problems(task: Task, cases: Sequence[Case], root: Path) -> list[str]:
    """What is to be said of a task, or of labels of it, that no case has a mask for."""
    where = task.target or " or ".join(LABEL_FOLDERS)
    if task.kind == "classes":
        absent = [] if any(case[task.name] for case in cases) else [where]
    else:
        drawn = [case[task.name] for case in cases if case[task.name]]
        absent = [name for k, name in enumerate(task.names) if not any(files[k] for files in drawn)]
    if not absent:
        return []
    folders = [path for name in ([task.target] if task.target else LABEL_FOLDERS) for path in root.glob(f"**/{name}/*")]
    inner = sorted({path.name for path in folders if path.is_dir()})
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    if task.kind == "classes":
        return [f"task {task.name}: no mask; looked for the folder {where} beside images{_there(there)}"]
    return [
        f"task {task.name}: no mask of {name!r} in any case; looked for the folder {name.replace(' ', '_')} in {where}"
        f"{near(name.replace(' ', '_'), inner)}{_there(inner or there)}"
        for name in absent
    ]


def _there(names: Sequence[str]) -> str:
    return f"; there is {some(names, 12)}" if names else "; there is none"


def _value_problems(task: Task, cases: Sequence[Case], table: Table | None) -> list[str]:
    """What is to be said of an image-level task without values, or with values that are none of its classes."""
    texts = {case["case"]: case[task.name] for case in cases if case[task.name] is not None}
    if not texts:
        return [f"task {task.name}: {_nowhere(task.target, table)}"]
    wrong = {case: text for case, text in texts.items() if _index(task, text) is None}
    if not wrong:
        return []
    values, case = sorted(set(wrong.values())), next(iter(wrong))
    return [
        f"task {task.name}: column {task.target!r} has {some(values)} (such as in case {case}): expected one of "
        f"{', '.join(task.names)}, or their numbers 0 to {len(task.names) - 1}"
    ]


def _nowhere(column: str, table: Table | None) -> str:
    """Why there is no value of a column."""
    if table is None:
        return f"there is no table with a column {column!r}: name a CSV file in the setting table"
    if column not in table.columns:
        return table.missing_column(column)
    return f"column {column!r} of {table.path} has no value for any of the cases"


def _condition_problems(cases: Sequence[Case], wanted: Wanted, table: Table | None, root: Path) -> list[str]:
    found = []
    for images in (False, True):
        for name in wanted.condition_names(images):
            if any(case["condition"].get(name) is not None for case in cases):
                continue
            folders = sorted(path.name for path in root.iterdir() if path.is_dir())
            here = f"no image of any case in a folder {name!r} beside images{near(name, folders)}{_there(folders)}"
            found.append(f"condition {name}: {here if images else _nowhere(name, table)}")
    return found


def _index(task: Task, text: str) -> int | None:
    """The class that a value means: by name, or else by number."""
    if text in task.names:
        return task.names.index(text)
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number in range(len(task.names)) else None


def _with_indices(case: Case, tasks: Sequence[Task]) -> Case:
    """The case with class numbers in place of texts."""
    return case | {task.name: -1 if case[task.name] is None else _index(task, case[task.name]) for task in tasks}


def is_labelled(task: Task, target: Any) -> bool:
    """Whether a case says anything of a task with a target of its own."""
    if task.kind == "image":
        return target is not None and target >= 0
    return any(target) if isinstance(target, list) else target is not None


def _labelled(cases: Sequence[Case], tasks: Sequence[Task]) -> list[Case]:
    """The cases with at least one target."""
    counts = {task.name: sum(is_labelled(task, case[task.name]) for case in cases) for task in tasks}
    known = [any(is_labelled(task, case[task.name]) for task in tasks) for case in cases]
    labelled = [case for case, found in zip(cases, known, strict=True) if found]
    left = [case["case"] for case, found in zip(cases, known, strict=True) if not found]
    if left:
        logger.warning("%d of %d cases have no target at all and are left out: %s", len(left), len(cases), some(left))
    some_missing = [f"{name} ({count})" for name, count in counts.items() if count < len(labelled)]
    if some_missing:
        logger.warning("not all of the %d cases are labelled for %s", len(labelled), ", ".join(some_missing))
    return labelled
