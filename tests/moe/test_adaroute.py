# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""AdaRoute: the identities of the method, and its numbers against a naive reading of the equations."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmoe.errors import ConfigError
from medmoe.experts import Expert
from medmoe.experts.base import Tokens
from medmoe.moe import adaroute
from medmoe.moe.adaroute import AdaRoute, RoutedAdapters, mix_results, mix_weights, mixes_weights, routed, wrap_swin
from medmoe.moe.routing import Router
from tests.networks.small import small_tiny_vit, small_vit

WIDTH, LAYERS = 12, 3


def adapters(lively: bool = True, width: int = WIDTH, layers: int = LAYERS, **options: Any) -> RoutedAdapters:
    """Adapters of one stage; ``lively`` ones have parameters so large that every part of the method matters."""
    options = {"rank": 6, "router_width": 5} | options
    made = RoutedAdapters(AdaRoute(**options), "expert", [width] * layers, [range(layers)])
    if lively:
        with torch.no_grad():
            for p in made.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return made


def patches(batch: int = 3, width: int = WIDTH, grid: tuple[int, int] = (5, 4)) -> Tensor:
    """As an expert hands them over: tokens (B, N, C), seen as a map."""
    return torch.randn(batch, grid[0] * grid[1], width).transpose(1, 2).unflatten(2, grid)


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def mixed_by_hand(weights: Tensor, experts: Tensor) -> Tensor:
    total = torch.zeros_like(experts[0])
    for weight, expert in zip(weights, experts, strict=True):
        total = total + weight * expert
    return total


