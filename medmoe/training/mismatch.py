# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What keeps a checkpoint from fitting a network: other experts, other settings, other tensors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from medmoe.conditions import Schema

EXPERTS = ("general", "medical", "other")
OF_EACH_EXPERT = ("{}", "{}_size", "prompt_{}", "{}_channels", "{}_lora", "{}_lora_targets", "{}_adaroute")
NETWORK_SETTINGS = (
    "spatial_dims",
    "in_channels",
    "num_classes",
    "tasks",
    "task_weighting",
    *(setting.format(name) for name in EXPERTS for setting in OF_EACH_EXPERT),
    "adaroute_kernels",
    "neighbors",
    "prompter",
    "num_prompts",
    "dispatch",
    "form",
    "exchange",
    "top_k",
    "shared_prompts",
    "site_range",
    "conditions",
    "mope_prompts",
    "mope_experts",
    "mope_router",
    "conditioning",
    "condition_expert",
    "fusion",
    "decoder",
    "decoder_channels",
    "fgmoe_slices",
    "fgmoe_top_k",
    "pmoe_options",
    "mope_options",
    "adaroute_options",
    "fgmoe_options",
    "intensity",
    "spacing",
    "resize",
)
WORTH_COPYING = ("label_threshold", "roi_size")
"""Settings that may differ from the checkpoint's, but are put right together with those that must not."""


def setting_problems(saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Settings that shape the network, or what it sees, and differ; and the overrides to pass, in one line.

    The seed is among them where an expert's weights are random.
    """

    def different(names: Iterable[str]) -> list[str]:
        shared = [name for name in names if name in here and name in saved]
        return [name for name in shared if shaping(name, here[name]) != shaping(name, saved[name])]

    drawn = "random" in (here.get(f"{name}_weights") for name in EXPERTS)
    wrong = different((*NETWORK_SETTINGS, "seed") if drawn else NETWORK_SETTINGS)
    if not wrong:
        return []
    lines = [f"{name} is {here[name]!r} here and {saved[name]!r} in the checkpoint" for name in wrong]
    overrides = " ".join(override(name, saved[name]) for name in [*wrong, *different(WORTH_COPYING)])
    return [*lines, f"pass {overrides}"]


def shaping(name: str, value: Any) -> Any:
    """What of a setting shapes the network: of tasks all but where their targets are and what their losses weigh."""
    if name != "tasks" or not value:
        return value
    return [{key: part for key, part in task.items() if key not in ("target", "weight")} for task in value]


def override(name: str, value: Any) -> str:
    """``--name value`` as the command line of MONAI's bundles takes it, quoted for the shell."""
    text = "$None" if value is None else json.dumps(value) if isinstance(value, list | dict) else str(value)
    return f"--{name} {shlex.quote(text)}"


def expert_problems(saved: Sequence[Mapping[str, str]], own: Sequence[Mapping[str, str]]) -> list[str]:
    """A line that names both lists of experts where they differ."""

    def names(experts: Sequence[Mapping[str, str]]) -> str:
        return ", ".join(f"{expert['name']} (sha256 {expert['sha256'][:12]})" for expert in experts) or "none"

    if [(expert["name"], expert["sha256"]) for expert in saved] == [(e["name"], e["sha256"]) for e in own]:
        return []
    return [f"it was trained with the experts {names(saved)}; this network has {names(own)}"]


def task_problems(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line that names both lists of tasks where they differ; their targets and weights may.

    Names of the classes of plain segmentation may differ too: they come with the data. A checkpoint of before there
    were tasks has none.
    """

    def output(task: Mapping[str, Any]) -> str:
        names = "" if task["name"] == "label" else f": {', '.join(task['names'])}"
        return f"{task['name']} ({task['kind']}, {len(task['names'])} channels{names})"

    def outputs(tasks: Sequence[Mapping[str, Any]]) -> str:
        return "; ".join(map(output, tasks))

    if not saved or not own or outputs(saved) == outputs(own):
        return []
    return [f"it was trained for the tasks {outputs(saved)}; this network has {outputs(own)}"]


def condition_problems(saved: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> list[str]:
    """A line that names both lists of conditions where they, or what was learned of the training cases, differ."""

    def columns(schema: Mapping[str, Any] | None) -> str:
        return (
            ", ".join(f"{column['name']} ({column['kind']})" for column in (schema or {}).get("columns", ())) or "none"
        )

    if (saved and Schema.from_json(saved)) == (own and Schema.from_json(own)):
        return []
    if columns(saved) != columns(own):
        return [f"it was trained with the conditions {columns(saved)}; this network has {columns(own)}"]
    return [f"means, categories or text encoder of its conditions ({columns(own)}) are not those of this network"]


def tensor_problems(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], limit: int = 5) -> list[str]:
    """Tensors that are missing, left over or of another shape; at most ``limit`` of each."""
    missing = [f"{name} is not in the checkpoint" for name in own if name not in saved]
    left = [f"{name} is in the checkpoint but not in this network" for name in saved if name not in own]
    shapes = [
        f"{name} has shape {tuple(tensor.shape)} in the checkpoint, {tuple(own[name].shape)} in this network"
        for name, tensor in saved.items()
        if name in own and own[name].shape != tensor.shape
    ]
    problems = []
    for group in (missing, left, shapes):
        problems += group[:limit] + ([f"... and {len(group) - limit} more like it"] if len(group) > limit else [])
    return problems
