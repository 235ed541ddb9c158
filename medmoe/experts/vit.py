# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Plain vision transformers from timm as experts: ImageNet, DINO, DINOv2, MAE, CLIP and their medical descendants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medmoe.errors import ExpertError
from medmoe.experts.base import Expert, Tokens, evenly, resize, three_channels, whole_patches, with_prompts


class ViTExpert(Expert):
    """A timm ``VisionTransformer`` as a sequence of promptable layers.

    The longest side of the image is resized to ``image_size`` and the other in proportion, both rounded to whole
    patches; the position embedding follows, as timm resamples it.

    Args:
        vit: the model, made with ``dynamic_img_size=True`` and ``num_classes=0``.
        image_size: pixels of the longest side of the view.
        mean: of the three channels that the pretraining subtracted, for images in [0, 1].
        std: that the pretraining divided by.
        num_levels: how many feature maps, spread over the depth.
        channels: which image channels to show, for images with more than three.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        image_size: int = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        num_levels: int = 4,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(vit, VisionTransformer):
            raise ExpertError(
                f"{type(vit).__name__} is not a plain vision transformer: name a timm model such as "
                "vit_base_patch16_224, vit_small_patch14_dinov2 or vit_base_patch16_clip_224"
            )
        self.vit: Any = vit
        self.patch = vit.patch_embed.patch_size[0]
        self.image_size, self.channels = image_size, channels
        self.widths = (vit.embed_dim,) * len(vit.blocks)
        self.stages = (range(len(vit.blocks)),)
        self.levels = evenly(min(num_levels, len(vit.blocks)), len(vit.blocks))
        self.level_widths = (vit.embed_dim,) * len(self.levels)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    def view(self, image: Tensor) -> Tensor:
        size = whole_patches(image, self.image_size, self.patch)
        return (resize(three_channels(image, self.channels), size) - self.mean) / self.std

    def embed(self, view: Tensor) -> Tokens:
        grid = (view.shape[-2] // self.patch, view.shape[-1] // self.patch)
        x = self.vit.patch_embed(view)
        x = self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(x)))
        return Tokens(x, grid, x.shape[1] - grid[0] * grid[1])

    def layer(
        self, index: int, tokens: Tokens, prompts: Tensor | None = None, keep_prompts: bool = True
    ) -> tuple[Tokens, Tensor | None]:
        block = self.vit.blocks[index]
        # On CPUs the backward pass of the fused kernel in bfloat16 is slower than the plain products at the few hundred
        # tokens seen here.
        block.attn.fused_attn = tokens.x.is_cuda
        if prompts is None:
            return tokens._replace(x=block(tokens.x)), None
        prompts = with_prompts(prompts, tokens.x.shape[0]).to(tokens.x.dtype)
        if not keep_prompts and type(block).__name__ == "Block" and getattr(block.attn, "gate", None) is None:
            return tokens._replace(x=keys_values_only(block, tokens.x, prompts)), None
        count = prompts.shape[1]
        x = block(torch.cat([prompts, tokens.x], 1))
        return tokens._replace(x=x[:, count:]), x[:, :count] if keep_prompts else None

    def level_map(self, index: int, tokens: Tokens) -> Tensor:
        return tokens._replace(x=self.vit.norm(tokens.x)).map()


def keys_values_only(block: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """A timm block where the prompts (B, P, D) are extra keys and values for the tokens x (B, N, D).

    Equal to running the block on both and dropping the prompts' outputs, at N instead of N + P rows in the queries,
    the output projection and the MLP.
    """
    attn = block.attn
    batch, count, _ = x.shape
    both = block.norm1(torch.cat([x, prompts], 1))
    qkv = attn.qkv(both).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(qkv[0][:, :, :count]), attn.k_norm(qkv[1]), qkv[2]
    if x.is_cuda:
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        mixed = ((q * attn.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    mixed = mixed.transpose(1, 2).reshape(batch, count, -1)
    x = x + block.ls1(attn.proj(attn.norm(mixed)))
    result: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return result
