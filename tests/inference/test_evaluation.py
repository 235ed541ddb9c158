# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.multi_task_gain import main
from medmoe.inference.evaluation import read_cases, summary, tasks_in
from medmoe.inference.task_metrics import write_table
from medmoe.tasks import Task, single_task


def test_summary_has_a_row_for_each_class_and_their_mean(tmp_path: Path) -> None:
    tasks = single_task(3, ["background", "a", "left b"])
    columns = {
        "val_dice_a": [0.5, 0.7],
        "val_dice_left_b": [math.nan] * 2,
        "val_hd95_a": [1, 2],
        "val_hd95_left_b": [3, 4],
    }
    means = {"val_dice_a": 0.6, "val_dice_left_b": math.nan, "val_hd95_a": 1.5, "val_hd95_left_b": 3.5}
    write_table(tmp_path / "cases", tasks, ["x", "y"], columns, means, {"val_mean_dice": 0.6, "val_mean_hd95": 2.5})
    assert tasks_in(read_cases(tmp_path)) == tasks
    lines = summary(tmp_path, "run/best.safetensors", "test").splitlines()
    assert lines[0] == "2 test cases, run/best.safetensors"
    expected = [["dice", "hd95"], ["a", "0.600", "1.500"], ["left_b", "-", "3.500"], ["mean", "0.600", "2.500"]]
    assert [line.split() for line in lines[1:5]] == expected
    assert f"{tmp_path}/cases.csv" in lines[5] and f"{tmp_path}/overlays" in lines[6]


def test_summary_shows_every_task(tmp_path: Path) -> None:
    tasks = [Task("edges", "boundary", ("heart",)), Task("grade", "image", ("low", "high"))]
    overall = {"val_edges_mean_f1": 0.25, "val_grade_auc": 0.5, "val_grade_balanced_accuracy": math.nan}
    columns = {"val_edges_f1_heart": [0.25], "grade_true": ["low"]}
    write_table(tmp_path / "cases", tasks, ["x"], columns, {"val_edges_f1_heart": 0.25}, overall)
    lines = summary(tmp_path, "best", "test").splitlines()
    expected = [["edges", "f1"], ["heart", "0.250"], ["mean", "0.250"]]
    expected += [["grade", "auc", "balanced_accuracy"], ["all", "cases", "0.500", "-"]]
    assert [line.split() for line in lines[1:6]] == expected
    assert len({len(line) for line in lines[1:4]}) == 1 and len(lines[4]) == len(lines[5])
    write_table(tmp_path / "cases", tasks[1:], ["x"], {"grade_true": ["low"]}, {}, {"val_grade_auc": 0.5})
    assert "overlays" not in summary(tmp_path, "best", "test")


def write_scores(folder: Path, tasks: list[Task], scores: dict[str, float]) -> str:
    """An evaluation folder with these scores."""
    write_table(folder / "cases", tasks, ["x"], {"grade_true": ["low"]}, {}, scores)
    return str(folder)


def test_gain_of_one_network_for_all_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    organs, grade = Task("organs", "labels", ("heart",)), Task("grade", "image", ("low", "high"))
    far = Task("far", "distance", ("heart",), of="organs")
    scores = {"val_organs_mean_dice": 0.88, "val_organs_mean_hd95": 9, "val_far_mean_mae": 3.0, "val_grade_auc": 0.6}
    together = write_scores(tmp_path / "all", [organs, far, grade], scores)
    pair = {"val_organs_mean_dice": 0.5, "val_far_mean_mae": 4.0}
    both = write_scores(tmp_path / "pair", [organs, far], pair)
    singles = [both, write_scores(tmp_path / "organs", [organs], {"val_organs_mean_dice": 0.8})]
    assert main([together, "--single", *singles]) == 1
    assert "val_grade_auc: evaluate a network for the task grade" in capsys.readouterr().err
    singles.append(write_scores(tmp_path / "grade", [grade], {"val_grade_auc": 0.75}))
    assert main([together, "--single", *singles]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["single", "multi", "change"],
        ["organs_mean_dice", "0.800", "0.880", "+10.0%"],
        ["far_mean_mae", "4.000", "3.000", "+25.0%", "(less", "is", "better)"],
        ["grade_auc", "0.750", "0.600", "-20.0%"],
        ["multi-task", "gain:", "+5.00%"],
    ]
