# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The bundle on real images and with real experts at small sizes, by overrides alone: that it works, not how well."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import EVALUATE, INFERENCE, TRAIN, TWO_EXPERTS, rows_of, run
from PIL import Image

from medmoe.data.series import read_series
from medmoe.inference.predict import predict
from medmoe.training.checkpoint import read_metadata

FEW = {"num_labelled": 4, "num_validation": 1, "max_epochs": 1}
KVASIR = {
    "spatial_dims": 2,
    "in_channels": 3,
    "num_classes": 2,
    "class_names": ["background", "polyp"],
    "label_threshold": 127,
    "intensity": "unit",
    "roi_size": [256, 256],
    "batch_size": 2,
}


def experts(shared: Path) -> dict[str, str]:
    """Both default experts, from files."""
    return {
        "general_weights": str(shared / "weights/dinov2_vits14/dinov2_vits14_imgfocus_fp16.pt"),
        "medical_weights": str(shared / "weights/litemedsam/lite_medsam.pth"),
    }


def train_and_evaluate(settings: dict[str, Any], split: str) -> list[dict[str, str]]:
    """The rows of the evaluation's table; training left what it should."""
    run(**settings)
    folder = Path(settings["output_dir"])
    assert [len(row.get("losses", ())) for row in rows_of(folder)] == [0, 2]
    assert [expert["name"] for expert in read_metadata(folder / "best.safetensors").experts] == [
        "dinov2_vits14",
        "lite_medsam",
    ]
    assert (folder / "best.safetensors").stat().st_size < 10e6
    run(TRAIN, EVALUATE, **settings)
    assert (folder / f"evaluation_{split}/overlays/worst_1.png").is_file()
    return list(csv.DictReader((folder / f"evaluation_{split}/cases.csv").read_text().splitlines()))


@pytest.mark.slow
def test_hippocampus(shared: Path, tmp_path: Path) -> None:
    data = shared / "data/hippocampus_msd"
    settings = {**TWO_EXPERTS, **FEW, **experts(shared), "dataset_dir": str(data), "output_dir": str(tmp_path / "run")}
    settings |= {"num_test": 1, "roi_size": [48, 64, 16], "class_names": ["background", "anterior", "posterior"]}
    table = train_and_evaluate(settings, "test")
    assert len(table) == 2
    case = table[0]["case"]
    image = data / f"imagesTr/{case}.nii.gz"
    run(TRAIN, INFERENCE, kind="infer", **{**settings, "input": str(image), "dataset_dir": "nowhere"})
    mask = nib.load(tmp_path / f"run/predictions/{case}.nii.gz")
    np.testing.assert_array_equal(mask.affine, nib.load(image).affine)
    truth, found = (np.asarray(file.dataobj) == 1 for file in (nib.load(data / f"labelsTr/{case}.nii.gz"), mask))
    dice = 2 * (truth & found).sum() / (truth.sum() + found.sum())
    assert float(table[0]["val_dice_anterior"]) == pytest.approx(dice, abs=1e-5)
    series = shared / "data/pgbm_mr_dicom/Study3/HippoCrop"
    (path,) = predict(series, tmp_path / "dicom", tmp_path / "run/best.safetensors", **experts(shared))
    assert path.name == "HippoCrop.nii.gz" and nib.load(path).shape == (34, 50, 40)
    np.testing.assert_allclose(nib.load(path).affine, read_series(series).affine, atol=1e-5)


@pytest.mark.slow
def test_kvasir(shared: Path, tmp_path: Path) -> None:
    data = shared / "data/kvasir_seg"
    settings = {**TWO_EXPERTS, **FEW, **KVASIR, **experts(shared), "dataset_dir": str(data)}
    settings["output_dir"] = str(tmp_path / "run")
    table = train_and_evaluate(settings, "validation")
    assert len(table) == 2 and "val_dice_polyp" in table[0]
    image = data / f"validation/images/{table[0]['case']}.jpg"
    run(TRAIN, INFERENCE, kind="infer", **{**settings, "input": str(image), "overlay": True})
    mask = Image.open(tmp_path / f"run/predictions/{image.stem}.png")
    assert mask.size == Image.open(image).size
    assert (tmp_path / f"run/predictions/{image.stem}_overlay.png").is_file()
