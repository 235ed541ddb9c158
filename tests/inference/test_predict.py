# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Masks on the grid of their files, through a bundle, with a network whose answer is known."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_files import write_series
from monai.data import MetaTensor
from PIL import Image
from scipy.ndimage import gaussian_filter
from threshold_network import Threshold

from medmoe.data.series import read_series
from medmoe.errors import CheckpointError, ConfigError, DataError
from medmoe.inference import InputDataset, SaveMask
from medmoe.inference import predict as module
from medmoe.inference.inputs import find_inputs
from medmoe.inference.predict import bundle_file, checkpoint_settings, predict
from medmoe.tasks import Task
from medmoe.training.checkpoint import Metadata, save_checkpoint

TRAINING = {
    "bundle_root": ".",
    "spatial_dims": 2,
    "in_channels": 3,
    "num_classes": 2,
    "class_names": [],
    "spacing": None,
    "intensity": "percentile",
    "roi_size": 24,
    "dataset_dir": "demo_data",
    "output_dir": "runs",
    "num_workers": 0,
    "device": "$torch.device('cpu')",
    "network_def": {"_target_": "threshold_network.Threshold"},
}
INFERENCE = {
    "imports": [
        "$import torch",
        "$from medmoe.data import preprocessing",
        "$from medmoe.data import postprocessing",
        "$from medmoe.training.checkpoint import load_checkpoint",
        "$from medmoe.inference import find_inputs",
        "$from medmoe.tasks import single_task",
    ],
    "input": None,
    "output": "$@output_dir + '/predictions'",
    "overlay": False,
    "checkpoint": "$@output_dir + '/best.safetensors'",
    "task_list": "$single_task(@num_classes)",
    "preprocessing": "$preprocessing(@spatial_dims, @in_channels, @spacing, @intensity, with_label=False)",
    "postprocessing": "$postprocessing(@num_classes, @preprocessing, with_label=False, tasks=@task_list)",
    "dataset": {
        "_target_": "medmoe.inference.InputDataset",
        "data": "$find_inputs(@input, @in_channels)",
        "transform": "@preprocessing",
        "smallest": "$max(expert.patch for expert in @network_def.experts)",
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "inferer": {
        "_target_": "medmoe.inference.sliding_window",
        "roi_size": "@roi_size",
        "spatial_dims": "@spatial_dims",
    },
    "handlers": [
        {
            "_target_": "medmoe.inference.SaveMask",
            "dataset": "@dataset",
            "output": "@output",
            "tasks": "@task_list",
            "overlay": "@overlay",
        }
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network_def",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    },
    "initialize": ["$load_checkpoint(@checkpoint, @network_def)"],
    "run": ["$@evaluator.run()"],
    "finalize": ["$@dataset.raise_failures()"],
}


@pytest.fixture(autouse=True)
def small_bundle(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle with the same settings as the real one, and a network that needs no weights."""
    folder = tmp_path_factory.mktemp("bundles")
    (folder / "pmoe_seg.json").write_text(json.dumps(TRAINING))
    (folder / "inference.json").write_text(json.dumps(INFERENCE))
    for name in ("metadata.json", "logging.conf"):
        (folder / name).write_text(bundle_file(name).read_text())
    monkeypatch.setattr(module, "bundle_file", lambda name: folder / name)


def checkpoint(folder: Path, level: float = 0.5, **settings: Any) -> Path:
    path = folder / "best.safetensors"
    save_checkpoint(path, Threshold(level), Metadata(settings={"intensity": [0, 100], **settings}))
    return path


def volume(tmp_path: Path, **settings: Any) -> Path:
    """A checkpoint for gray volumes."""
    return checkpoint(tmp_path, spatial_dims=3, in_channels=1, **settings)


def random_values(*shape: int) -> np.ndarray:
    """Integers of 0..100, none at the threshold."""
    values = np.random.default_rng(random.getrandbits(32)).integers(0, 100, shape).astype(np.uint8)
    return values + (values >= 50).astype(np.uint8)


def some_affine(codes: str, spacing: tuple[float, ...] = (1.5, 0.8, 3.0)) -> np.ndarray:
    ornt = nib.orientations.axcodes2ornt(codes)
    affine = np.zeros((4, 4))
    for axis, (world, flip) in enumerate(ornt):
        affine[int(world), axis] = flip * spacing[axis]
    affine[:, 3] = (-12.25, 30.5, 7.125, 1)
    return affine


def oblique() -> np.ndarray:
    rotation, _ = np.linalg.qr(np.random.default_rng(random.getrandbits(32)).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * (0.9, 1.1, 2.5)
    affine[:3, 3] = (3.0, -70.5, 11.0)
    return affine


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(values, None)
    image.set_sform(affine, 2)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Secret Name"))
    nib.save(image, path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PIR", "SLA", "oblique"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_nifti_of_any_orientation(tmp_path: Path, codes: str, suffix: str) -> None:
    values = random_values(21, 33, 12)
    source = write_nifti(tmp_path / f"in/a.b{suffix}", values, oblique() if codes == "oblique" else some_affine(codes))
    masks = predict(source, tmp_path / "out", volume(tmp_path))
    assert masks == [tmp_path / "out" / "a.b.nii.gz"]
    image, mask = nib.load(source), nib.load(masks[0])
    np.testing.assert_array_equal(np.asarray(mask.dataobj), values > 50)
    np.testing.assert_array_equal(mask.affine, image.affine)
    np.testing.assert_array_equal(mask.get_sform(), image.get_sform())
    np.testing.assert_array_equal(mask.get_qform(), image.get_qform())
    assert mask.get_data_dtype() == np.uint8
    for field in ("sform_code", "qform_code", "xyzt_units", "pixdim", "dim"):
        np.testing.assert_array_equal(mask.header[field], image.header[field])
    assert not mask.header.extensions


def test_resampled_prediction_returns_to_the_source_grid(tmp_path: Path) -> None:
    values = gaussian_filter(np.random.default_rng(random.getrandbits(32)).normal(size=(40, 36, 20)), 4)
    values = (50 + 40 * values / np.abs(values).max()).astype(np.float32)
    source = write_nifti(tmp_path / "in/a.nii.gz", values, some_affine("LPS"))
    (path,) = predict(source, tmp_path / "out", volume(tmp_path, spacing=[1.1, 1.1, 2.0]))
    mask = np.asarray(nib.load(path).dataobj)
    assert mask.shape == values.shape
    np.testing.assert_array_equal(nib.load(path).affine, nib.load(source).affine)
    assert 2 * (mask * (values > 50)).sum() / (mask.sum() + (values > 50).sum()) > 0.95


@pytest.mark.parametrize(("name", "shape"), [("a.png", (31, 45, 3)), ("b.JPG", (50, 20, 3)), ("c.png", (26, 25))])
def test_pictures(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    channels = 3 if len(shape) == 3 else 1
    (tmp_path / "in").mkdir()
    Image.fromarray(random_values(*shape)).save(tmp_path / "in" / name)
    stored = np.asarray(Image.open(tmp_path / "in" / name), dtype=np.float32).reshape(*shape[:2], channels)
    path = checkpoint(tmp_path, spatial_dims=2, in_channels=channels)
    masks = predict(tmp_path / "in" / name, tmp_path / "out", path, overlay=True)
    assert masks == [tmp_path / "out" / f"{name[0]}.png"]
    mask = Image.open(masks[0])
    assert mask.mode == "L" and mask.size == (shape[1], shape[0])
    clear = np.abs(np.clip(stored / 100, 0, 1).mean(-1) - 0.5) > 1e-4  # JPEG gives values on the threshold
    expected = np.clip(stored / 100, 0, 1).mean(-1) > 0.5
    np.testing.assert_array_equal(np.asarray(mask)[clear], expected[clear])
    overlay = np.asarray(Image.open(tmp_path / "out" / f"{name[0]}_overlay.png"))
    original = np.asarray(Image.open(tmp_path / "in" / name).convert("RGB"))
    changed = (overlay != original).any(-1)
    np.testing.assert_array_equal(changed & (np.asarray(mask) == 0), False)
    assert changed.sum() > 0.9 * np.asarray(mask).sum()


def test_dicom_series(tmp_path: Path) -> None:
    values = random_values(30, 22, 9)
    write_series(tmp_path / "patient" / "T1", values, (0.7, 1.3, 2.5), axes=np.linalg.qr(oblique()[:3, :3])[0])
    series = read_series(tmp_path / "patient" / "T1")
    expected = series.array > 50
    for source in (tmp_path / "patient" / "T1", tmp_path / "patient"):
        masks = predict(source, tmp_path / "out", volume(tmp_path))
        assert masks == [tmp_path / "out" / "T1.nii.gz"]
        mask = nib.load(masks[0])
        np.testing.assert_array_equal(np.asarray(mask.dataobj), expected)
        np.testing.assert_allclose(mask.affine, series.affine, atol=1e-5)
        assert mask.header["sform_code"] == mask.header["qform_code"] == 1
        assert mask.header.get_xyzt_units()[0] == "mm"


def test_trained_parameters_decide(tmp_path: Path) -> None:
    source = write_nifti(tmp_path / "in/a.nii.gz", random_values(12, 12, 12), np.eye(4))
    path = checkpoint(tmp_path, level=-1.0, spatial_dims=3, in_channels=1)
    assert np.asarray(nib.load(predict(source, tmp_path / "out", path)[0]).dataobj).all()


def test_other_cases_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, values = tmp_path / "in", random_values(20, 20, 20)
    for name in "abcdef":
        write_nifti(folder / f"{name}.nii.gz", values, np.eye(4))
    os.truncate(folder / "a.nii.gz", 400)
    broken = values.astype(np.float32)
    broken[0, 0, 0] = np.nan
    write_nifti(folder / "c.nii.gz", broken, np.eye(4))
    write_nifti(folder / "e.nii.gz", values[:5], np.eye(4))
    (folder / "g.png").write_bytes(b"no picture")
    Image.fromarray(values[0]).save(folder / "h.png")
    (folder / "i.nii").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        predict(folder, tmp_path / "out", volume(tmp_path))
    text = str(caught.value)
    assert "6 of 9 inputs could not be predicted" in text
    for case, reason in {"c": "NaN", "e": "5 x 20 x 20", "h": "2-D", "g": "cannot be read"}.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  - {case}: "))
        assert reason in line and str(folder) in line
    assert "  - a: " in text and "  - i: " in text
    assert {path.name for path in (tmp_path / "out").glob("*.gz")} == {"b.nii.gz", "d.nii.gz", "f.nii.gz"}
    for path in (tmp_path / "out").glob("*.gz"):
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), values > 50)
    assert json.loads((tmp_path / "out/predictions.json").read_text()).keys() == {"b.nii.gz", "d.nii.gz", "f.nii.gz"}


def test_nothing_fits(tmp_path: Path) -> None:
    values = random_values(20, 20, 20)
    write_nifti(tmp_path / "in/a.nii.gz", values, np.eye(4))
    (tmp_path / "pictures").mkdir()
    Image.fromarray(values[0]).save(tmp_path / "pictures/b.png")
    with pytest.raises(DataError, match=r"3-D .*checkpoint was trained on 2-D"):
        predict(tmp_path / "in", tmp_path / "out", checkpoint(tmp_path, spatial_dims=2, in_channels=1))
    with pytest.raises(DataError, match=r"2-D .*checkpoint was trained on 3-D"):
        predict(tmp_path / "pictures", tmp_path / "out", volume(tmp_path))
    with pytest.raises(DataError, match=r"1 channels, but the checkpoint was trained on images with 3"):
        predict(tmp_path / "pictures", tmp_path / "out", checkpoint(tmp_path, spatial_dims=2, in_channels=3))
    assert not list(tmp_path.glob("out/*.png")) and not list(tmp_path.glob("out/*.gz"))


def test_only_own_masks_are_overwritten(tmp_path: Path) -> None:
    values = random_values(20, 20, 20)
    source = write_nifti(tmp_path / "in/a.nii.gz", values, np.eye(4))
    predict(source, tmp_path / "out", volume(tmp_path))
    write_nifti(tmp_path / "in/a.nii.gz", 101 - values, np.eye(4))
    (path,) = predict(source, tmp_path / "out", volume(tmp_path))
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), 101 - values > 50)
    (tmp_path / "out/b.nii.gz").write_bytes(b"drawn by hand")
    write_nifti(tmp_path / "in/b.nii.gz", values, np.eye(4))
    with pytest.raises(DataError, match=r"no earlier prediction wrote: b\.nii\.gz"):
        predict(tmp_path / "in", tmp_path / "out", volume(tmp_path))
    assert (tmp_path / "out/b.nii.gz").read_bytes() == b"drawn by hand"
    before = source.read_bytes()
    with pytest.raises(DataError, match="a folder of their own"):
        predict(tmp_path / "in", tmp_path / "in", volume(tmp_path))
    with pytest.raises(DataError, match="is a file"):
        predict(tmp_path / "in", source, volume(tmp_path))
    assert source.read_bytes() == before


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_nifti(tmp_path / "in/a.nii.gz", random_values(12, 12, 12), np.eye(4))
    path = volume(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medmoe.inference.writer.nib.save", full)
    with pytest.raises(DataError, match=r"predicted of a cannot be written .*No space left"):
        predict(source, tmp_path / "out", path)
    assert not list((tmp_path / "out").iterdir())


def several(source: Path, output: Path, labels: tuple[str, ...], overlay: bool = False) -> tuple[SaveMask, list[Task]]:
    """What writes masks of labels that may overlap, and what is said of the whole image."""
    tasks = [Task("areas", "labels", labels), Task("edges", "boundary", labels, of="areas")]
    tasks.append(Task("grade", "image", ("low", "high"), "grade"))
    return SaveMask(InputDataset(find_inputs(source), dict), output, tasks, overlay), tasks


def test_each_label_that_may_overlap_has_a_mask_and_whole_images_a_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.fromarray(random_values(20, 30)).save(tmp_path / f"in/{name}.png")
    writer, _ = several(tmp_path / "in", tmp_path / "out", ("left lung", "heart"), overlay=True)
    masks = {name: torch.randint(0, 2, (2, 20, 30), dtype=torch.uint8) for name in "ab"}
    for name, grade in (("a", [0.25, 0.75]), ("b", [0.5, 0.5])):
        writer.save(name, {"pred": MetaTensor(masks[name]), "pred_grade": torch.tensor(grade)})
    for name in "ab":
        for mask, label in zip(masks[name], ("left_lung", "heart"), strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out/{name}_{label}.png")), mask)
            assert (tmp_path / f"out/{name}_{label}_overlay.png").is_file()
    table = (tmp_path / "out/images.csv").read_text().splitlines()
    assert table == [
        "case,grade,grade: low,grade: high",
        "a,high,0.2500,0.7500",
        "b,low,0.5000,0.5000",
    ]
    listed = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {*listed, "predictions.json"} == {path.name for path in (tmp_path / "out").iterdir()}
    several(tmp_path / "in", tmp_path / "out", ("left lung", "heart"), overlay=True)  # its own files may be overwritten


def test_nothing_else_is_overwritten_by_labels_and_tables(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    Image.fromarray(random_values(20, 30)).save(tmp_path / "in/a.png")
    for name in ("a_heart.png", "images.csv"):
        (tmp_path / "out" / name).write_text("made by hand")
    with pytest.raises(DataError, match=r"no earlier prediction wrote: images\.csv, a_heart\.png"):
        several(tmp_path / "in", tmp_path / "out", ("heart", "lung"))
    with pytest.raises(DataError, match=r"written to one file: a_left_lung\.png\. Rename"):
        several(tmp_path / "in", tmp_path / "new", ("left lung", "left_lung"))


@pytest.mark.parametrize(
    "value",
    [
        "$__import__('pathlib').Path('{mark}').touch()",
        " $__import__('pathlib').Path('{mark}').touch()",
        "@network_def",
        "%{mark}::key",
        ["$__import__('pathlib').Path('{mark}').touch()"],
        {"_target_": "pathlib.Path.touch", "self": "$__import__('pathlib').Path('{mark}')"},
        {"plain": {"_target_": "os.mkdir", "path": "{mark}"}},
    ],
)
@pytest.mark.parametrize("name", ["intensity", "class_names", "roi_size"])
def test_checkpoint_cannot_run_code(tmp_path: Path, name: str, value: Any) -> None:
    mark = tmp_path / "mark"
    value = json.loads(json.dumps(value).replace("{mark}", str(mark)))
    source = write_nifti(tmp_path / "in/a.nii.gz", random_values(12, 12, 12), np.eye(4))
    with pytest.raises(CheckpointError, match=f"no plain values: {name}"):
        predict(source, tmp_path / "out", volume(tmp_path, **{name: value}))
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_checkpoint_reaches_plain_settings_only(tmp_path: Path) -> None:
    saved = {
        "spatial_dims": 3,
        "output_dir": "/elsewhere",
        "dataset_dir": "/elsewhere",
        "num_workers": 4,
        "network_def": "x",
        "device": "cuda",
        "run": ["$1/0"],
        "network_def::level": 7,
        "unknown": "$1/0",
    }
    assert checkpoint_settings(saved, TRAINING, "x") == {"spatial_dims": 3}


def test_weights_files_of_another_machine_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "here.safetensors").touch()
    config = {"general_weights": None, "medical_weights": None}
    saved = {
        "general_weights": str(tmp_path / "gone.safetensors"),
        "medical_weights": str(tmp_path / "here.safetensors"),
    }
    assert checkpoint_settings(saved, config, "x") == {"medical_weights": saved["medical_weights"]}
    assert checkpoint_settings({"general_weights": "random"}, config, "x") == {"general_weights": "random"}


def test_find_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_inputs(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no image in .*it holds nothing"):
        find_inputs(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"holds notes\.txt"):
        find_inputs(tmp_path)
    with pytest.raises(DataError, match="no image that can be read"):
        find_inputs(tmp_path / "notes.txt")
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz", "._a.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    assert [item["case"] for item in find_inputs(tmp_path)] == ["a_0000", "a_0001", "b_0000", "b_0001"]
    pairs = find_inputs(tmp_path, in_channels=2)
    assert [item["case"] for item in pairs] == ["a", "b"]
    assert [Path(name).name for name in pairs[0]["image"]] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    (tmp_path / "a_0000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"one mask.*: a_0000"):
        find_inputs(tmp_path)


def test_find_dicom_inputs(tmp_path: Path) -> None:
    values = random_values(9, 9, 3)
    files = write_series(tmp_path / "study" / "one", values)
    write_series(tmp_path / "study" / "two", values)
    assert find_inputs(tmp_path / "study/one") == [{"case": "one", "image": str(tmp_path / "study/one")}]
    assert [item["case"] for item in find_inputs(tmp_path / "study")] == ["one", "two"]
    assert find_inputs(files[0]) == [{"case": "one", "image": str(files[0])}]
    Image.fromarray(values[0]).save(tmp_path / "study/one/preview.png")
    with pytest.raises(DataError, match=r"preview\.png\) and DICOM"):
        find_inputs(tmp_path / "study/one")


def test_bundle_file_is_named_when_missing() -> None:
    assert bundle_file("metadata.json").is_file()
    with pytest.raises(ConfigError, match=r"nothing\.json is missing"):
        bundle_file("nothing.json")


def test_real_images(tmp_path: Path, shared: Path) -> None:
    volumes = sorted((shared / "data/hippocampus_msd/imagesTr").glob("*.nii.gz"))[:2]
    settings = {"intensity": "percentile", "roi_size": [-1, -1, 16]}
    (tmp_path / "in").mkdir()
    for path in volumes:
        (tmp_path / "in" / path.name).symlink_to(path)
    for mask, path in zip(
        predict(tmp_path / "in", tmp_path / "out", volume(tmp_path, **settings)), volumes, strict=True
    ):
        image = nib.load(path)
        assert nib.load(mask).shape == image.shape and 0.05 < np.asarray(nib.load(mask).dataobj).mean() < 0.95
        np.testing.assert_array_equal(nib.load(mask).affine, image.affine)
    folder = shared / "data/pgbm_mr_dicom/Study3/HippoCrop"
    (mask,) = predict(folder, tmp_path / "out", volume(tmp_path, **settings))
    assert mask.name == "HippoCrop.nii.gz" and nib.load(mask).shape == (34, 50, 40)
    np.testing.assert_allclose(nib.load(mask).affine, read_series(folder).affine)
    picture = next(iter(sorted((shared / "data/kvasir_seg").rglob("images/*.jpg"))))
    (mask,) = predict(picture, tmp_path / "out", checkpoint(tmp_path, intensity="unit", spatial_dims=2, in_channels=3))
    assert Image.open(mask).size == Image.open(picture).size
    assert np.asarray(Image.open(mask)).mean() == pytest.approx(
        (np.asarray(Image.open(picture)).mean(-1) > 127.5).mean(), abs=1e-3
    )
