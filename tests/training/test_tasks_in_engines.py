# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Small real networks on several tasks, with every handler that a bundle has, from samples to summaries."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Compose, EnsureTyped

from medmoe.conditions import Column, Schema
from medmoe.data.postprocess import TaskResults
from medmoe.decoders import FusionDecoder
from medmoe.inference import CaseTable, additional_metrics, evaluation, key_metric, sliding_window
from medmoe.moe import MoPE, PMoE
from medmoe.networks import ExpertNetwork
from medmoe.tasks import Task, make_tasks
from medmoe.training.batch import PrepareBatch
from medmoe.training.checkpoint import BEST, CheckpointHandler, conditions_of, load_checkpoint, tasks_of
from medmoe.training.handlers import FiniteLoss, MetricsLog, Validation, read_rows, summary
from medmoe.training.loss import PartsInferer, TaskLoss
from medmoe.training.optim import optimizer
from medmoe.training.record import write_record
from tests.networks.small import small_tiny_vit, small_vit

ENTRIES: list[dict[str, Any]] = [
    {"name": "organs", "kind": "labels", "names": ["bright", "right"]},
    {"name": "edges", "kind": "boundary", "of": "organs"},
    {"name": "far", "kind": "distance", "of": "organs"},
    {"name": "grade", "kind": "image", "names": ["dark", "light"]},
]
SCHEMA = Schema((Column("age", "number", 50.0, 10.0), Column("sex", "category", values=("F", "M"))))
SIZE = 32


def sample(number: int, tasks: list[Task]) -> dict[str, Any]:
    """A picture with a bright half; every third case lacks the second organ and the grade."""
    draw = torch.Generator().manual_seed(number)
    grade = number % 2
    image = 0.2 + 0.3 * grade + 0.1 * torch.rand(1, SIZE, SIZE, generator=draw)
    masks = torch.zeros(2, SIZE, SIZE, dtype=torch.uint8)
    masks[0, : SIZE // 2], masks[1, :, SIZE // 2 :] = 1, 1
    image[0] += 0.3 * masks[0]
    far = torch.linspace(-1, 1, SIZE).expand(2, SIZE, SIZE).clone()
    edges = torch.zeros_like(masks)
    edges[0, SIZE // 2 - 1 : SIZE // 2 + 1], edges[1, :, SIZE // 2 - 1 : SIZE // 2 + 1] = 1, 1
    if number % 3 == 0:
        masks[1], edges[1], far[1], grade = 255, 255, torch.nan, -1
    targets = {"organs": masks, "edges": edges, "far": far, "grade": torch.tensor(grade)}
    condition = {"numbers": torch.tensor([float(number)]), "categories": torch.tensor([number % 3])}
    found = {"image": MetaTensor(image.clamp(0, 1)), "case": f"case {number}", "condition": condition}
    return {**found, **{task.name: targets[task.name] for task in tasks}}


def network_of(tasks: list[Task], conditions: bool) -> ExpertNetwork:
    torch.manual_seed(0)
    return ExpertNetwork(
        [small_vit(2), small_tiny_vit()],
        tasks,
        prompter=partial(PMoE, num_prompts=2),
        conditioner=partial(MoPE, schema=SCHEMA, num_prompts=2, num_experts=2, psi_width=8) if conditions else None,
        decoder=partial(FusionDecoder, channels=8, fusion="late", stem=4),
        task_weighting="uncertainty",
        precision="fp32",
    )


def run(folder: Path, tasks: list[Task], conditions: bool, window: int = SIZE, epochs: int = 3) -> ExpertNetwork:
    """Trains and evaluates as a bundle does."""
    network = network_of(tasks, conditions)
    samples = [sample(number, tasks) for number in range(8)]
    if not conditions:
        samples = [{key: value for key, value in each.items() if key != "condition"} for each in samples]
    loss, steps = TaskLoss(tasks), optimizer(network, 5e-3, 5e-3, router_lr=1e-3)
    evaluator = SupervisedEvaluator(
        "cpu",
        DataLoader(samples[:5], collate_fn=list_data_collate),
        network,
        prepare_batch=PrepareBatch(tasks, targets=False),
        inferer=sliding_window(window, 2),
        postprocessing=TaskResults(tasks, Compose([EnsureTyped("image")])),
        key_val_metric=key_metric(tasks),
        additional_metrics=additional_metrics(tasks),
        val_handlers=[CaseTable(tasks, folder / "cases")],
    )
    log = MetricsLog(folder, steps, evaluator, network, loss)
    saver = CheckpointHandler(network, steps, folder, {}, evaluator=evaluator)
    folder.mkdir()
    write_record(folder, {"roi_size": SIZE}, {"train": []}, network)
    trainer = SupervisedTrainer(
        "cpu",
        epochs,
        DataLoader(samples, batch_size=4, collate_fn=list_data_collate),
        network,
        steps,
        loss,
        prepare_batch=PrepareBatch(tasks),
        inferer=PartsInferer(),
        decollate=False,
        train_handlers=[Validation(evaluator, epochs), log, FiniteLoss(), saver],
    )
    trainer.run()
    return network


@pytest.mark.parametrize(("conditions", "window"), [(False, SIZE), (True, SIZE), (True, 24)])
def test_several_tasks_train_and_are_judged(tmp_path: Path, conditions: bool, window: int) -> None:
    folder, tasks = tmp_path / "run", make_tasks(ENTRIES)
    network = run(folder, tasks, conditions, window)
    first, *_, last = read_rows(folder)
    for name in ("val_organs_mean_dice", "val_edges_mean_f1", "val_far_mean_mae", "val_grade_cross_entropy"):
        assert last["metrics"][name] is not None and first["metrics"][name] is not None, name
    names = {"organs", "edges", "far", "grade"}
    auxiliary = {"auxiliary/mope_importance"} if conditions else set()
    assert set(last["terms"]) == names | {f"log_variance/{name}" for name in names} | auxiliary
    assert last["loss"] < read_rows(folder)[1]["loss"]
    assert any("/mope/" in name for name in last["routing"]) == conditions
    assert tasks_of(folder / BEST) == tasks and conditions_of(folder / BEST) == (SCHEMA if conditions else None)
    other = network_of(tasks, conditions)
    load_checkpoint(folder / BEST, other)
    image, given = torch.rand(1, 1, SIZE, SIZE), {"numbers": torch.rand(1, 1)} if conditions else None
    network.eval(), other.eval()
    with torch.no_grad():
        torch.testing.assert_close(other(image, given), network(image, given))
    assert "organs_mean_dice" in summary(folder) and "grade_auc" in summary(folder)
    assert "balanced_accuracy" in evaluation.summary(folder, folder / BEST, "test")
    record = json.loads((folder / "run.json").read_text())
    assert [task["name"] for task in record["tasks"]] == ["organs", "edges", "far", "grade"]
    assert (record["conditions"] is not None) == conditions and record["cost"]


def test_image_level_classification_needs_no_mask(tmp_path: Path) -> None:
    folder, tasks = tmp_path / "run", make_tasks(ENTRIES[3:])
    run(folder, tasks, False, epochs=2)
    last = read_rows(folder)[-1]
    assert set(last["metrics"]) == {f"val_grade_{s}" for s in ("auc", "accuracy", "balanced_accuracy", "cross_entropy")}
    assert "grade_auc" in summary(folder)
    assert (folder / "cases.csv").read_text().startswith("case,grade_true,grade_probability_dark,")
