# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""pMoE: Prompting Diverse Experts Together Wins More in Visual Adaptation (Mo, Luo, Li; arXiv 2602.22938, ICLR 2025).

From the paper: an expert is a separate frozen encoder; each owns learned *expert prompt tokens* (EPTs) at every prompt
layer; a *dispatcher* at each prompt layer takes the EPTs of all experts, the prompts accumulated from the last layer
and the expert's patch tokens, and gives the prompts that enter the layer.

The paper's equations are not public in full; these are our reading, each a constructor argument:

    X_k = [ EPTs of all experts ; Zp_k ; Z_k ]                                        (M, D_k)
    S   = softmax over the M tokens of LN(X_k) W_k,   W_k (D_k, P)                    dispatch="soft"
    P_k = S^T X_k                                                                     form="soft"
    P_k = EPT_k + alpha S^T X_k,   alpha learned, from 0.1                            form="residual", our default

Zp_k are the prompt outputs of the last site, Z_k the patch tokens pooled to at most 256. With exchange="params" only
learned prompts cross between experts; with "activations" the other experts' prompt outputs do too, and in place of
those a few pooled tokens of an expert that runs without prompts. Tokens of another width pass through a learned
low-rank map. MoPE's prompts of a condition join X_k as one more group. With shared=True, an ablation that the paper's
reviewers ask for, all experts have the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.errors import ConfigError, check_settings, one_of, whole
from medmoe.moe.routing import Gates, RoutingRecord, distinct, normalized_entropy

DISPATCHES = ("soft", "gate", "group", "topk", "attention", "none")
FORMS = ("residual", "soft")
EXCHANGES = ("activations", "params")


class Stream(NamedTuple):
    """What a prompter knows of an expert.

    Attributes:
        name: for reports; see :func:`told_apart`.
        widths: token width at each prompt site.
        patch: pixels along a patch, for the initialization.
        prompted: whether the expert receives prompts.
        context: width of the tokens that it lends to the others when it runs without prompts.
    """

    name: str
    widths: tuple[int, ...]
    patch: int = 16
    prompted: bool = True
    context: int = 0


def told_apart(streams: Sequence[Stream]) -> tuple[Stream, ...]:
    """The streams, where one expert is there twice with names of their own, such as "vit" and "vit (2)"."""
    names = distinct([stream.name for stream in streams])
    return tuple(stream._replace(name=name) for stream, name in zip(streams, names, strict=True))


class State(NamedTuple):
    """What a prompter sees of an expert at a site.

    Attributes:
        patches: (B, D, h, w), the patch tokens on their grid; ``None`` for an expert that runs without prompts.
        outputs: (B, P, D'), the prompt outputs of the last site, or the context tokens of an expert without prompts.
        condition: (B, n, D), prompts that a condition makes for this expert, or ``None``.
    """

    patches: Tensor | None
    outputs: Tensor | None
    condition: Tensor | None = None


class Source(NamedTuple):
    """One group of candidate tokens (B, n, D): where from, and whether it holds one token for each prompt slot."""

    kind: str
    expert: int
    tokens: Tensor
    slotwise: bool