def one_by_hand(made: RoutedAdapters, index: int, patch_map: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The seven steps for one image (C, h, w), nothing folded or reordered."""
    own: Any = made.layers[index]
    experts: Any = made.centers[made.center_of[index]]
    channels, height, width = patch_map.shape
    s = patch_map.permute(1, 2, 0)
    normal = (s - s.mean(-1, keepdim=True)) / (s.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = s + own.norm_scale * (normal * own.norm.weight + own.norm.bias)
    if own.kernels:
        static = F.conv2d(x.permute(2, 0, 1)[None], own.before.weight, own.before.bias, padding=1, groups=channels)
        x = x + static[0].permute(1, 2, 0)
    logits = own.router(x.reshape(-1, channels).mean(0)).view(2 + len(own.kernels), -1)
    names = ["A", "B"] + [f"conv{k}" for k in own.kernels]
    gates = {name: torch.softmax(row, 0) for name, row in zip(names, logits, strict=True)}
    z = x @ mixed_by_hand(gates["A"], experts["A"])
    maps: list[Tensor] = []
    for i, k in enumerate(own.kernels):
        enters = z if i == 0 else own.carry[2 * i - 2] * z + own.carry[2 * i - 1] * maps[-1]
        kernel = mixed_by_hand(gates[f"conv{k}"], experts[f"conv{k}"])
        image = F.pad(enters.permute(2, 0, 1), [k // 2] * 4)
        out = torch.stack(
            [(image[:, a : a + k, b : b + k] * kernel).sum((1, 2)) for a in range(height) for b in range(width)]
        )
        maps.append(out.view(height, width, -1))
    shares = torch.softmax(own.aggregate(sum(maps)), -1) if len(maps) > 1 else torch.ones(height, width, 1)
    z = z + sum(shares[..., i : i + 1] * each for i, each in enumerate(maps or [z]))
    z = z + own.proj(z)
    y = F.gelu(z) @ mixed_by_hand(gates["B"], experts["B"])
    if own.kernels:
        static = F.conv2d(y.permute(2, 0, 1)[None], own.behind.weight, own.behind.bias, padding=1, groups=channels)
        y = y + static[0].permute(1, 2, 0)
    residual = s if own.residual_scale is None else own.residual_scale * s + own.residual_bias
    return (own.scale * y + own.bias + residual).permute(2, 0, 1), gates


@pytest.mark.parametrize("kernels", [(3, 5, 7), (5, 3), (3,), ()])
@pytest.mark.parametrize("grid", [(5, 4), (7, 7), (2, 1), (1, 1)])
@pytest.mark.parametrize("residual", [True, False])
def test_equals_the_written_equations(kernels: tuple[int, ...], grid: tuple[int, int], residual: bool) -> None:
    made = adapters(kernels=kernels, residual_scale=residual).double()
    made.recording = True
    given = patches(grid=grid).double()
    for index in range(LAYERS):
        out = made(index, given)
        for i, one in enumerate(given):
            expected, gates = one_by_hand(made, index, one)
            assert (out[i] - expected).abs().max() < 1e-9 * expected.abs().max()
            for part, weights in gates.items():
                assert (made.last[index][part][i] - weights).abs().max() < 1e-12


def test_starts_near_the_identity() -> None:
    made = adapters(lively=False, width=768, layers=12, rank=128, router_width=16)
    given = patches(2, 768, (6, 6))
    change = (made(0, given) - given).norm() / given.norm()
    assert 0.002 < change < 0.03


@pytest.mark.parametrize(("tokens", "count"), [(1, 5), (2, 3), (7, 1), (7, 2), (2, 4), (30, 12)])
def test_both_orders_of_contraction_agree(tokens: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, experts = torch.randn(3, tokens, 9).double(), torch.randn(count, 9, 4).double()
    gates = torch.rand(3, count).double().softmax(1)
    results = []
    for order in (mix_weights, mix_results, routed):
        given = [t.clone().requires_grad_() for t in (x, gates, experts)]
        out = order(*given)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for first, second, chosen in zip(*results, strict=True):
        assert torch.allclose(first, second, atol=1e-12) and torch.allclose(first, chosen, atol=1e-12)
    used = []
    for name in ("mix_weights", "mix_results"):
        monkeypatch.setattr(adaroute, name, lambda *_, name=name: used.append(name) or x)
    routed(x, gates, experts)
    assert used == ["mix_weights" if mixes_weights(tokens, count) else "mix_results"]
    assert mixes_weights(tokens, count) == ((tokens, count) in [(7, 2), (2, 4), (30, 12)])


def bytes_saved(made: RoutedAdapters, given: Tensor) -> int:
    """Held for the backward pass beyond the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (given, *made.parameters())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = made(0, given)
    assert out.requires_grad  # the graph lives on while its bytes are counted
    return sum(sizes.values())


def test_no_mixed_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, width, rank, count = 4, 96, 24, 6
    made = adapters(width=width, layers=count, rank=rank)
    given = patches(batch, width, (6, 6)).requires_grad_()
    saved = bytes_saved(made, given)
    monkeypatch.setattr(adaroute, "checkpoint", lambda function, *arguments, **_: function(*arguments))
    kept = bytes_saved(made, given)
    assert kept - saved >= 2 * batch * width * rank * 4
    # Three maps of the expert's width, eleven or so of the adapter's: nothing that grows with C r.
    assert saved < 1.1 * 4 * batch * 36 * (3 * width + 13 * rank)


def test_gates_sum_to_one_and_are_reported() -> None:
    made = adapters()
    assert isinstance(made, Router)
    made(1, patches())
    assert made.gates() == [] and made.routing() == []
    made.recording = True
    for index in range(LAYERS):
        made(index, patches())
    gates = made.gates()
    assert [(g.site, g.part) for g in gates] == [
        (i, p) for i in range(3) for p in ("A", "B", "conv3", "conv5", "conv7")
    ]
    for gate in gates:
        assert gate.router == "adaroute" and gate.receiver == "expert"
        assert gate.weights.shape == (3, LAYERS) == (3, len(gate.candidates)) and gate.weights.dtype == torch.float32
        assert (gate.weights.sum(1) - 1).abs().max() < 1e-6 and gate.weights.min() > 0
        assert gate.weights.std(0).max() > 0
    records = made.routing()
    assert [(r.router, r.expert, r.site) for r in records] == [("adaroute", "expert", i) for i in range(3)]
    assert all(0 < r.entropy <= 1 and abs(sum(r.usage.values()) - 1) < 1e-5 for r in records)


def test_one_candidate_depends_on_no_image() -> None:
    for options in ({"centers": 1}, {"num_experts": 1}):
        made = adapters(**options)
        made.recording = True
        made(0, patches())
        assert all((g.weights == 1).all() for g in made.gates())
        made(0, patches()).square().sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in made.layers[0].router.parameters())


