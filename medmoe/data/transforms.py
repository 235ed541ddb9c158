# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""MONAI transforms from files to tensors and from predictions back to the grid of the files.

Grids: a NIfTI volume is turned to RAS by flips and permutations; a picture keeps its rows as H and its columns as W.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, MetaTensor, NibabelReader, PILReader
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureChannelFirst,
    EnsureTyped,
    Invertd,
    MapTransform,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandSpatialCropd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    SpatialPadd,
)
from PIL import Image

from medmoe.data.datalist import NIFTI_SUFFIXES, suffix_of
from medmoe.data.series import SeriesReader, holds_series
from medmoe.errors import ConfigError, DataError, GeometryError, MedMoEError, one_line

AUGMENTATIONS = ("none", "flips", "strong")

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
    """Loads float32 MetaTensors, channels first: NIfTI through nibabel, pictures through PIL, DICOM series as checked.

    MONAI's own ``LoadImaged`` tries every installed reader after the named one has failed, which hides the reason and
    makes the result depend on what is installed. Here there is one reader for each kind of file.

    Args:
        keys: keys of the files.
        labels: those of the keys that hold labels.
    """

    def __init__(self, keys: KeysCollection, labels: Sequence[str] = ("label",), allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.labels = tuple(labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            loaded[key] = load(loaded[key], key in self.labels)
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


class CheckImaged(MapTransform):
    """Refuses images that cannot be processed: wrong dimensions or channels, a broken affine, NaN or infinite voxels.

    Args:
        trained: whether a checkpoint decides about dimensions and channels, and not the user any more.

    Raises:
        DataError: dimensions, channels or voxels are wrong.
        GeometryError: the affine is not finite or singular.
    """

    def __init__(self, keys: KeysCollection, spatial_dims: int, in_channels: int, trained: bool = False) -> None:
        super().__init__(keys)
        self.spatial_dims, self.in_channels, self.trained = spatial_dims, in_channels, trained

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(dict(data)):
            image: MetaTensor = data[key]
            name = image.meta.get("filename_or_obj", key)
            problem = shape_problem(tuple(image.shape), self.spatial_dims, self.in_channels, self.trained)
            if problem:
                raise DataError(f"{name}: {problem}")
            problem = affine_problem(image.affine)
            if problem:
                raise GeometryError(f"{name}: {problem}")
            if not torch.isfinite(image).all():
                raise DataError(f"{name}: there are NaN or infinite voxels")
        return dict(data)


def shape_problem(shape: tuple[int, ...], spatial_dims: int, in_channels: int, trained: bool = False) -> str:
    """What keeps an image of shape (C, H, W[, D]) from being used, or nothing.

    It names the setting that would fit; with ``trained`` there is none, the checkpoint takes no other images.
    """
    dims = len(shape) - 1
    if trained and dims != spatial_dims:
        return f"it is {dims}-D {shape[1:]}, but the checkpoint was trained on {spatial_dims}-D images"
    if trained and shape[0] != in_channels:
        return f"it has {shape[0]} channels, but the checkpoint was trained on images with {in_channels}"
    if dims != spatial_dims:
        advice = f"pass --spatial_dims {dims}" if dims in (2, 3) else "only 2-D and 3-D images can be used"
        return f"it is {dims}-D {shape[1:]}, but spatial_dims is {spatial_dims}: {advice}"
    if shape[0] != in_channels:
        return f"it has {shape[0]} channels, but in_channels is {in_channels}: pass --in_channels {shape[0]}"
    return ""


class ClassesFromValuesd(MapTransform):
    """Class indices (uint8) from label values: the rounded value, or 1 where the value is above ``threshold``."""

    def __init__(self, keys: KeysCollection, threshold: float | None = None) -> None:
        super().__init__(keys)
        self.threshold = threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        classes = dict(data)
        for key in self.key_iterator(classes):
            value = classes[key]
            classes[key] = (value.round() if self.threshold is None else value > self.threshold).to(torch.uint8)
        return classes


def intensity_transform(intensity: str | Sequence[float]) -> MapTransform:
    """Maps the image's intensities to [0, 1].

    Args:
        intensity: "percentile" (percentiles 0.5 to 99.5 of each channel of each case, for MR), "unit" (0..255, for
            pictures of 8 bits), or a window [low, high] (for CT).
    """
    if intensity == "percentile":
        return ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True, channel_wise=True)
    window = _intensity_window(intensity)
    return ScaleIntensityRanged("image", window[0], window[1], 0.0, 1.0, clip=True)


def _intensity_window(intensity: str | Sequence[float]) -> tuple[float, float]:
    """The window of "unit" or of [low, high].

    Raises:
        ConfigError: it is neither.
    """
    if intensity == "unit":
        return 0.0, 255.0
    if isinstance(intensity, str) or len(intensity) != 2 or not intensity[0] < intensity[1]:
        raise ConfigError(f"intensity is {intensity!r}: expected 'percentile', 'unit' or a window [low, high].")
    return float(intensity[0]), float(intensity[1])


def preprocessing(
    spatial_dims: int,
    in_channels: int,
    spacing: Sequence[float] | None = None,
    intensity: str | Sequence[float] = "percentile",
    label_threshold: float | None = None,
    with_label: bool = True,
) -> Compose:
    """From files to the network's grid: for training, and with ``with_label=False`` for inference.

    Gives ``image``, float32 in [0, 1], (C, H, W[, D]), and ``label``, uint8, (1, H, W[, D]) on the same grid. The
    result is a MetaTensor, from which :func:`postprocessing` finds the way back.

    Args:
        spatial_dims: 2 or 3. Volumes are turned to RAS.
        in_channels: channels that the image must have.
        spacing: millimeters of a voxel along each axis, in RAS order, to resample volumes to; ``None`` keeps theirs.
        intensity: see :func:`intensity_transform`.
        label_threshold: for masks: a label value above it is class 1, any other is class 0.

    Raises:
        ConfigError: a setting is out of range.
    """
    keys = ("image", "label") if with_label else ("image",)
    return Compose(_steps(keys, keys, spatial_dims, in_channels, spacing, intensity, label_threshold))


def evaluation_preprocessing(
    spatial_dims: int,
    in_channels: int,
    spacing: Sequence[float] | None = None,
    intensity: str | Sequence[float] = "percentile",
    label_threshold: float | None = None,
) -> Compose:
    """As :func:`preprocessing`, but the label stays on the grid of its file, where predictions are judged.

    Image and label may therefore differ in shape: use batches of one case.
    """
    return Compose(
        _steps(("image", "label"), ("image",), spatial_dims, in_channels, spacing, intensity, label_threshold)
    )


def _steps(
    loaded: Sequence[str],
    moved: Sequence[str],
    spatial_dims: int,
    in_channels: int,
    spacing: Sequence[float] | None,
    intensity: str | Sequence[float],
    label_threshold: float | None,
) -> list[MapTransform]:
    """The transforms that load ``loaded`` and bring ``moved`` to the network's grid."""
    if spatial_dims not in (2, 3):
        raise ConfigError(f"spatial_dims is {spatial_dims}: expected 2 or 3.")
    if spacing is not None and len(spacing) != spatial_dims:
        raise ConfigError(f"spacing is {list(spacing)}: expected {spatial_dims} numbers, in millimeters.")
    if spacing is not None and spatial_dims == 2:
        raise ConfigError("spacing is for volumes: pictures carry no millimeters. Leave it at null.")
    check = CheckImaged("image", spatial_dims, in_channels, trained="label" not in loaded)
    chain: list[MapTransform] = [LoadImageBySuffixd(loaded), check]
    if spatial_dims == 3:
        chain.append(Orientationd(moved, axcodes="RAS", labels=None))
    if spacing is not None:
        modes = ["nearest" if key == "label" else "bilinear" for key in moved]
        chain.append(Spacingd(moved, pixdim=spacing, mode=modes))
    if "label" in loaded:
        chain.append(ClassesFromValuesd("label", label_threshold))
    return [*chain, intensity_transform(intensity)]


def augmentation(spatial_dims: int, roi_size: int | Sequence[int], augment: str = "flips") -> Compose:
    """Random training windows of one shape, as plain tensors.

    An image that is smaller than ``roi_size`` is first padded with zeros on both sides. Along an axis where it is
    larger a window is drawn. Flips are along the first two axes only. So where whole slices fit into ``roi_size`` a
    slice takes at most 4 variants ("flips") or one ("none"), whatever is drawn along the last axis of a volume, and
    features of slices can be cached.

    Args:
        roi_size: shape of the window; -1 keeps an axis whole.
        augment: "flips"; "none" (windows alone); "strong" (flips, affine and intensity changes: nothing repeats).

    Raises:
        ConfigError: a setting is out of range.
    """
    roi = [roi_size] * spatial_dims if isinstance(roi_size, int) else list(roi_size)
    if len(roi) != spatial_dims:
        raise ConfigError(f"roi_size is {roi}: expected {spatial_dims} numbers, one for each axis.")
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"augment is {augment!r}: expected one of {', '.join(AUGMENTATIONS)}.")
    keys = ("image", "label")
    chain: list[Any] = [SpatialPadd(keys, roi), RandSpatialCropd(keys, roi, random_size=False)]
    if augment != "none":
        chain += [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in (0, 1)]
    if augment == "strong":
        chain += _strong_changes(spatial_dims)
    return Compose([*chain, EnsureTyped(keys, dtype=(torch.float32, torch.uint8), track_meta=False)])


