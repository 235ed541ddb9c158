# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""TinyViT with windowed attention, the encoder of LiteMedSAM and MobileSAM (Wu et al., ECCV 2022; arXiv 2207.10666).

Batch norms are folded into their convolutions when the weights are loaded: a frozen expert never updates them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.experts.base import Expert, Tokens, resize, three_channels, whole_patches, with_prompts


def fold_batch_norms(state: Mapping[str, Tensor], eps: float = 1e-5) -> dict[str, Tensor]:
    """Folds each ``NAME.c`` (convolution) and ``NAME.bn`` (batch norm) of the original checkpoint into ``NAME``."""
    folded = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".c.")
        if kind == "weight":
            scale = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + eps).sqrt()
            folded[f"{name}.weight"] = value * scale.view(-1, 1, 1, 1)
            folded[f"{name}.bias"] = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
        elif ".bn." not in key:
            folded[key] = value
    return folded


class MBConv(nn.Module):
    """Inverted bottleneck with a 3 x 3 depthwise convolution, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = width * expansion
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x))))))


class PatchMerging(nn.Module):
    """From one stage to the next, (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 1)
        self.conv2 = nn.Conv2d(out, out, 3, stride, 1, groups=out)
        self.conv3 = nn.Conv2d(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Attention inside square windows with a learned bias for each offset; prompts are seen by every window."""

    offsets: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = (at[:, None] - at[None, :]).abs()
        self.register_buffer("offsets", offset[..., 0] * window + offset[..., 1], persistent=False)

    def forward(self, x: Tensor, prompts: Tensor | None, keep_prompts: bool) -> tuple[Tensor, Tensor | None]:
        """x (B, H, W, D) and prompts (B, P, D) to the attention's outputs for both.

        The image is padded with zeros to whole windows *before* the norm, as in the original: the padding takes part
        as keys. The output of a prompt is the mean over the windows.
        """
        batch, height, width, dim = x.shape
        size = self.window
        down, right = -height % size, -width % size
        x = F.pad(x, (0, 0, 0, right, 0, down))
        rows, columns = (height + down) // size, (width + right) // size
        x = x.view(batch, rows, size, columns, size, dim).transpose(2, 3).reshape(batch * rows * columns, -1, dim)
        bias = self.attention_biases[:, self.offsets]
        q, k, v = self.heads_of(x)
        count = 0
        if prompts is not None:
            count = prompts.shape[1]
            # The prompts' queries, keys and values are computed once an image and then lent to each of its windows.
            lent = [t.repeat_interleave(rows * columns, 0) for t in self.heads_of(prompts)]
            q = torch.cat([lent[0], q], 2) if keep_prompts else q
            k, v = torch.cat([lent[1], k], 2), torch.cat([lent[2], v], 2)
            bias = F.pad(bias, (count, 0, count if keep_prompts else 0, 0))
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1])) + bias
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        seen = None
        if prompts is not None and keep_prompts:
            seen = y[:, :count].view(batch, rows * columns, count, dim).mean(1)
            y = y[:, count:]
        y = y.view(batch, rows, columns, size, size, dim).transpose(2, 3)
        return y.reshape(batch, rows * size, columns * size, dim)[:, :height, :width], seen

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, N, d); the checkpoint interleaves the three head by head."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        return q, k, v


class Mlp(nn.Module):
    """Norm, two linear layers, GELU; (..., D) -> (..., D)."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class TinyViTBlock(nn.Module):
    """Window attention, a depthwise convolution on the grid, and an MLP."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = Mlp(width)

    def forward(self, tokens: Tokens, prompts: Tensor | None, keep_prompts: bool) -> tuple[Tokens, Tensor | None]:
        x = tokens.x.unflatten(1, tokens.grid)
        y, seen = self.attn(x, prompts, keep_prompts)
        x = self.local_conv((x + y).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = x + self.mlp(x)
        if prompts is not None and seen is not None:
            prompts = prompts + seen
            return tokens._replace(x=x), prompts + self.mlp(prompts)
        return tokens._replace(x=x), None


class Stage(nn.Module):
    """Blocks of one width, and the merging that leads to the next stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return y.permute(0, 3, 1, 2)


class TinyViTExpert(Expert):
    """TinyViT as a sequence of promptable layers: the transformer blocks of stages 1 to 3.

    The view is what SAM's family was trained on: longest side ``image_size``, each image stretched to [0, 1], no mean
    and standard deviation. It is not padded to a square: sides are rounded to whole patches instead.

    Args:
        image_size: pixels of the longest side of the view.
        widths: of the four stages.
        depths: number of blocks in each stage.
        heads: of each stage; the first stage is convolutional and has none.
        windows: side of the attention windows of each stage.
        strides: of the merging after stages 0, 1 and 2.
        stem: (kernel, stride) of each of the two convolutions in front. LiteMedSAM has (1, 1), MobileSAM (3, 2).
        neck_width: channels of SAM's neck behind the last stage.
        channels: which image channels to show, for images with more than three.
    """

    def __init__(
        self,
        image_size: int = 256,
        widths: Sequence[int] = (64, 128, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (2, 4, 5, 10),
        windows: Sequence[int] = (7, 7, 14, 7),
        strides: Sequence[int] = (2, 2, 1),
        stem: tuple[int, int] = (1, 1),
        neck_width: int = 256,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.channels = image_size, channels
        self.patch = stem[1] ** 2 * math.prod(strides)
        self.patch_embed: Any = nn.Module()
        self.patch_embed.seq = nn.Sequential(
            nn.Conv2d(3, widths[0] // 2, stem[0], stem[1], stem[0] // 2),
            nn.GELU(),
            nn.Conv2d(widths[0] // 2, widths[0], stem[0], stem[1], stem[0] // 2),
        )
        merging = [PatchMerging(widths[i], widths[i + 1], strides[i]) for i in range(3)]
        stages = [Stage([MBConv(widths[0]) for _ in range(depths[0])], merging[0])]
        for i in (1, 2, 3):
            blocks = [TinyViTBlock(widths[i], heads[i], windows[i]) for _ in range(depths[i])]
            stages.append(Stage(blocks, merging[i] if i < 3 else None))
        self.layers: Any = nn.ModuleList(stages)
        self.neck = nn.Sequential(
            nn.Conv2d(widths[3], neck_width, 1, bias=False),
            ChannelNorm(neck_width),
            nn.Conv2d(neck_width, neck_width, 3, padding=1, bias=False),
            ChannelNorm(neck_width),
        )
        self.blocks_of = [(i, b) for i in (1, 2, 3) for b in range(depths[i])]
        self.widths = tuple(widths[i] for i, _ in self.blocks_of)
        ends = [sum(depths[1 : i + 1]) - 1 for i in (1, 2, 3)]
        self.levels = tuple(ends)
        self.stages = tuple(range(end + 1 - depths[i], end + 1) for i, end in zip((1, 2, 3), ends, strict=True))
        self.level_widths = (widths[1], widths[2], neck_width)
        # Twice as fast as the default layout with bfloat16 convolutions on CPUs, level in float32.
        self.to(memory_format=torch.channels_last)
        self.freeze()

    def view(self, image: Tensor) -> Tensor:
        image = resize(three_channels(image, self.channels), whole_patches(image, self.image_size, self.patch))
        low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
        return (image - low) / (high - low).clamp_min(1e-8)

    def embed(self, view: Tensor) -> Tokens:
        x = self.patch_embed.seq(view.contiguous(memory_format=torch.channels_last))
        for block in self.layers[0].blocks:
            x = block(x)
        return self.merge(0, x)

    def merge(self, stage: int, x: Tensor) -> Tokens:
        """The tokens that enter the stage after ``stage``, from its feature map (B, C, h, w)."""
        x = self.layers[stage].downsample(x)
        return Tokens(x.flatten(2).transpose(1, 2), (x.shape[-2], x.shape[-1]))

    def enter(self, index: int, tokens: Tokens) -> Tokens:
        stage, block = self.blocks_of[index]
        return self.merge(stage - 1, tokens.map()) if stage > 1 and block == 0 else tokens

    def layer(
        self, index: int, tokens: Tokens, prompts: Tensor | None = None, keep_prompts: bool = True
    ) -> tuple[Tokens, Tensor | None]:
        stage, block = self.blocks_of[index]
        if prompts is not None:
            prompts = with_prompts(prompts, tokens.x.shape[0])
        return self.layers[stage].blocks[block](tokens, prompts, keep_prompts)

    def level_map(self, index: int, tokens: Tokens) -> Tensor:
        return self.neck(tokens.map()) if index == self.levels[-1] else tokens.map()
