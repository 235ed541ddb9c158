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
from medmoe.data.steps import INSIDE, CheckImaged, DeriveTargetsd, LoadTargetsd, NoteInside, ToShaped, UnlabelledOutside
from medmoe.errors import ConfigError, MedMoEError
from medmoe.tasks import Task

AUGMENTATIONS = ("none", "flips", "strong")
SECOND_SIZE = (256, 256)
"""Rows and columns of a second picture where ``resize`` says nothing."""


class EncodeConditiond(Transform):
    """Turns the raw values under ``condition`` into tensors (see `medmoe.data.conditions.encode`).

    A second volume goes to the same kind of grid as the image (RAS, spacing); a second picture to the size that
    ``resize`` sets, or else to 256 x 256, so that pictures of any size fit into one batch: the expert that encodes it
    resizes it anyway, and means over its features are all that is used. It is scaled to [0, 1] by its own percentiles
    and stays whole in training. Where it is missing it is NaN, of that size or of the shape of the volume.

    Args:
        schema: of the conditions.
        spatial_dims: 2 or 3.
        spacing: of volumes.
        resize: of pictures.
    """

    def __init__(
        self, schema: Schema, spatial_dims: int, spacing: Sequence[float] | None, resize: Sequence[int] | None
    ) -> None:
        self.schema = schema
        self.size = tuple(resize or SECOND_SIZE) if spatial_dims == 2 else None
        self.read = Compose(
            [
                LoadImageBySuffixd("image"),
                CheckImaged("image", spatial_dims, schema.image_channels, trained=True),
                *_geometry(("image",), spatial_dims, spacing, self.size),
                intensity_transform("percentile"),
            ]
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        row = sample.get("condition") or {}
        encoded = {key: torch.from_numpy(values) for key, values in encode(self.schema, row).items()}
        for column in self.schema.of_kind("image"):
            files = row.get(column.name)
            missing = torch.full((self.schema.image_channels, *(self.size or sample["image"].shape[1:])), torch.nan)
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

    Derived targets are there as well: "boundary" uint8, "distance" float32, (channels, H, W[, D]). They are made of
    the whole image, since a window does not show where a mask goes on; and here, where a :class:`CaseDataset` keeps
    what was prepared, since the distance to a mask takes 9 ms for 256 x 256 pixels and 3 s for 240 x 240 x 155 voxels.
    In memory each of their channels takes 1 byte a voxel (boundary) or 4 (distance), as a channel of the image does.

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
    steps = _steps(own, moved, spatial_dims, in_channels, spacing, intensity, label_threshold, schema, resize)
    return Compose([*steps, DeriveTargetsd(tasks)] if tasks and with_label else steps)


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

    Distances are still measured in voxels of the network's grid. Image and targets may differ in shape: use batches of
    one case.
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
        chain.append(EncodeConditiond(schema, spatial_dims, spacing, resize))
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
    """Random training windows of one shape, as plain tensors: of the image and of all dense targets.

    An image that is smaller than ``roi_size`` is first padded with zeros on both sides. There masks are background, or
    not labelled where none of the mask is; derived targets are not labelled. Along an axis where the image is larger a
    window is drawn. Flips are along the first two axes only. So where whole slices fit into ``roi_size`` a slice takes
    at most 4 variants ("flips") or one ("none"), whatever is drawn along the last axis of a volume, and features of
    slices can be cached.

    Args:
        roi_size: shape of the window; -1 keeps an axis whole.
        augment: "flips"; "none" (windows alone); "strong" (flips, affine and intensity changes: nothing repeats). The
            affine takes boundaries and distances with the image; they are not labelled where it brings in what is
            beyond the window. A distance keeps its value and so counts voxels as they were before the affine, whose
            zoom is between 0.87 and 1.18 along each axis: it is off by at most that factor.
        tasks: as for :func:`preprocessing`.

    Raises:
        ConfigError: a setting is out of range.
    """
    roi = [roi_size] * spatial_dims if isinstance(roi_size, int) else list(roi_size)
    if len(roi) != spatial_dims:
        raise ConfigError(f"roi_size is {roi}: expected {spatial_dims} numbers, one for each axis.")
    if augment not in AUGMENTATIONS:
        raise ConfigError(f"augment is {augment!r}: expected one of {', '.join(AUGMENTATIONS)}.")
    dense = [task for task in tasks or PLAIN if task.dense]
    keys = ("image", *(task.name for task in dense), INSIDE)
    chain: list[Any] = [NoteInside(), SpatialPadd(keys, roi), RandSpatialCropd(keys, roi, random_size=False)]
    if augment != "none":
        chain += [RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in (0, 1)]
    if augment == "strong":
        chain += _strong_changes(dense, keys, spatial_dims)
    types = (torch.float32 if task.kind == "distance" else torch.uint8 for task in dense)
    chain.append(EnsureTyped(keys, dtype=(torch.float32, *types, torch.uint8), track_meta=False))
    return Compose([*chain, UnlabelledOutside(dense)])


def _strong_changes(dense: Sequence[Task], keys: Sequence[str], spatial_dims: int) -> list[Any]:
    """Random rotation about the last axis, scaling, contrast, brightness and noise; intensities stay in [0, 1]."""
    smooth = ["bilinear" if task.kind == "distance" else "nearest" for task in dense]
    beyond = ["border" if task.derived else "zeros" for task in dense]  # zeros would be mixed into distances
    affine = RandAffined(
        keys,
        prob=0.7,
        rotate_range=[0.26] if spatial_dims == 2 else [0.0, 0.0, 0.26],
        scale_range=[0.15, 0.15, 0.0][:spatial_dims],
        mode=("bilinear", *smooth, "nearest"),
        padding_mode=("zeros", *beyond, "zeros"),
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