def _strong_changes(spatial_dims: int) -> list[Any]:
    """Random rotation about the last axis, scaling, contrast, brightness and noise; intensities stay in [0, 1]."""
    affine = RandAffined(
        ("image", "label"),
        prob=0.7,
        rotate_range=[0.26] if spatial_dims == 2 else [0.0, 0.0, 0.26],
        scale_range=[0.15, 0.15, 0.0][:spatial_dims],
        mode=("bilinear", "nearest"),
        padding_mode="zeros",
    )
    return [
        affine,
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        RandScaleIntensityd("image", factors=0.2, prob=0.3),
        RandGaussianNoised("image", prob=0.3, std=0.05),
        ScaleIntensityRanged("image", 0.0, 1.0, 0.0, 1.0, clip=True),
    ]


class BackToFiled(Invertd):
    """``Invertd`` that does not warn where there is nothing to invert, as for pictures."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "inverse has been called but no invertible", UserWarning)
            inverted: dict[Hashable, Any] = super().__call__(data)
        return inverted


def postprocessing(num_classes: int, preprocessing: Compose, with_label: bool = True) -> Compose:
    """From logits on the network's grid to classes on the grid of the files.

    Probabilities are brought back (trilinearly where the image was resampled) before the largest is taken. ``image`` is
    brought back as well, so that pictures show image, label and prediction on one grid.

    Args:
        preprocessing: the transforms that ``image`` went through.
        with_label: ``pred`` and ``label`` become one-hot, (num_classes, H, W[, D]), as metrics want them; otherwise
            ``pred`` becomes class indices (1, H, W[, D]) and there is no ``label``.
    """
    onehot = num_classes if with_label else None
    chain: list[MapTransform] = [
        Activationsd("pred", softmax=True),
        BackToFiled(("pred", "image"), preprocessing, orig_keys=("image", "image"), nearest_interp=False),
        AsDiscreted("pred", argmax=True, to_onehot=onehot),
    ]
    if with_label:
        chain.append(AsDiscreted("label", to_onehot=num_classes))
    return Compose(chain)


def apply(transform: Compose, data: Mapping[str, object]) -> Any:
    """Runs transforms on one case; errors that a user can put right come out as they are, not as MONAI wraps them."""
    try:
        return transform(dict(data))
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MedMoEError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
