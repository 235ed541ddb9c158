# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""One table through which every method and every combination of the four goes, on small experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medmoe.conditions import Column, Schema
from medmoe.decoders import FusionDecoder
from medmoe.moe import AdaRoute, FGMoE, MoPE, PMoE
from medmoe.networks import ExpertNetwork
from medmoe.tasks import Task
from medmoe.tuning import LoRA
from tests.networks.small import small_tiny_vit, small_vit

SCHEMA = Schema(
    (
        Column("age", "number"),
        Column("sex", "category", values=("f", "m")),
        Column("note", "text"),
        Column("t2", "image"),
    ),
    text_encoder="some",
    text_width=6,
)
TASKS = [
    Task("organs", "labels", ("left", "right")),
    Task("edges", "boundary", ("left", "right"), of="organs"),
    Task("depth", "distance", ("left", "right"), of="organs"),
    Task("finding", "image", ("none", "nodule")),
]
PROMPTERS = {"none": None, "vpt": partial(PMoE, num_prompts=3, dispatch="none"), "pmoe": partial(PMoE, num_prompts=3)}
MOPE = partial(MoPE, schema=SCHEMA, num_prompts=2, num_experts=3)
CONDITIONERS = {"none": None, "mope": MOPE}
ADAPTERS = {"none": None, "lora": LoRA(2), "adaroute": AdaRoute(4), "both": [[LoRA(2), AdaRoute(4)]] * 2}
DECODERS = {
    f"{fusion}, {name}": partial(FusionDecoder, channels=8, stem=4, fusion=fusion, **refine)
    for fusion in ("concat", "mean", "gated", "late")
    for name, refine in {"plain": {}, "fgmoe": {"refine": partial(FGMoE, num_slices=4, top_k=2)}}.items()
}
SLOTS = ("prompter", "conditioner", "adapters", "decoder")
TABLE = [
    # each method by itself, in every variant of its slot
    *((p, c, "none", "concat, plain") for p in PROMPTERS for c in CONDITIONERS),
    *(("none", "none", a, "concat, plain") for a in ADAPTERS),
    *(("none", "none", "none", d) for d in DECODERS),
    # all pairs and triples of methods with FGMoE or plain, and everything at once under each fusion
    *(
        (p, c, a, d)
        for p in ("vpt", "pmoe")
        for c in CONDITIONERS
        for a in ("lora", "adaroute")
        for d in ("late, plain", "late, fgmoe")
    ),
    *(("pmoe", "mope", "both", d) for d in DECODERS),
]
ROWS = pytest.mark.parametrize("row", list(dict.fromkeys(TABLE)), ids=" | ".join)
FULL = ("pmoe", "mope", "both", "late, fgmoe")
METHODS = pytest.mark.parametrize(
    "row",
    [
        ("pmoe", "none", "none", "concat, plain"),
        ("none", "mope", "none", "concat, plain"),
        ("none", "none", "adaroute", "concat, plain"),
        ("none", "none", "none", "concat, fgmoe"),
        FULL,
    ],
    ids=["pmoe", "mope", "adaroute", "fgmoe", "all"],
)


def network(row: tuple[str, ...], seed: int = 0, **settings: Any) -> ExpertNetwork:
    torch.manual_seed(seed)
    slots = (PROMPTERS, CONDITIONERS, ADAPTERS, DECODERS)
    chosen = {slot: options[name] for slot, options, name in zip(SLOTS, slots, row, strict=True)}
    net = ExpertNetwork([small_vit(), small_tiny_vit()], **{"tasks": TASKS, "precision": "fp32", **chosen, **settings})
    with torch.no_grad():  # adapters start as nearly nothing: move everything that trains away from where it starts
        for _, p in net.trainable():
            p.add_(0.1 * torch.randn_like(p))
    return net


def condition(batch: int) -> dict[str, Tensor]:
    numbers = torch.randn(batch, 1)
    numbers[0] = torch.nan
    return {
        "numbers": numbers,
        "categories": torch.randint(0, 3, (batch, 1)),
        "text": torch.randn(batch, 1, 6),
        "image": torch.rand(batch, 1, 24, 24),
    }


def loss_of(net: ExpertNetwork, image: Tensor, given: dict[str, Tensor] | None) -> Tensor:
    parts = net.parts(image, given)
    own = [output for each in parts.expert_outputs for output in each.values()]
    return sum(o.square().mean() for o in [*parts.outputs.values(), *own]) + sum(parts.auxiliary.values())


