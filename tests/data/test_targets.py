# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medmoe.data import datalists, load_cases
from medmoe.data.table import read_table
from medmoe.errors import DataError
from medmoe.tasks import Task, make_tasks

ORGANS = {"name": "organs", "kind": "labels", "names": ["left lung", "heart"]}
GRADE = {"name": "grade", "kind": "image", "names": ["II", "III"]}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def tasks(*entries: dict[str, Any]) -> list[Task]:
    return make_tasks(list(entries))


def test_overlapping_labels_in_folders_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "images/a.png", "images/b.png", "images/c.png", "masks/heart/a.png", "masks/heart/b.png")
    touch(tmp_path, "masks/left_lung/a.png", "masks/heart/spare.png")
    cases = load_cases(tmp_path, tasks(ORGANS, {"name": "edges", "kind": "boundary", "of": "organs"}))
    masks = tmp_path / "masks"
    assert cases == [
        {
            "case": "a",
            "image": str(tmp_path / "images/a.png"),
            "organs": [f"{masks}/left_lung/a.png", f"{masks}/heart/a.png"],
        },
        {"case": "b", "image": str(tmp_path / "images/b.png"), "organs": [None, f"{masks}/heart/b.png"]},
    ]
    assert "1 of 3 cases have no target at all and are left out: c" in caplog.text
    assert "spare" in caplog.text


def test_several_masks_in_split_folders_and_an_image_label(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        touch(
            tmp_path, *[f"{split}/{part}/{split}{i}.png" for i in range(3) for part in ("images", "masks", "vessels")]
        )
    (tmp_path / "train/vessels/train1.png").unlink()
    (tmp_path / "grades.csv").write_text(
        "case,grade\n" + "".join(f"{s}{i},{i}\n" for s in ("train", "validation") for i in (0, 1))
    )
    listed = tasks(
        {"name": "disc", "kind": "classes", "names": ["none", "disc"]},
        {"name": "vessels", "kind": "classes", "names": ["none", "vessel"], "target": "vessels"},
        GRADE,
    )
    splits = datalists(tmp_path, tasks=listed, table="grades.csv")
    train = {case["case"]: case for case in splits["train"]}
    assert train["train0"]["disc"] == str(tmp_path / "train/masks/train0.png")
    assert train["train0"]["vessels"] == str(tmp_path / "train/vessels/train0.png")
    assert train["train1"]["vessels"] is None
    assert [train[f"train{i}"]["grade"] for i in range(3)] == [0, 1, -1]
    assert len(splits["validation"]) == 3


def test_images_alone_with_a_table(tmp_path: Path) -> None:
    touch(tmp_path, "images/a_0000.png", "images/a_0001.png", "images/b_0000.png", "images/b_0001.png")
    (tmp_path / "t.csv").write_text("\ufeffid;age;grade\na.png;51;III\nb;;1.0\n")
    cases = load_cases(tmp_path, tasks(GRADE), "t.csv", [{"name": "age", "kind": "number"}])
    assert [(case["case"], case["grade"], case["condition"]) for case in cases] == [
        ("a", 1, {"age": "51"}),
        ("b", 1, {"age": None}),
    ]
    assert cases[0]["image"] == [str(tmp_path / f"images/a_000{k}.png") for k in (0, 1)]


def test_second_images_by_name(tmp_path: Path) -> None:
    touch(
        tmp_path, "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz", "postTr/b.nii.gz"
    )
    cases = load_cases(tmp_path, conditions=[{"name": "post", "kind": "image"}])
    assert [case["condition"] for case in cases] == [{"post": None}, {"post": str(tmp_path / "postTr/b.nii.gz")}]
    assert cases[0]["label"] == str(tmp_path / "labelsTr/a.nii.gz")


def test_everything_in_dataset_json(tmp_path: Path) -> None:
    entries = [
        {"image": "i/a.png", "label": ["l/a.png", None], "grade": "III", "post": "p/a.png", "age": 40},
        {"image": "i/b.png", "label": [None, "h/b.png"], "grade": 0},
        {"image": "i/c.png", "label": None, "grade": None},
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    conditions = [{"name": "age", "kind": "number"}, {"name": "post", "kind": "image"}]
    cases = load_cases(tmp_path, tasks(ORGANS, GRADE), conditions=conditions)
    assert [case["organs"] for case in cases] == [[f"{tmp_path}/l/a.png", None], [None, f"{tmp_path}/h/b.png"]]
    assert [case["grade"] for case in cases] == [1, 0] and [case["case"] for case in cases] == ["a", "b"]
    assert cases[0]["condition"] == {"post": f"{tmp_path}/p/a.png", "age": "40"}
    assert cases[1]["condition"] == {"post": None, "age": None}
    entries[0]["label"] = "l/a.png"
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries}))
    with pytest.raises(DataError, match=r"i/a\.png has .*expected a list of 2 files \(left lung, heart\), with null"):
        load_cases(tmp_path, tasks(ORGANS))


