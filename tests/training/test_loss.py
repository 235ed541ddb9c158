# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor
from training.toy import Parts, ToyNetwork

from medmoe.training.loss import PartsInferer, SegmentationLoss


def expected(logits: Tensor, label: Tensor, background: bool = False, batch: bool = True) -> Tensor:
    """Dice + cross-entropy written out."""
    classes = logits.shape[1]
    probability, truth = logits.softmax(1), F.one_hot(label[:, 0], classes).movedim(-1, 1).float()
    first = 0 if background else 1
    axes = ((0,) if batch else ()) + tuple(range(2, logits.ndim))
    overlap = (probability * truth).sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (probability.sum(axes) + truth.sum(axes) + 1e-5)
    return dice[..., first:].mean() + F.cross_entropy(logits, label[:, 0])


@pytest.mark.parametrize("size", [(5, 7), (4, 5, 3)])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_dice_and_cross_entropy(size: tuple[int, ...], background: bool, batch: bool) -> None:
    logits, label = torch.randn(2, 3, *size), torch.randint(0, 3, (2, 1, *size))
    loss = SegmentationLoss(3, include_background=background, batch_dice=batch)(logits, label)
    torch.testing.assert_close(loss, expected(logits, label, background, batch), rtol=1e-5, atol=1e-6)


def test_parts_add_the_experts_losses_and_the_auxiliary_ones() -> None:
    label = torch.randint(0, 3, (2, 1, 6, 6))
    logits, *own = torch.randn(3, 2, 3, 6, 6)
    parts = Parts(logits, own, {"balance": torch.tensor(0.25), "importance": torch.tensor(0.5)})
    loss = SegmentationLoss(3, expert_weight=0.3)(parts, label)
    mean = (expected(own[0], label) + expected(own[1], label)) / 2
    torch.testing.assert_close(loss, expected(logits, label) + 0.3 * mean + 0.75, rtol=1e-5, atol=1e-6)


def test_half_precision_logits_and_metadata_give_a_plain_float32_loss() -> None:
    logits, label = torch.randn(1, 2, 6, 6).bfloat16(), MetaTensor(torch.randint(0, 2, (1, 1, 6, 6)).float())
    loss = SegmentationLoss(2)(MetaTensor(logits), label)
    assert loss.dtype == torch.float32 and not isinstance(loss, MetaTensor)
    torch.testing.assert_close(loss, expected(logits.float(), label.as_tensor().long()), rtol=1e-5, atol=1e-6)


def test_perfect_logits_cost_nothing_and_gradients_reach_all_parts() -> None:
    label = torch.randint(0, 3, (1, 1, 6, 6))
    perfect = 100.0 * F.one_hot(label[:, 0], 3).movedim(-1, 1).float()
    assert SegmentationLoss(3)(perfect, label) < 1e-4
    network = ToyNetwork()
    SegmentationLoss(3)(PartsInferer()(MetaTensor(torch.rand(1, 1, 6, 6)), network), label).backward()
    missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_wrong_class_counts_are_errors() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        SegmentationLoss(1)
    with pytest.raises(ValueError, match="2 channels, expected num_classes = 3"):
        SegmentationLoss(3)(torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
