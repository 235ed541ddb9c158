# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The bundle from beginning to end, on data of a few voxels: train, evaluate, predict, be cut off, resume."""

from __future__ import annotations

import csv
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import (
    EVALUATE,
    INFERENCE,
    ONE_EXPERT,
    TRAIN,
    PowerCut,
    cut,
    error_of,
    part,
    rows_of,
    run,
    write_pictures,
    write_volumes,
)
from mlflow import MlflowClient
from PIL import Image

from medmoe.data import load_cases
from medmoe.errors import CheckpointError, DataError
from medmoe.inference.predict import predict
from medmoe.training.checkpoint import LAST, read_checkpoint, read_metadata
from medmoe.training.handlers import read_rows


class Run(NamedTuple):
    """A trained run, with the settings that it was trained with and its network before and after."""

    folder: Path
    data: Path
    settings: dict[str, Any]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


def train(folder: Path, data: Path, **settings: Any) -> Run:
    """Trains in ``folder``."""
    settings = {**ONE_EXPERT, "dataset_dir": str(data), "output_dir": str(folder), **settings}
    states: list[dict[str, torch.Tensor]] = []
    workflow = run(before_run=lambda bundle: states.append(copied(part(bundle, "network_def"))), **settings)
    return Run(folder, data, settings, states[0], copied(part(workflow, "network_def")))


