# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The cost card of a bundle, without its data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundle_runs import BUNDLES, METHODS

from medmoe.errors import ConfigError, ExpertError
from medmoe.training.card import bundle_cost, least_schema

BUNDLE = BUNDLES / "pmoe_seg.json"
SMALL: dict[str, Any] = {
    "general": "timm/vit_tiny_patch16_224",
    "general_weights": "random",
    "general_size": 32,
    "general_lora": 2,
    "medical": "",
    "num_prompts": 2,
    "decoder_channels": 8,
    "roi_size": [32, 32, 2],
    "dataset_dir": "/nowhere",
}


def test_a_bundle_is_costed_with_its_settings_and_method_and_without_data() -> None:
    card = bundle_cost([BUNDLE], SMALL)
    assert json.loads(json.dumps(card)) == card and card["image"] == [1, 1, 32, 32, 2]
    assert list(card["parts"]) == ["timm/vit_tiny_patch16_224", "prompter", "decoder"]
    linear = bundle_cost([BUNDLE, METHODS / "linear.json"], SMALL | {"general_lora": 0})
    assert list(linear["parts"]) == ["timm/vit_tiny_patch16_224", "decoder"]
    assert linear["saved_bytes"] < card["saved_bytes"] and linear["total"]["flops"] < card["total"]["flops"]
    assert linear["checkpoint_bytes"] < card["checkpoint_bytes"]


def test_conditions_that_nobody_has_seen_are_taken_at_their_least() -> None:
    conditions = [
        {"name": "age", "kind": "number"},
        {"name": "sex", "kind": "category"},
        {"name": "note", "kind": "text"},
    ]
    schema = least_schema(conditions)
    assert [column.name for column in schema.columns] == ["age", "sex", "note"]
    assert schema.columns[1].values == ("any",) and schema.text_width == 768
    card = bundle_cost([BUNDLE], SMALL | {"conditions": conditions[:2], "table": "table.csv"})
    assert card["parts"]["conditioner"]["trainable"] > 0


def test_all_settings_that_will_not_do_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        bundle_cost([BUNDLE], {"num_prompt": 2, "roi_size": [0, 3]})
    message = str(caught.value)
    assert "num_prompt: there is no such setting. Did you mean num_prompts?" in message and "roi_size" in message


def test_weights_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDMOE_CACHE", str(tmp_path))
    with pytest.raises(ExpertError, match="lite_medsam is not in the cache"):
        bundle_cost([BUNDLE], SMALL | {"medical": "lite_medsam"})


def test_files_that_are_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no JSON")
    (tmp_path / "list.json").write_text("{}")
    for name, reason in {"none.json": "there is no", "text.json": "cannot be read", "list.json": "no network"}.items():
        with pytest.raises(ConfigError, match=reason):
            bundle_cost([tmp_path / name])
