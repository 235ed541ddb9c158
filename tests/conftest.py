# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Tests touch neither the network nor the user's cache, run on one thread, and say when real data was not there."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

NOT_RUN = "MEDMOE_SHARED is not set: real-data tier not run"
SEED = int(os.environ.get("MEDMOE_TEST_SEED") or random.SystemRandom().randrange(2**31))
CACHE = tempfile.mkdtemp(prefix="medmoe-test-cache-")

# Before any library reads its environment; subprocesses inherit it.
for name in [name for name in os.environ if name.startswith(("MLFLOW_", "MONAI_", "MEDMOE_CACHE"))]:
    del os.environ[name]
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    MPLBACKEND="Agg",
    MLFLOW_DISABLE_TELEMETRY="true",
    MEDMOE_CACHE=CACHE,
)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_report_header() -> str:
    return f"random inputs: MEDMOE_TEST_SEED={SEED} repeats them"


@pytest.fixture(autouse=True)
def fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """Every run draws other inputs, and every test its own, whatever order they run in."""
    seed = (SEED + zlib.crc32(request.node.nodeid.encode())) % 2**32
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.fixture(autouse=True)
def untouched_excepthook() -> Iterator[None]:
    """A bundle that runs in process may install its own hook for uncaught errors."""
    hook = sys.excepthook
    yield
    sys.excepthook = hook


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real weights and data. Unset: skipped by name. Set but not there: an error."""
    location = os.environ.get("MEDMOE_SHARED")
    if not location:
        pytest.skip(NOT_RUN)
    folder = Path(location).resolve()
    missing = [str(part) for part in (folder, folder / "weights", folder / "data") if not part.is_dir()]
    if missing:
        pytest.fail(f"MEDMOE_SHARED={location}, but there is no folder {', '.join(missing)}")
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    names = sorted(report.nodeid for report in skipped if NOT_RUN in str(report.longrepr))
    if names:
        terminalreporter.section(f"{NOT_RUN} ({len(names)} tests)", yellow=True)
        for name in names:
            terminalreporter.write_line(name)
