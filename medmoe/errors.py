# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The error tree. A message says what was found, what was expected, where, and what to do about it."""


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
