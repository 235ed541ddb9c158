# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Experts, prompter, conditioner, adapters and decoder as one network, for one task or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medmoe.decoders import FusionDecoder, ImageHead
from medmoe.errors import ConfigError, one_of
from medmoe.experts.base import Expert
from medmoe.moe.routing import Gates, Router, RoutingRecord
from medmoe.networks.trunk import Condition, ExpertTrunk
from medmoe.tasks import Task, single_task

WEIGHTINGS = ("fixed", "uncertainty")


class Parts(NamedTuple):
    """What a training step needs.

    Attributes:
        outputs: logits of each task: dense (B, C_t, H, W[, D]), image-level (B, C_t).
        expert_outputs: the dense ones of each expert under late fusion, else empty.
        auxiliary: scalar losses of routers, by name, weighted.
        log_variances: a learned scalar for each task under uncertainty weighting, else empty.
    """

    outputs: dict[str, Tensor]
    expert_outputs: list[dict[str, Tensor]]
    auxiliary: dict[str, Tensor]
    log_variances: dict[str, Tensor]


class ExpertNetwork(ExpertTrunk):
    """Frozen experts side by side, what is trained between and inside them, and a decoder.

    Args:
        experts: frozen encoders.
        tasks: what to predict. Defaults to one mask of ``num_classes`` exclusive classes.
        num_classes: of that one mask, the background included.
        spatial_dims: 2 or 3. In 3-D the last axis is folded into the batch for the experts.
        in_channels: of the image.
        decoder: makes the decoder of the dense tasks, a partial :class:`medmoe.decoders.FusionDecoder`.
        neighbors: in 3-D with one channel, show each expert the slices before, at and after as three channels.
        task_weighting: "fixed", or "uncertainty": a learned log-variance s_t for each task of a weight w_t above 0,
            whose loss becomes w_t exp(-s_t) L_t + s_t (our reading of Kendall, Gal and Cipolla, CVPR 2018).
        trunk: the arguments of :class:`medmoe.networks.trunk.ExpertTrunk`.

    Raises:
        ConfigError: for settings that contradict each other.
    """

    def __init__(
        self,
        experts: Sequence[Expert],
        tasks: Sequence[Task] | None = None,
        num_classes: int = 2,
        spatial_dims: int = 2,
        in_channels: int = 1,
        decoder: Callable[..., FusionDecoder] = FusionDecoder,
        neighbors: bool = False,
        task_weighting: str = "fixed",
        **trunk: Any,
    ) -> None:
        super().__init__(experts, **trunk)
        if neighbors and (spatial_dims, in_channels) != (3, 1):
            raise ConfigError(
                "neighbors fills the three color channels with the slices of a volume: it needs spatial_dims=3 and "
                f"in_channels=1, found spatial_dims={spatial_dims} and in_channels={in_channels}"
            )
        self.spatial_dims, self.in_channels, self.neighbors = spatial_dims, in_channels, neighbors
        self.tasks = list(tasks or single_task(num_classes))
        self.decoder: FusionDecoder | None = None
        if self.dense:
            self.decoder = decoder(
                widths=[e.level_widths for e in experts],
                in_channels=in_channels,
                tasks=self.dense,
                spatial_dims=spatial_dims,
            )
        image_tasks = [task for task in self.tasks if not task.dense]
        self.image_head = ImageHead([e.level_widths[-1] for e in experts], image_tasks) if image_tasks else None
        self.log_variances: nn.ParameterDict | None = None
        if one_of("task_weighting", task_weighting, WEIGHTINGS) == "uncertainty":
            trained = [task for task in self.tasks if task.weight]
            self.log_variances = nn.ParameterDict({f"task_{t.name}": nn.Parameter(torch.zeros(())) for t in trained})

    @property
    def dense(self) -> list[Task]:
        """The tasks that say something of every voxel."""
        return [task for task in self.tasks if task.dense]

    def forward(self, image: Tensor, condition: Condition = None) -> Tensor:
        """All dense tasks' logits in one float32 tensor (B, sum of C_t, H, W[, D]); see :meth:`split`.

        Where all tasks are image-level: their logits, (B, sum of C_t).

        Args:
            image: (B, C, H, W[, D]) in [0, 1].
            condition: tensors by kind, see :class:`medmoe.moe.mope.ConditionEncoder`, of each image or, with a batch
                of one, of all; ``None`` where nothing is known.

        Raises:
            ConfigError: for an image of another number of dimensions or channels, or smaller than a patch.
        """
        outputs = self.parts(image, condition).outputs
        return torch.cat([outputs[task.name] for task in self.dense or self.tasks], 1)

    def split(self, logits: Tensor) -> dict[str, Tensor]:
        """What :meth:`forward` gave, task by task."""
        tasks = self.dense or self.tasks
        parts = logits.split([task.channels for task in tasks], 1)
        return {task.name: part for task, part in zip(tasks, parts, strict=True)}

    def outputs(self, image: Tensor, condition: Condition = None) -> dict[str, Tensor]:
        """Logits of every task: dense (B, C_t, H, W[, D]), image-level (B, C_t)."""
        return self.parts(image, condition).outputs

    def image_outputs(self, image: Tensor, condition: Condition = None) -> dict[str, Tensor]:
        """Logits (B, C_t) of the image-level tasks alone; none where there are none."""
        if self.image_head is None:
            return {}
        image = plain(image)
        self.check(image)
        maps, _ = self.features(self.fold(image), condition)
        return self.decode_image(maps, image)

    def parts(self, image: Tensor, condition: Condition = None) -> Parts:
        """The logits together with what only training needs."""
        image = plain(image)
        self.check(image)
        maps, auxiliary = self.features(self.fold(image), condition)
        outputs, expert_outputs = self.decode_image(maps, image), []
        if self.decoder is not None:
            with torch.autocast(image.device.type, enabled=False):
                full = [[level.float() for level in levels] for levels in maps]
                decoded = self.maybe_again(self.decoder, full, image.float())
            outputs, expert_outputs = {**decoded.outputs, **outputs}, decoded.expert_outputs
            auxiliary = {**auxiliary, **decoded.auxiliary}
        learned = {name.removeprefix("task_"): s for name, s in (self.log_variances or {}).items()}
        return Parts(outputs, expert_outputs, auxiliary, learned)

    def decode_image(self, maps: Sequence[Sequence[Tensor]], image: Tensor) -> dict[str, Tensor]:
        """Logits (B, C_t) of the image-level tasks from the experts' maps."""
        if self.image_head is None:
            return {}
        with torch.autocast(image.device.type, enabled=False):
            outputs: dict[str, Tensor] = self.image_head([levels[-1].float() for levels in maps], len(image))
        return outputs

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

    @property
    def routers(self) -> list[Router]:
        """Everything that routes: dispatchers, conditioner, adapters, heads of the decoder."""
        return [router for router, _ in self.named_routers()]

    def named_routers(self) -> Iterator[tuple[Router, str]]:
        """Each router, and for those of a decoder with a head for each expert the name of that expert, else ""."""
        heads = [] if self.decoder is None else [head.refine for head in self.decoder.heads]
        names = self.names if len(heads) > 1 else [""] * len(heads)
        parts: list[tuple[object, str]] = [(self.prompter, ""), (self.conditioner, "")]
        parts += [(expert.after, "") for expert in self.encoders] + list(zip(heads, names, strict=True))
        for part, name in parts:
            if isinstance(part, Router):
                yield part, name

    @property
    def recording(self) -> bool:
        """Whether the routers keep their weights of the last forward pass."""
        return any(router.recording for router in self.routers)

    @recording.setter
    def recording(self, flag: bool) -> None:
        for router in self.routers:
            router.recording = flag

    def routing(self) -> list[RoutingRecord]:
        """How each router spread its weights in the last forward pass with :attr:`recording` set."""
        return [
            record._replace(site=self.site(record), expert="/".join(filter(None, (record.expert, head))))
            for router, head in self.named_routers()
            for record in router.routing()
        ]

    def gates(self) -> list[Gates]:
        """The same image by image (to all but FGMoE the slices of a volume are images).

        Under late fusion the receivers of FGMoE are a task and the expert whose head it is, such as "lesion/vit".
        """
        return [
            gates._replace(site=self.site(gates), receiver="/".join(filter(None, (gates.receiver, head))))
            for router, head in self.named_routers()
            for gates in router.gates()
        ]

    def site(self, found: Gates | RoutingRecord) -> int:
        """The site of a router's report, counted over all, where the router knows only those that have prompts."""
        return found.site + self.first_site * (found.router in ("pmoe", "mope"))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that train: prompts and dispatchers, conditions, adapters, decoder."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


def plain(tensor: Tensor) -> Tensor:
    """A MONAI MetaTensor as the plain tensor that it holds: its bookkeeping costs time in every operation."""
    as_tensor = getattr(tensor, "as_tensor", None)
    return tensor if as_tensor is None else as_tensor()