@ROWS
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_trains_what_it_declares_and_nothing_else(row: tuple[str, ...], spatial_dims: int) -> None:
    """Shapes of all tasks on an odd size with batch 1 and 2; frozen weights bitwise unchanged, all others change."""
    net = network(row, spatial_dims=spatial_dims).train()
    shape = (27, 30) if spatial_dims == 2 else (27, 30, 3)
    assert net.outputs(torch.rand(1, 1, *shape), None)["finding"].shape == (1, 2)
    before = {name: p.clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([p for _, p in net.trainable()], 1e-2)
    image = torch.rand(2, 1, *shape)
    outputs = net.outputs(image, condition(2))
    assert {name: tuple(o.shape) for name, o in outputs.items()} == {
        **{t.name: (2, 2, *shape) for t in TASKS[:3]}, "finding": (2, 2)
    }  # fmt: skip
    for _ in range(3):  # top-k and modality dropout leave some out in one draw
        loss_of(net, image, condition(2)).backward()
    optimizer.step()
    slots = ("prompter.", "conditioner.", "decoder.", "image_head.")
    for name, p in net.named_parameters():
        declared = name.startswith(slots) or "lora_" in name or ".after." in name
        assert p.requires_grad == declared, name
        if not declared:
            assert torch.equal(p, before[name]) and p.grad is None, name
        else:
            assert p.grad is not None and p.grad.isfinite().all(), name


@ROWS
def test_gates_sum_to_one_and_every_router_reports(row: tuple[str, ...]) -> None:
    net = network(row).eval()
    net.recording = True
    net.outputs(torch.rand(2, 1, 32, 32), condition(2))
    expected = {"pmoe": row[0] == "pmoe", "mope": row[1] == "mope", "adaroute": row[2] in ("adaroute", "both"),
                "fgmoe": "fgmoe" in row[3]}  # fmt: skip
    assert {gates.router for gates in net.gates()} == {name for name, there in expected.items() if there}
    assert {record.router for record in net.routing()} == {gates.router for gates in net.gates()}
    for gates in net.gates():
        assert gates.weights.shape[:2] == (2, len(gates.candidates)) and (gates.weights >= 0).all()
        if (gates.router, gates.part) != ("fgmoe", "slices"):  # top-k takes some away
            assert (gates.weights.sum(1) - 1).abs().max() < 1e-5
    for record in net.routing():
        assert 0 <= record.entropy <= 1 + 1e-6 and abs(sum(record.usage.values()) - 1) < 1e-4


@METHODS
def test_a_sample_does_not_depend_on_the_others(row: tuple[str, ...]) -> None:
    net = network(row).eval()
    image, given = torch.rand(3, 1, 32, 32), condition(3)
    together = net.outputs(image, given)
    alone = net.outputs(image[1:2], {key: value[1:2] for key, value in given.items()})
    for name, output in alone.items():
        assert (output[0] - together[name][1]).abs().max() < 1e-4


@METHODS
def test_checkpointed_activations_give_the_same_gradients(row: tuple[str, ...]) -> None:
    image, given = torch.rand(2, 1, 32, 32), condition(2)
    found = []
    for again in (False, True):
        net = network(row, activation_checkpointing=again).train()
        torch.manual_seed(1)
        loss_of(net, image, given).backward()
        found.append({name: p.grad for name, p in net.trainable()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            assert (gradient - found[1][name]).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name


@METHODS
def test_bfloat16_is_close_and_trains(row: tuple[str, ...]) -> None:
    image, given = torch.rand(2, 1, 32, 32), condition(2)
    exact, rounded = network(row).eval(), network(row, precision="bf16").eval()
    for name, output in rounded.outputs(image, given).items():
        other = exact.outputs(image, given)[name]
        assert output.dtype == torch.float32
        # FGMoE's top-k is not continuous: a token near a tie may choose another slice
        assert (output - other).abs().median() < 0.1 * other.abs().max() + 0.02
    loss_of(rounded.train(), image, given).backward()
    assert all(p.grad.isfinite().all() for _, p in rounded.trainable() if p.grad is not None)


@METHODS
def test_what_trains_is_all_that_a_checkpoint_needs(row: tuple[str, ...], tmp_path: Any) -> None:
    from medmoe.training.checkpoint import trained_tensors

    image, given = torch.rand(2, 1, 32, 32), condition(2)
    one, other = network(row).eval(), network(row, seed=1).eval()
    for mine, its in zip(one.experts, other.experts, strict=True):  # the experts come from their own files
        frozen = {key: value for key, value in mine.state_dict().items() if "lora_" not in key and "after." not in key}
        its.load_state_dict(frozen, strict=False)
    save_file(
        {key: value.clone().contiguous() for key, value in trained_tensors(one).items()}, tmp_path / "net.safetensors"
    )
    other.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=False)
    for name, output in other.outputs(image, given).items():
        assert (output - one.outputs(image, given)[name]).abs().max() < 1e-5, name


def test_a_condition_of_one_serves_all_windows_and_none_is_all_missing() -> None:
    net = network(FULL).eval()
    image, given = torch.rand(3, 1, 32, 32), condition(1)
    repeated = {key: value.expand(3, *value.shape[1:]) for key, value in given.items()}
    assert (net(image, given) - net(image, repeated)).abs().max() < 1e-5
    missing = {
        "numbers": torch.full((3, 1), torch.nan),
        "categories": torch.zeros(3, 1, dtype=torch.long),
        "text": torch.full((3, 1, 6), torch.nan),
        "image": torch.full((3, 1, 24, 24), torch.nan),
    }
    assert (net(image) - net(image, missing)).abs().max() < 1e-5
    assert (net(image) - net(image, given)).abs().max() > 1e-4


def test_the_slices_of_a_volume_share_its_condition() -> None:
    net = network(FULL, spatial_dims=3, decoder=partial(FusionDecoder, channels=8, stem=4)).eval()
    image, given = torch.rand(2, 1, 32, 32, 3), condition(2)
    maps, _ = net.features(net.fold(image), given)
    single, _ = net.features(image[1:2, ..., 2], {key: value[1:2] for key, value in given.items()})
    assert (maps[0][-1][5] - single[0][-1][0]).abs().max() < 1e-4


def test_adapters_do_not_see_prompts() -> None:
    """AdaRoute's gates of the first layer are the same with and without prompts behind the patches' keys and values."""
    with_prompts, without = (
        network(("vpt", "none", "adaroute", "concat, plain")),
        network(("none", "none", "adaroute", "concat, plain")),
    )
    seen: list[tuple[int, ...]] = []
    for net in (with_prompts, without):
        stack = net.experts[0].after
        stack.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[1].shape)))
        net(torch.rand(1, 1, 32, 32))
    assert set(seen) == {(1, 32, 4, 4)}


