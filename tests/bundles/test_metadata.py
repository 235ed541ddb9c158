# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Metadata against what MONAI's schema of 2024-07-25 requires, without a download, and their bundles; logging.conf."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from bundle_runs import BUNDLES, COMPOSED, RANDOM, ROOT, TRAIN, settings_of, write_cases
from monai.bundle import ConfigWorkflow, verify_net_in_out

import medmoe
from medmoe.tasks import make_tasks

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
TEXTS = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description", "authors")
OPTIONAL_TEXTS = ("name", "data_source", "data_type", "image_classes", "label_classes", "pred_classes", "intended_use")
TENSOR = {"type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str, "value_range": list}

Meta = dict[str, Any]


FILES = {BUNDLES / "metadata.json": TRAIN, **{bundle.with_suffix(".metadata.json"): bundle for bundle in COMPOSED}}


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def meta(path: Path) -> Meta:
    return json.loads(path.read_text())


def test_every_bundle_has_metadata() -> None:
    assert set(FILES) == set(BUNDLES.glob("*metadata.json"))
    assert {*FILES.values(), BUNDLES / "evaluate.json", BUNDLES / "inference.json"} == {
        path for path in BUNDLES.glob("*.json") if path not in FILES
    }


def faults(meta: Meta) -> list[str]:
    """What the schema would refuse, by path."""
    found = [key for key in (*TEXTS, "copyright") if not isinstance(meta.get(key), str)]
    found += [key for key in OPTIONAL_TEXTS if not isinstance(meta.get(key, ""), str)]
    objects = ("changelog", "required_packages_version", "supported_apps", "eval_metrics", "network_data_format")
    found += [key for key in objects if not isinstance(meta.get(key), dict)]
    found += [f"references.{i}" for i, item in enumerate(meta.get("references", [])) if not isinstance(item, str)]
    for side in ("inputs", "outputs"):
        tensors = meta.get("network_data_format", {}).get(side)
        if not tensors:
            found.append(side)
        for name, tensor in (tensors or {}).items():
            found += [f"{side}.{name}.{key}" for key, kind in TENSOR.items() if not isinstance(tensor.get(key), kind)]
    return found


def test_the_schema_would_accept_the_metadata(meta: Meta) -> None:
    assert faults(meta) == []
    assert meta["schema"] == SCHEMA


@pytest.mark.parametrize(
    "gap",
    ["version", "copyright", "required_packages_version", "network_data_format", "network_data_format.outputs"],
)
def test_the_schema_would_refuse_a_gap(meta: Meta, gap: str) -> None:
    broken = deepcopy(meta)
    *parents, last = gap.split(".")
    place = broken
    for parent in parents:
        place = place[parent]
    del place[last]
    assert faults(broken)


def test_the_schema_would_refuse_an_incomplete_tensor(meta: Meta) -> None:
    del meta["network_data_format"]["inputs"]["image"]["dtype"]
    assert faults(meta) == ["inputs.image.dtype"]


def test_versions_agree_with_the_package(meta: Meta) -> None:
    assert meta["version"] == medmoe.__version__
    assert meta["changelog"].get(meta["version"])
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{meta['version']}]" in changes or "[Unreleased]" in changes


def test_required_packages_are_dependencies_and_new_enough(meta: Meta) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'^    "([A-Za-z-]+)>=([\d.]+)', project, flags=re.MULTILINE))
    tested = {**meta["required_packages_version"]}
    tested |= {
        name: meta[f"{key}_version"] for name, key in (("monai", "monai"), ("torch", "pytorch"), ("numpy", "numpy"))
    }
    for name, version in tested.items():
        assert name in bounds, name
        assert numbers(version) >= numbers(bounds[name]), f"{name}: {version} was tested, {bounds[name]} is the bound"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_channels_are_described(meta: Meta) -> None:
    tensors = meta["network_data_format"]
    for tensor in (tensors["inputs"]["image"], tensors["outputs"]["pred"]):
        assert list(tensor["channel_def"]) == [str(index) for index in range(tensor["num_channels"])]
    assert "not for diagnosis" in meta["intended_use"]


def test_defaults_agree_with_the_metadata(path: Path, meta: Meta) -> None:
    """The channels of all dense tasks in a row; those of the image-level ones where there is nothing else."""
    config = {**settings_of(TRAIN), **settings_of(FILES[path])}
    tasks = make_tasks(config["tasks"], config["num_classes"])
    dense = [task for task in tasks if task.dense]
    image, pred = meta["network_data_format"]["inputs"]["image"], meta["network_data_format"]["outputs"]["pred"]
    assert image["num_channels"] == config["in_channels"] and len(image["spatial_shape"]) == config["spatial_dims"]
    assert pred["num_channels"] == sum(task.channels for task in dense or tasks)
    assert len(pred["spatial_shape"]) == (config["spatial_dims"] if dense else 0)
    described = "; ".join(pred["channel_def"].values())
    named = [name for task in (dense or tasks) for name in task.names if config["tasks"]]
    assert all(name in described for name in named)


def test_the_network_gives_what_the_metadata_say(path: Path, tmp_path: Path) -> None:
    """As the model zoo checks every bundle: one tensor, of the channels and type that are written down."""
    settings = settings_of(FILES[path])
    overrides = {**RANDOM, "general_size": 28, "medical_size": 64, "decoder_channels": 8}
    if settings.get("conditions"):  # what they mean is learned of the data
        overrides["dataset_dir"] = str(write_cases(tmp_path, settings))
    verify_net_in_out(
        net_id="network_def", config_file=str(FILES[path]), meta_file=str(path), device="cpu", any=17, **overrides
    )


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    """``logging.conf`` replaces the handlers of the root logger, pytest's among them."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    state = [(one, one.level, one.handlers[:], one.propagate, one.disabled) for one in loggers]
    yield
    for one, level, handlers, propagate, disabled in state:
        one.handlers[:], one.propagate, one.disabled = handlers, propagate, disabled
        one.setLevel(level)


def test_logging_conf_shows_us_and_quiets_the_others(
    untouched_logging: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle.json").write_text("{}")
    meta_file, logging_file = str(BUNDLES / "metadata.json"), str(BUNDLES / "logging.conf")
    ConfigWorkflow(str(tmp_path / "bundle.json"), meta_file=meta_file, logging_file=logging_file)
    logging.getLogger("medmoe.training.x").info("ours")
    logging.getLogger("alembic.runtime.migration").info("theirs")
    logging.getLogger("monai.bundle.scripts").info("theirs")
    logging.getLogger("mlflow.store").warning("a warning")
    shown = capsys.readouterr().err
    assert shown.count("INFO medmoe.training.x: ours") == 1 and shown.count("a warning") == 1
    assert "theirs" not in shown
