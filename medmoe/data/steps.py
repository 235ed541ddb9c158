# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The steps that the transforms are made of and that MONAI does not have, or has otherwise."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, MapTransform, Transform
from torch.nn.functional import interpolate

from medmoe.data.derive import derive
from medmoe.data.reading import affine_problem, load
from medmoe.errors import DataError, GeometryError
from medmoe.tasks import UNLABELLED, Task


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


class LoadTargetsd(Transform):
    """Loads what a case says of each task: masks as class numbers (float32, 255 where nothing is labelled), values.

    A mask's value is its rounded number, or with a threshold 1 above it and 0 elsewhere; for overlapping labels the
    threshold is 0 where none is given. A mask without a file is not labelled anywhere; it takes the image's grid.

    Args:
        tasks: those with targets of their own.
        threshold: for all masks.
    """

    def __init__(self, tasks: Sequence[Task], threshold: float | None = None) -> None:
        self.tasks, self.threshold = tuple(tasks), threshold

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for task in self.tasks:
            if not task.dense:
                sample[task.name] = torch.tensor(sample[task.name], dtype=torch.int64)
                continue
            files = [sample[task.name]] if task.kind == "classes" else sample[task.name] or [None] * task.channels
            sample[task.name] = self.masks(files, task, sample["image"])
        return sample

    def masks(self, files: Sequence[str | None], task: Task, image: MetaTensor) -> MetaTensor:
        """The masks of one task, (number of files, H, W[, D])."""
        threshold = 0.0 if self.threshold is None and task.kind == "labels" else self.threshold
        drawn = {k: load(file, label=True) for k, file in enumerate(files) if file}
        like = next(iter(drawn.values()), image)
        planes = MetaTensor(torch.full((len(files), *like.shape[1:]), float(UNLABELLED)), meta=like.meta)
        for k, values in drawn.items():
            if values.shape != like[:1].shape:
                raise DataError(
                    f"{files[k]}: its shape is {tuple(values.shape)}, that of the other masks of task {task.name} is "
                    f"{tuple(like[:1].shape)}"
                )
            planes[k] = (values.round() if threshold is None else values > threshold)[0]
        return planes


class ToShaped(MapTransform, InvertibleTransform):
    """Pictures of another size: bilinear with antialiasing, masks by the nearest pixel; inverted by bilinear.

    MONAI's ``Resize`` smooths with zeros beyond the border, which darkens the edges.

    Args:
        keys: what to resize.
        shape: rows and columns.
        masks: those of the keys that hold masks.
    """

    def __init__(self, keys: KeysCollection, shape: Sequence[int], masks: Sequence[str] = ()) -> None:
        MapTransform.__init__(self, keys)
        self.shape, self.masks = tuple(shape), tuple(masks)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for key in self.key_iterator(sample):
            resized = resample(sample[key], self.shape, key in self.masks)
            self.push_transform(resized, orig_size=tuple(sample[key].shape[1:]))
            sample[key] = resized
        return sample

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Brings what was resized, or predicted on that grid, back."""
        sample = dict(data)
        for key in self.key_iterator(sample):
            size = self.pop_transform(sample[key])["orig_size"]
            sample[key] = resample(sample[key], size, key in self.masks)
        return sample


def resample(image: torch.Tensor, shape: Sequence[int], nearest: bool = False) -> torch.Tensor:
    """A picture (C, H, W) in another size. Its metadata stay: pictures carry no millimeters."""
    how: dict[str, Any] = {"mode": "nearest-exact"} if nearest else {"mode": "bilinear", "antialias": True}
    resized = interpolate(torch.as_tensor(image)[None].float(), tuple(shape), **how)[0]
    return MetaTensor(resized).copy_meta_from(image) if isinstance(image, MetaTensor) else resized


class DeriveTargetsd(Transform):
    """Makes the targets of derived tasks out of the masks of the sample (see `medmoe.data.derive`).

    Args:
        tasks: all tasks.
        on_files: the masks are on the grid of their files, while the image is on the network's, in whose voxels
            distances are measured.
    """

    def __init__(self, tasks: Sequence[Task], on_files: bool = False) -> None:
        self.sources = {task.name: task for task in tasks}
        self.derived = [task for task in tasks if task.derived]
        self.on_files = on_files

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        for task in self.derived:
            mask = sample[task.of]
            sampling = network_voxels(mask, sample["image"]) if self.on_files else None
            target = derive(task, self.sources[task.of], torch.as_tensor(mask).numpy(), sampling)
            values = torch.from_numpy(target)
            sample[task.name] = MetaTensor(values, meta=mask.meta) if isinstance(mask, MetaTensor) else values
        return sample


def network_voxels(mask: MetaTensor, image: MetaTensor) -> list[float]:
    """How many voxels of the image's grid a voxel of the mask's grid is long, along each axis of the mask."""
    if mask.ndim == 3:
        return [new / old for new, old in zip(image.shape[1:], mask.shape[1:], strict=True)]
    between = np.linalg.inv(np.asarray(image.affine)) @ np.asarray(mask.affine)
    lengths: list[float] = np.linalg.norm(between[:3, :3], axis=0).tolist()
    return lengths


INSIDE = "inside the image"
"""Key of where the image is. No task can have this name."""


class NoteInside(Transform):
    """Adds ones, uint8 (1, H, W[, D]), that go with the image through padding, crops, flips and affine."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, INSIDE: torch.ones((1, *data["image"].shape[1:]), dtype=torch.uint8)}


class UnlabelledOutside(Transform):
    """Takes back what targets say beyond the image, where the ones of `NoteInside` have become 0.

    Boundary and distance are not labelled there: what a mask would do beyond its image is not known. A mask is
    background there, as the image is black, but not labelled where none of it inside the image is.

    Args:
        tasks: dense ones.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        outside = sample.pop(INSIDE) == 0
        for task in self.tasks if outside.any() else ():
            target = sample[task.name]
            if task.derived:
                unknown = torch.nan if task.kind == "distance" else UNLABELLED
                sample[task.name] = target.masked_fill(outside, unknown)
            else:
                nothing = ((target == UNLABELLED) | outside).flatten(1).all(1)
                nothing = nothing.view(-1, *[1] * (target.ndim - 1))
                sample[task.name] = target.masked_fill(outside & nothing, UNLABELLED)
        return sample
