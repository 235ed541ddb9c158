# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What a network costs: parameters by part, arithmetic, memory for the backward pass, size of a checkpoint.

Counted as floating point operations are matrix products, convolutions (deformable ones too) and attention, two for each
multiplication with its addition. Not counted are norms, activations, softmax, interpolation and other elementwise work,
nor what the data preparation does, such as the encoding of texts.

Counted as saved for the backward pass is every tensor that automatic differentiation still holds after the forward pass
of a training step, once for each memory block, without parameters and buffers. Copies of weights in half precision
count. What a fused kernel computes again is not saved: explicit attention, which a CPU runs here, saves its attention
maps, while the fused one of a GPU does not, so that the same network needs less there. Layers that nothing trainable
precedes save nothing.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from medmoe.conditions import Schema
from medmoe.networks.cache import FeatureCache

WHOLE = 224
"""Pixels that stand for an axis of the window that is taken whole, where no expert says how large its view is."""


@dataclass(frozen=True)
class Part:
    """What one part of a network costs.

    Attributes:
        trainable: parameters; of an expert, its adapters.
        frozen: parameters.
        flops: of one forward pass.
    """

    trainable: int = 0
    frozen: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Cost:
    """The cost card of a network, for one image.

    Attributes:
        image: (B, C, H, W[, D]), for which it holds.
        device: where it was measured.
        parts: by name: each expert, then what is trained around them (prompter, conditioner, decoder, tasks).
        saved_bytes: held for the backward pass after the forward pass of a training step.
        checkpoint_bytes: of a best checkpoint, without its settings (a few kB).
    """

    image: tuple[int, ...]
    device: str
    parts: dict[str, Part] = field(default_factory=dict)
    saved_bytes: int = 0
    checkpoint_bytes: int = 0

    @property
    def total(self) -> Part:
        """The sum of all parts."""
        parts = self.parts.values()
        return Part(sum(p.trainable for p in parts), sum(p.frozen for p in parts), sum(p.flops for p in parts))

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``total`` among them."""
        return {**asdict(self), "image": list(self.image), "total": asdict(self.total)}


def cost(network: nn.Module, image_shape: Sequence[int], condition: Mapping[str, Tensor] | None = None) -> Cost:
    """Measures a network with one forward pass as in prediction and one as in training; it is left as it was.

    Modes, buffers, feature caches, the routers' records and the random state are restored, and no gradient is computed.

    Args:
        network: on any device; a network with ``parts`` trains with that.
        image_shape: (B, C, H, W[, D]).
        condition: of the image, see :class:`medmoe.conditions.Schema`. By default one in which nothing is missing,
            where the network takes any.
    """
    device = next(iter([*network.parameters(), *network.buffers()])).device
    shape = tuple(image_shape)
    with untouched(network, device):
        given: list[Any] = [torch.rand(shape, device=device)]
        schema: Schema | None = getattr(network, "schema", None)
        if condition is None and schema is not None:
            condition = complete_condition(schema, shape)
        if condition is not None:
            given.append({name: value.to(device) for name, value in condition.items()})
        flops = count_flops(network, given)
        saved = count_saved(network, given)
    counts = count_parameters(network)
    parts = {
        name: Part(*counts.get(name, (0, 0)), flops.get(name, 0)) for name in [*counts, *(flops.keys() - counts.keys())]
    }
    return Cost(shape, str(device), parts, saved, len(save(trained_tensors(network, copy=True))))


def cost_card(network: nn.Module, roi_size: int | Sequence[int]) -> dict[str, Any]:
    """The cost of ``network`` for one window, in plain values for a record.

    Args:
        network: with ``spatial_dims``, ``in_channels`` and ``experts``.
        roi_size: (H, W[, D]) of the window, or one number for all axes. An axis that is taken whole (-1) counts as the
            largest view of an expert, in depth as one slice; the card says so in ``image``.
    """
    known: Any = network
    sides = [roi_size] * known.spatial_dims if isinstance(roi_size, int) else list(roi_size)
    view = max(getattr(expert, "image_size", WHOLE) for expert in known.experts)
    window = [side if side > 0 else (view if axis < 2 else 1) for axis, side in enumerate(sides)]
    return cost(network, (1, known.in_channels, *window)).to_json()


@contextmanager
def untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Whatever runs within leaves no trace in ``network`` or the random state, and always draws the same numbers."""
    meanwhile = (
        (network, "caches", [FeatureCache() for _ in getattr(network, "caches", ())]),
        (network, "condition_cache", FeatureCache()),
        (network, "recording", False),
        # That a batch of one is small for MoPE's importance loss says nothing of the training.
        (getattr(network, "conditioner", None), "warned", True),
    )
    changed = [(owner, name, getattr(owner, name), value) for owner, name, value in meanwhile if hasattr(owner, name)]
    modes = {module: module.training for module in network.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        try:
            for owner, name, _, value in changed:
                setattr(owner, name, value)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for owner, name, value, _ in changed:
                setattr(owner, name, value)


def complete_condition(schema: Schema, image_shape: Sequence[int]) -> dict[str, Tensor]:
    """A condition of ``image_shape[0]`` cases in which nothing is missing, all zeros or of the first category."""
    batch = image_shape[0]
    numbers, categories, texts = (len(schema.of_kind(kind)) for kind in ("number", "category", "text"))
    condition = {
        "numbers": torch.zeros(batch, numbers),
        "categories": torch.ones(batch, categories, dtype=torch.long),
        "text": torch.zeros(batch, texts, schema.text_width),
    }
    found = {name: value for name, value in condition.items() if value.shape[1]}
    if schema.of_kind("image"):
        found["image"] = torch.zeros(batch, schema.image_channels, *image_shape[2:])
    return found


def part_names(network: nn.Module) -> dict[str, str]:
    """Names of the parts by the beginning of their parameters' names: experts by their own, the others as they are."""
    found = {name: name for name, _ in network.named_children()}
    experts = list(getattr(network, "experts", ()))
    names = [getattr(expert, "name", "") or f"expert {k}" for k, expert in enumerate(experts)]
    twice = {name for name, count in Counter(names).items() if count > 1}
    found |= {f"experts.{k}": f"{name} ({k})" if name in twice else name for k, name in enumerate(names)}
    return found


def part_of(name: str, names: Mapping[str, str]) -> str:
    """The part to which the parameter or module ``name`` belongs."""
    first, second, *_ = [*name.split("."), "", ""]
    return names.get(f"{first}.{second}") or names.get(first) or "other"


def count_parameters(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters by part."""
    names = part_names(network)
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in network.named_parameters():
        part, size = part_of(name, names), parameter.numel()
        trainable, frozen = counts.get(part, (0, 0))
        trains = parameter.requires_grad
        counts[part] = (trainable + size * trains, frozen + size * (not trains))
    return counts


@torch.no_grad()
def count_flops(network: nn.Module, given: Sequence[Any]) -> dict[str, int]:
    """Floating point operations of one forward pass in evaluation mode, by part.

    An operation belongs to the part whose module was entered last: experts are run layer by layer, in part by
    functions, so that no module's call spans all that an expert does.
    """
    names = part_names(network)
    owners = {module: part_of(name, names) for name, module in network.named_modules() if name}
    counter = FlopCounter()

    def enter(module: nn.Module, _: Any) -> None:
        counter.part = owners.get(module, counter.part)

    network.eval()
    hook = register_module_forward_pre_hook(enter)
    try:
        with counter:
            network(*given)
    finally:
        hook.remove()
    return dict(counter.counts)


class FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's own formulas for all operators that run, by the :attr:`part` that is set meanwhile.

    PyTorch's FlopCounterMode uses the same formulas but follows modules by hooks on their inputs' gradients, which fail
    for parameters as inputs where gradients are off.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = "other", Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.counts[self.part] += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif str(packet) == "torchvision.deform_conv2d":  # as a plain convolution
            self.counts[self.part] += 2 * args[1].numel() * result.shape[0] * math.prod(result.shape[2:])
        return result


class Saved:
    """A tensor that the backward pass needs, in a box that tells by a weak reference whether it is still held."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def count_saved(network: nn.Module, given: Sequence[Any]) -> int:
    """Bytes that one forward pass in training mode holds for the backward pass.

    With activation checkpointing the inputs of what is computed again are held too, but not told to the hooks: the
    tokens between two sites are then missing here.
    """
    boxes: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        # Detached: an operation that saves its own output would hold itself through it, for ever.
        box = Saved(tensor.detach())
        boxes.add(box)
        return box

    network.train()
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda box: box.tensor):
        result = getattr(network, "parts", network)(*given)
    own = {block(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    held = {block(box.tensor): box.tensor.untyped_storage().nbytes() for box in boxes}
    del result  # it is what kept them
    return sum(size for address, size in held.items() if address not in own)


def block(tensor: Tensor) -> int:
    """The address of the memory that ``tensor`` looks at."""
    return tensor.untyped_storage().data_ptr()


def trained_tensors(network: nn.Module, copy: bool = False) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds: parameters that require a gradient, and buffers outside the experts.

    Args:
        network: whose live tensors these are.
        copy: as plain tensors on the CPU instead.
    """

    def changes(name: str, tensor: Tensor) -> bool:
        return tensor.requires_grad if isinstance(tensor, nn.Parameter) else not name.startswith("experts.")

    found = {name: tensor for name, tensor in network.state_dict(keep_vars=True).items() if changes(name, tensor)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()} if copy else found
