# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

from medmoe.data import Case, cases_of, class_names, datalists, load_cases, split_cases, write_split
from medmoe.errors import DataError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def some_cases(number: int, split: str = "") -> list[Case]:
    cases = [Case(case=f"{split}{i:03d}", image=f"{i}.png", label=f"{i}.png") for i in range(number)]
    return [Case(**{**case, "split": split}) for case in cases] if split else cases


def names(cases: list[Case]) -> list[str]:
    return [case["case"] for case in cases]


def test_decathlon_dataset_json(tmp_path: Path) -> None:
    entries = {
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
        "validation": [{"image": "imagesTr/b.nii.gz", "label": "labelsTr/b.nii.gz"}],
        "test": ["./imagesTs/c.nii.gz"],
    }
    touch(tmp_path, "imagesTr/other.nii.gz", "labelsTr/other.nii.gz")  # not listed: not used
    (tmp_path / "dataset.json").write_text(json.dumps(entries))
    cases = load_cases(tmp_path)
    assert [(case["case"], case["split"]) for case in cases] == [("a", "train"), ("b", "validation")]
    assert Path(cases[0]["image"]) == tmp_path / "imagesTr/a.nii.gz"


def test_dataset_json_without_lists_leaves_it_to_folders(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}, "cases": ["a"]}))
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTr/._a.nii.gz")
    assert names(load_cases(tmp_path)) == ["a"]


def test_nnunet_channels(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "tumor": 1, "all": [1, 2]}})
    )
    touch(tmp_path, *[f"imagesTr/p_{i}_000{c}.nii.gz" for i in range(3) for c in (1, 0)])
    touch(tmp_path, *[f"labelsTr/p_{i}.nii.gz" for i in range(3)])
    cases = load_cases(tmp_path)
    assert names(cases) == ["p_0", "p_1", "p_2"]
    assert [Path(path).name for path in cases[1]["image"]] == ["p_1_0000.nii.gz", "p_1_0001.nii.gz"]
    assert class_names(tmp_path, 3) == ["background", "tumor", "class 2"]


def test_split_folders_with_the_same_names(tmp_path: Path) -> None:
    touch(tmp_path, "train/images/1.jpg", "train/masks/1.jpg", "val/images/1.jpg", "val/masks/1.jpg")
    touch(tmp_path, "val/images/2.jpg", "val/masks/2.png")
    splits = datalists(tmp_path)
    assert names(splits["train"]) == ["train_1"]
    assert sorted(names(splits["validation"])) == ["2", "validation_1"]
    assert "test" not in splits
    assert cases_of(splits, "test") == splits["validation"]
    with pytest.raises(DataError, match="no cases in split 'tset'"):
        cases_of(splits, "tset")


@pytest.mark.parametrize("folder", ["masks", "labels"])
def test_plain_folders(tmp_path: Path, folder: str) -> None:
    touch(tmp_path, *[f"{part}/{i}.png" for i in "abcd" for part in ("images", folder)])
    splits = datalists(tmp_path)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 2, "validation": 1, "test": 1}
    assert sorted(chain(*map(names, splits.values()))) == list("abcd")


def test_missing_folder_and_unknown_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_cases(tmp_path / "nowhere")
    touch(tmp_path, "scans/a.dcm")
    with pytest.raises(DataError, match=r"No labelled images .*holds scans(?s:.*)dataset\.json"):
        load_cases(tmp_path)


def test_images_without_labels_are_named(tmp_path: Path) -> None:
    touch(tmp_path, *[f"images/{i}.png" for i in range(9)], "masks/0.png")
    with pytest.raises(DataError, match=r"8 of 9 images .* 1, 2, 3, 4, 5 and 3 more"):
        load_cases(tmp_path)


def test_labels_without_images_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "images/a.png", "masks/a.png", "masks/b.png")
    assert names(load_cases(tmp_path)) == ["a"]
    assert "1 labels" in caplog.text and "b" in caplog.text


