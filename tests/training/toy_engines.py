# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""MONAI's engines around the toy network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import MeanDice, from_engine
from monai.transforms import AsDiscreted, Compose
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from training.toy import STEPS, ToyNetwork, batch_of

from medmoe.training.batch import PrepareBatch
from medmoe.training.loss import PartsInferer, TaskLoss
from medmoe.training.optim import optimizer, schedule


class Samples(Sampler[int]):
    """Keys of samples that differ from epoch to epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * STEPS, (self.epoch + 1) * STEPS))


class Cases(Dataset[dict[str, Any]]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int) -> dict[str, Any]:
        image, label = batch_of(7, key)
        return {"image": image[0], "label": label[0], "case": f"case{key:02d}"}


class Engines(NamedTuple):
    """MONAI's engines around a toy network, without handlers."""

    network: ToyNetwork
    optimizer: Optimizer
    loss: TaskLoss
    scheduler: LRScheduler
    evaluator: SupervisedEvaluator
    trainer: Callable[..., SupervisedTrainer]


def engines(epochs: int = 3, **network: Any) -> Engines:
    """``trainer(handlers)`` makes the trainer, so that handlers can refer to the other parts."""
    torch.manual_seed(3)
    toy = ToyNetwork(**network)
    optim = optimizer(toy, lr=0.05, prompt_lr=0.05)
    loss, scheduler = TaskLoss(toy.tasks), schedule(optim, 2, epochs * STEPS)
    chain = Compose([AsDiscreted("pred", argmax=True, to_onehot=3), AsDiscreted("label", to_onehot=3)])
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(Cases(5), generator=torch.Generator()),
        toy,
        postprocessing=chain,
        key_val_metric={"val_mean_dice": MeanDice(False, output_transform=from_engine(["pred", "label"]))},
    )

    def trainer(handlers: list[Any]) -> SupervisedTrainer:
        loader = DataLoader(Cases(1000), sampler=Samples(), generator=torch.Generator())
        options = {"inferer": PartsInferer(), "decollate": False, "train_handlers": handlers}
        options["prepare_batch"] = PrepareBatch(toy.tasks)
        return SupervisedTrainer("cpu", epochs, loader, toy, optim, loss, **options)

    return Engines(toy, optim, loss, scheduler, evaluator, trainer)
