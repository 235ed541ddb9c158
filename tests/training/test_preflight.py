# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow, create_workflow

from medmoe.errors import ConfigError, DataError, MedMoEError
from medmoe.training.excepthook import ShortErrors, find_error, install
from medmoe.training.preflight import literal_settings, missing_paths
from medmoe.training.settings import RULES, nearest, problems

# The shape of a real bundle, small: settings, references inside expressions, components, a plain dict of them.
CONFIG: dict[str, Any] = {
    "_meta_": {},
    "imports": [
        "$from medmoe.training.preflight import preflight",
        "$from medmoe.training.preflight import literal_settings",
    ],
    "bundle_root": ".",
    "device": "$torch.device('cpu')",
    "dataset_dir": "data",
    "output_dir": "out",
    "checkpoint": "$@output_dir + '/best.safetensors'",
    "num_classes": 3,
    "spatial_dims": 2,
    "roi_size": "$[32] * @spatial_dims",
    "max_epochs": 2,
    "lr": 0.1,
    "fractions": {"train": 0.8, "validation": 0.2},
    "network_def": {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": "@num_classes", "kernel_size": 1},
    "train": {
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": "@roi_size"},
        "optimizer": {"_target_": "torch.optim.SGD", "params": "$@network_def.parameters()", "lr": "@lr"},
        "dataset": "$[@dataset_dir, @checkpoint, @fractions]",
        "trainer": "$(@train::optimizer, @train::inferer, @train::dataset, @max_epochs, @device)",
    },
    "initialize": ["$preflight(kind='train')", "$literal_settings()"],
    "run": ["$@train::trainer"],
}

Bundle = Callable[..., ConfigWorkflow]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "bundle.json").write_text(json.dumps(CONFIG))

    def make(*overlays: dict[str, Any], **overrides: Any) -> ConfigWorkflow:
        files = ["bundle.json"]
        for index, overlay in enumerate(overlays):
            files.append(f"overlay{index}.json")
            (tmp_path / files[-1]).write_text(json.dumps(overlay))
        return ConfigWorkflow(config_file=files, logging_file=False, **overrides)

    return make


def complaint(workflow: ConfigWorkflow) -> str:
    """What the user reads of the error that initialization ends with."""
    with pytest.raises(RuntimeError) as caught:
        workflow.initialize()
    error = find_error(caught.value)
    assert isinstance(error, ConfigError)
    return str(error)


def test_a_good_bundle_passes_and_tells_its_settings(bundle: Bundle) -> None:
    workflow = bundle(num_classes=5, **{"train#optimizer#momentum": 0.9})
    settings = workflow.initialize()[1]
    assert settings == {
        "bundle_root": ".",
        "dataset_dir": "data",
        "output_dir": "out",
        "checkpoint": "out/best.safetensors",
        "num_classes": 5,
        "spatial_dims": 2,
        "roi_size": [32, 32],
        "max_epochs": 2,
        "lr": 0.1,
        "fractions": {"train": 0.8, "validation": 0.2},
    }
    assert json.loads(json.dumps(settings)) == settings
    assert literal_settings(workflow.parser) == settings
    assert not os.path.exists("out")
    workflow.run()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_clases": 3}, "num_clases: nothing reads this key. Did you mean num_classes?"),
        ({"loging_file": "x"}, "loging_file: nothing reads this key. Did you mean logging_file?"),
        ({"zzz": 3}, "zzz: nothing reads this key. The settings there are: bundle_root, checkpoint, dataset_dir"),
        ({"train#optimiser": {}}, "train::optimiser: nothing reads this key. Did you mean optimizer?"),
        ({"train#optimizer#momentun": 0.9}, "train::optimizer::momentun: torch.optim.SGD takes no such argument."),
        ({"train#optimizer#momentun": 0.9}, "Did you mean momentum?"),
        ({"train#inferer#overlapp": 0.5}, "Did you mean overlap?"),
        ({"epochs": 3, "lrr": 1}, "epochs: nothing reads this key. Did you mean max_epochs?"),
        ({"epochs": 3, "lrr": 1}, "lrr: nothing reads this key. Did you mean lr?"),
    ],
)
def test_a_misspelt_override_names_the_nearest_key(bundle: Bundle, overrides: dict[str, Any], message: str) -> None:
    assert message in complaint(bundle(**overrides))


