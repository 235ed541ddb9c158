# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.engines.utils import engine_apply_transform
from PIL import Image

from medmoe.data import (
    Case,
    augmentation,
    datalists,
    evaluation_preprocessing,
    main_names,
    main_task,
    postprocessing,
    preprocessing,
)
from medmoe.data.derive import boundary, signed_distance
from medmoe.data.transforms import apply
from medmoe.errors import ConfigError, DataError
from medmoe.networks.network import plain
from medmoe.tasks import DISTANCE_LIMIT, UNLABELLED, make_tasks

TASKS = make_tasks(
    [
        {"name": "organs", "kind": "labels", "names": ["a", "b"]},
        {"name": "edges", "kind": "boundary", "of": "organs"},
        {"name": "depth", "kind": "distance", "of": "organs"},
        {"name": "zones", "kind": "classes", "names": ["none", "x", "y"], "target": "zones"},
        {"name": "grade", "kind": "image", "names": ["low", "high"]},
    ]
)
PIR = np.array([[0, 0, 1.5, 4], [-0.8, 0, 0, -9], [0, -1, 0, 30], [0, 0, 0, 1]])


def disc(shape: tuple[int, ...], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij"))
    return (np.sqrt((grid**2).sum(0)) < radius).astype(np.uint8)


@pytest.fixture
def case(tmp_path: Path, write_picture: Callable[..., Path]) -> Case:
    """A picture of 40 x 32 with label a drawn, b not, zones partly, and the grade known."""
    shape = (40, 32)
    zones = disc(shape, 12) + disc(shape, 6)
    zones[:5] = UNLABELLED
    noise = torch.randint(0, 256, shape, dtype=torch.uint8).numpy()
    image, a, z = (
        str(write_picture(tmp_path / f"{name}.png", array))
        for name, array in (("image", noise), ("a", disc(shape, 11) * 255), ("z", zones))
    )
    return {"case": "one", "image": image, "organs": [a, None], "zones": z, "grade": 1}


def perfect(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Logits, without batch, that say what the sample says, and nothing of what it does not say."""
    masks = {name: (sample[name] == 1).float() * 20 - 10 for name in ("organs", "edges")}
    zones = torch.stack([(sample["zones"][0] == k).float() * 20 for k in range(3)])
    grade = torch.tensor([0.0, 10.0]) * (1 if sample["grade"] == 1 else -1)
    return {**masks, "depth": sample["depth"].nan_to_num(0.0), "zones": zones, "grade": grade}


def evaluated(case: Case, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Batch and output of an engine that predicts on the network's grid what the case says."""
    truth = augmentation(settings["spatial_dims"], -1, "none", TASKS)(preprocessing(tasks=TASKS, **settings)(case))
    forth = evaluation_preprocessing(tasks=TASKS, **settings)
    batch = list_data_collate([forth(case)])
    pred = {name: logits[None] for name, logits in perfect(truth).items()}
    output = {"image": batch["image"], "label": batch["organs"], "pred": pred}
    back = postprocessing(2, forth, tasks=TASKS)
    return engine_apply_transform(decollate_batch(batch)[0], decollate_batch(output)[0], back)


def dice(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(2 * (one * other).sum() / (one.sum() + other.sum()))


def test_every_target_is_loaded(case: Case) -> None:
    sample = preprocessing(2, 1, tasks=TASKS)(case)
    assert sample["organs"].shape == (2, 40, 32) and sample["zones"].shape == (1, 40, 32)
    assert sample["organs"].dtype == sample["zones"].dtype == torch.uint8
    assert np.array_equal(sample["organs"][0].numpy(), disc((40, 32), 11)) and (sample["organs"][1] == UNLABELLED).all()
    assert np.array_equal(sample["zones"][0].numpy(), np.asarray(Image.open(case["zones"])))
    assert sample["grade"].dtype == torch.int64 and sample["grade"].shape == () and sample["grade"] == 1
    mask = sample["organs"][0].numpy()
    assert np.array_equal(sample["edges"][0], boundary(mask)) and (sample["edges"][1] == UNLABELLED).all()
    assert np.array_equal(sample["depth"][0], signed_distance(mask)) and sample["depth"][1].isnan().all()
    assert sample["edges"].dtype == torch.uint8 and sample["depth"].dtype == torch.float32
    assert {"edges", "depth"}.isdisjoint(preprocessing(2, 1, tasks=TASKS, with_label=False)(case))
    bare = preprocessing(2, 1, tasks=TASKS)({**case, "organs": None, "zones": None, "grade": -1})
    assert (bare["organs"] == UNLABELLED).all() and bare["organs"].shape == (2, 40, 32)
    assert (bare["zones"] == UNLABELLED).all() and bare["grade"] == -1
    two = make_tasks([{"name": "zones", "kind": "classes", "names": ["none", "x"]}])
    masks = preprocessing(2, 1, label_threshold=1, tasks=two)(case)["zones"]
    assert set(masks.unique().tolist()) == {0, 1} and (masks[0, :5] == 1).all()


@pytest.mark.parametrize("augment", ["none", "flips", "strong"])
@pytest.mark.parametrize("window", [(16, 24), (50, 50)])
def test_windows_carry_all_targets(case: Case, augment: str, window: tuple[int, int]) -> None:
    sample = preprocessing(2, 1, tasks=TASKS)({**case, "image": case["organs"][0]})
    transform = augmentation(2, window, augment, TASKS)
    for seed in range(5):
        found = transform.set_random_state(seed=seed)(dict(sample))
        assert set(found) == {"case", "image", *(task.name for task in TASKS)}
        for name, channels in (("image", 1), ("organs", 2), ("edges", 2), ("depth", 2), ("zones", 1)):
            assert type(found[name]) is torch.Tensor and found[name].shape == (channels, *window)
        if augment != "strong":
            assert torch.equal(found["image"][0] > 0.5, found["organs"][0] == 1)
        assert (found["organs"][1] == UNLABELLED).all()  # in the padding as well
        assert (found["edges"][1] == UNLABELLED).all() and found["edges"].dtype == torch.uint8
        assert found["depth"][1].isnan().all() and found["depth"].dtype == torch.float32
        assert set(found["zones"].unique().tolist()) <= {0, 1, 2, UNLABELLED}


@pytest.mark.parametrize("augment", ["none", "flips"])
@pytest.mark.parametrize("window", [(12, 12), (50, 20), (48, 48)])
def test_a_cut_is_no_border(case: Case, augment: str, window: tuple[int, int]) -> None:
    """Boundary and distance in a window are those of the whole image, and not labelled in its padding."""
    sample = preprocessing(2, 1, tasks=TASKS)(case)
    numbers = torch.arange(1.0, 40 * 32 + 1).reshape(1, 40, 32)
    whole = {name: plain(sample[name]).flatten(1) for name in ("edges", "depth")}
    transform = augmentation(2, window, augment, TASKS)
    for seed in range(8):
        found = transform.set_random_state(seed=seed)({**sample, "image": MetaTensor(numbers)})
        source = found["image"].long().flatten() - 1
        inside = source >= 0
        assert inside.all() == (window == (12, 12))
        for name, unknown in (("edges", UNLABELLED), ("depth", torch.nan)):
            values = found[name].flatten(1)
            torch.testing.assert_close(values[:, inside], whole[name][:, source[inside]], equal_nan=True)
            outside = values[:, ~inside]
            torch.testing.assert_close(outside, torch.full_like(outside, unknown), equal_nan=True)
        assert not found["organs"][0].flatten()[~inside].any()


def test_distances_under_an_affine_are_off_by_its_zoom_at_most(
    case: Case, tmp_path: Path, write_picture: Callable[..., Path]
) -> None:
    drawn = disc((96, 96), 14) * 255
    files = {"image": str(write_picture(tmp_path / "white.png", np.full((96, 96), 255, np.uint8)))}
    files["organs"] = [str(write_picture(tmp_path / "disc.png", drawn)), None]
    sample = preprocessing(2, 1, intensity="unit", tasks=TASKS[:3])({**case, **files})
    transform = augmentation(2, 80, "strong", TASKS[:3])
    seen = 0
    for seed in range(12):
        found = transform.set_random_state(seed=seed)(dict(sample))
        depth, edges, mask = (found[name][0].numpy() for name in ("depth", "edges", "organs"))
        now = signed_distance(mask)
        black = found["image"][0].numpy() < 0.3
        seen += np.count_nonzero(black)
        assert np.count_nonzero(~np.isnan(depth[black])) <= 0.05 * np.count_nonzero(black)
        assert np.count_nonzero(edges[black] != UNLABELLED) <= 0.05 * np.count_nonzero(black)
        known = ~np.isnan(depth) & (np.abs(now) < 0.8)
        before, after = np.abs(depth[known]) * DISTANCE_LIMIT, np.abs(now[known]) * DISTANCE_LIMIT
        assert (np.sign(depth[known]) == np.sign(now[known]))[after > 2].all()
        assert (before < after / 0.84 + 1).all() and (before > after / 1.2 - 1).all()
        rim = edges[known] == 1
        assert rim.any() and after[rim].max() <= 2.3
    assert seen > 500


def test_a_mask_that_is_not_there_stays_unlabelled_in_the_padding(case: Case) -> None:
    sample = preprocessing(2, 1, tasks=TASKS)({**case, "zones": None})
    assert (augmentation(2, (60, 60), "strong", TASKS)(sample)["zones"] == UNLABELLED).all()


@pytest.mark.parametrize("resize", [None, [20, 16], [33, 50]])
def test_pictures_come_back(case: Case, resize: list[int] | None) -> None:
    batch, output = evaluated(case, spatial_dims=2, in_channels=1, intensity="unit", resize=resize)
    assert {"organs", "edges", "depth", "zones", "grade"} < set(batch)
    assert output["pred"].shape == output["label"].shape == (3, 40, 32) and output["image"].shape == (1, 40, 32)
    assert output["labelled"].tolist() == [True, True, False]
    assert np.array_equal(output["label"][1], disc((40, 32), 11)) and not output["pred"][2].any()
    assert torch.equal(output["label"][0], 1 - output["label"][1])
    least = 1 if resize is None else 0.93
    assert dice(output["pred"][1], output["label"][1]) >= least
    assert dice(output["pred_edges"][0] > 0.5, output["target_edges"][0]) >= (1 if resize is None else 0.75)
    assert (output["target_edges"][1] == UNLABELLED).all() and output["target_depth"][1].isnan().all()
    error = (output["pred_depth"][0] - output["target_depth"][0]).abs().mean()
    assert error < (1e-6 if resize is None else 0.06)
    known = output["target_zones"][0] != UNLABELLED
    assert (output["pred_zones"].argmax(0) == output["target_zones"][0])[known].float().mean() > 0.93
    assert output["pred_grade"].shape == (2,) and output["pred_grade"].argmax() == output["target_grade"] == 1
    assert output["pred_organs"].min() >= 0 and output["pred_organs"].max() <= 1


def test_resized_pictures(case: Case, tmp_path: Path, write_picture: Any) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None], (64, 48))
    image = str(write_picture(tmp_path / "ramp.png", np.ascontiguousarray(ramp)))
    forth = preprocessing(2, 1, intensity="unit", with_label=False, resize=[16, 24])
    sample = forth({"image": image})
    assert sample["image"].shape == (1, 16, 24)
    inner = sample["image"][0, 2:-2].numpy() * 255
    np.testing.assert_allclose(inner, np.broadcast_to(1.5 + 4 * np.arange(2, 14)[:, None], (12, 24)), atol=1e-3)
    assert np.ptp(sample["image"][0].numpy(), axis=1).max() < 1e-5  # no darker edges
    sample["pred"] = torch.stack([sample["image"][0] * 0, sample["image"][0] - 32 / 255]).as_tensor()
    classes = postprocessing(2, forth, with_label=False)(sample)["pred"]
    assert classes.shape == (1, 64, 48) and np.array_equal(classes[0], ramp > 32)


def test_depth_is_measured_in_voxels_of_the_network(case: Case) -> None:
    coarse = evaluation_preprocessing(2, 1, tasks=TASKS, resize=[20, 32])(case)
    mask = disc((40, 32), 11)
    np.testing.assert_array_equal(coarse["depth"][0], signed_distance(mask, [0.5, 1]))
    np.testing.assert_array_equal(coarse["edges"][0], boundary(mask, [0.5, 1]))


@pytest.mark.parametrize("affine", [np.diag([-1.0, 1, 2.5, 1]), PIR])
def test_volumes_come_back(write_nifti: Any, tmp_path: Path, affine: np.ndarray) -> None:
    shape = (24, 20, 16)
    ball, zones = disc(shape, 7), disc(shape, 6) + disc(shape, 3)
    zones[:3] = UNLABELLED
    image, a, z = (
        str(write_nifti(tmp_path / f"{name}.nii.gz", array, affine))
        for name, array in (("i", torch.rand(*shape).numpy()), ("a", ball), ("z", zones))
    )
    case = {"case": "one", "image": image, "organs": [a, None], "zones": z, "grade": 0}
    settings: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1}
    _, output = evaluated(case, **settings)
    assert np.array_equal(output["label"][1], ball) and torch.equal(output["pred"][1], output["label"][1])
    assert torch.equal((output["pred_edges"][0] > 0.5).byte(), output["target_edges"][0])
    assert torch.equal(output["pred_depth"][0], output["target_depth"][0])
    assert np.allclose(output["pred"].affine, affine) and np.allclose(output["pred_depth"].affine, affine)
    spacing = nib.affines.voxel_sizes(affine)
    sample = evaluation_preprocessing(3, 1, spacing=[2.0, 2.0, 2.0], tasks=TASKS)(case)
    assert sample["image"].shape != sample["organs"].shape[1:]
    expected = signed_distance(ball, (spacing / 2).tolist())
    np.testing.assert_allclose(sample["depth"][0], expected, atol=1e-5)
    moved = preprocessing(3, 1, spacing=[2.0, 2.0, 2.0], tasks=TASKS)(case)
    assert moved["organs"].shape[1:] == moved["image"].shape[1:] and (moved["organs"][1] == UNLABELLED).all()
    assert set(moved["zones"].unique().tolist()) <= {0, 1, 2, UNLABELLED} and moved["zones"].dtype == torch.uint8


