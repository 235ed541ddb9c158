# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Settings that contradict each other or the data stop a bundle before an expert is loaded or a file is written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_runs import COMPOSED, TINY_EXPERTS, error_of, run, settings_of, write_cases, write_table
from PIL import Image

import medmoe.experts

LABELS = {"name": "areas", "kind": "labels", "names": ["left", "right"]}
EDGES = {"name": "edges", "kind": "boundary", "of": "areas"}
GRADE = {"name": "grade", "kind": "image", "names": ["low", "high"]}
AGE, SEX = {"name": "age", "kind": "number"}, {"name": "sex", "kind": "category"}
SECOND = {"name": "second", "kind": "image"}
GOOD = {
    "tasks": [LABELS, EDGES, GRADE],
    "table": "table.csv",
    "conditions": [AGE, SEX, SECOND],
    "decoder": "fgmoe",
}


def tissue(*names: str) -> dict[str, Any]:
    """A task whose masks have the classes 0, 1 and 2."""
    return {"name": "tissue", "kind": "classes", "names": ["background", *names], "target": "tissue"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, with more in them: masks of three classes, and columns that are of no use as conditions."""
    folder = write_cases(tmp_path_factory.mktemp("data"), GOOD)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    for index, row in enumerate(rows):
        row |= {
            "site": "north",
            "dose": "2.0",
            "empty": "",
            "scanner": "old new old new latest old old old".split()[index],
        }
        row |= {"late": "low" if index > 3 else ""}
        (folder / "tissue").mkdir(exist_ok=True)
        values = (np.arange(40 * 44) % 3).reshape(40, 44).astype(np.uint8)
        Image.fromarray(values).save(folder / f"tissue/{row['case']}.png")
    write_table(folder / "table.csv", rows)
    return folder


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> dict[str, Any]:
    return {**TINY_EXPERTS, **GOOD, "dataset_dir": str(data), "output_dir": str(tmp_path / "run")}


NOWHERE = {**LABELS, "target": "organs"}
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a task without its folder": (
        {"tasks": [NOWHERE]},
        ["task areas: no mask of 'left' in any case", "looked for the folder left in organs", "there is images, masks"],
    ),
    "a label that is called otherwise": (
        {"tasks": [{**LABELS, "names": ["left", "rigth"]}]},
        ["task areas: no mask of 'rigth' in any case", "did you mean right?"],
    ),
    "a task without its column": (
        {"tasks": [LABELS, {**GRADE, "target": "grad"}]},
        ["task grade: ", "table.csv has no column 'grad' (did you mean grade?): it has "],
    ),
    "a task without a table": (
        {"tasks": [GRADE], "table": None, "conditions": None, "decoder": "plain"},
        ["task grade: there is no table with a column 'grade': name a CSV file in the setting table"],
    ),
    "a task that no training case has": (
        {"tasks": [LABELS, {**GRADE, "target": "late"}]},
        ["task grade: none of the 4 training cases is labelled"],
    ),
    "a boundary of nothing": (
        {"tasks": [{**EDGES, "of": "organs"}]},
        ["tasks: task edges: of is 'organs', expected a task with masks: none"],
    ),
    "a task of an unknown kind": (
        {"tasks": [{**LABELS, "kind": "label"}]},
        ["tasks: task 1 (areas): kind='label' is not known: choose one of classes, labels, boundary, distance, image"],
    ),
    "too few classes": (
        {"tasks": [tissue("gray")]},
        ["case0: tissue: there are values outside the classes 0 to 1: 2; give task tissue 3 names"],
    ),
    "a threshold with too many classes": (
        {"tasks": [tissue("gray", "white")], "label_threshold": 1},
        ["label_threshold makes masks of 2 classes, but task tissue has 3"],
    ),
    "one name for a class": (
        {"tasks": [{**GRADE, "names": ["low"]}]},
        ["tasks: task 1 (grade): names: found ['low'], expected a list of at least 2 different names"],
    ),
    "a class of the table without a name": (
        {"tasks": [{**GRADE, "target": "scanner"}]},
        ["task grade: column 'scanner' has latest, new, old (such as in case ", "expected one of low, high, or their "],
    ),
    "more names than classes": (
        {"tasks": None, "num_classes": 2, "class_names": ["a", "b", "c"]},
        ["class_names: found ['a', 'b', 'c'], expected 2 names, because num_classes is 2"],
    ),
    "a category that is constant": (
        {"conditions": [AGE, {"name": "site", "kind": "category"}]},
        ["site: it is 'north' in all of the 4 training cases that have it, expected at least two different values"],
    ),
    "a number that is constant": (
        {"conditions": [{"name": "dose", "kind": "number"}]},
        ["dose: it is '2' in all of the 4 training cases that have it, expected at least two different values"],
    ),
    "a column that does not exist": (
        {"conditions": [{"name": "ages", "kind": "number"}]},
        ["condition ages: ", "table.csv has no column 'ages' (did you mean age?): it has "],
    ),
    "a column without a value": (
        {"conditions": [{"name": "empty", "kind": "category"}]},
        ["condition empty: column 'empty' of ", "has no value for any of the cases"],
    ),
    "a table that does not exist": (
        {"table": "tabel.csv"},
        ["There is no table ", "tabel.csv", "holds table.csv"],
    ),
    "text where a number belongs": (
        {"conditions": [{"name": "sex", "kind": "number"}]},
        ["sex: kind is number, but case ", " has 'A' (4 cases in all): correct it, or declare a category"],
    ),
    "a condition of an unknown kind": (
        {"conditions": [{**AGE, "kind": "nunber"}]},
        ["conditions: condition 1 (age): kind is 'nunber', expected one of number, category, text, image"],
    ),
    "a second image without its folder": (
        {"conditions": [{**SECOND, "name": "third"}]},
        ["condition third: no image of any case in a folder 'third' beside images; there is images, masks, second"],
    ),
    "a text without an encoder": (
        {"conditions": [{"name": "site", "kind": "text"}]},
        ["text_encoder: found none, expected a name or path for transformers: site is a text"],
    ),
    "an expert that is not there for the second image": (
        {"condition_expert": 2},
        ["condition_expert: found 2, expected 0 to 1: the experts are general, medical"],
    ),
    "conditions without a way in": (
        {"prompt_general": False, "prompt_medical": False},
        ["conditions: they enter through prompts, but no expert is prompted: set --prompt_general True"],
    ),
    "more slices to keep than there are": (
        {"fgmoe_slices": 4, "fgmoe_top_k": 5},
        ["fgmoe_top_k: found 5, expected 1 to 4, because fgmoe_slices is 4"],
    ),
    "no slice to keep": ({"fgmoe_top_k": 0}, ["fgmoe_top_k: found 0, expected a whole number of at least 1"]),
    "slices that cannot be cut": (
        {"fgmoe_slices": 7},
        ["fgmoe_slices: found 7, expected a divisor of 32, the hidden width (4 x decoder_channels)"],
    ),
    "more tokens to keep than there are": (
        {"dispatch": "topk", "top_k": 1000, "conditions": None},
        ["top_k: found 1000, expected 1 to 264, the tokens that a dispatcher can choose from"],
    ),
    "no token to keep": ({"top_k": 0}, ["top_k: found 0, expected a whole number of at least 1"]),
    "no prompts for a dispatcher": (
        {"num_prompts": 0},
        ["num_prompts: found 0, expected a whole number of at least 1 (for no prompts: --prompter none)"],
    ),
    "an expert with a grid of one token": (
        {"general": "dinov2_vits14", "general_size": 14},
        ["general_size: found 14, expected at least 28: dinov2_vits14 cuts images into patches of 14", "aligned"],
    ),
    "a hierarchical expert with a grid of one token": (
        {"medical": "lite_medsam", "medical_size": 16},
        ["medical_size: found 16, expected at least 32: lite_medsam cuts images into patches of 16"],
    ),
    "controls of conditions that are not there": (
        {"conditions": None, "shuffle_conditions": True},
        ["conditions are to be shuffled or left out, but there are none: set conditions"],
    ),
}


@pytest.mark.parametrize(("wrong", "expected"), BAD.values(), ids=BAD)
def test_one_sentence_names_what_is_wrong(
    wrong: dict[str, Any],
    expected: list[str],
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_nothing(*arguments: object) -> None:
        pytest.fail("an expert was loaded")

    monkeypatch.setattr(medmoe.experts, "load_expert", load_nothing)
    message = error_of(**{**settings, **wrong})
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "run").exists()


def test_what_only_the_network_can_tell_stops_before_a_run_is_touched(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("an earlier run")
    message = error_of(**{**settings, "general_size": 16})
    assert "timm/test_vit sees images at 16 pixels in patches of 16: its grid of one token" in message
    assert "Expected a size of at least 32" in message
    message = error_of(**{**settings, "site_range": [0, 99]})
    assert "site_range=[0, 99] is not within the sites 0 to 5" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "run.json"]


def test_a_category_that_was_never_seen_in_training_is_a_warning(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The case is validated as if it had no value."""
    settings |= {"conditions": [AGE, {"name": "scanner", "kind": "category"}], "max_epochs": 1, "validate#handlers": []}
    run(**settings)
    seen = "condition scanner: in 1 of 8 cases the value was never seen in training: it counts as missing"
    assert seen in caplog.text


BROKEN = {
    "pmoe_multitask": ("masks/heart", "task organs: no mask of 'heart' in any case; looked for the folder heart"),
    "pmoe_multimodal": ("post", "condition post: no image of any case in a folder 'post' beside images"),
    "pmoe_full": ("masks", "task lesion: no mask; looked for the folder masks or labels beside images"),
    "pmoe_cls": ("clinical.csv", "There is no table "),
}


@pytest.mark.parametrize("bundle", COMPOSED, ids=lambda path: path.stem)
def test_data_that_lack_what_a_bundle_needs_are_told(bundle: Path, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "data", settings_of(bundle))
    lost, expected = BROKEN[bundle.stem]
    (data / lost).rename(data / "elsewhere")
    message = error_of(bundle, **TINY_EXPERTS, dataset_dir=str(data), output_dir=str(tmp_path / "run"))
    assert expected in message and not (tmp_path / "run").exists()
