# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Files as tensors: one reader for each kind of file, and what a header must say to be trusted."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from monai.data import ImageReader, MetaTensor, NibabelReader, PILReader
from monai.transforms import EnsureChannelFirst, MapTransform
from PIL import Image

from medmoe.data.datalist import NIFTI_SUFFIXES, suffix_of
from medmoe.data.series import SeriesReader, holds_series
from medmoe.errors import DataError, GeometryError, MedMoEError, one_line

SAME_PLACE = 0.1
"""Voxels by which the corners of two volumes may lie apart that are said to be in the same place."""


class PictureReader(PILReader):
    """Reads PNG, JPEG, BMP and TIFF through PIL as (H, W) or (H, W, 3).

    Palettes and transparency become RGB, or gray where they are gray. Labels keep their values (palette indices,
    16-bit numbers); a colored label becomes its brightness.
    """

    def __init__(self, label: bool = False) -> None:
        super().__init__(converter=_as_classes if label else _as_picture, reverse_indexing=False)

    def _get_spatial_shape(self, img: Image.Image) -> np.ndarray:
        return np.asarray((img.height, img.width))


class VolumeReader(NibabelReader):
    """Reads NIfTI through nibabel. Where a header's sform or qform is broken it is an error.

    MONAI passes over a broken form and takes the other one, or the voxel size, without a word.
    """

    def read(self, data: Any, **kwargs: Any) -> Any:
        """As NibabelReader.

        Raises:
            GeometryError: a form is not finite or singular.
        """
        for path in [data] if isinstance(data, (str, os.PathLike)) else data:
            problems, _ = header_findings(nib.load(path).header)
            if problems:
                raise GeometryError(f"{path}: {'; '.join(problems)}")
        return super().read(data, **kwargs)


def _as_picture(image: Image.Image) -> Image.Image:
    """The picture as gray (8 bit, 16 bit or float) or RGB."""
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "F") or image.mode.startswith("I") else image.convert("RGB")


def _as_classes(image: Image.Image) -> Image.Image:
    """The label as one number a pixel."""
    return image.convert("L") if len(image.getbands()) > 1 else image


def reader_for(path: str | os.PathLike[str], label: bool = False) -> ImageReader:
    """The one reader of a path, whatever else is installed: by its suffix, or for DICOM by its content.

    Raises:
        DataError: it is neither NIfTI, nor a picture, nor a DICOM series.
    """
    suffix = suffix_of(path)
    if suffix:
        return VolumeReader() if suffix in NIFTI_SUFFIXES else PictureReader(label)
    if holds_series(path):
        return SeriesReader()
    raise DataError(f"{path} is neither NIfTI ({', '.join(NIFTI_SUFFIXES)}), nor a picture, nor a DICOM series.")


class LoadImageBySuffixd(MapTransform):
    """Loads images, float32 and channels first: NIfTI through nibabel, pictures through PIL, DICOM series as checked.

    MONAI's own ``LoadImaged`` tries every installed reader after the named one has failed, which hides the reason and
    makes the result depend on what is installed. Here there is one reader for each kind of file.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = load(loaded[key])
        return loaded


def load(files: str | Sequence[str], label: bool = False) -> MetaTensor:
    """An image or label as a float32 MetaTensor (C, H, W[, D]); several files are stacked as channels.

    Raises:
        DataError: a file cannot be read.
    """
    paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    reader = reader_for(paths[0], label)
    try:
        array, meta = reader.get_data(reader.read(paths if len(paths) > 1 else paths[0]))
        meta["filename_or_obj"] = str(paths[0])
        voxels = np.asarray(array, dtype=np.float32)
        return EnsureChannelFirst()(MetaTensor.ensure_torch_and_prune_meta(voxels, meta, simple_keys=True))
    except MedMoEError:
        raise
    except Exception as error:  # readers raise whatever their libraries do
        raise DataError(f"{paths[0]} cannot be read: {one_line(error)}") from error


def affine_problem(affine: Any) -> str:
    """What is wrong with an affine that maps voxels to millimeters: the empty string where nothing is."""
    matrix = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(matrix).all():
        return "the affine has values that are not finite"
    spacing = np.linalg.norm(matrix[:-1, :-1], axis=0)
    if not spacing.all() or abs(np.linalg.det(matrix[:-1, :-1] / spacing)) < 1e-3:
        return "the affine is singular: it maps the volume onto a plane or a line"
    return ""


def distance_in_voxels(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64], shape: Sequence[int]) -> float:
    """How far apart two affines place the corners of a volume: the largest distance, in voxels of the first."""
    corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in shape))]).T
    apart = np.linalg.norm(((one - other) @ corners)[:3], axis=0).max()
    return float(apart / np.linalg.norm(one[:3, :3], axis=0).min())


def header_findings(header: Any) -> tuple[list[str], list[str]]:
    """Problems and remarks on where a NIfTI header places the volume."""
    problems, forms = [], {}
    for name, read in (("sform", header.get_sform), ("qform", header.get_qform)):
        try:
            forms[name], _ = read(coded=True)
        except ValueError as error:
            problems.append(f"the {name} cannot be used: {one_line(error)}")
    coded = {name: form for name, form in forms.items() if form is not None} or {"voxel size": header.get_base_affine()}
    problems += [f"{problem} ({name})" for name, form in coded.items() if (problem := affine_problem(form))]
    if problems or len(coded) < 2:
        return problems, []
    distance = distance_in_voxels(coded["sform"], coded["qform"], header.get_data_shape()[:3])
    if distance <= SAME_PLACE:
        return [], []
    return [], [f"sform and qform lie {distance:.1f} voxels apart; the one that fits the voxel size is used"]
