# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The error tree, and what messages are made of.

A message says what was found, what was expected, where, and what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

Rule = Callable[[object], str]
"""Says what a value should have been, or nothing where it is good."""


class MedMoEError(Exception):
    """Anything that the user can put right. The command line prints its message alone, without a traceback."""


class ConfigError(MedMoEError):
    """A setting that does not exist, is out of range, or contradicts another setting or the data."""


class ExpertError(MedMoEError):
    """An expert that is unknown, not in the cache, or whose weights are damaged or do not fit."""


class DataError(MedMoEError):
    """Images or labels that are missing, unreadable, or do not belong together."""


class GeometryError(DataError):
    """An affine, spacing, orientation or slice order that cannot be trusted."""


class CheckpointError(MedMoEError):
    """A checkpoint that is damaged, or belongs to another network or other experts."""


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """``value`` of the argument ``name`` where it is allowed; a ConfigError that lists what is, otherwise."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not known: choose one of {', '.join(allowed)}")
    return value


def number(least: float | None = None, above: float | None = None, below: float = math.inf) -> Rule:
    """A finite number: at least ``least``, above ``above``, below ``below``."""
    bounds = {"of at least": least, "above": above, "below": None if below == math.inf else below}
    words = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    expected = f"a number {' and '.join(words)}" if words else "a finite number"

    def rule(value: object) -> str:
        good = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < below
        good = good and (least is None or value >= least) and (above is None or value > above)  # type: ignore[operator]
        return "" if good else expected

    return rule


def whole(least: int, most: int | None = None, why: str = "") -> Rule:
    """A whole number from ``least`` to ``most``, and why."""
    expected = "a whole number " + (f"of at least {least}" if most is None else f"from {least} to {most}")
    expected += why and f", {why}"

    def rule(value: object) -> str:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if good and (most is None or value <= most) else expected  # type: ignore[operator]

    return rule


def optional(rule: Rule) -> Rule:
    """``None``, or what ``rule`` wants."""
    return lambda value: "" if value is None else rule(value)


def check_settings(settings: Mapping[str, tuple[object, Rule]]) -> None:
    """Raises one ConfigError for all of the settings, by name, whose value does not fit its rule."""
    found = {name: (value, rule(value)) for name, (value, rule) in settings.items()}
    problems = [f"{name}={value!r}: expected {expected}" for name, (value, expected) in found.items() if expected]
    if problems:
        raise ConfigError("; ".join(problems))


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], limit: int = 5) -> str:
    """A few of the names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
