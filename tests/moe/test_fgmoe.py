# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""FGMoE: the equations, the identities and the two ways to compute them, on fresh random inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmoe.errors import ConfigError
from medmoe.moe.fgmoe import DeformableConvolution, FGMoE, SlicedMLP, keep_top_k
from medmoe.moe.routing import flat_metrics

TASKS = ("organs", "edges", "distance")
CHANNELS, GRID = 16, (5, 7)


def fgmoe(channels: int = CHANNELS, **settings: Any) -> FGMoE:
    return FGMoE(channels, TASKS, **settings)


def features(batch: int = 2, grid: tuple[int, ...] = GRID, channels: int = CHANNELS, **kind: Any) -> Tensor:
    return torch.randn(batch, channels, *grid, **kind)


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def by_the_equations(model: FGMoE, x: Tensor, top_k: int, renormalize: bool) -> dict[str, Tensor]:
    """The equations of the docstring, slice by slice; with mixer="none" and one gate a token."""

    def slices(mlp: SlicedMLP, u: Tensor) -> Tensor:
        parts = zip(
            mlp.up.weight.split(mlp.width),
            mlp.up.bias.split(mlp.width),
            mlp.down.weight.split(mlp.width, 1),
            strict=True,
        )
        return torch.stack([F.gelu(u @ w1.T + b1) @ w2.T for w1, b1, w2 in parts])

    def kept(p: Tensor) -> Tensor:
        g = p.where(p >= p.topk(top_k, -1).values[..., -1:], 0.0)
        return g / g.sum(-1, keepdim=True) if renormalize else g

    tokens = as_tokens(F.layer_norm(x.movedim(1, -1), x.shape[1:2], model.norm.weight, model.norm.bias).movedim(-1, 1))
    results = {}
    for t, (task, path) in enumerate(zip(model.tasks, model.paths.values(), strict=True)):
        g = kept((tokens @ path.gate.router.weight.T).softmax(-1))
        outputs = slices(path.experts, tokens)
        y = tokens + path.experts.down.bias + outputs[g.shape[-1] :].sum(0)
        y = y + sum(g[..., i, None] * outputs[i] for i in range(g.shape[-1]))
        gate = model.shared.gate
        both = torch.cat([tokens, gate.embedding[t].expand_as(tokens)], -1)
        q = (both @ torch.cat([gate.router.weight, gate.requirement.weight], 1).T).softmax(-1)
        outputs = slices(model.shared.experts, tokens)
        y = y + model.shared.experts.down.bias + sum(q[..., j, None] * outputs[j] for j in range(q.shape[-1]))
        results[task] = y.transpose(1, 2).unflatten(2, x.shape[2:])
    return results


