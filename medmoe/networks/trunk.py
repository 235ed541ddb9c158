# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Frozen experts side by side, with what is trained between them (prompts) and inside them (adapters)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmoe.conditions import Schema
from medmoe.errors import ConfigError, one_of
from medmoe.experts.base import Expert, Tokens
from medmoe.moe.pmoe import PMoE, State, Stream
from medmoe.moe.routing import distinct
from medmoe.networks.cache import FeatureCache, stack_maps
from medmoe.networks.precision import autocast

CONTEXT_SIDE = 4
CONDITION_CACHE_BYTES = 2**26
CONDITIONINGS = ("dispatched", "appended")

if TYPE_CHECKING:
    from medmoe.moe.mope import MoPE

Condition = Mapping[str, Tensor] | None


class Adapter(Protocol):
    """Anything that puts trainable parts into a frozen expert."""

    def attach(self, expert: nn.Module) -> bool: ...


def site_layers(depth: int, sites: int) -> list[range]:
    """The layers of an expert at each site: ``depth`` layers in ``sites`` runs of as equal length as can be."""
    return [range(s * depth // sites, (s + 1) * depth // sites) for s in range(sites)]


def one_each(name: str, values: object, count: int) -> list[object]:
    """``values`` as a list with one entry an expert; a single value counts for all."""
    each = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(each) != count:
        raise ConfigError(f"{name} has {len(each)} entries for {count} experts: give one value, or one for each expert")
    return each


def check_grid(expert: Expert) -> None:
    """Refuses an expert whose view is one patch: a single token has no grid that could be laid over another's."""
    size = getattr(expert, "image_size", None)
    if size is not None and round(size / expert.patch) < 2:
        raise ConfigError(
            f"{expert.name or 'an expert'} sees images at {size} pixels in patches of {expert.patch}: its grid of one "
            f"token cannot be aligned with another expert's. Expected a size of at least {2 * expert.patch}"
        )


def attach(adapters: Any, expert: Expert) -> bool:
    """Puts one adapter, or several, into ``expert``; says whether anything now trains."""
    chosen: list[Adapter | None] = list(adapters) if isinstance(adapters, list | tuple) else [adapters]
    return any([adapter is not None and adapter.attach(expert) for adapter in chosen])


class ExpertTrunk(nn.Module):
    """The experts up to their feature maps.

    At every prompt site, all experts side by side: the conditioner makes prompts of the condition, the prompter makes
    prompts of all experts' states, the frozen layers run on them, and adapters change the patch tokens.

    Args:
        experts: frozen encoders.
        prompter: makes the prompter from the experts' streams, such as a partial :class:`medmoe.moe.PMoE`; or ``None``.
        conditioner: makes the conditioner from the streams and ``image_width``, such as a partial
            :class:`medmoe.moe.MoPE`; or ``None``.
        conditioning: "dispatched": the prompts of a condition are one more group of tokens for the prompter's
            dispatchers; "appended": they enter the layers as they are, behind the prompter's. Without dispatchers they
            are always appended.
        condition_expert: which expert encodes the second image of a condition, counted from 0.
        prompted: whether each expert receives prompts; one value or one for each.
        adapters: such as :class:`medmoe.tuning.LoRA`, or ``None``; one for all experts or, as a list, an entry for each
            expert, which may itself be a list of adapters.
        num_sites: prompt sites, spread evenly over each expert's layers. Defaults to the depth of the shallowest
            prompted expert, so that it has one at every layer.
        site_range: first and last site (inclusive) that have prompts, counted from 0. Defaults to all. What lies before
            the first one costs no backward pass.
        precision: "auto", "fp32" or "bf16", of the experts; prompts, decoder and losses stay in float32.
        cache_bytes: memory for the feature maps of experts that are neither prompted nor adapted; 0 keeps none.
        activation_checkpointing: forget what a site computed and compute it again in the backward pass: less memory,
            about a third more time.

    Raises:
        ConfigError: for settings that contradict each other.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        prompter: Callable[[Sequence[Stream]], PMoE] | None = None,
        conditioner: Callable[..., MoPE] | None = None,
        conditioning: str = "dispatched",
        condition_expert: int = 0,
        prompted: bool | Sequence[bool] = True,
        adapters: Any = None,
        num_sites: int | None = None,
        site_range: tuple[int, int] | None = None,
        precision: str = "auto",
        cache_bytes: int = 0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not experts:
            raise ConfigError("a network needs at least one expert")
        for expert in experts:
            check_grid(expert)
        self.precision, self.activation_checkpointing = precision, activation_checkpointing
        self.experts = nn.ModuleList(experts)
        flags = one_each("prompted", prompted, len(experts))
        wanted = prompter is not None or conditioner is not None
        self.prompted = [wanted and bool(flag) for flag in flags]
        self.adapted = [
            attach(a, e) for a, e in zip(one_each("adapters", adapters, len(experts)), experts, strict=True)
        ]
        self.names = distinct([expert.name or f"expert{k}" for k, expert in enumerate(experts)])
        for expert, name in zip(experts, self.names, strict=True):
            if expert.after is not None:
                expert.after.receiver = name
        self.lay_out_sites(num_sites, site_range)
        self.prompter: PMoE | None = None
        self.conditioner: MoPE | None = None
        if prompter is not None and any(self.prompted):
            self.prompter = prompter(self.streams())
        if conditioner is not None:
            if not any(self.prompted):
                raise ConfigError("a condition enters through prompts, but no expert is prompted: prompt at least one")
            if not 0 <= condition_expert < len(experts):
                raise ConfigError(f"condition_expert={condition_expert}: expected 0 to {len(experts) - 1}, an expert")
            width = experts[condition_expert].level_widths[-1]
            self.conditioner = conditioner(self.streams(), image_width=width)
        self.conditioning = one_of("conditioning", conditioning, CONDITIONINGS)
        self.condition_expert = condition_expert
        self.caches = [FeatureCache(0 if live else cache_bytes) for live in self.live]
        # A few kilobytes an image, and asked for again by every window of a case.
        self.condition_cache = FeatureCache(CONDITION_CACHE_BYTES)

    def lay_out_sites(self, num_sites: int | None, site_range: tuple[int, int] | None) -> None:
        """Decides which layers of each expert belong to which site."""
        depths = [len(e.widths) for e, p in zip(self.encoders, self.prompted, strict=True) if p]
        self.num_sites = num_sites or (min(depths) if depths else 1)
        if depths and self.num_sites > min(depths):
            raise ConfigError(f"num_sites={num_sites}, but the shallowest prompted expert has {min(depths)} layers")
        self.sites = [site_layers(len(e.widths), self.num_sites) for e in self.encoders]
        first, last = site_range or (0, self.num_sites - 1)
        if not 0 <= first <= last < self.num_sites:
            raise ConfigError(f"site_range={[first, last]} is not within the sites 0 to {self.num_sites - 1}")
        self.first_site, self.last_site = first, last

    @property
    def encoders(self) -> list[Expert]:
        """The experts, as what they are."""
        return cast(list[Expert], list(self.experts))

    @property
    def live(self) -> list[bool]:
        """Whether each expert's features depend on anything that trains."""
        return [p or a for p, a in zip(self.prompted, self.adapted, strict=True)]

    @property
    def schema(self) -> Schema | None:
        """What the network may be conditioned on."""
        return None if self.conditioner is None else self.conditioner.schema

    def streams(self) -> list[Stream]:
        """What the prompter is told of the experts: only the sites that have prompts."""
        first, last = self.first_site, self.last_site + 1
        return [
            Stream(
                self.names[k],
                tuple(expert.widths[run.start] for run in self.sites[k][first:last] if prompted),
                expert.patch,
                prompted,
                expert.level_widths[-1],
            )
            for k, (expert, prompted) in enumerate(zip(self.encoders, self.prompted, strict=True))
        ]

    def features(self, image: Tensor, condition: Condition = None) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
        """Feature maps of each expert and level, and the routers' losses.

        Args:
            image: (N, C, H, W), slices of volumes one after the other.
            condition: of each image, or of runs of N / B images (the slices of a volume, the windows of a case).

        Returns:
            maps (N, C_i, h_i, w_i), and scalars by name.
        """
        psi = self.encode_condition(condition, len(image))
        alone = [None if p else self.maps_without_prompts(k, image) for k, p in enumerate(self.prompted)]
        context = [None if m is None else context_tokens(m[-1]) for m in alone]
        together, weights = self.maps_with_prompts(image, context, psi)
        auxiliary = {}
        if self.conditioner is not None and weights and self.training:
            auxiliary["mope_importance"] = self.conditioner.importance_loss(weights)
        return [together[k] if maps is None else maps for k, maps in enumerate(alone)], auxiliary

    def encode_condition(self, condition: Condition, count: int) -> Tensor | None:
        """psi (count, d) of a condition, the learned null where there is none; ``None`` without a conditioner."""
        if self.conditioner is None:
            return None
        given = dict(condition or {})
        batch = max((len(value) for value in given.values()), default=count)
        if "image" in given:
            given["image_features"] = self.pooled_features(given.pop("image"))
        psi = self.conditioner.encode(given or None, batch)
        if count % batch:
            raise ConfigError(f"there are conditions of {batch} cases for {count} images")
        return psi.repeat_interleave(count // batch, 0)

    @torch.no_grad()
    def pooled_features(self, second: Tensor) -> Tensor:
        """Mean features (B, C) that the condition's expert, untouched, has of a second image (B, C, H, W[, D]).

        An image that is not there, all NaN, gives NaN. Slices are averaged.
        """
        if second.dim() == 5:
            slices = self.pooled_features(second.movedim(-1, 1).flatten(0, 1))
            return slices.unflatten(0, (len(second), -1)).mean(1)
        expert = self.encoders[self.condition_expert]

        def encode(one: Tensor) -> list[Tensor]:
            with autocast(self.precision, one.device), as_pretrained(expert):
                return [expert(one)[-1].float().mean((2, 3))]

        found = [self.condition_cache.get(one, encode)[0] for one in second.nan_to_num().split(1)]
        missing = second.flatten(1).isnan().any(1, keepdim=True)
        return torch.cat(found).masked_fill(missing, torch.nan)

    def maps_without_prompts(self, k: int, image: Tensor) -> list[Tensor]:
        """Maps of an expert that runs by itself, with gradients where it is adapted."""
        if not self.adapted[k]:
            return self.frozen_maps(k, image)
        with autocast(self.precision, image.device):
            return self.encoders[k](image)

    @torch.no_grad()
    def frozen_maps(self, k: int, image: Tensor) -> list[Tensor]:
        """Maps of an expert that nothing trains, from the cache where they are kept.

        They are rounded to half precision, with or without a cache, and on a CPU each image is encoded by itself, so
        that the numbers do not depend on what was seen before.
        """

        def encode(one: Tensor) -> list[Tensor]:
            with autocast(self.precision, one.device):
                return [m.half() for m in self.encoders[k](one)]

        if image.is_cuda and not self.caches[k].max_bytes:
            return [m.float() for m in encode(image)]
        return [m.float() for m in stack_maps([self.caches[k].get(one, encode) for one in image.split(1)])]

    def maps_with_prompts(
        self, image: Tensor, context: Sequence[Tensor | None], psi: Tensor | None
    ) -> tuple[dict[int, list[Tensor]], list[Tensor]]:
        """Maps of the prompted experts, which pass through their sites side by side, and MoPE's routing weights."""
        live = [k for k, flag in enumerate(self.prompted) if flag]
        outputs: dict[int, dict[int, Tokens]] = {k: {} for k in live}
        seen, weights = list(context), []
        with autocast(self.precision, image.device):
            states = {k: self.encoders[k].embed(self.encoders[k].view(image)) for k in live}
            for site in range(self.num_sites):
                for k in live:
                    states[k] = self.encoders[k].enter(self.sites[k][site].start, states[k])
                # Copies, because what is computed again must see the states of now.
                prompts, routed = self.maybe_again(self.prompts_at, site, dict(states), list(seen), psi)
                weights += routed
                for k in live:
                    states[k], seen[k], levels = self.maybe_again(self.run_site, k, site, states[k], prompts[k])
                    outputs[k].update(levels)
            return {k: self.encoders[k].maps(outputs[k]) for k in live}, weights

    def maybe_again(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls ``function``, computing it again in the backward pass where activations are checkpointed."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False)
        return function(*args)

    def prompts_at(
        self, site: int, states: dict[int, Tokens], seen: Sequence[Tensor | None], psi: Tensor | None
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """The prompts that enter ``site``, ``None`` for each expert that has none there, and MoPE's weights."""
        if not any(self.prompted) or not self.first_site <= site <= self.last_site:
            return [None] * len(self.experts), []
        patches = [states[k].map().float() if flag else None for k, flag in enumerate(self.prompted)]
        with torch.autocast(self.device.type, enabled=False):
            conditions, weights = self.condition_prompts(site - self.first_site, patches, psi)
            if self.prompter is None:
                return conditions, weights
            dispatched = self.conditioning == "dispatched" and self.prompter.needs_outputs
            given = conditions if dispatched else [None] * len(conditions)
            outputs = [None if z is None else z.float() for z in seen]
            prompts = self.prompter(
                site - self.first_site, [State(*parts) for parts in zip(patches, outputs, given, strict=True)]
            )
        if not dispatched:
            prompts = [joined(p, c) for p, c in zip(prompts, conditions, strict=True)]
        return prompts, weights

    def condition_prompts(
        self, site: int, patches: Sequence[Tensor | None], psi: Tensor | None
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """MoPE's prompts for each expert, and its routing weights."""
        if self.conditioner is None:
            return [None] * len(patches), []
        assert psi is not None
        made = [None if x is None else self.conditioner(k, site, x, psi) for k, x in enumerate(patches)]
        return [None if m is None else m[0] for m in made], [m[1] for m in made if m is not None and m[1] is not None]

    def run_site(
        self, k: int, site: int, tokens: Tokens, prompts: Tensor | None
    ) -> tuple[Tokens, Tensor | None, dict[int, Tokens]]:
        """The layers of expert ``k`` at ``site``: tokens, the last prompt outputs, and the tokens of its levels.

        Prompts pass on from layer to layer within a site, as long as the width stays the same.
        """
        expert, layers = self.encoders[k], self.sites[k][site]
        reads = self.prompter is not None and self.prompter.needs_outputs
        seen, levels = None, {}
        for index in layers:
            tokens = tokens if index == layers.start else expert.enter(index, tokens)
            carried = index + 1 in layers and expert.widths[index + 1] == expert.widths[index]
            tokens, passed = expert.layer(index, tokens, prompts, keep_prompts=reads or carried)
            tokens = expert.adapt(index, tokens)
            seen = seen if passed is None else passed
            prompts = passed if carried else None
            if index in expert.levels:
                levels[index] = tokens
        return tokens, seen, levels

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@contextmanager
def as_pretrained(expert: Expert) -> Iterator[None]:
    """Within it, ``expert`` runs as it came: no LoRA, nothing behind its layers, no choice of channels."""

    def switch(on: bool) -> None:
        for part in expert.modules():
            enable: Any = getattr(part, "enable_adapters", None)
            if enable is not None:
                enable(on)

    after, channels = expert.after, expert.channels
    trains = [(p, p.requires_grad) for p in expert.parameters()]
    try:
        expert.after, expert.channels = None, None  # the channels chosen for the image say nothing of another one
        switch(False)
        yield
    finally:
        expert.after, expert.channels = after, channels
        switch(True)
        for p, flag in trains:  # peft's switch turns gradients on as well
            p.requires_grad_(flag)


def joined(prompts: Tensor | None, conditions: Tensor | None) -> Tensor | None:
    """Prompts (P, D) or (B, P, D) with those of the condition (B, n, D) behind them."""
    if prompts is None or conditions is None:
        return prompts if conditions is None else conditions
    if prompts.dim() == 2:
        prompts = prompts.expand(len(conditions), -1, -1)
    return torch.cat([prompts, conditions], 1)


def context_tokens(last: Tensor) -> Tensor:
    """The few tokens that an expert without prompts lends to the others, (N, 16, C) from its last map."""
    return F.adaptive_avg_pool2d(last, CONTEXT_SIDE).flatten(2).transpose(1, 2)
