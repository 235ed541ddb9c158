# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""One DICOM series as one volume, or a clear refusal.

The common readers turn a folder with a missing slice, two series, a damaged file or a tilted gantry into a volume of
the wrong shape without a word. Here everything that the geometry rests on is checked first, and all problems are named
together. A message speaks of slices by their instance numbers and of series by their UIDs, never by what DICOM tells
of the patient.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys

from medmoe.errors import DataError, GeometryError, MedMoEError

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

SUFFIXES = (".dcm", ".ima", ".dicom")
SHARED = {
    "rows": "number of rows",
    "columns": "number of columns",
    "spacing": "pixel spacing",
    "orientation": "orientation",
}
ROUNDING = 0.02  # mm: positions are often written with two decimals
SHOWN = 5  # problems of one kind that a message spells out
TAGS = (
    "SOPClassUID SeriesInstanceUID Modality InstanceNumber NumberOfFrames SamplesPerPixel PhotometricInterpretation "
    "Rows Columns PixelSpacing ImagePositionPatient ImageOrientationPatient SpacingBetweenSlices SliceThickness "
    "RescaleSlope RescaleIntercept"
).split()


class Slice(NamedTuple):
    """The header of one image. Lengths in mm, in DICOM's LPS axes; NaN where a value is missing or no number."""

    path: Path
    name: str
    series: str
    modality: str
    frames: int
    samples: int
    photometric: str
    rows: int
    columns: int
    spacing: Floats  # (2,), between rows, between columns
    position: Floats  # (3,)
    orientation: Floats  # (6,), along a row, along a column
    thickness: float
    slope: float
    intercept: float


class Layout(NamedTuple):
    """A checked series before its pixels are read: files in spatial order, the grid, and what was found on the way.

    ``affine`` (4, 4) float64 maps voxel indices (column, row, slice) to millimeters in RAS+ axes, as nibabel does.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    shape: tuple[int, int, int]
    affine: Floats
    facts: dict[str, Any]


class Series(NamedTuple):
    """A volume: ``array`` float32 (columns, rows, slices), rescaled; ``affine`` and ``facts`` as in `Layout`."""

    array: npt.NDArray[np.float32]
    affine: Floats
    facts: dict[str, Any]


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a DICOM file, judged by its content."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_series(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a DICOM file or a folder that directly holds one."""
    path = Path(path)
    return any(is_dicom(file) for file in path.iterdir()) if path.is_dir() else is_dicom(path)


def read_series(source: str | os.PathLike[str], series_uid: str | None = None, tolerance: float = 0.01) -> Series:
    """Reads one series.

    Args:
        source: a folder, or one file that stands for its series in its folder. Subfolders are not searched.
        series_uid: the SeriesInstanceUID to read where the folder holds several.
        tolerance: by how much a gap between slices may differ from the usual gap, as a fraction of it. Differences up
            to 0.02 mm always pass, because positions are rounded.

    Raises:
        DataError: no DICOM, several series and none chosen, damaged files, color, multi-frame or inverted images.
        GeometryError: slices that do not make up one regular grid.
    """
    layout = scan_series(source, series_uid, tolerance)
    array = np.empty(layout.shape, dtype=np.float32)
    for index, (path, name) in enumerate(zip(layout.files, layout.names, strict=True)):
        array[..., index] = _pixels(path, name, layout.shape[:2])
    return Series(array, layout.affine, layout.facts)


def scan_series(source: str | os.PathLike[str], series_uid: str | None = None, tolerance: float = 0.01) -> Layout:
    """Checks a series by its headers alone. Arguments and errors are those of `read_series`."""
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist: give a folder with one DICOM series, or one of its files.")
    folder = source if source.is_dir() else source.parent
    slices, skipped = _headers(folder)
    if source.is_file():
        series_uid = next((item.series for item in slices if item.path == source), None)
        if series_uid is None:
            raise DataError(f"{source} is not a DICOM image: give the folder of one series, or one of its files.")
    slices = _one_series(slices, series_uid, folder)
    where = f"{folder} ({len(slices)} slices of series {slices[0].series or 'without UID'})"
    _raise(DataError, where, _content_problems(slices))
    _raise(GeometryError, where, _header_problems(slices))
    slices = sorted(slices, key=lambda item: float(item.position @ _normal(item)))
    _raise(GeometryError, where, _position_problems(slices, tolerance))
    if skipped:
        logger.warning("%s: skipped %d files that are not DICOM images", folder, skipped)
    affine = _affine(slices)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-9:
        raise GeometryError(f"{where}: the affine {affine.tolist()} is not finite or has no inverse.")
    first = slices[0]
    facts = {"series_uid": first.series, "modality": first.modality, "slices": len(slices), "skipped": skipped}
    shape = (first.columns, first.rows, len(slices))
    return Layout(tuple(s.path for s in slices), tuple(s.name for s in slices), shape, affine, facts)


