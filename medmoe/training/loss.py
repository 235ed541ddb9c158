# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The segmentation loss, and the inferer that hands it everything the network knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from monai.losses import DiceCELoss
from torch import Tensor, nn

from medmoe.networks.segmenter import plain


class PartsInferer(Inferer):
    """Calls ``network.parts``, so that the loss sees the experts' own logits and the auxiliary losses."""

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return network.parts(plain(inputs), *args, **kwargs)  # type: ignore[attr-defined]


class SegmentationLoss(nn.Module):
    """Dice + cross-entropy on the logits, on every expert's own logits (late fusion), plus the auxiliary losses.

    The background is left out of the Dice term: it is nearly always large, easy, and implied by the others. By default
    the Dice term sums over the batch before it divides; otherwise every sample without a class would add a constant 1.

    Args:
        num_classes: channels of the logits, background included, at least 2.
        include_background: whether class 0 counts in the Dice term.
        batch_dice: whether the Dice term sums over the batch first.
        dice_weight: weight of the Dice term, at least 0.
        ce_weight: weight of the cross-entropy, at least 0.
        expert_weight: weight of the mean over the experts' own losses, at least 0.
    """

    def __init__(
        self,
        num_classes: int,
        include_background: bool = False,
        batch_dice: bool = True,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        expert_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be at least 2, got {num_classes}")
        self.num_classes, self.expert_weight = num_classes, expert_weight
        self.dice_ce = DiceCELoss(
            include_background=include_background,
            to_onehot_y=True,
            softmax=True,
            batch=batch_dice,
            lambda_dice=dice_weight,
            lambda_ce=ce_weight,
        )

    def forward(self, prediction: Any, label: Tensor) -> Tensor:
        """A scalar float32 loss.

        Args:
            prediction: logits (B, num_classes, H, W[, D]), or the network's ``Parts``.
            label: (B, 1, H, W[, D]), integer classes 0 to num_classes - 1.
        """
        label = plain(label).long()
        if isinstance(prediction, Tensor):
            return self.segmentation(prediction, label)
        loss = self.segmentation(prediction.logits, label)
        if prediction.expert_logits:
            own = [self.segmentation(logits, label) for logits in prediction.expert_logits]
            loss = loss + self.expert_weight * torch.stack(own).mean()
        for value in prediction.auxiliary.values():
            loss = loss + value.float()
        return loss

    def segmentation(self, logits: Tensor, label: Tensor) -> Tensor:
        """Dice + cross-entropy of one set of logits, in float32."""
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"the logits have {logits.shape[1]} channels, expected num_classes = {self.num_classes}")
        loss: Tensor = self.dice_ce(plain(logits).float(), label)
        return loss
