# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from training.toy import SETTINGS, ToyNetwork
from training.toy_engines import engines

from medmoe.training.pictures import PALETTE, Overlays, Slice, class_dice, overlay, pick, routing_picture

NAMES = ["background", "anterior", "posterior"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def count(image: np.ndarray, color: str) -> int:
    """Pixels of about this color."""
    return int((np.abs(image.astype(int) - rgb(color)).max(-1) < 12).sum())


def volume(shape: tuple[int, int, int] = (20, 16, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose intensity tells the position, and a label with most area at z = 7."""
    grid = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).float()
    image = (grid[0] + 100 * grid[1] + 10_000 * grid[2])[None] / 130_000
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[0, 2:6, 2:5, 5:9] = 1
    label[0, 10:18, 3:12, 7] = 2
    return image, label


def test_dice_of_each_class() -> None:
    label, prediction = torch.randint(0, 3, (2, 9, 9, 9)).numpy().astype(np.uint8)
    scores = class_dice(label, prediction, 4)
    for index in (1, 2):
        both = ((label == index) & (prediction == index)).sum()
        assert scores[index - 1] == 2 * both / ((label == index).sum() + (prediction == index).sum())
    assert np.isnan(scores[2])


def test_the_slice_with_most_label_is_shown_upright() -> None:
    image, label = volume()
    plane = pick(image, label, label, 3)
    assert plane.place == "slice 8 of 12" and plane.dice == [1.0, 1.0] and plane.aspect == 1
    assert np.array_equal(plane.label, label[0, :, :, 7].numpy().T[::-1])
    assert np.array_equal(plane.image, image[0, :, :, 7].numpy().T[::-1])


def test_one_hot_and_indices_are_the_same() -> None:
    image, label = volume()
    onehot = torch.nn.functional.one_hot(label[0].long(), 3).movedim(-1, 0)
    for one, other in zip(pick(image, label, label, 3), pick(image, onehot, label[0], 3), strict=True):
        assert np.array_equal(one, other)


def test_the_coarsest_axis_is_cut_and_pixels_keep_their_shape() -> None:
    image, label = volume()
    plane = pick(image, label, label, 3, spacing=(1.0, 6.0, 2.0))
    assert plane.place.endswith("of 16") and plane.aspect == 2
    assert plane.label.shape == (12, 20)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(), (0,), (0, 2), (0, 1, 2)])
def test_stored_orientation_does_not_change_the_picture(axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    image, label = volume()
    step, spacing = np.diag([1.0, 1.5, 3.0]), [1.0, 1.5, 3.0]
    affine = np.eye(4)
    for position, axis in enumerate(axes):
        affine[:3, position] = step[:, axis] * (-1 if axis in flips else 1)
    stored = [
        data.permute(0, *(axis + 1 for axis in axes)).flip([axes.index(axis) + 1 for axis in flips])
        for data in (image, label)
    ]
    expected, found = pick(image, label, label, 3, spacing), pick(stored[0], stored[1], stored[1], 3, affine=affine)
    for one, other in zip(expected, found, strict=True):
        assert np.allclose(one, other) if not isinstance(one, str) else one == other


def test_colored_pictures_are_whole_and_shapes_must_agree() -> None:
    image, label = torch.rand(3, 9, 7), torch.randint(0, 2, (1, 9, 7))
    plane = pick(image, label, label, 2)
    assert np.array_equal(plane.image, image.movedim(0, -1).numpy()) and plane.place == ""
    with pytest.raises(ValueError, match="differ in shape"):
        pick(image, label[:, 1:], label, 2)


def test_an_overlay_shows_every_class_in_its_color(tmp_path: Path) -> None:
    image, label = volume()
    empty = pick(0 * image, 0 * label, 0 * label, 3)
    overlay(empty, tmp_path / "empty.png", NAMES)
    overlay(pick(0 * image, label, 0 * label, 3), tmp_path / "truth.png", NAMES)
    overlay(pick(0 * image, label, label, 3), tmp_path / "both.png", NAMES, "case 1")
    for color in PALETTE[:2]:
        none, truth, both = (count(pixels(tmp_path / f"{name}.png"), color) for name in ("empty", "truth", "both"))
        assert none < truth < both
    assert np.isnan(empty.dice).all() and empty.mean_dice == 1
    assert pixels(tmp_path / "both.png").shape[1] == 900


def test_many_classes_and_thin_images_can_be_drawn(tmp_path: Path) -> None:
    label = torch.randint(0, 12, (1, 6, 90))
    overlay(pick(torch.rand(1, 6, 90), label, label, 12), tmp_path / "thin.png")
    assert pixels(tmp_path / "thin.png").std() > 10


def test_a_routing_picture_is_brighter_where_more_weight_goes(tmp_path: Path) -> None:
    network = ToyNetwork()
    network.recorded = 1
    records = network.routing()
    routing_picture(records, tmp_path / "one.png")
    routing_picture(
        [record._replace(entropy=1.0, usage={"general": 1.0, "medical": 1.0}) for record in records],
        tmp_path / "full.png",
    )
    one, full = pixels(tmp_path / "one.png"), pixels(tmp_path / "full.png")
    assert one.shape == full.shape and full.mean() > one.mean() + 10
    routing_picture(records[:4], tmp_path / "single.png")
    assert pixels(tmp_path / "single.png").std() > 10


def test_first_and_worst_cases_of_the_best_validation_are_drawn(tmp_path: Path) -> None:
    parts = engines()
    Overlays(tmp_path, 3, SETTINGS["class_names"], first=2, worst=2).attach(parts.evaluator)  # type: ignore[arg-type]
    parts.evaluator.run(1)
    index = json.loads((tmp_path / "overlays" / "index.json").read_text())
    assert sorted(index) == ["first_1.png", "first_2.png", "worst_1.png", "worst_2.png"]
    assert [index[f"first_{n}.png"]["case"] for n in (1, 2)] == ["case00", "case01"]
    scores = sorted(parts.evaluator.state.metric_details["val_mean_dice"].nanmean(1).tolist())
    assert [index[f"worst_{n}.png"]["mean_dice"] for n in (1, 2)] == pytest.approx(scores[:2], abs=1e-6)
    before = (tmp_path / "overlays" / "worst_1.png").read_bytes()
    with torch.no_grad():
        parts.network.decoder[-1].weight.mul_(-1)
        parts.network.decoder[-1].bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    parts.evaluator.run(2)
    assert (tmp_path / "overlays" / "worst_1.png").read_bytes() == before


def test_the_orientation_of_a_volume_comes_from_its_label(tmp_path: Path) -> None:
    image, label = volume()
    affine = torch.diag(torch.tensor([-1.0, -1.0, 4.0, 1.0], dtype=torch.float64))
    handler, state = Overlays(tmp_path, 3), type("State", (), {})()
    state.batch = [{"case": "a"}]
    state.output = [{"image": image, "label": MetaTensor(label, affine=affine), "pred": label}]
    engine = type("Engine", (), {"state": state})()
    handler.start(engine)
    handler.collect(engine)
    found: Slice = handler.firsts[0][1]
    assert np.array_equal(found.label, label[0, :, :, 7].numpy().T[:, ::-1])
