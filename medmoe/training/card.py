# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The cost card of a bundle, before anything is trained and without its data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from medmoe.conditions import Column, Schema
from medmoe.errors import ConfigError
from medmoe.networks.cost import cost_card
from medmoe.training.excepthook import find_error
from medmoe.training.preflight import literal_settings
from medmoe.training.settings import nearest, problems

TEXT_WIDTH = 768
"""Stands for the width of a text's embedding where nothing says how wide it is: that of BERT-base."""


def bundle_cost(files: Sequence[str | os.PathLike[str]], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The cost card of the network that a bundle would train, see :class:`medmoe.networks.cost.Cost`.

    Without the data set, what is learned of it is taken at its least: a category of the condition has one value.

    Args:
        files: of the bundle, the later ones on top of the earlier ones.
        settings: to override.

    Raises:
        ConfigError: a file is missing or no bundle, a setting does not exist or is out of range.
        ExpertError: the weights of an expert are not in the cache.
    """
    parser = opened_bundle(files)
    known = sorted(name for name in parser.get() if not name.startswith("_"))
    unknown = [name for name in settings or {} if name not in known]
    found = [f"{name}: there is no such setting. {nearest(name, known)}".rstrip() for name in unknown]
    parser.update(pairs=dict(settings or {}))
    values = literal_settings(parser)
    found += problems(values)
    if found:
        raise ConfigError("\n  - ".join(["the settings will not do:", *found]))
    conditions = values.get("conditions")
    if not conditions or not Path(values["dataset_dir"]).is_dir():
        parser.update(pairs={"schema": least_schema(conditions) if conditions else None})
    try:
        return cost_card(parser.get_parsed_content("network"), values["roi_size"])
    except Exception as error:  # MONAI wraps what is raised in an expression
        ours = find_error(error)
        if ours is None or ours is error:
            raise
        raise ours from error


def opened_bundle(files: Sequence[str | os.PathLike[str]]) -> ConfigParser:
    """The files of a bundle as MONAI reads them, with a network in them."""
    missing = [str(file) for file in files if not Path(file).is_file()]
    if missing:
        raise ConfigError(f"there is no {', '.join(missing)} (looked in {Path.cwd()})")
    parser = ConfigParser()
    try:
        parser.read_config([str(file) for file in files])
    except Exception as error:  # whatever a file that is no configuration leads to
        raise ConfigError(f"{', '.join(map(str, files))} cannot be read as a bundle: {error}") from error
    if "network" not in parser or "roi_size" not in parser:
        raise ConfigError(
            f"{', '.join(map(str, files))} describes no network: give a bundle such as bundles/pmoe_seg.json, and "
            "files like configs/methods/lora.json behind it"
        )
    return parser


def least_schema(conditions: Sequence[Mapping[str, Any]]) -> Schema:
    """A bundle's conditions without having seen any case."""
    columns = [
        Column(str(each["name"]), str(each["kind"]), values=("any",) if each["kind"] == "category" else ())
        for each in conditions
    ]
    has_text = any(column.kind == "text" for column in columns)
    return Schema(tuple(columns), "unknown" if has_text else "", TEXT_WIDTH if has_text else 0)
