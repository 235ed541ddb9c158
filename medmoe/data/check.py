# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Everything that is wrong with a data set, found before training starts and told at once, case by case."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medmoe.conditions import Schema
from medmoe.data.conditions import is_number, never_seen
from medmoe.data.datalist import NIFTI_SUFFIXES, Case, is_plain, suffix_of
from medmoe.data.datalist import class_names as names_of_classes
from medmoe.data.reading import SAME_PLACE, distance_in_voxels, header_findings, reader_for
from medmoe.data.steps import shape_problem
from medmoe.data.targets import is_labelled
from medmoe.errors import ConfigError, DataError, one_line
from medmoe.progress import Progress
from medmoe.tasks import UNLABELLED, Task, single_task

logger = logging.getLogger(__name__)

MASK_VALUE = 16
"""A label with larger values, where two classes are expected, is taken for a mask with gray values."""


@dataclass
class Report:
    """What a check found.

    Attributes:
        dataset_dir: the data set, for the message.
        num_cases: cases that were looked at.
        problems: what makes a case unusable, each with the case's name.
        warnings: what may be meant so.
        sizes: cases by split.
        shapes: cases by shape of the image.
        classes: for each class by name (with several tasks ``task: name``), how many training cases have it.
    """

    dataset_dir: str = ""
    num_cases: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    classes: dict[str, int] = field(default_factory=dict)

    def raise_if_bad(self) -> None:
        """Logs the warnings.

        Raises:
            DataError: there are problems; the message lists all of them.
        """
        for warning in self.warnings:
            logger.warning(warning)
        if self.problems:
            count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
            again = f"\nTo see them again: medmoe data check {self.dataset_dir}" if self.dataset_dir else ""
            raise DataError("\n  - ".join([f"{count} in {self.num_cases} cases:", *self.problems]) + again)


@dataclass(frozen=True)
class Expected:
    """What the settings say about every case. ``tasks`` are those with targets of their own."""

    tasks: tuple[Task, ...]
    plain: bool
    spatial_dims: int
    in_channels: int
    label_threshold: float | None
    intensity: str | Sequence[float]
    schema: Schema | None


class Content(NamedTuple):
    """What a file holds: ``array`` (C, H, W[, D]), a volume's ``affine`` where it is sound, what is wrong with it."""

    array: npt.NDArray[Any]
    affine: npt.NDArray[np.float64] | None = None
    problems: Sequence[str] = ()
    remarks: Sequence[str] = ()


class Unusable(Exception):
    """A file that cannot be looked at any further."""


def check_cases(
    splits: Mapping[str, Sequence[Case]],
    num_classes: int,
    spatial_dims: int,
    in_channels: int,
    label_threshold: float | None = None,
    class_names: Sequence[str] = (),
    intensity: str | Sequence[float] = "percentile",
    dataset_dir: str | os.PathLike[str] = "",
    tasks: Sequence[Task] | None = None,
    schema: Schema | None = None,
) -> Report:
    """Reads every image and every mask once and compares them with the settings and with each other.

    Problems are files that are missing, empty, truncated or of another kind; wrong dimensions or channels; affines that
    are not finite or singular; NaN or infinite voxels; labels of another shape or place than their image, or with
    values outside the classes; a split without cases; a task without a labelled training case; conditions that are text
    where a number belongs, or images of another kind. A class that no training case has is a warning, and so is a
    category that only cases outside the training split have.

    Where there is no threshold, 255 in a mask of classes means that a voxel is not labelled, and a warning says how
    many cases have such voxels. Where the training cases have 255 and no class at all they are masks: a problem.

    Args:
        splits: cases by split, from :func:`medmoe.data.datalists`.
        num_classes: of plain segmentation.
        class_names: for the messages; those of the data set where empty.
        dataset_dir: for the messages.
        tasks: as for :func:`medmoe.data.datalists`.
        schema: of the conditions.

    Raises:
        ConfigError: a threshold with more than two classes.
    """
    plain = is_plain(tasks)
    if plain or not tasks:
        tasks = single_task(num_classes, names_of_classes(dataset_dir, num_classes, class_names))
    own = tuple(task for task in tasks if not task.derived)
    many = [task for task in own if task.kind == "classes" and len(task.names) != 2]
    if label_threshold is not None and many:
        found = f"num_classes is {num_classes}" if plain else f"task {many[0].name} has {len(many[0].names)}"
        raise ConfigError(f"label_threshold makes masks of 2 classes, but {found}.")
    expected = Expected(own, plain, spatial_dims, in_channels, label_threshold, intensity, schema)
    sizes = {split: len(cases) for split, cases in splits.items()}
    report = Report(str(dataset_dir), sum(sizes.values()), sizes=sizes)
    report.problems += [f"split {name!r} has no cases" for name in ("train", "validation") if not splits.get(name)]
    seen: Counter[tuple[str, int]] = Counter()
    partly: Counter[str] = Counter()
    with Progress("checking cases", report.num_cases) as progress:
        for split, cases in splits.items():
            for case in cases:
                present = _check_case(case, expected, report)
                seen.update(present if split == "train" else ())
                partly.update(task.name for task in own if task.dense and (task.name, UNLABELLED) in present)
                progress.advance(note=case["case"])
    for task in own:
        _count_classes(task, seen, partly[task.name], expected, report, splits.get("train", ()))
    report.warnings += never_seen(schema, [case.get("condition", {}) for cases in splits.values() for case in cases])
    return report


