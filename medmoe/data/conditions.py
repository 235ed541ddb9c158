# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""From the raw values of a case to the numbers that a network is conditioned on, and controls to compare with.

What a column means is learned of the training cases alone: mean and standard deviation of a number, the values of a
category. A missing value is NaN (number, text, image) or index 0 (category); the network learns what to make of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medmoe.conditions import KINDS, Column, Schema
from medmoe.data.datalist import Case
from medmoe.data.reading import load
from medmoe.data.text import encoder_of
from medmoe.data.text import text_encoder as load_text_encoder
from medmoe.errors import ConfigError, DataError, some

MOST_CATEGORIES = 50
"""A category with more values in the training cases looks like an identifier."""
FEW_CATEGORIES = 10
"""So does one with more values than this, where there are more than half as many as cases that have one."""
MOST_CHANNELS = 3
"""Channels of a second image that an expert sees."""


def condition_problems(specs: Any, text_encoder: str | None = None) -> list[str]:
    """What is wrong with a bundle's ``conditions``, one line each; nothing where they can be used."""
    if not isinstance(specs, list | tuple) or not all(isinstance(spec, Mapping) for spec in specs):
        return [f"found {specs!r}, expected a list such as [{{'name': 'age', 'kind': 'number'}}]"]
    found = []
    for number, spec in enumerate(specs, 1):
        name, kind = spec.get("name"), spec.get("kind")
        if not isinstance(name, str) or not name:
            found.append(f"condition {number}: name is {name!r}, expected a column of the table, or a folder of images")
        if kind not in KINDS:
            found.append(f"condition {number} ({name}): kind is {kind!r}, expected one of {', '.join(KINDS)}")
        unknown = sorted(set(spec) - {"name", "kind"})
        if unknown:
            found.append(f"condition {number} ({name}): unknown {', '.join(unknown)}: it has a name and a kind")
    names = Counter(str(spec.get("name")) for spec in specs)
    found += [f"{count} conditions are called {name}" for name, count in names.items() if count > 1]
    images = [str(spec.get("name")) for spec in specs if spec.get("kind") == "image"]
    if len(images) > 1:
        found.append(f"{len(images)} are images ({some(images)}): a network takes one second image")
    if any(spec.get("kind") == "text" for spec in specs) and not text_encoder:
        found.append("there are texts: set text_encoder to a model that transformers knows, by name or local path")
    return found


def fit(specs: Sequence[Mapping[str, Any]], cases: Sequence[Case], text_encoder: str | None = None) -> Schema:
    """What the training cases say of the conditions.

    Args:
        specs: the bundle's ``conditions``.
        cases: the training cases, as :func:`medmoe.data.datalists` finds them with the same conditions.
        text_encoder: for texts, a name or local path that ``transformers`` knows. It is loaded here, so that one that
            cannot be had is found out before training.

    Raises:
        ConfigError: the settings cannot be used, or the text encoder cannot be had.
        DataError: for all columns whose values in the training cases cannot be used, at once.
    """
    problems = condition_problems(specs, text_encoder)
    if problems:
        raise ConfigError("conditions: " + "; ".join(problems))
    columns: list[Column] = []
    for spec in specs:
        name, kind = str(spec["name"]), str(spec["kind"])
        values = {case["case"]: value for case in cases if (value := case["condition"].get(name)) is not None}
        problem = _column_problem(name, kind, values, len(cases))
        if problem:
            problems.append(problem)
        else:
            columns.append(_column(name, kind, list(values.values())))
    if problems:
        raise DataError("\n  - ".join(["conditions cannot be learned of the training cases:", *problems]))
    images = [column.name for column in columns if column.kind == "image"]
    files = [case["condition"][name] for name in images for case in cases if case["condition"].get(name)]
    schema = Schema(tuple(columns), image_channels=_channels(files[0]) if files else 1)
    if not schema.of_kind("text") or not text_encoder:
        return schema
    encoder = load_text_encoder(text_encoder)
    return replace(schema, text_encoder=text_encoder, text_width=encoder.width, text_sha256=encoder.sha256)


