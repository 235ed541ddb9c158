# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose
from PIL import Image
from torch.nn.functional import one_hot

from medmoe.data import Case, augmentation, datalists, evaluation_preprocessing, postprocessing, preprocessing
from medmoe.data.transforms import apply
from medmoe.errors import ConfigError, DataError, GeometryError

SHAPE = (7, 9, 5)
Volumes = Callable[..., list[Case]]

# Signed permutations (every orientation that a file can have) with unequal voxels and an offset.
ORIENTATIONS = {"RAS": (0, 1, 2), "LPS": (0, 1, 2), "PIR": (1, 2, 0), "ASL": (2, 0, 1), "SRP": (1, 0, 2)}


def affine_of(name: str) -> np.ndarray:
    """An affine whose voxel axes point to the named directions."""
    oriented = nib.orientations.axcodes2ornt(tuple(name))
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(oriented):
        affine[int(world), axis] = sign * (0.8, 1.0, 2.5)[axis]
    affine[:, 3] = (-11, 7, 3, 1)
    return affine


def oblique_affine() -> np.ndarray:
    """A rotation by 20 degrees about one axis and -15 about another, and a flip."""
    a, b = np.deg2rad([20, -15])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-0.9, 1.1, 2.0])
    affine[:3, 3] = (30, -20, 5)
    return affine


def logits_of(label: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Logits (1, C, ...) of a network that predicts ``label`` (1, 1, ...) without doubt."""
    classes = one_hot(torch.as_tensor(label)[:, 0].long(), num_classes)
    return 10.0 * classes.movedim(-1, 1).float()


def there_and_back(case: Case, num_classes: int, **settings: Any) -> tuple[dict[str, Any], MetaTensor]:
    """Predicts the label on the network's grid and brings it back, as the evaluator does with a batch of one case."""
    truth = preprocessing(**settings)(case)["label"]
    forth = evaluation_preprocessing(**settings)
    batch = list_data_collate([forth(case)])
    batch["pred"] = logits_of(truth[None], num_classes)
    original = batch["label"][0].clone()
    back = [postprocessing(num_classes, forth)(sample) for sample in decollate_batch(batch)]
    return back[0], original


@pytest.mark.parametrize("name", [*ORIENTATIONS, "oblique"])
def test_volumes_come_back_voxel_for_voxel(volumes: Volumes, name: str) -> None:
    affine = oblique_affine() if name == "oblique" else affine_of(name)
    case = volumes([SHAPE], affine)[0]
    back, original = there_and_back(case, 3, spatial_dims=3, in_channels=1)
    stored = nib.load(case["label"])
    assert np.array_equal(original[0].numpy(), np.asarray(stored.dataobj))
    assert torch.equal(back["pred"], back["label"]) and back["pred"].shape == (3, *SHAPE)
    assert torch.equal(back["pred"].argmax(0), original[0].long())
    for key in ("pred", "image", "label"):
        assert np.allclose(back[key].affine, stored.affine, atol=1e-6)
    image = np.asarray(nib.load(case["image"]).dataobj)
    inside = (image > np.percentile(image, 1)) & (image < np.percentile(image, 99))
    assert np.corrcoef(back["image"][0].numpy()[inside], image[inside])[0, 1] > 0.999


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_the_network_sees_ras(volumes: Volumes, name: str) -> None:
    affine = affine_of(name)
    case = volumes([SHAPE], affine)[0]
    sample = preprocessing(3, 1)(case)
    assert nib.aff2axcodes(sample["image"].affine.numpy()) == ("R", "A", "S")
    expected = nib.as_closest_canonical(nib.load(case["label"]))
    assert np.array_equal(sample["label"][0].numpy(), np.asarray(expected.dataobj))
    assert sample["image"].shape == sample["label"].shape and sample["label"].dtype == torch.uint8


def test_pictures_come_back_pixel_for_pixel(pictures: Volumes) -> None:
    case = pictures([(12, 31)])[0]
    settings: dict[str, Any] = dict(spatial_dims=2, in_channels=3, intensity="unit", label_threshold=127)
    back, original = there_and_back(case, 2, **settings)
    mask = np.asarray(Image.open(case["label"])) > 127
    assert np.array_equal(original[0].numpy(), mask) and np.array_equal(back["pred"][1].numpy(), mask)
    picture = np.asarray(Image.open(case["image"]))
    assert back["image"].shape == (3, 12, 31)  # rows are H
    assert np.allclose(back["image"].numpy(), picture.transpose(2, 0, 1) / 255, atol=1e-6)


def test_resampled_prediction_comes_back_on_the_grid_of_the_file(write_nifti: Any, tmp_path: Path) -> None:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (40, 36, 16)), indexing="ij"))
    millimeters = (grid - np.reshape([20, 18, 8], (3, 1, 1, 1))) * np.reshape([1, 1, 2.5], (3, 1, 1, 1))
    ball = (millimeters**2).sum(0)
    label = (ball < 12**2).astype(np.uint8)
    affine = np.diag([-1, 1, 2.5, 1])
    case = Case(
        case="ball",
        image=str(write_nifti(tmp_path / "i.nii.gz", ball.astype(np.float32), affine)),
        label=str(write_nifti(tmp_path / "l.nii.gz", label, affine)),
    )
    sample = preprocessing(3, 1, spacing=[1.5, 1.5, 1.5])(case)
    assert sample["image"].shape == sample["label"].shape != (1, 40, 36, 16)
    assert np.allclose(np.diag(sample["image"].affine)[:3], 1.5)
    back, original = there_and_back(case, 2, spatial_dims=3, in_channels=1, spacing=[1.5, 1.5, 1.5])
    assert back["pred"].shape[1:] == label.shape and np.array_equal(original[0].numpy(), label)
    pred = back["pred"][1].numpy()
    assert 2 * (pred * label).sum() / (pred.sum() + label.sum()) > 0.95
    image = np.flip(preprocessing(3, 1)(case)["image"].numpy(), 1)
    assert np.abs(back["image"].numpy() - image)[:, 3:-3, 3:-3, 3:-3].mean() < 0.003  # interpolated: 0.010 if nearest
    assert not np.array_equal(pred, label)  # judged on the file's own voxels: resampling costs a little


