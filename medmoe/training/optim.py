# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""AdamW with a group for each part of the network, gradient clipping, and a schedule of warm-up and cosine."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medmoe.errors import ConfigError, MedMoEError

PARTS = {
    "prompter": "prompts",
    "conditioner": "conditions",
    "experts": "adapters",
    "decoder": "decoder",
    "image_head": "decoder",
    "log_variances": "tasks",
}
ROUTERS = re.compile(
    r"(^|\.)(dispatchers|routers?|gates?|image_query|condition_query)\.|^conditioner\..*\.key$|\.sharpness$"
)
"""Names of parameters that decide about routes: pMoE's dispatchers, MoPE's queries and learned keys, AdaRoute's learned
temperatures, and whatever lies below a module that is called so."""
VECTORS = re.compile(r"(^|\.)(nulls|embeddings?)(\.|$)")
"""Names of parameters that stack vectors of their own, of conditions and tasks: no matrices to be decayed."""


def part_of(name: str) -> str:
    """The part of the network that parameter ``name`` belongs to: prompts, conditions, adapters, decoder, tasks."""
    return PARTS.get(name.split(".", 1)[0], "other")


def is_router(name: str) -> bool:
    """Whether parameter ``name`` decides about routes."""
    return ROUTERS.search(name) is not None


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """Trainable parameters by part, then ``trainable`` and ``total``."""
    counts: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    counts["trainable"] = sum(counts.values())
    counts["total"] = sum(parameter.numel() for parameter in network.parameters())
    return counts


def parameter_groups(
    network: nn.Module, lr: float, prompt_lr: float, weight_decay: float, router_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer: prompts undecayed at ``prompt_lr``; the rest at ``lr``, matrices and kernels decayed.

    Embeddings are not decayed: most steps do not see a rare category, but would shrink it.

    With ``router_lr``, what routes has groups of its own at that rate, decayed or not as without it.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        prompts = part == "prompts" or (part == "conditions" and "prompts" in name.split("."))
        decayed = parameter.ndim >= 2 and not prompts and VECTORS.search(name) is None
        decay = weight_decay if decayed else 0.0
        key = part if decay or part == "prompts" else f"{part}_prompts" if prompts else f"{part}_undecayed"
        rate = prompt_lr if prompts else lr
        if router_lr is not None and is_router(name):
            key, rate = f"{key}_routers", router_lr
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def optimizer(
    network: nn.Module,
    lr: float = 1e-3,
    prompt_lr: float = 1e-2,
    weight_decay: float = 0.01,
    clip: float = 5.0,
    router_lr: float | None = None,
) -> AdamW:
    """AdamW over what trains in ``network``; gradients are clipped right before every step.

    Args:
        network: with parameters below ``prompter.``, ``conditioner.``, ``experts.`` and ``decoder.``.
        lr: learning rate of adapters, decoder, heads and condition encoder, above 0.
        prompt_lr: learning rate of the prompter and of prompts that conditions choose, above 0.
        weight_decay: of matrices and kernels that are neither prompts nor in the prompter; biases, norms, scalars,
            embeddings and null vectors have none.
        clip: largest norm of all gradients together; 0 does not clip.
        router_lr: learning rate of what routes, above 0, see :func:`is_router`; ``None`` for that of its part.

    Raises:
        ConfigError: where nothing trains, or a rate is out of range.
    """
    if min(lr, prompt_lr) <= 0 or min(weight_decay, clip) < 0:
        raise ConfigError(
            f"lr ({lr}) and prompt_lr ({prompt_lr}) must be above 0, "
            f"weight_decay ({weight_decay}) and clip ({clip}) at least 0"
        )
    if router_lr is not None and router_lr <= 0:
        raise ConfigError(f"router_lr is {router_lr}: expected a rate above 0, or null for that of each router's part")
    groups = parameter_groups(network, lr, prompt_lr, weight_decay, router_lr)
    if not groups:
        raise ConfigError("nothing in the network trains: no parameter requires a gradient")
    result = AdamW(groups, lr=lr, weight_decay=weight_decay)
    result.register_step_pre_hook(lambda optimizer, args, kwargs: check_and_clip(optimizer, clip))
    return result


def check_and_clip(optimizer: Optimizer, clip: float) -> None:
    """Scales the gradients down to norm ``clip``; one that is not finite is an error before it reaches the weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    if not torch.isfinite(norm):
        raise MedMoEError(
            f"the gradient became {norm.item()}; the weights were left as they were before this step. "
            "Lower --lr and --prompt_lr, or look for extreme intensities in the images."
        )


def schedule(optimizer: Optimizer, warmup: int, total: int) -> LambdaLR:
    """Linear warm-up, then a cosine down to nearly 0; it moves on by itself after every optimizer step.

    Args:
        optimizer: whose groups' learning rates are the peaks.
        warmup: optimizer steps below the peak, 0 to total - 1.
        total: optimizer steps of the whole training, at least 1.

    Raises:
        ConfigError: where warm-up does not end before the training.
    """
    if total < 1 or not 0 <= warmup < total:
        raise ConfigError(f"warmup ({warmup}) must be at least 0 and below the number of training steps ({total})")

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (total - warmup))))

    scheduler = LambdaLR(optimizer, factor)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: scheduler.step())
    return scheduler
