# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The bundle as it is shipped, run in process on data of a few voxels with experts of random weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

from medmoe.errors import ConfigError, MedMoEError
from medmoe.training.excepthook import find_error
from medmoe.training.preflight import literal_settings
from medmoe.training.settings import RULES

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
TRAIN = ("pmoe_seg.json",)
OVERLAYS = [path.name for path in sorted(BUNDLES.glob("*.json")) if path.name not in (*TRAIN, "metadata.json")]
SMALL = {
    "general_weights": "random",
    "medical_weights": "random",
    "general_size": 28,
    "medical_size": 64,
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

Make = Callable[..., ConfigWorkflow]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four labelled volumes of 32 x 32 x 6 in the layout of the Medical Decathlon: a bright ball in a dim one."""
    folder = tmp_path / "data"
    entries = []
    generator = np.random.default_rng(random.getrandbits(32))
    for index in range(4):
        center = generator.uniform(12, 20, 3) * (1, 1, 0.2)
        axes = np.meshgrid(*(np.arange(size) for size in (32, 32, 6)), indexing="ij")
        distance = sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True)) ** 0.5
        label = (distance < 10).astype(np.uint8) + (distance < 5)
        image = (label * 100 + generator.normal(50, 10, label.shape)).astype(np.float32)
        entry = {"image": f"imagesTr/case{index}.nii.gz", "label": f"labelsTr/case{index}.nii.gz"}
        for key, array in (("image", image), ("label", label)):
            (folder / entry[key]).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / entry[key])
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    return folder


@pytest.fixture
def make(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.chdir(tmp_path)

    def workflow(*names: str, kind: str = "train", **overrides: Any) -> ConfigWorkflow:
        files = [str(BUNDLES / name) for name in names or TRAIN]
        paths = {"dataset_dir": str(dataset), "output_dir": str(tmp_path / "run")}
        return ConfigWorkflow(files, logging_file=False, workflow_type=kind, **{**SMALL, **paths, **overrides})

    return workflow


def error_of(workflow: ConfigWorkflow) -> MedMoEError:
    with pytest.raises(RuntimeError) as caught:
        workflow.initialize()
    error = find_error(caught.value)
    assert error is not None
    return error


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    settings = set()
    for name in (*TRAIN, *OVERLAYS):
        config = json.loads((BUNDLES / name).read_text())
        settings |= {key for key, value in config.items() if key in RULES or not _is_built(value)}
    assert settings - {"bundle_root", "device"} == set(RULES)


def _is_built(value: Any) -> bool:
    return isinstance(value, dict) or str(value).startswith(("$", "@")) or "$" in str(value)


def test_defaults_agree_with_the_metadata() -> None:
    config = json.loads((BUNDLES / TRAIN[0]).read_text())
    tensors = json.loads((BUNDLES / "metadata.json").read_text())["network_data_format"]
    assert tensors["inputs"]["image"]["num_channels"] == config["in_channels"]
    assert tensors["outputs"]["pred"]["num_channels"] == config["num_classes"]
    assert len(tensors["outputs"]["pred"]["spatial_shape"]) == config["spatial_dims"]


def test_no_paths_of_one_machine() -> None:
    for path in BUNDLES.iterdir():
        assert not [word for word in ("/home/", "/root", "/work", "/tmp", "C:\\") if word in path.read_text()], path


@pytest.mark.slow
def test_trains_on_other_data_with_overrides_alone(make: Make, tmp_path: Path) -> None:
    workflow = make()
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    assert {"best.safetensors", "last.safetensors", "metrics.jsonl", "run.json", "splits.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_a_misspelt_override_stops_before_anything_is_written(make: Make, tmp_path: Path) -> None:
    error = error_of(make(num_clases=3, **{"train#trainer#max_epocs": 3}))
    assert isinstance(error, ConfigError)
    assert "num_clases: nothing reads this key. Did you mean num_classes?" in str(error)
    assert "train::trainer::max_epocs: SupervisedTrainer takes no such argument. Did you mean max_epochs?" in str(error)
    assert not (tmp_path / "run").exists()


def test_missing_paths_are_named_before_anything_is_built(make: Make) -> None:
    error = error_of(make(dataset_dir="nowhere", general_weights="lost.safetensors"))
    assert "dataset_dir: there is no 'nowhere'" in str(error)
    assert "general_weights: there is no 'lost.safetensors'" in str(error)
    assert "Relative paths count from the current folder" in str(error)


def test_settings_for_the_record(make: Make) -> None:
    workflow = make(num_labelled=1)
    settings = literal_settings(workflow.parser)
    assert settings["num_labelled"] == 1 and settings["roi_size"] == [32, 32, 4]
    assert json.loads(json.dumps(settings)) == settings
    assert set(RULES) & set(json.loads((BUNDLES / TRAIN[0]).read_text())) <= set(settings)
