# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Windows over images of any size, through MONAI's sliding window."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from medmoe.errors import ConfigError
from medmoe.progress import Progress

Condition = Mapping[str, Tensor] | None


class WindowInferer(SlidingWindowInferer):
    """MONAI's sliding window with progress, with -1 for an axis that is taken whole, for one task or several.

    An image that is smaller than the window is padded with zeros on both sides, exactly as in training: an expert
    resizes what it is given to its own size, so that without the padding it would see the image at another scale. An
    image of the window's size is given to the network as it is.

    What a network says of the whole image is asked once, of the whole image, and never of windows. See
    :func:`sliding_window` for the arguments.
    """

    def __init__(self, roi_size: Sequence[int], overlap: Sequence[float], sw_batch_size: int, description: str) -> None:
        super().__init__(tuple(roi_size), sw_batch_size, tuple(overlap), mode="gaussian")
        self.description = description

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], condition: Condition = None
    ) -> Tensor | dict[str, Tensor]:
        """Logits of ``inputs`` (B, C, H, W[, D]).

        Args:
            inputs: images.
            network: a :class:`medmoe.networks.ExpertNetwork`, or anything that gives logits (B, K, H, W[, D]).
            condition: of each image; it goes with every window of its image.

        Returns:
            (B, K, H, W[, D]) in plain segmentation, else by task: dense (B, C_t, H, W[, D]), image-level (B, C_t).

        Raises:
            ConfigError: the image has not as many axes as the window.
        """
        size = tuple(inputs.shape[2:])
        if len(size) != len(self.roi_size):
            raise ConfigError(
                f"The image is {len(size)}-D {size}, but the window has {len(self.roi_size)} numbers: "
                f"{tuple(self.roi_size)}. Set spatial_dims and roi_size to fit the data."
            )
        window = tuple(r if r > 0 else s for r, s in zip(self.roi_size, size, strict=True))
        given = {} if condition is None else {"condition": condition}
        tasks = getattr(network, "tasks", ())
        if [(task.name, task.kind) for task in tasks] in ([], [("label", "classes")]):
            return self.windows(inputs, network, window, given)
        if all(w >= s for w, s in zip(window, size, strict=True)):
            padded, inside = padded_to(window, inputs)
            outputs = network.outputs(padded, **given)  # type: ignore[attr-defined]
            return {name: logits[inside] if logits.dim() > 2 else logits for name, logits in outputs.items()}
        outputs = {}
        if any(task.dense for task in tasks):
            outputs |= network.split(self.windows(inputs, network, window, given))  # type: ignore[attr-defined]
        if not all(task.dense for task in tasks):
            whole, _ = padded_to(window, inputs)
            outputs |= network.image_outputs(whole, **given)  # type: ignore[attr-defined]
        return outputs

    def windows(
        self, inputs: Tensor, network: Callable[..., Tensor], window: tuple[int, ...], given: Mapping[str, Any]
    ) -> Tensor:
        """Logits (B, K, H, W[, D]) from windows over every image."""
        size = tuple(inputs.shape[2:])
        if window == size:
            return network(inputs, **given)
        if given and len(inputs) > 1:  # a batch of windows may come from several images, a condition belongs to one
            alone = [
                self.windows(image, network, window, {"condition": part})
                for image, part in zip(inputs.split(1), split_condition(given["condition"], len(inputs)), strict=True)
            ]
            return torch.cat(alone)
        fitted = copy.copy(self)  # a window of this image's own; the inferer itself may serve several threads
        fitted.roi_size = window
        run = super(WindowInferer, fitted).__call__
        if not self.description:
            return run(inputs, lambda batch: network(batch, **given))
        windows = len(inputs) * window_count(size, window, self.overlap)
        with Progress(self.description, windows) as progress:

            def reporting(batch: Tensor) -> Tensor:
                output = network(batch, **given)
                progress.advance(len(batch))
                return output

            return run(inputs, reporting)


def split_condition(condition: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The conditions (1, ...) of each of ``count`` images; one that there is of all goes to each."""
    wide = {name: value.expand(count, *value.shape[1:]) for name, value in condition.items()}
    return [{name: value[index : index + 1] for name, value in wide.items()} for index in range(count)]


def padded_to(window: Sequence[int], image: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """``image`` with zeros on both sides where it is smaller than ``window``, and the index of the image in it."""
    size = tuple(image.shape[2:])
    before = [max(w - s, 0) // 2 for w, s in zip(window, size, strict=True)]
    after = [max(w - s, 0) - b for w, s, b in zip(window, size, before, strict=True)]
    pairs = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    inside = tuple(slice(b, b + s) for b, s in zip(before, size, strict=True))
    return (F.pad(image, pairs) if any(pairs) else image), (..., *inside)


def window_count(size: Sequence[int], window: Sequence[int], overlap: Sequence[float]) -> int:
    """How many windows MONAI lays over an image of ``size``, which it pads to the window where it is smaller."""
    size = [max(s, w) for s, w in zip(size, window, strict=True)]
    steps = (s if w == s else max(int(w * (1 - o)), 1) for s, w, o in zip(size, window, overlap, strict=True))
    return math.prod(math.ceil((s - w) / step) + 1 for s, w, step in zip(size, window, steps, strict=True))


def sliding_window(
    roi_size: int | Sequence[int],
    spatial_dims: int,
    overlap: float | Sequence[float] = 0.25,
    sw_batch_size: int = 4,
    progress: bool | str = False,
) -> WindowInferer:
    """The inferer for validation, evaluation and prediction.

    Args:
        roi_size: window in voxels, one number for all axes or one each; -1 takes an axis whole.
        spatial_dims: 2 or 3.
        overlap: of neighboring windows as a fraction of the window, in [0, 1).
        sw_batch_size: windows that the network sees at once.
        progress: shows the progress over the windows of each image; a text describes it.

    Raises:
        ConfigError: a value is out of range, or there is not one for each axis.
    """
    roi = [roi_size] * spatial_dims if isinstance(roi_size, int) else list(roi_size)
    overlaps = [overlap] * spatial_dims if isinstance(overlap, (int, float)) else list(overlap)
    problems = []
    if len(roi) != spatial_dims or any(r == 0 or r < -1 for r in roi):
        problems.append(f"roi_size is {roi}: expected {spatial_dims} positive numbers, or -1 for a whole axis")
    if len(overlaps) != spatial_dims or not all(0 <= o < 1 for o in overlaps):
        problems.append(f"overlap is {overlaps}: expected {spatial_dims} numbers from 0 to below 1")
    if sw_batch_size < 1:
        problems.append(f"sw_batch_size is {sw_batch_size}: expected at least 1")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    return WindowInferer(roi, overlaps, sw_batch_size, progress if isinstance(progress, str) else "windows" * progress)
