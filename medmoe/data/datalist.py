# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Which images belong to a data set, and which masks, values and conditions belong to which image."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from medmoe.errors import DataError, some
from medmoe.tasks import Task

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

PLAIN = (Task("label", "classes", ()),)
"""The task of plain segmentation; how many classes it has is said elsewhere."""

Case: TypeAlias = dict[str, Any]
"""One image and what is known of it:

- ``case``: its name. ``image``: its file, or a list where every channel has its own. ``split``, where the data say it.
- for a task of kind "classes", by the task's name (``label`` in plain segmentation): the file of the mask, or None.
- for "labels": a list with a file or None for each channel. For "image": the index of the class, or -1. None and -1
  mean that the case is not labelled.
- ``condition``, where there are any: by name, the table's text or None; for an image its file, files or None.
"""


class Wanted(NamedTuple):
    """What to look for beside the images. ``tasks`` have targets of their own; ``plain``: the one mask, which no image
    may lack."""

    tasks: Sequence[Task]
    conditions: Sequence[Mapping[str, Any]]
    plain: bool

    @property
    def masks(self) -> list[Task]:
        return [task for task in self.tasks if task.dense]

    @property
    def values(self) -> list[Task]:
        return [task for task in self.tasks if not task.dense]

    def condition_names(self, images: bool) -> list[str]:
        """Names of the conditions that are images, or of those that are not."""
        return [str(spec["name"]) for spec in self.conditions if (spec["kind"] == "image") == images]


class Place(NamedTuple):
    """A folder of images, and where its masks are: in ``base``, in folders that end in ``ending``."""

    images: Path
    base: Path
    ending: str
    split: str

    def folder(self, target: str) -> Path | None:
        """The folder of a target ("": the usual one), if there is one."""
        usual = LABEL_FOLDERS if not self.ending else LABEL_FOLDERS[1:]
        folders = [self.base / f"{name}{self.ending}" for name in ([target] if target else usual)]
        return next((folder for folder in folders if folder.is_dir()), None)

    def channels(self, task: Task) -> list[Path | None]:
        """The folders of a task's masks: one, or one for each label. Blanks in a label's name may be underscores."""
        folder = self.folder(task.target)
        if task.kind == "classes":
            return [folder]
        spellings = [(name, name.replace(" ", "_")) for name in task.names]
        return [
            next((folder / name for name in names if (folder / name).is_dir()), None) if folder else None
            for names in spellings
        ]


def is_plain(tasks: Sequence[Task] | None) -> bool:
    """Whether these are plain segmentation: a mask of classes in the usual place, which no image may lack."""
    return not tasks or [(task.name, task.kind, task.target) for task in tasks] == [("label", "classes", "")]


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


def found_cases(root: Path, wanted: Wanted) -> list[Case]:
    """The cases of a folder in one of the known layouts, with their masks; values of tables are not yet there.

    Raises:
        DataError: in plain segmentation, there are images without a label.
    """
    return _listed_cases(root, wanted) or _folder_cases(root, wanted)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a DataError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected an object with names and values.")
    return content


def _listed_cases(root: Path, wanted: Wanted) -> list[Case]:
    """The cases that ``dataset.json`` lists; in plain segmentation those with a label (a challenge's test set has
    none)."""
    if not (root / "dataset.json").is_file():
        return []
    description, cases = read_json(root / "dataset.json"), []
    for key, split in (("training", "train"), ("validation", "validation"), ("test", "test")):
        entries = description.get(key)
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and "image" in entry and ("label" in entry or not wanted.plain):
                cases.append(_listed_case(root, entry, split, wanted))
    return cases


