# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""FGMoE: Multi-Task Dense Prediction Fine-Tuning with Mixture of Fine-Grained Experts (Xu, Ye, Su; arXiv 2507.19077).

From the paper (abstract and overview figure): only the decoder trains; features of all scales are aggregated; each task
has a deformable mixer, and behind it a mixture whose experts are slices of one MLP along its hidden dimension, some of
them shared (always on); a global mixture, conditioned on the features and on the task, is added to every task's result.

The paper's equations and code are not public; these are our reading, each open choice a constructor argument. With
x = LN(aggregated features), a token for each position of the map, and an MLP of hidden width H cut into m slices:

    u_t      = Mixer_t(x)
    E_i(u)   = W2[:, S_i] gelu(W1[S_i] u + b1[S_i]),   |S_i| = H / m
    p        = softmax(W_r u) over the m routed slices;   g = p on its top_k, 0 elsewhere; not renormalized
    y_t      = u_t + b2 + sum over shared slices E_s(u_t) + sum over routed slices g_i E_i(u_t)
    q_t      = softmax(W_g [x ; e_t]),   e_t a learned embedding of the task
    G_t      = b2' + sum_j q_tj E'_j(x),   E'_j of the size of a slice
    result_t = y_t + G_t

Without the residual, y_t begins with b2. Shared slices come on top of the m routed ones. The mixer is that of the first
author's DeMT (AAAI 2023), with group norm in the place of batch norm, whose statistics mean little with two images a
batch. The balance loss is that of MLoRE (CVPR 2024): the squared coefficient of variation of p's mean over the batch.

The paper has one backbone, and its mixtures stand on the concatenated features of all scales; of several experts that
is fusion="concat", as in our bundles. Under late fusion each expert has a head, and so an FGMoE of its own: its global
experts see that one backbone, and pass on what tasks, but not what backbones have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmoe.errors import ConfigError, check_settings, number, one_of, optional, whole
from medmoe.moe.routing import Gates, RoutingRecord, squared_variation, summed_up

MIXERS = ("deformable", "convolution", "none")
GRANULARITIES = ("token", "image")
EXECUTIONS = ("auto", "dense", "gather")
PARTS = ("slices", "global")


def full(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def keep_top_k(probabilities: Tensor, top_k: int, renormalize: bool = False) -> Tensor:
    """The ``top_k`` largest of (..., n), 0 elsewhere; with ``renormalize`` they sum to 1."""
    if top_k == probabilities.shape[-1]:
        return probabilities
    values, index = probabilities.topk(top_k, -1)
    if renormalize:
        values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, index, values)


class SlicedMLP(nn.Module):
    """An MLP cut along its hidden dimension into slices, whose outputs every token weighs.

    Each output is linear in its slice's hidden activations, so that "dense" is the undivided MLP with its activations
    scaled. "gather" runs each slice on those tokens alone that give it a weight. Numbers and gradients are the same.

    "auto" gathers on the CPU where at most half of the slices run on a token, there are 1024 tokens or more, and slices
    are 32 wide or more. Measured with benchmarks/fgmoe_paths.py (forward and backward, one thread, m = 8, one shared,
    64 and 256 channels, 2048 to 8192 tokens): with top_k 2 or 3 gathering takes 0.4 to 0.8 of the time of the dense
    path, with 4 it takes 0.7 to 1.1; with 256 tokens of 64 channels, or slices 16 wide, 1.0 to 2 or more. The forward
    pass alone gains less at 64 channels: 0.6 to 1.5. On a GPU "auto" is dense, because the host would have to wait for
    the sizes of the groups; that was not measured.

    Args:
        channels: C, in and out.
        width: hidden units of a slice.
        routed: n, slices that are weighed.
        shared: further slices, of weight 1.
        top_k: how many weights of a token are above 0, at most.
        execution: "auto", "dense" or "gather".
    """

    def __init__(self, channels: int, width: int, routed: int, shared: int, top_k: int, execution: str) -> None:
        super().__init__()
        self.width, self.shared, self.execution = width, shared, execution
        self.sparse = 2 * (top_k + shared) <= routed + shared and width >= 32
        self.up = nn.Linear(channels, width * (routed + shared))
        self.down = nn.Linear(width * (routed + shared), channels)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """Tokens (..., C) and weights (..., n) -> (..., C); leading dimensions that only the weights have are kept."""
        if self.shared:
            weights = F.pad(weights, (0, self.shared), value=1.0)
        return self.gather(x, weights) if self.gathers(weights) else self.dense(x, weights)

    def gathers(self, weights: Tensor) -> bool:
        """Whether "gather" is the path for these weights (..., n + shared)."""
        if self.execution != "auto":
            return self.execution == "gather"
        return self.sparse and weights.device.type == "cpu" and weights[..., 0].numel() >= 1024

    def dense(self, x: Tensor, weights: Tensor) -> Tensor:
        """All slices on all tokens."""
        hidden = F.gelu(self.up(x)).unflatten(-1, (-1, self.width))
        return self.down((hidden * weights.to(hidden.dtype).unsqueeze(-1)).flatten(-2))

    def gather(self, x: Tensor, weights: Tensor) -> Tensor:
        """Each slice on its tokens, and the results back to where the tokens came from."""
        tokens = x.expand(*weights.shape[:-1], -1).flatten(0, -2)
        weights_by_slice = weights.flatten(0, -2).T
        slices, rows = weights_by_slice.nonzero(as_tuple=True)
        counts = slices.bincount(minlength=len(weights_by_slice)).tolist()
        parts = zip(
            tokens.index_select(0, rows).split(counts),
            self.up.weight.split(self.width),
            self.up.bias.split(self.width),
            self.down.weight.split(self.width, 1),
            strict=True,
        )
        results = torch.cat([F.linear(F.gelu(F.linear(part, w1, b1)), w2) for part, w1, b1, w2 in parts])
        results = results * weights_by_slice[slices, rows].unsqueeze(1)
        total = self.down.bias.to(results.dtype).expand(len(tokens), -1).index_add(0, rows, results)
        return total.view(*weights.shape[:-1], -1)