def test_inference_gives_class_indices_without_a_label(volumes: Volumes) -> None:
    case = volumes([SHAPE], affine_of("PIR"))[0]
    forth = preprocessing(3, 1, with_label=False)
    sample = forth({"case": "a", "image": case["image"]})
    truth = preprocessing(3, 1)(case)["label"]
    sample["pred"] = logits_of(truth[None], 3)[0]
    back = postprocessing(3, forth, with_label=False)(sample)
    assert np.array_equal(back["pred"][0].numpy(), np.asarray(nib.load(case["label"]).dataobj))


@pytest.mark.parametrize("channels", [1, 3])
def test_intensities_of_each_channel_and_case_fill_the_range(volumes: Volumes, channels: int) -> None:
    shape = (20, 20, 10, channels) if channels > 1 else (20, 20, 10)
    case = volumes([shape])[0]
    volume = nib.load(case["image"])
    voxels = np.asarray(volume.dataobj).reshape(20, 20, 10, channels) * 10.0 ** (3 + np.arange(channels))
    nib.save(nib.Nifti1Image(voxels.reshape(shape).astype(np.float32), volume.affine), case["image"])
    image = preprocessing(3, channels)(case)["image"]
    assert image.dtype == torch.float32 and image.shape == (channels, 20, 20, 10)
    for channel in image:
        assert channel.min() == 0 and channel.max() == 1
        assert 0.4 < channel.mean() < 0.6


def test_window_of_intensities(volumes: Volumes) -> None:
    case = volumes([SHAPE])[0]
    image = preprocessing(3, 1, intensity=[-0.5, 1.5])(case)["image"]
    expected = np.clip((np.asarray(nib.load(case["image"]).dataobj) + 0.5) / 2, 0, 1)
    assert np.allclose(image[0].numpy(), expected, atol=1e-6)


def test_channels_in_files_of_their_own(volumes: Volumes) -> None:
    cases = volumes([SHAPE, SHAPE])
    case = Case(case="both", image=[str(c["image"]) for c in cases], label=cases[0]["label"])
    image = preprocessing(3, 2, intensity=[-9, 9])(case)["image"]
    for channel, single in zip(image, cases, strict=True):
        assert torch.equal(channel, preprocessing(3, 1, intensity=[-9, 9])(single)["image"][0])


