# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What the routers of all four methods share: how their weights are kept, summed up and reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class RoutingRecord(NamedTuple):
    """How one router spread its weights in the last forward pass.

    Attributes:
        expert: the expert that received the result.
        site: the prompt site, counted from 0.
        entropy: of the weights over their candidates, divided by its maximum: 0 is one candidate, 1 is all alike.
        usage: share of the weight that went to each expert's tokens; the shares sum to 1.
        sources: the same by the kind of token (own prompts, foreign prompts, prompt outputs, patches).
    """

    expert: str
    site: int
    entropy: float
    usage: dict[str, float]
    sources: dict[str, float]


def normalized_entropy(weights: Tensor, dim: int) -> Tensor:
    """Entropy of ``weights``, which sum to 1 along ``dim``, over its maximum log(n); 0 where there is one candidate."""
    count = weights.shape[dim]
    if count < 2:
        return weights.new_zeros(weights.sum(dim).shape)
    return torch.special.entr(weights).sum(dim) / math.log(count)


def flat_metrics(records: list[RoutingRecord]) -> dict[str, float]:
    """Records as metric names and values, such as ``routing/dinov2_vits14/site03/entropy``."""
    metrics: dict[str, float] = {}
    for record in records:
        prefix = f"routing/{record.expert}/site{record.site:02d}"
        metrics[f"{prefix}/entropy"] = record.entropy
        shares: Mapping[str, float] = {**record.usage, **record.sources}
        metrics.update({f"{prefix}/usage/{name}": share for name, share in shares.items()})
    return metrics
