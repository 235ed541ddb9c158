# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The error tree, and what messages are made of.

A message says what was found, what was expected, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


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


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def some(names: Sequence[str], limit: int = 5) -> str:
    """A few of the names, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
