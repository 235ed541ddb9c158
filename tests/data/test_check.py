# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medmoe.data import Case, check_cases, datalists, evaluation_preprocessing, postprocessing
from medmoe.errors import ConfigError, DataError

SHAPE = (7, 8, 5)
Volumes = Callable[..., list[Case]]


def check(cases: list[Case], **settings: Any) -> Any:
    """Checks all cases but the last as training cases."""
    splits = {"train": cases[:-1], "validation": cases[-1:]}
    return check_cases(splits, **{"num_classes": 3, "spatial_dims": 3, "in_channels": 1, **settings})


def only_problem(cases: list[Case], **settings: Any) -> str:
    """The one problem that there is, which must be of case_1."""
    problems = check(cases, **settings).problems
    assert len(problems) == 1, problems
    assert problems[0].startswith("case_1: ")
    return str(problems[0])


def test_sound_volumes(volumes: Volumes) -> None:
    report = check(volumes([SHAPE, (6, 9, 4), SHAPE]), class_names=["nothing", "one", "two"])
    assert report.problems == [] and report.warnings == []
    assert report.num_cases == 3 and report.sizes == {"train": 2, "validation": 1}
    assert report.shapes == {SHAPE: 2, (6, 9, 4): 1}
    assert report.classes == {"nothing": 2, "one": 2, "two": 2}
    report.raise_if_bad()


def test_sound_pictures(pictures: Volumes) -> None:
    settings: dict[str, Any] = dict(num_classes=2, spatial_dims=2, in_channels=3, intensity="unit")
    assert check(pictures([(9, 8), (5, 6)]), label_threshold=127, **settings).problems == []


def test_all_problems_are_told_at_once(volumes: Volumes) -> None:
    cases = volumes([SHAPE] * 4)
    Path(cases[0]["image"]).unlink()
    Path(cases[1]["label"]).write_bytes(b"")
    report = check(cases, num_classes=2, dataset_dir="some/where")
    with pytest.raises(DataError) as error:
        report.raise_if_bad()
    lines = str(error.value).splitlines()
    assert lines[0] == "5 problems in 4 cases:"
    assert "case_0: image does not exist" in lines[1] and "case_1: label is an empty file" in lines[3]
    assert [line.split(":")[0][-1] for line in lines[1:6]] == ["0", "0", "1", "2", "3"]
    assert lines[-1] == "To see them again: medmoe data check some/where"


def test_truncated_file(volumes: Volumes) -> None:
    cases = volumes([SHAPE] * 3)
    path = Path(cases[1]["image"])
    path.write_bytes(path.read_bytes()[:-200])
    assert "image cannot be read, it may be cut short" in only_problem(cases)


def test_truncated_picture(pictures: Volumes) -> None:
    cases = pictures([(40, 40)] * 3)
    path = Path(cases[1]["image"])
    path.write_bytes(path.read_bytes()[:500])
    settings: dict[str, Any] = dict(num_classes=2, spatial_dims=2, in_channels=3, label_threshold=127)
    assert "image cannot be read, it may be cut short" in only_problem(cases, **settings)


def test_file_of_another_kind(volumes: Volumes) -> None:
    cases = volumes([SHAPE] * 3)
    Path(cases[1]["label"]).write_text("no image at all")
    assert "label cannot be read" in only_problem(cases)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite(volumes: Volumes, write_nifti: Callable[..., Path], value: float) -> None:
    cases = volumes([SHAPE] * 3)
    array = torch.rand(*SHAPE).numpy()
    array[1, 2, 3] = value
    write_nifti(Path(cases[1]["image"]), array)
    assert "image: 1 voxels are NaN or infinite" in only_problem(cases)


@pytest.mark.parametrize("form", ["sform", "both"])
def test_affine_with_nan(volumes: Volumes, damage_header: Callable[..., None], form: str) -> None:
    cases = volumes([SHAPE] * 3)
    damage_header(cases[1]["image"], 0, 3, np.nan)
    if form == "both":
        damage_header(cases[1]["image"], 0, 3, np.nan, "qform")
    problems = check(cases).problems
    assert "case_1: image: the affine has values that are not finite (sform)" in problems
    assert len(problems) == (1 if form == "sform" else 2)