@pytest.mark.parametrize("execution", ["dense", "gather"])
@pytest.mark.parametrize(("top_k", "num_shared", "renormalize"), [(8, 0, False), (3, 1, False), (2, 2, True)])
def test_equations(execution: str, top_k: int, num_shared: int, renormalize: bool) -> None:
    model = fgmoe(top_k=top_k, num_shared=num_shared, renormalize=renormalize, mixer="none", execution=execution)
    model.double()
    x = features(dtype=torch.float64)
    expected = by_the_equations(model, x, top_k, renormalize)
    found = model(x)[0]
    assert list(found) == list(TASKS)
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", ["none", "deformable"])
def test_without_the_residual_the_mixers_result_is_not_added(mixer: str) -> None:
    one, other = (fgmoe(mixer=mixer, residual=residual).double() for residual in (True, False))
    other.load_state_dict(one.state_dict())
    x = features(dtype=torch.float64)
    normal = one.norm(x.movedim(1, -1)).movedim(-1, 1)
    for task in TASKS:
        mixed = one.paths[f"task_{task}"].mixer(normal)
        torch.testing.assert_close(one(x)[0][task] - other(x)[0][task], mixed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("execution", ["dense", "gather"])
def test_all_gates_at_one_is_the_undivided_mlp(execution: str) -> None:
    sliced = SlicedMLP(CHANNELS, 8, 4, 0, 4, execution).double()
    whole = nn.Sequential(nn.Linear(CHANNELS, 32), nn.GELU(), nn.Linear(32, CHANNELS)).double()
    sliced.load_state_dict({k.replace("0.", "up.").replace("2.", "down."): v for k, v in whole.state_dict().items()})
    x = torch.randn(2, 35, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(sliced(x, x.new_ones(2, 35, 4)), whole(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("granularity", ["token", "image"])
@pytest.mark.parametrize(("top_k", "global_top_k"), [(1, 1), (3, 2), (8, None)])
def test_both_paths_give_the_same_numbers_and_gradients(
    dtype: torch.dtype, tolerance: float, granularity: str, top_k: int, global_top_k: int | None
) -> None:
    settings = {"top_k": top_k, "global_top_k": global_top_k, "granularity": granularity}
    first, second = (fgmoe(execution=way, **settings).to(dtype) for way in ("dense", "gather"))
    second.load_state_dict(first.state_dict())
    x = features(dtype=dtype).requires_grad_()
    weights = features(dtype=dtype)
    found = []
    for model in (first, second):
        outputs, auxiliary = model(x)
        total = sum((y * weights).mean() for y in outputs.values()) + auxiliary["fgmoe_balance"]
        found.append((outputs, torch.autograd.grad(total, [x, *model.parameters()])))
    for task in TASKS:
        torch.testing.assert_close(found[0][0][task], found[1][0][task], rtol=0, atol=tolerance)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_auto_gathers_where_it_was_measured_to_be_faster() -> None:
    weights = torch.zeros(2, 512, 9)
    assert SlicedMLP(8, 32, 8, 1, 2, "auto").gathers(weights)
    assert not SlicedMLP(8, 32, 8, 1, 4, "auto").gathers(weights)
    assert not SlicedMLP(8, 16, 8, 1, 2, "auto").gathers(weights)
    assert not SlicedMLP(8, 32, 8, 1, 2, "auto").gathers(weights[:1])
    assert SlicedMLP(8, 16, 8, 1, 8, "gather").gathers(weights[:1])
    assert not SlicedMLP(8, 32, 8, 1, 2, "dense").gathers(weights)


def test_top_k_keeps_the_largest_and_their_values() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert keep_top_k(p, 2).tolist() == torch.tensor([[0.0, 0.4, 0.0, 0.3]]).tolist()
    torch.testing.assert_close(keep_top_k(p, 2, True), torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    assert keep_top_k(p, 4) is p


@pytest.mark.parametrize("renormalize", [False, True])
def test_gates_sum_to_one_before_top_k(renormalize: bool) -> None:
    model = fgmoe(top_k=3, global_top_k=2, renormalize=renormalize)
    x = features()
    for routed, top_k in [(path(x), 3) for path in model.paths.values()] + [(model.shared(x), 2)]:
        assert routed.probabilities.sum(-1).sub(1).abs().max() < 1e-6
        assert ((routed.weights > 0).sum(-1) == top_k).all()
        kept = routed.weights > 0
        if renormalize:
            assert routed.weights.sum(-1).sub(1).abs().max() < 1e-6
        else:
            assert torch.equal(routed.weights[kept], routed.probabilities[kept])


def test_order_of_slices_does_not_matter() -> None:
    first, second = fgmoe(top_k=3).double(), fgmoe(top_k=3).double()
    second.load_state_dict(first.state_dict())
    order = torch.randperm(8)
    experts, gate = second.paths["task_edges"].experts, second.paths["task_edges"].gate
    slices = torch.cat([order, torch.tensor([8])])  # the shared slice stays last
    units = (slices[:, None] * experts.width + torch.arange(experts.width)).flatten()
    with torch.no_grad():
        experts.up.weight.copy_(experts.up.weight[units])
        experts.up.bias.copy_(experts.up.bias[units])
        experts.down.weight.copy_(experts.down.weight[:, units])
        gate.router.weight.copy_(gate.router.weight[order])
    x = features(dtype=torch.float64)
    first.recording = second.recording = True
    found, expected = second(x)[0], first(x)[0]
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task], rtol=0, atol=1e-12)
    torch.testing.assert_close(second.gates()[1].weights, first.gates()[1].weights[:, order])


@pytest.mark.parametrize("granularity", ["token", "image"])
def test_an_image_does_not_change_another(granularity: str) -> None:
    model = fgmoe(top_k=2, granularity=granularity, execution="gather").double()
    x = features(3, dtype=torch.float64)
    together = model(x)[0]
    for index in range(3):
        for task, alone in model(x[index : index + 1])[0].items():
            torch.testing.assert_close(alone[0], together[task][index], rtol=0, atol=1e-12)


def test_a_task_trains_its_own_path_and_the_shared_parts() -> None:
    model = fgmoe(global_top_k=4)
    model.eval()(features())[0]["edges"].square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    for name, _ in model.named_parameters():
        foreign = name.startswith("paths.") and not name.startswith("paths.task_edges.")
        # A second convolution learns once the first one has left zero.
        assert (name in trained) != (foreign or name.endswith("offsets.1.weight")), name


@pytest.mark.parametrize("execution", ["dense", "gather"])
@pytest.mark.parametrize(("spatial_dims", "grid"), [(2, (2, 3)), (3, (2, 1, 2))])
def test_gradients_in_float64(execution: str, spatial_dims: int, grid: tuple[int, ...]) -> None:
    settings = {"num_slices": 4, "top_k": 2, "hidden": 8, "global_experts": 2, "global_top_k": 1}
    model = FGMoE(4, ["a", "b"], spatial_dims, balance_weight=0.1, execution=execution, **settings).double()
    for module in model.modules():
        if isinstance(module, DeformableConvolution):
            # Away from whole positions, where bilinear interpolation has a kink.
            nn.init.normal_(module.offsets[0].bias)
    x = features(2, grid, 4, dtype=torch.float64).requires_grad_()

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        results, auxiliary = model(x)
        return *results.values(), auxiliary["fgmoe_balance"]

    parameters = [p for name, p in model.named_parameters() if "gate" in name or "up.bias" in name or "offsets" in name]
    assert torch.autograd.gradcheck(outputs, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("channels", [64, 256])
def test_parameter_counts(channels: int) -> None:
    hidden, m = 4 * channels, 8
    slice_size = 2 * channels * hidden // m + hidden // m  # two matrices and the first bias
    model = fgmoe(channels, num_slices=m, mixer="none")

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    whole = SlicedMLP(channels, hidden, 1, 0, 1, "auto")
    assert count(whole) == 2 * channels * hidden + hidden + channels
    assert count(SlicedMLP(channels, hidden // m, m, 0, 4, "auto")) == count(whole)
    for path in model.paths.values():
        assert count(path) == 9 * slice_size + channels + m * channels
    assert count(model.shared) == 4 * slice_size + channels + 2 * 4 * channels + len(TASKS) * channels
    if channels == 256:
        assert round(count(whole) / 1e3) == 526 and round(slice_size / 1e3, 1) == 65.7
        assert round(count(model.paths["task_edges"]) / 1e3) == 593
        assert round(count(model.shared) / 1e6, 2) == 0.27


@pytest.mark.parametrize("mixer", ["deformable", "convolution", "none"])
@pytest.mark.parametrize("granularity", ["token", "image"])
@pytest.mark.parametrize(
    ("batch", "grid"), [(1, (5, 7)), (2, (8, 3)), (1, (1, 1)), (1, (3, 5, 2)), (2, (4, 3, 1))], ids=str
)
def test_shapes(mixer: str, granularity: str, batch: int, grid: tuple[int, ...]) -> None:
    model = fgmoe(spatial_dims=len(grid), mixer=mixer, granularity=granularity)
    x = features(batch, grid)
    outputs, auxiliary = model(x)
    assert [tuple(y.shape) for y in outputs.values()] == [tuple(x.shape)] * 3
    assert auxiliary["fgmoe_balance"].shape == ()
    (sum(y.square().mean() for y in outputs.values()) + auxiliary["fgmoe_balance"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_shared_slices_and_global_experts() -> None:
    model = fgmoe(num_shared=0, global_experts=0)
    assert model.shared is None
    model.recording = True
    assert list(model(features())[0]) == list(TASKS)
    assert {gates.part for gates in model.gates()} == {"slices"}


def test_a_deformable_convolution_starts_as_a_plain_one_and_learns_where_to_look() -> None:
    layer = DeformableConvolution(8)
    x = features(2, channels=8)
    torch.testing.assert_close(layer(x), layer.point(x))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())
    assert layer.offsets(x).abs().max() > 1e-4


def test_an_offset_reads_the_neighbour() -> None:
    layer = DeformableConvolution(8)
    x = features(1, channels=8)
    layer.offsets = nn.Conv2d(8, 16, 1)
    nn.init.zeros_(layer.offsets.weight)
    layer.offsets.bias.data = torch.tensor([0.0, 1.0] * 4 + [1.0, 0.0] * 4)  # down, right; of each channel
    moved = torch.cat([F.pad(x, (0, 1))[:, :4, :, 1:], F.pad(x, (0, 0, 0, 1))[:, 4:, 1:]], 1)
    torch.testing.assert_close(layer(x), layer.point(moved))


def test_gates_are_float32_under_autocast() -> None:
    model = fgmoe(mixer="none", top_k=3)
    model.recording = True
    x = features()
    expected, exact = model(x)[0], model.gates()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)[0]
    for ours, theirs in zip(model.gates(), exact, strict=True):
        assert torch.equal(ours.weights, theirs.weights)
    for task in TASKS:
        torch.testing.assert_close(found[task].float(), expected[task], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("execution", ["dense", "gather"])
@pytest.mark.parametrize("grid", [(5, 7), (3, 5, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_trains(execution: str, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    model = fgmoe(spatial_dims=len(grid), execution=execution)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, auxiliary = model(features(1, grid, dtype=dtype))
    (sum(y.float().square().mean() for y in outputs.values()) + auxiliary["fgmoe_balance"]).backward()
    assert auxiliary["fgmoe_balance"].dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("execution", ["dense", "gather"])
def test_activation_checkpointing_gives_the_same_gradients(execution: str) -> None:
    model = fgmoe(top_k=2, execution=execution)
    x = features().requires_grad_()
    found = []
    for forget in (False, True):
        outputs, auxiliary = checkpoint(model, x, use_reentrant=False) if forget else model(x)
        total = sum(y.square().mean() for y in outputs.values()) + auxiliary["fgmoe_balance"]
        found.append(torch.autograd.grad(total, [x, *model.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_saved_and_loaded() -> None:
    first, second = fgmoe(), fgmoe()
    x = features()
    assert not torch.equal(first(x)[0]["edges"], second(x)[0]["edges"])
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(y, second(x)[0][task]) for task, y in first(x)[0].items())


def test_any_identifier_is_a_task_name() -> None:
    assert list(FGMoE(8, ["type", "keys", "forward"])(features(channels=8))[0]) == ["type", "keys", "forward"]


def test_one_gate_for_all_tokens_of_an_image() -> None:
    maps = {}
    for granularity in ("token", "image"):
        model = fgmoe(granularity=granularity, top_k=2)
        model.recording = True
        model(features())
        maps[granularity] = [gates.weights for gates in model.gates()]
    assert all(torch.equal(each, each[:, :, :1, :1].expand_as(each)) for each in maps["image"])
    assert not any(torch.equal(each, each[:, :, :1, :1].expand_as(each)) for each in maps["token"])
    assert not any(torch.equal(each[0], each[1]) for each in maps["image"])


@pytest.mark.parametrize("task_embedding", [False, True])
def test_only_the_task_embedding_tells_the_tasks_apart_in_the_global_experts(task_embedding: bool) -> None:
    routed = fgmoe(task_embedding=task_embedding).shared(features())
    for each in routed:
        assert torch.equal(each[0], each[1]) is not task_embedding
        assert torch.equal(each[0], each[2]) is not task_embedding


@pytest.mark.parametrize("execution", ["dense", "gather"])
def test_a_slice_that_no_token_chose_gets_no_gradient(execution: str) -> None:
    mlp = SlicedMLP(CHANNELS, 4, 3, 1, 1, execution)
    weights = torch.zeros(20, 3)
    weights[:, 1] = 0.7
    mlp(torch.randn(20, CHANNELS), weights).square().sum().backward()
    assert [part.any().item() for part in mlp.up.weight.grad.split(4)] == [False, True, False, True]
    assert [part.any().item() for part in mlp.down.weight.grad.split(4, 1)] == [False, True, False, True]


def test_balance_loss() -> None:
    model = fgmoe(balance_weight=0.5, global_top_k=1)
    x = features()
    common = F.layer_norm(x.movedim(1, -1), (CHANNELS,)).movedim(-1, 1)
    means = [path(common).probabilities.mean((0, 1)) for path in model.paths.values()]
    means += list(model.shared(common).probabilities.mean((1, 2)))
    expected = sum((p.std(unbiased=False) / p.mean()) ** 2 for p in means)
    torch.testing.assert_close(model(x)[1]["fgmoe_balance"], 0.5 * expected)
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.zeros_(parameter)
    assert model(x)[1]["fgmoe_balance"].item() < 1e-6
    assert model.eval()(x)[1] == {}
    assert fgmoe(balance_weight=0)(x)[1] == {}


def test_dense_global_gates_are_not_balanced() -> None:
    model = fgmoe(balance_weight=1.0)
    for path in model.paths.values():
        nn.init.zeros_(path.gate.router.weight)
    assert model(features())[1]["fgmoe_balance"].item() < 1e-6


@pytest.mark.parametrize("grid", [(5, 7), (3, 5, 2)], ids=str)
def test_what_was_routed_is_kept_on_request(grid: tuple[int, ...]) -> None:
    model = fgmoe(spatial_dims=len(grid), top_k=3)
    model(features(2, grid))
    assert model.gates() == [] and model.routing() == []
    model.recording = True
    model(features(2, grid))
    model(features(2, grid))
    gates = model.gates()
    assert [(g.router, g.receiver, g.site, g.part) for g in gates] == [
        ("fgmoe", task, site, part) for site, part in enumerate(("slices", "global")) for task in TASKS
    ]
    for each in gates:
        count = 8 if each.part == "slices" else 4
        assert each.weights.shape == (2, count, *grid) and len(each.candidates) == count
        assert each.weights.dtype == torch.float32 and not each.weights.requires_grad
        assert ((each.weights > 0).sum(1) == (3 if each.part == "slices" else 4)).all()
    records = model.routing()
    assert all(0 <= record.entropy <= 1 and abs(sum(record.usage.values()) - 1) < 1e-5 for record in records)
    assert len(flat_metrics(records)) == 3 * (1 + 8) + 3 * (1 + 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 9}, "top_k=9: expected a whole number from 1 to 8, the number of slices"),
        ({"top_k": 0}, "top_k=0: expected a whole number from 1 to 8, the number of slices"),
        ({"top_k": 1.5}, "top_k=1.5: expected a whole number from 1 to 8, the number of slices"),
        ({"global_top_k": 5}, "global_top_k=5: expected a whole number from 1 to 4, the number of them"),
        ({"global_top_k": 0}, "global_top_k=0: expected a whole number from 1 to 4, the number of them"),
        ({"global_experts": 0, "global_top_k": 1}, "global_top_k=1 but global_experts=0: there is none to keep"),
        ({"global_experts": -1}, "global_experts=-1: expected a whole number of at least 0"),
        ({"global_experts": True}, "global_experts=True: expected a whole number of at least 0"),
        ({"num_shared": -1}, "num_shared=-1: expected a whole number of at least 0"),
        ({"hidden": 60}, "hidden=60: expected a multiple of num_slices=8"),
        ({"num_slices": 0}, "num_slices=0"),
        ({"num_slices": "8"}, "num_slices='8': expected a whole number"),
        ({"hidden": 0}, "hidden=0"),
        ({"spatial_dims": 4}, "spatial_dims=4: 2 or 3"),
        ({"mixer": "attention"}, "mixer='attention'.*deformable, convolution, none"),
        ({"granularity": "window"}, "granularity='window'.*token, image"),
        ({"execution": "fast"}, "execution='fast'.*auto, dense, gather"),
        ({"balance_weight": -1.0}, "balance_weight=-1.0: expected a number of at least 0"),
        ({"balance_weight": "1e-4"}, "balance_weight='1e-4': expected a number of at least 0"),
        ({"tasks": []}, "tasks=.*at least one"),
        ({"tasks": ["a", "a"]}, "tasks=.*no name twice"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FGMoE(**{"channels": CHANNELS, "tasks": TASKS, **settings})
