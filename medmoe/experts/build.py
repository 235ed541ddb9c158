# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""From a name to a frozen expert with its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from medmoe.errors import ExpertError
from medmoe.experts import catalog, weights
from medmoe.experts.base import Expert
from medmoe.experts.tiny_vit import TinyViTExpert, fold_batch_norms
from medmoe.experts.vit import ViTExpert

logger = logging.getLogger(__name__)

RANDOM = "random"


def load_expert(
    name: str,
    image_size: int | None = None,
    weights_file: str | Path | None = None,
    channels: Sequence[int] | None = None,
) -> Expert:
    """A frozen expert by name.

    Args:
        name: of the catalog (``medmoe experts list``), or ``timm/MODEL`` for any plain vision transformer of timm.
        image_size: pixels of the longest side of its view. Defaults to what the catalog or timm says.
        weights_file: where to read the weights instead of the cache or the hub; "random" leaves them random, which is a
            control experiment, not an expert.
        channels: which three image channels it sees, for images with more than three.

    Raises:
        ExpertError: for an unknown name, weights that are not there, damaged, or do not fit.
    """
    if name.startswith("timm/"):
        return timm_expert(name, image_size, weights_file, channels)
    entry = catalog.entry(name)
    size = image_size or entry.image_size
    expert: Expert
    if entry.architecture == "tiny_vit":
        expert = TinyViTExpert(size, channels=channels)
    else:
        assert entry.timm_model and entry.mean and entry.std
        expert = ViTExpert(timm_model(entry.timm_model), size, entry.mean, entry.std, channels=channels)
    expert.name, expert.domain = entry.name, entry.domain
    if weights_file == RANDOM:
        return expert
    path = Path(weights_file) if weights_file else weights.cached_weights(name)
    tensors = weights.read_weights(path)
    if entry.architecture == "tiny_vit":
        prefix = "image_encoder."
        tensors = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)} or tensors
        tensors = fold_batch_norms(tensors)
    weights.load_strict(expert.vit if isinstance(expert, ViTExpert) else expert, tensors, f"{name} ({path})")
    expert.sha256 = weights.sha256_of(path)
    return expert


def timm_model(name: str, **options: Any) -> nn.Module:
    """A timm model without its classification head, for any input size."""
    import timm

    try:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise ExpertError(f"timm cannot make {name!r}: {error}") from error


def timm_expert(
    name: str, image_size: int | None, weights_file: str | Path | None, channels: Sequence[int] | None
) -> ViTExpert:
    """A vision transformer of timm, with weights from a file, from the hub, or random."""
    import timm

    vit = timm_model(name.removeprefix("timm/"), pretrained=weights_file is None)
    config = timm.data.resolve_data_config(model=vit)
    expert = ViTExpert(vit, image_size or config["input_size"][-1], config["mean"], config["std"], channels=channels)
    expert.name = name
    if weights_file == RANDOM:
        return expert
    if weights_file is not None:
        load_timm(vit, Path(weights_file))
    expert.sha256 = weights.checksum(vit.state_dict())
    return expert


def load_timm(vit: Any, path: Path) -> None:
    """Fills ``vit`` from a file in timm's format or in an original one that timm converts (DINOv2, CLIP, MAE, ...).

    Tensors of the file that the backbone has no place for, such as a classification head, are left out. The other way
    round there is no mercy, where timm itself passes over what is missing: every tensor of ``vit`` is filled.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    tensors = checkpoint_filter_fn(weights.read_weights(path), vit, adapt_layer_scale=True)
    own = vit.state_dict()
    unused = sorted(key for key in tensors if key not in own)
    if unused:
        logger.info("%s: %d tensors are not used, such as %s", path, len(unused), unused[0])
    weights.load_strict(vit, {key: tensor for key, tensor in tensors.items() if key in own}, str(path))
