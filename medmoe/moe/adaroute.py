# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""AdaRoute, since its second version called ParaX: Parameters as Experts: Adapting Vision Models with Dynamic Parameter
Routing (Lou, Yu, Yu; arXiv 2602.06862, ICML 2026). The paper's method, as its public code (LMMMEng/ParaX) defines it.

An adapter stands behind a frozen layer. Its weights are not its own: the layers of a stage share a *center* of M
candidates of each weight, and a router mixes them anew for every image. For patch tokens s (N, C) of one image:

    x   = s + gamma LN(s);   x = x + DW3(x)                             gamma from 1e-5, DW3 static and depthwise
    g_p = softmax(Linear(GELU(Linear(mean over tokens of x))) / T)      M gates for each part p
    W_A = sum_m g_A[m] A[m],   W_B = sum_m g_B[m] B[m],   D_k = sum_m g_k[m] conv_k[m]
    z   = x W_A                                                                               (N, r)
    c_1 = D_3 * z;   c_2 = D_5 * (a_1 z + b_1 c_1);   c_3 = D_7 * (a_2 z + b_2 c_2)           depthwise, a = b = 1
    z   = z + sum_i softmax(Linear(c_1 + c_2 + c_3))[i] c_i
    y   = GELU(z + Linear(z)) W_B;   y = y + DW3(y)
    out = l y + l' + q s + q'                                           l = q = 1 and l' = q' = 0, of C channels

Class token, registers and prompts neither enter nor change. There is no top-k and no balance loss. No weight starts at
zero, but the mean of M candidates is small: random tokens of a ViT-B's width change by 0.8 % at the start.

The trainable parameters of a stage of L layers of width C, with n kernels of side k and router width h, are

    center   M r (2 C + sum k^2)
    a layer  C (h + 7) + h + (n + 2) M (h + 1) + r (r + 1)  and with convolutions  20 C + n (r + 1) + 2 (n - 1)

where the n (r + 1) of the aggregation need n > 1. That is 3.098 M for ViT-B, and 2.775 M without convolutions. On a
Swin, with two adapters a block (:func:`wrap_swin`), it is 5.238 M for Swin-B; the paper also trains the norms of the
four outputs, 3,840 more, which together are its 5.24 M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medmoe.errors import ConfigError, check_settings, number, optional, whole
from medmoe.moe.routing import Gates, RoutingRecord, summed_up


def sharing(value: object) -> str:
    """The rule for ``centers``."""
    return "" if value == "stage" else whole(1)(value) and "'stage', or a whole number of layers of at least 1"


def sides(value: object) -> str:
    """The rule for ``kernels``."""
    good = isinstance(value, list | tuple) and not any(whole(1, 31)(side) or side % 2 == 0 for side in value)
    if good and len(set(value)) == len(value):  # type: ignore[call-overload, arg-type]
        return ""
    return "a list of different odd numbers from 1 to 31, such as [3, 5, 7], or [] for no convolutions"


