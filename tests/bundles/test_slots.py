# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Each slot of the network is switched in the bundle's settings alone, and what then trains is what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import (
    EVALUATE,
    TINY_EXPERTS,
    TRAIN,
    part,
    rows_of,
    run,
    write_cases,
    write_table,
    write_volumes,
)

from medmoe.inference.predict import predict
from medmoe.networks import ExpertNetwork
from medmoe.training.checkpoint import read_metadata

BASE = {
    "tasks": [
        {"name": "areas", "kind": "labels", "names": ["left", "right"]},
        {"name": "edges", "kind": "boundary", "of": "areas"},
        {"name": "grade", "kind": "image", "names": ["low", "high"]},
    ],
    "table": "table.csv",
    "conditions": [
        {"name": "age", "kind": "number"},
        {"name": "sex", "kind": "category"},
        {"name": "second", "kind": "image"},
    ],
    "decoder": "fgmoe",
    "mope_prompts": 2,
}
PARTS = {"prompts", "dispatchers", "conditioner", "lora 0", "lora 1", "FGMoE", "2 heads", "image_head"}
"""What trains with these."""
OTHER = {"other": "timm/test_vit3", "other_weights": "random", "other_size": 32, "other_lora": 0}
SLOTS: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "everything as it is": ({}, set(), set()),
    "no prompter": ({"prompter": "none"}, {"prompts", "dispatchers"}, set()),
    "VPT": ({"prompter": "vpt"}, {"dispatchers"}, set()),
    "no conditions": ({"conditions": None}, {"conditioner"}, set()),
    "no prompts at all": ({"prompter": "none", "conditions": None}, {"prompts", "dispatchers", "conditioner"}, set()),
    "conditions of the table alone": ({"conditions": BASE["conditions"][:2]}, set(), set()),
    "conditions appended": ({"conditioning": "appended", "mope_router": "image", "condition_expert": 1}, set(), set()),
    "AdaRoute in one expert": ({"general_adaroute": 2, "adaroute_kernels": [3]}, set(), {"adaroute 0"}),
    "AdaRoute in place of LoRA": (
        {"medical_adaroute": 2, "adaroute_kernels": [], "medical_lora": 0},
        {"lora 1"},
        {"adaroute 1"},
    ),
    "concatenated": ({"fusion": "concat"}, {"2 heads"}, {"1 heads"}),
    "averaged": ({"fusion": "mean"}, {"2 heads"}, {"1 heads"}),
    "gated": ({"fusion": "gated"}, {"2 heads"}, {"1 heads"}),
    "further arguments of the methods": (
        {
            "pmoe_options": {"max_patches": 4},
            "mope_options": {"temperature": 0.5, "mapped": False},
            "fgmoe_options": {"mixer": "none"},
            "general_adaroute": 2,
            "adaroute_options": {"centers": 1},
        },
        set(),
        {"adaroute 0"},
    ),
    "plain decoder": ({"decoder": "plain"}, {"FGMoE"}, {"Refinement"}),
    "image level alone": ({"tasks": BASE["tasks"][2:], "decoder": "plain"}, {"FGMoE", "2 heads"}, set()),
    "three experts": (OTHER, {"2 heads"}, {"3 heads"}),
    "shared prompts": ({"shared_prompts": True}, set(), set()),
    "only one is prompted": ({"prompt_medical": False, "exchange": "params", "dispatch": "gate"}, set(), set()),
    "learned weights of the tasks": ({"task_weighting": "uncertainty"}, set(), {"log_variances"}),
    "activations computed again": ({"activation_checkpointing": True}, set(), set()),
}


def parts_of(names: list[str], network: ExpertNetwork) -> set[str]:
    """The parts that parameters of these names belong to."""
    found = set()
    for name in names:
        first, second = name.split(".")[:2]
        if first == "experts":
            found.add(f"{'lora' if 'lora_' in name else 'adaroute'} {second}")
        elif first == "prompter":
            found |= {second} - {"maps"}
        elif first == "decoder":
            heads = network.decoder.heads
            found.add(type(heads[0].refine).__name__ if ".refine." in name else f"{len(heads)} heads")
        else:
            found.add(first)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cases(tmp_path_factory.mktemp("data"), BASE)


