# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe.data import check_cases, datalists, fit
from medmoe.tasks import make_tasks

SCRIPTS = Path(__file__).parents[2] / "data_scripts"
HEART = make_tasks([{"name": "heart", "kind": "labels", "names": ["cavity", "myocardium"]}])


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def slices(tmp_path: Path, write_picture: Callable[..., Path]) -> Path:
    """Two slices of each of five patients, as the LGG data have them; two have no post-contrast sequence."""
    folder, lines = tmp_path / "slices", ["case,Patient,age_at_initial_pathologic,gender"]
    for patient in range(5):
        for number in range(2):
            name = f"TCGA_XX_{patient}_19990101_{number}"
            colors = torch.randint(0, 256, (9, 8, 3), dtype=torch.uint8).numpy()
            if patient == 3:
                colors[..., 2] = colors[..., 1]
            write_picture(folder / "images" / f"{name}.png", colors)
            write_picture(folder / "masks" / f"{name}.png", (colors[..., 1] > 99).astype(np.uint8) * 255)
            lines.append(f"{name},TCGA_XX_{patient},{30 + patient},{1 + patient % 2}")
    (folder / "clinical.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_sequences(slices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lgg, output = script("lgg_sequences"), tmp_path / "made"
    arguments = [str(slices), "--output", str(output)]
    assert lgg.main(arguments) == 0 and "10 slices" in capsys.readouterr().out
    specs = [{"name": n, "kind": k} for n, k in (("age", "number"), ("gender", "category"), ("post", "image"))]
    splits = datalists(output, table="clinical.csv", conditions=specs)
    patients = {split: {case["case"].split("_")[2] for case in cases} for split, cases in splits.items()}
    assert sorted(p for some in patients.values() for p in some) == list("01234")  # each in one split
    schema = fit(specs, splits["train"])
    report = check_cases(splits, 2, 2, 1, 127, intensity="unit", dataset_dir=output, schema=schema)
    assert not report.problems
    cases = [case for cases in splits.values() for case in cases]
    assert sum(case["condition"]["post"] is None for case in cases) == 2
    colors = np.asarray(Image.open(slices / "images" / f"{cases[0]['case']}.png"))
    assert np.array_equal(np.asarray(Image.open(cases[0]["image"])), colors[..., 1])
    assert "CC BY-NC-SA" in (output / "README.md").read_text()
    assert "TCGA_XX_0," not in (output / "clinical.csv").read_text()
    assert lgg.main(arguments) == 0 and "nothing to do" in capsys.readouterr().out
    before = (output / "splits.json").read_text()
    assert lgg.main([*arguments, "--seed", "1"]) == 1 and "pass --force" in capsys.readouterr().err
    assert lgg.main([*arguments, "--seed", "1", "--force"]) == 0
    assert (output / "splits.json").read_text() != before or len(patients["train"]) < 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "slices"]


def test_sequences_of_something_else(slices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lgg = script("lgg_sequences")

    def error(*arguments: str) -> str:
        assert lgg.main([*arguments]) == 1
        return capsys.readouterr().err

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "was not made by" in error(str(slices), "--output", str(tmp_path / "full"))
    assert "is not the source" in error(str(tmp_path), "--output", str(tmp_path / "out"))
    (slices / "masks" / "TCGA_XX_1_19990101_0.png").unlink()
    assert "masks are missing for TCGA_XX_1_19990101_0.png" in error(str(slices), "--output", str(tmp_path / "out"))
    shutil.copy(slices / "masks" / "TCGA_XX_1_19990101_1.png", slices / "masks" / "TCGA_XX_1_19990101_0.png")
    shutil.copy(slices / "masks" / "TCGA_XX_1_19990101_1.png", slices / "images" / "TCGA_XX_1_19990101_1.png")
    assert "is L, expected RGB" in error(str(slices), "--output", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_frames_that_do_not_fit(tmp_path: Path, write_picture: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sunnybrook = script("sunnybrook_frames")
    assert sunnybrook.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "there are no frames" in capsys.readouterr().err
    (tmp_path / "dicom/P1").mkdir(parents=True)
    (tmp_path / "dicom/P1/12.dcm").write_bytes(b"no dicom")
    assert sunnybrook.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "expected one mask each for P1/12 (0 masks)" in capsys.readouterr().err
    write_picture(tmp_path / "masks/P1/12_endo_only.png", np.full((4, 4), 2, np.uint8))
    assert sunnybrook.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "cannot be read" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_real_sequences(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "lgg"
    script("lgg_sequences").make(shared / "data" / "lgg_slices", output)
    specs = [{"name": "age", "kind": "number"}, {"name": "post", "kind": "image"}]
    splits = datalists(output, table="clinical.csv", conditions=specs)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 48, "validation": 12, "test": 20}
    schema = fit(specs, splits["train"])
    assert not check_cases(splits, 2, 2, 1, 127, intensity="unit", schema=schema).problems
    assert sum(case["condition"]["post"] is None for cases in splits.values() for case in cases) == 5


def test_real_frames(shared: Path, tmp_path: Path) -> None:
    source, output = shared / "data" / "sunnybrook_dicom", tmp_path / "frames"
    script("sunnybrook_frames").make(source, output)
    splits = datalists(output, tasks=HEART)
    report = check_cases(splits, 2, 2, 1, tasks=HEART)
    assert not report.problems and report.num_cases == 74
    cases = [case for cases in splits.values() for case in cases]
    assert sum(case["heart"][1] is None for case in cases) == 37 and all(case["heart"][0] for case in cases)
    patients = [{case["case"].split("_")[0] for case in cases} for cases in splits.values()]
    assert [len(some) for some in patients] == [2, 1, 1] and len(set.union(*patients)) == 4
    recorded = json.loads((output / "splits.json").read_text())
    assert recorded["seed"] == 0
    case = next(case for case in cases if case["heart"][1])
    patient, frame = case["case"].split("_")
    classes = np.asarray(Image.open(source / "masks" / patient / f"{int(frame)}_endo_epi.png"))
    for file, value in zip(case["heart"], (1, 2), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)) == 255, classes == value)
