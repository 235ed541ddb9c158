# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Networks that experts, prompts, conditions, adapters and decoders make up together."""

from medmoe.networks.network import ExpertNetwork, Parts

__all__ = ["ExpertNetwork", "Parts"]