def test_partly_labelled_classes_as_the_main_task(case: Case) -> None:
    tasks = [TASKS[3]]
    forth = evaluation_preprocessing(2, 1, tasks=tasks)
    sample = forth(case)
    sample["pred"] = {"zones": torch.randn(3, 40, 32)}
    found = postprocessing(2, forth, tasks=tasks)(sample)
    known = np.asarray(Image.open(case["zones"])) != UNLABELLED
    for key in ("pred", "label"):
        assert isinstance(found[key], MetaTensor) and np.array_equal(found[key].sum(0), known)
    assert found["labelled"].tolist() == [True] * 3
    empty = forth({**case, "zones": None})
    empty["pred"] = {"zones": torch.randn(3, 40, 32)}
    assert postprocessing(2, forth, tasks=tasks)(empty)["labelled"].tolist() == [False] * 3
    assert (main_task(TASKS), main_names(TASKS)) == (TASKS[0], ["no label", "a", "b"])
    assert main_names(tasks) == ["none", "x", "y"] and main_names(TASKS[4:]) == []


def test_without_labels(case: Case) -> None:
    forth = preprocessing(2, 1, with_label=False, resize=[20, 16])
    sample = forth({"case": "one", "image": case["image"]})
    shapes = {"organs": (2, 20, 16), "edges": (2, 20, 16), "depth": (2, 20, 16), "zones": (3, 20, 16), "grade": (2,)}
    sample["pred"] = {name: torch.randn(*shape) for name, shape in shapes.items()}
    found = postprocessing(2, forth, with_label=False, tasks=TASKS)(sample)
    assert found["pred"].shape == (2, 40, 32) and found["pred"].dtype == torch.uint8 and "label" not in found
    assert torch.equal(found["pred"], (found["pred_organs"] >= 0.5).byte())
    assert found["pred_depth"].abs().max() <= 1 and not [key for key in found if key.startswith("target_")]


