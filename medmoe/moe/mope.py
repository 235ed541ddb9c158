# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""MoPE: Parameter-Efficient and Scalable Multimodal Fusion via Mixture of Prompt Experts.

Jiang, Liu, Chen; arXiv 2403.10568. The authors' code has no license: it is compared with, but none of it is here.

What else is known of a case, its *condition*, is encoded first, as psi. At each prompt site psi and the image choose
among k learned *prompt experts*, and psi itself becomes one more prompt:

    q   = [ A pool(patches) ; B psi ]               the query; A, B learned for each site, 2 + 8 numbers
    r   = softmax( q K / tau + noise )              K a frozen orthogonal key for each site; noise in training only
    P_d = sum_j r_j E_j,   E_j (l, D)               the dynamic prompt
    P_m = mapper(psi)                               the mapped prompt, one token
    Imp = sum over the batch of r, without noise
    L   = (std(Imp) / mean(Imp))^2, 0 up to gamma   the importance loss; its weighted mean over all sites is added

The paper's static prompt is the expert's own expert prompt token of pMoE or VPT: there is no second one here. As the
paper has it, every parameter trains by the task's loss; nothing is detached.

Our reading, where the paper says nothing or the public code has a hierarchical, text-only special case:
* the encoder of tables, texts and images (:class:`ConditionEncoder`), its null vectors and the modality dropout;
* the paper's encoder of texts, E_y, is itself tuned by prompts and gives the CLS token; here it is frozen, and what it
  says of a text is the mean over its tokens, of which a linear layer trains (:class:`EmbeddingGroup`);
* all prompt sites route, and each replaces the prompts of the last;
* the pooled patches are normalized, without parameters: tokens of frozen encoders differ in scale by orders of
  magnitude from layer to layer, and at tau = 0.1 the softmax would be saturated from the start;
* with router="condition" or "image" the one input has the whole query, so that ablations compare inputs, not sizes;
* the mapper has LayerNorm where the code has BatchNorm, which needs more than one image and mixes the samples; it has
  a last layer for each width of each expert, since the tokens of two encoders have nothing in common.

Parameters, static prompt included, for widths D_i, psi of width c, query q = a + b, mapper width h:
sum_i [ (k + 1) l D_i + a (D_i + 1) + b (c + 1) ] + h (c + 1) + 2 h + sum_widths (h + 1) D. A ViT-B with c = 768 and
h = 384 has 0.96 M with k = 4, 1.18 M with k = 8, 1.62 M with k = 16. The encoder of the condition is not in these.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.conditions import Schema
from medmoe.errors import ConfigError, check_settings, number, one_of, whole
from medmoe.moe.pmoe import Stream, prompt_parameter, told_apart
from medmoe.moe.routing import Gates, RoutingRecord, squared_variation, summed_up

ROUTERS = ("multimodal", "condition", "image")
IMPORTANCES = ("clean", "noisy")

logger = logging.getLogger(__name__)


def two_widths(value: object) -> str:
    """The rule for ``query_widths``."""
    good = isinstance(value, list | tuple) and len(value) == 2 and not any(map(whole(1), value))
    return "" if good else "two whole numbers of at least 1, such as [2, 8]"


