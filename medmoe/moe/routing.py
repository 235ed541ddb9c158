# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What the routers of all four methods share: top-k, balance, and how their weights are summed up and reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Gates(NamedTuple):
    """The weights of one router in the last forward pass, image by image.

    Attributes:
        router: the method: "pmoe", "mope", "adaroute" or "fgmoe".
        receiver: who received the result: an expert, or with FGMoE a task.
        site: the prompt site or layer, counted from 0.
        part: which of several gates of one router, such as "A", "B" and "conv3" of AdaRoute; "" where there is one.
        weights: (B, n), or (B, n, h, w[, d]) where every token has its own, on the CPU in float32.
        candidates: names of the n candidates.
    """

    router: str
    receiver: str
    site: int
    part: str
    weights: Tensor
    candidates: tuple[str, ...]


class RoutingRecord(NamedTuple):
    """How one router spread its weights in the last forward pass, over the whole batch.

    Attributes:
        expert: who received the result: an expert, or with FGMoE a task.
        site: the prompt site or layer, counted from 0.
        entropy: of the weights over their candidates, divided by its maximum: 0 is one candidate, 1 is all alike.
        usage: share of the weight that went to each candidate (pMoE: to each expert's tokens); the shares sum to 1.
        sources: pMoE only: the same by the kind of token (own prompts, foreign prompts, prompt outputs, patches).
        router: the method.
    """

    expert: str
    site: int
    entropy: float
    usage: dict[str, float]
    sources: dict[str, float]
    router: str = "pmoe"


@runtime_checkable
class Router(Protocol):
    """A module that routes and can say how. It keeps nothing unless ``recording`` is set."""

    recording: bool

    def routing(self) -> list[RoutingRecord]:
        """How it spread its weights in the last forward pass."""

    def gates(self) -> list[Gates]:
        """Its weights in the last forward pass, image by image."""


def normalized_entropy(weights: Tensor, dim: int) -> Tensor:
    """Entropy of ``weights``, which sum to 1 along ``dim``, over its maximum log(n); 0 where there is one candidate."""
    count = weights.shape[dim]
    if count < 2:
        return weights.new_zeros(weights.sum(dim).shape)
    return torch.special.entr(weights).sum(dim) / math.log(count)


def squared_variation(mass: Tensor) -> Tensor:
    """(std / mean)^2 of the mass (n,) that each candidate received: 0 is perfect balance; at most n - 1."""
    return mass.var(unbiased=False) / mass.mean().square().clamp_min(1e-12)


def distinct(names: Sequence[str]) -> list[str]:
    """The names, where one is there again with a number behind it: "vit", "vit (2)". Reports go by names."""
    found: list[str] = []
    for name in names:
        free, number = name, 2
        while free in found:
            free, number = f"{name} ({number})", number + 1
        found.append(free)
    return found


def summed_up(gates: Sequence[Gates]) -> list[RoutingRecord]:
    """A record for each (receiver, site): entropy and usage are means over images, tokens and parts."""
    groups: dict[tuple[str, str, int], list[Gates]] = {}
    for gate in gates:
        groups.setdefault((gate.router, gate.receiver, gate.site), []).append(gate)
    records = []
    for (router, receiver, site), parts in groups.items():
        entropy = sum(normalized_entropy(shares(part.weights), 1).mean().item() for part in parts) / len(parts)
        usage = torch.stack([shares(part.weights).transpose(0, 1).flatten(1).mean(1) for part in parts]).mean(0)
        named = dict(zip(parts[0].candidates, usage.tolist(), strict=True))
        records.append(RoutingRecord(receiver, site, entropy, named, {}, router))
    return records


def shares(weights: Tensor) -> Tensor:
    """Weights (B, n, ...) scaled to sum to 1 over the candidates, where top-k has taken some away."""
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-12)


def flat_metrics(records: Sequence[RoutingRecord]) -> dict[str, float]:
    """Records as metric names and values, such as ``routing/pmoe/dinov2_vits14/site03/entropy``."""
    metrics: dict[str, float] = {}
    for record in records:
        prefix = f"routing/{record.router}/{record.expert}/site{record.site:02d}"
        metrics[f"{prefix}/entropy"] = record.entropy
        usage: Mapping[str, float] = {**record.usage, **record.sources}
        metrics.update({f"{prefix}/usage/{name}": share for name, share in usage.items()})
    return metrics