def test_a_misspelt_key_of_an_overlay_file_is_found_too(bundle: Bundle) -> None:
    assert "max_epoch: nothing reads this key. Did you mean max_epochs?" in complaint(bundle({"max_epoch": 7}))


def test_a_misspelt_key_does_not_vouch_for_itself(bundle: Bundle) -> None:
    extra = {"trainn": {"a": 1, "b": "@trainn::a"}}
    assert "trainn: nothing reads this key. Did you mean train?" in complaint(bundle(extra))


def test_a_key_may_be_declared_known(bundle: Bundle) -> None:
    overlay = {"train#trainer": "$(@device,)"}
    text = complaint(bundle(overlay))
    assert "max_epochs: nothing reads this key" in text
    assert "train::dataset" not in text, "a property of MONAI's"
    known = "['max_epochs', 'train::inferer', 'train::optimizer']"
    bundle({**overlay, "initialize": [f"$preflight(known={known})"]}).initialize()


def test_other_entry_points_are_not_taken_for_settings(bundle: Bundle) -> None:
    bundle({"train_it": ["$@train::trainer"]}, run_id="train_it").initialize()
    assert "train_it: nothing reads this key" in complaint(bundle({"train_it": ["$@train::trainer"]}))


def test_all_problems_are_told_at_once(bundle: Bundle) -> None:
    text = complaint(bundle(num_classes=1, spatial_dims=4, lr=-1, dataset_dir="nowhere", max_epoch=3))
    for name in ("num_classes: found 1", "spatial_dims: found 4", "lr: found -1", "no 'nowhere'", "max_epoch:"):
        assert name in text
    assert f"Relative paths count from the current folder, {Path.cwd()}" in text
    assert "--dataset_dir DIR" in text


def test_an_expression_that_fails_is_named(bundle: Bundle) -> None:
    text = complaint(bundle(roi_size="$[32] * @spatial_dim"))
    assert "roi_size: '$[32] * @spatial_dim' cannot be worked out" in text
    assert "spatial_dim" in text.split("worked out")[1]


@pytest.mark.parametrize(("kind", "names"), [("evaluate", ["checkpoint"]), ("inference", ["input", "checkpoint"])])
def test_each_kind_of_run_has_its_paths(bundle: Bundle, kind: str, names: list[str], tmp_path: Path) -> None:
    overlay = {"initialize": [f"$preflight(kind='{kind}')", "$@input"], "input": None}
    text = complaint(bundle(overlay))
    assert all(f"{name}: " in text for name in names)
    for folder in ("out", "scans"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / "best.safetensors").touch()
    bundle(overlay, input="scans").initialize()


def test_nothing_is_built_before_the_checks(bundle: Bundle) -> None:
    workflow = bundle(num_clases=3)
    complaint(workflow)
    built = workflow.parser.ref_resolver.resolved_content
    assert not [id for id in built if id.startswith(("network_def", "train"))]


