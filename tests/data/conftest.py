# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Small data sets with random content."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medmoe.data import Case


@pytest.fixture
def write_nifti() -> Callable[..., Path]:
    def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def write_picture() -> Callable[[Path, np.ndarray], Path]:
    def write(path: Path, array: np.ndarray) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
        return path

    return write


@pytest.fixture
def damage_header() -> Callable[..., None]:
    """Writes a number into a row of the sform, or into the offset of the qform, of a NIfTI file."""

    def damage(path: str | Path, row: int, column: int, value: float, form: str = "sform") -> None:
        volume = nib.load(path)
        header = volume.header.copy()
        header["sform_code"] = header["qform_code"] = 1
        if form == "sform":
            header["srow_" + "xyz"[row]][column] = value
        else:
            header["qoffset_" + "xyz"[row]] = value
        nib.save(nib.Nifti1Image(np.asarray(volume.dataobj), None, header), path)

    return damage


@pytest.fixture
def volumes(tmp_path: Path, write_nifti: Callable[..., Path]) -> Callable[..., list[Case]]:
    """Writes cases with labels 0, 1 and 2, of the shapes given."""

    def make(shapes: Sequence[tuple[int, ...]], affine: np.ndarray | None = None) -> list[Case]:
        cases = []
        for number, shape in enumerate(shapes):
            name = f"case_{number}.nii.gz"
            image = write_nifti(tmp_path / "imagesTr" / name, torch.randn(*shape).numpy(), affine)
            label = write_nifti(
                tmp_path / "labelsTr" / name, torch.randint(0, 3, shape[:3], dtype=torch.uint8).numpy(), affine
            )
            cases.append(Case(case=f"case_{number}", image=str(image), label=str(label)))
        return cases

    return make


@pytest.fixture
def pictures(tmp_path: Path, write_picture: Callable[[Path, np.ndarray], Path]) -> Callable[..., list[Case]]:
    """Writes color pictures with masks of 0 and 255, of the shapes given."""

    def make(shapes: Sequence[tuple[int, int]]) -> list[Case]:
        cases = []
        for number, shape in enumerate(shapes):
            image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).numpy()
            mask = (torch.rand(*shape) > 0.5).to(torch.uint8).numpy() * 255
            paths = [tmp_path / folder / f"case_{number}.png" for folder in ("images", "masks")]
            write_picture(paths[0], image)
            write_picture(paths[1], mask)
            cases.append(Case(case=f"case_{number}", image=str(paths[0]), label=str(paths[1])))
        return cases

    return make
