# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""From the experts' feature maps to logits."""

from medmoe.decoders.fusion import FusionDecoder

__all__ = ["FusionDecoder"]