@pytest.fixture(scope="module")
def no_pictures() -> dict[str, Any]:
    """They take longer than all the rest."""
    handlers = json.loads(TRAIN.read_text())["train"]["handlers"]
    drawing = [index for index, handler in enumerate(handlers) if handler["_target_"].endswith("RoutingPictures")]
    return {"validate#handlers": [], **{f"train#handlers#{index}#_disabled_": True for index in drawing}}


@pytest.mark.parametrize(("overrides", "without", "more"), SLOTS.values(), ids=SLOTS)
def test_a_slot_is_switched_by_settings(
    overrides: dict[str, Any],
    without: set[str],
    more: set[str],
    data: Path,
    no_pictures: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings = {**TINY_EXPERTS, **BASE, **overrides, "dataset_dir": str(data), "output_dir": str(tmp_path / "run")}
    before: dict[str, torch.Tensor] = {}

    def remember(workflow: Any) -> None:
        before.update({name: p.detach().clone() for name, p in part(workflow, "network_def").named_parameters()})

    short = {"max_epochs": 1, "steps_per_epoch": 1, "warmup": 0, "num_validation": 1}
    workflow = run(before_run=remember, **{**settings, **short, **no_pictures})
    network = part(workflow, "network_def")
    expected = PARTS - without | more
    assert parts_of([name for name, _ in network.trainable()], network) == expected
    changed = [name for name, p in network.named_parameters() if not torch.equal(p, before[name])]
    assert parts_of(changed, network) == expected
    assert not [name for name, p in network.named_parameters() if name in changed and not p.requires_grad]
    assert np.isfinite(rows_of(tmp_path / "run")[-1]["losses"]).all()
    saved = read_metadata(tmp_path / "run/best.safetensors").settings
    assert {name: saved[name] for name in overrides} == overrides


def test_everything_at_once_in_three_dimensions(no_pictures: dict[str, Any], tmp_path: Path) -> None:
    data = write_volumes(tmp_path / "data")
    rows = [{"case": f"case{n}", "age": 40 + n, "sex": "FM"[n % 2], "grade": n % 2} for n in range(7)]
    write_table(data / "table.csv", rows)
    tasks = [
        {"name": "tissue", "kind": "classes", "names": ["background", "ring", "core"]},
        {"name": "edge", "kind": "boundary", "of": "tissue"},
        {"name": "depth", "kind": "distance", "of": "tissue"},
        {"name": "grade", "kind": "image", "names": ["low", "high"]},
    ]
    settings = {**TINY_EXPERTS, **BASE, "tasks": tasks, "conditions": BASE["conditions"][:2], "general_adaroute": 2}
    settings |= {"spatial_dims": 3, "roi_size": [32, 32, 4], "max_epochs": 1, "task_weighting": "uncertainty"}
    settings |= {"dataset_dir": str(data), "output_dir": str(tmp_path / "run"), **no_pictures}
    run(**settings)
    assert set(rows_of(tmp_path / "run")[-1]["terms"]) >= {"tissue", "edge", "depth", "grade"}
    run(TRAIN, EVALUATE, **{name: value for name, value in settings.items() if name not in no_pictures})
    means = json.loads((tmp_path / "run/evaluation_test/cases.json").read_text())["mean"]
    assert {"val_tissue_mean_hd95", "val_edge_mean_f1", "val_depth_mean_mae", "val_grade_accuracy"} <= set(means)
    given = {"table": str(data / "table.csv")}
    volume = data / "imagesTr/case0.nii.gz"
    mask, table = predict(volume, tmp_path / "out", tmp_path / "run/best.safetensors", **given)
    assert nib.load(mask).shape == nib.load(volume).shape and table.name == "images.csv"
