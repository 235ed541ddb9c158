# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The cost card: numbers that can be worked out by hand, and a network that is left as it was."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from networks.small import small_tiny_vit, small_vit
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medmoe.conditions import Column, Schema
from medmoe.decoders import FusionDecoder
from medmoe.moe import MoPE, PMoE
from medmoe.networks import ExpertNetwork
from medmoe.networks.cost import complete_condition, cost, cost_card, count_flops, count_saved
from medmoe.training.checkpoint import Metadata, save_checkpoint, trained_tensors
from medmoe.tuning import LoRA


def network(**settings: object) -> ExpertNetwork:
    options = {
        "prompter": partial(PMoE, num_prompts=3),
        "adapters": [LoRA(2), None],
        "decoder": partial(FusionDecoder, channels=8, stem=4),
        "precision": "fp32",
        "num_classes": 3,
        **settings,
    }
    return ExpertNetwork([small_vit(), small_tiny_vit()], **options)


def test_every_parameter_is_in_one_part() -> None:
    net = network()
    found = cost(net, (1, 1, 32, 32))
    assert list(found.parts) == ["vit", "tiny", "prompter", "decoder"]
    assert found.total.trainable == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert found.total.frozen == sum(p.numel() for p in net.parameters() if not p.requires_grad)
    lora = sum(p.numel() for name, p in net.named_parameters() if "lora_" in name)
    assert found.parts["vit"].trainable == lora > 0 and found.parts["tiny"].trainable == 0
    assert found.parts["prompter"].frozen == found.parts["decoder"].frozen == 0
    assert all(part.flops > 0 for part in found.parts.values())


def test_experts_of_one_name_are_told_apart() -> None:
    net = ExpertNetwork([small_vit(), small_vit()], decoder=partial(FusionDecoder, channels=8))
    assert list(cost(net, (1, 1, 32, 32)).parts) == ["vit (0)", "vit (1)", "decoder"]