def _column_problem(name: str, kind: str, values: Mapping[str, Any], count: int) -> str:
    """Why the values of a column, by case, cannot be used, or nothing."""
    if not values:
        return f"{name}: none of the {count} training cases has a value"
    if kind == "image":
        channels = _channels(next(iter(values.values())))
        seen = f"the image of case {next(iter(values))} has {channels} channels, an expert sees {MOST_CHANNELS}"
        return f"{name}: {seen}: choose up to {MOST_CHANNELS} of them" if channels > MOST_CHANNELS else ""
    different = sorted(set(values.values()))
    if kind == "number":
        wrong = {case: value for case, value in values.items() if not is_number(value)}
        if wrong:
            case, value = next(iter(wrong.items()))
            more = f" ({len(wrong)} cases in all)" if len(wrong) > 1 else ""
            return f"{name}: kind is number, but case {case} has {value!r}{more}: correct it, or declare a category"
        different = [repr(number).removesuffix(".0") for number in sorted({float(value) for value in values.values()})]
    if len(different) == 1:
        same = f"it is {different[0]!r} in all of the {len(values)} training cases that have it"
        return f"{name}: {same}, expected at least two different values: leave it out"
    most = min(MOST_CATEGORIES, max(FEW_CATEGORIES, len(values) // 2))
    if kind == "category" and len(different) > most:  # the values stay untold: they may be private
        return (
            f"{name}: a category with {len(different)} values in {len(values)} cases looks like an identifier, and its "
            "values would be written into checkpoints and records: leave it out"
        )
    return ""


def _channels(files: str | Sequence[str]) -> int:
    return int(load(files).shape[0])


def is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _column(name: str, kind: str, values: Sequence[Any]) -> Column:
    if kind == "number":
        numbers = np.asarray(values, dtype=np.float64)
        return Column(name, kind, float(numbers.mean()), float(numbers.std()))
    return Column(name, kind, values=tuple(sorted(set(values))) if kind == "category" else ())


def encode(schema: Schema, row: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The values of one case, without its image.

    Args:
        row: raw values by column, as ``condition`` of a case has them; None, or no entry, where one is missing.

    Returns:
        For the kinds that the schema has: "numbers" float32 (F,), standardised, NaN where missing; "categories" int64
        (G,), from 1 on, 0 where missing or never seen in training; "text" float32 (T, width), NaN where missing.

    Raises:
        DataError: there is text where a number belongs.
    """
    encoded: dict[str, npt.NDArray[Any]] = {}
    numbers, categories, texts = (schema.of_kind(kind) for kind in ("number", "category", "text"))
    if numbers:
        encoded["numbers"] = np.asarray([_standardised(c, row.get(c.name)) for c in numbers], dtype=np.float32)
    if categories:
        encoded["categories"] = np.asarray([_index(c, row.get(c.name)) for c in categories], dtype=np.int64)
    if texts:
        encoded["text"] = np.stack([_embedded(schema, row.get(c.name)) for c in texts])
    return encoded


def _standardised(column: Column, text: str | None) -> float:
    if text is None:
        return math.nan
    if not is_number(text):
        raise DataError(f"condition {column.name}: found {text!r}, expected a number")
    return (float(text) - column.mean) / column.std


def _index(column: Column, text: str | None) -> int:
    return 1 + column.values.index(text) if text in column.values else 0


def never_seen(schema: Schema | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each category of which some rows, raw values by column, have a value that no training case had.

    The values themselves stay untold: they may be private.
    """
    lines = []
    for column in schema.of_kind("category") if schema else ():
        count = sum(row.get(column.name) not in (None, *column.values) for row in rows)
        if count:
            where = f"in {count} of {len(rows)} cases"
            lines.append(f"condition {column.name}: {where} the value was never seen in training: it counts as missing")
    return lines


def _embedded(schema: Schema, text: str | None) -> npt.NDArray[np.float32]:
    if text is None:
        return np.full(schema.text_width, np.nan, dtype=np.float32)
    return encoder_of(schema).embed(text)


def control(
    splits: Mapping[str, Sequence[Case]],
    shuffle: bool = False,
    missing: float = 0.0,
    seed: int = 0,
) -> dict[str, list[Case]]:
    """The splits with conditions that say less, to find out what conditions are worth.

    Args:
        shuffle: within each split, every case gets the conditions of another one. It is by case, not by value: the
            other case may have the same sex, or be another image of the same patient.
        missing: share of the cases of every split but "train" that lose all conditions. The choice depends on ``seed``
            and the names of the cases alone; those of a smaller share are among those of a larger one.
        seed: of both choices.

    Raises:
        ConfigError: there are no conditions to change, or a single case to shuffle.
    """
    if (shuffle or missing) and not all("condition" in case for cases in splits.values() for case in cases):
        raise ConfigError("conditions are to be shuffled or left out, but there are none: set conditions")
    single = [split for split, cases in splits.items() if len(cases) == 1]
    if shuffle and single:
        raise ConfigError(
            f"conditions are to be shuffled between the cases of each split, but {some(single)} has one case: it would "
            "keep its own. Put two or more into each split."
        )
    changed = {}
    for split, cases in splits.items():
        chosen = _shuffled(cases, seed) if shuffle else list(cases)
        changed[split] = chosen if split == "train" else _without(chosen, missing, seed)
    return changed


def _order(cases: Sequence[Case], seed: int) -> list[int]:
    """Positions of the cases in a random order that does not depend on how they are sorted."""
    by_name = sorted(range(len(cases)), key=lambda index: cases[index]["case"])
    return [by_name[index] for index in np.random.default_rng(seed).permutation(len(cases))]


def _shuffled(cases: Sequence[Case], seed: int) -> list[Case]:
    """Every case with the conditions of the next one in a random order, so that none keeps its own."""
    order, changed = _order(cases, seed), list(cases)
    for index, other in zip(order, [*order[1:], *order[:1]], strict=True):
        changed[index] = {**cases[index], "condition": cases[other]["condition"]}
    return changed


def _without(cases: Sequence[Case], share: float, seed: int) -> list[Case]:
    changed = list(cases)
    for index in _order(cases, seed)[: round(share * len(cases))]:
        changed[index] = {**cases[index], "condition": dict.fromkeys(cases[index]["condition"])}
    return changed
