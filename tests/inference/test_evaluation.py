# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from pathlib import Path

from medmoe.inference.evaluation import summary
from medmoe.inference.metrics import write_table


def test_summary_has_a_row_for_each_class_and_their_mean(tmp_path: Path) -> None:
    columns = {
        "val_dice_a": [0.5, 0.7],
        "val_dice_left_b": [math.nan] * 2,
        "val_hd95_a": [1, 2],
        "val_hd95_left_b": [3, 4],
    }
    means = {"val_dice_a": 0.6, "val_dice_left_b": math.nan, "val_hd95_a": 1.5, "val_hd95_left_b": 3.5}
    write_table(tmp_path / "cases", ["x", "y"], columns, means, {"val_mean_dice": 0.6, "val_mean_hd95": 2.5})
    lines = summary(tmp_path, "run/best.safetensors", "test").splitlines()
    assert lines[0] == "2 test cases, run/best.safetensors"
    expected = [["dice", "hd95"], ["a", "0.600", "1.500"], ["left_b", "-", "3.500"], ["mean", "0.600", "2.500"]]
    assert [line.split() for line in lines[1:5]] == expected
    assert f"{tmp_path}/cases.csv" in lines[5] and f"{tmp_path}/overlays" in lines[6]
