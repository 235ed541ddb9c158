# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Where bfloat16 is worth having."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from medmoe.errors import one_of

PRECISIONS = ("auto", "fp32", "bf16")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast that the experts run under.

    Args:
        precision: "bf16", "fp32", or "auto": bfloat16 where the processor multiplies matrices of it in hardware.
        device: of the tokens.
    """
    one_of("precision", precision, PRECISIONS)
    enabled = precision == "bf16" or (precision == "auto" and fast_bfloat16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has bfloat16 matrix products in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False
