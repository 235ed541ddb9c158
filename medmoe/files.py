# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Files appear whole or not at all."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``target`` that takes its place when the block ends well.

    The file is fsynced before it is renamed and the folder after, so that a crash, a full disk or a power cut leaves
    either the old file or the new one. When the block raises, the temporary file is removed, ``target`` is as it was.
    The temporary name keeps the suffixes of ``target``, because many writers choose the format by them.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".partial-", suffix="".join(target.suffixes[-2:]))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes ``text`` to ``target`` atomically, in UTF-8."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain_name(name: str) -> str:
    """``name`` with an underscore for all that may trouble names of files and of metrics."""
    return re.sub(r"[^\w.-]+", "_", name)


def finite(value: Any) -> Any:
    """``value`` with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
