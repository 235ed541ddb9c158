# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Experts, prompter, adapters and decoder as one network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.decoders import FusionDecoder
from medmoe.errors import ConfigError
from medmoe.experts.base import Expert, Tokens
from medmoe.moe.pmoe import PMoE, State, Stream
from medmoe.moe.routing import RoutingRecord
from medmoe.networks.cache import FeatureCache, stack_maps
from medmoe.networks.precision import autocast

CONTEXT_SIDE = 4


class Adapter(Protocol):
    """Anything that puts trainable parts into a frozen expert."""

    def attach(self, expert: nn.Module) -> bool: ...


class Parts(NamedTuple):
    """What a training step needs.

    Attributes:
        logits: (B, num_classes, H, W[, D]).
        expert_logits: of each expert under late fusion, else empty.
        auxiliary: scalar losses of routers, by name.
    """

    logits: Tensor
    expert_logits: list[Tensor]
    auxiliary: dict[str, Tensor]


def site_layers(depth: int, sites: int) -> list[range]:
    """The layers of an expert at each site: ``depth`` layers in ``sites`` runs of as equal length as can be."""
    return [range(s * depth // sites, (s + 1) * depth // sites) for s in range(sites)]


def one_each(name: str, values: object, count: int) -> list[object]:
    """``values`` as a list with one entry an expert; a single value counts for all."""
    each = list(values) if isinstance(values, list | tuple) else [values] * count
    if len(each) != count:
        raise ConfigError(f"{name} has {len(each)} entries for {count} experts: give one value, or one for each expert")
    return each


class ExpertSegmenter(nn.Module):
    """Frozen experts side by side, what is trained between and inside them, and a decoder.

    Args:
        experts: frozen encoders.
        num_classes: channels of the logits, the background included.
        spatial_dims: 2 or 3. In 3-D the last axis is folded into the batch for the experts.
        in_channels: of the image.
        prompter: makes the prompter from the experts' streams, such as a partial :class:`medmoe.moe.PMoE`; or ``None``.
        prompted: whether each expert receives prompts; one value or one for each.
        adapters: such as :class:`medmoe.tuning.LoRA`, or ``None``; one value or one for each expert.
        decoder: makes the decoder, a partial :class:`medmoe.decoders.FusionDecoder`.
        num_sites: prompt sites, spread evenly over each expert's layers. Defaults to the depth of the shallowest
            prompted expert, so that it has one at every layer.
        site_range: first and last site (inclusive) that have prompts, counted from 0. Defaults to all. What lies before
            the first one costs no backward pass.
        neighbors: in 3-D with one channel, show each expert the slices before, at and after as three channels.
        precision: "auto", "fp32" or "bf16", of the experts; prompts, decoder and losses stay in float32.
        cache_bytes: memory for the feature maps of experts that are neither prompted nor adapted; 0 keeps none.

    Raises:
        ConfigError: for settings that contradict each other.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        num_classes: int,
        spatial_dims: int = 2,
        in_channels: int = 1,
        prompter: Callable[[Sequence[Stream]], PMoE] | None = None,
        prompted: bool | Sequence[bool] = True,
        adapters: Adapter | Sequence[Adapter | None] | None = None,
        decoder: Callable[..., FusionDecoder] = FusionDecoder,
        num_sites: int | None = None,
        site_range: tuple[int, int] | None = None,
        neighbors: bool = False,
        precision: str = "auto",
        cache_bytes: int = 0,
    ) -> None:
        super().__init__()
        if not experts:
            raise ConfigError("a network needs at least one expert")
        if neighbors and (spatial_dims, in_channels) != (3, 1):
            raise ConfigError(
                "neighbors fills the three color channels with the slices of a volume: it needs spatial_dims=3 and "
                f"in_channels=1, found spatial_dims={spatial_dims} and in_channels={in_channels}"
            )
        self.num_classes, self.spatial_dims, self.in_channels = num_classes, spatial_dims, in_channels
        self.neighbors, self.precision = neighbors, precision
        self.experts = nn.ModuleList(experts)
        flags = one_each("prompted", prompted, len(experts))
        self.prompted = [prompter is not None and bool(flag) for flag in flags]
        attach = cast("list[Adapter | None]", one_each("adapters", adapters, len(experts)))
        self.adapted = [a is not None and a.attach(e) for a, e in zip(attach, experts, strict=True)]
        depths = [len(e.widths) for e, p in zip(experts, self.prompted, strict=True) if p]
        self.num_sites = num_sites or (min(depths) if depths else 1)
        if depths and self.num_sites > min(depths):
            raise ConfigError(f"num_sites={num_sites}, but the shallowest prompted expert has {min(depths)} layers")
        self.sites = [site_layers(len(e.widths), self.num_sites) for e in experts]
        first, last = site_range or (0, self.num_sites - 1)
        if not 0 <= first <= last < self.num_sites:
            raise ConfigError(f"site_range={[first, last]} is not within the sites 0 to {self.num_sites - 1}")
        self.first_site, self.last_site = first, last
        self.prompter: PMoE | None = None
        if prompter is not None and any(self.prompted):
            self.prompter = prompter(self.streams())
        self.decoder = decoder(
            widths=[e.level_widths for e in experts],
            in_channels=in_channels,
            num_classes=num_classes,
            spatial_dims=spatial_dims,
        )
        self.caches = [FeatureCache(0 if live else cache_bytes) for live in self.live]

    @property
    def encoders(self) -> list[Expert]:
        """The experts, as what they are."""
        return cast(list[Expert], list(self.experts))

    @property
    def live(self) -> list[bool]:
        """Whether each expert's features depend on anything that trains."""
        return [p or a for p, a in zip(self.prompted, self.adapted, strict=True)]

    def streams(self) -> list[Stream]:
        """What the prompter is told of the experts: only the sites that have prompts."""
        first, last = self.first_site, self.last_site + 1
        return [
            Stream(
                expert.name or f"expert{k}",
                tuple(expert.widths[run.start] for run in self.sites[k][first:last] if prompted),
                expert.patch,
                prompted,
                expert.level_widths[-1],
            )
            for k, (expert, prompted) in enumerate(zip(self.encoders, self.prompted, strict=True))
        ]

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, num_classes, H, W[, D]) in float32 of an image (B, C, H, W[, D]) in [0, 1].

        Raises:
            ConfigError: for an image of another number of dimensions or channels, or smaller than a patch.
        """
        return self.parts(image).logits

    def parts(self, image: Tensor) -> Parts:
        """The logits together with what only training needs."""
        image = plain(image)
        self.check(image)
        maps = self.features(self.fold(image))
        with torch.autocast(image.device.type, enabled=False):
            maps = [[level.float() for level in levels] for levels in maps]
            logits, expert_logits = self.decoder(maps, image.float())
        return Parts(logits, expert_logits, {})

    def check(self, image: Tensor) -> None:
        """Refuses an image that this network was not built for, in the user's words."""
        if image.dim() != self.spatial_dims + 2:
            found = image.dim() - 2
            raise ConfigError(
                f"the network works in {self.spatial_dims}-D but the image is {found}-D {tuple(image.shape[2:])}: "
                f"build it with spatial_dims={found}"
            )
        if image.shape[1] != self.in_channels:
            raise ConfigError(
                f"the network takes {self.in_channels} channel(s) but the image has {image.shape[1]}: "
                f"build it with in_channels={image.shape[1]}"
            )
        patch = max(expert.patch for expert in self.encoders)
        if min(image.shape[2:4]) < patch:
            raise ConfigError(
                f"the image is {image.shape[2]} x {image.shape[3]} pixels, smaller than one patch ({patch} x {patch}) "
                "of an expert: resample it to a finer grid, or choose a larger window"
            )

    def fold(self, image: Tensor) -> Tensor:
        """(B, C, H, W, D) -> (B * D, C, H, W); 2-D images pass."""
        if self.spatial_dims == 2:
            return image
        if self.neighbors:
            before = torch.cat([image[..., :1], image[..., :-1]], -1)
            after = torch.cat([image[..., 1:], image[..., -1:]], -1)
            image = torch.cat([before, image, after], 1)
        return image.movedim(-1, 1).flatten(0, 1)

    def features(self, image: Tensor) -> list[list[Tensor]]:
        """Feature maps (N, C, h, w) of each expert and level, of images (N, C, H, W)."""
        alone = [None if p else self.maps_without_prompts(k, image) for k, p in enumerate(self.prompted)]
        together = self.maps_with_prompts(image, [None if m is None else context_tokens(m[-1]) for m in alone])
        return [together[k] if maps is None else maps for k, maps in enumerate(alone)]

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

    def maps_with_prompts(self, image: Tensor, context: Sequence[Tensor | None]) -> dict[int, list[Tensor]]:
        """Maps of the prompted experts, which pass through their sites side by side."""
        live = [k for k, flag in enumerate(self.prompted) if flag]
        outputs: dict[int, dict[int, Tokens]] = {k: {} for k in live}
        seen = list(context)
        with autocast(self.precision, image.device):
            states = {k: self.encoders[k].embed(self.encoders[k].view(image)) for k in live}
            for site in range(self.num_sites):
                for k in live:
                    states[k] = self.encoders[k].enter(self.sites[k][site].start, states[k])
                prompts = self.prompts_at(site, states, seen)
                for k in live:
                    states[k], seen[k] = self.run_site(k, site, states[k], prompts[k], outputs[k])
            return {k: self.encoders[k].maps(outputs[k]) for k in live}

    def prompts_at(self, site: int, states: dict[int, Tokens], seen: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The prompts that enter ``site``, or ``None`` for each expert that has none there."""
        if self.prompter is None or not self.first_site <= site <= self.last_site:
            return [None] * len(self.experts)
        patches = [states[k].map().float() if flag else None for k, flag in enumerate(self.prompted)]
        with torch.autocast(self.device.type, enabled=False):
            outputs = [None if z is None else z.float() for z in seen]
            return self.prompter(site - self.first_site, [State(*pair) for pair in zip(patches, outputs, strict=True)])

    def run_site(
        self, k: int, site: int, tokens: Tokens, prompts: Tensor | None, outputs: dict[int, Tokens]
    ) -> tuple[Tokens, Tensor | None]:
        """The layers of expert ``k`` at ``site``, and the last prompt outputs.

        Prompts pass on from layer to layer within a site, as long as the width stays the same.
        """
        expert, layers = self.encoders[k], self.sites[k][site]
        reads = self.prompter is not None and self.prompter.needs_outputs
        seen = None
        for index in layers:
            tokens = tokens if index == layers.start else expert.enter(index, tokens)
            carried = index + 1 in layers and expert.widths[index + 1] == expert.widths[index]
            tokens, passed = expert.layer(index, tokens, prompts, keep_prompts=reads or carried)
            seen = seen if passed is None else passed
            prompts = passed if carried else None
            if index in expert.levels:
                outputs[index] = tokens
        return tokens, seen

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def recording(self) -> bool:
        """Whether the routers keep their weights of the last forward pass."""
        return self.prompter is not None and self.prompter.recording

    @recording.setter
    def recording(self, flag: bool) -> None:
        if self.prompter is not None:
            self.prompter.recording = flag

    def routing(self) -> list[RoutingRecord]:
        """How each router spread its weights in the last forward pass with :attr:`recording` set."""
        if self.prompter is None:
            return []
        return [r._replace(site=r.site + self.first_site) for r in self.prompter.routing()]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train: prompts and dispatchers, adapters, decoder."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def plain(tensor: Tensor) -> Tensor:
    """A MONAI MetaTensor as the plain tensor that it holds: its bookkeeping costs time in every operation."""
    as_tensor = getattr(tensor, "as_tensor", None)
    return tensor if as_tensor is None else as_tensor()


def context_tokens(last: Tensor) -> Tensor:
    """The few tokens that an expert without prompts lends to the others, (N, 16, C) from its last map."""
    return F.adaptive_avg_pool2d(last, CONTEXT_SIDE).flatten(2).transpose(1, 2)
