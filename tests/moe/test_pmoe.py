# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""pMoE: the identities of the method, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medmoe.errors import ConfigError
from medmoe.moe import PMoE, State, Stream
from medmoe.moe.pmoe import DISPATCHES, pool_patches
from medmoe.moe.routing import distinct
from tests.networks.small import swapped_experts

BATCH, SLOTS = 2, 4


def streams(widths: tuple[tuple[int, ...], ...] = ((24, 24, 24), (16, 16, 20))) -> list[Stream]:
    return [Stream(f"expert{k}", each, 16) for k, each in enumerate(widths)]


def states(pmoe: PMoE, site: int, seed: int = 0) -> list[State]:
    generator = torch.Generator().manual_seed(seed + 100 * site)
    result = []
    for stream in pmoe.streams:
        before = stream.widths[max(site - 1, 0)]
        patches = torch.randn(BATCH, stream.widths[site], 5, 6, generator=generator)
        outputs = torch.randn(BATCH, SLOTS, before, generator=generator) if site else None
        result.append(State(patches, outputs))
    return result


def prompts(pmoe: PMoE, site: int = 1, given: list[State] | None = None) -> list[Tensor]:
    result = pmoe(site, given or states(pmoe, site))
    assert all(p is not None for p in result)
    return [p if p.dim() == 3 else p.expand(BATCH, -1, -1) for p in result]


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("form", ["soft", "residual"])
@pytest.mark.parametrize("exchange", ["params", "activations"])
def test_shapes_and_gradients_of_every_variant(dispatch: str, form: str, exchange: str) -> None:
    pmoe = PMoE(streams(), SLOTS, dispatch, form, exchange)
    for site in range(3):
        for stream, p in zip(pmoe.streams, prompts(pmoe, site), strict=True):
            assert p.shape == (BATCH, SLOTS, stream.widths[site])
    loss = sum(p.square().sum() for site in range(3) for p in prompts(pmoe, site))
    loss.backward()
    missing = [name for name, p in pmoe.named_parameters() if p.grad is None]
    assert not missing


def test_none_is_the_plain_prompt() -> None:
    pmoe = PMoE(streams(), SLOTS, dispatch="none")
    for k, p in enumerate(pmoe(1, states(pmoe, 1))):
        assert p is pmoe.prompts[k][1]


