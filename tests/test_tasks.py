# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Tasks as a bundle writes them down."""

from __future__ import annotations

from typing import Any

import pytest

from medmoe.errors import ConfigError
from medmoe.tasks import Task, make_tasks, single_task

ORGANS = {"name": "organs", "kind": "labels", "names": ["heart", "lung"]}
ZONES = {"name": "zones", "kind": "classes", "names": ["background", "core"], "target": "zones"}


def test_plain_segmentation_is_one_task() -> None:
    assert make_tasks(None, 3, ["background", "a", "b"]) == [Task("label", "classes", ("background", "a", "b"))]
    assert single_task(2)[0].foreground == ("class 1",)


def test_names_of_what_is_derived_are_those_of_its_masks() -> None:
    tasks = make_tasks(
        [
            {"name": "edges", "kind": "boundary", "of": "organs"},
            ORGANS,
            ZONES,
            {"name": "depth", "kind": "distance", "of": "zones", "weight": 0.5},
            {"name": "sick", "kind": "image", "names": ["no", "yes"]},
        ]
    )
    assert [task.channels for task in tasks] == [2, 2, 2, 1, 2]
    assert tasks[3].names == ("core",) and tasks[3].weight == 0.5 and tasks[3].derived
    assert tasks[4].target == "sick" and not tasks[4].dense


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": 1}, "expected a list of objects"),
        ([{**ORGANS, "name": "split"}], "none of image, case, split"),
        ([{**ORGANS, "name": "two words"}], "word of letters"),
        ([{**ORGANS, "kind": "mask"}], "kind='mask'"),
        ([{**ORGANS, "names": ["heart", "heart"]}], "different names"),
        ([{**ZONES, "names": ["background"]}], "at least 2"),
        ([{**ORGANS, "weight": -1}], "at least 0"),
        ([{**ORGANS, "colour": 1}], "unknown colour"),
        ([ORGANS, ORGANS], "2 tasks are called organs"),
        ([ORGANS, {"name": "edges", "kind": "boundary", "of": "organ"}], "expected a task with masks: organs"),
        ([ORGANS, {"name": "edges", "kind": "boundary", "of": "organs", "names": ["x"]}], "leave them out"),
    ],
)
def test_what_cannot_be_used_is_said(entries: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tasks(entries)
