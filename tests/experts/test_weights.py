# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Weights are read whole and verified, or not at all, and never run code."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medmoe.errors import ExpertError
from medmoe.experts import catalog, weights


def state() -> dict[str, torch.Tensor]:
    return {"b": torch.randn(3), "a.weight": torch.randn(4, 2)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_round_trip_with_the_right_hash(tmp_path: Path, suffix: str) -> None:
    tensors = state()
    path = saved(tmp_path / f"w{suffix}", tensors)
    read = weights.read_weights(path, hashlib.sha256(path.read_bytes()).hexdigest().upper())
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_a_wrong_hash_is_refused_before_parsing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / f"w{suffix}", state())
    for reader in ("load_file", "torch"):
        monkeypatch.setattr(weights, reader, None)
    with pytest.raises(ExpertError, match=f"sha256 is {weights.sha256_of(path)}.*expected {'ab' * 32}"):
        weights.read_weights(path, "ab" * 32)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.97])
def test_a_truncated_file_is_named(tmp_path: Path, suffix: str, keep: float) -> None:
    path = saved(tmp_path / f"w{suffix}", {"a": torch.randn(500)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ExpertError, match=rf"(?i)w{suffix}.*get it again"):
        weights.read_weights(path)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_garbage_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(os.urandom(2000))
    with pytest.raises(ExpertError, match=r"(?i)get it again"):
        weights.read_weights(path)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, suffix: str, legacy: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / f"w{suffix}"
    if legacy:
        path.write_bytes(pickle.dumps({"a": Evil(canary)}, protocol=2))
    else:
        torch.save({"a": torch.zeros(2), "evil": Evil(canary)}, path)
    with pytest.raises(ExpertError):
        weights.read_weights(path)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Evil(canary)))
    assert canary.exists(), "the canary does not sing: this test could not fail"


def test_missing_file_and_foreign_suffix(tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="there is no weights file"):
        weights.read_weights(tmp_path / "none.safetensors")
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(ExpertError, match=r"ending in \.safetensors"):
        weights.read_weights(tmp_path / "w.onnx")


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_wrapped_state_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    tensors = state()
    torch.save({wrapper: tensors, "epoch": 3}, tmp_path / "w.pth")
    assert weights.read_weights(tmp_path / "w.pth").keys() == tensors.keys()


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"epoch": 3, "a": torch.zeros(1)}, [torch.zeros(1)]])
def test_anything_but_named_tensors_is_described(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ExpertError, match=r"holds .*expected tensors by name"):
        weights.read_weights(tmp_path / "w.pth")


def test_the_hash_is_read_once_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert weights.sha256_of(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as context:
        context.setattr("builtins.open", None)
        assert weights.sha256_of(str(path)) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two, longer")
    assert weights.sha256_of(path) == hashlib.sha256(b"two, longer").hexdigest()


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_strict_load_fills_everything() -> None:
    source, target = small_network(), small_network()
    tensors = {name: torch.rand_like(t.float()) for name, t in source.state_dict().items() if "num_batches" not in name}
    weights.load_strict(target, tensors, "these weights")
    loaded = target.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_partial_load_is_refused_and_changes_nothing() -> None:
    network = small_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    tensors = {name: torch.rand_like(tensor.float()) for name, tensor in before.items()}
    tensors["extra.weight"] = torch.zeros(1)
    tensors["2.weight"] = torch.zeros(5, 4)
    del tensors["1.running_mean"]
    with pytest.raises(ExpertError) as caught:
        weights.load_strict(network, tensors, "some.pth")
    message = str(caught.value)
    assert "some.pth does not fit Sequential" in message
    assert "1 missing: 1.running_mean" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of another shape: 2.weight is (5, 4), expected (2, 4)" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDMOE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MEDMOE_CACHE")
    assert weights.cache_dir() == tmp_path / "xdg" / "medmoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_dir() == tmp_path / ".cache" / "medmoe"


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_an_empty_cache_says_what_to_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExpertError) as caught:
        weights.cached_weights(name, tmp_path)
    assert f"medmoe experts fetch {name}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    path = weights.weights_path("lite_medsam", tmp_path)
    path.parent.mkdir(parents=True)
    save_file(state(), path)
    with pytest.raises(ExpertError, match=r"sha256 is .* expected .*medmoe experts fetch lite_medsam"):
        weights.cached_weights("lite_medsam", tmp_path)


def test_unknown_experts_give_the_nearest_names() -> None:
    with pytest.raises(ExpertError, match=r"'dinov2_vits_14'.*Nearest: dinov2_vits14.*timm/"):
        catalog.entry("dinov2_vits_14")
    with pytest.raises(ExpertError, match=r"'LiteMedSAM'.*Nearest: lite_medsam"):
        catalog.entry("LiteMedSAM")
    with pytest.raises(ExpertError, match=r"'\.\./\.\./etc'"):
        weights.cached_weights("../../etc")


def test_the_catalog_is_complete() -> None:
    for name, chosen in catalog.CATALOG.items():
        assert chosen.name == name
        assert chosen.domain in ("general", "medical")
        hashes = {chosen.sha256, chosen.source.sha256, chosen.source.member_sha256}
        assert len(hashes) == 3
        assert all(len(digest) == 64 and int(digest, 16) for digest in hashes)
        assert chosen.license and chosen.caveat
