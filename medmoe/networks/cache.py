# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Keeps the feature maps of an expert that never changes, so that each distinct image is encoded once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


class FeatureCache:
    """Least-recently-used feature maps in memory, found by the content of the image.

    Because the key is a hash of the pixels, nothing stale can be found: augmentation that draws from a finite set
    (none, or flips) is served from the cache after each variant was seen once, and pixels that never repeat just miss.

    Args:
        max_bytes: of the kept maps; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self.entries: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self.bytes = self.hits = self.misses = 0
        self.full = False

    def get(self, image: Tensor, encode: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """The maps of one image (1, C, H, W), encoded only where they are not kept."""
        if not self.max_bytes:
            return encode(image)
        key = hashlib.blake2b(image.detach().cpu().contiguous().numpy().tobytes(), digest_size=16)
        key.update(repr(tuple(image.shape)).encode())
        found = self.entries.get(key.digest())
        if found is not None:
            self.hits += 1
            self.entries.move_to_end(key.digest())
            return [m.to(image.device) for m in found]
        self.misses += 1
        maps = encode(image)
        self.keep(key.digest(), [m.cpu() for m in maps])
        return maps

    def keep(self, key: bytes, maps: list[Tensor]) -> None:
        """Adds an entry and drops the oldest ones over the limit."""
        self.entries[key] = maps
        self.bytes += sum(m.nbytes for m in maps)
        while self.bytes > self.max_bytes and self.entries:
            self.full = True
            _, old = self.entries.popitem(last=False)
            self.bytes -= sum(m.nbytes for m in old)

    def clear(self) -> None:
        """Forgets everything."""
        self.entries.clear()
        self.bytes = self.hits = self.misses = 0
        self.full = False


def stack_maps(each: list[list[Tensor]]) -> list[Tensor]:
    """Levels of single images as levels of a batch."""
    return [torch.cat(level) for level in zip(*each, strict=True)]
