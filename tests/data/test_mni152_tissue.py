# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from medmoe.data import check_cases, datalists
from medmoe.experts import fetch

SCRIPT = Path(__file__).parents[2] / "data_scripts" / "mni152_tissue.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for small subjects; a test does not go to the network."""
    spec = importlib.util.spec_from_file_location("mni152_tissue", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", (24, 28, 8))
    return module


@pytest.fixture
def wheel(tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a round brain: white matter inside, gray matter around it."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (52, 60, 60)), indexing="ij")) - 28.0
    radius = np.sqrt((grid**2).sum(0))
    white = np.clip(12 - radius, 0, 1)
    gray = np.clip(20 - radius, 0, 1) - white
    maps = {"t1": 0.5 * gray + 0.9 * white, "gm": gray, "wm": white}
    affine = np.eye(4)
    affine[:3, 3] = (-26, -30, -30)
    path = tmp_path / "template.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, values in maps.items():
            content = nib.Nifti1Image((values * 255).astype(np.uint8), affine).to_bytes()
            archive.writestr(script.MEMBER.format(name), gzip.compress(content))
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_set_is_sound_and_repeatable(
    script: ModuleType, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "demo"
    arguments = ["--wheel", str(wheel), "--train", "3", "--validation", "1", "--test", "2"]
    assert script.main([*arguments, "--output", str(output)]) == 0
    splits = datalists(output)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 3, "validation": 1, "test": 2}
    report = check_cases(splits, 3, 3, 1, dataset_dir=output)
    assert report.problems == [] and report.warnings == []
    assert report.classes == {"background": 3, "gray matter": 3, "white matter": 3}
    assert report.shapes == {(24, 28, 8): 6}
    first, second = (nib.load(case["image"]) for case in splits["test"])
    assert nib.aff2axcodes(first.affine) == ("R", "A", "S") and first.header.get_zooms() == (2, 2, 2)
    assert not np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    assert "Louis Collins" in (output / "README.md").read_text()
    assert {path.name for path in output.parent.iterdir()} == {"demo"}

    made = contents(output)
    assert script.main([*arguments, "--output", str(output)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert script.main([*arguments, "--output", str(output), "--force"]) == 0
    assert contents(output) == made
    assert script.main([*arguments, "--output", str(tmp_path / "other"), "--seed", "1"]) == 0
    assert contents(tmp_path / "other")["imagesTr/subject_01.nii.gz"] != made["imagesTr/subject_01.nii.gz"]


def test_other_content_is_never_replaced(
    script: ModuleType, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    assert script.main(["--wheel", str(wheel), "--output", str(output), "--force"]) == 1
    assert "was not made by this script" in capsys.readouterr().err
    assert contents(output) == {"thesis.txt": b"years of work"}


def test_other_settings_ask_for_force(
    script: ModuleType, wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    arguments = ["--wheel", str(wheel), "--output", str(output), "--train", "1", "--validation", "1", "--test", "1"]
    assert script.main(arguments) == 0
    made = contents(output)
    assert script.main([*arguments, "--seed", "5"]) == 1
    assert "pass --force" in capsys.readouterr().err and contents(output) == made
    assert script.main([*arguments, "--seed", "5", "--force"]) == 0
    assert json.loads((output / "dataset.json").read_text())["made_by"]["seed"] == 5


def test_damaged_wheel_and_no_network_leave_nothing(
    script: ModuleType, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "demo"
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert script.main(["--wheel", str(wheel), "--output", str(output)]) == 1
    assert "damaged or another version" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "run_pip", lambda arguments: "no route to host")
    assert script.main(["--output", str(output)]) == 1
    assert "could not be downloaded; pip says: no route to host" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []
