# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Baselines in the slots that the methods use.

A linear probe is a network without prompter and adapters; VPT-deep is the prompter with ``dispatch="none"``.
"""

from medmoe.tuning.lora import LoRA

__all__ = ["LoRA"]
