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

from medmoe.data.datalist import NIFTI_SUFFIXES, Case, suffix_of
from medmoe.data.datalist import class_names as names_of_classes
from medmoe.data.transforms import SAME_PLACE, distance_in_voxels, header_findings, reader_for, shape_problem
from medmoe.errors import ConfigError, DataError, one_line
from medmoe.progress import Progress

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
        classes: for each class by name, how many training cases have it.
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
    """What the settings say about every case."""

    num_classes: int
    spatial_dims: int
    in_channels: int
    label_threshold: float | None
    intensity: str | Sequence[float]


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
) -> Report:
    """Reads every image and label once and compares them with the settings and with each other.

    Problems are files that are missing, empty, truncated or of another kind; wrong dimensions or channels; affines that
    are not finite or singular; NaN or infinite voxels; labels of another shape or place than their image, or with
    values outside the classes; a split without cases. A class that no training case has is a warning.

    Args:
        splits: cases by split, from :func:`medmoe.data.datalist.datalists`.
        class_names: for the messages; those of the data set where empty.
        dataset_dir: for the messages.

    Raises:
        ConfigError: a threshold with more than two classes.
    """
    if label_threshold is not None and num_classes != 2:
        raise ConfigError(f"label_threshold makes masks of 2 classes, but num_classes is {num_classes}.")
    expected = Expected(num_classes, spatial_dims, in_channels, label_threshold, intensity)
    sizes = {split: len(cases) for split, cases in splits.items()}
    report = Report(str(dataset_dir), sum(sizes.values()), sizes=sizes)
    report.problems += [f"split {name!r} has no cases" for name in ("train", "validation") if not splits.get(name)]
    seen: Counter[int] = Counter()
    with Progress("checking cases", report.num_cases) as progress:
        for split, cases in splits.items():
            for case in cases:
                present = _check_case(case, expected, report)
                seen.update(present if split == "train" else ())
                progress.advance(note=case["case"])
    names = names_of_classes(dataset_dir, num_classes, class_names)
    report.classes = {name: seen[index] for index, name in enumerate(names)}
    report.warnings += _absent_classes(report.classes, sizes.get("train", 0))
    return report


def _absent_classes(classes: Mapping[str, int], cases: int) -> list[str]:
    absent = [(index, name) for index, (name, count) in enumerate(classes.items()) if index and not count]
    return [f"class {index} ({name}) occurs in none of the {cases} training cases" for index, name in absent if cases]


def _check_case(case: Case, expected: Expected, report: Report) -> set[int]:
    """Adds what is wrong with one case to the report. Returns the classes that its label has."""
    contents: dict[str, Content] = {}
    problems: list[str] = []
    for role, files in (("image", case["image"]), ("label", case["label"])):
        try:
            contents[role] = _read([files] if isinstance(files, str) else files, role == "label")
        except Unusable as problem:
            problems.append(f"{role} {problem}")
    image, label = contents.get("image"), contents.get("label")
    if image is not None:
        report.shapes[image.array.shape[1:]] += 1
        problems += [f"image: {problem}" for problem in _image_problems(image, expected)]
    if label is not None:
        problems += [f"label: {problem}" for problem in _label_problems(label, image, expected)]
    report.problems += [f"{case['case']}: {problem}" for problem in problems]
    for role, content in contents.items():
        report.warnings += [f"{case['case']}: {role}: {remark}" for remark in content.remarks]
    return set() if label is None else _classes(label.array, expected)


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


def _image_problems(image: Content, expected: Expected) -> Iterator[str]:
    yield from image.problems
    problem = shape_problem(image.array.shape, expected.spatial_dims, expected.in_channels)
    if problem:
        yield problem
    if not _finite(image.array):
        yield f"{np.count_nonzero(~np.isfinite(image.array))} voxels are NaN or infinite"
    elif expected.intensity == "unit" and not 0 <= image.array.min() <= image.array.max() <= 255:
        yield (
            f"intensities from {image.array.min():g} to {image.array.max():g}, but intensity is 'unit' (0 to 255): "
            "pass --intensity percentile, or a window"
        )


def _label_problems(label: Content, image: Content | None, expected: Expected) -> Iterator[str]:
    yield from label.problems
    if label.array.shape[0] != 1:
        yield f"it has {label.array.shape[0]} channels, expected one class number for each voxel"
    if image is not None:
        yield from _mismatches(label, image)
    if not _finite(label.array):
        yield f"{np.count_nonzero(~np.isfinite(label.array))} voxels are NaN or infinite"
    elif expected.label_threshold is None:
        yield from _value_problems(label.array, expected.num_classes)


def _mismatches(label: Content, image: Content) -> Iterator[str]:
    if label.array.shape[1:] != image.array.shape[1:]:
        yield f"its shape is {label.array.shape[1:]}, that of the image is {image.array.shape[1:]}"
    elif label.affine is not None and image.affine is not None and image.array.ndim == 4:
        distance = distance_in_voxels(image.affine, label.affine, image.array.shape[1:])
        if distance > SAME_PLACE:
            yield f"its affine places it up to {distance:.1f} voxels away from the image"


def _value_problems(array: npt.NDArray[Any], num_classes: int) -> Iterator[str]:
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f" and np.abs(array - np.rint(array)).max() > 1e-3:
        yield f"its values, from {low:g} to {high:g}, are not whole numbers, expected one class number for each voxel"
    elif low < 0 or high >= num_classes:
        values = np.unique(array)
        found = ", ".join(f"{value:g}" for value in values[values >= num_classes][:5]) or f"{low:g}"
        advice = f"--num_classes {high + 1:g} if these are classes"
        if num_classes == 2 and high > MASK_VALUE:
            advice = f"--label_threshold {high // 2:g} if this is a mask"
        yield f"there are values outside the classes 0 to {num_classes - 1}: {found}; pass {advice}"


def _classes(array: npt.NDArray[Any], expected: Expected) -> set[int]:
    """The classes that a label has."""
    if expected.label_threshold is not None:
        return {int(value) for value in np.unique(array > expected.label_threshold)}
    if not _finite(array):
        return set()
    if array.dtype == np.uint8:  # most labels: much faster than sorting all voxels
        return set(np.flatnonzero(np.bincount(array.ravel())).tolist())
    return {int(value) for value in np.unique(np.rint(array))}