def test_the_second_image_is_seen_by_the_untouched_expert() -> None:
    """Its features do not move while adapters do, so that they can be kept."""
    net = network(FULL).eval()
    second = torch.rand(1, 1, 24, 24)
    before = net.pooled_features(second)
    with torch.no_grad():
        for name, p in net.trainable():
            if name.startswith("experts."):
                p.add_(torch.randn_like(p))
    net.condition_cache.clear()
    assert torch.equal(net.pooled_features(second), before)
    assert net.experts[0].after is not None
    assert not [name for name, p in net.named_parameters() if "lora_" in name and not p.requires_grad]


@pytest.mark.parametrize("name", ["type", "keys", "values", "train"])
def test_a_task_may_be_called_anything(name: str) -> None:
    tasks = [Task(name, "classes", ("background", "core")), Task(f"{name}s", "image", ("no", "yes"))]
    net = network(FULL, tasks=tasks, task_weighting="uncertainty")
    parts = net.parts(torch.rand(1, 1, 32, 32))
    assert set(parts.outputs) == set(parts.log_variances) == {name, f"{name}s"}


def test_looking_at_the_second_image_trains_nothing() -> None:
    net = network(FULL)
    net.experts[0].requires_grad_(False)
    net.pooled_features(torch.rand(1, 1, 24, 24))
    assert not any(p.requires_grad for p in net.experts[0].parameters())


def test_the_second_image_has_channels_of_its_own() -> None:
    """Which channels of the image an expert sees says nothing of the second image."""
    net = network(FULL, in_channels=5)
    for expert in net.experts:
        expert.channels = [4, 0, 1]
    assert net(torch.rand(1, 5, 32, 32), condition(1)).isfinite().all() and net.experts[0].channels == [4, 0, 1]


def test_forward_is_one_tensor_and_splits_back() -> None:
    net = network(FULL).eval()
    image = torch.rand(1, 1, 32, 32)
    outputs, logits = net.outputs(image), net(image)
    assert logits.shape == (1, 6, 32, 32) and list(net.split(logits)) == ["organs", "edges", "depth"]
    for name, part in net.split(logits).items():
        assert torch.equal(part, outputs[name])
    assert torch.equal(net.image_outputs(image)["finding"], outputs["finding"])
    only = network(FULL, tasks=TASKS[3:]).eval()
    assert only(image).shape == (1, 2) and only.decoder is None


def test_uncertainty_weighting_learns_a_scalar_for_each_task() -> None:
    parts = network(FULL, task_weighting="uncertainty").parts(torch.rand(1, 1, 32, 32))
    assert set(parts.log_variances) == {task.name for task in TASKS}
    assert not network(FULL).parts(torch.rand(1, 1, 32, 32)).log_variances
    unweighted = [*TASKS[:3], Task("finding", "image", ("none", "nodule"), weight=0)]
    parts = network(FULL, tasks=unweighted, task_weighting="uncertainty").parts(torch.rand(1, 1, 32, 32))
    assert "finding" in parts.outputs and "finding" not in parts.log_variances


def test_a_condition_that_decides_is_learned() -> None:
    """The class follows from a category and the image is noise: through the dispatchers, the network learns it."""
    from medmoe.training.optim import optimizer

    net = network(("pmoe", "mope", "none", "concat, plain"), tasks=TASKS[3:]).train()
    steps = optimizer(net, lr=1e-3, prompt_lr=3e-3)

    def draw(count: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        label = torch.randint(0, 2, (count,))
        return torch.rand(count, 1, 32, 32), {**condition(count), "categories": label[:, None] + 1}, label

    for _ in range(120):
        image, given, label = draw(8)
        parts = net.parts(image, given)
        loss = torch.nn.functional.cross_entropy(parts.outputs["finding"], label) + sum(parts.auxiliary.values())
        steps.zero_grad()
        loss.backward()
        steps.step()
    image, given, label = draw(64)
    with torch.no_grad():
        assert (net.eval()(image, given).argmax(1) == label).float().mean() > 0.9
        assert (net(image).argmax(1) == label).float().mean() < 0.8  # without it there is nothing to know
