# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Encodes the images of a training run once, before it starts, for experts that nothing changes."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from ignite.engine import Events
from monai.engines import Trainer

from medmoe.networks.network import ExpertNetwork, plain
from medmoe.progress import Progress

logger = logging.getLogger(__name__)


RETURNS = 24
"""How often cases have to come back, without an image that is known, before it is held that none ever will.

Of four flips, with which a case comes back as one that was seen at least every fourth time, that is one run in 1000.
"""


class FillFeatureCache:
    """Goes through the samples of all epochs before the first step and fills the network's feature caches.

    The samples of a run follow from its seed, so that what is encoded here is what training will ask for. It stops
    where the caches are full, and where cases come back but never as an image that was seen before: such an
    augmentation has no finite set of images to keep.

    Args:
        network: whose caches are filled; where it has none, nothing happens.
    """

    def __init__(self, network: ExpertNetwork) -> None:
        self.network = network

    def attach(self, trainer: Trainer) -> None:
        """Registers with ``trainer``, whose loader's sampler must have ``set_epoch``."""
        trainer.add_event_handler(Events.STARTED, self)

    def __call__(self, trainer: Trainer) -> None:
        caches = {k: cache for k, cache in enumerate(self.network.caches) if cache.max_bytes}
        loader: Any = trainer.data_loader
        first, last = trainer.state.epoch + 1, trainer.state.max_epochs
        if not caches or last is None:
            return
        names = ", ".join(self.network.encoders[k].name for k in caches)
        hits = sum(cache.hits for cache in caches.values())
        drawn: Counter[str] = Counter()
        returns = 0
        with Progress(f"encoding images with {names}", len(loader) * (last - first + 1)) as progress:
            for epoch in range(first, last + 1):
                loader.sampler.set_epoch(epoch)
                for batch in loader:
                    image = self.network.fold(plain(batch["image"]).to(trainer.state.device))
                    for k in caches:
                        self.network.frozen_maps(k, image)
                    returns += sum(drawn[case] for case in batch["case"])
                    drawn.update(batch["case"])
                    progress.advance(note=f"{next(iter(caches.values())).misses} images")
                if all(cache.full for cache in caches.values()):
                    return
                if returns >= RETURNS and sum(cache.hits for cache in caches.values()) == hits:
                    logger.warning("no image occurs twice under this augmentation: features are not cached")
                    self.switch_off()
                    return

    def switch_off(self) -> None:
        """Keeps nothing from now on."""
        for cache in self.network.caches:
            cache.max_bytes = 0
            cache.clear()