def test_an_output_dir_that_is_a_file(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    text = complaint(bundle(output_dir="taken/run"))
    assert f"output_dir: {tmp_path / 'taken'} is a file, expected a folder" in text


AGE, NOTE = {"name": "age", "kind": "number"}, {"name": "note", "kind": "text"}
GOOD: dict[str, Any] = {
    "seed": 3,
    "spatial_dims": 3,
    "num_classes": 2,
    "class_names": ("background", "polyp"),
    "label_threshold": None,
    "intensity": [0, 255],
    "spacing": [1.0, 1, 2.5],
    "roi_size": [96, 96, -1],
    "lr": 1e-3,
    "resume": True,
    "general": "timm/vit_small_patch16_224",
    "medical": None,
    "text_encoder": "",
    "fusion": "late",
    "split": "test",
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed: found -1, expected a whole number of at least 0"),
        ({"seed": True}, "seed: found True"),
        ({"num_classes": 2.0}, "num_classes: found 2.0"),
        ({"spatial_dims": True}, "spatial_dims: found True, expected one of 2, 3"),
        ({"lr": float("nan")}, "lr: found nan, expected a number above 0"),
        ({"lr": "1e-3x"}, "lr: found '1e-3x'"),
        ({"resume": "true"}, "resume: found 'true', expected True or False"),
        ({"mope_options": {"temprature": 1}}, "Did you mean temperature?"),
        ({"fusion": "gatd"}, "expected one of concat, mean, gated, late. Did you mean gated?"),
        ({"dispatch": "softmax"}, "Did you mean soft?"),
        ({"form": "residuals"}, "Did you mean residual?"),
        ({"exchange": "activation"}, "Did you mean activations?"),
        ({"precision": "bf-16"}, "Did you mean bf16?"),
        ({"intensity": "percentil"}, "Did you mean percentile?"),
        ({"intensity": [5, 1]}, "expected a window of two numbers, the lower first"),
        ({"medical": "lite_medsm"}, "lite_medsam"),
        ({"general": 3}, "general: found 3"),
        ({"spacing": [1, 0, 1]}, "spacing: found [1, 0, 1], expected a number above 0"),
        ({"roi_size": [96, 96]}, "roi_size: found [96, 96], expected 3 values, because spatial_dims is 3"),
        ({"roi_size": [96, 96, 0]}, "roi_size: found [96, 96, 0], expected a whole number of at least 1"),
        ({"class_names": ["polyp"]}, "expected 2 names, because num_classes is 2"),
        ({"class_names": ["a", "a"]}, "expected a list of different names"),
        ({"class_names": "ab"}, "expected a list of different names"),
        ({"warmup": None}, "warmup: found None"),
        ({"overlap": 1}, "overlap: found 1, expected a number of at least 0 below 1"),
        ({"site_range": [4, 2]}, "site_range: found [4, 2], expected a first and a last number"),
        ({"general": "", "medical": ""}, "general and medical: found neither"),
        ({"general_size": 20}, "general_size: found 20, expected at least 32: timm/vit_small_patch16_224 cuts images"),
        ({"num_prompts": 0}, "expected a whole number of at least 1 (for no prompts: --prompter none)"),
        ({"prompter": "vtp"}, "expected one of pmoe, vpt, none. Did you mean vpt?"),
        (
            {"dispatch": "topk", "prompter": "pmoe", "num_prompts": 2, "top_k": 261},
            "top_k: found 261, expected 1 to 260",
        ),
        ({"decoder": "fgmoe", "fgmoe_slices": 4, "fgmoe_top_k": 5}, "fgmoe_top_k: found 5, expected 1 to 4"),
        (
            {"decoder": "fgmoe", "fgmoe_slices": 3, "decoder_channels": 4},
            "fgmoe_slices: found 3, expected a divisor of 16",
        ),
        ({"tasks": "organs"}, "tasks: found 'organs', expected a list of objects with name, kind and names"),
        (
            {"tasks": [{"name": "a", "kind": "image", "names": ["b"]}]},
            "tasks: task 1 (a): names: found ['b'], expected",
        ),
        ({"conditions": [{"name": "age"}]}, "conditions: condition 1 (age): kind is None, expected one of number, "),
        ({"conditions": [NOTE]}, "text_encoder: found none, expected a name or path for transformers: note is a text"),
        ({"conditions": [AGE], "prompt_general": False}, "conditions: they enter through prompts, but no expert is"),
        ({"conditions": [AGE], "condition_expert": 1}, "condition_expert: found 1, expected 0 to 0: the experts are"),
        ({"missing_conditions": 1.5}, "missing_conditions: found 1.5, expected a number from 0 to 1"),
        ({"adaroute_kernels": [4]}, "adaroute_kernels: found [4], expected a list of odd sizes"),
        ({"resize": [64, 64]}, "resize: found [64, 64], expected 3 values, because spatial_dims is 3"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    assert problems(GOOD) == []
    found = problems({**GOOD, **wrong})
    assert len(found) == 1 and message in found[0], found


def test_every_rule_refuses_an_object_and_says_what_it_wants() -> None:
    for name, rule in RULES.items():
        assert rule(object()), name


def test_nearest_is_silent_about_strangers() -> None:
    assert nearest("lora_rnk", ["lora_rank", "lr"]) == "Did you mean lora_rank?"
    assert nearest("zebra", ["lora_rank", "lr"]) == ""


def wrapped(error: Exception) -> RuntimeError:
    """As MONAI does: an expression inside a component."""
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("Failed to evaluate ConfigExpression") from inner
    except RuntimeError as middle:
        try:
            raise RuntimeError("Failed to instantiate component") from middle
        except RuntimeError as outer:
            return outer


def test_our_error_is_found_under_the_wrappers() -> None:
    ours = DataError("three cases")
    assert find_error(wrapped(ours)) is ours
    assert find_error(wrapped(ValueError("x"))) is None
    try:
        try:
            raise ours
        except MedMoEError:
            raise KeyError("a mistake while an error was handled") from None
    except KeyError as mistake:
        assert find_error(mistake) is None


def test_the_hook_prints_the_message_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path / "other")
    install(tmp_path)
    hook = sys.excepthook
    assert isinstance(hook, ShortErrors) and not isinstance(hook.previous, ShortErrors)
    error = wrapped(DataError("case 7 has no label"))
    with pytest.raises(SystemExit) as end:
        hook(type(error), error, error.__traceback__)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Error: case 7 has no label\n") and "Traceback" not in printed
    log = (tmp_path / "error.log").read_text()
    assert "Traceback" in log and "Failed to instantiate component" in log
    assert str(tmp_path / "error.log") in printed


def test_the_hook_leaves_other_errors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda *args: seen.append(args))
    install(tmp_path)
    error = wrapped(ValueError("x"))
    sys.excepthook(type(error), error, None)
    assert seen == [(type(error), error, None)] and not list(tmp_path.iterdir())


def test_none_on_the_command_line_is_not_lost_in_silence(bundle: Bundle, tmp_path: Path) -> None:
    bundle()
    with pytest.raises(RuntimeError) as caught:
        create_workflow(config_file="bundle.json", logging_file=False, roi_size=None)
    assert "roi_size: MONAI ignores None here" in str(find_error(caught.value))
    assert "Write --roi_size '$None'" in str(find_error(caught.value))
    with pytest.raises(RuntimeError) as caught:
        create_workflow(config_file="bundle.json", logging_file=False, roi_size="$None")
    assert "roi_size: found None" in str(find_error(caught.value)), "it arrives, and is refused for what it is"


def test_weights_by_file_have_to_be_there() -> None:
    assert missing_paths({"general_weights": "random", "medical_weights": None}, []) == []
    assert "general_weights: there is no 'w.pt'" in missing_paths({"general_weights": "w.pt"}, [])[0]


def test_a_table_need_not_be_given_to_predict_but_has_to_be_there(bundle: Bundle, tmp_path: Path) -> None:
    for folder in ("out", "scans"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / "best.safetensors").touch()
    overlay = {"initialize": ["$preflight(kind='inference')", "$(@input, @table)"], "input": "scans", "table": None}
    bundle(overlay).initialize()
    text = complaint(bundle(overlay, table="ages.csv"))
    assert "table: there is no 'ages.csv'. Give a CSV file with a row for each input, or nothing" in text
    (tmp_path / "ages.csv").touch()
    bundle(overlay, table="ages.csv").initialize()


@pytest.mark.slow
def test_on_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    bundle()
    (tmp_path / "args.json").write_text(json.dumps({"config_file": "bundle.json", "num_labeled": 8}))
    command = [sys.executable, "-m", "monai.bundle", "run", "--args_file", "args.json", "--max_epoch", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "max_epoch: nothing reads this key. Did you mean max_epochs?" in done.stderr
    assert "num_labeled: nothing reads this key." in done.stderr
    assert "Traceback" not in done.stderr


def test_what_an_option_of_a_method_says_counts() -> None:
    """A hidden width of its own decides which slices can be cut, a number of patches how many tokens there are."""
    fgmoe = {"decoder": "fgmoe", "decoder_channels": 64, "fgmoe_slices": 7}
    assert "expected a divisor of 256" in problems(fgmoe)[0]
    assert problems({**fgmoe, "fgmoe_options": {"hidden": 84}}) == []
    topk = {"prompter": "pmoe", "dispatch": "topk", "num_prompts": 2, "top_k": 30, "general": "dinov2_vits14"}
    assert problems(topk) == []
    assert "expected 1 to 8" in problems({**topk, "pmoe_options": {"max_patches": 4}})[0]
