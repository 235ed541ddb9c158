# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Experts: parity with the originals, prompts, views, and that they stay frozen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from medmoe.errors import ConfigError, ExpertError
from medmoe.experts import Expert, TinyViTExpert, ViTExpert, load_expert
from tests.networks.small import small_tiny_vit, small_vit

MAKERS = {"vit": small_vit, "tiny_vit": small_tiny_vit}


@pytest.fixture(params=MAKERS)
def expert(request: pytest.FixtureRequest) -> Expert:
    return MAKERS[request.param]()


def lite_medsam(shared: Path, image_size: int = 256) -> Expert:
    return load_expert("lite_medsam", image_size, shared / "weights/litemedsam/lite_medsam.pth")


def dinov2(shared: Path) -> ViTExpert:
    expert = load_expert("dinov2_vits14", 154, shared / "weights/dinov2_vits14/dinov2_vits14_imgfocus_fp16.pt")
    assert isinstance(expert, ViTExpert)
    return expert


@torch.no_grad()
def test_vit_without_prompts_equals_timm() -> None:
    expert = small_vit()
    view = torch.randn(2, 3, 40, 24)
    tokens = expert.embed(view)
    for index in range(len(expert.widths)):
        tokens, outputs = expert.layer(index, expert.enter(index, tokens))
        assert outputs is None
    expected = expert.vit.forward_features(view)
    assert (expert.vit.norm(tokens.x) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_dinov2_equals_timm(shared: Path) -> None:
    expert = dinov2(shared)
    assert sum(p.numel() for p in expert.parameters()) == 22_056_192
    view = expert.view(torch.rand(1, 3, 90, 120))
    assert view.shape == (1, 3, 112, 154)
    fused = expert.vit.get_intermediate_layers(view, n=expert.levels, reshape=True, norm=True)
    found = run(expert, view)
    expected = expert.vit.get_intermediate_layers(view, n=expert.levels, reshape=True, norm=True)
    for mine, theirs, other in zip(found, expected, fused, strict=True):
        assert (mine - theirs).abs().max() < 1e-5  # with the attention kernel that the expert chose
        assert (mine - other).abs().max() < 1e-5 * other.abs().max()  # with timm's default kernel


@torch.no_grad()
def test_lite_medsam_equals_the_original_at_every_stage(shared: Path) -> None:
    reference = np.load(shared / "weights/litemedsam/encoder_reference.npz")
    expert = lite_medsam(shared)
    assert isinstance(expert, TinyViTExpert)
    tokens = expert.embed(torch.from_numpy(reference["image"]).float())
    found = {"stage0": tokens.x[:, ::8]}
    outputs = {}
    for index in range(10):
        tokens = expert.enter(index, tokens)
        if index in (2, 8):
            found[f"stage{1 if index == 2 else 2}"] = tokens.x[:, ::8]
        tokens, _ = expert.layer(index, tokens)
        outputs[index] = tokens
    found |= {"stage3": tokens.x[:, ::8], "neck": expert.maps(outputs)[-1][:, ::8]}
    for name, mine in found.items():
        assert (mine - torch.from_numpy(reference[name])).abs().max() < 1e-4, name


@pytest.mark.parametrize(("size", "shape"), [(128, (90, 90)), (192, (200, 150)), (256, (100, 256))])
@torch.no_grad()
def test_lite_medsam_at_other_sizes(shared: Path, size: int, shape: tuple[int, int]) -> None:
    expert = lite_medsam(shared, size)
    maps = expert(torch.rand(1, 1, *shape))
    for m, stride in zip(maps, (2, 4, 4), strict=True):
        # The finest grid belongs to the convolutional stage before the last strides.
        expected = [round(side * size / max(shape) / 4) * 4 // stride for side in shape]
        assert list(m.shape[-2:]) == expected
        assert m.isfinite().all()


@torch.no_grad()
def test_lite_medsam_is_sensible_on_a_padded_larger_input(shared: Path) -> None:
    """The features of an image and of the same image with a black margin agree where no window reaches the margin."""
    reference = np.load(shared / "weights/litemedsam/encoder_reference.npz")
    image = torch.from_numpy(reference["image"]).float()[..., :112, :112]
    expert = lite_medsam(shared)
    small = run(expert, image)[-1]
    large = run(expert, torch.nn.functional.pad(image, (0, 80, 0, 80)))[-1][..., :28, :28]
    alike = torch.nn.functional.cosine_similarity(small, large, dim=1)[0, :20, :20]
    mirrored = torch.nn.functional.cosine_similarity(small, large.flip(-1), dim=1)[0, :20, :20]
    assert alike.mean() > 0.95
    assert alike.mean() > mirrored.mean() + 0.05


@torch.no_grad()
def run(expert: Expert, view: Tensor) -> list[Tensor]:
    tokens, outputs = expert.embed(view), {}
    for index in range(len(expert.widths)):
        tokens, _ = expert.layer(index, expert.enter(index, tokens))
        outputs[index] = tokens
    return expert.maps(outputs)


@torch.no_grad()
def test_prompts_as_keys_and_values_equal_dropped_prompt_outputs(expert: Expert) -> None:
    tokens = expert.embed(expert.view(torch.rand(2, 3, 30, 45)))
    for index, width in enumerate(expert.widths):
        tokens = expert.enter(index, tokens)
        prompts = torch.randn(5, width)
        kept, outputs = expert.layer(index, tokens, prompts, keep_prompts=True)
        dropped, none = expert.layer(index, tokens, prompts, keep_prompts=False)
        plain, _ = expert.layer(index, tokens)
        assert none is None and outputs is not None and outputs.shape == (2, 5, width)
        assert (kept.x - dropped.x).abs().max() < 1e-4
        assert (kept.x - plain.x).abs().max() > 1e-3
        tokens = kept


@torch.no_grad()
def test_prompts_for_each_image_equal_shared_ones(expert: Expert) -> None:
    tokens = expert.enter(0, expert.embed(expert.view(torch.rand(3, 1, 32, 32))))
    prompts = torch.randn(4, expert.widths[0])
    one, _ = expert.layer(0, tokens, prompts)
    each, _ = expert.layer(0, tokens, prompts.expand(3, -1, -1))
    assert torch.equal(one.x, each.x)


@torch.no_grad()
def test_windowed_prompt_attention_equals_a_loop_over_windows() -> None:
    """An independent, slow computation of one prompted window attention."""
    attn = small_tiny_vit().layers[1].blocks[0].attn
    x, prompts = torch.randn(2, 10, 9, 16), torch.randn(2, 3, 16)
    y, seen = attn(x, prompts, True)
    padded = torch.zeros(2, 14, 14, 16)
    padded[:, :10, :9] = x
    outputs, expected = [], torch.zeros(2, 14, 14, 16)
    for row in (0, 7):
        for column in (0, 7):
            window = padded[:, row : row + 7, column : column + 7].reshape(2, 49, 16)
            both = attn.norm(torch.cat([prompts, window], 1))
            qkv = attn.qkv(both).view(2, 52, 2, 3, 8)
            mixed = torch.zeros(2, 52, 2, 8)
            for b in range(2):
                for h in range(2):
                    q, k, v = qkv[b, :, h].unbind(1)
                    scores = q @ k.T / 8**0.5
                    for i in range(49):
                        for j in range(49):
                            offset = abs(i // 7 - j // 7) * 7 + abs(i % 7 - j % 7)
                            scores[3 + i, 3 + j] += attn.attention_biases[h, offset]
                    mixed[b, :, h] = scores.softmax(-1) @ v
            result = attn.proj(mixed.reshape(2, 52, 16))
            outputs.append(result[:, :3])
            expected[:, row : row + 7, column : column + 7] = result[:, 3:].view(2, 7, 7, 16)
    assert (y - expected[:, :10, :9]).abs().max() < 1e-5
    assert (seen - torch.stack(outputs).mean(0)).abs().max() < 1e-5


def test_stays_frozen_in_training_mode(expert: Expert) -> None:
    torch.nn.ModuleList([expert]).train()
    assert not any(module.training for module in expert.modules())
    assert not any(p.requires_grad for p in expert.parameters())


def test_layers_without_prompts_record_no_gradients(expert: Expert) -> None:
    tokens = expert.embed(expert.view(torch.rand(1, 3, 32, 32)))
    tokens, _ = expert.layer(0, expert.enter(0, tokens))
    assert not tokens.x.requires_grad


@pytest.mark.parametrize("shape", [(96, 112), (37, 51), (40, 40), (33, 35)])
def test_maps_cover_the_image_and_nothing_else(expert: Expert, shape: tuple[int, int]) -> None:
    """The decoder lays a map over the whole image, so that a margin in the view would shift all that is in it."""
    view = expert.view(torch.linspace(0, 1, shape[0])[:, None].expand(1, 1, *shape))
    assert (view.diff(dim=2) >= 0).all() and (view.diff(dim=3).abs() < 1e-5).all()
    assert all(side % expert.patch == 0 for side in view.shape[-2:])


def test_views_follow_size_and_channels() -> None:
    vit, tiny = small_vit(), small_tiny_vit()
    assert vit.view(torch.rand(1, 1, 100, 50)).shape == (1, 3, 32, 16)
    assert tiny.view(torch.rand(1, 2, 100, 47)).shape == (1, 3, 32, 16)
    view = tiny.view(torch.rand(3, 1, 32, 32) * torch.tensor([0.1, 1, 0]).view(3, 1, 1, 1))
    assert view[:2].amax((1, 2, 3)).tolist() == [1, 1] and view[2].abs().max() == 0
    with pytest.raises(ConfigError, match="5 channels"):
        vit.view(torch.rand(1, 5, 32, 32))
    chosen = small_vit()
    chosen.channels = (4, 1, 0)
    assert chosen.view(torch.rand(1, 5, 32, 32)).shape == (1, 3, 32, 32)


def test_expert_from_timm_by_name() -> None:
    expert = load_expert("timm/vit_tiny_patch16_224", 64, "random")
    assert expert.sha256 == "random" and expert.patch == 16 and len(expert.widths) == 12
    assert [tuple(m.shape) for m in expert(torch.rand(1, 3, 64, 64))] == [(1, 192, 4, 4)] * 4


@pytest.fixture
def timm_weights() -> dict[str, Tensor]:
    """Of a backbone with its classification head, as timm saves them."""
    return timm.create_model("vit_tiny_patch16_224").state_dict()


def from_file(folder: Path, tensors: dict[str, Tensor]) -> Expert:
    save_file(tensors, folder / "weights.safetensors")
    return load_expert("timm/vit_tiny_patch16_224", 64, folder / "weights.safetensors")


def test_expert_from_timm_with_a_local_file(tmp_path: Path, timm_weights: dict[str, Tensor]) -> None:
    expert = from_file(tmp_path, timm_weights)
    assert isinstance(expert, ViTExpert) and len(expert.sha256) == 64
    assert all(torch.equal(tensor, timm_weights[name]) for name, tensor in expert.vit.state_dict().items())
    bare = {name: tensor for name, tensor in timm_weights.items() if not name.startswith("head.")}
    assert from_file(tmp_path, bare).sha256 == expert.sha256
    timm_weights["norm.bias"] += 1
    assert from_file(tmp_path, timm_weights).sha256 != expert.sha256


@pytest.mark.parametrize("prefix", ["blocks.3.", ""])
def test_a_file_that_does_not_fill_a_timm_model_is_refused(
    tmp_path: Path, timm_weights: dict[str, Tensor], prefix: str
) -> None:
    """timm itself passes over missing tensors where a backbone is loaded without its head."""
    renamed = {("x." if name.startswith(prefix) else "") + name: tensor for name, tensor in timm_weights.items()}
    with pytest.raises(ExpertError, match=f"missing: .*{prefix or 'cls_token'}"):
        from_file(tmp_path, renamed)


def test_experts_of_the_hub_are_known_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_hub(name: str, pretrained: bool = False) -> torch.nn.Module:
        assert pretrained
        return timm.create_model(name, num_classes=0, dynamic_img_size=True)

    monkeypatch.setattr("medmoe.experts.build.timm_model", from_hub)
    one, other = (load_expert("timm/vit_tiny_patch16_224", 64) for _ in range(2))
    assert len(one.sha256) == 64 and one.sha256 != other.sha256


@pytest.mark.parametrize("name", ["dinov2_vits41", "timm/no_such_model", "timm/resnet18"])
def test_wrong_expert_names(name: str) -> None:
    with pytest.raises(ExpertError, match="dinov2_vits14" if "41" in name else "timm|plain vision"):
        load_expert(name, 64, "random")
