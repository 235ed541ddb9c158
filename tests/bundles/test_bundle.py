# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The bundle as it is shipped: its settings, and what stops it before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bundle_runs import (
    BUNDLES,
    COMPOSED,
    EVALUATE,
    INFERENCE,
    ONE_EXPERT,
    ROOT,
    TRAIN,
    TWO_EXPERTS,
    error_of,
    make,
    run,
    taken,
    write_volumes,
)

from medmoe.errors import ConfigError
from medmoe.training.preflight import literal_settings
from medmoe.training.settings import RULES, problems

PLAIN = ("spatial_dims", "in_channels", "num_classes", "max_epochs")
"""What a bundle may say again although the first one says the same."""


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"))


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    settings = set()
    for path in (TRAIN, EVALUATE, INFERENCE, *COMPOSED):
        config = {key: value for key, value in json.loads(path.read_text()).items() if not taken(value)}
        settings |= {key for key, value in config.items() if key in RULES or not _is_built(value)}
    assert settings - {"bundle_root", "device", "train", "validate", "_desc_"} == set(RULES)


def _is_built(value: Any) -> bool:
    return any(sign in json.dumps(value) for sign in ('"$', '"@', "_target_"))


def test_overlays_change_nothing_about_the_network() -> None:
    """What an overlay leaves out it shares with the training, so that the two cannot drift apart."""
    training = json.loads(TRAIN.read_text())
    allowed = {"split", "find_cases", "schema", "feature_cache_gib", "initialize", "run"}
    assert set(json.loads(EVALUATE.read_text())) & set(training) <= allowed
    assert set(json.loads(INFERENCE.read_text())) & set(training) <= allowed | {"table"}


@pytest.mark.parametrize("bundle", COMPOSED, ids=lambda path: path.stem)
def test_a_composed_bundle_has_its_machinery_of_the_first_one(bundle: Path) -> None:
    """Every key of ``pmoe_seg.json`` is there, as a setting of the bundle's own or as what the first one says."""
    first, config = json.loads(TRAIN.read_text()), json.loads(bundle.read_text())
    assert config.pop("_desc_").endswith(".")
    assert config.keys() == first.keys()
    for name, value in config.items():
        source = f"%bundles/pmoe_seg.json::{name}"
        if name in ("train", "validate"):  # one level down, so that an overlay can replace a part
            assert value == {child: f"{source}::{child}" for child in first[name]}
        else:
            assert value == source or (name in RULES and not taken(value) and value != first[name]) or name in PLAIN


@pytest.mark.parametrize("bundle", (TRAIN, *COMPOSED), ids=lambda path: path.stem)
def test_settings_as_shipped_are_in_range(bundle: Path) -> None:
    settings = literal_settings(make(bundle).parser)
    assert problems(settings) == []
    assert set(RULES) & set(json.loads(TRAIN.read_text())) <= set(settings)


def test_no_paths_of_one_machine() -> None:
    for path in [*BUNDLES.iterdir(), *(ROOT / "configs").rglob("*.json")]:
        assert not [word for word in ("/home/", "/root", "/work", "/tmp", "C:\\") if word in path.read_text()], path


def test_labelled_cases_and_seed_are_overrides(tmp_path: Path) -> None:
    data = write_volumes(tmp_path / "data", training=8)

    def splits(**overrides: Any) -> Mapping[str, list[str]]:
        make(**{**ONE_EXPERT, "dataset_dir": str(data), "output_dir": str(tmp_path / "run"), **overrides}).initialize()
        return json.loads((tmp_path / "run/splits.json").read_text())

    four, two, other = splits(num_labelled=4), splits(num_labelled=2), splits(num_labelled=4, seed=1)
    assert len(four["train"]) == 4 and four["train"][:2] == two["train"] and four["train"] != other["train"]
    assert four["validation"] == two["validation"] == other["validation"] and four["test"] == other["test"]
    assert not set(four["train"]) & {*four["validation"], *four["test"]}
    assert len(splits()["train"]) == 8


def test_bad_data_stop_the_training_before_an_earlier_run_is_touched(volumes: Path, tmp_path: Path) -> None:
    settings = {**ONE_EXPERT, "dataset_dir": str(volumes), "output_dir": str(tmp_path / "run")}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("an earlier run")
    message = error_of(num_classes=2, **settings)
    assert "7 problems in 7 cases" in message
    assert "case0: label: there are values outside the classes 0 to 1: 2" in message
    message = error_of(**{**settings, "spatial_dims": 2, "roi_size": [32, 32]})
    assert "it is 3-D (36, 32, 8), but spatial_dims is 2: pass --spatial_dims 3" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "run.json"]


def test_a_misspelt_override_stops_before_anything_is_written(volumes: Path, tmp_path: Path) -> None:
    settings = {**ONE_EXPERT, "dataset_dir": str(volumes), "output_dir": str(tmp_path / "run")}
    message = error_of(num_clases=3, **settings, **{"train#trainer#max_epocs": 3})
    assert "num_clases: nothing reads this key. Did you mean num_classes?" in message
    assert "train::trainer::max_epocs: SupervisedTrainer takes no such argument. Did you mean max_epochs?" in message
    assert not (tmp_path / "run").exists()
    for overlay, kind, typo, meant in (
        (EVALUATE, "train", "splitt", "split"),
        (INFERENCE, "infer", "inputs", "input"),
        (INFERENCE, "infer", "overlai", "overlay"),
    ):
        message = error_of(TRAIN, overlay, kind=kind, **settings, **{typo: "x"})
        assert f"{typo}: nothing reads this key. Did you mean {meant}?" in message


def test_missing_paths_are_named_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(**{**ONE_EXPERT, "dataset_dir": "nowhere", "general_weights": "lost.safetensors"})
    assert "dataset_dir: there is no 'nowhere'" in message
    assert "general_weights: there is no 'lost.safetensors'" in message
    assert "Relative paths count from the current folder" in message
    assert list(tmp_path.iterdir()) == []


def test_settings_for_the_record() -> None:
    settings = literal_settings(make(**{**TWO_EXPERTS, "num_labelled": 1}).parser)
    assert settings["num_labelled"] == 1 and settings["roi_size"] == [32, 32, 4]
    assert json.loads(json.dumps(settings)) == settings


def test_the_command_line_fails_fast_with_a_short_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundles/pmoe_seg.json"]
    overrides = ["--num_clases", "3", "--output_dir", str(tmp_path / "run"), "--dataset_dir", "nowhere"]
    result = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 2
    assert "num_clases: nothing reads this key. Did you mean num_classes?" in result.stderr
    assert "dataset_dir: there is no 'nowhere'" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


def test_error_kinds_stay_what_they_are(volumes: Path, tmp_path: Path) -> None:
    """What the helpers of these tests raise is what MONAI wrapped."""
    with pytest.raises(ConfigError, match="max_epochs: found 0"):
        run(**{**ONE_EXPERT, "dataset_dir": str(volumes), "output_dir": str(tmp_path), "max_epochs": 0})
