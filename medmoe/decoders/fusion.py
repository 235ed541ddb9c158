# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""A light decoder for 2-D and 3-D that brings the feature maps of several experts together, for one task or several.

Maps of different experts are channel-normalized before they meet: their scales differ by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.errors import ConfigError, one_of
from medmoe.tasks import Task

FUSIONS = ("concat", "mean", "gated", "late")


def convolution(spatial_dims: int, channels: int, out: int, kernel: int) -> nn.Module:
    """A convolution of the given number of dimensions that keeps the size."""
    kind = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    return kind(channels, out, kernel, padding=kernel // 2)


def block(spatial_dims: int, channels: int, out: int) -> nn.Sequential:
    """Convolution of side 3, group norm and GELU."""
    norm = nn.GroupNorm(math.gcd(8, out), out)
    return nn.Sequential(convolution(spatial_dims, channels, out, 3), norm, nn.GELU())


def enlarge(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of (B, C, H, W) or (B, C, H, W, D) to ``size``."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear" if x.dim() == 4 else "trilinear", align_corners=False)


def common_grid(image: Sequence[int], limit: int = 64) -> tuple[int, int]:
    """In-plane grid where all maps meet: half the image's, and at most ``limit`` a side.

    It does not depend on the experts, so that one with coarse maps is decoded as finely as one with fine maps.
    """
    rows, columns = (max(1, min(-(-side // 2), limit)) for side in image)
    return rows, columns


class LevelProjection(nn.Module):
    """All levels of one expert on one grid: channel norm, 1 x 1 convolution, resize, sum."""

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.projections = nn.ModuleList(nn.Linear(width, channels) for width in widths)

    def forward(self, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Maps (N, C_i, h_i, w_i) of each level -> (N, channels, *grid)."""
        total: Tensor | None = None
        for norm, project, level in zip(self.norms, self.projections, maps, strict=True):
            x = project(norm(level.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            # Antialiased, because the finest levels are larger than the grid.
            x = F.interpolate(x, grid, mode="bilinear", align_corners=False, antialias=True)
            total = x if total is None else total + x
        assert total is not None
        return total


class Decoded(NamedTuple):
    """What a decoder gives.

    Attributes:
        outputs: of each dense task, logits (B, C_t, H, W[, D]).
        expert_outputs: the same of each expert by itself under late fusion, else empty.
        auxiliary: scalar losses of routers, by name.
    """

    outputs: dict[str, Tensor]
    expert_outputs: list[dict[str, Tensor]]
    auxiliary: dict[str, Tensor]


class Refinement(nn.Sequential):
    """Two convolution blocks on the common grid, the same features for all tasks."""

    def __init__(self, channels: int, tasks: Sequence[str], spatial_dims: int) -> None:
        super().__init__(block(spatial_dims, channels, channels), block(spatial_dims, channels, channels))
        self.tasks = tuple(tasks)

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features (B, C, h, w[, d]) of each task, and no losses."""
        x = super().forward(x)
        return dict.fromkeys(self.tasks, x), {}


class Output(nn.Module):
    """From a task's features on the common grid, and the stem's on the image, to logits at full resolution."""

    def __init__(self, channels: int, stem: int, out: int, spatial_dims: int) -> None:
        super().__init__()
        width = max(stem, 16)
        self.reduce = convolution(spatial_dims, channels, width, 1)
        self.merge = block(spatial_dims, width + stem, width)
        self.logits = convolution(spatial_dims, width, out, 1)

    def forward(self, features: Tensor, stem: Tensor | None, size: Sequence[int]) -> Tensor:
        """Features (B, channels, h, w[, d]) and stem (B, stem, *size) -> (B, out, *size)."""
        x = enlarge(self.reduce(features), size)
        return self.logits(self.merge(x if stem is None else torch.cat([x, stem], 1)))


class Head(nn.Module):
    """All dense tasks from fused features and the image itself."""

    def __init__(
        self,
        channels: int,
        in_channels: int,
        tasks: Sequence[Task],
        spatial_dims: int,
        stem: int,
        refine: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        self.refine = refine(channels, [task.name for task in tasks], spatial_dims=spatial_dims)
        self.stem = None
        if stem:
            self.stem = nn.Sequential(block(spatial_dims, in_channels, stem), block(spatial_dims, stem, stem))
        # With a prefix, for a module cannot be called "type" or "train".
        self.tasks = nn.ModuleDict({f"task_{t.name}": Output(channels, stem, t.channels, spatial_dims) for t in tasks})

    def forward(self, features: Tensor, image: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features (B, channels, h, w[, d]) and image (B, C, H, W[, D]) -> logits of each task, and losses."""
        refined, auxiliary = self.refine(features)
        stem = None if self.stem is None else self.stem(image)
        size = image.shape[2:]
        return {n: self.tasks[f"task_{n}"](x, stem, size) for n, x in refined.items()}, auxiliary


class FusionDecoder(nn.Module):
    """Fuses the levels of all experts and decodes them.

    Args:
        widths: channels of each level of each expert.
        in_channels: of the image.
        tasks: the dense ones, at least one.
        spatial_dims: 2 or 3. In 3-D the experts' maps come slice by slice and the convolutions run over all axes.
        channels: width of the fused features.
        fusion: "concat": concatenated and projected; "mean": averaged; "gated": a softmax over the experts at each
            token; "late": a head for each expert, whose logits are summed, with a loss of its own each.
        stem: channels of the convolutions on the full-resolution image, which keep thin structures; 0 for none.
        refine: makes what turns fused features into those of each task: :class:`Refinement` (plain, shared by the
            tasks) or a partial :class:`medmoe.moe.FGMoE`.

    Raises:
        ConfigError: for an unknown fusion or a number of dimensions other than 2 and 3.
    """

    def __init__(
        self,
        widths: Sequence[Sequence[int]],
        in_channels: int,
        tasks: Sequence[Task],
        spatial_dims: int = 2,
        channels: int = 64,
        fusion: str = "concat",
        stem: int = 8,
        refine: Callable[..., nn.Module] = Refinement,
    ) -> None:
        super().__init__()
        one_of("fusion", fusion, FUSIONS)
        if spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims={spatial_dims}: 2 or 3 is expected")
        self.spatial_dims = spatial_dims
        self.fusion = fusion if len(widths) > 1 else "concat"
        self.levels = nn.ModuleList(LevelProjection(each, channels) for each in widths)
        if self.fusion == "gated":
            self.gate = convolution(spatial_dims, channels * len(widths), len(widths), 1)
        elif len(widths) > 1 and self.fusion == "concat":
            self.join = convolution(spatial_dims, channels * len(widths), channels, 1)
        heads = len(widths) if self.fusion == "late" else 1
        self.heads = nn.ModuleList(Head(channels, in_channels, tasks, spatial_dims, stem, refine) for _ in range(heads))

    def forward(self, maps: Sequence[Sequence[Tensor]], image: Tensor) -> Decoded:
        """Logits of every task, and those of each expert under late fusion.

        Args:
            maps: of each expert, each level (B, C, h, w); in 3-D (B * D, C, h, w), the slices of an image in a row.
            image: (B, C, H, W) or (B, C, H, W, D).
        """
        grid = common_grid(image.shape[2:4])
        features = [self.unfold(levels(each, grid), image) for levels, each in zip(self.levels, maps, strict=True)]
        if self.fusion != "late":
            outputs, auxiliary = self.heads[0](self.fuse(features), image)
            return Decoded(outputs, [], auxiliary)
        parts = [head(x, image) for head, x in zip(self.heads, features, strict=True)]
        each = [outputs for outputs, _ in parts]
        summed = {name: torch.stack([outputs[name] for outputs in each]).sum(0) for name in each[0]}
        return Decoded(summed, each, mean_of([auxiliary for _, auxiliary in parts]))

    def unfold(self, x: Tensor, image: Tensor) -> Tensor:
        """(B * D, C, h, w) -> (B, C, h, w, D) in 3-D."""
        return x if self.spatial_dims == 2 else x.unflatten(0, (image.shape[0], -1)).movedim(1, -1)

    def fuse(self, features: Sequence[Tensor]) -> Tensor:
        """One map of all experts' features."""
        if len(features) == 1:
            return features[0]
        if self.fusion == "mean":
            return torch.stack(list(features)).mean(0)
        together = torch.cat(list(features), 1)
        if self.fusion == "concat":
            return self.join(together)
        weights = self.gate(together).softmax(1).unsqueeze(2)
        return (weights * torch.stack(list(features), 1)).sum(1)


class ImageHead(nn.Module):
    """Image-level tasks: the pooled outputs of all experts, concatenated, and one linear layer a task.

    Concatenation and the single layer are what papers on prompted experts use; the channel norm before pooling brings
    the experts to one scale (our reading).

    Args:
        widths: channels of the last level of each expert.
        tasks: of kind "image", at least one.
    """

    def __init__(self, widths: Sequence[int], tasks: Sequence[Task]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.tasks = nn.ModuleDict({f"task_{t.name}": nn.Linear(sum(widths), t.channels) for t in tasks})

    def forward(self, maps: Sequence[Tensor], batch: int) -> dict[str, Tensor]:
        """Logits (B, C_t) of each task from the experts' last maps (B * D, C, h, w); slices are averaged."""
        pooled = [
            norm(x.permute(0, 2, 3, 1)).mean((1, 2)).unflatten(0, (batch, -1)).mean(1)
            for norm, x in zip(self.norms, maps, strict=True)
        ]
        return {name.removeprefix("task_"): task(torch.cat(pooled, 1)) for name, task in self.tasks.items()}


def mean_of(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each loss over the heads."""
    return {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
