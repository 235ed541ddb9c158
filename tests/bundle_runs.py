# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Runs the bundle in process, as ``python -m monai.bundle run`` would, on data sets of a few voxels that it makes."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from PIL import Image

from medmoe.errors import MedMoEError
from medmoe.tasks import make_tasks
from medmoe.training.excepthook import find_error
from medmoe.training.settings import RULES

ROOT = Path(__file__).resolve().parents[1]
BUNDLES, METHODS = ROOT / "bundles", ROOT / "configs" / "methods"
TRAIN, EVALUATE, INFERENCE = (BUNDLES / f"{name}.json" for name in ("pmoe_seg", "evaluate", "inference"))
COMPOSED = tuple(BUNDLES / f"pmoe_{name}.json" for name in ("multitask", "multimodal", "full", "cls"))
"""Bundles that take their machinery from ``pmoe_seg.json``."""

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
TINY_EXPERTS = {
    **SHORT,
    **RANDOM,
    "general": "timm/test_vit",
    "general_size": 32,
    "medical": "timm/test_vit2",
    "medical_size": 48,
    "medical_lora": 2,
    "spatial_dims": 2,
    "roi_size": [32, 32],
    "batch_size": 2,
}
"""Two experts of a few layers, 64 channels wide, in 2-D."""


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


class PowerCut(MedMoEError):
    """What ends a training in these tests."""


def cut(step: int) -> Callable[[Any], None]:
    """Ends a training before ``step``, as no handler expects it."""

    def fail(engine: Engine) -> None:
        raise PowerCut

    event = Events.ITERATION_STARTED(once=step)
    return lambda workflow: part(workflow, "train::trainer").add_event_handler(event, fail)


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


def write_cases(folder: Path, settings: Mapping[str, Any], training: int = 4) -> Path:
    """Gray pictures of 40 x 44 with all that the tasks and conditions of a bundle's ``settings`` need.

    There are ``training`` cases, and two each for validation and test, called case0 and so on. Masks are discs of 255,
    ages are different in all cases, categories and image-level classes take turns, so that every split has two.
    """
    generator = np.random.default_rng(random.getrandbits(32))
    tasks = make_tasks(settings.get("tasks"), settings.get("num_classes", 2))
    conditions = {item["name"]: item["kind"] for item in settings.get("conditions") or ()}
    columns = [task.target for task in tasks if not task.dense]
    columns += [name for name, kind in conditions.items() if kind != "image"]
    rows = []
    for index in range(training + 4):
        name = f"case{index}"
        folders = {"images": generator.uniform(0, 60, (40, 44))}
        for task in tasks:
            for label in task.foreground if task.kind in ("classes", "labels") else ():
                mask = disc(generator)
                folders["images"] += 100 * mask
                inner = f"/{label.replace(' ', '_')}" if task.kind == "labels" else ""
                folders[(task.target or "masks") + inner] = 255 * mask
        folders |= {name: generator.uniform(0, 255, (40, 44)) for name, kind in conditions.items() if kind == "image"}
        for place, values in folders.items():
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / place / f"{name}.png")
        row = {task.target: task.names[index % task.channels] for task in tasks if not task.dense}
        values = {"number": 40 + index, "category": "AB"[index % 2], "text": f"report {index}"}
        rows.append({"case": name, **row, **{key: values[kind] for key, kind in conditions.items() if kind in values}})
    if columns:
        write_table(folder / settings["table"], rows)
    names = [row["case"] for row in rows]
    splits = {"train": names[:training], "validation": names[training : training + 2], "test": names[training + 2 :]}
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder


def disc(generator: np.random.Generator) -> Any:
    """A disc somewhere in a picture of 40 x 44."""
    y, x = np.mgrid[:40, :44]
    return (y - generator.uniform(14, 26)) ** 2 + (x - generator.uniform(14, 30)) ** 2 < 100


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def settings_of(bundle: Path) -> dict[str, Any]:
    """The settings in the file of a bundle, without those that it takes from another."""
    return {name: value for name, value in json.loads(bundle.read_text()).items() if name in RULES and not taken(value)}


def taken(value: Any) -> bool:
    """Whether a value of a bundle is taken from another file."""
    return isinstance(value, str) and value.startswith("%")