class SeriesReader(ImageReader):
    """A MONAI reader for one DICOM series: ``LoadImaged(keys, reader=SeriesReader())``.

    Args:
        series_uid: as in `read_series`.
        tolerance: as in `read_series`.
    """

    def __init__(self, series_uid: str | None = None, tolerance: float = 0.01) -> None:
        self.series_uid = series_uid
        self.tolerance = tolerance

    def verify_suffix(self, filename: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> bool:
        """Whether the path is a DICOM file or a folder that holds one."""
        return holds_series(_single(filename))

    def read(self, data: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], **kwargs: Any) -> Series:
        """Reads the series that the path names. Errors are those of `read_series`."""
        return read_series(_single(data), self.series_uid, self.tolerance)

    def get_data(self, img: Series) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """The array (columns, rows, slices) and MONAI's metadata for it."""
        return img.array, {
            MetaKeys.AFFINE: img.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: img.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(img.array.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
            MetaKeys.SPACE: SpaceKeys.RAS,
            "modality": img.facts["modality"],
        }


def _single(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> Path:
    if isinstance(paths, (str, os.PathLike)):
        return Path(paths)
    if len(paths) != 1:
        raise DataError(f"A DICOM series is named by one folder or one of its files, not by {len(paths)} paths.")
    return Path(paths[0])


def _raise(kind: type[MedMoEError], where: str, problems: Sequence[str]) -> None:
    if problems:
        raise kind("\n  - ".join([f"{where} cannot be read as one volume:", *problems]))


def _headers(folder: Path) -> tuple[list[Slice], int]:
    """The image headers in ``folder`` and the number of other files."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    slices: list[Slice] = []
    skipped = damaged = 0
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
        try:
            with warnings.catch_warnings():  # of odd but harmless values; those that matter are checked here
                warnings.simplefilter("ignore")
                header = dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
                if "Rows" in header:
                    slices.append(_slice(path, header, len(slices) + 1))
                else:  # an image whose header was cut short, or another kind of object, such as a report
                    kind = getattr(header.file_meta, "MediaStorageSOPClassUID", header.get("SOPClassUID"))
                    is_image = kind is None or "Image Storage" in kind.name
                    damaged += is_image
                    skipped += not is_image
        except InvalidDicomError:
            damaged += path.suffix.lower() in SUFFIXES
            skipped += path.suffix.lower() not in SUFFIXES
        except Exception:  # pydicom raises whatever a broken element leads to
            logger.debug("unreadable DICOM header", exc_info=True)
            damaged += 1
    if damaged:
        raise DataError(f"{folder}: {damaged} DICOM files are damaged (no readable header). Copy the series again.")
    if not slices:
        raise DataError(f"{folder} holds no DICOM image ({skipped} other files): give the folder of one series.")
    return slices, skipped


def _slice(path: Path, header: Any, counter: int) -> Slice:
    def number(tag: str, missing: float = np.nan) -> float:
        return float(numbers(tag, 1)[0]) if header.get(tag) is not None else missing

    def numbers(tag: str, count: int) -> Floats:
        try:
            values = np.asarray(header[tag].value, dtype=np.float64).reshape(count)
        except (KeyError, TypeError, ValueError):
            return np.full(count, np.nan)
        return values

    def integer(tag: str, missing: int) -> int:
        value = number(tag, missing)
        return int(value) if np.isfinite(value) else missing

    instance = header.get("InstanceNumber")
    gap = number("SpacingBetweenSlices")
    return Slice(
        path=path,
        name=f"file {counter} (no instance number)" if instance is None else f"slice {instance}",
        series=str(header.get("SeriesInstanceUID", "")),
        modality=str(header.get("Modality", "")),
        frames=integer("NumberOfFrames", 1),
        samples=integer("SamplesPerPixel", 1),
        photometric=str(header.get("PhotometricInterpretation", "")),
        rows=integer("Rows", 0),
        columns=integer("Columns", 0),
        spacing=numbers("PixelSpacing", 2),
        position=numbers("ImagePositionPatient", 3),
        orientation=numbers("ImageOrientationPatient", 6),
        thickness=gap if gap > 0 else number("SliceThickness"),
        slope=number("RescaleSlope", 1.0),
        intercept=number("RescaleIntercept", 0.0),
    )


def _one_series(slices: list[Slice], series_uid: str | None, folder: Path) -> list[Slice]:
    """The slices of the one series, or of the chosen one."""
    counts = Counter(item.series for item in slices)
    chosen = series_uid if series_uid is not None else next(iter(counts))
    if chosen in counts and (series_uid is not None or len(counts) == 1):
        return [item for item in slices if item.series == chosen]
    modality = {item.series: item.modality for item in slices}
    listed = "".join(f"\n  - {uid or 'without UID'} ({modality[uid]}, {counts[uid]} images)" for uid in counts)
    if series_uid is not None:
        raise DataError(f"{folder} has no series {series_uid}. It holds:{listed}")
    raise DataError(
        f"{folder} holds {len(counts)} series where one is expected:{listed}\n"
        "Choose one with series_uid=..., or give the path of one of its files, or put each in a folder of its own."
    )


def _named(slices: Iterable[Slice]) -> str:
    names = [item.name for item in slices]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _content_problems(slices: Sequence[Slice]) -> list[str]:
    """Images that are no plain gray slices."""
    tests = (
        ("multi-frame images, which are not supported: convert them to single frames", lambda s: s.frames > 1),
        ("color images; expected one gray value a pixel", lambda s: s.samples != 1 or "PALETTE" in s.photometric),
        ("inverted gray values (MONOCHROME1), which are not supported", lambda s: s.photometric == "MONOCHROME1"),
        ("images without rows or columns; the file may be cut short", lambda s: s.rows < 1 or s.columns < 1),
        (
            "rescale slope or intercept missing its number, zero, or beyond 1e6",
            lambda s: not (1e-9 < abs(s.slope) < 1e6 and abs(s.intercept) < 1e6),
        ),
    )
    found = [(text, [item for item in slices if test(item)]) for text, test in tests]
    return [f"{_named(bad)}: {text}" for text, bad in found if bad]


def _header_problems(slices: Sequence[Slice]) -> list[str]:
    """Geometry that is missing, impossible, or differs between slices."""
    problems = []
    for field, text in (("position", "position"), ("orientation", "orientation"), ("spacing", "pixel spacing")):
        bad = [item for item in slices if not np.isfinite(getattr(item, field)).all()]
        if bad:
            problems.append(f"{_named(bad)}: {text} is missing or no number")
    if problems:
        return problems
    bad = [item for item in slices if item.spacing.min() < 1e-4 or item.spacing.max() > 1e3]
    if bad:
        problems.append(f"{_named(bad)}: pixel spacing {bad[0].spacing.tolist()} mm; expected positive lengths")
    bad = [item for item in slices if not _orthonormal(item)]
    if bad:
        axes = bad[0].orientation.tolist()
        problems.append(f"{_named(bad)}: the row and column directions {axes} are not orthonormal")
    for field, text in SHARED.items():
        values = np.stack([np.atleast_1d(getattr(item, field)) for item in slices]).astype(np.float64)
        odd = np.abs(values - np.median(values, axis=0)).max(axis=1) > 1e-4
        if odd.any():
            culprits = [item for item, is_odd in zip(slices, odd, strict=True) if is_odd]
            problems.append(f"{_named(culprits)}: another {text} than the other slices; a localizer?")
    return problems


def _orthonormal(item: Slice) -> bool:
    axes = item.orientation.reshape(2, 3)
    return bool(np.abs(axes @ axes.T - np.eye(2)).max() < 1e-3)


def _normal(item: Slice) -> Floats:
    normal = np.cross(item.orientation[:3], item.orientation[3:])
    return normal / np.linalg.norm(normal)


def _position_problems(slices: Sequence[Slice], tolerance: float) -> list[str]:
    """Slices, sorted along their normal, that are missing, doubled, or beside the line."""
    first = slices[0]
    if len(slices) == 1:
        known = first.thickness > 0
        return [] if known else [f"{first.name} is alone and gives neither slice spacing nor slice thickness"]
    normal = _normal(first)
    positions = np.stack([item.position for item in slices])
    depth = positions @ normal
    gaps = np.diff(depth)
    usual = float(np.median(gaps[gaps > ROUNDING / 2])) if (gaps > ROUNDING / 2).any() else 0.0
    allowed = max(tolerance * usual, ROUNDING)
    pairs = list(zip(slices, slices[1:], gaps, strict=False))
    problems = [
        f"{one.name} and {two.name} lie at the same position: several time points, phases or echoes, or a copy?"
        for one, two, gap in pairs
        if gap <= max(0.1 * usual, ROUNDING / 2)
    ] + [
        f"{one.name} and {two.name} are {gap:.3f} mm apart, elsewhere it is {usual:.3f} mm" + _missing(gap / usual)
        for one, two, gap in pairs
        if gap > max(0.1 * usual, ROUNDING / 2) and abs(gap - usual) > allowed
    ]
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"and {len(problems) - SHOWN} more such pairs of slices"]
    return problems + _lateral_problems(slices, positions - np.outer(depth, normal), depth, allowed)


def _missing(ratio: float) -> str:
    count = round(ratio) - 1
    return f": {count} missing?" if count > 0 and abs(ratio - round(ratio)) < 0.1 else ": an odd slice?"


def _lateral_problems(slices: Sequence[Slice], lateral: Floats, depth: Floats, allowed: float) -> list[str]:
    """Slices whose corners do not lie on one line along the normal; ``lateral`` (slices, 3) is the part beside it."""
    span = depth[-1] - depth[0]
    if span <= 0:
        return []
    shift = lateral[-1] - lateral[0]
    beside = np.linalg.norm(lateral - lateral[0] - np.outer((depth - depth[0]) / span, shift), axis=1)
    odd = [item for item, distance in zip(slices, beside, strict=True) if distance > allowed]
    if odd:
        return [f"{_named(odd)}: up to {beside.max():.3f} mm beside the line through the first and the last slice"]
    if np.linalg.norm(shift) > max(ROUNDING, min(0.01 * span, 0.5 * slices[0].spacing.min())):
        angle = np.degrees(np.arctan(np.linalg.norm(shift) / span))
        return [f"each slice is shifted against the last (gantry tilt of {angle:.1f} degrees), which is not supported"]
    return []


def _affine(slices: Sequence[Slice]) -> Floats:
    """Voxel (column, row, slice) to millimeters in RAS+."""
    first, last = slices[0], slices[-1]
    normal = _normal(first)
    gap = float((last.position - first.position) @ normal) / (len(slices) - 1) if len(slices) > 1 else first.thickness
    affine = np.eye(4)
    affine[:3, 0] = first.orientation[:3] * first.spacing[1]
    affine[:3, 1] = first.orientation[3:] * first.spacing[0]
    affine[:3, 2] = normal * gap
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _pixels(path: Path, name: str, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The rescaled values of one slice, (columns, rows)."""
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path), sitk.sitkFloat32, imageIO="GDCMImageIO")
        values = sitk.GetArrayFromImage(image).squeeze(0).T
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"{path.parent}: the pixels of {name} cannot be read, the file may be cut short. Copy the series again. "
            f"({reason.replace(str(path), name)})"
        ) from error
    if values.shape != shape:
        raise DataError(f"{path.parent}: {name} holds {values.shape} pixels where the header says {shape}.")
    if not np.isfinite(values).all():
        raise DataError(f"{path.parent}: {name} holds values that are not finite.")
    return values