class Gate(nn.Module):
    """A softmax over the candidates, of which the best are kept. In float32 also under autocast.

    Args:
        channels: C of a token.
        candidates: n.
        top_k: how many keep their weight.
        renormalize: whether those sum to 1.
        granularity: "token", or "image": one gate for all tokens of an image, from their mean.
        tasks: R, learned task embeddings that the gate sees next to the token; 0 for a gate without.
    """

    def __init__(
        self, channels: int, candidates: int, top_k: int, renormalize: bool, granularity: str, tasks: int = 0
    ) -> None:
        super().__init__()
        self.top_k, self.renormalize, self.granularity = top_k, renormalize, granularity
        self.sparse = top_k < candidates
        self.router = nn.Linear(channels, candidates, bias=False)
        self.embedding = nn.Parameter(torch.randn(tasks, channels)) if tasks else None
        if tasks:
            self.requirement = nn.Linear(channels, candidates, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) -> softmax, and what is kept of it: (B, N, n) each, with task embeddings (R, B, N, n)."""
        count = tokens.shape[1]
        if self.granularity == "image":
            tokens = tokens.mean(1, keepdim=True)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(full(tokens), full(self.router.weight))
            if self.embedding is not None:
                # [router | requirement] is the W_g of [x ; e_t]: a task shifts the logits by the same at all tokens.
                shift = F.linear(full(self.embedding), full(self.requirement.weight))
                logits = logits + shift[:, None, None]
        probabilities = logits.softmax(-1)
        weights = keep_top_k(probabilities, self.top_k, self.renormalize)
        shape = (*logits.shape[:-2], count, logits.shape[-1])
        return probabilities.expand(shape), weights.expand(shape)


class DeformableConvolution(nn.Module):
    """A 1 x 1 convolution that reads each channel from a learned distance. It starts at distance 0: a plain one.

    Offsets (2 a channel, in positions of the map) come from a convolution to 18 channels that starts at zero and a
    grouped one to 2 C, both of side 3, as in DeMT. Beyond the edge it reads zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.point = nn.Conv2d(channels, channels, 1)
        first = nn.Conv2d(channels, 18, 3, padding=1)
        nn.init.zeros_(first.weight)
        nn.init.zeros_(first.bias)  # type: ignore[arg-type]
        self.offsets = nn.Sequential(first, nn.Conv2d(18, 2 * channels, 3, padding=1, groups=2, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        from torchvision.ops import deform_conv2d  # here, because its import is slow

        offsets, weight, bias = self.offsets(x), self.point.weight, self.point.bias
        assert bias is not None
        # There is no kernel for half precision on the CPU.
        with torch.autocast(x.device.type, enabled=False):
            return deform_conv2d(full(x), full(offsets), full(weight), full(bias)).to(x.dtype)


class Mixer(nn.Module):
    """What a task makes of its surroundings: x + norm(gelu(c(x))), then norm(gelu(1 x 1 convolution)), as in DeMT.

    c is the deformable convolution, or depthwise of side 3 and then 1 x 1. There is no deformable convolution in three
    dimensions: there the second stands in for it, which sees one position in each direction, and never further.
    """

    def __init__(self, channels: int, spatial_dims: int, kind: str) -> None:
        super().__init__()
        convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        groups = math.gcd(8, channels)
        first: nn.Module
        if kind == "deformable" and spatial_dims == 2:
            first = DeformableConvolution(channels)
        else:
            depthwise = convolution(channels, channels, 3, padding=1, groups=channels)
            first = nn.Sequential(depthwise, convolution(channels, channels, 1))
        self.around = nn.Sequential(first, nn.GELU(), nn.GroupNorm(groups, channels))
        self.point = nn.Sequential(convolution(channels, channels, 1), nn.GELU(), nn.GroupNorm(groups, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w[, d]) -> the same shape."""
        return self.point(x + self.around(x))


class Routed(NamedTuple):
    """Of a mixture: tokens (..., N, C), the softmax (..., N, n), and what was kept of it (..., N, n)."""

    tokens: Tensor
    probabilities: Tensor
    weights: Tensor


class TaskMoE(nn.Module):
    """A task's own path: the mixer, and the slices of its MLP, by default with a residual around them."""

    def __init__(self, mixer: nn.Module, gate: Gate, experts: SlicedMLP, residual: bool) -> None:
        super().__init__()
        self.mixer, self.gate, self.experts, self.residual = mixer, gate, experts, residual

    def forward(self, x: Tensor) -> Routed:
        """The map (B, C, h, w[, d]) -> y_t as tokens (B, N, C)."""
        u = self.mixer(x).flatten(2).transpose(1, 2)
        probabilities, weights = self.gate(u)
        y = self.experts(u, weights)
        return Routed(u + y if self.residual else y, probabilities, weights)


class GlobalMoE(nn.Module):
    """The experts that all tasks share."""

    def __init__(self, tasks: int, gate: Gate, experts: SlicedMLP) -> None:
        super().__init__()
        self.tasks, self.gate, self.experts = tasks, gate, experts

    def forward(self, x: Tensor) -> Routed:
        """The map (B, C, h, w[, d]) -> G_t as tokens (tasks, B, N, C), the same for all without task embeddings."""
        tokens = x.flatten(2).transpose(1, 2)
        probabilities, weights = self.gate(tokens)
        parts = (self.experts(tokens, weights), probabilities, weights)
        return Routed(*(part.expand(self.tasks, -1, -1, -1) for part in parts))


class FGMoE(nn.Module):
    """From fused features to features of each task.

    Args:
        channels: C, of the features.
        tasks: names, each with a path of its own.
        spatial_dims: 2 or 3.
        hidden: H, of each task's MLP. Defaults to 4 C.
        num_slices: m, routed slices of that MLP; H must be a multiple.
        top_k: routed slices that each token keeps, 1 to m.
        num_shared: further slices of the same size that are always on.
        residual: whether what a task's mixer gives is added to what its slices make of it.
        renormalize: whether the kept gates are scaled to sum to 1.
        granularity: "token": each token has its gates; "image": all tokens of an image share them.
        global_experts: of the global mixture, each of the size of a slice; 0 for none.
        global_top_k: of them for each token; ``None`` keeps all.
        task_embedding: whether the global gate sees which task it is for.
        mixer: "deformable" (in 2-D; in 3-D the same as "convolution"), "convolution" or "none", see :class:`Mixer`.
        balance_weight: of the balance loss; 0 for none.
        execution: "auto", "dense" or "gather", see :class:`SlicedMLP`; none changes the result.

    Raises:
        ConfigError: for a setting that is unknown or out of range.
    """

    def __init__(
        self,
        channels: int,
        tasks: Sequence[str],
        spatial_dims: int = 2,
        hidden: int | None = None,
        num_slices: int = 8,
        top_k: int = 4,
        num_shared: int = 1,
        residual: bool = True,
        renormalize: bool = False,
        granularity: str = "token",
        global_experts: int = 4,
        global_top_k: int | None = None,
        task_embedding: bool = True,
        mixer: str = "deformable",
        balance_weight: float = 1e-4,
        execution: str = "auto",
    ) -> None:
        super().__init__()
        hidden = 4 * channels if hidden is None else hidden
        if not tasks or len(set(tasks)) < len(tasks):
            raise ConfigError(f"tasks={list(tasks)}: expected at least one name, and no name twice")
        if spatial_dims not in (2, 3):
            raise ConfigError(f"spatial_dims={spatial_dims}: 2 or 3 is expected")
        check_settings(
            {
                "hidden": (hidden, whole(1)),
                "num_slices": (num_slices, whole(1)),
                "num_shared": (num_shared, whole(0)),
                "global_experts": (global_experts, whole(0)),
                "balance_weight": (balance_weight, number(least=0)),
            }
        )
        if hidden % num_slices:
            raise ConfigError(f"hidden={hidden}: expected a multiple of num_slices={num_slices}")
        if global_top_k is not None and not global_experts:
            raise ConfigError(
                f"global_top_k={global_top_k} but global_experts=0: there is none to keep. Leave global_top_k out, or "
                "have global experts"
            )
        check_settings(
            {
                "top_k": (top_k, whole(1, num_slices, "the number of slices")),
                "global_top_k": (global_top_k, optional(whole(1, global_experts, "the number of them"))),
            }
        )
        one_of("granularity", granularity, GRANULARITIES)
        one_of("mixer", mixer, MIXERS)
        one_of("execution", execution, EXECUTIONS)
        self.tasks, self.balance_weight, self.recording = tuple(tasks), balance_weight, False
        self.last: list[tuple[str, int, Tensor]] = []
        self.norm = nn.LayerNorm(channels)
        width = hidden // num_slices

        def path() -> TaskMoE:
            gate = Gate(channels, num_slices, top_k, renormalize, granularity)
            experts = SlicedMLP(channels, width, num_slices, num_shared, top_k, execution)
            mixing = nn.Identity() if mixer == "none" else Mixer(channels, spatial_dims, mixer)
            return TaskMoE(mixing, gate, experts, residual)

        # The prefix keeps names such as "type" apart from the attributes of a module.
        self.paths = nn.ModuleDict({f"task_{name}": path() for name in self.tasks})
        self.shared: GlobalMoE | None = None
        if global_experts:
            kept = global_experts if global_top_k is None else global_top_k
            embedded = len(tasks) if task_embedding else 0
            gate = Gate(channels, global_experts, kept, renormalize, granularity, embedded)
            experts = SlicedMLP(channels, width, global_experts, 0, kept, execution)
            self.shared = GlobalMoE(len(tasks), gate, experts)

    def forward(self, features: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Fused features (B, C, h, w[, d]) -> features of the same shape for each task, and auxiliary losses.

        Returns:
            features of each task, in their order; and ``{"fgmoe_balance": scalar}``, already weighted, summed over the
            tasks: of the slices' gates, and of the global gates where these do not keep all experts. It is there in
            training only, and without ``balance_weight`` not at all.
        """

        def on_grid(tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).unflatten(2, features.shape[2:])

        x = self.norm(features.movedim(1, -1)).movedim(-1, 1)
        own = [path(x) for path in self.paths.values()]
        results, balanced = [y.tokens for y in own], [y.probabilities for y in own]
        gates = [(task, 0, y.weights) for task, y in zip(self.tasks, own, strict=True)]
        if self.shared is not None:
            common = self.shared(x)
            results = [y + g for y, g in zip(results, common.tokens, strict=True)]
            balanced += common.probabilities if self.shared.gate.sparse else []
            gates += [(task, 1, weights) for task, weights in zip(self.tasks, common.weights, strict=True)]
        if self.recording:
            self.last = [(task, part, on_grid(w.detach()).to("cpu", torch.float32)) for task, part, w in gates]
        auxiliary = {}
        if self.training and self.balance_weight:
            loss = torch.stack([squared_variation(p.mean((0, 1))) for p in balanced]).sum()
            auxiliary["fgmoe_balance"] = self.balance_weight * loss
        return {task: on_grid(y) for task, y in zip(self.tasks, results, strict=True)}, auxiliary

    def gates(self) -> list[Gates]:
        """What each token kept in the last forward pass, (B, n, h, w[, d]); empty unless :attr:`recording` is set.

        For each task its routed slices (site 0, part "slices"), then for each the global experts (site 1, "global").
        """
        return [
            Gates(
                "fgmoe",
                task,
                part,
                PARTS[part],
                maps,
                tuple(f"{PARTS[part].removesuffix('s')} {i}" for i in range(maps.shape[1])),
            )
            for task, part, maps in self.last
        ]

    def routing(self) -> list[RoutingRecord]:
        """The gates of the last forward pass, summed up for each task: its slices (site 0), the global experts (1)."""
        return summed_up(self.gates())
