# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Where the masks of several tasks go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from medmoe.errors import DataError
from medmoe.inference import InputDataset, SaveMask
from medmoe.inference.inputs import find_inputs
from medmoe.inference.writer import case_masks, check_output
from medmoe.tasks import Task


def test_every_task_with_masks_is_written(tmp_path: Path) -> None:
    """The first by the case alone, others by their names too, and one that does not fit is known beforehand."""
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "in/a.png")
    tasks = [
        Task("edges", "boundary", ("one",), of="tissue"),
        Task("tissue", "classes", ("none", "one")),
        Task("organs", "labels", ("left lung", "heart")),
        Task("zones", "classes", ("none", "inner", "outer")),
    ]
    writer = SaveMask(InputDataset(find_inputs(tmp_path / "in"), dict), tmp_path / "out", tasks)
    values = {task.name: torch.rand(task.channels, 20, 30) for task in tasks}
    result = {f"pred_{name}": MetaTensor(each) for name, each in values.items()}
    writer.save("a", {**result, "pred": MetaTensor(values["tissue"].argmax(0, keepdim=True).byte())})
    expected = {
        "a.png": values["tissue"].argmax(0),
        "a_organs_left_lung.png": values["organs"][0] >= 0.5,
        "a_organs_heart.png": values["organs"][1] >= 0.5,
        "a_zones.png": values["zones"].argmax(0),
    }
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == set(expected)
    for name, mask in expected.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / name)), mask)
    sources = {"a": tmp_path / "in/a.png"}
    assert [path.name for path in case_masks(tmp_path / "out", sources, tasks)] == list(expected)
    check_output(tmp_path / "out", sources, tasks)
    (tmp_path / "out/predictions.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"4 files .*: a\.png, a_organs_left_lung\.png, a_organs_heart\.png, a_zones\.png"
    ):
        check_output(tmp_path / "out", sources, tasks)
    with pytest.raises(DataError, match=r"to one file: a_zones\.png"):
        check_output(tmp_path / "new", {**sources, "a_zones": tmp_path / "in/a_zones.png"}, tasks)
