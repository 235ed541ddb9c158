# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medmoe.conditions import Column, Schema
from medmoe.data import Case, Report, check_cases
from medmoe.errors import ConfigError
from medmoe.tasks import UNLABELLED, Task, make_tasks

TASKS = make_tasks(
    [
        {"name": "organs", "kind": "labels", "names": ["a", "b"]},
        {"name": "edges", "kind": "boundary", "of": "organs"},
        {"name": "zones", "kind": "classes", "names": ["none", "x", "y"]},
        {"name": "grade", "kind": "image", "names": ["low", "high"]},
    ]
)
SCHEMA = Schema((Column("age", "number", 50, 9), Column("sex", "category", values=("f", "m")), Column("post", "image")))


@pytest.fixture
def splits(tmp_path: Path, write_picture: Callable[..., Path]) -> dict[str, list[Case]]:
    """Three training cases, one for validation, with all that the tasks and conditions want."""

    def picture(name: str, values: np.ndarray) -> str:
        return str(write_picture(tmp_path / f"{name}.png", values))

    cases = []
    for k in range(4):
        noise = torch.randint(0, 256, (9, 8), dtype=torch.uint8).numpy()
        zones = (torch.arange(72).reshape(9, 8) % 3).to(torch.uint8).numpy()
        zones[0] = UNLABELLED
        case: Case = {
            "case": f"c{k}",
            "image": picture(f"i{k}", noise),
            "zones": picture(f"z{k}", zones),
            "grade": k % 2,
        }
        case["organs"] = [picture(f"a{k}", (noise > 99).astype(np.uint8) * 255), None]
        case["condition"] = {"age": str(40 + k), "sex": "f", "post": picture(f"p{k}", noise)}
        cases.append(case)
    cases[1]["organs"][1], cases[2]["zones"], cases[2]["grade"] = cases[1]["organs"][0], None, -1
    return {"train": cases[:3], "validation": cases[3:]}


def check(splits: dict[str, list[Case]], tasks: list[Task] | None = None, **settings: Any) -> Report:
    return check_cases(splits, 2, 2, 1, **{"tasks": tasks or TASKS, "schema": SCHEMA, **settings})


def test_sound_cases_are_counted(splits: dict[str, list[Case]]) -> None:
    report = check(splits)
    assert report.problems == []
    assert report.warnings == [
        "task zones: 3 of 4 cases have the value 255: such voxels are not labelled, they neither train nor count"
    ]
    assert report.classes == {
        "organs: a": 3,
        "organs: b": 1,
        "zones: none": 2,
        "zones: x": 2,
        "zones: y": 2,
        "grade: low": 1,
        "grade: high": 1,
    }


def test_all_problems_are_told_at_once(splits: dict[str, list[Case]], write_picture: Any, tmp_path: Path) -> None:
    train = splits["train"]
    train[0]["organs"][0] = str(tmp_path / "none.png")
    wide = torch.randint(0, 2, (9, 7), dtype=torch.uint8).numpy()
    train[1]["organs"][1] = str(write_picture(tmp_path / "wide.png", wide))
    train[1]["zones"] = str(write_picture(tmp_path / "seven.png", np.full((9, 8), 7, np.uint8)))
    train[1]["condition"]["age"] = "old"
    color = torch.randint(0, 256, (9, 8, 3), dtype=torch.uint8).numpy()
    splits["validation"][0]["condition"] |= {"sex": "x", "post": str(write_picture(tmp_path / "rgb.png", color))}
    report = check(splits)
    assert [problem.split(" (")[0] for problem in report.problems] == [
        f"c0: organs a does not exist: {tmp_path / 'none.png'}",
        "c1: organs b: its shape is",
        "c1: zones: there are values outside the classes 0 to 2: 7; give task zones 8 names if these are classes",
        "c1: condition age: found 'old', expected a number",
        "c3: condition post: its shape is",
    ]
    assert (
        "condition sex: in 1 of 4 cases the value was never seen in training: it counts as missing" in report.warnings
    )


def test_tasks_without_labelled_training_cases(splits: dict[str, list[Case]]) -> None:
    for case in splits["train"]:
        case["organs"], case["zones"], case["grade"] = [case["organs"][0], None], None, min(case["grade"], 0)
    report = check(splits)
    assert report.problems == ["task zones: none of the 3 training cases is labelled"]
    assert report.warnings == [
        "task organs: class 1 (b) occurs in none of the 3 training cases",
        "task grade: class 1 (high) occurs in none of the 3 training cases",
    ]


def test_masks_of_255_without_a_threshold(splits: dict[str, list[Case]]) -> None:
    for cases in splits.values():
        for case in cases:
            case["zones"] = case["organs"][0]
    tasks = make_tasks([{"name": "zones", "kind": "classes", "names": ["none", "x"]}])
    report = check(splits, tasks)
    assert len(report.problems) == 1 and "no training case has any of its classes, but 255" in report.problems[0]
    assert "--label_threshold 127" in report.problems[0]
    assert not check(splits, tasks, label_threshold=127).problems
    with pytest.raises(ConfigError, match="label_threshold makes masks of 2 classes, but task zones has 3"):
        check(splits, label_threshold=127)