@pytest.mark.parametrize("exchange", ["params", "activations"])
def test_one_hot_weights_on_the_own_prompts_are_vpt(exchange: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pmoe = PMoE(streams(), SLOTS, "soft", "soft", exchange)
    for k in range(2):
        dispatcher = pmoe.dispatchers[k][1]

        def one_hot(tokens: Tensor, own: Tensor) -> Tensor:
            match = (tokens[0][:, None] == own[None]).all(-1).float()
            return match.expand(BATCH, -1, -1)

        monkeypatch.setattr(dispatcher, "weigh_tokens", one_hot)
    for k, p in enumerate(prompts(pmoe)):
        assert torch.equal(p, pmoe.prompts[k][1].expand(BATCH, -1, -1))


def test_soft_dispatch_equals_the_written_equation() -> None:
    pmoe = PMoE(streams(((24, 24),)), SLOTS, "soft", "soft", "params")
    state = states(pmoe, 1)[0]
    x = torch.cat(
        [pmoe.prompts[0][1].expand(BATCH, -1, -1), state.outputs, state.patches.flatten(2).transpose(1, 2)], 1
    )
    normalized = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    s = torch.softmax(normalized @ pmoe.dispatchers[0][1].weight, 1)
    assert (prompts(pmoe)[0] - s.transpose(1, 2) @ x).abs().max() < 1e-5


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("exchange", ["params", "activations"])
def test_permuting_the_experts_permutes_the_prompts(dispatch: str, exchange: str) -> None:
    one = PMoE(streams(), SLOTS, dispatch, "residual", exchange)
    other = PMoE(one.streams[::-1], SLOTS, dispatch, "residual", exchange)
    other.load_state_dict(swapped_experts(one.state_dict()))
    given = states(one, 2)
    for mine, theirs in zip(prompts(one, 2, given), prompts(other, 2, given[::-1])[::-1], strict=True):
        assert (mine - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("dispatch", [d for d in DISPATCHES if d != "none"])
def test_exchange_decides_what_crosses(dispatch: str) -> None:
    """With "params" nothing that depends on the other expert's image arrives; with "activations" its outputs do."""
    for exchange, crosses in (("params", False), ("activations", True)):
        pmoe = PMoE(streams(), SLOTS, dispatch, "residual", exchange)
        given = states(pmoe, 1)
        changed = [given[0], State(given[1].patches + 1, given[1].outputs * 2 + 1)]
        differs = not torch.allclose(prompts(pmoe, 1, given)[0], prompts(pmoe, 1, changed)[0])
        assert differs == crosses


def test_experts_without_prompts_lend_context() -> None:
    pair = [Stream("prompted", (24, 24)), Stream("frozen", (), prompted=False, context=12)]
    pmoe = PMoE(pair, SLOTS, exchange="activations")
    patches, context = torch.randn(BATCH, 24, 4, 4), torch.randn(BATCH, 16, 12)
    first, none = pmoe(0, [State(patches, None), State(None, context)])
    other, _ = pmoe(0, [State(patches, None), State(None, context + 1)])
    assert none is None and first is not None and not torch.allclose(first, other)


def test_slots_differ_after_training_steps() -> None:
    """Zero-initialized dispatchers keep all slots alike for ever; ours must not."""
    pmoe = PMoE(streams(), SLOTS, "soft", "soft")
    optimizer = torch.optim.AdamW(pmoe.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().mean() for p in prompts(pmoe)).backward()
        optimizer.step()
    p = prompts(pmoe)[0][0]
    assert torch.pdist(p).min() > 1e-4


@pytest.mark.parametrize("dispatch", [d for d in DISPATCHES if d != "none"])
def test_routing_is_reported(dispatch: str) -> None:
    pmoe = PMoE(streams(), SLOTS, dispatch)
    prompts(pmoe)
    assert pmoe.routing() == []
    pmoe.recording = True
    prompts(pmoe)
    records = pmoe.routing()
    assert [(r.expert, r.site) for r in records] == [("expert0", 1), ("expert1", 1)]
    for record in records:
        assert 0 < record.entropy <= 1
        assert abs(sum(record.usage.values()) - 1) < 1e-5 and min(record.usage.values()) > 0
        assert abs(sum(record.sources.values()) - 1) < 1e-5


def test_an_expert_that_is_there_twice_has_two_names() -> None:
    """Its usage and sources are told apart, and so are those of any third."""
    same = [Stream("vit", (16, 16)), Stream("tiny", (16, 16)), Stream("vit", (16, 16)), Stream("vit", (16, 16))]
    pmoe = PMoE(same, SLOTS)
    names = ["vit", "tiny", "vit (2)", "vit (3)"]
    assert [stream.name for stream in pmoe.streams] == names
    pmoe.recording = True
    prompts(pmoe)
    records, gates = pmoe.routing(), pmoe.gates()
    assert [record.expert for record in records] == names and [gate.receiver for gate in gates] == names
    for record in records:
        assert list(record.usage) == names and abs(sum(record.usage.values()) - 1) < 1e-5
    assert all(len(set(gate.candidates)) == len(gate.candidates) for gate in gates)
    assert distinct(["a (2)", "a", "a", ""]) == ["a (2)", "a", "a (3)", ""]


def test_topk_uses_k_tokens_a_slot() -> None:
    pmoe = PMoE(streams(), SLOTS, "topk", top_k=3)
    pmoe.recording = True
    prompts(pmoe)
    weights = pmoe.last[0, 1][0]
    assert ((weights > 0).sum(1) == 3).all()
    assert (weights.sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 5, 50])
def test_one_to_three_experts_and_one_to_fifty_prompts(count: int, slots: int) -> None:
    pmoe = PMoE(streams(((24, 24), (16, 20), (20, 20))[:count]), slots, "soft")
    given = [State(torch.randn(BATCH, s.widths[0], 4, 4), None) for s in pmoe.streams]
    assert [p.shape for p in pmoe(0, given)] == [(BATCH, slots, s.widths[0]) for s in pmoe.streams]


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_shared_prompts_are_the_first_experts_in_all(dispatch: str) -> None:
    own, shared = PMoE(streams(), SLOTS, dispatch), PMoE(streams(), SLOTS, dispatch, shared=True)
    assert not len(shared.prompts[1]) and len(own.prompts[1]) == 3
    sum(p.square().sum() for site in range(3) for p in prompts(shared, site)).backward()
    assert not [name for name, p in shared.named_parameters() if p.grad is None]
    same = PMoE(streams(((24,), (24,))), SLOTS, "none", shared=True)
    assert same.own_prompts(1, 0) is same.prompts[0][0]


@pytest.mark.parametrize("dispatch", [d for d in DISPATCHES if d != "none"])
def test_a_condition_reaches_the_prompts_and_its_share_is_told(dispatch: str) -> None:
    torch.manual_seed(0)
    pmoe = PMoE(streams(), SLOTS, dispatch, top_k=80)
    pmoe.recording = True
    given = states(pmoe, 1)
    conditioned = [
        state._replace(condition=torch.randn(BATCH, 3, stream.widths[1]))
        for state, stream in zip(given, pmoe.streams, strict=True)
    ]
    without = prompts(pmoe, 1, given)
    for a, b in zip(without, prompts(pmoe, 1, conditioned), strict=True):
        assert (a - b).abs().max() > 1e-6
    for gates in pmoe.gates():
        assert gates.candidates[-1] == "condition" and gates.weights.shape == (BATCH, len(gates.candidates))
        assert (gates.weights.sum(1) - 1).abs().max() < 1e-5
    assert "prompts of expert1" in pmoe.gates()[0].candidates and "outputs of expert0" in pmoe.gates()[1].candidates


def test_gates_belong_to_the_image() -> None:
    """The shares of an image are the same alone and in a batch, and differ between images."""
    pmoe = PMoE(streams(), SLOTS)
    pmoe.recording = True
    given = states(pmoe, 1)
    prompts(pmoe, 1, given)
    together = pmoe.gates()[0].weights
    pmoe(1, [State(s.patches[1:], s.outputs[1:]) for s in given])
    assert (pmoe.gates()[0].weights[0] - together[1]).abs().max() < 1e-6
    assert (together[0] - together[1]).abs().max() > 1e-5


def test_gradients_by_finite_differences() -> None:
    pmoe = PMoE(streams(((6, 6), (4, 4))), 2).double()
    given = [State(torch.randn(1, w, 2, 2).double(), torch.randn(1, 2, w).double()) for w in (6, 4)]

    def result(patches: Tensor, outputs: Tensor) -> Tensor:
        return torch.cat([p.flatten() for p in pmoe(1, [State(patches, outputs), given[1]])])

    assert torch.autograd.gradcheck(result, tuple(t.clone().requires_grad_() for t in given[0][:2]))


def test_pooling_keeps_the_mean_and_the_limit() -> None:
    patches = torch.randn(2, 8, 32, 32)
    pooled = pool_patches(patches, 256)
    assert pooled.shape == (2, 256, 8)
    assert (pooled.mean(1) - patches.mean((2, 3))).abs().max() < 1e-5
    assert pool_patches(torch.randn(1, 8, 100, 3), 64).shape[1] <= 64
    assert pool_patches(torch.randn(1, 8, 4, 5), 256).shape[1] == 20


def test_refuses_unknown_settings() -> None:
    numbers = ({"num_prompts": 0}, {"num_prompts": 2.5}, {"num_prompts": True}, {"top_k": "4"}, {"max_patches": 0})
    for wrong in ({"dispatch": "sotf"}, {"form": "hard"}, {"exchange": "all"}, *numbers):
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            PMoE(streams(), **wrong)
    with pytest.raises(ConfigError, match="no expert is prompted"):
        PMoE([Stream("a", (8,), prompted=False, context=8)])


@pytest.mark.parametrize(("widths", "slots", "dispatcher"), [((768,) * 12, 10, 92_160), ((768,) * 12, 50, 460_800)])
def test_parameter_counts_of_the_default(widths: tuple[int, ...], slots: int, dispatcher: int) -> None:
    """papers.md's arithmetic for ViT-B: prompts and soft dispatchers are of equal size."""
    pmoe = PMoE([Stream("a", widths), Stream("b", widths)], slots, form="soft")
    assert sum(p.numel() for p in pmoe.prompts.parameters()) == 2 * dispatcher
    assert sum(p.numel() for p in pmoe.dispatchers.parameters()) == 2 * dispatcher
    assert not list(pmoe.maps.parameters())