def test_image_level_tasks_alone(case: Case) -> None:
    tasks = TASKS[4:]
    forth = evaluation_preprocessing(2, 1, tasks=tasks, resize=[20, 16])
    batch = list_data_collate(
        [forth({"case": c, "image": case["image"], "grade": g}) for c, g in (("a", 1), ("b", -1))]
    )
    assert batch["grade"].tolist() == [1, -1]
    output = {"image": batch["image"], "pred": {"grade": torch.tensor([[0.0, 1.0], [2.0, 0.0]])}}
    back = postprocessing(2, forth, tasks=tasks)
    pairs = zip(decollate_batch(batch), decollate_batch(output), strict=True)
    outputs = [engine_apply_transform(b, o, back)[1] for b, o in pairs]
    assert [found["target_grade"] for found in outputs] == [1, -1]
    assert torch.allclose(outputs[0]["pred"], torch.tensor([0.0, 1.0]).softmax(0)) and "label" not in outputs[0]
    assert outputs[1]["image"].shape == (1, 40, 32)
    window = augmentation(2, (8, 8), "strong", tasks)(preprocessing(2, 1, tasks=tasks)(case))
    assert window["image"].shape == (1, 8, 8) and window["grade"] == 1


def test_masks_that_do_not_fit_each_other(case: Case, tmp_path: Path, write_picture: Any) -> None:
    other = str(write_picture(tmp_path / "b.png", disc((40, 30), 5)))
    with pytest.raises(DataError, match=r"b\.png: its shape is \(1, 40, 30\), that of the other masks of task organs"):
        apply(preprocessing(2, 1, tasks=TASKS), {**case, "organs": [case["organs"][0], other]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial_dims": 3, "resize": [8, 8]}, "resize is for pictures"),
        ({"spatial_dims": 2, "resize": [8]}, "expected rows and columns"),
        ({"spatial_dims": 2, "resize": [8, 0]}, "expected rows and columns"),
    ],
)
def test_sizes_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocessing(in_channels=1, **settings)


