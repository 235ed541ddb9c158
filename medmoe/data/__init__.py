# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Datalists and splits, reading with checks, transforms there and back, and reproducible batches."""

from medmoe.data.check import Report, check_cases
from medmoe.data.conditions import condition_problems, control, encode, fit
from medmoe.data.datalist import Case, class_names
from medmoe.data.dataset import CaseDataset, EpochSampler, loader
from medmoe.data.postprocess import main_names, main_task, postprocessing
from medmoe.data.splits import cases_of, datalists, load_cases, split_cases, split_of, write_split
from medmoe.data.transforms import augmentation, evaluation_preprocessing, preprocessing

__all__ = [
    "Case",
    "CaseDataset",
    "EpochSampler",
    "Report",
    "augmentation",
    "cases_of",
    "check_cases",
    "class_names",
    "condition_problems",
    "control",
    "datalists",
    "encode",
    "evaluation_preprocessing",
    "fit",
    "load_cases",
    "loader",
    "main_names",
    "main_task",
    "postprocessing",
    "preprocessing",
    "split_cases",
    "split_of",
    "write_split",
]
