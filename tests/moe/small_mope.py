# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""A small MoPE, and conditions for it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from medmoe.conditions import Column, Schema
from medmoe.moe.mope import MoPE
from medmoe.moe.pmoe import Stream

BATCH, PSI, IMAGE, TEXT = 5, 20, 7, 6
NUMBERS = (Column("age", "number", 46.0, 12.0), Column("volume", "number"))
CATEGORIES = (Column("sex", "category", values=("f", "m")), Column("grade", "category", values=("2", "3", "4")))
TEXTS = (Column("history", "text"), Column("question", "text"))
SCHEMA = Schema((*NUMBERS, *CATEGORIES, *TEXTS, Column("t2", "image")), "some/encoder", TEXT)
STREAMS = (Stream("first", (24, 24, 32)), Stream("second", (16, 16, 16)), Stream("frozen", (), prompted=False))


def mope(**settings: Any) -> MoPE:
    """A small one; its keys and weights are those of a seed."""
    torch.manual_seed(3)
    return MoPE(STREAMS, SCHEMA, **{"image_width": IMAGE, "psi_width": PSI, "mapper_width": 12, **settings})


def full_condition(batch: int = BATCH) -> dict[str, Tensor]:
    return {
        "numbers": torch.randn(batch, 2),
        "categories": torch.stack([torch.randint(1, 3, (batch,)), torch.randint(1, 4, (batch,))], 1),
        "text": torch.randn(batch, 2, TEXT),
        "image_features": torch.randn(batch, IMAGE),
    }


def no_condition(batch: int = BATCH) -> dict[str, Tensor]:
    """Present, but all of it missing."""
    full = full_condition(batch)
    return {name: torch.full_like(value, math.nan if value.is_floating_point() else 0) for name, value in full.items()}


def patches(width: int = 24, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, width, 4, 3)


def prompted_sites(model: MoPE) -> list[tuple[int, int, int]]:
    """(expert, site, width) of all."""
    return [(k, site, width) for k, s in enumerate(model.streams) for site, width in enumerate(s.widths)]
