# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Which case is used for what: splits that the data give, that a seed draws, or that an earlier run wrote."""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmoe.data.datalist import LAYOUTS, PLAIN, SPLIT_FILE, SPLITS, Case, Wanted, found_cases, is_plain, read_json
from medmoe.data.targets import completed
from medmoe.errors import DataError, some
from medmoe.files import write_text
from medmoe.tasks import Task

logger = logging.getLogger(__name__)


def load_cases(
    dataset_dir: str | os.PathLike[str],
    tasks: Sequence[Task] | None = None,
    table: str | os.PathLike[str] | None = None,
    conditions: Sequence[Mapping[str, Any]] | None = None,
) -> list[Case]:
    """Finds the labelled cases of a data set, sorted by name.

    Cases carry ``split`` where the data say it: in ``splits.json`` (lists of case names under "train", "validation"
    and "test"; cases that are not listed are left out), in ``dataset.json`` or by folders.

    With ``tasks``, a case may lack targets, but not all of them: cases without any are left out, with a warning. A mask
    is found in the folder that the task's ``target`` names, beside ``images`` ("": ``masks`` or ``labels``); the masks
    of overlapping labels in one folder for each label inside it. In ``dataset.json`` an entry has the target's name as
    a key ("": "label") with a file, a list of files and nulls for "labels", or a class for "image".

    Args:
        tasks: what is to be predicted; none: the one mask of plain segmentation.
        table: a CSV file, absolute or relative to the data set, with the columns of image-level tasks and conditions.
        conditions: such as ``{"name": "age", "kind": "number"}``. One of kind "image" is a folder beside ``images``.

    Raises:
        DataError: the folder does not exist, holds nothing in a known layout, images lack their label, or a task or
            condition is nowhere in the data.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise DataError(f"dataset_dir {str(root)!r} is not a folder (looked for {root.absolute()}).")
    plain = is_plain(tasks)
    own = PLAIN if plain else [task for task in tasks or () if not task.derived]
    wanted = Wanted(own, conditions or (), plain)
    cases = found_cases(root, wanted)
    if not cases:
        found = some(sorted(entry.name for entry in root.iterdir()), 8) or "nothing"
        raise DataError(f"No labelled images in {str(root)!r} (it holds {found}).\n{LAYOUTS}")
    cases = sorted(_with_unique_names(cases), key=lambda case: case["case"])
    cases = completed(cases, wanted, root, table)
    return assign_splits(cases, root / SPLIT_FILE) if (root / SPLIT_FILE).is_file() else cases


def _with_unique_names(cases: Sequence[Case]) -> list[Case]:
    """Puts the split before the names that more than one case has (``train_1`` and ``validation_1``)."""
    counts = Counter(case["case"] for case in cases)
    renamed = []
    for case in cases:
        if counts[case["case"]] > 1 and case.get("split"):
            case = Case(**{**case, "case": f"{case['split']}_{case['case']}"})
        renamed.append(case)
    twice = [name for name, count in Counter(case["case"] for case in renamed).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} case names occur more than once: {some(twice)}. Rename the files.")
    return renamed


def assign_splits(cases: Sequence[Case], split_file: str | os.PathLike[str]) -> list[Case]:
    """The cases that a split file lists, each with its split.

    Raises:
        DataError: the file lists a case that does not exist, or one case twice, or none for training.
    """
    listed = read_json(Path(split_file))
    by_name = {case["case"]: case for case in cases}
    names = [(str(name), split) for split in SPLITS for name in listed.get(split, [])]
    unknown = [name for name, _ in names if name not in by_name]
    if unknown:
        near = difflib.get_close_matches(unknown[0], by_name, 3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"{split_file} lists {len(unknown)} cases that do not exist: {some(unknown)}.{hint}")
    twice = [name for name, count in Counter(name for name, _ in names).items() if count > 1]
    if twice:
        raise DataError(f"{split_file} lists {len(twice)} cases more than once: {some(twice)}.")
    if not listed.get("train"):
        raise DataError(f'{split_file} lists no case under "train".')
    return [Case(**{**by_name[name], "split": split}) for name, split in names]


def split_cases(
    cases: Sequence[Case],
    seed: int = 0,
    num_labelled: int = 0,
    fractions: Sequence[float] = (0.6, 0.15, 0.25),
    num_validation: int = 0,
    num_test: int = 0,
    split_seed: int = 0,
) -> dict[str, list[Case]]:
    """Divides cases into "train", "validation" and "test"; "test" is absent where the data have none.

    Splits that the data give are honored. A validation split that they do not give is drawn from the training cases,
    and so is a test split where they give neither or ``num_test`` asks for it.

    Args:
        seed: draws the labelled cases: they are the first ``num_labelled`` of one permutation of the training cases,
            so that 8 labelled cases are among the 16 of the same seed.
        num_labelled: number of training cases; 0 takes all.
        fractions: shares of training, validation and test cases where the data give no split; at least one case each.
        num_validation: number of validation cases; 0 takes all that are given, or their share.
        num_test: number of test cases; 0 takes all that are given, or their share.
        split_seed: draws the splits. It is apart from ``seed``, so that repetitions share their test cases.

    Raises:
        DataError: there are fewer cases than asked for.
    """
    given = {split: [case for case in cases if case.get("split") == split] for split in SPLITS[1:]}
    pool = _shuffled([case for case in cases if case.get("split", "train") == "train"], split_seed)
    total, share = len(pool), {"validation": fractions[1], "test": fractions[2]}
    carved = ["validation"] if given["test"] else [] if given["validation"] else ["test", "validation"]
    splits: dict[str, list[Case]] = {}
    for split, number in (("test", num_test), ("validation", num_validation)):
        if given[split]:
            splits[split] = _first(_shuffled(given[split], split_seed), number, split)
        elif number or split in carved:
            number = number or max(1, round(total * share[split] / sum(fractions)))
            splits[split], pool = _first(pool, number, split), pool[number:]
    if not pool:
        raise DataError(
            f"No case is left for training: {len(cases)} cases, {len(splits.get('validation', []))} for validation and "
            f"{len(splits.get('test', []))} for test. Add cases or ask for fewer (num_validation, num_test)."
        )
    pool = sorted(pool, key=lambda case: case["case"])
    splits["train"] = _first(_shuffled(pool, seed), num_labelled, "train")
    return {split: splits[split] for split in SPLITS if split in splits}


def _shuffled(cases: Sequence[Case], seed: int) -> list[Case]:
    """A permutation of the cases that depends on the seed and on the cases alone."""
    return [cases[i] for i in np.random.default_rng(seed).permutation(len(cases))]


def _first(cases: list[Case], number: int, split: str) -> list[Case]:
    """The first ``number`` cases (0: all), or a DataError where there are fewer."""
    if number > len(cases) or number < 0:
        setting = {"train": "num_labelled", "validation": "num_validation", "test": "num_test"}[split]
        raise DataError(f"{setting}={number}, but there are {len(cases)} cases: ask for at most as many, or 0 for all.")
    return cases[: number or None]


def write_split(splits: Mapping[str, Sequence[Case]], output_dir: str | os.PathLike[str], **facts: Any) -> Path:
    """Writes the names of the cases of every split to ``output_dir/splits.json``, atomically.

    The file can be given as ``split_file``, or put into the data set's folder, to use the same splits again.
    ``facts`` (the seed, the data set) are written beside the names.
    """
    target = Path(output_dir) / SPLIT_FILE
    names = {split: [case["case"] for case in cases] for split, cases in splits.items()}
    write_text(target, json.dumps({**facts, **names}, indent=1) + "\n")
    return target


def datalists(
    dataset_dir: str | os.PathLike[str],
    seed: int = 0,
    num_labelled: int = 0,
    fractions: Sequence[float] = (0.6, 0.15, 0.25),
    num_validation: int = 0,
    num_test: int = 0,
    split_seed: int = 0,
    split_file: str | os.PathLike[str] | None = None,
    tasks: Sequence[Task] | None = None,
    table: str | os.PathLike[str] | None = None,
    conditions: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, list[Case]]:
    """The cases of a data set by split: ``load_cases`` and ``split_cases`` in one.

    Args:
        split_file: a split file of an earlier run, which then decides alone. It may be missing: evaluation names the
            one of the training run, and falls back to the splits that the other arguments give, with a warning.

    See :func:`load_cases` and :func:`split_cases` for the others.
    """
    cases = load_cases(dataset_dir, tasks, table, conditions)
    if split_file is not None and Path(split_file).is_file():
        cases = assign_splits(cases, split_file)
        splits = {split: [case for case in cases if case["split"] == split] for split in SPLITS}
        splits = {split: chosen for split, chosen in splits.items() if chosen}
    else:
        if split_file is not None:
            logger.warning("There is no %s: the splits are drawn anew. Are they those of training?", split_file)
        splits = split_cases(cases, seed, num_labelled, fractions, num_validation, num_test, split_seed)
    logger.info("%s: %s", dataset_dir, ", ".join(f"{len(chosen)} {split}" for split, chosen in splits.items()))
    return splits


def cases_of(splits: Mapping[str, list[Case]], split: str) -> list[Case]:
    """The cases of a split; "test" falls back to "validation" where the data have no test cases, and says so.

    Raises:
        DataError: there is no such split.
    """
    found = split_of(splits, split)
    if found != split:
        logger.warning("The data have no %s cases: the %d %s cases are used.", split, len(splits[found]), found)
    if not splits.get(found):
        raise DataError(f"There are no cases in split {split!r}, but in {some([s for s in splits if splits[s]])}.")
    return splits[found]


def split_of(splits: Mapping[str, list[Case]], split: str) -> str:
    """The split that :func:`cases_of` takes the cases from."""
    return "validation" if split == "test" and not splits.get("test") and splits.get("validation") else split
