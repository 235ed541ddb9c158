# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Small experts with random weights, for tests of everything that stands on experts."""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from torch import Tensor

from medmoe.experts import TinyViTExpert, ViTExpert


def small_vit(depth: int = 4, width: int = 32, patch: int = 8, image_size: int = 32, name: str = "vit") -> ViTExpert:
    """A plain vision transformer that forwards in a millisecond."""
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=image_size, patch_size=patch, embed_dim=width, depth=depth, num_heads=4, num_classes=0,
        dynamic_img_size=True, init_values=1.0,
    )  # fmt: skip
    expert = ViTExpert(model, image_size, num_levels=2)
    expert.name = name
    return expert


def small_tiny_vit(image_size: int = 32, name: str = "tiny") -> TinyViTExpert:
    """TinyViT with the structure of LiteMedSAM's, a few channels wide."""
    expert = TinyViTExpert(
        image_size,
        widths=(8, 16, 24, 32),
        depths=(1, 1, 2, 1),
        heads=(1, 2, 3, 4),
        windows=(7, 7, 14, 7),
        neck_width=12,
    )
    with torch.no_grad():
        for part in expert.parameters():
            part.add_(0.02 * torch.randn_like(part))
    expert.name = name
    return expert


def swapped_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a PMoE over two experts, for a PMoE over the same two in the other order."""
    swapped = {}
    for name, value in state.items():
        head, *rest = name.split(".")
        if head == "maps":
            j, a, _, k, b = rest[0].split("_")
            rest[0] = f"{1 - int(j)}_{a}_to_{1 - int(k)}_{b}"
        else:
            rest[0] = str(1 - int(rest[0]))
        swapped[".".join([head, *rest])] = value
    return swapped
