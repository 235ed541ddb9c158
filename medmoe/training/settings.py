# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What the top-level settings of the bundle may be. A value comes from a command line, where typing errors are easy."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from medmoe.data.conditions import condition_problems
from medmoe.data.datalist import SPLITS
from medmoe.decoders.fusion import FUSIONS
from medmoe.errors import ExpertError, Rule, optional, whole
from medmoe.experts import catalog
from medmoe.moe.adaroute import AdaRoute
from medmoe.moe.fgmoe import FGMoE
from medmoe.moe.mope import ROUTERS, MoPE
from medmoe.moe.pmoe import DISPATCHES, EXCHANGES, FORMS, PMoE
from medmoe.networks.network import WEIGHTINGS
from medmoe.networks.precision import PRECISIONS
from medmoe.networks.trunk import CONDITIONINGS
from medmoe.tasks import task_problems
from medmoe.training.mismatch import EXPERTS

PROMPTERS = ("pmoe", "vpt", "none")
DECODERS = ("plain", "fgmoe")


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``"Did you mean x?"`` for the candidate that is most like ``name``, or "" where none is."""
    close = difflib.get_close_matches(name, sorted(set(candidates)), n=1)
    return f"Did you mean {close[0]}?" if close else ""


def number(least: float | None = None, above: float | None = None, below: float = math.inf) -> Rule:
    """A finite number: at least ``least``, above ``above``, below ``below``."""
    bounds = {"of at least": least, "above": above, "below": None if below == math.inf else below}
    expected = " ".join(["a number", *(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)])

    def rule(value: Any) -> str:
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < below
        good = good and (least is None or value >= least) and (above is None or value > above)
        return "" if good else expected

    return rule


def one_of(*allowed: Any) -> Rule:
    """One of a few names or numbers."""
    names = [str(item) for item in allowed]

    def rule(value: Any) -> str:
        # True == 1, so a flag given without its value would pass for a number.
        if value in allowed and not isinstance(value, bool):
            return ""
        return f"one of {', '.join(names)}. {nearest(str(value), names)}".strip()

    return rule


def truth(value: Any) -> str:
    """True or False. The command line turns ``true`` into a string, and every string counts as true."""
    return "" if isinstance(value, bool) else "True or False, with a capital letter"


def text(value: Any) -> str:
    """A string that is not empty."""
    return "" if isinstance(value, (str, os.PathLike)) and str(value).strip() else "a name or path"


def string(value: Any) -> str:
    """A string, which may be empty."""
    return "" if isinstance(value, str) else "a name (or '' for none)"


def prompt_count(value: Any) -> str:
    """At least one prompt: a dispatcher has nothing to fill otherwise."""
    return whole(1)(value) and "a whole number of at least 1 (for no prompts: --prompter none)"


def fraction(value: Any) -> str:
    """A share, from 0 to 1."""
    return "a number from 0 to 1" if number(least=0)(value) or value > 1 else ""


def each(rule: Rule) -> Rule:
    """One value or a list of them, one for an axis."""

    def check(value: Any) -> str:
        items = value if isinstance(value, (list, tuple)) else [value]
        wanted = next((expected for item in items if (expected := rule(item))), "")
        return wanted and f"{wanted}, or a list with one for each axis"

    return check


def intensity(value: Any) -> str:
    """How intensities come to lie in [0, 1]: by name, or as a window."""
    if isinstance(value, (list, tuple)):
        good = len(value) == 2 and not any(map(number(), value)) and value[0] < value[1]
        return "" if good else "a window of two numbers, the lower first"
    expected = one_of("percentile", "unit")(value)
    return expected and f"a window [low, high] or {expected}"


def expert(value: Any) -> str:
    """A name of the catalog, or ``timm/`` and the name of a model, or "" for none."""
    if value == "" or text(value) or str(value).startswith("timm/"):
        return "" if value == "" else text(value)
    try:
        catalog.entry(str(value))
    except ExpertError as error:
        return f"an expert, but {error}"
    return ""


def names(value: Any) -> str:
    """A list of different strings."""
    good = isinstance(value, (list, tuple)) and all(isinstance(item, str) and item for item in value)
    good = good and len(set(value)) == len(value)
    return "" if good else "a list of different names, such as \"['background','polyp']\""


def tasks(value: Any) -> str:
    """A list of tasks, as :func:`medmoe.tasks.make_tasks` takes it."""
    return "; ".join(task_problems(value))


def conditions(value: Any) -> str:
    """A list of conditions, each with a name and a kind; whether texts have an encoder is seen elsewhere."""
    return "; ".join(condition_problems(value, text_encoder="any"))


def kernels(value: Any) -> str:
    """Odd sizes of convolutions, or none."""
    good = isinstance(value, (list, tuple)) and not any(map(whole(1), value)) and all(item % 2 for item in value)
    return "" if good else "a list of odd sizes, such as [3, 5, 7], or [] for no convolutions"


def options(method: Callable[..., Any], *settings: str) -> Rule:
    """Further arguments of a method, without those that have settings of their own. The method judges the values."""
    arguments = inspect.signature(method).parameters.items()
    known = [name for name, given in arguments if given.default is not given.empty and name not in settings]

    def rule(value: Any) -> str:
        if not isinstance(value, Mapping):
            return "names and values of arguments, such as {'name': 1}, or {} for none"
        wrong = [str(name) for name in value if name not in known]
        return f"arguments out of {', '.join(known)}. {nearest(wrong[0], known)}".strip() if wrong else ""

    return rule


def channels(value: Any) -> str:
    """Three channels of the image, counted from 0."""
    good = isinstance(value, (list, tuple)) and len(value) == 3 and not any(map(whole(0), value))
    return "" if good else "three channels, counted from 0, such as [0, 1, 2]"


def span(value: Any) -> str:
    """The first and the last of a range, counted from 0."""
    good = (
        isinstance(value, (list, tuple)) and len(value) == 2 and not any(map(whole(0), value)) and value[0] <= value[1]
    )
    return "" if good else "a first and a last number, such as [4, 11]"


def axis(value: Any) -> str:
    """A size along an axis: a positive whole number, or -1 for as large as the image is."""
    return "" if value == -1 or not whole(1)(value) else "a whole number of at least 1 (or -1: as large as the image)"


RULES: Mapping[str, Rule] = {
    "seed": whole(0),
    "dataset_dir": text,
    "output_dir": text,
    "spatial_dims": one_of(2, 3),
    "in_channels": whole(1),
    "num_classes": whole(2),
    "class_names": names,
    "num_labelled": whole(0),
    "num_validation": whole(0),
    "num_test": whole(0),
    "split_seed": whole(0),
    "label_threshold": optional(number()),
    "intensity": intensity,
    "augment": one_of("flips", "none", "strong"),
    "spacing": optional(each(number(above=0))),
    "roi_size": each(axis),
    "batch_size": whole(1),
    "max_epochs": whole(1),
    "steps_per_epoch": whole(0),
    "val_interval": whole(1),
    "lr": number(above=0),
    "prompt_lr": number(above=0),
    "weight_decay": number(least=0),
    "warmup": whole(0),
    "accumulate": whole(1),
    "resume": truth,
    "num_workers": whole(0),
    **{name: optional(expert) for name in EXPERTS},
    **{f"{name}_size": optional(whole(1)) for name in EXPERTS},
    **{f"{name}_weights": optional(text) for name in EXPERTS},
    **{f"{name}_channels": optional(channels) for name in EXPERTS},
    **{f"prompt_{name}": truth for name in EXPERTS},
    **{f"{name}_lora": whole(0) for name in EXPERTS},
    **{f"{name}_lora_targets": optional(names) for name in EXPERTS},
    **{f"{name}_adaroute": whole(0) for name in EXPERTS},
    "adaroute_kernels": kernels,
    "pmoe_options": options(PMoE, "num_prompts", "dispatch", "form", "exchange", "top_k", "shared"),
    "mope_options": options(MoPE, "image_width", "num_prompts", "num_experts", "router", "psi_dropout"),
    "adaroute_options": options(AdaRoute, "rank", "kernels"),
    "fgmoe_options": options(FGMoE, "spatial_dims", "num_slices", "top_k"),
    "tasks": optional(tasks),
    "task_weighting": one_of(*WEIGHTINGS),
    "table": optional(text),
    "conditions": optional(conditions),
    "text_encoder": string,
    "shuffle_conditions": truth,
    "missing_conditions": fraction,
    "resize": optional(each(whole(1))),
    "mope_prompts": whole(1),
    "mope_experts": whole(1),
    "mope_router": one_of(*ROUTERS),
    "mope_dropout": number(least=0, below=1),
    "conditioning": one_of(*CONDITIONINGS),
    "condition_expert": whole(0),
    "decoder": one_of(*DECODERS),
    "fgmoe_slices": whole(1),
    "fgmoe_top_k": whole(1),
    "activation_checkpointing": truth,
    "router_lr": optional(number(above=0)),
    "neighbors": truth,
    "site_range": optional(span),
    "decoder_channels": whole(1),
    "cache_gib": number(least=0),
    "feature_cache_gib": number(least=0),
    "overlap": number(least=0, below=1),
    "clip": number(least=0),
    "tracking_uri": string,
    "experiment": text,
    "run_name": string,
    "prompter": one_of(*PROMPTERS),
    "num_prompts": prompt_count,
    "top_k": whole(1),
    "shared_prompts": truth,
    "dispatch": one_of(*DISPATCHES),
    "form": one_of(*FORMS),
    "exchange": one_of(*EXCHANGES),
    "fusion": one_of(*FUSIONS),
    "precision": one_of(*PRECISIONS),
    "checkpoint": optional(text),
    "input": optional(text),
    "condition_dir": optional(text),
    "overlay": truth,
    "split": one_of(*SPLITS),
}

PER_AXIS = ("roi_size", "spacing", "resize")
LISTS = ("tasks", "conditions")
"""Settings whose rules name the entry that is wrong, and what is wrong with it."""
MOST_PATCHES = 256
"""Patch tokens that a dispatcher of :class:`medmoe.moe.PMoE` sees at most."""


def problems(settings: Mapping[str, Any]) -> list[str]:
    """One line for every setting that is out of range or contradicts another; settings without a rule pass."""
    wrong = {name: rule(settings[name]) for name, rule in RULES.items() if name in settings and rule(settings[name])}
    found = [
        f"{name}: {expected}" if name in LISTS else f"{name}: found {settings[name]!r}, expected {expected}"
        for name, expected in wrong.items()
    ]
    return found + contradictions({name: value for name, value in settings.items() if name not in wrong})


def contradictions(settings: Mapping[str, Any]) -> list[str]:
    """One line for every setting that is good by itself but does not fit another."""
    found = []
    dims = settings.get("spatial_dims")
    for name in PER_AXIS:
        value = settings.get(name)
        if dims and isinstance(value, Sequence) and len(value) != dims:
            found.append(f"{name}: found {list(value)}, expected {dims} values, because spatial_dims is {dims}")
    classes, called = settings.get("num_classes"), settings.get("class_names")
    if classes and called and len(called) != classes and not settings.get("tasks"):
        found.append(
            f"class_names: found {list(called)}, expected {classes} names, because num_classes is {classes} "
            "(the background is a class and comes first)"
        )
    return found + expert_contradictions(settings) + method_contradictions(settings)


def expert_contradictions(settings: Mapping[str, Any]) -> list[str]:
    """Experts that are not there, or that do not fit the image or each other."""
    found = []
    used = used_experts(settings)
    if not used and {"general", "medical"} <= set(settings):
        found.append("general and medical: found neither, expected at least one expert")
    count = settings.get("in_channels") or 1
    for name in used:
        chosen = settings.get(f"{name}_channels")
        if chosen and max(chosen) >= count:
            found.append(f"{name}_channels: found {list(chosen)}, expected numbers below in_channels, which is {count}")
        elif count > 3 and not chosen:
            found.append(f"{name}_channels: an expert sees three of the {count} channels: say which, such as [0, 1, 2]")
        size, patch = settings.get(f"{name}_size"), patch_of(settings[name])
        if size and patch and round(size / patch) < 2:
            found.append(
                f"{name}_size: found {size}, expected at least {2 * patch}: {settings[name]} cuts images into patches "
                f"of {patch}, and a grid of one token cannot be aligned with another expert's"
            )
    return found


def used_experts(settings: Mapping[str, Any]) -> list[str]:
    """Which of the experts there are."""
    return [name for name in EXPERTS if settings.get(name)]


def patch_of(expert: str) -> int:
    """Pixels of a patch along each side, where the name of an expert's model says so; 0 otherwise."""
    if not expert.startswith("timm/"):
        entry = catalog.entry(expert)
        expert = entry.timm_model or {"tiny_vit": "patch16"}[entry.architecture]
    match = re.search(r"patch(\d+)", expert)
    return int(match[1]) if match else 0