def test_singular_affine(volumes: Volumes, damage_header: Callable[..., None]) -> None:
    cases = volumes([SHAPE] * 3)
    damage_header(cases[1]["image"], 2, 2, 0.0)
    assert "image: the affine is singular" in only_problem(cases)


def test_sform_and_qform_that_disagree_are_a_warning(volumes: Volumes, damage_header: Callable[..., None]) -> None:
    cases = volumes([SHAPE] * 3)
    damage_header(cases[1]["image"], 0, 3, 5.0)
    damage_header(cases[1]["label"], 0, 3, 5.0)
    report = check(cases)
    assert report.problems == []
    assert any("case_1: image: sform and qform lie 5.0 voxels apart" in warning for warning in report.warnings)


def test_label_of_another_shape(volumes: Volumes, write_nifti: Callable[..., Path]) -> None:
    cases = volumes([SHAPE] * 3)
    write_nifti(Path(cases[1]["label"]), torch.randint(0, 3, (7, 8, 6), dtype=torch.uint8).numpy())
    assert "label: its shape is (7, 8, 6), that of the image is (7, 8, 5)" in only_problem(cases)


@pytest.mark.parametrize(("shift", "bad"), [(0.05, False), (0.2, True)])
def test_label_in_another_place(volumes: Volumes, write_nifti: Callable[..., Path], shift: float, bad: bool) -> None:
    cases = volumes([SHAPE] * 3)
    affine = np.eye(4)
    affine[1, 3] = shift
    write_nifti(Path(cases[1]["label"]), torch.randint(0, 3, SHAPE, dtype=torch.uint8).numpy(), affine)
    if bad:
        assert "label: its affine places it up to 0.2 voxels away from the image" in only_problem(cases)
    else:
        assert check(cases).problems == []


def test_mirrored_label(volumes: Volumes, write_nifti: Callable[..., Path]) -> None:
    cases = volumes([SHAPE] * 3)
    write_nifti(Path(cases[1]["label"]), torch.randint(0, 3, SHAPE, dtype=torch.uint8).numpy(), np.diag([-1, 1, 1, 1]))
    assert "label: its affine places it up to 12.0 voxels away" in only_problem(cases)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1, 7], "there are values outside the classes 0 to 2: 7; pass --num_classes 8"),
        ([0, -1, 2], "there are values outside the classes 0 to 2: -1"),
        ([0.0, 0.5, 1.0], "are not whole numbers"),
        ([0.0, np.nan, 1.0], "voxels are NaN or infinite"),
    ],
)
def test_label_values(volumes: Volumes, write_nifti: Callable[..., Path], values: list[float], message: str) -> None:
    cases = volumes([SHAPE] * 3)
    array = np.resize(np.array(values, dtype=np.float32 if isinstance(values[0], float) else np.int16), SHAPE)
    write_nifti(Path(cases[1]["label"]), array)
    assert message in only_problem(cases)


def test_mask_without_threshold(pictures: Volumes) -> None:
    report = check(pictures([(9, 8)] * 2), num_classes=2, spatial_dims=2, in_channels=3)
    assert report.problems == [
        "label: no training case has any of its classes, but 255, which means not labelled; pass --label_threshold 127 "
        "if these are masks"
    ]


def test_voxels_that_are_not_labelled(volumes: Volumes, write_nifti: Callable[..., Path]) -> None:
    """255 in a mask of classes neither is a class nor counts in the metrics, also in plain segmentation."""
    cases = volumes([SHAPE] * 4)
    for case in cases[1:3]:
        label = torch.randint(0, 3, SHAPE, dtype=torch.uint8).numpy()
        label[:2] = 255
        write_nifti(Path(case["label"]), label)
    report = check(cases)
    assert report.problems == [] and report.classes == dict.fromkeys(["background", "class 1", "class 2"], 3)
    assert report.warnings == [
        "label: 2 of 4 cases have the value 255: such voxels are not labelled, they neither train nor count"
    ]
    forth = evaluation_preprocessing(3, 1)
    sample = forth(cases[1])
    wrong = (sample["label"][0] + 1) % 3
    wrong[2:] = sample["label"][0, 2:]
    sample["pred"] = 20 * torch.nn.functional.one_hot(wrong.long(), 3).movedim(-1, 0).float().as_tensor()
    found = postprocessing(3, forth)(sample)
    assert torch.equal(found["pred"], found["label"]) and found["labelled"].all() and not found["label"][:, :2].any()


