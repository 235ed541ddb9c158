# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""A network of a few hundred parameters with the attributes of the real one, and trainings that take milliseconds."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import torch
from ignite.engine import Engine
from torch import Tensor, nn

from medmoe.moe.routing import RoutingRecord
from medmoe.networks.network import Parts
from medmoe.tasks import single_task
from medmoe.training.checkpoint import CheckpointHandler
from medmoe.training.optim import optimizer, schedule

SETTINGS = {
    "num_classes": 3,
    "spatial_dims": 2,
    "in_channels": 1,
    "class_names": ["background", "gray", "white"],
    "general_lora": 2,
    "fusion": "late",
    "lr": 0.01,
}
STEPS = 4


class ToyExpert(nn.Module):
    def __init__(self, name: str, domain: str, rank: int) -> None:
        super().__init__()
        self.name, self.domain, self.patch = name, domain, 2
        self.sha256 = hashlib.sha256(name.encode()).hexdigest()
        self.frozen = nn.Conv2d(1, 6, 1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(6).requires_grad_(False)
        self.down, self.up = nn.Linear(6, rank, bias=False), nn.Linear(rank, 6, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.norm(self.frozen(image)).movedim(1, -1)
        return (tokens + self.up(self.down(tokens))).movedim(-1, 1)


class ToyPrompter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(2, 6))
        self.dispatch = nn.Linear(6, 6)


class ToyNetwork(nn.Module):
    """Dropout draws from the global generator, and batch norm in the decoder has buffers that training changes."""

    def __init__(
        self, rank: int = 2, num_classes: int = 3, names: tuple[str, str] = ("general", "medical"), seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.experts = nn.ModuleList([ToyExpert(names[0], "general", rank), ToyExpert(names[1], "medical", rank)])
            self.prompter = ToyPrompter()
            self.decoder = nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.2), nn.Conv2d(6, num_classes, 1))
        self.num_classes, self.recording, self.recorded = num_classes, False, 0
        self.tasks = single_task(num_classes)

    def train(self, mode: bool = True) -> ToyNetwork:
        super().train(mode)
        self.experts.eval()
        return self

    def parts(self, image: Tensor) -> Parts:
        self.recorded += self.recording
        features = [
            expert(image) + self.prompter.dispatch(self.prompter.prompts[k])[:, None, None]
            for k, expert in enumerate(self.experts)
        ]
        own = [self.decoder(feature) for feature in features]
        expert_outputs = [{"label": logits} for logits in own]
        return Parts({"label": own[0] + own[1]}, expert_outputs, {"balance": self.prompter.prompts.square().mean()}, {})

    def forward(self, image: Tensor) -> Tensor:
        return self.parts(image).outputs["label"]

    def routing(self) -> list[RoutingRecord]:
        if not self.recorded:
            return []
        usage = [{"general": 0.7, "medical": 0.3}, {"general": 0.2, "medical": 0.8}]
        names = [expert.name for expert in self.experts]
        sites = [(k, site) for k in (0, 1) for site in range(4)]
        return [RoutingRecord(names[k], site, 0.3 + 0.2 * k + 0.01 * site, usage[k], {}) for k, site in sites]


def batch_of(epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """An image in which brightness tells the class, the same for the same epoch and step."""
    draw = torch.Generator().manual_seed(epoch * 1000 + step)
    label = torch.randint(0, 3, (2, 1, 8, 8), generator=draw)
    return label / 2 + 0.1 * torch.rand(2, 1, 8, 8, generator=draw), label


def train(
    output_dir: Path, epochs: int, resume: bool = False, pause: float = 0.0, losses: list[float] | None = None
) -> list[float]:
    """Trains a toy network with ignite alone; returns the loss of each step, which ``losses`` collects as it goes."""
    torch.set_num_threads(1)
    if not resume:
        torch.manual_seed(3)
    network = ToyNetwork()
    optim = optimizer(network, lr=0.01, prompt_lr=0.02)
    scheduler = schedule(optim, 3, epochs * STEPS)
    losses = [] if losses is None else losses

    def step(engine: Engine, batch: int) -> dict[str, Tensor]:
        network.train()
        image, label = batch_of(engine.state.epoch, batch)
        optim.zero_grad()
        loss = nn.functional.cross_entropy(network(image), label[:, 0])
        loss.backward()
        optim.step()
        losses.append(loss.item())
        time.sleep(pause)
        return {"loss": loss}

    trainer = Engine(step)
    trainer.state.epoch_length, trainer.state.max_epochs = STEPS, epochs
    handler = CheckpointHandler(network, optim, output_dir, SETTINGS, scheduler, resume=resume)
    handler.attach(trainer)
    trainer.run(list(range(STEPS)), max_epochs=epochs)
    return losses