def pool_patches(patches: Tensor, limit: int) -> Tensor:
    """Patch tokens (B, D, h, w) averaged on a coarser grid of at most ``limit`` cells, as (B, n, D)."""
    height, width = patches.shape[-2:]
    if height * width > limit:
        shrink = math.sqrt(limit / (height * width))
        rows = max(1, min(height, int(height * shrink)))
        patches = F.adaptive_avg_pool2d(patches, (rows, max(1, min(width, limit // rows, int(width * shrink) or 1))))
    return patches.flatten(2).transpose(1, 2)


def prompt_parameter(count: int, width: int, patch: int) -> nn.Parameter:
    """Prompts (P, D), uniform in +-sqrt(6 / (3 p^2 + D)) as in VPT (Jia et al., ECCV 2022)."""
    bound = math.sqrt(6 / (3 * patch**2 + width))
    return nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))


def spread(prompts: Tensor, batch: int) -> Tensor:
    """(P, D) -> (B, P, D) without a copy."""
    return prompts.unsqueeze(0).expand(batch, -1, -1)


class Dispatcher(nn.Module):
    """Mixes candidate tokens into the P prompts of one expert at one site.

    Args:
        width: D, of this expert at this site.
        num_prompts: P.
        dispatch: "soft": softmax over all tokens for each slot; "topk": the same over the k best tokens; "gate": for
            each slot a softmax over the sources' tokens of that slot; "group": one softmax over the sources for all
            slots; "attention": single-head cross-attention with the own prompts as queries.
        form: "soft" returns the mixture, "residual" the own prompts plus alpha times the mixture.
        top_k: k of "topk".
        rank: width of queries and keys of "attention".
    """

    def __init__(
        self,
        width: int,
        num_prompts: int,
        dispatch: str = "soft",
        form: str = "residual",
        top_k: int = 4,
        rank: int = 16,
    ) -> None:
        super().__init__()
        self.dispatch, self.top_k = dispatch, top_k
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        outputs = {"soft": num_prompts, "topk": num_prompts, "gate": 1, "group": 1, "attention": rank}[dispatch]
        # Small and normal, never zero: zeros make all slots identical for ever.
        self.weight = nn.Parameter(torch.empty(width, outputs).normal_(std=0.05))
        if dispatch == "attention":
            self.query = nn.Parameter(torch.empty(width, rank).normal_(std=0.05))
        self.alpha = nn.Parameter(torch.tensor(0.1)) if form == "residual" else None

    def forward(self, sources: Sequence[Source], own: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Prompts (B, P, D); the weights (B, M or G, P); and how many of those candidates each source has."""
        if self.dispatch in ("gate", "group"):
            candidates = torch.stack([self.slots(source, own.shape[0]) for source in sources], 1)
            weights = self.weigh_slots(candidates)
            mixture = torch.einsum("bgp,bgpd->bpd", weights, candidates)
            counts = [1] * len(sources)
        else:
            tokens = torch.cat([source.tokens for source in sources], 1)
            weights = self.weigh_tokens(tokens, own)
            mixture = torch.einsum("bmp,bmd->bpd", weights, tokens)
            counts = [source.tokens.shape[1] for source in sources]
        prompts = mixture if self.alpha is None else own + self.alpha * mixture
        return prompts, weights, counts

    def slots(self, source: Source, count: int) -> Tensor:
        """A source as one token for each slot, (B, P, D): its own, or its mean where it has none."""
        if source.slotwise:
            return source.tokens
        return source.tokens.mean(1, keepdim=True).expand(-1, count, -1)

    def weigh_slots(self, candidates: Tensor) -> Tensor:
        """Weights (B, G, P) of G candidates (B, G, P, D) for each slot; "group" gives all slots the same."""
        if self.dispatch == "group":
            logits = (self.norm(candidates.mean(2)) @ self.weight).expand(-1, -1, candidates.shape[2])
        else:
            logits = (self.norm(candidates) @ self.weight).squeeze(-1)
        return logits.softmax(1)

    def weigh_tokens(self, tokens: Tensor, own: Tensor) -> Tensor:
        """Weights (B, M, P) of the tokens (B, M, D) for each slot."""
        logits = self.norm(tokens) @ self.weight
        if self.dispatch == "attention":
            logits = logits @ (self.norm(own) @ self.query).T / math.sqrt(self.query.shape[1])
        if self.dispatch == "topk":
            k = min(self.top_k, logits.shape[1])
            bar = logits.topk(k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < bar, -math.inf)
        return logits.softmax(1)


class PMoE(nn.Module):
    """The prompts of all experts at all sites, and the dispatchers that mix them.

    Args:
        streams: the experts, in the network's order.
        num_prompts: P, prompts of each expert at each site.
        dispatch: see :class:`Dispatcher`; "none" is VPT-deep in every prompted expert.
        form: "residual" or "soft".
        exchange: "activations" or "params".
        top_k: tokens kept by dispatch="topk".
        rank: of the maps between experts of different width.
        max_patches: an expert's patch tokens are pooled to at most this many.
        shared: all experts have the prompts of the first one, in their own width through a learned low-rank map where
            that differs, in place of prompts of their own.

    Raises:
        ConfigError: for an unknown dispatch, form or exchange, numbers that are not whole or below 1, or when no expert
            is prompted.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        num_prompts: int = 10,
        dispatch: str = "soft",
        form: str = "residual",
        exchange: str = "activations",
        top_k: int = 4,
        rank: int = 16,
        max_patches: int = 256,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.dispatch = one_of("dispatch", dispatch, DISPATCHES)
        self.exchange = one_of("exchange", exchange, EXCHANGES)
        one_of("form", form, FORMS)
        counts = {"num_prompts": num_prompts, "top_k": top_k, "rank": rank, "max_patches": max_patches}
        check_settings({name: (value, whole(1)) for name, value in counts.items()})
        if not any(stream.prompted for stream in streams):
            raise ConfigError("no expert is prompted: prompt at least one, or leave the prompter out")
        self.streams, self.max_patches = told_apart(streams), max_patches
        self.owner = next(k for k, stream in enumerate(streams) if stream.prompted) if shared else None
        self.recording = False
        self.last: dict[tuple[int, int], tuple[Tensor, list[int], list[tuple[str, int]]]] = {}
        self.prompts: Any = nn.ModuleList(
            nn.ParameterList(
                [prompt_parameter(num_prompts, width, s.patch) for width in s.widths if s.prompted and self.gives(k)]
            )
            for k, s in enumerate(streams)
        )
        mixes = dispatch != "none"
        self.dispatchers: Any = nn.ModuleList(
            nn.ModuleList(
                [Dispatcher(width, num_prompts, dispatch, form, top_k) for width in s.widths if s.prompted and mixes]
            )
            for s in streams
        )
        self.maps = nn.ModuleDict()
        self.add_maps(rank)

    def gives(self, k: int) -> bool:
        """Whether expert ``k`` has prompts of its own."""
        return self.owner is None or k == self.owner

    def own_prompts(self, k: int, site: int) -> Tensor:
        """The expert prompt tokens (P, D) of expert ``k``."""
        owner = k if self.owner is None else self.owner
        return self.carry(self.prompts[owner][site], owner, k, self.streams[k].widths[site])

    @property
    def needs_outputs(self) -> bool:
        """Whether prompt outputs are read at the next site."""
        return self.dispatch != "none"

    def add_maps(self, rank: int) -> None:
        """A low-rank map for each pair of experts and widths between which tokens pass at some site."""
        for k, receiver in enumerate(self.streams):
            for site, width in enumerate(receiver.widths if receiver.prompted else ()):
                for j, giver in enumerate(self.streams):
                    for foreign in self.arriving_widths(j, k, site, giver) - {width}:
                        first, second = nn.Linear(foreign, rank, bias=False), nn.Linear(rank, width, bias=False)
                        nn.init.normal_(first.weight, std=foreign**-0.5)
                        nn.init.normal_(second.weight, std=rank**-0.5)
                        self.maps[self.map_name(j, k, foreign, width)] = nn.Sequential(first, second)

    def arriving_widths(self, j: int, k: int, site: int, giver: Stream) -> set[int]:
        """Widths of the tokens that expert ``j`` gives to expert ``k`` at ``site``: its prompts, outputs or context."""
        mixes = self.dispatch != "none"
        exchanged = mixes and (j == k or self.exchange == "activations")
        if not giver.prompted:
            return {giver.context} if exchanged else set()
        prompts = {giver.widths[site]} if self.gives(j) and (mixes or self.owner is not None) else set()
        return prompts | ({giver.widths[site - 1]} if exchanged and site else set())

    @staticmethod
    def map_name(giver: int, receiver: int, foreign: int, width: int) -> str:
        return f"{giver}_{foreign}_to_{receiver}_{width}"

    def carry(self, tokens: Tensor, giver: int, receiver: int, width: int) -> Tensor:
        """Tokens (..., D') of ``giver`` in the width of ``receiver``."""
        foreign = tokens.shape[-1]
        return tokens if foreign == width else self.maps[self.map_name(giver, receiver, foreign, width)](tokens)

    def forward(self, site: int, states: Sequence[State]) -> list[Tensor | None]:
        """The prompts that enter site ``site``.

        Args:
            site: counted from 0.
            states: of each expert.

        Returns:
            for each expert (B, P, D), (P, D) with dispatch="none", or ``None`` where it is not prompted.
        """
        return [self.dispatched(k, site, states) if s.prompted else None for k, s in enumerate(self.streams)]

    def dispatched(self, k: int, site: int, states: Sequence[State]) -> Tensor:
        """The prompts of expert ``k`` at ``site``."""
        own = self.own_prompts(k, site)
        if self.dispatch == "none":
            return own
        sources = self.sources(k, site, states)
        prompts, weights, counts = self.dispatchers[k][site](sources, own)
        if self.recording:
            labels = [(source.kind, source.expert) for source in sources]
            self.last[k, site] = (weights.detach().float(), counts, labels)
        return prompts

    def sources(self, k: int, site: int, states: Sequence[State]) -> list[Source]:
        """The candidate tokens of expert ``k``, by group: X_k."""
        width = self.streams[k].widths[site]
        patches = states[k].patches
        assert patches is not None  # a prompted expert always has patches
        own = self.own_prompts(k, site)
        batch, slots = patches.shape[0], own.shape[0]
        groups = []
        for j, giver in enumerate(self.streams):
            if j == k:
                groups.append(Source("own prompts", k, spread(own, batch), True))
            elif giver.prompted and self.owner is None:
                prompts = self.carry(self.prompts[j][site], j, k, width)
                groups.append(Source("foreign prompts", j, spread(prompts, batch), True))
        for j in range(len(self.streams)):
            outputs = states[j].outputs
            if outputs is not None and (j == k or self.exchange == "activations"):
                outputs = self.carry(outputs, j, k, width)
                kind = "own outputs" if j == k else "foreign outputs"
                groups.append(Source(kind, j, outputs, outputs.shape[1] == slots and self.streams[j].prompted))
        groups.append(Source("patches", k, pool_patches(patches, self.max_patches), False))
        condition = states[k].condition
        if condition is not None:
            groups.append(Source("condition", k, condition, False))
        return groups

    def routing(self) -> list[RoutingRecord]:
        """How each dispatcher spread its weights in the last forward pass; empty unless :attr:`recording` is set."""
        records = []
        for k, site in sorted(self.last):
            weights, counts, labels = self.last[k, site]
            entropy = normalized_entropy(weights, 1).mean().item()
            usage = {stream.name: 0.0 for stream in self.streams}
            sources: dict[str, float] = {}
            for (kind, expert), part in zip(labels, group_shares(weights, counts).mean(0).tolist(), strict=True):
                usage[self.streams[expert].name] += part
                sources[kind] = sources.get(kind, 0.0) + part
            records.append(RoutingRecord(self.streams[k].name, site, entropy, usage, sources))
        return records

    def gates(self) -> list[Gates]:
        """The share of each group of tokens in the prompts of each expert and site, image by image."""
        found = []
        for k, site in sorted(self.last):
            weights, counts, labels = self.last[k, site]
            names = tuple(
                kind.replace("foreign ", "") + f" of {self.streams[j].name}" if j != k else kind for kind, j in labels
            )
            found.append(Gates("pmoe", self.streams[k].name, site, "", group_shares(weights, counts).cpu(), names))
        return found


def group_shares(weights: Tensor, counts: Sequence[int]) -> Tensor:
    """Weights (B, M, P) summed over the tokens of each of G groups and averaged over the slots, (B, G)."""
    return torch.stack([group.sum(1).mean(1) for group in weights.split(list(counts), 1)], 1)