def test_threshold_with_three_classes(pictures: Volumes) -> None:
    with pytest.raises(ConfigError, match="num_classes is 3"):
        check(pictures([(9, 8)] * 2), spatial_dims=2, in_channels=3, label_threshold=127)


def test_wrong_dimensions(pictures: Volumes, volumes: Volumes) -> None:
    problems = check(pictures([(9, 8)] * 2), num_classes=2, in_channels=3, label_threshold=127).problems
    assert len(problems) == 2 and "it is 2-D (9, 8), but spatial_dims is 3: pass --spatial_dims 2" in problems[0]
    problems = check(volumes([SHAPE] * 2), spatial_dims=2).problems
    assert len(problems) == 2 and "it is 3-D (7, 8, 5), but spatial_dims is 2: pass --spatial_dims 3" in problems[1]


def test_wrong_channels(pictures: Volumes, volumes: Volumes) -> None:
    problems = check(pictures([(9, 8)] * 2), spatial_dims=2, num_classes=2, label_threshold=127).problems
    assert len(problems) == 2 and "it has 3 channels, but in_channels is 1: pass --in_channels 3" in problems[0]
    assert check(volumes([(*SHAPE, 4)] * 2), in_channels=4).problems == []


def test_label_with_channels(volumes: Volumes, write_nifti: Callable[..., Path]) -> None:
    cases = volumes([SHAPE] * 3)
    write_nifti(Path(cases[1]["label"]), torch.randint(0, 2, (*SHAPE, 3), dtype=torch.uint8).numpy())
    assert "label: it has 3 channels" in only_problem(cases)


def test_intensities_beyond_eight_bits(pictures: Volumes, write_picture: Callable[..., Path]) -> None:
    cases = pictures([(9, 8)] * 3)
    for case in cases:
        write_picture(Path(case["image"]), torch.randint(0, 200, (9, 8), dtype=torch.uint8).numpy())
    write_picture(Path(cases[1]["image"]), np.full((9, 8), 4095, dtype=np.uint16))
    settings: dict[str, Any] = dict(num_classes=2, spatial_dims=2, label_threshold=127)
    assert "but intensity is 'unit'" in only_problem(cases, intensity="unit", **settings)
    assert check(cases, intensity=[0, 4095], **settings).problems == []


def test_channels_in_files_of_different_shape(volumes: Volumes) -> None:
    cases = volumes([SHAPE, SHAPE, (6, 6, 6), SHAPE])
    cases[1]["image"] = [str(cases[1]["image"]), str(cases[2]["image"])]
    del cases[2]
    problems = check(cases, in_channels=1).problems
    assert any("case_1: image has channels of different shape" in problem for problem in problems)


def test_empty_splits(volumes: Volumes) -> None:
    cases = volumes([SHAPE])
    assert check_cases({"train": cases}, 3, 3, 1).problems == ["split 'validation' has no cases"]
    assert check_cases({"train": [], "validation": cases}, 3, 3, 1).problems == ["split 'train' has no cases"]


def test_class_that_no_training_case_has(
    volumes: Volumes, write_nifti: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    cases = volumes([SHAPE] * 3)
    for case in cases[:-1]:  # the last is for validation and has all classes
        write_nifti(Path(case["label"]), torch.randint(0, 2, SHAPE, dtype=torch.uint8).numpy())
    report = check(cases, class_names=["background", "head", "tail"])
    assert report.problems == []
    assert report.warnings == ["class 2 (tail) occurs in none of the 2 training cases"]
    report.raise_if_bad()
    assert "class 2 (tail)" in caplog.text


def test_hippocampus(shared: Path) -> None:
    root = shared / "data" / "hippocampus_msd"
    report = check_cases(datalists(root), 3, 3, 1, dataset_dir=root)
    assert report.problems == [] and report.warnings == [] and report.num_cases == 180
    assert report.classes == dict.fromkeys(["background", "anterior", "posterior"], 108)
    assert len(check_cases(datalists(root), 2, 3, 1).problems) == 180


def test_kvasir(shared: Path) -> None:
    splits = datalists(shared / "data" / "kvasir_seg", num_labelled=32)
    report = check_cases(splits, 2, 2, 3, label_threshold=127, intensity="unit")
    assert report.problems == [] and report.shapes == {(352, 352): 92}
