# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The methods, one paper a file, over shared routing maths."""

from medmoe.moe.adaroute import AdaRoute, wrap_swin
from medmoe.moe.fgmoe import FGMoE
from medmoe.moe.mope import MoPE
from medmoe.moe.pmoe import PMoE, State, Stream
from medmoe.moe.routing import Gates, RoutingRecord

__all__ = ["AdaRoute", "FGMoE", "Gates", "MoPE", "PMoE", "RoutingRecord", "State", "Stream", "wrap_swin"]
