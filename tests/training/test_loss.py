# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Every task's loss against the same written out, and that nothing unlabelled trains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from scipy.special import log_softmax
from torch import Tensor
from training.toy import ToyNetwork

from medmoe.errors import ConfigError
from medmoe.networks.network import Parts
from medmoe.tasks import Task, single_task
from medmoe.training.loss import PartsInferer, TaskLoss

MASK = Task("tissue", "classes", ("background", "gray", "white"))
ORGANS = Task("organs", "labels", ("heart", "lung"))
EDGES = Task("edges", "boundary", ("heart", "lung"), of="organs")
FAR = Task("far", "distance", ("heart", "lung"), of="organs")
GRADE = Task("grade", "image", ("low", "middle", "high"))
EVERY = [MASK, ORGANS, EDGES, FAR, GRADE]
SIZE = (6, 7)


def parts_of(outputs: dict[str, Tensor], **more: object) -> Parts:
    return Parts(**{"outputs": outputs, "expert_outputs": [], "auxiliary": {}, "log_variances": {}, **more})  # type: ignore[arg-type]


def logits_of(task: Task, batch: int = 2) -> Tensor:
    return torch.randn(batch, task.channels, *(SIZE if task.dense else ())).requires_grad_()


def target_of(task: Task, batch: int = 2) -> Tensor:
    """A target that is labelled everywhere."""
    if task.kind == "image":
        return torch.randint(0, task.channels, (batch,))
    if task.kind == "classes":
        return torch.randint(0, task.channels, (batch, 1, *SIZE), dtype=torch.uint8)
    if task.kind == "distance":
        return torch.rand(batch, task.channels, *SIZE) * 2 - 1
    return torch.randint(0, 2, (batch, task.channels, *SIZE), dtype=torch.uint8)


def nothing_of(task: Task, batch: int = 2) -> Tensor:
    """A target that is labelled nowhere."""
    return torch.full_like(target_of(task, batch), {"image": -1, "distance": math.nan}.get(task.kind, 255))


def alone(task: Task, logits: Tensor, target: Tensor, **options: object) -> Tensor:
    return TaskLoss([task], **options)(parts_of({task.name: logits}), {task.name: target})  # type: ignore[arg-type]


def expected(logits: Tensor, label: Tensor, background: bool = False, batch: bool = True) -> Tensor:
    """Dice + cross-entropy written out."""
    classes, label = logits.shape[1], label.long()
    probability, truth = logits.softmax(1), F.one_hot(label[:, 0], classes).movedim(-1, 1).float()
    first = 0 if background else 1
    axes = ((0,) if batch else ()) + tuple(range(2, logits.ndim))
    overlap = (probability * truth).sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (probability.sum(axes) + truth.sum(axes) + 1e-5)
    return dice[..., first:].mean() + F.cross_entropy(logits, label[:, 0])


@pytest.mark.parametrize("size", [(5, 7), (4, 5, 3)])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_plain_segmentation_is_dice_and_cross_entropy(size: tuple[int, ...], background: bool, batch: bool) -> None:
    """Bit by bit MONAI's, with gradients."""
    logits, label = torch.randn(2, 3, *size, requires_grad=True), torch.randint(0, 3, (2, 1, *size))
    [task] = single_task(3)
    loss = alone(task, logits, label, include_background=background, batch_dice=batch)
    torch.testing.assert_close(loss, expected(logits, label, background, batch), rtol=1e-5, atol=1e-6)
    monai = DiceCELoss(include_background=background, to_onehot_y=True, softmax=True, batch=batch)(logits, label)
    assert torch.equal(loss, monai)
    [own], [theirs] = (torch.autograd.grad(value, [logits]) for value in (loss, monai))
    assert torch.equal(own, theirs)


def bce(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, logits) - logits * truth


def test_overlapping_labels() -> None:
    logits, target = logits_of(ORGANS), target_of(ORGANS)
    x, t = logits.detach().numpy().astype(float), target.numpy().astype(float)
    p = 1 / (1 + np.exp(-x))
    dice = 1 - 2 * (p * t).sum((0, 2, 3)) / (p.sum((0, 2, 3)) + t.sum((0, 2, 3)))
    assert alone(ORGANS, logits, target).item() == pytest.approx(dice.mean() + bce(x, t).mean(), rel=1e-4)


def test_a_boundary_and_the_rest_weigh_alike() -> None:
    logits, target = logits_of(EDGES), (torch.rand(2, 2, *SIZE) < 0.1).to(torch.uint8)
    target[0, 0, 0, 0], target[0, 0, 0, 1] = 1, 0
    x, t = logits.detach().numpy().astype(float), target.numpy().astype(float)
    weight = np.where(t == 1, 1 - t.mean(), t.mean())
    loss = alone(EDGES, logits, target)
    assert loss.item() == pytest.approx((weight * bce(x, t)).sum() / weight.sum(), rel=1e-4)
    assert loss.item() == pytest.approx((bce(x, t)[t == 1].mean() + bce(x, t)[t == 0].mean()) / 2, rel=1e-4)
    for side in (0, 1):
        one_sided = torch.full_like(target, side)
        assert alone(EDGES, logits, one_sided).item() == pytest.approx(bce(x, np.full_like(t, side)).mean(), rel=1e-4)