def test_identical_images_have_identical_gates() -> None:
    made = adapters()
    made.recording = True
    out = made(0, patches(1).expand(3, -1, -1, -1))
    assert (out - out[:1]).abs().max() < 1e-6
    assert all((g.weights - g.weights[:1]).abs().max() < 1e-6 for g in made.gates())


def test_an_image_does_not_depend_on_its_batch() -> None:
    made, given = adapters(), patches(4)
    together = made(2, given)
    for i in range(4):
        assert torch.allclose(made(2, given[i : i + 1])[0], together[i], atol=1e-5)
    changed = given.clone()
    changed[1:] += 1
    assert torch.allclose(made(2, changed)[0], together[0], atol=1e-5)
    assert not torch.allclose(made(2, changed)[1], together[1], atol=1e-2)


def test_permuting_the_candidates_changes_nothing() -> None:
    made, given = adapters(), patches()
    other = copy.deepcopy(made)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for experts in other.centers[0].parameters():
            experts.copy_(experts[order])
        for layer in other.layers:
            for p in layer.router[2].parameters():
                p.copy_(p.unflatten(0, (5, LAYERS))[:, order].flatten(0, 1))
    for index in range(LAYERS):
        assert torch.allclose(made(index, given), other(index, given), atol=1e-5)


@pytest.mark.parametrize("kernels", [(3, 1), ()])
@pytest.mark.parametrize("grid", [(2, 2), (1, 1)])
def test_gradients_by_finite_differences(kernels: tuple[int, ...], grid: tuple[int, int]) -> None:
    made = adapters(width=3, layers=2, rank=2, router_width=2, kernels=kernels, learn_temperature=True).double()
    given = patches(2, 3, grid).double().requires_grad_()
    names = [name for name, _ in made.named_parameters() if "layers.1" not in name]
    values = [made.get_parameter(name).detach().requires_grad_() for name in names]

    def result(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (0, x))

    assert torch.autograd.gradcheck(result, (given, *values))


def test_every_parameter_learns() -> None:
    made = adapters(lively=False, learn_temperature=True)
    sum(made(i, patches()).square().mean() for i in range(LAYERS)).backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_temperature_and_where_the_branch_starts() -> None:
    def entropy(temperature: float, learn: bool) -> float:
        torch.manual_seed(1)
        made = adapters(temperature=temperature, learn_temperature=learn, lively=False)
        with torch.no_grad():
            for layer in made.layers:
                layer.router[2].weight.mul_(5)
        made.recording = True
        made(0, patches())
        return made.routing()[0].entropy

    assert entropy(0.1, False) < entropy(1, False) < entropy(10, False) < 1
    assert entropy(0.1, True) == entropy(0.1, False) and entropy(1e9, False) == pytest.approx(1)
    given = patches()
    shut = adapters(lively=False, ls_init=0.0)
    assert torch.equal(shut(0, given), given)
    assert "layers.0.sharpness" not in shut.state_dict()
    assert "layers.0.sharpness" in dict(adapters(learn_temperature=True).named_parameters())


def formula(width: int, layers: int, rank: int, kernels: tuple[int, ...], count: int, sites: int = 1) -> int:
    """The docstring's, for layers that share a center."""
    n, h = len(kernels), 16
    center = count * rank * (2 * width + sum(k * k for k in kernels))
    layer = width * (h + 7) + h + (n + 2) * count * (h + 1) + rank * (rank + 1)
    convolutions = 20 * width + 2 * (n - 1) + (n * (rank + 1) if n > 1 else 0) if n else 0
    return center + sites * layers * (layer + convolutions)