@dataclass
class AdaRoute:
    """Puts an adapter with routed weights behind each layer of a frozen expert.

    Args:
        rank: r, the adapters' inner width; 0 leaves the expert as it is.
        kernels: sides of the dynamic convolutions, in order; () leaves out all convolutions, the static ones too. As in
            the released code z then doubles in place of its convolutions' aggregate.
        centers: which layers share a center: "stage", or how many consecutive layers of a stage at most. A plain
            vision transformer is one stage; 3 gives a ViT-B four centers.
        num_experts: M, candidates in a center; by default as many as layers share it, as in the paper. With 1 the
            adapters are static.
        router_width: hidden width of the routers.
        temperature: T; the gates become uniform as it grows.
        learn_temperature: train a temperature for each part of each layer, from ``temperature``.
        ls_init: where the scale l of the branch starts. The paper takes 1, and 1e-5 for Mask R-CNN on Swin-B.
        residual_scale: whether the residual has its scale q and bias q'; the same exception goes without.

    Raises:
        ConfigError: for a value out of its range.
    """

    rank: int = 128
    kernels: Sequence[int] = (3, 5, 7)
    centers: int | str = "stage"
    num_experts: int | None = None
    router_width: int = 16
    temperature: float = 1.0
    learn_temperature: bool = False
    ls_init: float = 1.0
    residual_scale: bool = True

    def __post_init__(self) -> None:
        check_settings(
            {
                "rank": (self.rank, whole(0)),
                "kernels": (self.kernels, sides),
                "centers": (self.centers, sharing),
                "num_experts": (self.num_experts, optional(whole(1))),
                "router_width": (self.router_width, whole(1)),
                "temperature": (self.temperature, number(above=0)),
                "ls_init": (self.ls_init, number()),
            }
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """The weights that are routed: the two projections, and the kernel of each dynamic convolution."""
        return ("A", "B", *(f"conv{k}" for k in self.kernels))

    def groups(self, stages: Sequence[range], name: str) -> list[range]:
        """The layers that share a center, in order.

        Raises:
            ConfigError: more layers are to share a center than any stage has.
        """
        if not isinstance(self.centers, int):
            return list(stages)
        longest = max(len(stage) for stage in stages)
        if self.centers > longest:
            raise ConfigError(
                f"centers={self.centers}: the longest stage of {name} has {longest} layers; expected 1 to {longest}, "
                "or 'stage'"
            )
        return [stage[i : i + self.centers] for stage in stages for i in range(0, len(stage), self.centers)]

    def attach(self, expert: Any) -> bool:
        """Sets the ``after`` of a :class:`medmoe.experts.Expert`; says whether anything now trains."""
        if self.rank == 0:
            return False
        expert.after = RoutedAdapters(self, expert.name or type(expert).__name__, expert.widths, expert.stages)
        return True


class RoutedAdapters(nn.Module):
    """The adapters of an expert and the centers that they share; a :class:`medmoe.moe.routing.Router`.

    Args:
        options: what they are like.
        receiver: name of the expert, for reports.
        widths: C of each layer.
        stages: runs of layers of one width on one grid.
        sites: adapters in each layer.
    """

    def __init__(
        self, options: AdaRoute, receiver: str, widths: Sequence[int], stages: Sequence[range], sites: int = 1
    ) -> None:
        super().__init__()
        self.receiver, self.recording = receiver, False
        self.last: dict[int, dict[str, Tensor]] = {}
        groups = options.groups(stages, receiver)
        self.centers = nn.ModuleList()
        self.layers = nn.ModuleList()
        self.center_of: list[int] = []
        for index, group in enumerate(groups):
            width, count = widths[group.start], options.num_experts or len(group)
            self.centers.append(center(options, width, count))
            self.layers.extend(RoutedAdapter(options, width, count) for _ in range(sites * len(group)))
            self.center_of += [index] * (sites * len(group))

    def forward(self, index: int, patches: Tensor) -> Tensor:
        """The patches (B, C, h, w) behind layer ``index`` as its adapter changes them; each image by itself."""
        experts = cast(nn.ParameterDict, self.centers[self.center_of[index]])
        patches, gates = self.layers[index](patches, experts)
        if self.recording:
            self.last[index] = {part: weights.detach() for part, weights in gates.items()}
        return patches

    def gates(self) -> list[Gates]:
        """The gates (B, M) of each layer and part in the last forward pass; empty unless ``recording`` is set."""
        return [
            Gates("adaroute", self.receiver, index, part, weights.float().cpu(), expert_names(weights.shape[1]))
            for index, parts in sorted(self.last.items())
            for part, weights in parts.items()
        ]

    def routing(self) -> list[RoutingRecord]:
        """The same, summed up for each layer over the images and parts."""
        return summed_up(self.gates())


def expert_names(count: int) -> tuple[str, ...]:
    """Names of the candidates in a center."""
    return tuple(f"expert{m}" for m in range(count))


def center(options: AdaRoute, width: int, count: int) -> nn.ParameterDict:
    """M candidates of each part: A (M, C, r), B (M, r, C), conv<k> (M, r, k, k)."""
    rank = options.rank
    shapes = {"A": (width, rank), "B": (rank, width)} | {f"conv{k}": (rank, k, k) for k in options.kernels}
    return nn.ParameterDict(
        {
            part: nn.init.trunc_normal_(nn.Parameter(torch.empty(count, *shape)), std=0.02)
            for part, shape in shapes.items()
        }
    )


class RoutedAdapter(nn.Module):
    """What one layer has of its own: the router, the static convolutions, and the small parameters.

    Args:
        options: what it is like.
        width: C of the tokens.
        count: M, candidates in its center.
    """

    def __init__(self, options: AdaRoute, width: int, count: int) -> None:
        super().__init__()
        self.parts, self.kernels = options.parts, options.kernels
        parts, rank, used = len(self.parts), options.rank, len(self.kernels)
        self.norm = nn.LayerNorm(width)
        self.norm_scale = nn.Parameter(torch.full((width,), 1e-5))
        self.router = nn.Sequential(
            nn.Linear(width, options.router_width), nn.GELU(), nn.Linear(options.router_width, parts * count)
        )
        sharpness = torch.full((parts,), -math.log(options.temperature))
        if options.learn_temperature:
            self.sharpness: Tensor = nn.Parameter(sharpness)
        else:
            self.register_buffer("sharpness", sharpness, persistent=False)
        static = [nn.Conv2d(width, width, 3, padding=1, groups=width) if used else None for _ in range(2)]
        self.before: Any = static[0]
        self.behind: Any = static[1]
        self.carry = nn.Parameter(torch.ones(2 * used - 2)) if used > 1 else None
        self.aggregate = nn.Linear(rank, used) if used > 1 else None
        self.proj = nn.Linear(rank, rank)
        self.scale = nn.Parameter(torch.full((width,), options.ls_init))
        self.bias = nn.Parameter(torch.zeros(width))
        self.residual_scale: nn.Parameter | None = None
        if options.residual_scale:
            self.residual_scale = nn.Parameter(torch.ones(width))
            self.residual_bias = nn.Parameter(torch.zeros(width))
        # Weights of linear layers and convolutions stay at PyTorch's default, which is the paper's: Kaiming-uniform.
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, patches: Tensor, experts: nn.ParameterDict) -> tuple[Tensor, dict[str, Tensor]]:
        """The changed patches and the gates (B, M) of each part, from patches (B, C, h, w)."""
        grid = patches.shape[-2:]
        s = patches.flatten(2).transpose(1, 2)
        x = s + self.scaled_norm(s)
        if self.before is not None:
            x = x + depthwise(x, grid, self.before.weight, self.before.bias)
        gates = self.route(x)
        z = routed(x, gates["A"], experts["A"])
        z = z + (self.dynamic(z, gates, experts, grid) if self.kernels else z)
        y = routed(F.gelu(z + self.proj(z)), gates["B"], experts["B"])
        out = self.scale * y + self.bias
        if self.behind is not None:
            # As scale (y + DW(y)), but the sum need not be kept for backward.
            weight, bias = self.scale.view(-1, 1, 1, 1) * self.behind.weight, self.scale * self.behind.bias
            out = out + depthwise(y, grid, weight, bias)
        out = out + (s if self.residual_scale is None else self.residual_scale * s + self.residual_bias)
        return out.to(patches.dtype).transpose(1, 2).unflatten(2, grid), gates

    def scaled_norm(self, s: Tensor) -> Tensor:
        """gamma LN(s); gamma is multiplied into the norm's own scale, so that LN(s) need not be kept for backward."""
        norm, gamma = self.norm, self.norm_scale
        return F.layer_norm(s, norm.normalized_shape, gamma * norm.weight, gamma * norm.bias, norm.eps)

    def route(self, x: Tensor) -> dict[str, Tensor]:
        """Gates (B, M) of each part in float32, whatever autocast says, from the mean of the tokens x (B, N, C)."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.router(x.mean(1, dtype=self.norm_scale.dtype)).unflatten(1, (len(self.parts), -1))
            weights = (logits * self.sharpness.exp()[:, None]).softmax(-1)
        return dict(zip(self.parts, weights.unbind(1), strict=True))

    def dynamic(self, z: Tensor, gates: dict[str, Tensor], experts: nn.ParameterDict, grid: Sequence[int]) -> Tensor:
        """The aggregate (B, N, r) of the dynamic convolutions of z (B, N, r), one behind the other."""
        batch, _, rank = z.shape
        # Each channel of each image has its own kernel: images become channels of one grouped convolution.
        z = z.transpose(1, 2).reshape(1, batch * rank, *grid)
        maps: list[Tensor] = []
        for i, k in enumerate(self.kernels):
            kernel = mixed(gates[f"conv{k}"], experts[f"conv{k}"]).reshape(batch * rank, 1, k, k)
            enters = z
            if self.carry is not None and i:
                enters = self.carry[2 * i - 2] * z + self.carry[2 * i - 1] * maps[-1]
            maps.append(F.conv2d(enters, kernel, padding=k // 2, groups=batch * rank))
        tokens = [each.view(batch, rank, -1).transpose(1, 2) for each in maps]
        if self.aggregate is None:
            return tokens[0]
        logits = self.aggregate(torch.stack(tokens).sum(0))
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(z.dtype)
        return torch.stack([weights[..., i, None] * each for i, each in enumerate(tokens)]).sum(0)


def depthwise(x: Tensor, grid: Sequence[int], weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise 3 x 3 convolution of tokens (B, N, C) that lie on a grid (h, w)."""
    out = F.conv2d(x.transpose(1, 2).unflatten(2, grid), weight, bias, padding=1, groups=len(weight))
    return out.flatten(2).transpose(1, 2)


