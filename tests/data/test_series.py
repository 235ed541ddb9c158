# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""One DICOM series as one volume, against SimpleITK, and every refusal."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from monai.transforms import LoadImaged
from scipy.spatial.transform import Rotation

from medmoe.data.series import SeriesReader, holds_series, is_dicom, read_series, scan_series
from medmoe.errors import DataError, GeometryError

SHAPE = (9, 7, 12)


def random_volume(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(random.getrandbits(32)).integers(-1000, 2000, shape)


def by_simpleitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The array (columns, rows, slices) and the RAS affine."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, np.diag([-1, -1, 1, 1]) @ affine


def reason(folder: Path, kind: type[Exception] = GeometryError) -> str:
    with pytest.raises(kind) as caught:
        read_series(folder)
    text = str(caught.value)
    assert "Secret" not in text
    return text


@pytest.mark.parametrize("oblique", [False, True])
def test_agrees_with_simpleitk(tmp_path: Path, oblique: bool) -> None:
    axes = Rotation.random(rng=random.getrandbits(32)).as_matrix() if oblique else None
    volume = random_volume()
    write_series(tmp_path, volume, spacing=(0.7, 1.3, 2.5), axes=axes, origin=(-33.25, 12.5, 201.75))
    series = read_series(tmp_path)
    array, affine = by_simpleitk(tmp_path)
    np.testing.assert_array_equal(series.array, array)
    assert series.array.dtype == np.float32
    np.testing.assert_allclose(series.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(series.array, volume)
    np.testing.assert_allclose(np.linalg.norm(series.affine[:3, :3], axis=0), (0.7, 1.3, 2.5), atol=1e-5)


def test_slices_sorted_by_position_whatever_their_numbers(tmp_path: Path) -> None:
    volume = random_volume()

    def scramble(header, index: int) -> None:
        header.InstanceNumber = 7 if index % 2 else None

    write_series(tmp_path, volume, axes=np.diag([1.0, -1.0, -1.0]), edit=scramble)
    np.testing.assert_array_equal(read_series(tmp_path).array, volume)


def test_axes_against_the_normal_are_sorted_along_it(tmp_path: Path) -> None:
    volume = random_volume()
    write_series(tmp_path, volume, axes=np.diag([1.0, 1.0, -1.0]), spacing=(1, 1, 2))
    series = read_series(tmp_path)
    np.testing.assert_array_equal(series.array, volume[..., ::-1])
    np.testing.assert_allclose(series.affine[:3, 2], (0, 0, 2))
    assert series.affine[2, 3] == -2 * (SHAPE[2] - 1)


def test_rescale_of_every_slice(tmp_path: Path) -> None:
    volume = random_volume()
    slopes = np.random.default_rng(random.getrandbits(32)).uniform(0.2, 3.0, SHAPE[2]).round(6)

    def rescale(header, index: int) -> None:
        header.RescaleSlope, header.RescaleIntercept = str(slopes[index]), "-1024.5"

    write_series(tmp_path, volume, edit=rescale)
    np.testing.assert_allclose(read_series(tmp_path).array, volume * slopes - 1024.5, atol=2e-3)


@pytest.mark.parametrize(
    ("folder", "shape"),
    [
        ("pgbm_mr_dicom/Study3/HippoCrop", (34, 50, 40)),
        ("sunnybrook_dicom/series_SCD0000101", (256, 256, 12)),
        ("ct_small/totalsegmentator_dicom/ct", (512, 512, 20)),
        ("ct_small/dcmqi/ct-3slice", (512, 512, 3)),
    ],
)
def test_real_series(shared: Path, folder: str, shape: tuple[int, int, int]) -> None:
    series = read_series(shared / "data" / folder)
    array, affine = by_simpleitk(shared / "data" / folder)
    assert series.array.shape == shape
    np.testing.assert_array_equal(series.array, array)
    np.testing.assert_allclose(series.affine, affine, atol=1e-5)


def test_real_cine_series_repeats_positions(shared: Path) -> None:
    text = reason(shared / "data" / "sunnybrook_dicom" / "dicom" / "SCD0000101")
    assert "the same position" in text and "time points" in text


def test_monai_reader(tmp_path: Path) -> None:
    volume = random_volume()
    write_series(tmp_path / "series", volume, spacing=(1, 2, 3))
    load = LoadImaged("image", reader=SeriesReader(), ensure_channel_first=True)
    image = load({"image": str(tmp_path / "series")})["image"]
    assert image.shape == (1, *SHAPE) and image.meta["space"] == "RAS"
    np.testing.assert_array_equal(image[0].numpy(), volume)
    np.testing.assert_allclose(image.affine.numpy(), np.diag([-1, -2, 3, 1]))
    assert SeriesReader().verify_suffix(tmp_path / "series") and not SeriesReader().verify_suffix(tmp_path)


def test_two_series_are_listed_and_one_can_be_chosen(tmp_path: Path) -> None:
    first, second = random_volume(), random_volume((4, 5, 3))
    write_series(tmp_path, first, Modality="MR")
    moved = write_series(tmp_path / "other", second)
    paths = [shutil.move(path, tmp_path / f"b{path.name}") for path in moved]
    text = reason(tmp_path, DataError)
    assert "2 series" in text and "(MR, 12 images)" in text and "(CT, 3 images)" in text and "series_uid" in text
    by_file = read_series(paths[0])
    np.testing.assert_array_equal(by_file.array, second)
    by_uid = read_series(tmp_path, series_uid=by_file.facts["series_uid"])
    np.testing.assert_array_equal(by_uid.array, second)
    with pytest.raises(DataError, match="no series"):
        read_series(tmp_path, series_uid="1.2.3")


def test_missing_slice(tmp_path: Path) -> None:
    paths = write_series(tmp_path, random_volume(), spacing=(1, 1, 2.5))
    paths[5].unlink()
    text = reason(tmp_path)
    assert "slice 5 and slice 7 are 5.000 mm apart, elsewhere it is 2.500 mm: 1 missing" in text


def test_duplicate_slice(tmp_path: Path) -> None:
    paths = write_series(tmp_path, random_volume())
    shutil.copy(paths[3], tmp_path / "copy.dcm")
    assert "slice 4 and slice 4 lie at the same position" in reason(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ImagePositionPatient": [0, 0, 3.4]}, "slice 4 and slice 5 are 0.600 mm apart"),
        ({"ImagePositionPatient": [2, 0, 3]}, "slice 4: up to 2.000 mm beside the line"),
        ({"ImagePositionPatient": None}, "slice 4: position is missing"),
        ({"ImagePositionPatient": ["nan", 0, 3]}, "slice 4: position is missing or no number"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}, "slice 4: another orientation"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "not orthonormal"),
        ({"PixelSpacing": [1, 1.5]}, "slice 4: another pixel spacing"),
        ({"PixelSpacing": [0, 0]}, "slice 4: pixel spacing [0.0, 0.0] mm"),
        ({"Columns": 7, "Rows": 9}, "slice 4: another number of rows"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_slice(tmp_path: Path, change: dict, expected: str) -> None:
    def edit(header, index: int) -> None:
        for tag, value in change.items() if index == 3 else ():
            setattr(header, tag, value)

    write_series(tmp_path, random_volume(), edit=edit)
    assert expected in reason(tmp_path)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"NumberOfFrames": 4}, "multi-frame"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "color"),
        ({"RescaleSlope": 0}, "rescale slope"),
        ({"RescaleSlope": "inf"}, "rescale slope"),
        ({"RescaleIntercept": "nan"}, "rescale slope or intercept"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_unsupported_content(tmp_path: Path, tags: dict, expected: str) -> None:
    write_series(tmp_path, random_volume(), **tags)
    assert expected in reason(tmp_path, DataError)


def test_gantry_tilt(tmp_path: Path) -> None:
    def tilt(header, index: int) -> None:
        header.ImagePositionPatient = [0, index * np.tan(np.radians(15)), index]

    write_series(tmp_path, random_volume(), edit=tilt)
    assert "gantry tilt of 15.0 degrees" in reason(tmp_path)


def test_rounded_positions_pass(tmp_path: Path) -> None:
    def rounded(header, index: int) -> None:
        header.ImagePositionPatient = [0, 0, round(0.6249 * index, 2)]

    write_series(tmp_path, random_volume(), edit=rounded)
    assert read_series(tmp_path).affine[2, 2] == pytest.approx(0.6249, abs=1e-3)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.7])