@pytest.mark.parametrize(("options", "millions"),
    [({}, 3.10), ({"kernels": ()}, 2.77), ({"rank": 64}, 1.70), ({"rank": 32}, 1.04), ({"rank": 16}, 0.72),
     ({"centers": 3}, 3.09)],
)  # fmt: skip
def test_parameter_counts_of_vit_b(options: dict[str, Any], millions: float) -> None:
    vit_b: Any = SimpleNamespace(name="vit_b", widths=(768,) * 12, stages=(range(12),), after=None)
    adapter = AdaRoute(**options)
    assert adapter.attach(vit_b)
    found = trainable(vit_b.after)
    assert abs(found / 1e6 - millions) < 0.006
    groups = adapter.groups(vit_b.stages, "vit_b")
    assert found == sum(formula(768, len(g), adapter.rank, tuple(adapter.kernels), len(g)) for g in groups)


def test_parameter_counts_of_swin_b() -> None:
    with torch.device("meta"):
        swin = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
        wrap_swin(swin, AdaRoute())
    stages = zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True)
    assert trainable(swin) == sum(formula(width, blocks, 128, (3, 5, 7), blocks, 2) for width, blocks in stages)
    norms = 2 * (128 + 256 + 512 + 1024)
    assert round(trainable(swin) / 1e6, 2) == round((trainable(swin) + norms) / 1e6, 2) == 5.24


def small_swin() -> Any:
    return timm.models.swin_transformer.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=0,
        drop_path_rate=0.0,
    ).eval()  # fmt: skip


