# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The loss of one task or several, and the inferer that hands it everything the network knows.

What nobody has labelled trains nothing: voxels that are 255 in a mask, NaN in a distance, images that are -1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.losses import DiceLoss
from monai.networks.utils import one_hot
from torch import Tensor, nn

from medmoe.errors import ConfigError, some
from medmoe.networks.network import Parts, plain
from medmoe.tasks import UNLABELLED, Task

NO_CLASS = -1


class PartsInferer(Inferer):
    """Calls ``network.parts``, so that the loss sees the experts' own logits and the auxiliary losses."""

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return network.parts(plain(inputs), *args, **kwargs)  # type: ignore[attr-defined]


def labelled(task: Task, target: Tensor) -> Tensor:
    """Where ``target`` says something, as booleans of its shape."""
    if task.kind == "distance":
        return ~target.isnan()
    return target != (UNLABELLED if task.dense else NO_CLASS)


class TaskLoss(nn.Module):
    """Every task's loss on its logits and on every expert's own (late fusion), weighted, plus the auxiliary losses.

    * "classes": Dice + cross-entropy. The background is left out of the Dice term: it is nearly always large, easy, and
      implied by the others.
    * "labels": Dice + binary cross-entropy of every channel.
    * "boundary": binary cross-entropy in which the boundary and the rest weigh alike, as in HED (Xie and Tu, ICCV
      2015): voxels on it count by the batch's share of those that are not, and the other way round. Divided by the sum
      of these weights (our reading), so that it is of the size of the other losses.
    * "distance": mean absolute error, in units of :data:`medmoe.tasks.DISTANCE_LIMIT`.
    * "image": cross-entropy.

    By default the Dice term sums over the batch before it divides; otherwise every sample without a class would add a
    constant 1. Tasks without a label in the batch add nothing.

    With w_t of ``task.weight`` and L_t of a task, the whole is the sum over the tasks with w_t > 0 of

        w_t L_t                       or, where the network has learned log-variances s_t,
        w_t exp(-s_t) L_t + s_t       our reading of Kendall, Gal and Cipolla, CVPR 2018, for losses of any kind

    A task of weight 0 adds nothing, s_t included, and its parameters get no gradient.

    Args:
        tasks: of the network, at least one with a weight above 0.
        expert_weight: weight of the mean over the experts' own losses, at least 0.
        include_background: whether class 0 counts in the Dice term.
        batch_dice: whether the Dice term sums over the batch first.
        dice_weight: weight of the Dice term, at least 0.
        ce_weight: weight of the cross-entropy beside it, at least 0.

    Attributes:
        last: of the last call: the loss of each task that trains and had a label, unweighted (``<task>``), the
            auxiliary losses (``auxiliary/<name>``) and log-variances (``log_variance/<task>``).

    Raises:
        ConfigError: every task has weight 0.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        expert_weight: float = 0.5,
        include_background: bool = False,
        batch_dice: bool = True,
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.tasks, self.expert_weight = [task for task in tasks if task.weight > 0], expert_weight
        if not self.tasks:
            raise ConfigError(f"weight=0 in every task ({some([t.name for t in tasks])}): nothing would train")
        self.first = 0 if include_background else 1
        self.dice_weight, self.ce_weight = dice_weight, ce_weight
        self.dice = DiceLoss(batch=batch_dice, reduction="none")
        self.last: dict[str, float] = {}

    def forward(self, parts: Parts, targets: Mapping[str, Tensor]) -> Tensor:
        """A scalar float32 loss.

        Args:
            parts: of the network.
            targets: by task, on the logits' device; see :mod:`medmoe.tasks` and :func:`labelled`. "classes"
                (B, 1, H, W[, D]), other dense kinds (B, C, H, W[, D]), "image" (B,). One that is absent is unlabelled.

        Raises:
            ValueError: for logits that do not have the task's channels or the target's grid.
        """
        total = torch.zeros((), device=next(iter(parts.outputs.values())).device)
        terms: dict[str, Tensor] = {}
        for task in self.tasks:
            target = plain(targets[task.name]) if task.name in targets else None
            if target is None or not labelled(task, target).any():
                total = total + parts.outputs[task.name].flatten()[:0].sum()  # its gradient is zero, not absent
                continue
            terms[task.name] = loss = self.with_experts(task, parts, target)
            if parts.log_variances:
                variance = terms[f"log_variance/{task.name}"] = parts.log_variances[task.name]
                total = total + task.weight * (-variance).exp() * loss + variance
            else:
                total = total + task.weight * loss
        for name, value in parts.auxiliary.items():
            terms[f"auxiliary/{name}"] = value.float()
            total = total + value.float()
        values = torch.stack([term.detach() for term in terms.values()]).tolist() if terms else []
        self.last = dict(zip(terms, values, strict=True))
        return total

    def with_experts(self, task: Task, parts: Parts, target: Tensor) -> Tensor:
        """The loss of a task that has a label, with the experts' own."""
        loss = self.of(task, parts.outputs[task.name], target)
        own = [self.of(task, outputs[task.name], target) for outputs in parts.expert_outputs if task.name in outputs]
        return loss + self.expert_weight * torch.stack(own).mean() if own else loss

    def of(self, task: Task, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of one set of a task's logits, in float32."""
        expected = (len(target), task.channels, *target.shape[2:])
        if logits.shape != expected:
            raise ValueError(f"task {task.name}: the logits are {tuple(logits.shape)}, its target asks for {expected}")
        loss: Tensor = getattr(self, task.kind)(plain(logits).float(), target)
        return loss

    def classes(self, logits: Tensor, target: Tensor) -> Tensor:
        """Dice + cross-entropy of exclusive classes."""
        known = target != UNLABELLED
        truth = one_hot(target.where(known, 0), logits.shape[1])[:, self.first :]
        dice = self.dice_of(logits.softmax(1)[:, self.first :], truth, known.expand_as(truth))
        entropy = F.cross_entropy(logits, target[:, 0].long(), ignore_index=UNLABELLED)
        return self.dice_weight * dice + self.ce_weight * entropy

    def labels(self, logits: Tensor, target: Tensor) -> Tensor:
        """Dice + binary cross-entropy of overlapping masks."""
        known = target != UNLABELLED
        dice = self.dice_of(logits.sigmoid(), target.where(known, 0).float(), known)
        entropy = F.binary_cross_entropy_with_logits(logits[known], target[known].float())
        return self.dice_weight * dice + self.ce_weight * entropy

    def dice_of(self, probability: Tensor, truth: Tensor, known: Tensor) -> Tensor:
        """The Dice term over what is known, a mean over the channels (and samples) that have any of it."""
        axes = tuple(axis for axis in range(truth.dim()) if axis > 1 or (axis == 0 and self.dice.batch))
        each: Tensor = self.dice(probability * known, truth * known)
        return each.flatten()[known.any(axes).flatten()].mean()

    def boundary(self, logits: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy in which both sides weigh alike."""
        known = target != UNLABELLED
        truth = target[known].float()
        entropy = F.binary_cross_entropy_with_logits(logits[known], truth, reduction="none")
        share = truth.mean()
        weight = torch.where(truth > 0, 1 - share, share)
        weight = torch.where((share > 0) & (share < 1), weight, 1)  # a batch with one side only
        return (weight * entropy).sum() / weight.sum()

    def distance(self, logits: Tensor, target: Tensor) -> Tensor:
        """Mean absolute error."""
        known = ~target.isnan()
        return F.l1_loss(logits[known], target[known].float())

    def image(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of one class for each image."""
        return F.cross_entropy(logits, target.long(), ignore_index=NO_CLASS)
