# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Datalists and splits, reading with checks, transforms there and back, and reproducible batches."""

from medmoe.data.check import Report, check_cases
from medmoe.data.datalist import Case, cases_of, class_names, datalists, load_cases, split_cases, split_of, write_split
from medmoe.data.dataset import CaseDataset, EpochSampler, loader
from medmoe.data.transforms import augmentation, evaluation_preprocessing, postprocessing, preprocessing

__all__ = [
    "Case",
    "CaseDataset",
    "EpochSampler",
    "Report",
    "augmentation",
    "cases_of",
    "check_cases",
    "class_names",
    "datalists",
    "evaluation_preprocessing",
    "load_cases",
    "loader",
    "postprocessing",
    "preprocessing",
    "split_cases",
    "split_of",
    "write_split",
]