def copied(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_table(folder: Path) -> list[dict[str, str]]:
    """The table of an evaluation; the means come last."""
    return list(csv.DictReader((folder / "cases.csv").read_text().splitlines()))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("volumes"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def trained(volumes: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in 3-D that nothing disturbed."""
    return train(tmp_path_factory.mktemp("trained") / "run", volumes, tracking_uri=store)


@pytest.fixture(scope="module")
def trained_on_pictures(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in 2-D."""
    folder = tmp_path_factory.mktemp("pictures")
    changes = {"spatial_dims": 2, "in_channels": 3, "num_classes": 2, "label_threshold": 127, "roi_size": [32, 32]}
    return train(folder / "run", write_pictures(folder / "data"), batch_size=2, **changes)


def test_a_run_leaves_its_record(trained: Run) -> None:
    names = {path.name for path in trained.folder.iterdir()}
    assert names >= {"best.safetensors", "last.safetensors", "metrics.jsonl", "run.json", "splits.json"}
    assert names >= {"routing_pmoe.png", "routing_curves.png", "overlays"}
    record = json.loads((trained.folder / "run.json").read_text())
    assert {name: record["settings"][name] for name in trained.settings} == trained.settings
    assert {name: split["cases"] for name, split in record["data"].items()} == {"train": 3, "validation": 2, "test": 2}
    assert record["experts"][0]["name"] == "timm/vit_tiny_patch16_224"
    counts = record["parameters"]
    assert counts["trainable"] == sum(counts[part] for part in ("adapters", "prompts", "decoder")) > 0
    rows = rows_of(trained.folder)
    assert [row["epoch"] for row in rows] == [0, 1, 2] and [len(row.get("losses", [])) for row in rows] == [0, 2, 2]
    assert {"val_mean_dice", "val_mean_iou", "val_mean_hd95", "val_dice_core"} <= set(rows[-1]["metrics"])
    assert read_metadata(trained.folder / LAST).epoch == 2


def test_experts_stay_bitwise_as_they_were(trained: Run) -> None:
    assert trained.before.keys() == trained.after.keys()
    changed = {name for name in trained.before if not torch.equal(trained.before[name], trained.after[name])}
    saved = {name for name in read_checkpoint(trained.folder / LAST)[0] if name in trained.after}
    assert {name.partition(".")[0] for name in changed} == {"prompter", "experts", "decoder"}
    assert changed <= saved and not [name for name in changed if name.startswith("experts.") and "lora_" not in name]
    assert len([name for name in trained.before if name.startswith("experts.") and name not in saved]) > 100


def test_the_run_is_in_mlflow(trained: Run, store: str) -> None:
    client = MlflowClient(store)
    tracked = client.get_run(json.loads((trained.folder / "mlflow.json").read_text())["run_id"])
    assert tracked.info.status == "FINISHED" and tracked.data.params["num_prompts"] == "2"
    last = rows_of(trained.folder)[-1]["metrics"]
    assert tracked.data.metrics["val_mean_dice"] == pytest.approx(last["val_mean_dice"])
    artifacts = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id)}
    assert {"best.safetensors", "run.json", "routing_pmoe.png", "overlays"} <= artifacts


def test_evaluation_of_the_held_out_cases(trained: Run, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(trained.folder)
    run(TRAIN, EVALUATE, **trained.settings)
    after = contents(trained.folder)
    assert {name: after[name] for name in before} == before, "what training wrote was touched"
    written = {"cases.csv", "cases.json", "overlays/first_1.png", "overlays/worst_1.png", "overlays/index.json"}
    assert {f"evaluation_test/{name}" for name in written} <= after.keys() - before.keys()
    assert [path.name for path in trained.folder.parent.iterdir()] == ["run"]
    held_out = json.loads(before["splits.json"])["test"]
    assert [row["case"] for row in read_table(trained.folder / "evaluation_test")] == [*held_out, "mean"]
    means = read_json(trained.folder / "evaluation_test/cases.json")["classes"]
    text = capsys.readouterr().out
    assert "2 test cases" in text and "evaluation_test/overlays" in text
    ring = next(line.split() for line in text.splitlines() if line.startswith("ring"))
    assert ring[1:] == [f"{means[f'val_{name}_ring']:.3f}" for name in ("dice", "iou", "hd95")]
    known = json.loads(before["mlflow.json"])
    tracked = MlflowClient(store).get_run(known["run_id"])
    assert tracked.data.metrics["test_dice_core"] == pytest.approx(means["val_dice_core"])
    assert tracked.info.status == "FINISHED"


def test_evaluation_repeats_the_validation_of_the_best_epoch(trained: Run, tmp_path: Path) -> None:
    checkpoint = trained.folder / "best.safetensors"
    settings = {**trained.settings, "output_dir": str(tmp_path), "tracking_uri": "", "split": "validation"}
    run(TRAIN, EVALUATE, checkpoint=str(checkpoint), **settings)
    content = read_json(tmp_path / "evaluation_validation/cases.json")
    best = next(row for row in rows_of(trained.folder) if row["epoch"] == read_metadata(checkpoint).epoch)
    for name, value in {**content["mean"], **content["classes"]}.items():
        assert value == pytest.approx(best["metrics"][name], rel=1e-5), name


def test_evaluation_takes_the_splits_of_the_training(
    trained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those beside the checkpoint, not those of the data set; without them it warns. It writes none."""
    settings = {**trained.settings, "output_dir": str(tmp_path), "tracking_uri": ""}
    (tmp_path / "best.safetensors").write_bytes((trained.folder / "best.safetensors").read_bytes())

    def evaluated() -> list[str]:
        run(TRAIN, EVALUATE, **settings)
        return [case["case"] for case in read_json(tmp_path / "evaluation_test/cases.json")["cases"]]

    splits = json.dumps({"train": ["case5"], "validation": ["case2"], "test": ["case1"]})
    (tmp_path / "splits.json").write_text(splits)
    assert evaluated() == ["case1"] and "drawn anew" not in caplog.text
    assert (tmp_path / "splits.json").read_text() == splits
    (tmp_path / "splits.json").unlink()
    assert sorted(evaluated()) == ["case5", "case6"] and "the splits are drawn anew" in caplog.text
    assert not (tmp_path / "splits.json").exists()


def test_without_test_cases_the_validation_cases_are_evaluated_under_their_name(
    trained_on_pictures: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run(TRAIN, EVALUATE, **trained_on_pictures.settings)
    assert "no test cases: the 2 validation cases are used" in caplog.text
    assert (trained_on_pictures.folder / "evaluation_validation/cases.csv").is_file()
    assert not (trained_on_pictures.folder / "evaluation_test").exists()


def test_evaluation_without_mlflow_goes_on(trained: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The training's run is known, but its store is gone."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("best.safetensors", "splits.json", "mlflow.json"):
        (folder / name).write_bytes((trained.folder / name).read_bytes())
    uri = f"sqlite:///{tmp_path}/file/mlflow.db"
    (tmp_path / "file").write_text("where the folder of the store should be")
    known = json.loads((folder / "mlflow.json").read_text())
    (folder / "mlflow.json").write_text(json.dumps({**known, "tracking_uri": uri}))
    run(TRAIN, EVALUATE, **{**trained.settings, "output_dir": str(folder), "tracking_uri": uri})
    assert (folder / "evaluation_test/cases.csv").is_file()
    assert caplog.text.count(f"MLflow at {uri} did not take") == 1


def dices(folder: Path, masks: Path, num_classes: int, read: Callable[[Path], np.ndarray]) -> dict[str, list[float]]:
    """Dice of each class of masks in files, by case; labels are found in ``folder``."""
    scores = {}
    for case in load_cases(folder):
        found = [path for path in masks.glob(f"{case['case']}.*")]
        if found:
            label, mask = read(Path(case["label"])), read(found[0])
            assert label.shape == mask.shape
            both = [(label == index, mask == index) for index in range(1, num_classes)]
            scores[case["case"]] = [2 * (a & b).sum() / max(a.sum() + b.sum(), 1) for a, b in both]
    return scores


def test_masks_of_volumes_score_what_the_evaluation_says(trained: Run, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    held_out = json.loads((trained.folder / "splits.json").read_text())["test"]
    for case in held_out:
        (inputs / f"{case}.nii.gz").symlink_to(trained.data / f"imagesTr/{case}.nii.gz")
    checkpoint = str(trained.folder / "best.safetensors")
    settings = {**trained.settings, "output_dir": str(tmp_path), "tracking_uri": "", "checkpoint": checkpoint}
    run(TRAIN, EVALUATE, **settings)
    masks = tmp_path / "predictions"
    run(TRAIN, INFERENCE, kind="infer", **{**settings, "dataset_dir": "nowhere", "input": str(inputs)})
    scores = dices(trained.data, masks, 3, lambda path: np.asarray(nib.load(path).dataobj))
    for row in read_table(tmp_path / "evaluation_test")[:-1]:
        expected = [float(row[f"val_dice_{name}"] or 0) for name in ("ring", "core")]
        assert scores[row["case"]] == pytest.approx(expected, abs=1e-5)
    for case in held_out:
        image, mask = nib.load(inputs / f"{case}.nii.gz"), nib.load(masks / f"{case}.nii.gz")
        np.testing.assert_array_equal(mask.affine, image.affine)
    around = (sys.excepthook, logging.getLogger().handlers[:])
    predicted = predict(inputs, tmp_path / "predicted", checkpoint)
    assert (sys.excepthook, logging.getLogger().handlers) == around
    assert [path.name for path in predicted] == [f"{case}.nii.gz" for case in sorted(held_out)]
    for path in predicted:
        np.testing.assert_array_equal(nib.load(path).dataobj, nib.load(masks / path.name).dataobj)


def test_masks_of_pictures_score_what_the_evaluation_says(trained_on_pictures: Run, tmp_path: Path) -> None:
    settings = {**trained_on_pictures.settings, "output_dir": str(tmp_path)}
    settings["checkpoint"] = str(trained_on_pictures.folder / "best.safetensors")
    run(TRAIN, EVALUATE, **settings)
    images = trained_on_pictures.data / "validation/images"
    run(TRAIN, INFERENCE, kind="infer", input=str(images), overlay=True, **settings)

    def read(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path)) // (255 if path.parent.name == "masks" else 1)

    scores = dices(trained_on_pictures.data, tmp_path / "predictions", 2, read)
    table = read_table(tmp_path / "evaluation_validation")
    assert len(table) == 3
    for row in table[:-1]:
        assert scores[row["case"]] == pytest.approx([float(row["val_dice_class_1"] or 0)], abs=1e-5)
        assert (tmp_path / f"predictions/{row['case']}_overlay.png").is_file()


def test_inputs_that_cannot_be_predicted_are_named_in_the_end(trained: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    whole = (trained.data / "imagesTr/case0.nii.gz").read_bytes()
    (tmp_path / "in/whole.nii.gz").write_bytes(whole)
    (tmp_path / "in/cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "in/picture.png")
    settings = {**trained.settings, "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(DataError, match="2 of 3 inputs could not be predicted") as caught:
        run(TRAIN, INFERENCE, kind="infer", **settings)
    assert "picture.png: it is 2-D (40, 40), but the checkpoint was trained on 3-D images" in str(caught.value)
    assert "cut.nii.gz" in str(caught.value) and (tmp_path / "out/whole.nii.gz").is_file()


def test_a_checkpoint_of_other_settings_says_what_to_pass(trained: Run) -> None:
    changes = {"num_classes": 2, "general": "timm/deit_tiny_patch16_224", "general_lora": 0, "seed": 1}
    inputs = {"input": str(trained.data / "imagesTr")}
    for overlay, kind, more in ((EVALUATE, "train", {}), (INFERENCE, "infer", inputs)):
        before = contents(trained.folder)
        message = error_of(TRAIN, overlay, kind=kind, **{**trained.settings, **changes, **more})
        assert "num_classes is 2 here and 3 in the checkpoint" in message
        assert "it was trained with the experts timm/vit_tiny" in message and "network has timm/deit_tiny" in message
        last = message.splitlines()[-1].strip()
        assert last == "pass --num_classes 3 --general timm/vit_tiny_patch16_224 --general_lora 2 --seed 0"
        assert contents(trained.folder) == before


def test_a_checkpoint_that_is_missing_or_damaged_is_named(trained: Run, tmp_path: Path) -> None:
    settings = {**trained.settings, "output_dir": str(tmp_path)}
    message = error_of(TRAIN, EVALUATE, **settings)
    assert f"checkpoint: there is no '{tmp_path}/best.safetensors'. Train first" in message
    (tmp_path / "best.safetensors").write_bytes((trained.folder / "best.safetensors").read_bytes()[:-100])
    assert "best.safetensors is damaged" in error_of(TRAIN, EVALUATE, **settings)
    with pytest.raises(CheckpointError, match="is damaged"):
        predict(trained.data / "imagesTr", tmp_path / "masks", tmp_path / "best.safetensors")


def test_an_input_that_is_missing_or_not_given_is_named(trained: Run) -> None:
    assert "input: not given. Give --input" in error_of(TRAIN, INFERENCE, kind="infer", **trained.settings)
    message = error_of(TRAIN, INFERENCE, kind="infer", **trained.settings, input="nowhere.nii.gz")
    assert "input: there is no 'nowhere.nii.gz'" in message and "dataset_dir" not in message


def test_a_training_that_was_cut_off_is_failed_and_resumes_to_the_same_losses(
    trained: Run, store: str, tmp_path: Path
) -> None:
    settings = {**trained.settings, "output_dir": str(tmp_path / "run")}
    with pytest.raises(PowerCut):
        run(before_run=cut(step=4), **settings)
    known = json.loads((tmp_path / "run/mlflow.json").read_text())
    assert MlflowClient(store).get_run(known["run_id"]).info.status == "FAILED"
    assert [row["epoch"] for row in read_rows(tmp_path / "run")] == [0, 1]
    run(resume=True, **settings)
    assert MlflowClient(store).get_run(known["run_id"]).info.status == "FINISHED"
    whole, resumed = rows_of(trained.folder), rows_of(tmp_path / "run")
    assert [row["epoch"] for row in resumed] == [0, 1, 2]
    for name in ("loss", "losses", "metrics", "lr", "routing"):
        assert [row.get(name) for row in resumed] == [row.get(name) for row in whole], name
    one, other = (read_checkpoint(folder / LAST)[0] for folder in (trained.folder, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert "before" in json.loads((tmp_path / "run/run.json").read_text())


def test_resuming_needs_something_to_resume(trained: Run, tmp_path: Path) -> None:
    settings = {**trained.settings, "output_dir": str(tmp_path / "run"), "tracking_uri": ""}
    assert "nothing to resume" in error_of(resume=True, **settings)


def test_a_second_run_keeps_the_first(volumes: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "run", volumes, max_epochs=1, steps_per_epoch=1, warmup=0)
    losses = rows_of(first.folder)[-1]["losses"]
    second = train(tmp_path / "run", volumes, max_epochs=1, steps_per_epoch=1, warmup=0, seed=1)
    assert rows_of(tmp_path / "run.1")[-1]["losses"] == losses != rows_of(second.folder)[-1]["losses"]
