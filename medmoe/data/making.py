# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Data sets that a script makes out of others: whole or not at all, with a record of what they were made from."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe.data.splits import write_split
from medmoe.errors import DataError, MedMoEError

RECORD = "made_by.json"


def command(
    make: Callable[..., None], description: str | None, source: str, output: str, arguments: Sequence[str] | None
) -> int:
    """Runs a script that makes a data set out of another. Returns the exit status.

    Args:
        make: takes ``source``, ``output``, ``seed`` and ``force``.
        description: of the script.
        source: what the folder holds.
        output: the folder that is made by default.
        arguments: of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=f"folder with {source}")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"to make (default: {output})")
    parser.add_argument("--seed", type=int, default=0, help="of the splits (default: 0)")
    parser.add_argument("--force", action="store_true", help="make it again, even if it is there")
    try:
        make(**vars(parser.parse_args(arguments)))
    except MedMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_folder(output: Path, recipe: Mapping[str, Any], write: Callable[[Path], None], force: bool = False) -> bool:
    """Makes a data set in ``output``, whole or not at all. Returns whether there was anything to do.

    Args:
        output: the folder; it may be there if it is empty or was made by the same script.
        recipe: ``script`` and whatever decides the content; kept in the folder.
        write: fills an empty folder.
        force: make it again, even if it is there.

    Raises:
        DataError: ``output`` holds something else, or the same by another recipe.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        record = output / RECORD
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if found.get("script") != recipe["script"]:
            raise DataError(f"{output} exists and was not made by {recipe['script']}: choose another --output.")
        if found != dict(recipe) and not force:
            raise DataError(f"{output} was made from other files or settings: pass --force to make it again.")
        if not force:
            return False
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".partial-{output.name}-") as folder:
        ready = Path(folder) / "ready"
        ready.mkdir()
        write(ready)
        (ready / RECORD).write_text(json.dumps(dict(recipe), indent=1) + "\n", encoding="utf-8")
        if output.exists():
            output.rename(Path(folder) / "old")
        ready.rename(output)
    return True


def digest(files: Iterable[Path], root: Path) -> str:
    """sha256 over the names, relative to ``root``, and contents of files."""
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(root)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def split_by_patient(
    patients: Mapping[str, str], output: Path, seed: int, shares: Sequence[float] = (0.6, 0.15, 0.25)
) -> dict[str, int]:
    """Writes ``splits.json`` with all cases of a patient in one split; at least one patient each.

    Args:
        patients: the patient of each case.
        output: folder of the data set.
        seed: draws the patients.
        shares: of the patients, for training, validation and test.

    Returns:
        The number of cases by split.
    """
    names = sorted(set(patients.values()))
    order = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    test, validation = (max(1, round(len(names) * share / sum(shares))) for share in (shares[2], shares[1]))
    if test + validation >= len(names):
        raise DataError(f"{len(names)} patients are too few for training, validation and test.")
    chosen = {"test": order[:test], "validation": order[test : test + validation], "train": order[test + validation :]}
    splits = {
        split: [{"case": case} for case in sorted(patients) if patients[case] in chosen[split]]
        for split in ("train", "validation", "test")
    }
    write_split(splits, output, seed=seed)
    return {split: len(cases) for split, cases in splits.items()}