def test_truncated_slice(tmp_path: Path, kept: float) -> None:
    paths = write_series(tmp_path, random_volume((32, 32, 4)))
    os.truncate(paths[-1], int(paths[-1].stat().st_size * kept))
    text = reason(tmp_path, DataError)
    assert "Copy the series again" in text or "cut short" in text
    assert "slice 4" in text or "damaged" in text


def test_truncated_compressed_slice(tmp_path: Path, shared: Path) -> None:
    for path in sorted((shared / "data/ct_small/totalsegmentator_dicom/ct").iterdir())[:3]:
        shutil.copyfile(path, tmp_path / path.name)
    os.truncate(tmp_path / path.name, path.stat().st_size // 2)
    assert "the pixels of slice 269 cannot be read" in reason(tmp_path, DataError)


def test_stray_files_are_skipped_and_counted(tmp_path: Path) -> None:
    volume = random_volume()
    write_series(tmp_path, volume)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "README").write_text("")
    series = read_series(tmp_path)
    np.testing.assert_array_equal(series.array, volume)
    assert series.facts["skipped"] == 2 and series.facts["modality"] == "CT"


def test_all_problems_come_together(tmp_path: Path) -> None:
    paths = write_series(tmp_path, random_volume((4, 4, 20)))
    for index in (4, 9):
        paths[index].unlink()
    shutil.copy(paths[15], tmp_path / "copy.dcm")
    text = reason(tmp_path)
    assert "slice 4 and slice 6" in text and "slice 9 and slice 11" in text and "slice 16 and slice 16" in text


def test_single_slice(tmp_path: Path) -> None:
    volume = random_volume((5, 6, 1))
    write_series(tmp_path / "thick", volume, spacing=(1, 1, 4))
    assert read_series(tmp_path / "thick").affine[2, 2] == 4
    write_series(tmp_path / "bare", volume, SliceThickness=None)
    assert "neither slice spacing nor slice thickness" in reason(tmp_path / "bare")


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "does not exist" in reason(tmp_path / "nowhere", DataError)
    assert "holds no DICOM image" in reason(tmp_path, DataError)
    (tmp_path / "notes.txt").write_text("hello")
    assert not is_dicom(tmp_path / "notes.txt") and not holds_series(tmp_path)
    write_series(tmp_path, random_volume())
    assert holds_series(tmp_path)
    with pytest.raises(DataError, match="not a DICOM image"):
        scan_series(tmp_path / "notes.txt")
