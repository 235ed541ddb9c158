# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Sliding windows, scores of every task on the grid of the files, and prediction of masks."""

from medmoe.inference.inferer import WindowInferer, sliding_window
from medmoe.inference.inputs import InputDataset, find_inputs, with_conditions
from medmoe.inference.task_metrics import CaseTable, TaskMetric, additional_metrics, key_metric, task_metrics
from medmoe.inference.writer import SaveMask

__all__ = [
    "CaseTable",
    "InputDataset",
    "SaveMask",
    "TaskMetric",
    "WindowInferer",
    "additional_metrics",
    "find_inputs",
    "key_metric",
    "sliding_window",
    "task_metrics",
    "with_conditions",
]
