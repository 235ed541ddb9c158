# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The tests on real data cannot pass by not running: unset is reported by name, and a wrong folder is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INNER = """
import os

def test_with_real_data(shared):
    assert shared.is_dir()

def test_without():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "medmoe-test-cache" in os.environ["MEDMOE_CACHE"]
    assert "MLFLOW_TRACKING_URI" not in os.environ
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with our conftest and one test of each tier."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_inner.py").write_text(INNER)
    return tmp_path


def pytest_in(folder: Path, shared: str | None) -> tuple[int, str]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://nowhere", "MEDMOE_CACHE": "/nowhere"}
    environment.pop("MEDMOE_SHARED", None)
    if shared is not None:
        environment["MEDMOE_SHARED"] = shared
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_unset_is_reported_by_name(run: Path) -> None:
    code, output = pytest_in(run, None)
    assert code == 0 and "1 passed, 1 skipped" in output
    assert "MEDMOE_SHARED is not set: real-data tier not run (1 tests)" in output
    assert "\ntest_inner.py::test_with_real_data\n" in output


def test_a_missing_folder_is_an_error(run: Path) -> None:
    code, output = pytest_in(run, str(run / "nowhere"))
    assert code == 1 and "1 passed, 1 error" in output and "there is no folder" in output
    (run / "half" / "weights").mkdir(parents=True)
    code, output = pytest_in(run, str(run / "half"))
    assert code == 1 and f"there is no folder {run / 'half' / 'data'}" in output


def test_a_whole_folder_is_used(run: Path) -> None:
    for part in ("weights", "data"):
        (run / "all" / part).mkdir(parents=True)
    code, output = pytest_in(run, str(run / "all"))
    assert code == 0 and "2 passed" in output and "not run" not in output