def test_jsrt_comes_back(shared: Path) -> None:
    names = ["left lung", "right lung", "heart", "left clavicle", "right clavicle"]
    tasks = make_tasks(
        [
            {"name": "organs", "kind": "labels", "names": names},
            {"name": "edges", "kind": "boundary", "of": "organs"},
            {"name": "nodule", "kind": "image", "names": ["none", "nodule"]},
        ]
    )
    splits = datalists(shared / "data" / "jsrt_cxr", tasks=tasks, table="labels.csv")
    case = splits["test"][0]
    settings: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "tasks": tasks, "resize": [256, 256]}
    truth = augmentation(2, -1, "none", tasks)(preprocessing(**settings)(case))
    forth = evaluation_preprocessing(**settings)
    sample = forth(case)
    logits = {name: (truth[name] == 1).float() * 20 - 10 for name in ("organs", "edges")}
    found = postprocessing(2, forth, tasks=tasks)({**sample, "pred": {**logits, "nodule": torch.zeros(2)}})
    assert found["label"].shape == (6, 1024, 1024) and found["labelled"].all()
    for channel in range(1, 6):
        stored = np.asarray(Image.open(case["organs"][channel - 1]))
        assert np.array_equal(found["label"][channel], stored)
        assert dice(found["pred"][channel], found["label"][channel]) > 0.96
    assert dice(found["pred_edges"] > 0.5, found["target_edges"]) > 0.8
    assert found["target_nodule"] == case["case"].startswith("JPCLN")
