# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Rules for the source as a whole. That imports run downwards is left to import-linter (pyproject.toml)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "medmoe").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("data_scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
EVERYTHING = [*PACKAGE, *SCRIPTS, *sorted((ROOT / "tests").rglob("*.py"))]
HEADER = "# Copyright (c) medmoe contributors\n# SPDX-License-Identifier: Apache-2.0\n"
LONGEST = 450
WEIGHTS = "medmoe/experts/weights.py"

CODE_IN_DATA = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system",
    "os.popen",
    "pickle.loads",
    "shutil.unpack_archive",
    "torch.hub.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dangers(source: str, name: str) -> list[str]:
    """Where a source file could run code that came from outside, as ``name:line what``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for what in _dangers(node, name):
            found.append(f"{name}:{getattr(node, 'lineno', 0)} {what}")
    return found


def _dangers(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in CODE_IN_DATA)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (node.module for _ in [0] if node.module.split(".")[0] in CODE_IN_DATA)
        yield from (
            f"{node.module}.{a.name}" for a in node.names if f"{node.module}.{a.name}" in CALLS | {"torch.load"}
        )
    elif isinstance(node, ast.Name) and node.id in BUILTINS:
        yield node.id
    elif isinstance(node, ast.Attribute) and node.attr == "extractall":
        yield "extractall"
    elif isinstance(node, ast.Call):
        yield from _dangerous_call(node, name)


def _dangerous_call(node: ast.Call, name: str) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in CALLS:
        yield called
    if called == "torch.load" and (name != WEIGHTS or given.get("weights_only") != "True"):
        yield "torch.load"
    if given.get("shell", "False") != "False":
        yield "shell=True"
    if given.get("allow_pickle", "False") != "False":
        yield "allow_pickle"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("def f():\n    import marshal as m", "marshal"),
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("tar.extractall(path)", "extractall"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("os.system(text)", "os.system"),
        ("yaml.load(file)", "yaml.load"),
        ("from yaml import load", "yaml.load"),
        ("torch.load(file, weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("np.load(file, allow_pickle=True)", "allow_pickle"),
    ],
)
def test_the_search_for_dangers_finds_them(source: str, what: str) -> None:
    line = source.count("\n") + 1
    assert dangers(source, "medmoe/x.py") == [f"medmoe/x.py:{line} {what}"]


def test_the_search_for_dangers_lets_good_code_pass() -> None:
    good = "model.eval()\nyaml.safe_load(f)\nnp.load(f)\ntorch.compile(m)\nsubprocess.run(['ls'], shell=False)"
    assert dangers(good, "medmoe/x.py") == []
    assert dangers("torch.load(f, weights_only=True)", WEIGHTS) == []
    assert dangers("torch.load(f, weights_only=False)", WEIGHTS) == [f"{WEIGHTS}:1 torch.load"]


def test_no_code_from_data() -> None:
    assert len(PACKAGE) > 10
    assert [danger for path in PACKAGE + SCRIPTS for danger in dangers(path.read_text(), relative(path))] == []


def test_every_file_has_the_license_header() -> None:
    assert [relative(path) for path in EVERYTHING if not path.read_text().startswith(HEADER)] == []


def test_no_file_is_too_long() -> None:
    lengths = {relative(path): path.read_text().count("\n") for path in EVERYTHING}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import medmoe", ["torch", "monai", "mlflow", "peft", "timm"]),
        ("import medmoe.experts, medmoe.moe", ["monai", "ignite", "mlflow", "peft", "timm", "onnx", "matplotlib"]),
        ("import medmoe.networks", ["monai", "ignite", "mlflow", "matplotlib"]),
    ],
)
def test_imports_stay_cheap(statement: str, forbidden: list[str]) -> None:
    """``import medmoe`` has to cost little over ``import torch``: the heavy packages come where they are used."""
    script = f"import sys\n{statement}\nprint([name for name in {forbidden} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