def _count_classes(
    task: Task,
    seen: Mapping[tuple[str, int], int],
    partly: int,
    expected: Expected,
    report: Report,
    cases: Sequence[Case],
) -> None:
    """Adds to the report in how many training cases each class of a task occurs, and what that means.

    Args:
        seen: training cases by task and class.
        partly: cases of all splits that have voxels that are not labelled.
        cases: for training.
    """
    counts = {name: seen.get((task.name, index), 0) for index, name in enumerate(task.names)}
    report.classes |= {name if expected.plain else f"{task.name}: {name}": count for name, count in counts.items()}
    if not cases:
        return
    if not expected.plain and not any(is_labelled(task, case[task.name]) for case in cases):
        report.problems.append(f"task {task.name}: none of the {len(cases)} training cases is labelled")
        return
    background = int(task.kind == "classes")
    absent = [(index, name) for index, name in enumerate(task.names) if index >= background and not counts[name]]
    what = task.name if expected.plain else f"task {task.name}"
    if background and len(absent) == len(task.names) - 1 and seen.get((task.name, UNLABELLED)):
        report.problems.append(
            f"{what}: no training case has any of its classes, but {UNLABELLED}, which means not labelled; "
            "pass --label_threshold 127 if these are masks"
        )
        return
    if partly:
        report.warnings.append(
            f"{what}: {partly} of {report.num_cases} cases have the value {UNLABELLED}: such voxels are not labelled, "
            "they neither train nor count"
        )
    where = f"occurs in none of the {len(cases)} training cases"
    start = "" if expected.plain else f"{what}: "
    report.warnings += [f"{start}class {index} ({name}) {where}" for index, name in absent]


def _check_case(case: Case, expected: Expected, report: Report) -> set[tuple[str, int]]:
    """Adds what is wrong with one case to the report. Returns which classes it has, by task."""
    contents: dict[str, Content] = {}
    problems: list[str] = []
    masks = {role: (task, index, file) for task in expected.tasks for role, index, file in _masks_of(task, case)}
    files = {"image": case["image"], **{role: file for role, (_, _, file) in masks.items()}, **_second(case, expected)}
    for role, paths in files.items():
        try:
            contents[role] = _read([paths] if isinstance(paths, str) else paths, role in masks)
        except Unusable as problem:
            problems.append(f"{role} {problem}")
    image = contents.get("image")
    for role, content in contents.items():
        if role in masks:
            found = _label_problems(content, image, expected, masks[role][0])
        else:
            found = _image_problems(content, expected, second=role != "image")
        problems += [f"{role}: {problem}" for problem in found]
    if image is not None:
        report.shapes[image.array.shape[1:]] += 1
    report.problems += [f"{case['case']}: {problem}" for problem in [*problems, *_condition_problems(case, expected)]]
    for role, content in contents.items():
        report.warnings += [f"{case['case']}: {role}: {remark}" for remark in content.remarks]
    present = {(task.name, case[task.name]) for task in expected.tasks if not task.dense}
    for role, (task, index, _) in masks.items():
        if role in contents:
            present |= {(task.name, value) for value in _present(contents[role].array, task, index, expected)}
    return present


def _masks_of(task: Task, case: Case) -> Iterator[tuple[str, int, str]]:
    """The masks of a task that a case has: how to call each, its channel and its file."""
    files = case[task.name]
    if task.kind == "classes" and files:
        yield task.name, 0, files
    elif task.kind == "labels":
        yield from ((f"{task.name} {task.names[k]}", k, file) for k, file in enumerate(files or ()) if file)


def _second(case: Case, expected: Expected) -> dict[str, Any]:
    """The second image of a case, if it has one."""
    columns = expected.schema.of_kind("image") if expected.schema else ()
    found = {f"condition {column.name}": case.get("condition", {}).get(column.name) for column in columns}
    return {role: files for role, files in found.items() if files}


def _condition_problems(case: Case, expected: Expected) -> Iterator[str]:
    for column in expected.schema.of_kind("number") if expected.schema else ():
        value = case.get("condition", {}).get(column.name)
        if value is not None and not is_number(value):
            yield f"condition {column.name}: found {value!r}, expected a number"


def _read(files: Sequence[str], label: bool) -> Content:
    """The channels of one image or label.

    Raises:
        Unusable: a file cannot be read, or the files do not fit together.
    """
    parts = [_read_file(Path(path), label) for path in files]
    if len({part.array.shape for part in parts}) > 1:
        raise Unusable(f"has channels of different shape: {', '.join(str(part.array.shape[1:]) for part in parts)}")
    if len(parts) == 1:
        return parts[0]
    return parts[0]._replace(array=np.concatenate([part.array for part in parts]))