def mixed(gates: Tensor, experts: Tensor) -> Tensor:
    """sum_m gates[b, m] experts[m]: (B, M) and (M, ...) -> (B, ...)."""
    return torch.einsum("bm,m...->b...", gates, experts)


def routed(x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """x[b] sum_m gates[b, m] experts[m]: tokens (B, N, C), gates (B, M), experts (M, C, D) -> (B, N, D).

    The mixed weights of all images, (B, C, D), are not kept for the backward pass: it mixes them again. For a layer of
    ViT-B on 8 images of 14 x 14 patches this keeps 22 instead of 28 MiB in float32, 11 instead of 19 in bfloat16; on
    the last stage of Swin-B, 7 x 7 patches, 7 instead of 15.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))  # as the product takes it: what is kept of it is half as large
    if mixes_weights(x.shape[1], experts.shape[0]):
        return checkpoint(mix_weights, x, gates, experts, use_reentrant=False, preserve_rng_state=False)
    return mix_results(x, gates, experts)


def mixes_weights(tokens: int, count: int) -> bool:
    """Whether mixing the weights first costs fewer multiplications than mixing the results of all M candidates.

    For an image and C D of them: weights first takes M + N forward, then M to mix again, and twice M + N for the
    gradients; results first takes M N three times. So it is weights first, but for M = 1, N = 1, and N = 2 with M < 4.
    """
    return 3 * tokens + 4 * count < 3 * tokens * count


def mix_weights(x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """:func:`routed` in the order N (sum_m g E)."""
    return x @ mixed(gates, experts)


def mix_results(x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """:func:`routed` in the order sum_m g (N E)."""
    each = torch.bmm(x.flatten(0, 1).expand(len(experts), -1, -1), experts).unflatten(1, x.shape[:2])
    return torch.einsum("bm,mbnd->bnd", gates, each)


class AdaptedSwinBlock(nn.Module):
    """A block of timm's Swin transformer with an adapter behind each of its two residuals, (B, H, W, C) -> the same."""

    def __init__(self, block: Any, adapters: RoutedAdapters, index: int) -> None:
        super().__init__()
        self.block, self.index = block, index
        # In a tuple, so that the adapters are registered once, in the model, and not in every block.
        self.shared = (adapters,)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        x = self.adapt(0, x + block.drop_path1(block._attn(block.norm1(x))))
        return self.adapt(1, x + block.drop_path2(block.mlp(block.norm2(x))))

    def adapt(self, half: int, x: Tensor) -> Tensor:
        """The tokens (B, H, W, C) behind the attention (0) or the MLP (1), as the adapter there changes them."""
        return self.shared[0](2 * self.index + half, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def wrap_swin(model: Any, adapter: AdaRoute) -> RoutedAdapters:
    """Freezes a timm ``SwinTransformer`` and adapts it as the paper does: two adapters in every block.

    The model is used as before, but a new input size has to be set before. Its adapters are ``model.after``. Both kinds
    share their stage's center, whose M is the number of the stage's blocks. Site 2 i is behind the attention of block
    i, site 2 i + 1 behind its MLP. The paper also trains the norms of the outputs and the head: these are the caller's
    to switch on.

    Raises:
        ConfigError: the adapter's rank is 0.
    """
    check_settings({"rank": (adapter.rank, whole(1))})
    model.requires_grad_(False)
    widths: list[int] = []
    stages: list[range] = []
    for stage in model.layers:
        stages.append(range(len(widths), len(widths) + len(stage.blocks)))
        widths += [block.dim for block in stage.blocks]
    model.after = RoutedAdapters(adapter, type(model).__name__, widths, stages, sites=2)
    for stage, run in zip(model.layers, stages, strict=True):
        stage.blocks = nn.Sequential(
            *(AdaptedSwinBlock(block, model.after, i) for block, i in zip(stage.blocks, run, strict=True))
        )
    return model.after
