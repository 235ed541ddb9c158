# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The presets of ``configs/methods`` over the bundle: each trains what its name says, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import EVALUATE, METHODS, ONE_EXPERT, RANDOM, TRAIN, error_of, make, part, run, write_volumes

import medmoe
from medmoe.training.checkpoint import read_metadata
from medmoe.training.settings import RULES

SMALL = {**RANDOM, "general_size": 28, "medical_size": 64, "decoder_channels": 8}
NAMES = ("linear", "vpt", "lora", "late", "pmoe", "pmoe_lora")


def network_of(name: str, **overrides: Any) -> torch.nn.Module:
    return part(make(TRAIN, METHODS / f"{name}.json", **SMALL, **overrides), "network_def")


def parts_of(network: Any) -> set[str]:
    """What trains: prompts, dispatchers, LoRA in the first or second expert, heads of the decoder."""
    names = [name for name, _ in network.trainable()]
    found = {f"lora {name.split('.')[1]}" for name in names if "lora_" in name}
    found |= {name.split(".")[1] for name in names if name.startswith("prompter.")}
    return found | {f"heads {len(network.decoder.heads)}"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {"heads 1"}),
        ("vpt", {"prompts", "heads 1"}),
        ("lora", {"lora 0", "lora 1", "heads 1"}),
        ("late", {"lora 0", "lora 1", "heads 2"}),
        ("pmoe", {"prompts", "dispatchers", "maps", "heads 2"}),
        ("pmoe_lora", {"prompts", "dispatchers", "maps", "lora 0", "lora 1", "heads 2"}),
    ],
)
def test_a_preset_trains_what_it_says(name: str, expected: set[str]) -> None:
    network = network_of(name)
    assert parts_of(network) == expected
    assert network(torch.rand(1, 1, 33, 30, 2)).shape == (1, 3, 33, 30, 2)


def test_all_presets_are_known_here_and_hold_settings_alone() -> None:
    assert {path.stem for path in METHODS.glob("*.json")} == set(NAMES)
    for path in METHODS.glob("*.json"):
        config = json.loads(path.read_text())
        assert config.pop("_desc_").endswith(".")
        assert set(config) <= set(RULES) and {"prompter", "general_lora", "medical_lora", "fusion"} <= set(config)


@pytest.mark.parametrize("name", NAMES)
def test_presets_work_with_either_expert_alone(name: str) -> None:
    for absent in ("general", "medical"):
        network = network_of(name, **{absent: ""})
        assert len(network.experts) == 1 and network(torch.rand(1, 1, 28, 30, 1)).shape == (1, 3, 28, 30, 1)


def test_a_preset_through_training_and_evaluation(tmp_path: Path) -> None:
    data, vpt = write_volumes(tmp_path / "data"), METHODS / "vpt.json"
    drop = ("num_prompts", "general_lora")
    settings = {name: value for name, value in ONE_EXPERT.items() if name not in drop}
    settings |= {"dataset_dir": str(data), "output_dir": str(tmp_path / "run"), "max_epochs": 1}
    workflow = run(TRAIN, vpt, **settings)
    assert workflow.version == medmoe.__version__  # metadata are still those beside the bundle
    saved = read_metadata(tmp_path / "run/best.safetensors").settings
    assert saved["prompter"] == "vpt" and saved["num_prompts"] == 10
    run(TRAIN, vpt, EVALUATE, **settings)
    assert (tmp_path / "run/evaluation_test/cases.json").is_file()
    message = error_of(TRAIN, EVALUATE, **settings)
    assert message.splitlines()[-1].strip() == "pass --general_lora 0 --medical_lora 0 --prompter vpt --fusion concat"
