# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Filling the feature caches before training, over the real loader."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised

from medmoe.data import CaseDataset, loader
from medmoe.decoders import FusionDecoder
from medmoe.networks import ExpertNetwork
from medmoe.training.warm import FillFeatureCache
from tests.networks.small import small_vit

FLIPS = [RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in (0, 1)]
NOISE = RandGaussianNoised("image", prob=1.0, std=0.1)


def trainer_of(cases: int, steps: int, epochs: int, random: list[Any]) -> Any:
    """What the handler reads of a trainer, over images that are made up."""
    images = torch.rand(cases, 1, 16, 16)
    dataset = CaseDataset(
        [{"case": f"case {index}"} for index in range(cases)],
        Compose([lambda case: {**case, "image": images[int(case["case"].split()[1])]}]),
        Compose(random),
    )
    state = SimpleNamespace(epoch=0, max_epochs=epochs, device=torch.device("cpu"))
    return SimpleNamespace(state=state, data_loader=loader(dataset, steps_per_epoch=steps))


def filled(trainer: Any) -> ExpertNetwork:
    decoder = partial(FusionDecoder, channels=8, stem=4)
    network = ExpertNetwork([small_vit(1)], num_classes=2, decoder=decoder, precision="fp32", cache_bytes=2**26)
    FillFeatureCache(network)(trainer)
    return network


def test_nothing_is_left_to_encode_in_training() -> None:
    trainer = trainer_of(cases=6, steps=4, epochs=8, random=FLIPS)
    network = filled(trainer)
    encoded = network.caches[0].misses
    assert 6 <= encoded <= 24
    for epoch in range(1, 9):
        trainer.data_loader.sampler.set_epoch(epoch)
        for batch in trainer.data_loader:
            network(batch["image"])
    assert network.caches[0].misses == encoded


def test_few_steps_of_many_cases_are_no_sign_of_endless_augmentation() -> None:
    """Hardly a case returns in the second epoch here: that it brings nothing known says nothing."""
    network = filled(trainer_of(cases=200, steps=5, epochs=4, random=FLIPS))
    assert network.caches[0].max_bytes and network.caches[0].entries


def test_augmentation_without_repetitions_is_not_cached(caplog: pytest.LogCaptureFixture) -> None:
    network = filled(trainer_of(cases=4, steps=8, epochs=20, random=[*FLIPS, NOISE]))
    assert not network.caches[0].max_bytes and not network.caches[0].entries
    assert "features are not cached" in caplog.text