def test_the_plain_task_is_plain_segmentation(tmp_path: Path) -> None:
    touch(tmp_path, *[f"{part}/{i}.png" for i in "ab" for part in ("images", "masks")])
    assert load_cases(tmp_path, make_tasks(None)) == load_cases(tmp_path)
    touch(tmp_path, "images/c.png")
    with pytest.raises(DataError, match=r"1 of 3 images .* no label"):
        load_cases(tmp_path, make_tasks(None, 5))


def test_all_that_is_nowhere_is_told_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/b.png", "masks/heart/a.png", "masks/left_long/a.png")
    (tmp_path / "t.csv").write_text("case,grade,age_years,empty\na,IV,50,\nb,2,40,na\n")
    wanted = tasks(
        ORGANS,
        {"name": "vessels", "kind": "classes", "names": ["none", "vessel"], "target": "av"},
        GRADE,
        {"name": "stage", "kind": "image", "names": ["1", "2"]},
    )
    conditions = [{"name": n, "kind": k} for n, k in (("age", "number"), ("empty", "text"), ("post", "image"))]
    with pytest.raises(DataError) as caught:
        load_cases(tmp_path, wanted, "t.csv", conditions)
    message = str(caught.value)
    for part in (
        "task organs: no mask of 'left lung' in any case; looked for the folder left_lung in masks or labels "
        "(did you mean left_long?); there is heart, left_long",
        "task vessels: no mask; looked for the folder av beside images; there is images, masks",
        "task grade: column 'grade' has 2, IV (such as in case a): expected one of II, III, or their numbers 0 to 1",
        "task stage: ",
        "t.csv has no column 'stage': it has grade, age_years, empty",
        "t.csv has no column 'age' (did you mean age_years?)",
        "condition empty: column 'empty' of ",
        "condition post: no image of any case in a folder 'post' beside images; there is images, masks",
    ):
        assert part in message
    with pytest.raises(DataError, match=r"task grade: there is no table with a column 'grade': name a CSV file"):
        load_cases(tmp_path, tasks(GRADE))


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / "t.csv").write_text("patient,grade\nP1,II\nP2,III\n")
    with pytest.raises(DataError, match=r"No case is in .*t\.csv: cases are called a, b, its rows P1, P2"):
        load_cases(tmp_path, tasks(GRADE), "t.csv")
    with pytest.raises(DataError, match=r"There is no table .*labels\.csv: .* holds t\.csv"):
        load_cases(tmp_path, tasks(GRADE), "labels.csv")
    for content, message in (
        ("case,grade\na,II\na,III\n", r"several rows for 1 cases \(column 'case'\): a"),
        ("case,grade\na,II,9\n", "2 columns, and more or fewer fields in a"),
        ("case,grade,grade\na,II,9\n", "several are called grade"),
        ("case,grade\n", "has no rows"),
        ("", "has no rows"),
    ):
        (tmp_path / "t.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            read_table(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_bytes(b"case,grade\n\xff,1\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_table("t.csv", tmp_path)


def test_jsrt(shared: Path) -> None:
    names = ["left lung", "right lung", "heart", "left clavicle", "right clavicle"]
    listed = tasks(
        {"name": "organs", "kind": "labels", "names": names},
        {"name": "nodule", "kind": "image", "names": ["none", "nodule"]},
    )
    cases = load_cases(shared / "data" / "jsrt_cxr", listed, "labels.csv")
    assert len(cases) == 24 and sum(case["nodule"] for case in cases) == 14
    for case in cases:
        folders = [Path(file).parent.name for file in case["organs"]]
        assert folders == [name.replace(" ", "_") for name in names]
        assert {Path(file).stem for file in case["organs"]} == {case["case"]}
        assert case["nodule"] == case["case"].startswith("JPCLN")  # films with a nodule are called so


def test_vessels_and_their_kinds(shared: Path) -> None:
    classes = {"kind": "classes", "target": "av_labels", "names": ["background", "artery", "vein", "uncertain"]}
    cases = load_cases(shared / "data" / "drive_av", tasks({"name": "vessels", **classes}))
    assert cases and all(Path(case["vessels"]).parent.name == "av_labels" for case in cases)
