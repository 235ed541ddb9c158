# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Runs the bundle in process, as ``python -m monai.bundle run`` would, on data sets of a few voxels that it makes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from PIL import Image

from medmoe.errors import MedMoEError
from medmoe.training.excepthook import find_error

ROOT = Path(__file__).resolve().parents[1]
BUNDLES, METHODS = ROOT / "bundles", ROOT / "configs" / "methods"
TRAIN, EVALUATE, INFERENCE = (BUNDLES / f"{name}.json" for name in ("pmoe_seg", "evaluate", "inference"))

SHORT = {
    "decoder_channels": 8,
    "num_prompts": 2,
    "general_lora": 2,
    "roi_size": [32, 32, 4],
    "max_epochs": 2,
    "steps_per_epoch": 2,
    "val_interval": 1,
    "warmup": 1,
    "tracking_uri": "",
}
ONE_EXPERT = {
    **SHORT,
    "general": "timm/vit_tiny_patch16_224",
    "general_weights": "random",
    "general_size": 32,
    "medical": "",
}
TWO_EXPERTS = {**SHORT, "general_size": 28, "medical_size": 64}
RANDOM = {"general_weights": "random", "medical_weights": "random"}


def make(*files: Path, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
    """The workflow of the bundle's ``files``, by default the one that trains."""
    names = [str(file) for file in files or (TRAIN,)]
    return ConfigWorkflow(names, logging_file=False, workflow_type=kind, **overrides)


def run(
    *files: Path, kind: str = "train", before_run: Callable[[ConfigWorkflow], None] | None = None, **overrides: Any
) -> ConfigWorkflow:
    """Runs a bundle from beginning to end; ``before_run`` gets at its parts once they are built.

    Errors that a user can put right are raised as they are, not as MONAI wraps them.
    """
    workflow = make(*files, kind=kind, **overrides)
    hook = sys.excepthook
    try:
        workflow.initialize()
        assert workflow.check_properties() == []
        if before_run is not None:
            before_run(workflow)
        workflow.run()
        workflow.finalize()
    except Exception as error:
        raise find_error(error) or error from error
    finally:
        sys.excepthook = hook
    return workflow


def error_of(*files: Path, kind: str = "train", **overrides: Any) -> str:
    """The message with which a bundle refuses to start."""
    workflow = make(*files, kind=kind, **overrides)
    with pytest.raises(RuntimeError) as caught:
        workflow.initialize()
    error = find_error(caught.value)
    assert isinstance(error, MedMoEError)
    return str(error)


def part(workflow: ConfigWorkflow, name: str) -> Any:
    """A part of a bundle, such as ``network_def``."""
    return workflow.parser.get_parsed_content(name)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The epochs in ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_volumes(folder: Path, training: int = 3, validation: int = 2, test: int = 2) -> Path:
    """Volumes of 32 x 36 x 8 in RAS, stored as (36, 32, 8) in PLS, in the layout of the Medical Decathlon.

    A bright ball ("core") lies in a dim one ("ring"), somewhere else in each volume.
    """
    generator = np.random.default_rng(random.getrandbits(32))
    affine = np.array([[0, -1.5, 0, 20], [-1, 0, 0, 30], [0, 0, 3, -10], [0, 0, 0, 1]])
    entries = []
    for index in range(training + validation + test):
        center = generator.uniform((12, 10, 3), (24, 22, 5))
        axes = np.meshgrid(*(np.arange(size) for size in (36, 32, 8)), indexing="ij")
        distance = sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True)) ** 0.5
        label = (distance < 9).astype(np.uint8) + (distance < 5)
        image = (label * 100 + generator.normal(50, 10, label.shape)).astype(np.float32)
        entry = {"image": f"imagesTr/case{index}.nii.gz", "label": f"labelsTr/case{index}.nii.gz"}
        for key, array in (("image", image), ("label", label)):
            (folder / entry[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / entry[key])
        entries.append(entry)
    splits = {"training": entries[:training], "validation": entries[training : training + validation]}
    labels = {"0": "background", "1": "ring", "2": "core"}
    description = {"labels": labels, **splits, "test": entries[training + validation :]}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def write_pictures(folder: Path, training: int = 3, validation: int = 2) -> Path:
    """Color pictures of different sizes with masks of 0 and 255, in folders by split, without a test split."""
    generator = np.random.default_rng(random.getrandbits(32))
    for split, number in (("train", training), ("validation", validation)):
        for index in range(number):
            rows, columns = (int(size) for size in generator.integers(36, 60, 2))
            y, x = np.mgrid[:rows, :columns]
            mask = (y - rows * generator.uniform(0.3, 0.7)) ** 2 + (
                x - columns * generator.uniform(0.3, 0.7)
            ) ** 2 < 144
            picture = generator.normal(80, 10, (rows, columns, 3)) + mask[..., None] * (120, 40, 0)
            for kind, array in (("images", picture.clip(0, 255)), ("masks", mask * 255)):
                path = folder / split / kind / f"{split}{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(path)
    return folder
