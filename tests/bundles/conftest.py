# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Bundles take parts from each other by paths that count from the repository."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bundle_runs import ROOT


@pytest.fixture(scope="module", autouse=True)
def in_the_repository() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield
