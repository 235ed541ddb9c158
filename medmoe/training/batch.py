# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""From a batch of the loader to what an engine hands to network and loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.engines import PrepareBatch as MonaiPrepareBatch
from torch import Tensor

from medmoe.networks.network import plain
from medmoe.tasks import Task


class PrepareBatch(MonaiPrepareBatch):
    """Image, targets and condition of a batch, for MONAI's supervised engines.

    Args:
        tasks: whose targets are taken from the batch, each below its name.
        targets: ``True`` for a trainer, whose loss wants a dictionary of targets. ``False`` for an evaluator, whose
            postprocessing takes the targets from the batch: it gets ``label``, or ``None`` where there is none.
    """

    def __init__(self, tasks: Sequence[Task], targets: bool = True) -> None:
        self.tasks, self.targets = list(tasks), targets

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any] | tuple[Tensor, Any, tuple[()], dict[str, Any]]:
        """(image, targets), and where the batch has a condition also () and ``{"condition": ...}``, on ``device``."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, non_blocking=non_blocking, **kwargs)

        image = moved(batchdata["image"])
        names = [task.name for task in self.tasks] if self.targets else ["label"]
        targets = {name: moved(batchdata[name]) for name in names if name in batchdata}
        found = targets if self.targets else targets.get("label")
        if "condition" not in batchdata:
            return image, found
        condition = {kind: plain(moved(values)) for kind, values in batchdata["condition"].items()}
        return image, found, (), {"condition": condition}
