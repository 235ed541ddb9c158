# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from training.toy import ToyNetwork, batch_of

from medmoe.conditions import Column, Schema
from medmoe.errors import ConfigError, MedMoEError
from medmoe.moe import AdaRoute, FGMoE, MoPE, Stream
from medmoe.moe.adaroute import RoutedAdapters
from medmoe.training.optim import is_router, optimizer, parameter_counts, parameter_groups, schedule


def test_groups_hold_every_trainable_parameter_once_and_no_frozen_one() -> None:
    network = ToyNetwork()
    groups = {group["name"]: group for group in parameter_groups(network, 1e-3, 1e-2, 0.05)}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert set(groups) == {"prompts", "adapters", "decoder", "decoder_undecayed"}
    assert {name: group["lr"] for name, group in groups.items() if group["lr"] != 1e-3} == {"prompts": 1e-2}
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert decayed == {"adapters", "decoder"}
    assert all(p.ndim >= 2 for name in decayed for p in groups[name]["params"])
    assert all(p.ndim < 2 for p in groups["decoder_undecayed"]["params"])


def test_counts_add_up() -> None:
    network = ToyNetwork()
    counts = parameter_counts(network)
    assert counts["prompts"] == 2 * 6 + 6 * 6 + 6 and counts["adapters"] == 2 * 2 * 6 * 2
    assert counts["trainable"] == counts["prompts"] + counts["adapters"] + counts["decoder"]
    assert counts["total"] == counts["trainable"] + 2 * (6 + 6 + 12)


def tree(**shapes: tuple[int, ...]) -> nn.Module:
    """A module with a parameter of each shape at each name, where ``__`` stands for a dot."""
    root = nn.Module()
    for path, shape in shapes.items():
        *modules, name = path.split("__")
        place = root
        for module in modules:
            if not hasattr(place, module):
                place.add_module(module, nn.Module())
            place = getattr(place, module)
        place.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return root


EVERYTHING = {
    "prompter__prompts": (2, 3),
    "prompter__dispatchers__weight": (2, 3),
    "conditioner__encoder__weight": (2, 3),
    "conditioner__encoder__bias": (3,),
    "conditioner__encoder__nulls": (2, 3),
    "conditioner__encoder__groups__embeddings__weight": (2, 3),
    "conditioner__sites__prompts": (2, 3),
    "conditioner__sites__key": (2, 3),
    "conditioner__sites__image_query__weight": (2, 3),
    "conditioner__sites__image_query__bias": (3,),
    "experts__lora_A__weight": (2, 3),
    "experts__key__weight": (2, 3),
    "experts__after__router__weight": (2, 3),
    "experts__after__sharpness": (3,),
    "decoder__gates__weight": (2, 3),
    "decoder__gates__embedding": (2, 3),
    "decoder__head__weight": (2, 3),
    "image_head__weight": (2, 3),
    "log_variances__organs": (),
}
ROUTERS = {
    "prompter.dispatchers.weight": (0.0, 2e-2),
    "conditioner.sites.key": (0.1, 1e-3),
    "conditioner.sites.image_query.weight": (0.1, 1e-3),
    "conditioner.sites.image_query.bias": (0.0, 1e-3),
    "experts.after.router.weight": (0.1, 1e-3),
    "experts.after.sharpness": (0.0, 1e-3),
    "decoder.gates.weight": (0.1, 1e-3),
    "decoder.gates.embedding": (0.0, 1e-3),
}


