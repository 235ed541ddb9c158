# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Which images belong to a data set, which label belongs to which image, and which case is used for what."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from medmoe.errors import DataError, some
from medmoe.files import write_text

logger = logging.getLogger(__name__)

NIFTI_SUFFIXES = (".nii.gz", ".nii")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "validation", "test")
SPLIT_FILE = "splits.json"

FOLDER_NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val"), "test": ("test",)}
LABEL_FOLDERS = ("masks", "labels")
LAYOUTS = """Understood layouts of a data set are
  dataset.json with "training" (and "validation", "test") lists of {"image": ..., "label": ...}   Medical Decathlon
  imagesTr/ and labelsTr/, also with nnU-Net's channel endings _0000, _0001, ...
  train/, validation/, test/, each with images/ and masks/ (or labels/)
  images/ and masks/ (or labels/)
with files .nii.gz, .nii, .png, .jpg, .bmp or .tif; an image and its label have the same name."""


class Case(TypedDict, total=False):
    """One image with its label. ``image`` is a list where every channel has its own file."""

    case: str
    image: str | list[str]
    label: str
    split: str


def suffix_of(path: str | os.PathLike[str]) -> str:
    """The known suffix of an image file in lower case, or the empty string."""
    name = Path(path).name.lower()
    return next((suffix for suffix in NIFTI_SUFFIXES + PICTURE_SUFFIXES if name.endswith(suffix)), "")


def stem_of(path: str | os.PathLike[str]) -> str:
    """The file's name without its image suffix: ``brain_3`` of ``brain_3.nii.gz``."""
    name = Path(path).name
    return name[: len(name) - len(suffix_of(name))]


def _image_files(folder: Path) -> list[Path]:
    """The image files of a folder in the order of their names. Hidden files (such as macOS's ``._*``) are left out."""
    return [p for p in sorted(folder.iterdir()) if suffix_of(p) and not p.name.startswith(".")]


def load_cases(dataset_dir: str | os.PathLike[str]) -> list[Case]:
    """Finds the labelled cases of a data set, sorted by name.

    Cases carry ``split`` where the data say it: in ``splits.json`` (lists of case names under "train", "validation"
    and "test"; cases that are not listed are left out), in ``dataset.json`` or by folders.

    Raises:
        DataError: the folder does not exist, holds nothing in a known layout, or images lack their label.
    """
    root = Path(dataset_dir)
    if not root.is_dir():
        raise DataError(f"dataset_dir {str(root)!r} is not a folder (looked for {root.absolute()}).")
    cases = _listed_cases(root) or _folder_cases(root)
    if not cases:
        found = some(sorted(entry.name for entry in root.iterdir()), 8) or "nothing"
        raise DataError(f"No labelled images in {str(root)!r} (it holds {found}).\n{LAYOUTS}")
    cases = sorted(_with_unique_names(cases), key=lambda case: case["case"])
    return assign_splits(cases, root / SPLIT_FILE) if (root / SPLIT_FILE).is_file() else cases


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a DataError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected an object with names and values.")
    return content


def _listed_cases(root: Path) -> list[Case]:
    """The cases that ``dataset.json`` lists with a label; entries without one (a challenge's test set) are left out."""
    if not (root / "dataset.json").is_file():
        return []
    description, cases = _read_json(root / "dataset.json"), []
    for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
        entries = description.get(key)
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and "image" in entry and "label" in entry:
                cases.append(_listed_case(root, entry, split))
    return cases


def _listed_case(root: Path, entry: Mapping[str, Any], split: str) -> Case:
    """A case out of one entry of ``dataset.json``, whose paths are relative to the data set."""
    images = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    label = str(root / entry["label"])
    return _case(stem_of(label), [str(root / image) for image in images], label, split)


def _folder_cases(root: Path) -> list[Case]:
    """The cases of a layout by folders."""
    cases = _paired(root / "imagesTr", [root / "labelsTr"], "")
    if cases:
        given = _paired(root / "imagesTs", [root / "labelsTs"], "test") if (root / "labelsTs").is_dir() else []
        return cases + given
    for split, names in FOLDER_NAMES.items():
        for name in names:
            cases += _paired(root / name / "images", [root / name / folder for folder in LABEL_FOLDERS], split)
    return cases or _paired(root / "images", [root / folder for folder in LABEL_FOLDERS], "")


def _paired(images: Path, label_folders: Sequence[Path], split: str) -> list[Case]:
    """Images and the labels of the same name; ``split`` may be empty.

    Raises:
        DataError: there are images without a label.
    """
    labels_folder = next((folder for folder in label_folders if folder.is_dir()), None)
    if labels_folder is None or not images.is_dir():
        return []
    labels = {stem_of(path): path for path in _image_files(labels_folder)}
    channels: defaultdict[str, list[str]] = defaultdict(list)
    for path in _image_files(images):
        stem = stem_of(path)
        channels[stem if stem in labels else re.sub(r"_\d{4}$", "", stem)].append(str(path))
    missing = [name for name in channels if name not in labels]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(channels)} images in {images} have no label of the same name in {labels_folder}: "
            f"{some(missing)}. Add the labels, or move these images out of the folder."
        )
    spare = sorted(set(labels) - set(channels))
    if spare:
        logger.warning("%d labels in %s have no image and are left out: %s", len(spare), labels_folder, some(spare))
    return [_case(name, paths, str(labels[name]), split) for name, paths in channels.items()]


def _case(name: str, images: list[str], label: str, split: str) -> Case:
    case = Case(case=name, image=images if len(images) > 1 else images[0], label=label)
    if split:
        case["split"] = split
    return case


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
    listed = _read_json(Path(split_file))
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
) -> dict[str, list[Case]]:
    """The cases of a data set by split: ``load_cases`` and ``split_cases`` in one.

    Args:
        split_file: a split file of an earlier run, which then decides alone. It may be missing: evaluation names the
            one of the training run, and falls back to the splits that the other arguments give, with a warning.

    See :func:`split_cases` for the others.
    """
    cases = load_cases(dataset_dir)
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


def class_names(dataset_dir: str | os.PathLike[str], num_classes: int, names: Sequence[str] = ()) -> list[str]:
    """Names of the classes, background first: ``names``, or those of ``dataset.json``, or "class 1" and so on.

    Raises:
        DataError: ``names`` are given, but not one for each class.
    """
    if names:
        if len(names) != num_classes:
            raise DataError(f"class_names has {len(names)} names ({some(list(names))}), num_classes is {num_classes}.")
        return list(names)
    known = {0: "background", **_labels_of(Path(dataset_dir) / "dataset.json")}
    return [known.get(index, f"class {index}") for index in range(num_classes)]


def _labels_of(description: Path) -> dict[int, str]:
    """Class names by value, from ``{"1": "liver"}`` (Decathlon) or ``{"liver": 1}`` (nnU-Net); regions are left out."""
    labels = _read_json(description).get("labels", {}) if description.is_file() else {}
    pairs = [(value, key) if isinstance(value, int) else (key, value) for key, value in dict(labels).items()]
    return {int(value): str(name) for value, name in pairs if str(value).isdigit()}
