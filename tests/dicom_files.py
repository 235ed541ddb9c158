# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Writes small DICOM series for tests."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def write_series(
    folder: Path,
    volume: np.ndarray,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    axes: np.ndarray | None = None,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    edit: Callable[[Dataset, int], None] = lambda header, index: None,
    **tags: Any,
) -> list[Path]:
    """Writes ``volume`` (columns, rows, slices), stored as int16, as one file a slice.

    ``spacing`` is along columns index, rows index and slices in mm; ``axes`` (3, 3) holds the directions of the three
    indices in LPS as columns. ``edit`` may change each header before it is written. Files are named in random order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = np.eye(3) if axes is None else axes
    series, study = generate_uid(), generate_uid()
    names = np.random.default_rng(random.getrandbits(32)).permutation(volume.shape[2])
    paths = []
    for index in range(volume.shape[2]):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CTImageStorage
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.SeriesInstanceUID, header.StudyInstanceUID = series, study
        header.PatientName, header.Modality, header.InstanceNumber = "Secret^Name", "CT", index + 1
        position = np.asarray(origin) + axes[:, 2] * spacing[2] * index
        header.ImagePositionPatient = [f"{value:.8g}" for value in position]
        header.ImageOrientationPatient = [f"{value:.9g}" for value in (*axes[:, 0], *axes[:, 1])]
        header.PixelSpacing, header.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        header.Columns, header.Rows = volume.shape[:2]
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
        header.RescaleSlope, header.RescaleIntercept = 1, 0
        header.PixelData = np.ascontiguousarray(volume[..., index].T).astype("<i2").tobytes()
        for tag, value in tags.items():
            setattr(header, tag, value)
        edit(header, index)
        paths.append(folder / f"{names[index]:03d}.dcm")
        header.save_as(paths[-1], enforce_file_format=True)
    return paths
