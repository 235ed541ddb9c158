# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""MoPE: the identities of the method, on fresh random inputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medmoe.conditions import Schema
from medmoe.errors import ConfigError
from medmoe.moe.mope import ROUTERS, MoPE
from medmoe.moe.pmoe import Stream
from tests.moe.small_mope import (
    BATCH,
    CATEGORIES,
    NUMBERS,
    PSI,
    STREAMS,
    TEXTS,
    full_condition,
    mope,
    patches,
    prompted_sites,
)

# Shapes, gradients, memory


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("dynamic", "mapped", "tokens"), [(True, True, 7), (True, False, 6), (False, True, 1)])
def test_shapes_and_gradients_of_every_variant(router: str, dynamic: bool, mapped: bool, tokens: int) -> None:
    model = mope(router=router, dynamic=dynamic, mapped=mapped)
    assert model.num_tokens == tokens
    psi = model.encode(full_condition(), BATCH)
    assert psi.shape == (BATCH, PSI)
    total, weights = torch.zeros(()), []
    for k, site, width in prompted_sites(model):
        prompts, r = model(k, site, patches(width), psi)
        assert prompts.shape == (BATCH, tokens, width)
        assert (r is not None) == dynamic
        weights += [] if r is None else [r]
        total = total + prompts.square().sum()
    (total + model.importance_loss(weights)).backward()
    without = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None}
    assert without == ({"encoder"} if router == "image" and not mapped else set())


def test_parameter_count_of_a_vit_b() -> None:
    """The counts of papers.md, static prompt included (it is the expert prompt token of pMoE), to half a percent."""
    width, layers, length, c, h = 768, 12, 6, 768, 384
    for k, published in ((4, 0.96e6), (8, 1.18e6), (16, 1.62e6)):
        model = MoPE([Stream("vit_base", (width,) * layers)], Schema(NUMBERS), num_experts=k)
        counted = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("encoder."))
        routers = layers * (2 * (width + 1) + 8 * (c + 1))
        mapper = h * (c + 1) + 2 * h + (h + 1) * width
        static = layers * length * width
        assert counted == k * static + routers + mapper
        assert counted + static == pytest.approx(published, rel=0.005)


def test_state_goes_to_a_checkpoint_and_back() -> None:
    one, other = mope(seed=1).eval(), mope(seed=2).eval()
    condition, x = full_condition(), patches()
    assert not torch.equal(one.sites[0][0].key, other.sites[0][0].key)
    assert torch.equal(one.sites[0][0].key, mope(seed=1).sites[0][0].key)
    other.load_state_dict(one.state_dict())
    expected, _ = one(0, 1, x, one.encode(condition, BATCH))
    found, _ = other(0, 1, x, other.encode(condition, BATCH))
    assert torch.equal(found, expected)


# The router


def test_weights_sum_to_one_and_mix_the_prompts() -> None:
    model = mope().eval()
    prompts, weights = model(0, 0, patches(), model.encode(full_condition(), BATCH))
    torch.testing.assert_close(weights.sum(1), torch.ones(BATCH))
    experts = model.sites[0][0].prompts
    for b in range(BATCH):
        mixture = sum(weights[b, j] * experts[j] for j in range(4))
        torch.testing.assert_close(prompts[b, :6], mixture, atol=1e-5, rtol=1e-5)


def test_weights_follow_the_equation_in_float64() -> None:
    model = mope(temperature=0.3).double().eval()
    x, psi = patches().double(), torch.randn(BATCH, PSI).double()
    site = model.sites[0][1]
    pooled = x.flatten(2).mean(2)
    pooled = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    a = pooled @ site.image_query.weight.T + site.image_query.bias
    b = psi @ site.condition_query.weight.T + site.condition_query.bias
    logits = torch.cat([a, b], 1) @ site.key / 0.3
    expected = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(model(0, 1, x, psi)[1], expected, atol=1e-12, rtol=1e-10)


def test_one_prompt_expert_is_a_static_prompt() -> None:
    model = mope(num_experts=1).train()
    for condition in (full_condition(), None):
        prompts, weights = model(0, 0, patches(), model.encode(condition, BATCH))
        assert torch.equal(weights, torch.ones(BATCH, 1))
        assert torch.equal(prompts[:, :6], model.sites[0][0].prompts.expand(BATCH, -1, -1))


def test_noise_in_training_only() -> None:
    condition, x = full_condition(), patches()

    def two(model: MoPE) -> tuple[Tensor, Tensor]:
        psi = model.encode(condition, BATCH).detach()
        return model(0, 0, x, psi)[0], model(0, 0, x, psi)[0]

    assert torch.equal(*two(mope().eval()))
    assert not torch.equal(*two(mope().train()))
    assert torch.equal(*two(mope(noise=0.0).train()))
    assert not torch.equal(*two(mope(noise_at_eval=True).eval()))


def test_importance_is_of_clean_weights_unless_asked() -> None:
    x, psi = patches(), torch.randn(BATCH, PSI)
    clean = mope(noise=1.0).train()
    assert torch.equal(clean(0, 0, x, psi)[1], clean(0, 0, x, psi)[1])
    noisy = mope(noise=1.0, importance_on="noisy").train()
    assert not torch.equal(noisy(0, 0, x, psi)[1], noisy(0, 0, x, psi)[1])


