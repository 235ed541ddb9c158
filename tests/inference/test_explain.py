# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""How a trained network routed: collected over windows, drawn for a case, tabled for a split."""

from __future__ import annotations

import csv
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import ONE_EXPERT, run, write_pictures
from ignite.engine import Engine
from networks.small import small_tiny_vit, small_vit
from PIL import Image

from medmoe.conditions import Column, Schema
from medmoe.decoders import FusionDecoder
from medmoe.errors import ConfigError
from medmoe.inference import sliding_window
from medmoe.inference.explain import (
    GateCollector,
    Plane,
    RoutingTable,
    explain,
    explain_case,
    groups_of,
    predicted,
    spacing_of,
    winning,
)
from medmoe.moe import AdaRoute, FGMoE, MoPE, PMoE
from medmoe.networks import ExpertNetwork
from medmoe.tasks import Task
from medmoe.training.routing_pictures import mean_shares

SCHEMA = Schema((Column("age", "number"), Column("sex", "category", values=("f", "m"))))
TASKS = [
    Task("organs", "labels", ("left", "right")),
    Task("depth", "distance", ("left", "right"), of="organs"),
    Task("finding", "image", ("none", "nodule")),
]
EVERYTHING = {
    "prompter": partial(PMoE, num_prompts=3),
    "conditioner": partial(MoPE, schema=SCHEMA, num_prompts=2, num_experts=3),
    "adapters": AdaRoute(4),
    "decoder": partial(FusionDecoder, channels=8, stem=4, refine=partial(FGMoE, num_slices=4, top_k=2)),
}


def network(tasks: list[Task] | None = None, **settings: Any) -> ExpertNetwork:
    net = ExpertNetwork(
        [small_vit(), small_tiny_vit()], tasks=tasks or TASKS, precision="fp32", **{**EVERYTHING, **settings}
    )
    with torch.no_grad():  # routers start as nearly even
        for _, p in net.trainable():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


def sample(*shape: int, case: str = "case 1") -> dict[str, Any]:
    condition = {"numbers": torch.randn(1), "categories": torch.tensor([2])}
    return {"image": torch.rand(1, *shape), "case": case, "condition": condition}


@torch.no_grad()
def test_gates_are_averaged_over_windows_and_the_network_records_no_longer() -> None:
    net = network(TASKS[:1], conditioner=None)
    image = torch.rand(1, 1, 32, 64)
    with GateCollector(net) as collector:
        sliding_window([32, 32], 2, 0.0, sw_batch_size=1)(image, net)
        found = collector.take()
    assert not net.recording and not net._forward_hooks
    net.recording = True
    passes = []
    for window in image.split(32, -1):
        net(window)
        passes.append({gate[:4]: mean_shares(gate) for gate in net.gates()})
    assert len(found) == len(passes[0]) > 20
    for gate in found:
        expected = (passes[0][gate[:4]] + passes[1][gate[:4]]) / 2
        assert gate.weights[0].numpy() == pytest.approx(expected, abs=1e-6)
        assert gate.weights.sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_gates_of_outputs_by_task_are_those_of_the_one_pass() -> None:
    net = network()
    with GateCollector(net) as collector:
        sliding_window([32, 32], 2)(torch.rand(1, 1, 32, 32), net)
        found = collector.take()
        assert {gate.router for gate in found} == {"pmoe", "mope", "adaroute", "fgmoe"}
        net(torch.rand(1, 1, 32, 32))
        net(torch.rand(1, 1, 32, 32))
        assert len(collector.take()) == len(found)


@torch.no_grad()
def test_winners_are_those_of_the_gates_on_every_pixel() -> None:
    net = network(conditioner=None)
    net.recording = True
    image = torch.rand(1, 1, 32, 32)
    found = winning(net, sliding_window([32, 32], 2), image, {})
    assert list(found) == [(part, task) for part in ("slices", "global") for task in ("organs", "depth")]
    net(image)
    for gate in net.gates():
        if gate.router == "fgmoe":
            fine = gate.weights.repeat_interleave(2, -2).repeat_interleave(2, -1)[0]
            assert np.array_equal(found[gate.part, gate.receiver], fine.argmax(0).numpy())
    several = winning(net, sliding_window([32, 32], 2, 0.5), torch.rand(1, 1, 40, 50), {})
    assert all(winners.shape == (40, 50) and winners.max() < 4 for winners in several.values())


def test_a_plane_of_a_volume_has_most_prediction_and_a_slab_around_it() -> None:
    image = torch.arange(6.0 * 5 * 9).reshape(1, 1, 6, 5, 9) / 270
    area = np.zeros((1, 6, 5, 9), dtype=bool)
    area[0, 1:4, 2, 7] = True
    plane = Plane(image, {"organs": area}, 4, [1.0, 2.0, 3.0])
    assert torch.equal(plane.slab, image[..., 5:9]) and plane.index == 2 and plane.place == "  slice 8 of 9"
    upright = image[0, 0, :, :, 7].numpy().T[::-1]
    assert np.array_equal(plane.picture, upright) and plane.aspect == 2
    assert np.array_equal(plane.areas["organs"][0], area[0, ..., 7].T[::-1])
    middle = Plane(image, {}, -1, [1.0, 1.0, 1.0])
    assert torch.equal(middle.slab, image) and middle.place == "  slice 5 of 9"
    flat = Plane(image[..., 0], {}, 4, [1.0, 1.0])
    assert flat.place == "" and np.array_equal(flat.picture, image[0, 0, :, :, 0].numpy())


