# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Frozen vision encoders as promptable sequences of layers."""

from medmoe.experts.base import Expert, Tokens
from medmoe.experts.build import load_expert
from medmoe.experts.tiny_vit import TinyViTExpert
from medmoe.experts.vit import ViTExpert

__all__ = ["Expert", "TinyViTExpert", "Tokens", "ViTExpert", "load_expert"]