def test_a_small_swin_is_adapted_and_trains() -> None:
    swin = small_swin()
    image = torch.rand(2, 3, 32, 32)
    before, frozen = swin(image), copy.deepcopy(swin.state_dict())
    assert torch.allclose(wrapped(swin, ls_init=0.0)(image), before, atol=1e-5)
    model = wrapped(swin)
    assert not torch.allclose(model(image), before, atol=1e-4)
    assert [name for name, p in model.named_parameters() if p.requires_grad != name.startswith("after.")] == []
    assert len([name for name in model.state_dict() if name.endswith("centers.1.A")]) == 1
    model.after.recording = True
    model(image).square().mean().backward()
    assert sorted({g.site for g in model.after.gates()}) == list(range(6))
    torch.optim.SGD(model.after.parameters(), 0.1).step()
    after = {name.replace(".block.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    with pytest.raises(ConfigError, match="rank=0"):
        wrap_swin(small_swin(), AdaRoute(rank=0))


def wrapped(swin: Any, **options: Any) -> Any:
    model = copy.deepcopy(swin)
    assert wrap_swin(model, AdaRoute(rank=4, **options)) is model.after
    return model


@pytest.fixture(params=["vit", "tiny"])
def expert(request: pytest.FixtureRequest) -> Expert:
    return small_vit() if request.param == "vit" else small_tiny_vit()


def test_only_patch_tokens_change(expert: Expert) -> None:
    """Nor does the router see the prefix: class token and registers may be anything."""
    AdaRoute(rank=4, kernels=(3,)).attach(expert)
    x = torch.randn(2, 3 + 20, expert.widths[0])
    out = expert.adapt(0, Tokens(x, (4, 5), 3)).x
    assert torch.equal(out[:, :3], x[:, :3]) and not torch.equal(out[:, 3:], x[:, 3:])
    x = torch.cat([torch.randn(2, 3, expert.widths[0]), x[:, 3:]], 1)
    assert torch.equal(expert.adapt(0, Tokens(x, (4, 5), 3)).x[:, 3:], out[:, 3:])


def test_centers_follow_the_stages(expert: Expert) -> None:
    assert AdaRoute(rank=0).attach(expert) is False and expert.after is None
    assert AdaRoute(rank=4).attach(expert) is True
    found = [tuple(center["A"].shape[:2]) for center in expert.after.centers]
    assert found == [(len(stage), expert.widths[stage.start]) for stage in expert.stages]
    AdaRoute(rank=4, centers=1).attach(expert)
    assert expert.after.center_of == list(range(len(expert.widths)))
    AdaRoute(rank=4, centers=2, num_experts=5).attach(expert)
    assert {center["A"].shape[0] for center in expert.after.centers} == {5}
    with pytest.raises(ConfigError, match=rf"centers=9.*{expert.name}.*expected 1 to \d"):
        AdaRoute(rank=4, centers=9).attach(expert)


@pytest.mark.parametrize("size", [(32, 32), (32, 23), (17, 32)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_step_in_an_expert(expert: Expert, size: tuple[int, int], precision: str) -> None:
    """Batch 1, odd sizes, both precisions; what was frozen stays bitwise the same."""
    frozen = copy.deepcopy(expert.state_dict())
    AdaRoute(rank=4).attach(expert)
    expert.train()
    expert.after.recording = True
    optimizer = torch.optim.AdamW([p for p in expert.parameters() if p.requires_grad], 1e-2)
    image = torch.rand(1, 1, *size)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            maps = expert(image)
        loss = sum(m.float().square().mean() for m in maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(g.dtype == torch.float32 for parts in expert.after.last.values() for g in parts.values())
    assert all((g.weights.sum(1) - 1).abs().max() < 1e-6 for g in expert.after.gates())
    after = expert.state_dict()
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert {n for n, p in expert.named_parameters() if p.requires_grad} == {
        f"after.{n}" for n, _ in expert.after.named_parameters()
    }


def test_bfloat16_is_near_float32() -> None:
    made, given = adapters(lively=False), patches()
    exact = made(0, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = made(0, given)
    assert rounded.dtype == given.dtype and (rounded - exact).abs().max() < 0.01 * exact.abs().max()


def test_the_router_works_in_float32_under_autocast() -> None:
    made, given = adapters(kernels=()), patches()
    made.recording = True
    gates = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            made(0, given)
        gates.append(made.gates())
    assert all(torch.equal(exact.weights, found.weights) for exact, found in zip(*gates, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activation_checkpointing_gives_the_same_gradients(precision: str) -> None:
    made = adapters(lively=False)
    gradients = []
    for recompute in (False, True):
        given = patches(2).copy_(torch.linspace(-1, 1, 480).view(2, WIDTH, 5, 4)).requires_grad_()
        made.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            out = checkpoint(made, 0, given, use_reentrant=False) if recompute else made(0, given)
        out.square().sum().backward()
        used = [p.grad.clone() for p in made.parameters() if p.grad is not None]
        gradients.append([given.grad, *used])
    assert len(gradients[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_state_survives_saving(expert: Expert) -> None:
    AdaRoute(rank=4).attach(expert)
    other = copy.deepcopy(expert)
    with torch.no_grad():
        for p in expert.after.parameters():
            p.add_(0.1 * torch.randn_like(p))
    image = torch.rand(2, 1, 32, 32)
    assert not torch.equal(other(image)[-1], expert(image)[-1])
    state = {name: value for name, value in expert.state_dict().items() if name.startswith("after.")}
    assert "after.centers.0.conv3" in state and "after.layers.0.router.0.weight" in state
    assert other.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(other(image)[-1], expert(image)[-1])


@pytest.mark.parametrize(("key", "value", "allowed"),
    [("rank", -1, "at least 0"), ("rank", 1.5, "at least 0"), ("router_width", 0, "at least 1"),
     ("num_experts", 0, "at least 1"), *(("temperature", value, "a number above 0") for value in (0, math.nan, "1")),
     ("ls_init", math.inf, "a finite number"), ("ls_init", "1", "a finite number"),
     *(("kernels", value, "a list of different odd") for value in (3, "357", [4], [3, 3], ["3"], [3.0], [True])),
     *(("centers", value, "'stage', or a whole number .* at least 1") for value in (0, "stages", True, 1.0))],
)  # fmt: skip
def test_refuses_values_out_of_range(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.*{allowed}") as caught:
        AdaRoute(**{key: value})
    assert str(value) in str(caught.value)
