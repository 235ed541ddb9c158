# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""From the experts' feature maps to logits."""

from medmoe.decoders.fusion import FusionDecoder, ImageHead, Refinement

__all__ = ["FusionDecoder", "ImageHead", "Refinement"]