@pytest.mark.parametrize(
    ("mode", "in_channels"),
    [("L", 1), ("LA", 1), ("I;16", 1), ("1", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)],
)
def test_kinds_of_pictures(tmp_path: Path, write_picture: Any, mode: str, in_channels: int) -> None:
    array = torch.randint(0, 256, (9, 11, 3), dtype=torch.uint8).numpy()
    path = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 100)
    (deep if mode == "I;16" else Image.fromarray(array).convert(mode)).save(path)
    image = preprocessing(2, in_channels, with_label=False)({"image": str(path)})["image"]
    assert image.shape == (in_channels, 9, 11)
    assert image.max() > image.min()


def test_label_with_palette_keeps_its_indices(tmp_path: Path, write_picture: Any) -> None:
    classes = torch.randint(0, 4, (9, 11), dtype=torch.uint8).numpy()
    label = Image.fromarray(classes).convert("P")
    label.putdata(classes.ravel().tolist())
    label.putpalette(torch.randint(0, 256, (768,)).tolist())
    label.save(tmp_path / "label.png")
    image = write_picture(tmp_path / "image.png", torch.randint(0, 256, (9, 11), dtype=torch.uint8).numpy())
    sample = preprocessing(2, 1)({"image": str(image), "label": str(tmp_path / "label.png")})
    assert np.array_equal(sample["label"][0].numpy(), classes)