def method_contradictions(settings: Mapping[str, Any]) -> list[str]:
    """Settings of the methods that do not go together."""
    return dispatch_contradictions(settings) + decoder_contradictions(settings) + condition_contradictions(settings)


def dispatch_contradictions(settings: Mapping[str, Any]) -> list[str]:
    """More tokens to keep than there are."""
    top_k, prompts = settings.get("top_k"), settings.get("num_prompts")
    if (settings.get("prompter"), settings.get("dispatch")) != ("pmoe", "topk") or not top_k or not prompts:
        return []
    count = len(used_experts(settings))
    extra = settings.get("mope_prompts") or 0 if settings.get("conditions") else 0
    patches = (settings.get("pmoe_options") or {}).get("max_patches", MOST_PATCHES)
    most = patches + 2 * count * prompts + extra
    if top_k <= most:
        return []
    return [
        f"top_k: found {top_k}, expected 1 to {most}, the tokens that a dispatcher can choose from at most "
        f"({patches} patches, and the prompts of {count} expert(s) with their outputs)"
    ]


def decoder_contradictions(settings: Mapping[str, Any]) -> list[str]:
    """Slices that cannot be cut, or that are fewer than those to keep."""
    slices, top_k = settings.get("fgmoe_slices"), settings.get("fgmoe_top_k")
    if settings.get("decoder") != "fgmoe" or not slices:
        return []
    found = []
    if top_k and top_k > slices:
        found.append(f"fgmoe_top_k: found {top_k}, expected 1 to {slices}, because fgmoe_slices is {slices}")
    hidden = (settings.get("fgmoe_options") or {}).get("hidden")
    if hidden is None and 4 * (settings.get("decoder_channels") or 0) % slices:
        hidden = 4 * settings["decoder_channels"]
        found.append(
            f"fgmoe_slices: found {slices}, expected a divisor of {hidden}, the hidden width (4 x decoder_channels)"
        )
    return found


def condition_contradictions(settings: Mapping[str, Any]) -> list[str]:
    """Conditions that nothing can encode, or that have no way in."""
    wanted = settings.get("conditions") or []
    if not wanted:
        return []
    found = []
    texts = [item["name"] for item in wanted if item["kind"] == "text"]
    if texts and not settings.get("text_encoder", texts):
        found.append(f"text_encoder: found none, expected a name or path for transformers: {texts[0]} is a text")
    if not any(settings.get(name) and settings.get(f"prompt_{name}", True) for name in EXPERTS):
        found.append("conditions: they enter through prompts, but no expert is prompted: set --prompt_general True")
    used, chosen = used_experts(settings), settings.get("condition_expert")
    if used and chosen is not None and chosen >= len(used):
        found.append(
            f"condition_expert: found {chosen}, expected 0 to {len(used) - 1}: the experts are {', '.join(used)}"
        )
    return found