class Toy(nn.Module):
    """A convolution to half the size, a linear layer for each pixel, and attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.linear = nn.Linear(5, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.linear(self.convolution(image).flatten(2).transpose(1, 2))
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_operations_of_known_layers() -> None:
    found = cost(Toy(), (2, 3, 8, 6))
    pixels = 2 * 4 * 3
    assert found.parts["convolution"].flops == 2 * pixels * 5 * 3 * 9
    assert found.parts["linear"].flops == 2 * pixels * 7 * 5 + 2 * 2 * pixels * 12 * 7  # with the attention behind it
    assert found.total.flops == sum(part.flops for part in found.parts.values())


def test_a_deformable_convolution_counts_as_a_plain_one() -> None:
    class Deformed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(4, 6, 3, padding=1, bias=False)

        def forward(self, image: Tensor) -> Tensor:
            offsets = image.new_zeros(len(image), 18, *image.shape[2:])
            return torchvision.ops.deform_conv2d(image, offsets, self.plain.weight, padding=1)

    image = torch.rand(2, 4, 9, 7)
    assert sum(count_flops(Deformed(), [image]).values()) == count_flops(Deformed().plain, [image])["other"]


def test_the_operations_of_a_network_are_those_that_pytorch_counts() -> None:
    net = network().eval()
    image = torch.rand(1, 1, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(image)
    assert sum(count_flops(net, [image]).values()) == counter.get_total_flops()


class Saving(nn.Module):
    """exp saves its result, the product both factors: two blocks for three saved tensors."""

    def __init__(self, kept: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.kept = kept

    def forward(self, image: Tensor) -> Tensor:
        scaled = image * self.scale
        risen = scaled.exp()
        lost = (risen * risen).sum()
        return risen.sum() + (lost if self.kept else 0)


def test_saved_bytes_are_those_of_distinct_live_blocks() -> None:
    image = torch.rand(1, 1, 5, 4)
    for kept in (True, False):
        assert count_saved(Saving(kept), [image]) == 2 * image.nbytes  # the image, for the scale, and exp's result
    assert count_saved(nn.Linear(4, 3), [image]) == image.nbytes
    assert count_saved(nn.Linear(4, 3).requires_grad_(False), [image]) == 0


def test_activation_checkpointing_saves_less_and_computes_the_same() -> None:
    plain = cost(network(), (1, 1, 32, 32))
    again = cost(network(activation_checkpointing=True), (1, 1, 32, 32))
    assert again.saved_bytes < 0.7 * plain.saved_bytes and again.total == plain.total


def test_the_network_is_left_as_it_was() -> None:
    net = network(prompter=None, adapters=[None, LoRA(2)], cache_bytes=1 << 20)
    net.decoder.norm = nn.BatchNorm2d(1)
    net.register_forward_pre_hook(lambda module, args: (module.decoder.norm(args[0]),))
    net.train()
    net.recording = True
    net(torch.rand(2, 1, 32, 32))
    caches, entries = net.caches, [len(cache.entries) for cache in net.caches]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = {name: module.training for name, module in net.named_modules()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = cost(net, (1, 1, 32, 32)), cost(net, (1, 1, 32, 32))
    assert torch.equal(torch.rand(3), expected)
    assert first == second
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert net.caches is caches and [len(cache.entries) for cache in net.caches] == entries
    assert all(p.grad is None for p in net.parameters())


def test_the_condition_is_complete_and_its_small_batch_no_news(caplog: pytest.LogCaptureFixture) -> None:
    columns = (Column("age", "number"), Column("sex", "category", values=("f", "m")), Column("t2", "image"))
    net = network(conditioner=partial(MoPE, schema=Schema(columns), num_prompts=2, num_experts=3))
    found = cost(net, (1, 1, 32, 32))
    alone = cost(net, (1, 1, 32, 32), {"numbers": torch.zeros(1, 1), "categories": torch.ones(1, 1, dtype=torch.long)})
    assert found.parts["conditioner"].flops > alone.parts["conditioner"].flops > 0
    assert found.parts["vit"].flops > 1.5 * alone.parts["vit"].flops  # it sees the second image too
    assert not caplog.records and not net.conditioner.warned


def test_it_is_restored_after_an_error_too() -> None:
    net = network().train()
    with pytest.raises(Exception, match="smaller than one patch"):
        cost(net, (1, 1, 4, 4))
    assert net.training and net.decoder.training and not net.experts[0].training


def test_the_size_of_a_checkpoint(tmp_path: Path) -> None:
    net = network()
    found = cost(net, (1, 1, 32, 32))
    save_checkpoint(tmp_path / "best.safetensors", net, Metadata())
    assert 0 < (tmp_path / "best.safetensors").stat().st_size - found.checkpoint_bytes < 1000
    assert found.checkpoint_bytes > sum(tensor.nbytes for tensor in trained_tensors(net).values())


def test_the_card_is_plain_json_for_a_window() -> None:
    net = network(spatial_dims=3)
    card = cost_card(net, [32, 24, 3])
    assert json.loads(json.dumps(card)) == card
    assert card["image"] == [1, 1, 32, 24, 3] and card["device"] == "cpu"
    assert card["total"]["trainable"] == sum(part["trainable"] for part in card["parts"].values())
    assert cost_card(net, 24)["image"] == [1, 1, 24, 24, 24]
    assert cost_card(net, [-1, 24, -1])["image"] == [1, 1, 32, 24, 1]


def test_a_complete_condition_has_what_the_schema_says() -> None:
    columns = (Column("age", "number"), Column("sex", "category", values=("f", "m")), Column("t2", "image"))
    found = complete_condition(Schema(columns, image_channels=2), (2, 1, 8, 6))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "numbers": (2, 1),
        "categories": (2, 1),
        "image": (2, 2, 8, 6),
    }
    assert found["categories"].eq(1).all()


def test_nothing_of_the_measurement_stays_in_memory() -> None:
    """An operation that saves its own output, as softmax does, must not hold itself through the hook."""
    network = nn.Sequential(nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 64), nn.Sigmoid())

    def held() -> int:
        gc.collect()
        storages = [o.untyped_storage() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    before = held()
    cost(network, (4096, 64))
    assert held() - before < 4096 * 64 * 4