def test_what_is_predicted_by_kind_of_task() -> None:
    classes = Task("label", "classes", ("background", "a", "b"))
    logits = {"label": torch.randn(1, 3, 4, 5), "organs": torch.randn(1, 2, 4, 5)}
    found = predicted([classes, TASKS[0]], logits)
    assert np.array_equal(found["organs"], (logits["organs"][0] > 0).numpy())
    for k in (1, 2):
        assert np.array_equal(found["label"][k - 1], (logits["label"][0].argmax(0) == k).numpy())
    assert spacing_of(torch.zeros(1, 4, 5)) == [1.0, 1.0]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_router_of_a_case_is_drawn(tmp_path: Path, spatial_dims: int) -> None:
    net = network(spatial_dims=spatial_dims).train()
    shape, window = ((40, 36), [32, 32]) if spatial_dims == 2 else ((40, 36, 5), [32, 32, 2])
    gates, files = explain_case(net, sliding_window(window, spatial_dims), sample(*shape), tmp_path / "case 1")
    names = {"pmoe.png", "mope.png", "adaroute.png", "fgmoe_slices.png", "fgmoe_global.png"}
    assert {file.name for file in files} == names == {file.name for file in (tmp_path / "case 1").iterdir()}
    assert all(np.asarray(Image.open(file).convert("RGB")).std() > 10 for file in files)
    assert all(gate.weights.shape == (1, len(gate.candidates)) for gate in gates)


def test_late_fusion_and_image_level_tasks_alone_can_be_drawn(tmp_path: Path) -> None:
    late = {"decoder": partial(EVERYTHING["decoder"], fusion="late"), "conditioner": None, "adapters": None}
    for number, net in enumerate([network(TASKS[:1], **late), network(TASKS[2:])]):
        item = sample(36, 36)
        if number == 0:
            del item["condition"]
        _, files = explain_case(net, sliding_window([32, 32], 2), item, tmp_path / str(number))
        assert {file.stem for file in files} == (
            {"pmoe", "fgmoe_slices", "fgmoe_global"} if number == 0 else {"pmoe", "mope", "adaroute"}
        )


def test_a_split_becomes_a_table_and_groups(tmp_path: Path) -> None:
    net = network()
    inferer, handler = sliding_window([32, 32], 2), RoutingTable(net, tmp_path)
    items = [{**sample(32, 32, case=f"case {n}"), "finding": torch.tensor(n % 2)} for n in range(5)]
    for n, sex in enumerate((0, 2, 2, 1, 1)):  # a group of one is not shown
        items[n]["condition"]["categories"] = torch.tensor([sex])

    def step(engine: Engine, item: dict[str, Any]) -> None:
        engine.state.batch = [item]
        inferer(item["image"][None], net, {name: value[None] for name, value in item["condition"].items()})

    evaluator = Engine(step)
    handler.attach(evaluator)  # type: ignore[arg-type]
    with torch.no_grad():
        evaluator.run(items)
    assert {file.name for file in tmp_path.iterdir()} == {
        "routing.csv", "routing_by_finding.png", "routing_by_sex.png"
    }  # fmt: skip
    with open(tmp_path / "routing.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    totals: dict[tuple[str, ...], float] = defaultdict(float)
    for row in rows:
        totals[tuple(row[name] for name in ("case", "router", "receiver", "site", "part"))] += float(row["share"])
    assert {case for case, *_ in totals} == {item["case"] for item in items}
    assert list(totals.values()) == pytest.approx([1] * len(totals), abs=1e-4)
    assert [groups_of(net, item) for item in items[:2]] == [
        {"finding": "none", "sex": "missing"}, {"finding": "nodule", "sex": "m"}
    ]  # fmt: skip
    assert not net.recording and not net._forward_hooks


def test_a_failed_case_leaves_neither_hook_nor_recording_behind(tmp_path: Path) -> None:
    net = network()

    def step(engine: Engine, item: dict[str, Any]) -> None:
        net(item["image"][None])
        assert net.recording
        raise ValueError("no space left")

    evaluator = Engine(step)
    RoutingTable(net, tmp_path).attach(evaluator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no space left"):
        evaluator.run([sample(32, 32)])
    assert not net.recording and not net._forward_hooks


def test_nothing_is_tabled_where_nothing_routes(tmp_path: Path) -> None:
    net = SimpleNamespace(routers=[])
    evaluator = Engine(lambda engine, item: None)
    RoutingTable(net, tmp_path).attach(evaluator)  # type: ignore[arg-type]
    evaluator.run([1])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_explained_from_its_settings_alone(tmp_path: Path) -> None:
    """Through the bundle, as a user does it: training, explanation, and a network in which nothing routes."""
    data = write_pictures(tmp_path / "data", training=2, validation=1)
    small = {**ONE_EXPERT, "roi_size": [32, 32], "spatial_dims": 2, "in_channels": 3, "num_classes": 2}
    small |= {"label_threshold": 127, "intensity": "unit", "dataset_dir": str(data), "max_epochs": 1}
    images, checkpoint = data / "validation" / "images", "best.safetensors"
    run(**small, decoder="fgmoe", output_dir=str(tmp_path / "run"))
    files = explain(images, tmp_path / "pictures", tmp_path / "run" / checkpoint)
    names = ["pmoe.png", "fgmoe_slices.png", "fgmoe_global.png"]
    case = tmp_path / "pictures" / "validation0"
    assert files == [*(case / name for name in names), tmp_path / "pictures" / "routing.csv"]
    assert all(file.is_file() for file in files)
    run(**small, prompter="none", output_dir=str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"nothing in the network of .* routes"):
        explain(images, tmp_path / "none", tmp_path / "plain" / checkpoint)
