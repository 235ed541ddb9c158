# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""From logits on the network's grid to predictions on the grid of the files."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Transform
from torch import Tensor
from torch.nn.functional import one_hot

from medmoe.networks.network import plain
from medmoe.tasks import UNLABELLED, Task, single_task


class BackToFiled(Invertd):
    """``Invertd`` that does not warn where there is nothing to invert, as for pictures."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "inverse has been called but no invertible", UserWarning)
            inverted: dict[Hashable, Any] = super().__call__(data)
        return inverted


def postprocessing(
    num_classes: int, preprocessing: Compose, with_label: bool = True, tasks: Sequence[Task] | None = None
) -> Compose:
    """From logits on the network's grid to predictions on the grid of the files: see :class:`TaskResults`.

    Probabilities are brought back (trilinearly where the image was resampled) before the largest is taken. ``image`` is
    brought back as well, so that pictures show image, label and prediction on one grid.

    Args:
        num_classes: of plain segmentation.
        preprocessing: the transforms that ``image`` went through.
        with_label: whether there are targets.
        tasks: those of the network; none: plain segmentation.
    """
    return Compose([TaskResults(tasks or single_task(num_classes), preprocessing, with_label)])


def main_task(tasks: Sequence[Task]) -> Task | None:
    """The first task with masks of its own: what tables and pictures of a segmentation show."""
    return next((task for task in tasks if task.kind in ("classes", "labels")), None)


def main_names(tasks: Sequence[Task]) -> list[str]:
    """Names of the channels of ``pred`` and ``label`` after :class:`TaskResults`, the background first."""
    task = main_task(tasks)
    return [] if task is None else list(task.names) if task.kind == "classes" else ["no label", *task.names]


class TaskResults(Transform):
    """From logits to what metrics, tables and pictures take.

    A sample, without batch, comes with ``image`` as preprocessing left it, ``pred``: logits by task name, (C, H, W[,
    D]) or (C,) for an image-level task, or those of the one task alone; and the targets under the tasks' names. It
    leaves with

    - ``pred_<task>``: float32 probabilities, for "distance" the clipped distance, on the grid of the file; (C,) for an
      image-level task.
    - ``target_<task>``, with labels: the target as it came; for an image-level task the index of the class, or -1.
    - ``pred`` of the main task (see `main_task`): one-hot float32 (K, H, W[, D]), the background first; for overlapping
      labels channel 0 is where there is no label, the others are where probabilities are at least 0.5.
    - ``label``, with labels: the same of the target. Where it is not labelled both are 0 in all channels that are not.
    - ``labelled``, with labels: bool (K,), which channels are labelled anywhere in this case.
    - ``image`` on the grid of the file.

    Without labels ``pred`` is (1, H, W[, D]) class indices, or (channels, H, W[, D]) 0 and 1 for overlapping labels;
    uint8. With image-level tasks alone ``pred`` is the first one's probabilities, and there is no ``label``.

    MONAI's engines put what is new, ``pred`` and ``label`` into ``engine.state.output``; ``engine.state.batch`` keeps
    the targets under the tasks' names.

    Args:
        tasks: those of the network.
        preprocessing: the transforms that ``image`` went through.
        with_label: whether there are targets.
    """

    def __init__(self, tasks: Sequence[Task], preprocessing: Compose, with_label: bool = True) -> None:
        self.tasks, self.with_label, self.main = tuple(tasks), with_label, main_task(tasks)
        self.back = BackToFiled(("dense", "image"), preprocessing, orig_keys=("image", "image"), nearest_interp=False)
        self.image_back = BackToFiled("image", preprocessing, orig_keys="image", nearest_interp=False)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        sample = dict(data)
        predictions = self.on_files(sample)
        device = predictions[self.tasks[0].name].device
        targets = {task.name: _moved(sample[task.name], device) for task in self.tasks} if self.with_label else {}
        sample |= {f"pred_{name}": values for name, values in predictions.items()}
        sample |= {f"target_{name}": values for name, values in targets.items()}
        if self.main is None:
            return {**sample, "pred": predictions[self.tasks[0].name]}
        probabilities = predictions[self.main.name]
        if not self.with_label:
            return {**sample, "pred": decided(self.main, probabilities)}
        pred, label, labelled = _compared(self.main, probabilities, plain(targets[self.main.name]))
        sample["pred"], sample["label"] = (MetaTensor(one, meta=probabilities.meta) for one in (pred, label))
        return {**sample, "labelled": labelled}

    def on_files(self, sample: dict[Hashable, Any]) -> dict[str, Any]:
        """Activations by task; what is dense, and ``image`` in the sample, goes back to the grid of the file."""
        logits = sample["pred"] if isinstance(sample["pred"], Mapping) else {self.tasks[0].name: sample["pred"]}
        values = {task.name: _activated(task, plain(logits[task.name])) for task in self.tasks}
        dense = [task for task in self.tasks if task.dense]
        if not dense:
            sample["image"] = self.image_back({"image": sample["image"]})["image"]
            return values
        stacked = MetaTensor(torch.cat([values[task.name] for task in dense]))  # one resampling for all
        returned = self.back({"dense": stacked, "image": sample["image"]})
        sample["image"] = returned["image"]
        pieces = returned["dense"].split([task.channels for task in dense])
        return values | {task.name: piece for task, piece in zip(dense, pieces, strict=True)}


def _moved(target: Any, device: torch.device) -> Any:
    """A target on the device of the predictions; engines leave the batch where the loader put it."""
    return target.to(device) if isinstance(target, Tensor) else target


def _activated(task: Task, logits: Tensor) -> Tensor:
    """What logits (C, ...) of a task mean."""
    logits = logits.float()
    if task.kind in ("classes", "image"):
        return logits.softmax(0)
    return logits.clamp(-1, 1) if task.kind == "distance" else logits.sigmoid()


def decided(task: Task, probabilities: Tensor) -> Tensor:
    """The classes or labels of an image without a target."""
    chosen = probabilities.argmax(0, keepdim=True) if task.kind == "classes" else probabilities >= 0.5
    return chosen.to(torch.uint8)


def _compared(task: Task, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction and target as one-hot channels, 0 where the target is not labelled, and which channels are."""
    known = target != UNLABELLED
    chosen = plain(decided(task, probabilities))
    if task.kind == "classes":
        count = len(task.names)
        pred, label = (
            one_hot(mask[0].long().clamp(max=count - 1), count).movedim(-1, 0).float() * known
            for mask in (chosen, target)
        )
        return pred, label, known.any().expand(count)
    pred, label = (_with_none((mask == 1) & known) for mask in (chosen, target))
    drawn = known.flatten(1).any(1)
    return pred, label, torch.cat([drawn.any()[None], drawn])


def _with_none(masks: Tensor) -> Tensor:
    """Overlapping labels with a channel before them that is where there is none."""
    return torch.cat([~masks.any(0, keepdim=True), masks]).float()