@pytest.mark.parametrize("router", ROUTERS)
def test_the_router_sees_its_inputs_and_no_other(router: str) -> None:
    model = mope(router=router).eval()
    x, psi = patches(), torch.randn(BATCH, PSI)
    weights = model(0, 0, x, psi)[1]
    assert torch.equal(model(0, 0, patches(), psi)[1], weights) == (router == "condition")
    assert torch.equal(model(0, 0, x, torch.randn(BATCH, PSI))[1], weights) == (router == "image")


@pytest.mark.parametrize("k", [2, 4, 10, 16])
def test_keys_are_orthogonal(k: int) -> None:
    key = mope(num_experts=k).sites[0][0].key
    assert key.shape == (10, k)
    product = key.T @ key if k <= 10 else key @ key.T
    torch.testing.assert_close(product, torch.eye(min(k, 10)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frozen", [True, False])
def test_keys_stay_unless_they_train(frozen: bool) -> None:
    model = mope(frozen_keys=frozen).train()
    before = [model.sites[k][site].key.detach().clone() for k, site, _ in prompted_sites(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        psi = model.encode(full_condition(), BATCH)
        loss = sum(model(k, site, patches(w), psi)[0].square().sum() for k, site, w in prompted_sites(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = [model.sites[k][site].key for k, site, _ in prompted_sites(model)]
    same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert all(same) if frozen else not any(same)


def test_samples_do_not_depend_on_each_other() -> None:
    model = mope().eval()
    condition, x = full_condition(), patches()
    together = model(0, 0, x, model.encode(condition, BATCH))[0]
    for b in range(BATCH):
        one = {name: value[b : b + 1] for name, value in condition.items()}
        alone = model(0, 0, x[b : b + 1], model.encode(one, 1))[0]
        torch.testing.assert_close(alone, together[b : b + 1], atol=1e-5, rtol=1e-4)


def test_order_of_prompt_experts_does_not_matter() -> None:
    model, order = mope().eval(), torch.tensor([2, 0, 3, 1])
    x, psi = patches(), torch.randn(BATCH, PSI)
    prompts, weights = model(0, 0, x, psi)
    site = model.sites[0][0]
    with torch.no_grad():
        site.prompts.copy_(site.prompts[order].clone())
        site.key.copy_(site.key[:, order].clone())
    permuted, permuted_weights = model(0, 0, x, psi)
    torch.testing.assert_close(permuted, prompts, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(permuted_weights, weights[:, order], atol=1e-6, rtol=1e-5)


# The importance loss


def test_importance_loss_against_a_naive_one() -> None:
    """Mean over sites; those not above gamma count as zero, and have no gradient."""
    model = mope(importance_weight=0.5, importance_threshold=0.1)
    peaked = (4 * torch.randn(3, 8, 4, dtype=torch.float64)).softmax(2)
    peaked[:, :, 0] += 1
    even = torch.full((8, 4), 0.25, dtype=torch.float64) + 0.01 * torch.rand(8, 4, dtype=torch.float64)
    weights = [w.requires_grad_() for w in [*peaked, even]]
    expected = 0.0
    for each in weights:
        mass = each.detach().sum(0).tolist()
        mean = sum(mass) / 4
        variation = sum((m - mean) ** 2 for m in mass) / 4 / mean**2
        expected += variation if variation > 0.1 else 0.0
    loss = model.importance_loss(weights)
    assert loss.item() == pytest.approx(0.5 * expected / 4, rel=1e-12)
    assert expected > 0
    loss.backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights[:3])
    assert weights[3].grad is not None and not weights[3].grad.any()


def test_importance_loss_balances_the_prompt_experts() -> None:
    model = mope(importance_threshold=0.0, importance_weight=1.0, psi_dropout=0.0, noise=0.0, temperature=0.5).train()
    with torch.no_grad():
        model.sites[0][0].condition_query.bias += model.sites[0][0].key[2:, 0]  # favors the first
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    condition, x, losses = full_condition(), patches(), []
    for _ in range(60):
        loss = model.importance_loss([model(0, 0, x, model.encode(condition, BATCH))[1]])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_no_routers_no_loss() -> None:
    assert mope(dynamic=False).importance_loss([]).item() == 0


def test_a_batch_that_is_too_small_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mope().eval().encode(None, 1)
        mope(importance_weight=0).train().encode(None, 1)
        mope().train().encode(None, 4)
        assert not caplog.records
        model = mope().train()
        model.encode(None, 3)
        model.encode(None, 3)
    assert len(caplog.records) == 1
    assert "4 prompt experts over a batch of 3" in caplog.text


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    condition, x = full_condition(), patches()

    def gradients(call: Callable[..., Any]) -> list[Tensor]:
        model = mope(importance_weight=1.0, importance_threshold=0.0).train()
        torch.manual_seed(5)
        psi = model.encode(condition, BATCH)
        prompts, weights = call(model, 0, 0, x, psi)
        (prompts.square().sum() + model.importance_loss([weights])).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients(lambda model, *args: model(*args))
    again = gradients(lambda model, *args: checkpoint(model, *args, use_reentrant=False))
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


# Precision and batch size


def test_gradients_in_float64() -> None:
    streams = [Stream("tiny", (6,))]
    schema = Schema((*NUMBERS, CATEGORIES[0]))
    model = MoPE(streams, schema, num_prompts=2, num_experts=3, psi_width=5, mapper_width=4, temperature=0.5)
    model = model.double().eval()
    numbers = torch.tensor([[0.3, math.nan], [-1.2, 0.4]], dtype=torch.float64)
    condition = {"numbers": numbers, "categories": torch.tensor([[1], [0]])}
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:  # gradcheck moves the parameters where they are
        return model(0, 0, x, model.encode(condition, 2))

    assert torch.autograd.gradcheck(outputs, (x, *model.parameters()))


def test_bf16_autocast() -> None:
    model = mope(importance_threshold=0.0).train()
    condition, x = full_condition(), patches()
    with torch.autocast("cpu", torch.bfloat16):
        prompts, weights = model(0, 0, x, model.encode(condition, BATCH))
        loss = prompts.float().square().mean() + model.importance_loss([weights])
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(BATCH))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(0, 0, x, model.encode(condition, BATCH))[0]
    torch.testing.assert_close(low.float(), model(0, 0, x, model.encode(condition, BATCH))[0], atol=0.1, rtol=0.1)


def test_batch_of_one_trains() -> None:
    model = mope().train()
    prompts, weights = model(1, 2, patches(16, 1), model.encode(full_condition(1), 1))
    (prompts.square().sum() + model.importance_loss([weights])).backward()
    assert prompts.shape == (1, 7, 16)


# Reports


def test_records_and_rows() -> None:
    model = mope().eval()
    psi = model.encode(full_condition(4), 4)
    model(0, 1, patches(24, 4), psi)
    assert model.gates() == [] and model.routing() == []
    model.recording = True
    weights = {(k, s): model(k, s, patches(w, 4), psi)[1] for k, s, w in prompted_sites(model)}
    gates = model.gates()
    assert [(g.receiver, g.site) for g in gates] == [(STREAMS[k].name, s) for k, s in weights]
    assert gates[0].candidates == tuple(f"prompt expert {j}" for j in (1, 2, 3, 4))
    assert not gates[0].weights.requires_grad
    assert torch.equal(gates[0].weights, weights[0, 0])
    records = model.routing()
    assert len(records) == 6 and all(r.router == "mope" and 0 <= r.entropy <= 1 for r in records)
    assert all(sum(r.usage.values()) == pytest.approx(1, abs=1e-5) for r in records)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0: expected a whole number of at least 1"),
        ({"num_experts": 2.5}, "num_experts=2.5: expected a whole number of at least 1"),
        ({"temperature": 0.0}, r"temperature=0.0: expected a number above 0"),
        ({"temperature": "1"}, r"temperature='1': expected a number above 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"noise": -1.0}, r"noise=-1.0: expected a number of at least 0"),
        ({"importance_weight": -0.1}, "importance_weight=-0.1"),
        ({"importance_threshold": -0.1}, "importance_threshold=-0.1"),
        ({"query_widths": (2, 0)}, r"query_widths=\(2, 0\): expected two whole numbers of at least 1"),
        ({"query_widths": (2,)}, r"query_widths=\(2,\): expected two whole numbers of at least 1"),
        ({"query_widths": 10}, r"query_widths=10: expected two whole numbers of at least 1"),
        ({"mapper_width": 0}, "mapper_width=0"),
        ({"psi_width": 0}, "psi_width=0"),
        ({"psi_dropout": 1.0}, r"psi_dropout=1.0: expected a number of at least 0 and below 1"),
        ({"psi_dropout": -0.1}, "psi_dropout=-0.1"),
        ({"image_width": 0}, "image_width=0: expected a whole number of at least 1, for an image condition"),
        ({"router": "text"}, "router='text' is not known: choose one of multimodal, condition, image"),
        ({"importance_on": "top"}, "importance_on='top'"),
        ({"dynamic": False, "mapped": False}, "gives no prompt"),
        ({"num_experts": 0, "noise": -1.0}, "num_experts=0.*noise=-1.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mope(**settings)


def test_an_expert_that_is_there_twice_has_two_names() -> None:
    model = MoPE([STREAMS[0], STREAMS[0]], Schema(NUMBERS))
    model.recording = True
    for k in range(2):
        model(k, 0, patches(), model.encode(None, BATCH))
    assert [gate.receiver for gate in model.gates()] == ["first", "first (2)"]


def test_nothing_to_condition_on_or_nobody_to_prompt() -> None:
    with pytest.raises(ConfigError, match=r"conditions=\[\]"):
        MoPE(STREAMS, Schema(()))
    with pytest.raises(ConfigError, match="text_width=0"):
        MoPE(STREAMS, Schema(TEXTS))
    with pytest.raises(ConfigError, match="no expert is prompted"):
        MoPE(STREAMS[2:], Schema(NUMBERS))
