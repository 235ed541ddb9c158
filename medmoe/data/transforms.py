# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""MONAI transforms from files to tensors: images and every target on one grid, the same random changes for all.

Grids: a NIfTI volume is turned to RAS by flips and permutations; a picture keeps its rows as H and its columns as W.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.transforms import (
    CastToTyped,
    Compose,
    EnsureTyped,
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
    Transform,
)

from medmoe.conditions import Schema
from medmoe.data.conditions import encode
from medmoe.data.datalist import PLAIN
from medmoe.data.reading import LoadImageBySuffixd
from medmoe.data.steps import CheckImaged, DeriveTargetsd, LoadTargetsd, ToShaped, WholeUnlabelledd
from medmoe.errors import ConfigError, MedMoEError
from medmoe.tasks import Task

AUGMENTATIONS = ("none", "flips", "strong")


class EncodeConditiond(Transform):
    """Turns the raw values under ``condition`` into tensors (see `medmoe.data.conditions.encode`).

    A second image goes to the same kind of grid as the image (RAS, spacing or size) and is scaled to [0, 1] by its own
    percentiles; where it is missing it is NaN, in the shape of the image. It stays whole in training.
    """

    def __init__(self, schema: Schema, geometry: Sequence[Any], spatial_dims: int) -> None:
        self.schema = schema
        self.read = Compose(
            [
                LoadImageBySuffixd("image"),
                CheckImaged("image", spatial_dims, schema.image_channels, trained=True),
                *geometry,
                intensity_transform("percentile"),
            ]
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        row = sample.get("condition") or {}
        encoded = {key: torch.from_numpy(values) for key, values in encode(self.schema, row).items()}
        for column in self.schema.of_kind("image"):
            files = row.get(column.name)
            missing = torch.full((self.schema.image_channels, *sample["image"].shape[1:]), torch.nan)
            encoded["image"] = apply(self.read, {"image": files})["image"].as_tensor() if files else missing
        return {**sample, "condition": encoded}


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
    tasks: Sequence[Task] | None = None,
    schema: Schema | None = None,
    resize: Sequence[int] | None = None,
) -> Compose:
    """From files to the network's grid: for training, and with ``with_label=False`` for inference.

    Gives ``image``, float32 in [0, 1], (C, H, W[, D]), and the target of every task with one of its own under its name
    (in plain segmentation ``label``): masks uint8 on the same grid, 255 where nothing is labelled, (1, H, W[, D]) of
    classes or (channels, H, W[, D]) of labels; the class of an image int64, -1 where it is not labelled. The image is a
    MetaTensor, from which :func:`medmoe.data.postprocessing` finds the way back.

    With a ``schema``, ``condition`` is a dictionary of float32 and int64 tensors: "numbers", "categories", "text" (see
    `medmoe.data.conditions.encode`) and "image" (C, H, W[, D]) in [0, 1], all NaN where it is missing.

    Args:
        spatial_dims: 2 or 3. Volumes are turned to RAS.
        in_channels: channels that the image must have.
        spacing: millimeters of a voxel along each axis, in RAS order, to resample volumes to; ``None`` keeps theirs.
        intensity: see :func:`intensity_transform`.
        label_threshold: for masks: a label value above it is class 1, any other is class 0. Without one, 255 in a mask
            of classes means that the voxel is not labelled, and overlapping labels are where values are above 0.
        tasks: what is predicted; none: the one mask of plain segmentation.
        schema: of the conditions.
        resize: rows and columns to resample pictures to; ``None`` keeps theirs.

    Raises:
        ConfigError: a setting is out of range.
    """
    own = _own(tasks) if with_label else []
    moved = ("image", *(task.name for task in own if task.dense))
    return Compose(_steps(own, moved, spatial_dims, in_channels, spacing, intensity, label_threshold, schema, resize))


def evaluation_preprocessing(
    spatial_dims: int,
    in_channels: int,
    spacing: Sequence[float] | None = None,
    intensity: str | Sequence[float] = "percentile",
    label_threshold: float | None = None,
    tasks: Sequence[Task] | None = None,
    schema: Schema | None = None,
    resize: Sequence[int] | None = None,
) -> Compose:
    """As :func:`preprocessing`, but targets stay on the grid of their files, where predictions are judged.

    Derived targets are there as well: "boundary" uint8, "distance" float32, measured in voxels of the network's grid.
    Image and targets may therefore differ in shape: use batches of one case.
    """
    own, moved = _own(tasks), ("image",)
    steps = _steps(own, moved, spatial_dims, in_channels, spacing, intensity, label_threshold, schema, resize)
    return Compose([*steps, DeriveTargetsd(tasks, on_files=True)] if tasks else steps)


def _own(tasks: Sequence[Task] | None) -> list[Task]:
    """The tasks with targets of their own."""
    return [task for task in tasks or PLAIN if not task.derived]