def test_damaged_dataset_json(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"training": [')
    with pytest.raises(DataError, match=r"dataset\.json is not a readable JSON file"):
        load_cases(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        load_cases(tmp_path)


def test_split_file_of_the_data_set_wins(tmp_path: Path) -> None:
    touch(tmp_path, *[f"{part}/{i}.png" for i in "abcdef" for part in ("images", "masks")])
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["f", "a"], "validation": ["b"], "test": ["c"]}))
    splits = datalists(tmp_path)
    assert {split: sorted(names(cases)) for split, cases in splits.items()} == {
        "train": ["a", "f"],
        "validation": ["b"],
        "test": ["c"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ["case_9"]}, "1 cases that do not exist: case_9. Did you mean case_"),
        ({"train": ["case_1"], "test": ["case_1"]}, "1 cases more than once: case_1"),
        ({"validation": ["case_1"]}, 'no case under "train"'),
    ],
)
def test_wrong_split_files(tmp_path: Path, content: dict[str, list[str]], message: str) -> None:
    touch(tmp_path, *[f"{part}/case_{i}.png" for i in range(4) for part in ("images", "masks")])
    (tmp_path / "splits.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_cases(tmp_path)


def test_splits_are_disjoint_complete_and_seeded() -> None:
    cases = some_cases(100)
    splits = split_cases(cases)
    assert {split: len(chosen) for split, chosen in splits.items()} == {"train": 60, "validation": 15, "test": 25}
    assert sorted(chain(*map(names, splits.values()))) == names(cases)
    assert split_cases(cases) == splits
    assert split_cases(cases, split_seed=1)["test"] != splits["test"]
    reseeded = split_cases(cases, seed=1)
    assert reseeded["test"] == splits["test"] and reseeded["train"] != splits["train"]


def test_few_labels_are_nested_and_vary_with_the_seed() -> None:
    cases = some_cases(100)
    draws = {number: names(split_cases(cases, 3, number)["train"]) for number in (1, 8, 16, 32)}
    assert draws[32][:16] == draws[16] and draws[16][:8] == draws[8] and draws[8][:1] == draws[1]
    assert {number: len(draw) for number, draw in draws.items()} == {number: number for number in draws}
    assert names(split_cases(cases, 4, 8)["train"]) != draws[8]
    assert split_cases(cases, 3, 8)["validation"] == split_cases(cases, 3, 16)["validation"]


def test_numbers_instead_of_shares() -> None:
    splits = split_cases(some_cases(180), num_labelled=40, num_validation=10, num_test=40)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 40, "validation": 10, "test": 40}
    assert not set(names(splits["train"])) & set(names(splits["test"]))


def test_given_splits_are_kept() -> None:
    cases = some_cases(20, "train") + some_cases(6, "validation")
    splits = split_cases(cases)
    assert sorted(names(splits["train"]) + names(splits["validation"])) == sorted(names(cases))
    assert "test" not in splits
    splits = split_cases(cases, num_validation=4, num_test=5)
    assert {split: len(chosen) for split, chosen in splits.items()} == {"train": 15, "validation": 4, "test": 5}
    assert {case["split"] for case in splits["test"]} == {"train"}


def test_labelled_draw_from_a_given_split_depends_on_its_seed_alone() -> None:
    cases = some_cases(20, "train") + some_cases(6, "validation")
    draw = split_cases(cases, 3, 8)["train"]
    assert split_cases(cases[::-1], 3, 8)["train"] == split_cases(cases, 3, 8, split_seed=9)["train"] == draw


def test_validation_is_drawn_from_training_where_the_data_give_only_a_test_split() -> None:
    splits = split_cases(some_cases(20, "train") + some_cases(6, "test"))
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 17, "validation": 3, "test": 6}
    assert {case["split"] for case in splits["validation"]} == {"train"}


@pytest.mark.parametrize(
    ("number", "settings", "message"),
    [
        (10, {"num_labelled": 9}, r"num_labelled=9, but there are 6 cases"),
        (10, {"num_test": 11}, r"num_test=11, but there are 10 cases"),
        (10, {"num_test": -1}, r"num_test=-1"),
        (2, {}, "No case is left for training: 2 cases, 1 for validation and 1 for test"),
    ],
)
def test_too_few_cases(number: int, settings: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_cases(some_cases(number), **settings)  # type: ignore[arg-type]


def test_written_splits_can_be_used_again(tmp_path: Path) -> None:
    touch(tmp_path, *[f"data/{part}/{i}.png" for i in range(20) for part in ("images", "masks")])
    splits = datalists(tmp_path / "data", seed=5, num_labelled=4)
    write_split(splits, tmp_path / "run", seed=5)
    written = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert written["train"] == names(splits["train"]) and written["seed"] == 5
    again = datalists(tmp_path / "data", seed=6, split_file=tmp_path / "run" / "splits.json")
    assert {split: names(cases) for split, cases in again.items()} == {s: names(c) for s, c in splits.items()}
    assert names(datalists(tmp_path / "data", seed=6, num_labelled=4)["train"]) != written["train"]


def test_split_is_replaced_whole(tmp_path: Path) -> None:
    write_split({"train": some_cases(3)}, tmp_path, seed=7)
    write_split({"train": some_cases(2)}, tmp_path)
    assert json.loads((tmp_path / "splits.json").read_text()) == {"train": ["000", "001"]}
    assert [path.name for path in tmp_path.iterdir()] == ["splits.json"]


def test_class_names(tmp_path: Path) -> None:
    assert class_names(tmp_path, 2) == ["background", "class 1"]
    assert class_names(tmp_path, 2, ["nothing", "polyp"]) == ["nothing", "polyp"]
    with pytest.raises(DataError, match="class_names has 1 names"):
        class_names(tmp_path, 2, ["polyp"])


def test_hippocampus(shared: Path) -> None:
    root = shared / "data" / "hippocampus_msd"
    splits = datalists(root, num_labelled=40, num_validation=10, num_test=40)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 40, "validation": 10, "test": 40}
    assert len(load_cases(root)) == 180
    assert class_names(root, 3) == ["background", "anterior", "posterior"]
    assert all(Path(case["image"]).name == Path(case["label"]).name for case in splits["test"])


def test_kvasir(shared: Path) -> None:
    splits = datalists(shared / "data" / "kvasir_seg", num_labelled=32)
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 32, "validation": 60}
    for split, cases in splits.items():
        assert {Path(case["label"]).parts[-3] for case in cases} == {split}
