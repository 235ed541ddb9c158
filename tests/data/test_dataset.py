# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from medmoe.data import (
    Case,
    CaseDataset,
    EpochSampler,
    augmentation,
    datalists,
    evaluation_preprocessing,
    loader,
    preprocessing,
)
from medmoe.errors import DataError

Volumes = Callable[..., list[Case]]
SHAPES = [(9, 8, 7), (8, 10, 6), (10, 9, 9), (7, 7, 8), (9, 9, 9)]


def training_set(cases: list[Case], seed: int = 0, augment: str = "strong") -> CaseDataset:
    return CaseDataset(cases, preprocessing(3, 1), augmentation(3, [10, 10, 5], augment), seed)


def digest(batch: dict) -> str:
    content = batch["image"].numpy().tobytes() + batch["label"].numpy().tobytes() + "".join(batch["case"]).encode()
    return hashlib.sha256(content).hexdigest()


def digests(dataset: CaseDataset, epochs: list[int], num_workers: int = 0, steps: int = 4) -> list[list[str]]:
    batches = loader(dataset, 2, steps, num_workers)
    found = []
    for epoch in epochs:
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found.append([digest(batch) for batch in batches])
    return found


def test_batches_do_not_depend_on_workers(volumes: Volumes) -> None:
    dataset = training_set(volumes(SHAPES))
    alone = digests(dataset, [1, 2])
    assert len(set(chain(*alone))) == 8
    for num_workers in (1, 2):
        assert digests(dataset, [1, 2], num_workers) == alone


def test_a_resumed_run_draws_what_an_uninterrupted_one_would(volumes: Volumes) -> None:
    cases = volumes(SHAPES)
    whole = digests(training_set(cases), [1, 2, 3, 4])
    torch.rand(5)
    assert digests(training_set(cases), [3, 4]) == whole[2:]
    assert digests(training_set(cases, seed=1), [3, 4]) != whole[2:]


def test_the_global_generators_are_left_alone(volumes: Volumes) -> None:
    batches = loader(training_set(volumes(SHAPES)), 2, 3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    list(batches)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2][1])  # noqa: NPY002


def test_keys_of_a_run() -> None:
    sampler = EpochSampler(5, 8, seed=3)
    epochs = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1] and len(epochs[-1]) == len(sampler) == 8
        assert sorted(key % 5 for key in epochs[-1][:5]) == list(range(5))
    assert len(set(chain(*epochs))) == 48  # no sample comes twice
    assert len({tuple(key % 5 for key in keys) for keys in epochs}) > 1


def test_a_key_is_a_case_under_its_own_random_transforms(volumes: Volumes) -> None:
    dataset = training_set(volumes(SHAPES))
    one, same, other = dataset[2], dataset[2], dataset[2 + 5]
    assert one["case"] == same["case"] == other["case"] == "case_2"
    assert torch.equal(one["image"], same["image"]) and not torch.equal(one["image"], other["image"])


def test_files_are_read_once_and_cached_samples_stay_as_they_are(volumes: Volumes) -> None:
    cases = volumes(SHAPES)
    dataset = training_set(cases)
    before = [dataset[key] for key in range(5)]
    for case in cases:
        Path(str(case["image"])).unlink()
    dataset[0]["image"].zero_()
    list(loader(dataset, 2, 6))
    for key, sample in enumerate(before):
        assert torch.equal(dataset[key]["image"], sample["image"])


def test_what_does_not_fit_into_memory_is_prepared_again(volumes: Volumes) -> None:
    cases = volumes(SHAPES)
    small = CaseDataset(cases, preprocessing(3, 1), augmentation(3, [10, 10, 5]), cache_gib=6000 / 2**30)
    assert 1 <= len(small.cache) < 5
    whole = training_set(cases, augment="flips")
    for key in range(10):
        assert torch.equal(small[key]["image"], whole[key]["image"])


def test_evaluation_is_in_order_and_keeps_what_inversion_needs(volumes: Volumes) -> None:
    cases = volumes(SHAPES, np.diag([-1, 1, 2, 1]))
    dataset = CaseDataset(cases, evaluation_preprocessing(3, 1))
    for _ in range(2):
        batches = list(loader(dataset))
        assert [batch["case"] for batch in batches] == [[case["case"]] for case in cases]
        assert all(len(batch["image"].applied_operations[0]) == 1 for batch in batches)
        assert [tuple(batch["label"].shape[2:]) for batch in batches] == SHAPES
    dataset[0]["image"].zero_()
    assert dataset[0]["image"].max() > 0


def test_steps_of_an_epoch(volumes: Volumes) -> None:
    dataset = training_set(volumes(SHAPES))
    assert len(loader(dataset, 2)) == 3  # every case at least once, and full batches
    assert [len(batch["case"]) for batch in loader(dataset, 2)] == [2, 2, 2]
    assert len(loader(dataset, 4, 7)) == 7


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_engine_that_sets_the_epoch_gets_that_epoch(volumes: Volumes, num_workers: int) -> None:
    dataset = training_set(volumes(SHAPES))
    expected = digests(dataset, [1, 2, 3], steps=3)
    batches = loader(dataset, 2, 3, num_workers)
    seen: list[str] = []
    engine = Engine(lambda engine, batch: seen.append(digest(batch)))
    sampler: EpochSampler = batches.sampler  # type: ignore[assignment]
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: sampler.set_epoch(engine.state.epoch))
    engine.run(batches, max_epochs=3, epoch_length=3)
    assert seen == list(chain(*expected))


def test_errors_name_the_file(volumes: Volumes) -> None:
    with pytest.raises(DataError, match="no cases"):
        training_set([])
    cases = volumes(SHAPES)
    Path(str(cases[3]["label"])).write_bytes(b"")
    with pytest.raises(DataError, match=r"case_3\.nii\.gz cannot be read"):
        training_set(cases)


def test_hippocampus_batches(shared: Path) -> None:
    splits = datalists(shared / "data" / "hippocampus_msd", num_labelled=8, num_validation=2)
    dataset = CaseDataset(splits["train"], preprocessing(3, 1), augmentation(3, [48, 64, 24]))
    for batch in loader(dataset, 4, 3):
        assert batch["image"].shape == batch["label"].shape == (4, 1, 48, 64, 24)
        assert batch["image"].dtype == torch.float32 and 0 <= batch["image"].min() and batch["image"].max() <= 1
        assert set(batch["label"].unique().tolist()) <= {0, 1, 2}
