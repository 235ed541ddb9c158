# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Experts, prompter, adapters and decoder as one network."""

from medmoe.networks.segmenter import ExpertSegmenter, Parts

__all__ = ["ExpertSegmenter", "Parts"]