def test_bad_images_are_refused_by_name(
    volumes: Volumes, write_nifti: Any, damage_header: Callable[..., None], tmp_path: Path
) -> None:
    case = volumes([SHAPE])[0]
    voxels = torch.rand(*SHAPE).numpy()
    voxels[0, 0, 0] = np.nan
    write_nifti(tmp_path / "nan.nii.gz", voxels)
    damage_header(write_nifti(tmp_path / "flat.nii.gz", torch.rand(*SHAPE).numpy()), 2, 2, 0.0)
    damage_header(write_nifti(tmp_path / "nowhere.nii.gz", torch.rand(*SHAPE).numpy()), 0, 3, np.nan)
    (tmp_path / "cut.nii.gz").write_bytes(Path(str(case["image"])).read_bytes()[:-100])
    forth = preprocessing(3, 1, with_label=False)
    for name, kind, message in (
        ("nan.nii.gz", DataError, "NaN or infinite"),
        ("flat.nii.gz", GeometryError, r"affine is singular.* \(sform\)"),
        ("nowhere.nii.gz", GeometryError, "not finite"),
        ("cut.nii.gz", DataError, "cannot be read"),
        ("none.nii.gz", DataError, "cannot be read"),
        ("notes.txt", DataError, "neither NIfTI"),
    ):
        with pytest.raises(kind, match=f"{name}.*{message}"):
            apply(forth, {"image": str(tmp_path / name)})
    for with_label, dims, channels in (
        (True, "pass --spatial_dims 3", "pass --in_channels 1"),
        (False, "the checkpoint was trained on 2-D images", "the checkpoint was trained on images with 3"),
    ):
        with pytest.raises(DataError, match=rf"it is 3-D .*{dims}"):
            apply(preprocessing(2, 1, with_label=with_label), case)
        with pytest.raises(DataError, match=rf"it has 1 channels.*{channels}"):
            apply(preprocessing(3, 3, with_label=with_label), case)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preprocessing(4, 1), "spatial_dims is 4"),
        (lambda: preprocessing(3, 1, spacing=[1, 1]), "expected 3 numbers"),
        (lambda: preprocessing(2, 1, spacing=[1, 1]), "pictures carry no millimeters"),
        (lambda: preprocessing(2, 1, intensity="percent"), "intensity is 'percent'"),
        (lambda: preprocessing(2, 1, intensity=[3, 1]), "a window"),
        (lambda: augmentation(3, [8, 8]), "expected 3 numbers"),
        (lambda: augmentation(2, 8, "flip"), "expected one of none, flips, strong"),
    ],
)
def test_settings_out_of_range(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def augmented(transform: Compose, shape: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """A sample whose label is where its image is large, after random transforms."""
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(7)) + 0.01
    transform.set_random_state(seed=seed)
    sample: dict[str, torch.Tensor] = transform({"image": image, "label": (image > 0.5).byte()})
    return sample


@pytest.mark.parametrize(("augment", "most"), [("none", 1), ("flips", 4)])
def test_whole_slices_take_a_finite_number_of_variants(augment: str, most: int) -> None:
    transform = augmentation(3, [12, 11, 4], augment)
    whole = augmented(augmentation(3, [12, 11, -1], "none"), (9, 10, 16), 0)["image"][0]
    variants = {
        tuple(axes): {torch.flip(piece, axes).numpy().tobytes(): z for z, piece in enumerate(whole.unbind(-1))}
        for axes in ([], [0], [1], [0, 1])
    }
    seen = set()
    for seed in range(60):
        sample = augmented(transform, (9, 10, 16), seed)
        assert sample["image"].shape == sample["label"].shape == (1, 12, 11, 4)
        assert type(sample["image"]) is torch.Tensor
        assert torch.equal(sample["label"], (sample["image"] > 0.5).byte())
        slices = [piece.contiguous().numpy().tobytes() for piece in sample["image"][0].unbind(-1)]
        which = [axes for axes, known in variants.items() if slices[0] in known]
        assert len(which) == 1  # one of the variants, the same for all slices, which are neighbors
        first = variants[which[0]][slices[0]]
        assert [variants[which[0]].get(piece) for piece in slices] == list(range(first, first + 4))
        seen.add((which[0], first))
    assert len({axes for axes, _ in seen}) == most
    assert len({first for _, first in seen}) == 13


def test_two_dimensional_flips() -> None:
    transform = augmentation(2, [8, 9])
    image = torch.rand(1, 8, 9)
    expected = {torch.flip(image, axes).numpy().tobytes() for axes in ([], [1], [2], [1, 2])}
    found = set()
    for seed in range(40):
        sample = transform.set_random_state(seed=seed)({"image": image, "label": (image > 0.5).byte()})
        found.add(sample["image"].contiguous().numpy().tobytes())
    assert found == expected


@pytest.mark.parametrize(("shape", "roi"), list(product([(20, 9), (7, 30)], [(8, 16), (16, 8)])))
def test_windows_have_one_shape(shape: tuple[int, int], roi: tuple[int, int]) -> None:
    sample = augmented(augmentation(2, roi), shape, 3)
    assert sample["image"].shape == sample["label"].shape == (1, *roi)


@pytest.mark.parametrize("dims", [2, 3])
def test_strong_augmentation_changes_values_and_stays_in_range(dims: int) -> None:
    shape = (16, 16, 6)[:dims]
    transform = augmentation(dims, shape, "strong")
    samples = [augmented(transform, shape, seed) for seed in range(20)]
    for sample in samples:
        assert sample["image"].shape == (1, *shape) and sample["image"].dtype == torch.float32
        assert 0 <= sample["image"].min() and sample["image"].max() <= 1
        assert set(sample["label"].unique().tolist()) <= {0, 1} and sample["label"].dtype == torch.uint8
    assert len({sample["image"].numpy().tobytes() for sample in samples}) == 20


def test_hippocampus_comes_back(shared: Path) -> None:
    cases = datalists(shared / "data" / "hippocampus_msd")["test"][:5]
    for case in cases:
        back, original = there_and_back(case, 3, spatial_dims=3, in_channels=1)
        stored = np.asarray(nib.load(case["label"]).dataobj)
        assert np.array_equal(back["pred"].argmax(0).numpy(), stored) and np.array_equal(original[0].numpy(), stored)


def test_kvasir_comes_back(shared: Path) -> None:
    case = datalists(shared / "data" / "kvasir_seg")["validation"][0]
    settings: dict[str, Any] = dict(spatial_dims=2, in_channels=3, intensity="unit", label_threshold=127)
    back, _ = there_and_back(case, 2, **settings)
    assert np.array_equal(back["pred"][1].numpy(), np.asarray(Image.open(case["label"])) > 127)


def test_dicom_series(shared: Path) -> None:
    folder = shared / "data" / "pgbm_mr_dicom" / "Study3" / "HippoCrop"
    forth = preprocessing(3, 1, with_label=False)
    sample = apply(forth, {"image": str(folder)})
    assert sample["image"].shape[0] == 1 and sample["image"].ndim == 4
    assert nib.aff2axcodes(sample["image"].affine.numpy()) == ("R", "A", "S")
    sample["pred"] = torch.rand(2, *sample["image"].shape[1:])
    back = postprocessing(2, forth, with_label=False)(sample)
    assert sorted(back["pred"].shape[1:]) == sorted(sample["image"].shape[1:])
    assert not np.allclose(back["pred"].affine, sample["image"].affine)  # back in the order of the slices
