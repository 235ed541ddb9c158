# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Sliding windows, metrics on the grid of the files, and prediction of masks."""

from medmoe.inference.inferer import WindowInferer, sliding_window
from medmoe.inference.inputs import InputDataset, find_inputs
from medmoe.inference.metrics import CaseDice, CaseHD95, CaseIoU, CaseTable
from medmoe.inference.writer import SaveMask

__all__ = [
    "CaseDice",
    "CaseHD95",
    "CaseIoU",
    "CaseTable",
    "InputDataset",
    "SaveMask",
    "WindowInferer",
    "find_inputs",
    "sliding_window",
]
