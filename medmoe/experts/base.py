# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What an expert is: a frozen vision encoder, seen as a sequence of layers that prompts can enter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.errors import ConfigError


class Tokens(NamedTuple):
    """The state of an expert between two layers.

    Attributes:
        x: (B, prefix + h * w, D), prefix tokens (class token, registers) first, then the patches row by row.
        grid: (h, w) of the patches.
        prefix: number of tokens in front of the patches.
    """

    x: Tensor
    grid: tuple[int, int]
    prefix: int = 0

    @property
    def patches(self) -> Tensor:
        """The patch tokens, (B, h * w, D)."""
        return self.x[:, self.prefix :]

    def map(self) -> Tensor:
        """The patch tokens as a feature map, (B, D, h, w)."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


class Expert(nn.Module, ABC):
    """A pretrained encoder that never changes: no gradient on its weights and always in evaluation mode.

    Attributes:
        name: the catalog's or timm's name.
        domain: "general", "medical", or "" where it is not known.
        sha256: of the weights; "random" where none were loaded.
        patch: pixels along the side of one patch, the smallest image that it can see.
        widths: width D of each promptable layer, in order.
        levels: layers after which :meth:`maps` takes a feature map, in order.
        level_widths: channels of those maps.
        adapter_targets: names of the linear layers where adapters such as LoRA usually go.
        stages: runs of layers of one width on one grid, in order.
        channels: which channels of an image it sees, for images with more than three.
        after: what an adapter does behind the layers: a module of (layer index, patches (B, D, h, w)), or ``None``.
    """

    name: str = ""
    domain: str = ""
    sha256: str = "random"
    patch: int
    widths: tuple[int, ...]
    levels: tuple[int, ...]
    level_widths: tuple[int, ...]
    adapter_targets: ClassVar[tuple[str, ...]] = ("qkv",)
    stages: tuple[range, ...]
    channels: Sequence[int] | None = None
    after: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_module("after", None)

    @abstractmethod
    def view(self, image: Tensor) -> Tensor:
        """The input that the pretraining expects, from ``image`` (B, C, H, W) with intensities in [0, 1]."""

    @abstractmethod
    def embed(self, view: Tensor) -> Tokens:
        """The tokens that enter the first layer."""

    def enter(self, index: int, tokens: Tokens) -> Tokens:
        """The tokens as layer ``index`` takes them: where a stage begins, merged into its grid and width."""
        return tokens

    @abstractmethod
    def layer(
        self, index: int, tokens: Tokens, prompts: Tensor | None = None, keep_prompts: bool = True
    ) -> tuple[Tokens, Tensor | None]:
        """One frozen layer on the tokens that :meth:`enter` gave and on ``prompts`` (B, P, D) or (P, D).

        Both forms give the same tokens: with ``keep_prompts`` the prompts are ordinary tokens whose outputs (B, P, D)
        are returned; without, they are extra keys and values only, and ``None`` is returned in their place.
        """

    def adapt(self, index: int, tokens: Tokens) -> Tokens:
        """The tokens behind layer ``index`` as the adapter there changes them: patches only, the prefix stays."""
        if self.after is None:
            return tokens
        patches = self.after(index, tokens.map()).flatten(2).transpose(1, 2)
        return tokens._replace(x=torch.cat([tokens.x[:, : tokens.prefix], patches.to(tokens.x.dtype)], 1))

    def level_map(self, index: int, tokens: Tokens) -> Tensor:
        """The feature map (B, C, h, w) that level ``index`` makes of the tokens after its layer."""
        return tokens.map()

    def maps(self, outputs: Mapping[int, Tokens]) -> list[Tensor]:
        """Feature maps (B, C, h, w) of all levels, from the tokens after each layer in :attr:`levels`."""
        return [self.level_map(level, outputs[level]) for level in self.levels]

    def forward(self, image: Tensor) -> list[Tensor]:
        """The feature maps of ``image`` (B, C, H, W) in [0, 1] without prompts."""
        tokens = self.embed(self.view(image))
        outputs = {}
        for index in range(len(self.widths)):
            tokens, _ = self.layer(index, self.enter(index, tokens))
            outputs[index] = tokens = self.adapt(index, tokens)
        return self.maps(outputs)

    def freeze(self) -> Expert:
        """Switches off the gradients of all present weights; adapters that are injected later have theirs."""
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Expert:
        """Stays in evaluation mode whatever is asked for: batch norms and dropout of an expert are part of it."""
        return super().train(False)


def three_channels(image: Tensor, channels: Sequence[int] | None = None) -> Tensor:
    """Makes (B, 3, H, W) of (B, C, H, W).

    Args:
        image: one channel is repeated, two become (first, second, mean), three are kept.
        channels: which three channels to take, for images with more.

    Raises:
        ConfigError: for more than three channels when ``channels`` does not say which.
    """
    if channels is not None:
        return image[:, list(channels)]
    count = image.shape[1]
    if count == 1:
        return image.expand(-1, 3, -1, -1)
    if count == 2:
        return torch.cat([image, image.mean(1, keepdim=True)], 1)
    if count == 3:
        return image
    raise ConfigError(
        f"the image has {count} channels, but an expert sees three: name them with the expert's `channels`, "
        "for example [0, 1, 2]"
    )


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, C, H, W), antialiased where it shrinks."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)


def whole_patches(image: Tensor, longest: int, patch: int) -> tuple[int, int]:
    """The size (h, w) of a view: longest side ``longest``, the other in proportion, both rounded to whole patches.

    Patches thus tile the image exactly, which the decoder relies on: it lays the maps over the whole image.
    """
    scale = longest / max(image.shape[-2:])
    height, width = (max(1, round(side * scale / patch)) for side in image.shape[-2:])
    return height * patch, width * patch


def with_prompts(prompts: Tensor, batch: int) -> Tensor:
    """Prompts as (B, P, D), from (P, D) or (B, P, D)."""
    return prompts.expand(batch, -1, -1) if prompts.dim() == 2 else prompts


def evenly(count: int, depth: int) -> tuple[int, ...]:
    """``count`` layers spread over ``depth``, the last one included: 4 of 12 are (2, 5, 8, 11)."""
    return tuple((i + 1) * depth // count - 1 for i in range(count))
