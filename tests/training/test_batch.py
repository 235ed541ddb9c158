# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What MONAI's engines hand to network and loss, for tasks and conditions."""

from __future__ import annotations

from typing import Any

import torch
from monai.data import DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import Tensor, nn

from medmoe.inference import sliding_window
from medmoe.networks.network import Parts
from medmoe.tasks import Task, single_task
from medmoe.training.batch import PrepareBatch
from medmoe.training.loss import PartsInferer, TaskLoss

TASKS = [Task("organs", "labels", ("heart", "lung")), Task("grade", "image", ("low", "high"))]


def sample(number: int) -> dict[str, Any]:
    condition = {"numbers": torch.tensor([float(number), torch.nan]), "categories": torch.tensor([number])}
    organs = torch.randint(0, 2, (2, 6, 5), dtype=torch.uint8)
    image = MetaTensor(torch.rand(1, 6, 5))
    return {"image": image, "organs": organs, "grade": number % 2, "case": f"case {number}", "condition": condition}


def loader(keys: tuple[str, ...] = ("image", "organs", "grade", "case", "condition")) -> DataLoader:
    samples = [{key: sample(number)[key] for key in keys} for number in range(4)]
    return DataLoader(samples, batch_size=2, collate_fn=list_data_collate)


class Network(nn.Module):
    """Answers with what it was told: the logits of "grade" are the conditions' numbers."""

    def __init__(self, tasks: list[Task]) -> None:
        super().__init__()
        self.tasks = tasks
        self.convolution = nn.Conv2d(1, 2, 1)
        self.seen: list[Any] = []

    def parts(self, image: Tensor, condition: dict[str, Tensor] | None = None) -> Parts:
        self.seen.append(condition)
        numbers = torch.zeros(len(image), 2) if condition is None else condition["numbers"].nan_to_num()
        known = {"organs": self.convolution(image), "grade": numbers + self.convolution.bias}
        return Parts({task.name: known[task.name] for task in self.tasks}, [], {}, {})

    def outputs(self, image: Tensor, condition: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        return self.parts(image, condition).outputs


def test_targets_and_condition_for_a_trainer() -> None:
    batch = next(iter(loader()))
    image, targets, args, kwargs = PrepareBatch(TASKS)(batch, "cpu")
    assert image.shape == (2, 1, 6, 5) and set(targets) == {"organs", "grade"} and args == ()
    assert targets["grade"].tolist() == [0, 1] and torch.equal(targets["organs"], batch["organs"])
    assert kwargs["condition"]["categories"].tolist() == [[0], [1]]
    assert all(type(values) is Tensor for values in kwargs["condition"].values())


def test_plain_segmentation_has_a_dictionary_for_the_loss_and_a_tensor_for_metrics() -> None:
    batch = {"image": torch.rand(2, 1, 4, 4), "label": torch.ones(2, 1, 4, 4), "case": ["a", "b"]}
    image, targets = PrepareBatch(single_task(2))(batch)
    assert torch.equal(image, batch["image"]) and torch.equal(targets["label"], batch["label"])
    _, label = PrepareBatch(single_task(2), targets=False)(batch)
    assert torch.equal(label, batch["label"])
    assert PrepareBatch(single_task(2), targets=False)({"image": image})[1] is None
    assert PrepareBatch(single_task(2))({"image": image})[1] == {}


def test_everything_goes_to_the_device() -> None:
    image, targets, _, kwargs = PrepareBatch(TASKS)(next(iter(loader())), torch.device("meta"))
    assert {t.device.type for t in (image, *targets.values(), *kwargs["condition"].values())} == {"meta"}


def train(tasks: list[Task], keys: tuple[str, ...]) -> tuple[Network, SupervisedTrainer, TaskLoss]:
    network, loss = Network(tasks), TaskLoss(tasks)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    options = {"prepare_batch": PrepareBatch(tasks), "inferer": PartsInferer(), "decollate": False}
    trainer = SupervisedTrainer("cpu", 2, loader(keys), network, optimizer, loss, **options)
    trainer.run()
    return network, trainer, loss


def test_a_trainer_trains_tasks_on_conditions() -> None:
    network, trainer, loss = train(TASKS, ("image", "organs", "grade", "case", "condition"))
    assert set(loss.last) == {"organs", "grade"} and trainer.state.output["loss"].isfinite()
    assert [condition["numbers"][:, 0].tolist() for condition in network.seen] == [[0, 1], [2, 3]] * 2


def test_image_level_classification_needs_no_mask() -> None:
    network, _, loss = train(TASKS[1:], ("image", "grade", "case"))
    assert set(loss.last) == {"grade"} and network.seen == [None] * 4
    assert network.convolution.bias.grad.any()


def test_an_evaluator_decollates_dictionaries() -> None:
    """Predictions and targets of a case come together in postprocessing."""
    network, cases = Network(TASKS), []

    def note(data: dict[str, Any]) -> dict[str, Any]:
        cases.append(data)
        return data

    evaluator = SupervisedEvaluator(
        "cpu",
        loader(),
        network,
        prepare_batch=PrepareBatch(TASKS, targets=False),
        inferer=sliding_window((6, 5), 2),
        postprocessing=note,
    )
    evaluator.run()
    assert [case["case"] for case in cases] == [f"case {number}" for number in range(4)]
    assert [case["grade"] for case in cases] == [0, 1, 0, 1] and all(case["label"] is None for case in cases)
    bias = network.convolution.bias.detach()
    for number, case in enumerate(cases):
        assert case["pred"]["organs"].shape == (2, 6, 5) and case["organs"].shape == (2, 6, 5)
        torch.testing.assert_close(case["pred"]["grade"], torch.tensor([float(number), 0]) + bias)
