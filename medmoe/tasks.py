# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What a network is asked to predict: one task, or several from the same features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medmoe.errors import ConfigError, one_of

KINDS = ("classes", "labels", "boundary", "distance", "image")
DERIVED = ("boundary", "distance")
RESERVED = ("image", "case", "split", "condition", "pred", "labelled")
"""What else a sample holds."""
UNLABELLED = 255
"""In a mask: nobody has said what is here. Such voxels neither train nor count. In an image-level target it is -1, in a
signed distance NaN."""
DISTANCE_LIMIT = 16.0
"""Voxels of the network's grid at which a signed distance is cut off; targets are divided by it and lie in [-1, 1]."""


@dataclass(frozen=True)
class Task:
    """One thing to predict.

    Attributes:
        name: unique; the key of its target in a sample and of its output.
        kind: "classes": a mask of exclusive classes, the background first; "labels": masks that may overlap, one
            channel each; "boundary" and "distance" (signed, positive inside): made on the fly of the masks of the task
            ``of``; "image": one class for the whole image.
        names: of the channels. For "classes" and "image" they are the classes.
        target: where the data have it: the folder of the masks ("" is the usual one), or a column of the table.
        of: the task whose masks a "boundary" or "distance" follows.
        weight: of its loss, 0 or more. With 0 it is there for what is made of it, and does not train.
    """

    name: str
    kind: str
    names: tuple[str, ...]
    target: str = ""
    of: str = ""
    weight: float = 1.0

    @property
    def channels(self) -> int:
        """Channels of its logits."""
        return len(self.names)

    @property
    def dense(self) -> bool:
        """Whether it says something of every voxel."""
        return self.kind != "image"

    @property
    def derived(self) -> bool:
        """Whether its target is made of another task's."""
        return self.kind in DERIVED

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of its masks: all channels but a background."""
        return self.names[1:] if self.kind == "classes" else self.names


def single_task(num_classes: int, names: Sequence[str] = ()) -> list[Task]:
    """The one task of plain segmentation: a mask of ``num_classes`` exclusive classes, in ``label``."""
    names = names or ["background", *(f"class {index}" for index in range(1, num_classes))]
    if len(names) != num_classes:
        raise ConfigError(f"class_names has {len(names)} names, but num_classes is {num_classes}")
    return [Task("label", "classes", tuple(names))]


def make_tasks(
    entries: Sequence[Mapping[str, Any]] | None, num_classes: int = 2, class_names: Sequence[str] = ()
) -> list[Task]:
    """Tasks out of a bundle's ``tasks``; without any, the one of plain segmentation.

    Args:
        entries: such as ``{"name": "organs", "kind": "labels", "names": ["heart", "left lung"]}`` or
            ``{"name": "edges", "kind": "boundary", "of": "organs"}``; further keys are those of :class:`Task`.
        num_classes: of plain segmentation.
        class_names: of plain segmentation.

    Raises:
        ConfigError: for all entries that cannot be used, at once.
    """
    if not entries:
        return single_task(num_classes, class_names)
    found = task_problems(entries)
    if found:
        raise ConfigError("tasks: " + "; ".join(found))
    masks = {entry["name"]: entry for entry in entries if entry["kind"] not in DERIVED}

    def names(entry: Mapping[str, Any]) -> tuple[str, ...]:
        if entry["kind"] not in DERIVED:
            return tuple(entry["names"])
        source = masks[entry["of"]]
        return tuple(source["names"][1:] if source["kind"] == "classes" else source["names"])

    def target(entry: Mapping[str, Any]) -> str:
        return str(entry.get("target") or (entry["name"] if entry["kind"] == "image" else ""))

    return [
        Task(e["name"], e["kind"], names(e), target(e), str(e.get("of", "")), float(e.get("weight", 1)))
        for e in entries
    ]


def task_problems(entries: Any) -> list[str]:
    """What is wrong with a bundle's ``tasks``, one line each; nothing where they can be used."""
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, Mapping) for entry in entries):
        return [f"found {entries!r}, expected a list of objects with name, kind and names"]
    found = [f"task {n} ({e.get('name', 'no name')}): {p}" for n, e in enumerate(entries, 1) for p in _own(e)]
    names = Counter(str(entry.get("name")) for entry in entries)
    found += [f"{count} tasks are called {name}" for name, count in names.items() if count > 1]
    masks = [str(entry.get("name")) for entry in entries if entry.get("kind") in ("classes", "labels")]
    found += [
        f"task {entry.get('name')}: of is {entry.get('of')!r}, expected a task with masks: {', '.join(masks) or 'none'}"
        for entry in entries
        if entry.get("kind") in DERIVED and entry.get("of") not in masks
    ]
    return found


def _own(entry: Mapping[str, Any]) -> list[str]:
    """What is wrong with one entry by itself."""
    found = []
    name = entry.get("name")
    if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
        found.append(f"name must be a word of letters, digits and _, and none of {', '.join(RESERVED)}")
    unknown = set(entry) - {"name", "kind", "names", "target", "of", "weight"}
    if unknown:
        found.append(f"unknown {', '.join(sorted(unknown))}: it may have name, kind, names, target, of, weight")
    kind = entry.get("kind")
    try:
        one_of("kind", str(kind), KINDS)
    except ConfigError as error:
        return [*found, str(error)]
    least = 2 if kind in ("classes", "image") else 1
    names = entry.get("names")
    if kind in DERIVED:
        if names is not None:
            found.append("names are those of the task that it is made of: leave them out")
    elif not isinstance(names, list | tuple) or len(names) < least or len(set(map(str, names))) < len(names):
        found.append(f"names: found {names!r}, expected a list of at least {least} different names")
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        found.append(f"weight: found {weight!r}, expected a number of at least 0")
    return found