def _read_file(path: Path, label: bool) -> Content:
    if not path.exists():
        raise Unusable(f"does not exist: {path}")
    if path.is_file() and not path.stat().st_size:
        raise Unusable(f"is an empty file: {path}")
    try:
        content = _read_nifti(path) if suffix_of(path) in NIFTI_SUFFIXES else _read_other(path, label)
    except Exception as error:  # readers raise whatever their libraries do
        raise Unusable(f"cannot be read, it may be cut short or no image: {path} ({one_line(error)})") from error
    if content.array.dtype.kind not in "biuf":
        raise Unusable(f"holds {content.array.dtype}, expected one real number for each voxel and channel: {path}")
    return content


def _read_nifti(path: Path) -> Content:
    """A NIfTI file as MONAI sees it, its header examined first: MONAI passes over a form that is not finite."""
    import nibabel as nib
    from monai.data.utils import correct_nifti_header_if_necessary

    image: Any = nib.load(path)
    problems, remarks = header_findings(image.header)
    array = np.asanyarray(image.dataobj)
    array = array[None] if array.ndim <= 3 else np.moveaxis(array, -1, 0)
    affine = None if problems else correct_nifti_header_if_necessary(image).affine
    return Content(array, affine, problems, remarks)


def _read_other(path: Path, label: bool) -> Content:
    """A picture or a DICOM series."""
    reader = reader_for(path, label)
    array, meta = reader.get_data(reader.read(str(path)))
    channel = meta["original_channel_dim"]
    array = array[None] if np.isnan(channel) else np.moveaxis(array, int(channel), 0)
    return Content(array, meta.get("affine"))


def _finite(array: npt.NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _image_problems(image: Content, expected: Expected, second: bool) -> Iterator[str]:
    yield from image.problems
    if second and expected.schema:
        channels = expected.schema.image_channels
        if image.array.ndim != expected.spatial_dims + 1 or image.array.shape[0] != channels:
            yield f"its shape is {image.array.shape}, expected {channels} channels and {expected.spatial_dims} axes"
    else:
        problem = shape_problem(image.array.shape, expected.spatial_dims, expected.in_channels)
        if problem:
            yield problem
    if not _finite(image.array):
        yield f"{np.count_nonzero(~np.isfinite(image.array))} voxels are NaN or infinite"
    elif not second and expected.intensity == "unit" and not 0 <= image.array.min() <= image.array.max() <= 255:
        yield (
            f"intensities from {image.array.min():g} to {image.array.max():g}, but intensity is 'unit' (0 to 255): "
            "pass --intensity percentile, or a window"
        )


def _label_problems(label: Content, image: Content | None, expected: Expected, task: Task) -> Iterator[str]:
    yield from label.problems
    if label.array.shape[0] != 1:
        yield f"it has {label.array.shape[0]} channels, expected one class number for each voxel"
    if image is not None:
        yield from _mismatches(label, image)
    if not _finite(label.array):
        yield f"{np.count_nonzero(~np.isfinite(label.array))} voxels are NaN or infinite"
    elif expected.label_threshold is None and task.kind == "classes":
        array = label.array[label.array != UNLABELLED]
        yield from _value_problems(array, task, expected.plain) if array.size else ()


def _mismatches(label: Content, image: Content) -> Iterator[str]:
    if label.array.shape[1:] != image.array.shape[1:]:
        yield f"its shape is {label.array.shape[1:]}, that of the image is {image.array.shape[1:]}"
    elif label.affine is not None and image.affine is not None and image.array.ndim == 4:
        distance = distance_in_voxels(image.affine, label.affine, image.array.shape[1:])
        if distance > SAME_PLACE:
            yield f"its affine places it up to {distance:.1f} voxels away from the image"


def _value_problems(array: npt.NDArray[Any], task: Task, plain: bool) -> Iterator[str]:
    num_classes = len(task.names)
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and np.abs(array - np.rint(array)).max() > 1e-3:
        yield f"its values, from {low:g} to {high:g}, are not whole numbers, expected one class number for each voxel"
    elif low < 0 or high >= num_classes:
        values = np.unique(array)
        found = ", ".join(f"{value:g}" for value in values[values >= num_classes][:5]) or f"{low:g}"
        advice = f"pass --num_classes {high + 1:g} if these are classes"
        if not plain:
            advice = f"give task {task.name} {high + 1:g} names if these are classes"
        if num_classes == 2 and high > MASK_VALUE:
            advice = f"pass --label_threshold {high // 2:g} if this is a mask"
        yield f"there are values outside the classes 0 to {num_classes - 1}: {found}; {advice}"


def _present(array: npt.NDArray[Any], task: Task, index: int, expected: Expected) -> set[int]:
    """The classes that a mask of classes has, or the index of a label whose mask is not empty."""
    if not _finite(array):
        return set()
    if task.kind == "labels":
        return {index} if (array > (expected.label_threshold or 0)).any() else set()
    if expected.label_threshold is not None:
        return {int(value) for value in np.unique(array > expected.label_threshold)}
    if array.dtype == np.uint8:  # most labels: much faster than sorting all voxels
        return set(np.flatnonzero(np.bincount(array.ravel())).tolist())
    return {int(value) for value in np.unique(np.rint(array))}
