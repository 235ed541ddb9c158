# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The network: identities across its slots, what trains, caching, both dimensions, windows and precision."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from medmoe.decoders import FusionDecoder
from medmoe.errors import ConfigError
from medmoe.moe import PMoE
from medmoe.networks import ExpertNetwork
from medmoe.networks.trunk import site_layers
from medmoe.tuning import LoRA
from tests.networks.small import small_tiny_vit, small_vit, swapped_experts

prompter = partial(PMoE, num_prompts=3)
decoder = partial(FusionDecoder, channels=8, stem=4)


def network(seed: int = 0, kinds: str = "vt", **settings: object) -> ExpertNetwork:
    torch.manual_seed(seed)
    experts = [small_vit() if kind == "v" else small_tiny_vit() for kind in kinds]
    options = {"num_classes": 3, "decoder": decoder, "precision": "fp32", **settings}
    return ExpertNetwork(experts, **options)


VARIANTS = {
    "linear probe": {},
    "vpt": {"prompter": partial(prompter, dispatch="none")},
    "pmoe": {"prompter": prompter},
    "pmoe on one": {"prompter": prompter, "prompted": [True, False]},
    "lora": {"adapters": LoRA(2)},
    "pmoe and lora, late": {"prompter": prompter, "adapters": LoRA(2), "decoder": partial(decoder, fusion="late")},
    "gated": {"prompter": prompter, "decoder": partial(decoder, fusion="gated")},
    "late sites": {"prompter": prompter, "site_range": (2, 3)},
    "no stem": {"decoder": partial(decoder, stem=0)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_variant_trains_only_what_it_declares(variant: str, spatial_dims: int) -> None:
    net = network(spatial_dims=spatial_dims, **VARIANTS[variant])
    before = {name: p.clone() for name, p in net.named_parameters()}
    image = torch.rand(2, 1, 24, 30, 3) if spatial_dims == 3 else torch.rand(2, 1, 24, 30)
    optimizer = torch.optim.AdamW([p for _, p in net.trainable()], 1e-2)
    for _ in range(2):  # LoRA's first factor has no gradient while the second is zero
        net.train()
        parts = net.parts(image)
        assert (
            parts.outputs["label"].shape == (2, 3, *image.shape[2:]) and parts.outputs["label"].dtype == torch.float32
        )
        optimizer.zero_grad()
        (
            parts.outputs["label"].square().mean() + sum(p["label"].square().mean() for p in parts.expert_outputs)
        ).backward()
        optimizer.step()
    for name, p in net.named_parameters():
        declared = name.startswith(("prompter.", "decoder.")) or "lora_" in name
        assert p.requires_grad == declared, name
        assert torch.equal(p, before[name]) != declared or (declared and p.grad is not None), name
        if not declared:
            assert p.grad is None
    assert not any(m.training for expert in net.experts for m in expert.modules())


def test_one_expert_without_dispatch_is_vpt_deep() -> None:
    """Number for number, against VPT-deep written out: fresh prompts at each layer, their outputs dropped."""
    net = network(kinds="v", prompter=partial(prompter, dispatch="none")).eval()
    image = torch.rand(2, 1, 32, 32)
    expert = net.experts[0]
    x = expert.embed(expert.view(image)).x
    maps = []
    for index, blk in enumerate(expert.vit.blocks):
        prompts = net.prompter.prompts[0][index].expand(2, -1, -1)
        y = blk(torch.cat([x[:, :1], prompts, x[:, 1:]], 1))
        x = torch.cat([y[:, :1], y[:, 4:]], 1)
        if index in expert.levels:
            maps.append(expert.vit.norm(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    expected = net.decoder([maps], image).outputs["label"]
    assert (net(image) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [0, 2])
def test_an_expert_without_prompts_lends_context_frozen_or_adapted(rank: int) -> None:
    """What the unprompted expert sees reaches the other one's features, and every parameter takes part."""
    net = network(prompter=prompter, prompted=[True, False], adapters=[None, LoRA(rank)]).eval()
    image = torch.rand(2, 1, 32, 32)
    before = net.features(image)[0][0][-1]
    with torch.no_grad():
        net.experts[1].neck[-1].bias += torch.randn(12)
    assert (net.features(image)[0][0][-1] - before).abs().max() > 1e-5
    net(image).square().mean().backward()
    assert not [name for name, p in net.trainable() if p.grad is None]


def test_an_adapted_expert_without_prompts_may_be_shallower_than_there_are_sites() -> None:
    torch.manual_seed(0)
    experts = [small_vit(4), small_vit(2)]
    net = ExpertNetwork(
        experts, num_classes=3, prompter=prompter, prompted=[True, False], adapters=[None, LoRA(2)], precision="fp32"
    )
    assert net.num_sites == 4 and net(torch.rand(1, 1, 32, 32)).shape == (1, 3, 32, 32)


def test_permuting_the_experts_permutes_the_features() -> None:
    image = torch.rand(1, 1, 32, 32)
    one = network(prompter=prompter).eval()
    other = network(kinds="tv", prompter=prompter).eval()
    other.experts = torch.nn.ModuleList([one.experts[1], one.experts[0]])
    other.prompter.load_state_dict(swapped_experts(one.prompter.state_dict()))
    for mine, theirs in zip(one.features(image)[0], other.features(image)[0][::-1], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() < 1e-4


def test_layers_before_the_first_site_run_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(kinds="v", prompter=prompter, site_range=(2, 3))
    tracked: list[bool] = []
    layer = net.experts[0].layer

    def watch(index: int, tokens: object, prompts: object = None, keep_prompts: bool = True) -> object:
        result = layer(index, tokens, prompts, keep_prompts)
        tracked.append(result[0].x.requires_grad)
        return result

    monkeypatch.setattr(net.experts[0], "layer", watch)
    net(torch.rand(1, 1, 32, 32))
    assert tracked == [False, False, True, True]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_slices_of_a_volume_are_images(spatial_dims: int) -> None:
    """Folding: the features of a volume are those of its slices in order."""
    net = network(spatial_dims=3, prompter=prompter).eval()
    volume = torch.rand(2, 1, 32, 24, 5)
    folded = net.fold(volume)
    assert torch.equal(folded[7], volume[1, ..., 2])
    whole = net.features(folded)[0]
    single = net.features(volume[1, None, ..., 2])[0]
    for a, b in zip(whole, single, strict=True):
        for m, n in zip(a, b, strict=True):
            assert (m[7] - n[0]).abs().max() < 1e-4


def test_neighbouring_slices_fill_the_channels() -> None:
    volume = torch.rand(1, 1, 32, 24, 4)
    folded = network(spatial_dims=3, neighbors=True).fold(volume)
    assert torch.equal(folded[1], volume[0, 0, ..., :3].movedim(-1, 0))
    assert torch.equal(folded[0], volume[0, 0, ..., [0, 0, 1]].movedim(-1, 0))
    assert torch.equal(folded[3], volume[0, 0, ..., [2, 3, 3]].movedim(-1, 0))


def test_cache_gives_the_same_numbers_and_encodes_once() -> None:
    plain, cached = network().eval(), network(cache_bytes=2**24).eval()
    images = torch.rand(3, 1, 32, 32)
    for _ in range(2):
        assert torch.equal(plain(images), cached(images))
    assert torch.equal(plain(images.flip(0)[:2]), cached(images.flip(0)[:2]))
    for cache in cached.caches:
        assert (cache.misses, cache.hits) == (3, 5)
    flipped = images.flip(-1)
    assert torch.equal(plain(flipped), cached(flipped))
    assert cached.caches[0].misses == 6


def test_cache_keeps_to_its_limit_and_skips_what_trains() -> None:
    net = network(cache_bytes=40_000, prompter=prompter, prompted=[True, False]).eval()
    for _ in range(20):
        net(torch.rand(1, 1, 32, 32))
    assert net.caches[0].max_bytes == 0 and net.caches[0].misses == 0
    assert net.caches[1].misses == 20 and net.caches[1].bytes <= 40_000 and net.caches[1].entries


def test_late_fusion_sums_the_experts_logits() -> None:
    net = network(decoder=partial(decoder, fusion="late"))
    parts = net.parts(torch.rand(1, 1, 32, 32))
    assert len(parts.expert_outputs) == 2
    assert torch.allclose(parts.outputs["label"], parts.expert_outputs[0]["label"] + parts.expert_outputs[1]["label"])


@pytest.mark.parametrize("shape", [(40, 56), (40, 56, 6)])
def test_sliding_window(shape: tuple[int, ...]) -> None:
    from monai.inferers import SlidingWindowInferer

    net = network(spatial_dims=len(shape), prompter=prompter).eval()
    roi = (32, 32, 4)[: len(shape)]
    with torch.no_grad():
        assert SlidingWindowInferer(roi, overlap=0.25)(torch.rand(1, 1, *shape), net).shape == (1, 3, *shape)


def test_bfloat16_is_close_and_leaves_float32_logits() -> None:
    image = torch.rand(2, 1, 32, 32)
    exact, rounded = network(prompter=prompter), network(prompter=prompter, precision="bf16")
    a, b = exact(image), rounded(image)
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact(image).isfinite().all()
    b.sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_equals_cpu() -> None:
    image = torch.rand(1, 1, 32, 32)
    net = network(prompter=prompter, adapters=LoRA(2)).eval()
    expected = net(image)
    assert (net.cuda()(image.cuda()).cpu() - expected).abs().max() < 1e-2


def test_routing_of_all_sites() -> None:
    net = network(prompter=prompter, site_range=(1, 2), num_sites=3)
    net.recording = True
    net(torch.rand(1, 1, 32, 32))
    assert {(r.expert, r.site) for r in net.routing()} == {(e, s) for e in ("vit", "tiny") for s in (1, 2)}


def test_sites_cover_all_layers_once() -> None:
    for depth in range(1, 25):
        for sites in range(1, depth + 1):
            runs = site_layers(depth, sites)
            assert [i for run in runs for i in run] == list(range(depth))
            assert min(map(len, runs)) >= 1 and max(map(len, runs)) - min(map(len, runs)) <= 1


def wrong(message: str, image: Tensor | None = None, **settings: object) -> None:
    with pytest.raises(ConfigError, match=message):
        net = network(**settings)
        if image is not None:
            net(image)


def test_wrong_settings_and_images() -> None:
    wrong("spatial_dims=3", torch.rand(1, 1, 32, 32, 4))
    wrong("spatial_dims=2", torch.rand(1, 1, 32, 32), spatial_dims=3)
    wrong("in_channels=3", torch.rand(1, 3, 32, 32))
    wrong("smaller than one patch", torch.rand(1, 1, 7, 32))
    wrong("site_range", prompter=prompter, site_range=(3, 9))
    wrong("shallowest prompted expert has 4", prompter=prompter, num_sites=5)
    wrong("needs spatial_dims=3 and in_channels=1", neighbors=True)
    wrong("found spatial_dims=3 and in_channels=2", spatial_dims=3, in_channels=2, neighbors=True)
    wrong("fusion='lat'", decoder=partial(decoder, fusion="lat"))
    wrong("prompted has 3 entries", prompter=prompter, prompted=[True, True, False])
    wrong("precision='half'", torch.rand(1, 1, 32, 32), precision="half")
    wrong("LoRA targets", adapters=LoRA(2, targets=["query"]))


def test_an_expert_of_one_token_cannot_be_aligned() -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=r"8 pixels .*at least 16"):
        ExpertNetwork([small_vit(image_size=8), small_tiny_vit()])


def test_lora_of_rank_zero_is_no_adapter() -> None:
    assert network(adapters=LoRA(0)).live == [False, False]


def test_importing_the_network_does_not_import_monai() -> None:
    import subprocess
    import sys

    code = "import sys, medmoe.networks; sys.exit(any(m in sys.modules for m in ('monai', 'mlflow', 'peft', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
