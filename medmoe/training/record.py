# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The record of a run, written before its first step: what it takes to know later how a number came about."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medmoe.files import write_text
from medmoe.networks.cost import cost_card
from medmoe.training.checkpoint import descriptions, literals
from medmoe.training.optim import parameter_counts
from medmoe.training.tracking import SECRET, redact

PACKAGES = ("medmoe", "torch", "monai", "pytorch-ignite", "timm", "peft", "mlflow", "numpy", "nibabel", "safetensors")
EDGE = 1 << 16


def write_record(
    output_dir: str | os.PathLike[str],
    settings: Mapping[str, Any],
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    network: nn.Module,
) -> dict[str, Any]:
    """Writes ``run.json`` to ``output_dir`` and returns its content. It holds no names of cases.

    Args:
        output_dir: of the run; when it is resumed, the record of the first start is kept below ``before``.
        settings: the bundle's top-level settings.
        splits: the cases of each split, see :mod:`medmoe.data.datalist`.
        network: whose parameters are counted and whose experts, tasks and conditions are named. Its cost card is made
            where the settings say how large a window is (``roi_size``).
    """
    path = Path(output_dir) / "run.json"
    record: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command_line(sys.argv),
        "settings": {key: masked(key, value) for key, value in literals(settings).items()},
        "data": {name: {"cases": len(cases), "fingerprint": fingerprint(cases)} for name, cases in splits.items()},
        **descriptions(network),
        "parameters": parameter_counts(network),
        "cost": cost_card(network, settings["roi_size"]) if "roi_size" in settings else None,
        "versions": versions(),
        "hardware": hardware(),
    }
    if path.exists():
        record["before"] = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(record, indent=2) + "\n")
    return record


def masked(name: str, value: Any) -> Any:
    """``value`` of the setting ``name``, without passwords and tokens."""
    if SECRET.search(name):
        return "***"
    return redact(value) if isinstance(value, str) else value


def command_line(arguments: Iterable[str]) -> list[str]:
    """The command as it was given, without passwords and tokens."""
    result: list[str] = []
    for argument in arguments:
        follows = bool(result) and result[-1].startswith("-") and SECRET.search(result[-1]) and "=" not in result[-1]
        name, equals, _ = argument.partition("=")
        inside = equals and name.startswith("-") and SECRET.search(name)
        result.append("***" if follows else f"{name}=***" if inside else redact(argument))
    return result


def fingerprint(cases: Sequence[Mapping[str, Any]]) -> str:
    """A sha256 over the names of cases, their values (classes, conditions), and their files' sizes and ends.

    It does not depend on where the files lie. Of a file the first and last 64 KiB count: compressed files end in a
    checksum of all they hold, so that the ends tell; a change in the middle of a large uncompressed file of the same
    size is not seen.
    """
    digest = hashlib.sha256()
    for case in sorted(cases, key=lambda case: str(case.get("case"))):
        digest.update(f"{case.get('case')}\n".encode())
        for key, value in sorted(entries_of(case).items()):
            paths = files_of(value)
            for path in paths:
                digest.update(f"{key} {path.name} {path.stat().st_size}\n".encode())
                digest.update(ends(path))
            if not paths and value is not None:
                digest.update(f"{key} {value}\n".encode())
    return digest.hexdigest()


def entries_of(case: Mapping[str, Any]) -> dict[str, Any]:
    """Image, targets and conditions of a case."""
    entries = {key: value for key, value in case.items() if key not in ("case", "split", "condition")}
    return entries | {f"condition.{key}": value for key, value in (case.get("condition") or {}).items()}


def files_of(entry: Any) -> list[Path]:
    """The files of an entry of a case: one path, a list of them, or a folder; what is no file is left out."""
    items = entry if isinstance(entry, list | tuple) else [entry]
    paths = [Path(item) for item in items if isinstance(item, str | os.PathLike)]
    inside = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    return [path for group in inside for path in group if path.is_file()]


def ends(path: Path) -> bytes:
    """The first and the last 64 KiB of a file."""
    with open(path, "rb") as file:
        start = file.read(EDGE)
        file.seek(max(EDGE, path.stat().st_size - EDGE))
        return start + file.read(EDGE)


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The machine, without its name: system, processor, cores, threads that PyTorch uses, and GPUs."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
    }
