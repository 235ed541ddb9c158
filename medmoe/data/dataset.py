# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Cases as samples: prepared once and kept in memory, augmented the same way wherever and whenever they are drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import list_data_collate
from monai.transforms import Compose
from torch.utils.data import DataLoader, Dataset, Sampler

from medmoe.data.datalist import Case
from medmoe.data.transforms import apply
from medmoe.errors import DataError, some
from medmoe.progress import Progress

GIB = 2**30


class CaseDataset(Dataset[dict[str, Any]]):
    """Samples of cases.

    The deterministic transforms run once for each case, when the data set is made; their results are kept in memory up
    to ``cache_gib``, and what does not fit is prepared anew each time. The random transforms are seeded by (seed, key)
    alone: a sample depends neither on workers nor on what was drawn before.

    ``dataset[key]`` gives case ``key % len(cases)``; keys that differ by a multiple of ``len(cases)`` give the same
    case under other random transforms.

    Args:
        cases: what to load.
        deterministic: transforms without chance, such as :func:`medmoe.data.transforms.preprocessing`.
        random: random transforms, such as :func:`medmoe.data.transforms.augmentation`; none for evaluation.
        seed: of the random transforms, and of the order in which a loader draws the cases.
        cache_gib: memory for prepared cases.

    Raises:
        DataError: there are no cases, or one cannot be prepared.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        deterministic: Compose,
        random: Compose | None = None,
        seed: int = 0,
        cache_gib: float = 4.0,
    ) -> None:
        if not cases:
            raise DataError("There are no cases to load.")
        self.cases, self.deterministic, self.random, self.seed = list(cases), deterministic, random, seed
        self.cache: list[dict[str, Any]] = []
        self.fill_cache(cache_gib * GIB)

    def fill_cache(self, limit: float) -> None:
        """Prepares cases until their tensors take ``limit`` bytes."""
        size = 0
        with Progress("preparing cases", len(self.cases)) as progress:
            for case in self.cases:
                sample = apply(self.deterministic, case)
                size += _bytes_of(sample)
                if size > limit:
                    return
                self.cache.append(sample)
                progress.advance(note=case["case"])

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: int) -> dict[str, Any]:
        index = key % len(self.cases)
        cached = index < len(self.cache)
        sample = copy.deepcopy(self.cache[index]) if cached else apply(self.deterministic, self.cases[index])
        if self.random is None:
            return sample
        state = np.random.SeedSequence((self.seed, key)).generate_state(1)[0]
        self.random.set_random_state(seed=int(state))
        return apply(self.random, sample)


def _bytes_of(sample: Any) -> int:
    """Memory of the tensors of a sample, those of its conditions included."""
    if isinstance(sample, dict):
        return sum(map(_bytes_of, sample.values()))
    return sample.nbytes if isinstance(sample, torch.Tensor) else 0


class EpochSampler(Sampler[int]):
    """Keys of an epoch's samples for a :class:`CaseDataset`: permutations of all cases, one after the other.

    The same (seed, epoch) gives the same keys, so that a resumed run draws what an uninterrupted one would have drawn.
    Call :meth:`set_epoch` before each epoch. No key occurs twice in a run.

    Args:
        num_cases: cases in the data set.
        num_samples: samples in an epoch; may be more or fewer than there are cases.
        seed: of the permutations.
    """

    def __init__(self, num_cases: int, num_samples: int, seed: int = 0) -> None:
        self.num_cases, self.num_samples, self.seed = num_cases, num_samples, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose keys come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        passes = -(-self.num_samples // self.num_cases)
        numbers = range(self.epoch * passes, (self.epoch + 1) * passes)
        keys = [number * self.num_cases + index for number in numbers for index in self.permutation(number)]
        return iter(keys[: self.num_samples])

    def permutation(self, number: int) -> list[int]:
        """The order of the cases in pass ``number`` over them."""
        order: list[int] = np.random.default_rng((self.seed, number)).permutation(self.num_cases).tolist()
        return order


def loader(
    dataset: CaseDataset, batch_size: int = 1, steps_per_epoch: int = 0, num_workers: int = 0
) -> DataLoader[dict[str, Any]]:
    """Batches of a data set: in the order of its cases, or, where it has random transforms, drawn anew each epoch.

    The training order is that of an :class:`EpochSampler` (``loader.sampler``), whose batches are all full.

    Args:
        steps_per_epoch: batches in a training epoch; 0 draws every case at least once.
        num_workers: processes that prepare batches. It does not change the batches.

    A batch whose second images (volumes: pictures share a size) differ in shape is a DataError.
    """
    sampler: EpochSampler | None = None
    if dataset.random is not None:
        steps = steps_per_epoch or -(-len(dataset) // batch_size)
        sampler = EpochSampler(len(dataset), steps * batch_size, dataset.seed)
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(dataset.seed),  # the global generator stays as it is
    )


def collate(samples: Sequence[Mapping[str, Any]]) -> Any:
    """Samples as a batch, by MONAI's ``list_data_collate``.

    Raises:
        DataError: second images differ in shape. MONAI would log all their voxels, and fail.
    """
    images = [
        (sample["case"], sample["condition"]["image"]) for sample in samples if "image" in sample.get("condition", ())
    ]
    shapes = {tuple(image.shape[1:]): case for case, image in images}
    if len(shapes) > 1:
        found = some([f"{' x '.join(map(str, shape))} (case {case})" for shape, case in shapes.items()])
        raise DataError(
            f"The second images of a batch differ in shape: {found}. Set batch_size to 1, or give volumes of one shape."
        )
    return list_data_collate(samples)
