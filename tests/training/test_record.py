# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from training.toy import SETTINGS, ToyNetwork

from medmoe.training.record import command_line, fingerprint, write_record


def cases(folder: Path, count: int = 3, size: int = 200_000) -> list[dict[str, str]]:
    found = []
    for index in range(count):
        paths = {key: folder / f"{key}{index}.bin" for key in ("image", "label")}
        for path in paths.values():
            path.write_bytes(random.randbytes(size))
        found.append({"case": f"patient{index}", **{key: str(path) for key, path in paths.items()}})
    return found


def test_a_record_holds_what_it_takes_to_repeat_the_run_and_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["prog", "--tracking_uri", "http://me:word@host/", "--lr", "0.1"])
    settings = {**SETTINGS, "tracking_uri": "http://me:word@host/", "mlflow_token": "abc", "network": ToyNetwork()}
    splits = {"train": cases(tmp_path), "validation": cases(tmp_path, 1)}
    network = ToyNetwork()
    record = write_record(tmp_path / "run", settings, splits, network)
    text = (tmp_path / "run" / "run.json").read_text()
    assert json.loads(text) == record
    assert record["settings"]["general_lora"] == 2 and "network" not in record["settings"]
    assert record["command"] == ["prog", "--tracking_uri", "http://***@host/", "--lr", "0.1"]
    assert "word" not in text and "abc" not in text and "patient" not in text and str(tmp_path) not in text
    assert record["data"]["train"]["cases"] == 3 and len(record["data"]["train"]["fingerprint"]) == 64
    assert record["experts"][1]["sha256"] == network.experts[1].sha256
    assert record["parameters"]["trainable"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert record["versions"]["torch"] and record["hardware"]["threads"] >= 1


def test_a_resumed_run_keeps_the_first_record(tmp_path: Path) -> None:
    first = write_record(tmp_path, {"lr": 1}, {}, ToyNetwork())
    second = write_record(tmp_path, {"lr": 2}, {}, ToyNetwork())
    assert second["before"] == first


def test_secrets_in_a_command_are_masked() -> None:
    given = ["prog", "--api_key", "abc", "--password=abc", "--lr", "0.1", "--note", "a=b"]
    assert command_line(given) == ["prog", "--api_key", "***", "--password=***", "--lr", "0.1", "--note", "a=b"]


def test_the_fingerprint_follows_content_and_names_but_not_place_or_order(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    found = cases(tmp_path / "one")
    mark = fingerprint(found)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = [{key: value.replace("one", "two") for key, value in case.items()} for case in found]
    assert fingerprint(moved[::-1]) == mark
    assert fingerprint(found[:2]) != mark
    assert fingerprint([{**found[0], "case": "other"}, *found[1:]]) != mark
    for place in (0, -1):
        path = Path(found[1]["label"])
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert fingerprint(found) != mark


def test_the_fingerprint_follows_every_target_and_condition(tmp_path: Path) -> None:
    [found] = cases(tmp_path, 1)
    mask, second = tmp_path / "mask.bin", tmp_path / "second.bin"
    mask.write_bytes(b"mask"), second.write_bytes(b"second")
    case = {**found, "organs": [str(mask), None], "grade": 1, "condition": {"age": "61", "flair": str(second)}}
    marks = [fingerprint([case]), fingerprint([{**case, "split": "train"}])]
    assert marks[0] == marks[1]
    marks.append(fingerprint([{**case, "grade": -1}]))
    marks.append(fingerprint([{**case, "condition": {**case["condition"], "age": None}}]))
    for path in (mask, second):
        path.write_bytes(b"other")
        marks.append(fingerprint([case]))
    assert len(set(marks)) == 5


def test_the_fingerprint_reads_lists_and_folders(tmp_path: Path) -> None:
    found = cases(tmp_path, 2)
    listed = [{"case": "a", "image": [case["image"] for case in found]}]
    folder = [{"case": "a", "image": str(tmp_path)}]
    marks = {fingerprint(listed), fingerprint(folder)}
    Path(found[1]["image"]).write_bytes(b"")
    assert len(marks | {fingerprint(listed), fingerprint(folder)}) == 4