def rates(network: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """Weight decay and learning rate of every parameter, by name."""
    names = {id(p): name for name, p in network.named_parameters()}
    groups = optimizer(network, 1e-3, 2e-2, 0.1, **options).param_groups
    return {names[id(p)]: (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}


def test_routers_keep_the_rate_of_their_part_or_have_their_own() -> None:
    network = tree(**EVERYTHING)
    usual, own = rates(network), rates(network, router_lr=5e-4)
    assert {name for name, _ in network.named_parameters() if is_router(name)} == set(ROUTERS)
    assert {name: usual[name] for name in ROUTERS} == ROUTERS
    assert own == usual | {name: (decay, 5e-4) for name, (decay, _) in ROUTERS.items()}
    assert len(own) == len(EVERYTHING)
    with pytest.raises(ConfigError, match="router_lr is 0"):
        optimizer(network, router_lr=0)


def test_embeddings_and_temperatures_of_the_methods_do_not_decay_to_nothing() -> None:
    """By the names that the real modules have."""
    network = nn.Module()
    schema = Schema((Column("sex", "category", values=("f", "m")),))
    network.conditioner = MoPE([Stream("vit", (8, 8))], schema)
    network.experts = RoutedAdapters(AdaRoute(4, learn_temperature=True), "vit", [8, 8], [range(2)])
    network.decoder = FGMoE(8, ["organs", "edges"])
    decayed = {name for name, (decay, _) in rates(network).items() if decay}
    vectors = {"conditioner.encoder.nulls", "conditioner.encoder.groups.0.embeddings.0.weight"}
    vectors |= {"decoder.shared.gate.embedding"}
    assert vectors <= dict(network.named_parameters()).keys() - decayed
    assert {"conditioner.mapper.0.weight", "decoder.shared.gate.router.weight", "experts.centers.0.A"} <= decayed
    sharp = [name for name in rates(network) if name.endswith("sharpness")]
    assert len(sharp) == 2 and all(map(is_router, sharp))


def test_prompts_that_conditions_choose_train_like_prompts() -> None:
    usual = rates(tree(**EVERYTHING))
    prompts = {name for name, rate in usual.items() if rate == (0.0, 2e-2)}
    assert prompts == {"prompter.prompts", "prompter.dispatchers.weight", "conditioner.sites.prompts"}
    assert usual["conditioner.encoder.weight"] == (0.1, 1e-3) and usual["conditioner.encoder.bias"] == (0.0, 1e-3)


def test_every_part_is_counted() -> None:
    counts = parameter_counts(tree(**EVERYTHING))
    parts = {"prompts": 12, "conditions": 42, "adapters": 21, "decoder": 24, "tasks": 1}
    assert counts == {**parts, "trainable": 100, "total": 100}


def test_schedule_warms_up_and_falls_after_every_optimizer_step_without_warnings() -> None:
    network = ToyNetwork()
    optim = optimizer(network, lr=0.1, prompt_lr=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = schedule(optim, warmup=4, total=20)
        rates = []
        for _ in range(20):
            rates.append([group["lr"] for group in optim.param_groups])
            network(batch_of(0, 0)[0]).mean().backward()
            optim.step()
    assert scheduler.last_epoch == 20
    first = [rate[0] for rate in rates]
    assert optim.param_groups[0]["name"] == "adapters" and rates[4][1] == pytest.approx(2 * first[4])
    assert first[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert first[4:] == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 16)) for i in range(16)])


def test_gradients_are_clipped_before_the_step() -> None:
    layer = nn.Module()
    layer.decoder = nn.Linear(3, 1)  # type: ignore[assignment]
    optim = optimizer(layer, clip=0.5)
    layer.decoder(100 * torch.rand(4, 3)).sum().backward()
    optim.step()
    norm = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
    assert norm == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bad: float) -> None:
    network = ToyNetwork()
    optim = optimizer(network)
    network(batch_of(0, 0)[0]).mean().backward()
    network.prompter.prompts.grad[0, 0] = bad
    before = {name: p.clone() for name, p in network.named_parameters()}
    with pytest.raises(MedMoEError, match=f"gradient became {bad}.*--lr"):
        optim.step()
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_settings_out_of_range_are_errors() -> None:
    with pytest.raises(ConfigError, match="nothing in the network trains"):
        optimizer(ToyNetwork().requires_grad_(False))
    with pytest.raises(ConfigError, match=r"lr \(-1\)"):
        optimizer(ToyNetwork(), lr=-1)
    with pytest.raises(ConfigError, match=r"warmup \(5\).*steps \(5\)"):
        schedule(optimizer(ToyNetwork()), 5, 5)