def _listed_case(root: Path, entry: Mapping[str, Any], split: str, wanted: Wanted) -> Case:
    """A case out of one entry of ``dataset.json``, whose paths are relative to the data set."""

    def absolute(files: Any) -> Any:
        return [file and str(root / file) for file in files] if isinstance(files, list) else files and str(root / files)

    images = absolute(entry["image"])
    masks = {task.name: absolute(entry.get(task.target or "label")) for task in wanted.masks}
    for task in wanted.masks:
        found, count = masks[task.name], len(task.names)
        if task.kind == "labels" and found is not None and (not isinstance(found, list) or len(found) != count):
            raise DataError(
                f"{root / 'dataset.json'}: {entry['image']} has {found!r} for task {task.name}, expected a list of "
                f"{count} files ({some(task.names)}), with null where a label is not drawn."
            )
    files = [file for file in masks.values() if isinstance(file, str)] or [
        images if isinstance(images, str) else re.sub(r"_\d{4}$", "", stem_of(images[0]))
    ]
    values = {task.name: entry.get(task.target) for task in wanted.values}
    conditions = {name: absolute(entry.get(name)) for name in wanted.condition_names(images=True)}
    conditions |= {name: entry.get(name) for name in wanted.condition_names(images=False)}
    return _case(stem_of(files[0]), images, {**masks, **values}, conditions, split)


def _folder_cases(root: Path, wanted: Wanted) -> list[Case]:
    """The cases of a layout by folders."""
    cases = _cases_in(Place(root / "imagesTr", root, "Tr", ""), wanted)
    if cases:
        given = Place(root / "imagesTs", root, "Ts", "test")
        return cases + (_cases_in(given, wanted) if any(given.folder(task.target) for task in wanted.masks) else [])
    for split, names in FOLDER_NAMES.items():
        for name in names:
            cases += _cases_in(Place(root / name / "images", root / name, "", split), wanted)
    return cases or _cases_in(Place(root / "images", root, "", ""), wanted)


def _cases_in(place: Place, wanted: Wanted) -> list[Case]:
    """The images of a folder with the masks and second images of the same name.

    Raises:
        DataError: in plain segmentation, there are images without a label.
    """
    if not place.images.is_dir() or (wanted.plain and place.folder("") is None):
        return []
    masks = {task.name: [_by_stem(folder) for folder in place.channels(task)] for task in wanted.masks}
    second = {name: place.folder(name) for name in wanted.condition_names(images=True)}
    known = {stem for channels in masks.values() for files in channels for stem in files}
    images = _images(place.images, known)
    if wanted.plain:
        _complain_of_missing(images, known, place)
    spare = sorted(known - set(images))
    if spare:
        logger.warning("%d labels in %s have no image and are left out: %s", len(spare), place.base, some(spare))
    others = {name: _images(folder, images) if folder else {} for name, folder in second.items()}
    cases = []
    for name, files in images.items():
        targets = {
            task.name: _one_or_all(task, [channel.get(name) for channel in masks[task.name]]) for task in wanted.masks
        }
        conditions = {key: found.get(name) for key, found in others.items()}
        cases.append(_case(name, files, targets, conditions, place.split))
    return cases


def _by_stem(folder: Path | None) -> dict[str, str]:
    return {stem_of(path): str(path) for path in _image_files(folder)} if folder else {}


def _images(folder: Path, known: Collection[str]) -> dict[str, str | list[str]]:
    """Images by name. Files whose names differ in nnU-Net's channel endings are one, but for ``known`` names."""
    channels: defaultdict[str, list[str]] = defaultdict(list)
    for path in _image_files(folder):
        stem = stem_of(path)
        channels[stem if stem in known else re.sub(r"_\d{4}$", "", stem)].append(str(path))
    return {name: files if len(files) > 1 else files[0] for name, files in channels.items()}


def _complain_of_missing(images: Mapping[str, Any], known: Collection[str], place: Place) -> None:
    missing = [name for name in images if name not in known]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} images in {place.images} have no label of the same name in "
            f"{place.folder('')}: {some(missing)}. Add the labels, or move these images out of the folder."
        )


def _one_or_all(task: Task, files: list[str | None]) -> Any:
    """The file of a mask of classes, or the files of all labels."""
    return files[0] if task.kind == "classes" else files


def _case(name: str, image: Any, targets: Mapping[str, Any], conditions: Mapping[str, Any], split: str) -> Case:
    case: Case = {"case": name, "image": image, **targets}
    if conditions:
        case["condition"] = dict(conditions)
    if split:
        case["split"] = split
    return case


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
    labels = read_json(description).get("labels", {}) if description.is_file() else {}
    pairs = [(value, key) if isinstance(value, int) else (key, value) for key, value in dict(labels).items()]
    return {int(value): str(name) for value, name in pairs if str(value).isdigit()}
