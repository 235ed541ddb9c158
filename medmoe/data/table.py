# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""A CSV file with a row for each case: values to predict, and values to condition a prediction on."""

from __future__ import annotations

import csv
import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmoe.errors import DataError, some

CASE_COLUMNS = ("case", "id")
MISSING = ("", "na", "n/a", "nan", "null")
"""What stands for a value that is not known, in any case of letters."""


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        path: of the file.
        columns: all but that of the case names.
        rows: values by column, by case. All values are text without blanks around it.
    """

    path: Path
    columns: tuple[str, ...]
    rows: dict[str, dict[str, str]]

    def missing_column(self, column: str) -> str:
        """What to say of a column that does not exist."""
        return f"{self.path} has no column {column!r}{near(column, self.columns)}: it has {some(self.columns, 40)}"


def is_missing(value: str | None) -> bool:
    """Whether a value is not known."""
    return value is None or value.strip().lower() in MISSING


def near(name: str, known: Iterable[str]) -> str:
    """``" (did you mean x?)"``, or nothing where no known name is like it."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1) or [other for other in names if name.lower() in other.lower()]
    return f" (did you mean {close[0]}?)" if close else ""


def read_table(path: str | os.PathLike[str], folder: str | os.PathLike[str] = ".") -> Table:
    """Reads a table: fields between commas, semicolons or tabs; the first line names the columns.

    The case names are in the column ``case`` or ``id``, or else in the first one.

    Args:
        path: absolute, or relative to ``folder``.
        folder: the data set's.

    Raises:
        DataError: there is no such file, or it is no table with a row for each case.
    """
    file = Path(folder) / path
    if not file.is_file():
        known = sorted(entry.name for entry in Path(folder).glob("*.[ct]sv"))
        raise DataError(f"There is no table {file}: {Path(folder)} holds {some(known) or 'no .csv file'}.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable table in UTF-8: {error}") from error
    header = lines[0] if lines else ""
    rows = [[value.strip() for value in row] for row in csv.reader(lines, delimiter=max(",;\t", key=header.count))]
    return _checked(file, [row for row in rows if any(row)])


def _checked(file: Path, rows: Sequence[list[str]]) -> Table:
    if len(rows) < 2:
        raise DataError(f"{file} has no rows: expected a line of column names and one line for each case.")
    header = rows[0]
    twice = [name for name, count in Counter(header).items() if count > 1]
    uneven = [row[0] for row in rows if len(row) != len(header)]
    if twice or uneven:
        problem = f"several are called {some(twice)}" if twice else f"more or fewer fields in {some(uneven)}"
        raise DataError(f"{file} has {len(header)} columns, and {problem}.")
    key = next((header.index(name) for name in CASE_COLUMNS if name in header), 0)
    names = [row[key] for row in rows[1:]]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{file} has several rows for {len(twice)} cases (column {header[key]!r}): {some(twice)}.")
    columns = tuple(name for index, name in enumerate(header) if index != key)
    return Table(file, columns, {row[key]: dict(zip(header, row, strict=True)) for row in rows[1:]})
