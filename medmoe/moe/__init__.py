# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The methods, one paper a file, over shared routing maths."""

from medmoe.moe.pmoe import PMoE, State, Stream
from medmoe.moe.routing import RoutingRecord

__all__ = ["PMoE", "RoutingRecord", "State", "Stream"]