def test_distance_and_image() -> None:
    logits, target = logits_of(FAR), target_of(FAR)
    target[0, 1, 2:] = math.nan
    error = np.abs(logits.detach().numpy() - target.numpy())
    assert alone(FAR, logits, target).item() == pytest.approx(np.nanmean(error), rel=1e-5)
    logits, target = logits_of(GRADE, 5), torch.tensor([2, -1, 0, 0, -1])
    rows = log_softmax(logits.detach().numpy().astype(float), 1)
    assert alone(GRADE, logits, target).item() == pytest.approx(-(rows[0, 2] + rows[2, 0] + rows[3, 0]) / 3, rel=1e-5)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.kind)
def test_what_is_not_labelled_neither_counts_nor_trains(task: Task, batch: bool) -> None:
    """The loss is that of the labelled voxels alone, whatever the network says of the others."""
    logits, target, nothing = logits_of(task), target_of(task), nothing_of(task)
    keep = torch.rand(target.shape[2:] if task.dense else (2,)) < 0.5
    keep.view(-1)[:2] = torch.tensor([True, False])
    partly = torch.where(keep, target, nothing)
    other = torch.where(keep if task.dense else keep[:, None], logits.detach(), torch.randn(logits.shape) * 9)
    losses = [alone(task, values, partly, batch_dice=batch) for values in (logits, other)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)
    if task.dense:  # the same as an image of the labelled voxels alone
        cut = logits.detach()[..., keep][..., None], target[..., keep][..., None]
        torch.testing.assert_close(losses[0], alone(task, *cut, batch_dice=batch), rtol=1e-5, atol=1e-6)
    [gradient] = torch.autograd.grad(losses[0], [logits])
    hidden = ~keep if task.dense else ~keep[:, None]
    assert not (gradient * hidden).any() and gradient.any()


def test_cases_without_a_myocardium_mask_do_not_train_its_channel() -> None:
    """Half of the cases have one of two masks only; the other half trains that channel as if it were alone."""
    task = Task("heart", "labels", ("cavity", "myocardium"))
    logits, target = torch.randn(4, 2, *SIZE, requires_grad=True), target_of(task, 4)
    target[::2, 1] = 255
    [gradient] = torch.autograd.grad(alone(task, logits, target), [logits])
    assert not gradient[::2, 1].any()
    assert gradient[::2, 0].any() and gradient[1::2, 1].any()
    target[:, 1] = 255
    loss = alone(task, logits, target)
    cavity = alone(Task("cavity", "labels", ("cavity",)), logits[:, :1], target[:, :1])
    torch.testing.assert_close(loss, cavity)


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.kind)
def test_a_task_without_any_label_adds_exactly_nothing(task: Task, absent: bool) -> None:
    others = [other for other in EVERY if other is not task]
    outputs = {t.name: logits_of(t) for t in EVERY}
    targets = {t.name: target_of(t) for t in others} | ({} if absent else {task.name: nothing_of(task)})
    variances = {t.name: torch.randn((), requires_grad=True) for t in EVERY}
    for more in ({}, {"log_variances": variances}):
        loss = TaskLoss(EVERY)
        value = loss(parts_of(outputs, **more), targets)
        without = TaskLoss(others)(parts_of(outputs, **more), targets)
        assert torch.equal(value, without)
        assert task.name not in loss.last and not any(math.isnan(number) for number in loss.last.values())
        value.backward()
        assert not outputs[task.name].grad.any()
    assert variances[task.name].grad is None and variances[others[0].name].grad is not None
    empty = TaskLoss([task])(parts_of({task.name: outputs[task.name]}), {task.name: nothing_of(task)})
    assert empty == 0 and empty.requires_grad


def test_weights_experts_and_auxiliary_losses_add_up() -> None:
    heavy = [Task(t.name, t.kind, t.names, weight=index + 0.5) for index, t in enumerate(EVERY)]
    outputs, *own = ({t.name: logits_of(t).detach() for t in EVERY if t.dense or not k} for k in range(3))
    targets = {t.name: target_of(t) for t in EVERY}
    parts = parts_of(outputs, expert_outputs=own, auxiliary={"a": torch.tensor(0.25), "b": torch.tensor(0.5)})
    loss = TaskLoss(heavy, expert_weight=0.3)
    each = {
        t.name: alone(t, outputs[t.name], targets[t.name])
        + (0.3 * sum(alone(t, o[t.name], targets[t.name]) for o in own) / 2 if t.dense else 0)
        for t in EVERY
    }
    total = sum(t.weight * each[t.name] for t in heavy) + 0.75
    torch.testing.assert_close(loss(parts, targets), total, rtol=1e-5, atol=1e-6)
    assert set(loss.last) == {*(t.name for t in EVERY), "auxiliary/a", "auxiliary/b"}
    assert loss.last["organs"] == pytest.approx(each["organs"].item(), rel=1e-5) and loss.last["auxiliary/b"] == 0.5