class NumberGroup(nn.Module):
    """Numbers (B, F), NaN = missing, and their missing mask through an MLP."""

    key, dims = "numbers", 2

    def __init__(self, count: int, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.count = count
        self.inner, self.outer = nn.Linear(2 * count, hidden), nn.Linear(hidden, width)
        # A number that was never missing in training then stands at its mean, rather than moved by untrained weights.
        nn.init.zeros_(self.inner.weight[:, count:])

    def missing(self, values: Tensor) -> Tensor:
        return values.isnan()

    def forward(self, values: Tensor, missing: Tensor) -> Tensor:
        filled = values.masked_fill(missing, 0).to(self.inner.weight.dtype)
        return self.outer(F.gelu(self.inner(torch.cat([filled, missing.to(filled.dtype)], 1))))


class CategoryGroup(nn.Module):
    """Categories (B, G) as the sum of an embedding each; index 0 = missing or never seen in training."""

    key, dims = "categories", 2

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.count = len(sizes)
        embeddings = [nn.Embedding(size + 1, width) for size in sizes]
        for embedding in embeddings:
            nn.init.zeros_(embedding.weight[0])  # as above: neutral until training shows it
        self.embeddings = nn.ModuleList(embeddings)

    def missing(self, values: Tensor) -> Tensor:
        return values == 0

    def forward(self, values: Tensor, missing: Tensor) -> Tensor:
        embedded = [embed(index) for embed, index in zip(self.embeddings, values.unbind(1), strict=True)]
        return torch.stack(embedded).sum(0)


class EmbeddingGroup(nn.Module):
    """Embeddings of a frozen encoder (B, T, E), NaN row = missing: normalized, with missing mask, one linear layer.

    Without the normalization the encoder's scale would decide how much this group counts.
    """

    dims = 3

    def __init__(self, key: str, count: int, embedding_width: int, width: int) -> None:
        super().__init__()
        self.key, self.count = key, count
        self.linear = nn.Linear(count * (embedding_width + 1), width)
        nn.init.zeros_(self.linear.weight[:, embedding_width :: embedding_width + 1])

    def missing(self, values: Tensor) -> Tensor:
        return values.isnan().any(-1)

    def forward(self, values: Tensor, missing: Tensor) -> Tensor:
        filled = values.masked_fill(missing[..., None], 0).to(self.linear.weight.dtype)
        filled = F.layer_norm(filled, filled.shape[-1:])
        return self.linear(torch.cat([filled, missing[..., None].to(filled.dtype)], -1).flatten(1))


class ConditionEncoder(nn.Module):
    """The condition of each case as a vector psi (our reading; the paper has a text encoder here).

    Columns of one kind are a group: numbers, categories, texts, image. Each group is projected to psi's width; where
    all of a group is missing, or dropped, a learned null vector takes its place. psi is the normalized sum. No
    condition at all is a condition of which everything is missing.

    Args:
        schema: the conditions.
        width: of psi.
        image_width: of the pooled features of the second modality; needed where the schema has an image.
        dropout: probability in [0, 1) that training drops the whole condition of a sample, so that a missing condition
            is nothing new to the network.
        group_dropout: probability in [0, 1) that it drops a group, for each group by itself where there are several.

    Raises:
        ConfigError: where the schema has no columns, a width is missing, or ``dropout`` is out of range.
    """

    def __init__(
        self, schema: Schema, width: int, image_width: int = 0, dropout: float = 0.3, group_dropout: float = 0.1
    ) -> None:
        super().__init__()
        numbers, categories, texts, images = (schema.of_kind(kind) for kind in ("number", "category", "text", "image"))
        if not schema.columns:
            raise ConfigError("conditions=[]: MoPE needs at least one condition; name columns, or leave it out")
        check_settings(
            {
                "psi_width": (width, whole(1)),
                "psi_dropout": (dropout, number(least=0, below=1)),
                "group_dropout": (group_dropout, number(least=0, below=1)),
                "text_width": (schema.text_width, whole(1, why="for text conditions") if texts else whole(0)),
                "image_width": (image_width, whole(1, why="for an image condition") if images else whole(0)),
            }
        )
        self.width, self.dropout = width, dropout
        groups: list[NumberGroup | CategoryGroup | EmbeddingGroup] = []
        if numbers:
            groups.append(NumberGroup(len(numbers), width))
        if categories:
            groups.append(CategoryGroup([len(column.values) for column in categories], width))
        if texts:
            groups.append(EmbeddingGroup("text", len(texts), schema.text_width, width))
        if images:
            groups.append(EmbeddingGroup("image_features", 1, image_width, width))
        self.groups: Any = nn.ModuleList(groups)
        self.group_dropout = group_dropout if len(groups) > 1 else 0.0
        self.nulls = nn.Parameter(torch.randn(len(groups), width))
        self.norm = nn.LayerNorm(width)

    def forward(self, condition: Mapping[str, Tensor] | None, batch: int) -> Tensor:
        """psi of each image.

        Args:
            condition: "numbers" (B, F) and "categories" (B, G), "text" (B, T, E), "image_features" (B, E'), as
                :mod:`medmoe.conditions` has them; other entries are not read, and a group whose entry is absent is
                missing. Of batch 1 it is the same for all images.
            batch: number of images.

        Returns:
            (batch, width).

        Raises:
            ConfigError: where an entry has another batch or number of columns.
        """
        condition = condition or {}
        total = self.nulls.new_zeros(batch, self.width)
        dropped = self.drawn(batch, self.dropout)
        for group, null in zip(self.groups, self.nulls, strict=True):
            values = condition.get(group.key)
            total = total + (null if values is None else self.projected(group, null, values, dropped))
        return self.norm(total)

    def drawn(self, batch: int, probability: float) -> Tensor:
        """Which of the samples (batch,) training drops; none otherwise."""
        return torch.rand(batch, device=self.nulls.device) < probability * self.training

    def projected(self, group: Any, null: Tensor, values: Tensor, dropped: Tensor) -> Tensor:
        """A group's part of psi, (B, width): its projection, or its null where it is missing or dropped."""
        batch = len(dropped)
        values = values.unsqueeze(1) if values.dim() < group.dims else values
        if values.shape[0] not in (1, batch) or values.shape[1] != group.count:
            raise ConfigError(
                f"condition {group.key!r} has {values.shape[0]} row(s) of {values.shape[1]} column(s): expected "
                f"{batch} (or 1) of {group.count}, for {batch} image(s) and the columns that the network was built for"
            )
        missing = group.missing(values)
        absent = missing.all(1) | dropped | self.drawn(batch, self.group_dropout)
        return torch.where(absent[:, None], null, group(values, missing))


class PromptExperts(nn.Module):
    """The prompt experts of one expert at one site, and their router.

    The key is orthogonal: columns of unit length at right angles with up to as many prompt experts as the query has
    numbers, rows with more.
    """

    key: Tensor

    def __init__(
        self,
        width: int,
        patch: int,
        psi_width: int,
        num_prompts: int,
        num_experts: int,
        query_widths: tuple[int, int],
        router: str,
        frozen_keys: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        prompts = prompt_parameter(num_experts * num_prompts, width, patch)
        self.prompts = nn.Parameter(prompts.detach().view(num_experts, num_prompts, width))
        query = sum(query_widths)
        of_image, of_condition = {"multimodal": query_widths, "image": (query, 0), "condition": (0, query)}[router]
        self.image_query = nn.Linear(width, of_image) if of_image else None
        self.condition_query = nn.Linear(psi_width, of_condition) if of_condition else None
        key = nn.init.orthogonal_(torch.empty(query, num_experts), generator=generator)
        if frozen_keys:
            self.register_buffer("key", key)
        else:
            self.key = nn.Parameter(key)

    def logits(self, patches: Tensor, psi: Tensor) -> Tensor:
        """q K (B, k) of patch tokens (B, D, h, w) and psi (B, c)."""
        query = []
        # In full precision: divided by tau, what bfloat16 rounds off would choose between prompt experts.
        with torch.autocast(psi.device.type, enabled=False):
            if self.image_query is not None:
                pooled = patches.to(self.key.dtype).mean((2, 3))
                query.append(self.image_query(F.layer_norm(pooled, pooled.shape[1:])))
            if self.condition_query is not None:
                query.append(self.condition_query(psi.to(self.key.dtype)))
            return torch.cat(query, 1) @ self.key


class MoPE(nn.Module):
    """The prompts that the condition and the image choose, for all experts and sites.

    The importance loss compares what each prompt expert received from the batch, so that it needs at least k samples
    in a batch to mean something (with fewer, a warning is logged once), and in distributed training compares within
    each process only.

    Args:
        streams: the experts, in the network's order.
        schema: the conditions.
        image_width: see :class:`ConditionEncoder`.
        num_prompts: l, tokens of the dynamic prompt, 1 or more.
        num_experts: k, prompt experts, 1 or more: 4 as in the code, 16 as in the first preprint.
        temperature: tau, above 0.
        noise: standard deviation of the noise on the logits, after the temperature; 0 or more.
        noise_at_eval: keep the noise outside training, as the code does (likely a mistake there).
        importance_weight: lambda, of the importance loss; 0 or more.
        importance_threshold: gamma, 0 or more: 0.1 as in the code, 0.05 as in the first preprint.
        importance_on: the importance of "clean" weights, as the paper defines it, or of "noisy" ones as in the code.
        router: what it sees: "multimodal", "condition" (the first preprint) or "image".
        frozen_keys: whether the keys stay as they are drawn.
        dynamic: whether there is a dynamic prompt; without it nothing routes.
        mapped: whether there is a mapped prompt.
        psi_width: c, of psi; 768 is that of the paper's text encoder.
        psi_dropout: modality dropout of the whole condition; see :class:`ConditionEncoder`.
        group_dropout: of one group of it.
        query_widths: a and b, how many numbers of the query come from the image and from the condition.
        mapper_width: h, of the mapper's hidden layer.
        seed: of the keys.

    Raises:
        ConfigError: for values out of range, without conditions, without a dynamic and a mapped prompt, or when no
            expert is prompted.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        schema: Schema,
        image_width: int = 0,
        num_prompts: int = 6,
        num_experts: int = 4,
        temperature: float = 0.1,
        noise: float = 1 / 256,
        noise_at_eval: bool = False,
        importance_weight: float = 0.01,
        importance_threshold: float = 0.1,
        importance_on: str = "clean",
        router: str = "multimodal",
        frozen_keys: bool = True,
        dynamic: bool = True,
        mapped: bool = True,
        psi_width: int = 768,
        psi_dropout: float = 0.3,
        group_dropout: float = 0.1,
        query_widths: tuple[int, int] = (2, 8),
        mapper_width: int = 384,
        seed: int = 0,
    ) -> None:
        super().__init__()
        one_of("router", router, ROUTERS)
        self.importance_on = one_of("importance_on", importance_on, IMPORTANCES)
        counts = {"num_prompts": num_prompts, "num_experts": num_experts, "mapper_width": mapper_width}
        sizes = {"noise": noise, "importance_weight": importance_weight, "importance_threshold": importance_threshold}
        check_settings(
            {name: (value, whole(1)) for name, value in counts.items()}
            | {name: (value, number(least=0)) for name, value in sizes.items()}
            | {"temperature": (temperature, number(above=0)), "query_widths": (query_widths, two_widths)}
        )
        if not (dynamic or mapped):
            raise ConfigError("dynamic=False and mapped=False: MoPE gives no prompt; set one of them, or leave it out")
        if not any(stream.prompted for stream in streams):
            raise ConfigError("no expert is prompted: prompt at least one, or leave MoPE out")
        self.streams, self.schema = told_apart(streams), schema
        self.num_experts, self.dynamic, self.mapped = num_experts, dynamic, mapped
        self.temperature, self.noise, self.noise_at_eval = temperature, noise, noise_at_eval
        self.importance_weight, self.importance_threshold = importance_weight, importance_threshold
        self.num_tokens = num_prompts * dynamic + mapped
        self.recording = self.warned = False
        self.last: dict[tuple[int, int], Tensor] = {}
        self.encoder = ConditionEncoder(schema, psi_width, image_width, psi_dropout, group_dropout)
        generator = torch.Generator().manual_seed(seed)
        widths = [stream.widths if stream.prompted else () for stream in streams]
        if dynamic:
            shape = (psi_width, num_prompts, num_experts, query_widths, router, frozen_keys, generator)
            self.sites: Any = nn.ModuleList(
                nn.ModuleList([PromptExperts(width, stream.patch, *shape) for width in own])
                for stream, own in zip(streams, widths, strict=True)
            )
        if mapped:
            self.mapper = nn.Sequential(nn.Linear(psi_width, mapper_width), nn.LayerNorm(mapper_width), nn.GELU())
            self.heads: Any = nn.ModuleList(
                nn.ModuleDict({str(width): nn.Linear(mapper_width, width) for width in sorted(set(own))})
                for own in widths
            )

    def encode(self, condition: Mapping[str, Tensor] | None, batch: int) -> Tensor:
        """psi (batch, c) of a condition; once for each pass of the network. See :meth:`ConditionEncoder.forward`."""
        routes = self.dynamic and self.importance_weight > 0
        if self.training and routes and batch < self.num_experts and not self.warned:
            self.warned = True
            logger.warning(
                "the importance loss of MoPE compares %d prompt experts over a batch of %d: use a batch as large, "
                "fewer num_experts, or importance_weight=0",
                self.num_experts,
                batch,
            )
        return self.encoder(condition, batch)

    def forward(self, k: int, site: int, patches: Tensor, psi: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompts that the condition and the image give to expert ``k`` at ``site``.

        It keeps nothing that a loss depends on, so that it may be computed again under activation checkpointing.

        Args:
            k: of a prompted expert.
            site: counted from 0.
            patches: (B, D, h, w), its patch tokens on their grid.
            psi: (B, c), of :meth:`encode`, a row for each image or slice.

        Returns:
            prompts (B, num_tokens, D), the dynamic ones first; and the weights (B, num_experts), which sum to 1, for
            :meth:`importance_loss`, or ``None`` without a dynamic prompt.
        """
        prompts, weights = [], None
        if self.dynamic:
            experts = self.sites[k][site]
            logits = experts.logits(patches, psi) / self.temperature
            weights = mixed = logits.softmax(1)
            if self.noise and (self.training or self.noise_at_eval):
                mixed = (logits + self.noise * torch.randn_like(logits)).softmax(1)
            prompts.append(torch.einsum("bk,kld->bld", mixed, experts.prompts))
            weights = mixed if self.importance_on == "noisy" else weights
            if self.recording:
                self.last[k, site] = mixed.detach().float()
        if self.mapped:
            prompts.append(self.heads[k][str(patches.shape[1])](self.mapper(psi)).unsqueeze(1))
        return torch.cat(prompts, 1), weights

    def importance_loss(self, weights: Sequence[Tensor]) -> Tensor:
        """lambda times the mean over all experts and sites of the importance loss.

        Args:
            weights: (B, num_experts) of each expert and site, as :meth:`forward` gave them.

        Returns:
            a scalar, 0 or more, and without gradient from where the loss is not above gamma.
        """
        if not weights:
            return self.encoder.nulls.new_zeros(())
        losses = torch.stack([squared_variation(each.sum(0)) for each in weights])
        return self.importance_weight * losses.masked_fill(losses <= self.importance_threshold, 0).mean()

    def gates(self) -> list[Gates]:
        """The weights of the last forward pass; empty unless :attr:`recording` is set."""
        names = tuple(f"prompt expert {j + 1}" for j in range(self.num_experts))
        return [
            Gates("mope", self.streams[k].name, site, "", self.last[k, site].cpu(), names)
            for k, site in sorted(self.last)
        ]

    def routing(self) -> list[RoutingRecord]:
        """How each router spread its weights in the last forward pass; empty unless :attr:`recording` is set."""
        return summed_up(self.gates())