def _steps(
    own: Sequence[Task],
    moved: Sequence[str],
    spatial_dims: int,
    in_channels: int,
    spacing: Sequence[float] | None,
    intensity: str | Sequence[float],
    label_threshold: float | None,
    schema: Schema | None,
    resize: Sequence[int] | None,
) -> list[Any]:
    """The transforms that load the image and the targets of ``own`` and bring ``moved`` to the network's grid."""
    chain: list[Any] = [LoadImageBySuffixd("image"), CheckImaged("image", spatial_dims, in_channels, trained=not own)]
    if own:
        chain.append(LoadTargetsd(own, label_threshold))
    chain += _geometry(moved, spatial_dims, spacing, resize)
    masks = [task.name for task in own if task.dense]
    if masks:
        chain.append(CastToTyped(masks, dtype=torch.uint8))
    chain.append(intensity_transform(intensity))
    if schema is not None:
        chain.append(EncodeConditiond(schema, _geometry(("image",), spatial_dims, spacing, resize), spatial_dims))
    return chain


def _geometry(
    keys: Sequence[str], spatial_dims: int, spacing: Sequence[float] | None, resize: Sequence[int] | None
) -> list[MapTransform]:
    """The transforms that bring ``image`` and masks, the other keys, to the network's grid."""
    if spatial_dims not in (2, 3):
        raise ConfigError(f"spatial_dims is {spatial_dims}: expected 2 or 3.")
    if spacing is not None and len(spacing) != spatial_dims:
        raise ConfigError(f"spacing is {list(spacing)}: expected {spatial_dims} numbers, in millimeters.")
    if spacing is not None and spatial_dims == 2:
        raise ConfigError("spacing is for volumes: pictures carry no millimeters. Leave it at null.")
    if resize is not None and spatial_dims == 3:
        raise ConfigError("resize is for pictures: set spacing for volumes, and leave resize at null.")
    if resize is not None and (len(resize) != 2 or min(resize) < 1):
        raise ConfigError(f"resize is {list(resize)}: expected rows and columns, such as [256, 256].")
    masks = [key for key in keys if key != "image"]
    chain: list[MapTransform] = [Orientationd(keys, axcodes="RAS", labels=None)] if spatial_dims == 3 else []
    if spacing is not None:
        chain.append(Spacingd(keys, pixdim=spacing, mode=["bilinear", *["nearest"] * len(masks)]))
    if resize is not None:
        chain.append(ToShaped(keys, resize, masks))
    return chain


def augmentation(
    spatial_dims: int,
    roi_size: int | Sequence[int],
    augment: str = "flips",
    tasks: Sequence[Task] | None = None,
) -> Compose:
    """Random training windows of one shape, as plain tensors, and the derived targets of the windows.

    An image that is smaller than ``roi_size`` is first padded with zeros on both sides; masks are background there,
    but where a mask is not labelled at all. Along an axis where it is larger a window is drawn. Flips are along the
    first two axes only. So where whole slices fit into ``roi_size`` a slice takes at most 4 variants ("flips") or one
    ("none"), whatever is drawn along the last axis of a volume, and features of slices can be cached.

    Args:
        roi_size: shape of the window; -1 keeps an axis whole.
        augment: "flips"; "none" (windows alone); "strong" (flips, affine and intensity changes: nothing repeats).
        tasks: as for :func:`preprocessing`.

    Raises:
        ConfigError: a setting is out of range.
    """
    roi = [roi_size] * spatial_dims if isinstance(roi_size, int) else list(roi_size)
    if len(roi) != spatial_dims:
        raise ConfigError(f"roi_size is {roi}: expected {spatial_dims} numbers, one for each axis.")
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"augment is {augment!r}: expected one of {', '.join(AUGMENTATIONS)}.")
    masks = [task.name for task in _own(tasks) if task.dense]
    keys = ("image", *masks)
    chain: list[Any] = [SpatialPadd(keys, roi), RandSpatialCropd(keys, roi, random_size=False)]
    if augment != "none":
        chain += [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in (0, 1)]
    if augment == "strong":
        chain += _strong_changes(keys, spatial_dims)
    chain.append(EnsureTyped(keys, dtype=(torch.float32, *[torch.uint8] * len(masks)), track_meta=False))
    if tasks and masks:
        chain = [WholeUnlabelledd(masks, restore=False), *chain, WholeUnlabelledd(masks, restore=True)]
    return Compose([*chain, DeriveTargetsd(tasks)] if tasks else chain)


def _strong_changes(keys: Sequence[str], spatial_dims: int) -> list[Any]:
    """Random rotation about the last axis, scaling, contrast, brightness and noise; intensities stay in [0, 1]."""
    affine = RandAffined(
        keys,
        prob=0.7,
        rotate_range=[0.26] if spatial_dims == 2 else [0.0, 0.0, 0.26],
        scale_range=[0.15, 0.15, 0.0][:spatial_dims],
        mode=("bilinear", *["nearest"] * (len(keys) - 1)),
        padding_mode="zeros",
    )
    return [
        affine,
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5)),
        RandScaleIntensityd("image", factors=0.2, prob=0.3),
        RandGaussianNoised("image", prob=0.3, std=0.05),
        ScaleIntensityRanged("image", 0.0, 1.0, 0.0, 1.0, clip=True),
    ]


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