def test_uncertainty_weighting() -> None:
    outputs, targets = ({t.name: make(t) for t in EVERY} for make in (logits_of, target_of))
    variances = {t.name: torch.randn((), requires_grad=True) for t in EVERY}
    loss = TaskLoss(EVERY)
    value = loss(parts_of(outputs, log_variances=variances), targets)
    each = {t.name: alone(t, outputs[t.name], targets[t.name]).item() for t in EVERY}
    total = sum(math.exp(-variances[name].item()) * each[name] + variances[name].item() for name in each)
    assert value.item() == pytest.approx(total, rel=1e-5)
    value.backward()
    for name, variance in variances.items():
        assert variance.grad.item() == pytest.approx(1 - math.exp(-variance.item()) * each[name], rel=1e-4, abs=1e-5)
        assert loss.last[f"log_variance/{name}"] == pytest.approx(variance.item())


@pytest.mark.parametrize("learned", ["nothing", "others", "all"])
def test_weights_under_uncertainty_and_a_task_of_weight_0_trains_nothing(learned: str) -> None:
    """Whether the network has an s_t for it or not: no loss, no s_t, no gradient, whatever its logits are."""
    tasks = [Task(t.name, t.kind, t.names, of=t.of, weight=0.5 * index) for index, t in enumerate(EVERY)]
    outputs, targets = ({t.name: make(t) for t in EVERY} for make in (logits_of, target_of))
    with torch.no_grad():
        outputs["tissue"][0, 0, 0, 0] = math.inf
    known = {"nothing": [], "others": tasks[1:], "all": tasks}[learned]
    variances = {t.name: torch.randn((), requires_grad=True) for t in known}
    loss = TaskLoss(tasks)
    value = loss(parts_of(outputs, log_variances=variances), targets)
    each = {t.name: t.weight * loss.of(t, outputs[t.name], targets[t.name]).item() for t in tasks[1:]}
    s = {name: variances[name].item() if variances else 0.0 for name in each}
    assert value.item() == pytest.approx(sum(math.exp(-s[name]) * each[name] + s[name] for name in each), rel=1e-5)
    value.backward()
    assert outputs["tissue"].grad is None and not [name for name in loss.last if "tissue" in name]
    for t in tasks[1:] if variances else []:
        expected = 1 - math.exp(-s[t.name]) * each[t.name]
        assert variances[t.name].grad.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert learned != "all" or variances["tissue"].grad is None


def test_some_task_has_to_train() -> None:
    with pytest.raises(ConfigError, match=r"weight=0 in every task \(organs\)"):
        TaskLoss([Task("organs", "labels", ("heart",), weight=0.0)])


def test_half_precision_logits_and_metadata_give_a_plain_float32_loss() -> None:
    [task] = single_task(2)
    logits, label = torch.randn(1, 2, 6, 6).bfloat16(), MetaTensor(torch.randint(0, 2, (1, 1, 6, 6)).float())
    loss = alone(task, MetaTensor(logits), label)
    assert loss.dtype == torch.float32 and not isinstance(loss, MetaTensor)
    torch.testing.assert_close(loss, expected(logits.float(), label.as_tensor().long()), rtol=1e-5, atol=1e-6)


def test_perfect_logits_cost_nothing_and_gradients_reach_all_parts() -> None:
    [task] = single_task(3)
    label = torch.randint(0, 3, (1, 1, 6, 6))
    assert alone(task, 100.0 * F.one_hot(label[:, 0], 3).movedim(-1, 1).float(), label) < 1e-4
    network = ToyNetwork()
    TaskLoss([task])(PartsInferer()(MetaTensor(torch.rand(1, 1, 6, 6)), network), {"label": label}).backward()
    missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_the_inferer_hands_on_the_condition() -> None:
    class Network:
        def parts(self, image: Tensor, condition: dict[str, Tensor] | None = None) -> object:
            return type(image), condition

    condition = {"numbers": torch.rand(2, 3)}
    assert PartsInferer()(MetaTensor(torch.rand(1, 1, 4, 4)), Network(), condition=condition) == (Tensor, condition)  # type: ignore[arg-type]


def test_logits_that_do_not_fit_are_errors() -> None:
    [task] = single_task(3)
    with pytest.raises(
        ValueError, match=r"task label: the logits are \(1, 2, 4, 4\), its target asks for \(1, 3, 4, 4\)"
    ):
        alone(task, torch.randn(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"organs: .* \(2, 2, 6, 7\).* \(2, 2, 6, 6\)"):
        alone(ORGANS, logits_of(ORGANS), target_of(ORGANS)[..., :6])
