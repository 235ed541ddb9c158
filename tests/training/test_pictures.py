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
from training.toy_engines import engines

from medmoe.tasks import UNLABELLED, Task, single_task
from medmoe.training.pictures import PALETTE, Overlays, Slice, channel_dice, compare, overlay, pick

TASK = single_task(3, ["background", "anterior", "posterior"])[0]


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


def onehot(label: torch.Tensor, count: int = 3) -> torch.Tensor:
    return torch.nn.functional.one_hot(label[0].long(), count).movedim(-1, 0).float()


def shown(image: torch.Tensor, label: torch.Tensor, prediction: torch.Tensor, **options: object) -> Slice:
    """The plane of two classes, from indices."""
    return pick(image, [compare(TASK, label, onehot(prediction))], **options)


def same(one: Slice, other: Slice) -> bool:
    pairs = zip(one.channels, other.channels, strict=True)
    arrays = [
        (one.image, other.image),
        *((getattr(x, n), getattr(y, n)) for x, y in pairs for n in ("truth", "prediction")),
    ]
    return all(np.allclose(x, y) for x, y in arrays) and (one.aspect, one.place) == (other.aspect, other.place)


def test_dice_of_each_channel() -> None:
    truth, found = torch.randint(0, 2, (2, 3, 9, 9, 9)).bool().numpy()
    truth[2] = found[2] = False
    scores = channel_dice(truth, found)
    for k in (0, 1):
        assert scores[k] == 2 * (truth[k] & found[k]).sum() / (truth[k].sum() + found[k].sum())
    assert np.isnan(scores[2])


def test_what_is_not_labelled_is_not_counted() -> None:
    label = torch.randint(0, 3, (1, 12, 10), dtype=torch.uint8)
    label[:, 6:] = UNLABELLED
    guess = torch.randint(0, 3, (1, 12, 10))
    found, half = compare(TASK, label, onehot(guess)), compare(TASK, label[:, :6], onehot(guess[:, :6]))
    assert found.dice == half.dice and found.labelled == [True, True]
    organs = Task("organs", "labels", ("left", "right"))
    target = torch.stack([torch.randint(0, 2, (5, 5)), torch.full((5, 5), UNLABELLED)]).to(torch.uint8)
    both = compare(organs, target, torch.rand(2, 5, 5))
    assert both.labelled == [True, False] and np.isnan(both.dice[1])
    assert pick(torch.rand(1, 5, 5), [both]).mean_dice == both.dice[0]


def test_the_slice_with_most_label_is_shown_upright() -> None:
    image, label = volume()
    plane = shown(image, label, label)
    assert plane.place == "slice 8 of 12" and plane.channels[0].dice == [1.0, 1.0] and plane.aspect == 1
    upright = label[0, :, :, 7].numpy().T[::-1]
    for k in (1, 2):
        assert np.array_equal(plane.channels[0].truth[k - 1], upright == k)
        assert np.array_equal(plane.channels[0].prediction[k - 1], upright == k)
    assert np.array_equal(plane.image, image[0, :, :, 7].numpy().T[::-1])


def test_one_hot_and_indices_are_the_same() -> None:
    image, label = volume()
    assert same(shown(image, label, label), pick(image, [compare(TASK, onehot(label), onehot(label))]))


def test_the_coarsest_axis_is_cut_and_pixels_keep_their_shape() -> None:
    image, label = volume()
    plane = shown(image, label, label, spacing=(1.0, 6.0, 2.0))
    assert plane.place.endswith("of 16") and plane.aspect == 2
    assert plane.image.shape == (12, 20)


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
    assert same(shown(image, label, label, spacing=spacing), shown(stored[0], stored[1], stored[1], affine=affine))


def test_colored_pictures_are_whole_and_shapes_must_agree() -> None:
    image, label = torch.rand(3, 9, 7), torch.randint(0, 3, (1, 9, 7))
    plane = shown(image, label, label)
    assert np.array_equal(plane.image, image.movedim(0, -1).numpy()) and plane.place == ""
    for wrong in (lambda: shown(image, label[:, 1:], label), lambda: shown(image[:, 1:], label, label)):
        with pytest.raises(ValueError, match="differ in shape"):
            wrong()


def test_an_overlay_shows_every_class_in_its_color(tmp_path: Path) -> None:
    image, label = volume()
    empty = shown(0 * image, 0 * label, 0 * label)
    overlay(empty, tmp_path / "empty.png")
    overlay(shown(0 * image, label, 0 * label), tmp_path / "truth.png")
    overlay(shown(0 * image, label, label), tmp_path / "both.png", "case 1")
    for color in PALETTE[:2]:
        none, truth, both = (count(pixels(tmp_path / f"{name}.png"), color) for name in ("empty", "truth", "both"))
        assert none < truth < both
    assert np.isnan(empty.channels[0].dice).all() and empty.mean_dice == 1
    assert pixels(tmp_path / "both.png").shape[1] == 1100


def test_many_classes_and_thin_images_can_be_drawn(tmp_path: Path) -> None:
    task = single_task(12)[0]
    label = torch.randint(0, 12, (1, 6, 90))
    overlay(pick(torch.rand(1, 6, 90), [compare(task, label, onehot(label, 12))]), tmp_path / "thin.png")
    assert pixels(tmp_path / "thin.png").std() > 10


TASKS = [
    Task("organs", "labels", ("left", "right")),
    Task("edges", "boundary", ("left", "right"), of="organs"),
    Task("depth", "distance", ("left",), of="organs"),
    Task("finding", "image", ("none", "nodule")),
]


def several() -> dict[str, object]:
    """An evaluator's output of several tasks, where the right one is nowhere labelled."""
    target = torch.randint(0, 2, (2, 20, 16), dtype=torch.uint8)
    target[1] = UNLABELLED
    distance = torch.rand(1, 20, 16) * 2 - 1
    found = {"organs": torch.rand(2, 20, 16), "edges": torch.rand(2, 20, 16), "depth": distance.flip(1)}
    true = {"organs": target, "edges": target, "depth": distance, "finding": 0}
    found["finding"] = torch.tensor([0.25, 0.75])
    return {
        "image": torch.rand(1, 20, 16),
        **{f"pred_{n}": v for n, v in found.items()},
        **{f"target_{n}": v for n, v in true.items()},
    }


def test_every_task_has_a_row_and_what_is_said_of_the_whole_a_place_in_the_title(tmp_path: Path) -> None:
    output = several()
    case = Overlays(tmp_path, TASKS).shown("a", output)
    assert [each.task.name for each in case.plane.channels] == ["organs", "edges", "depth"]
    assert case.verdicts == "finding: nodule (0.75), truth none"
    assert case.score == case.plane.mean_dice == case.plane.channels[0].dice[0]
    overlay(case.plane, tmp_path / "several.png", case.verdicts)
    overlay(case.plane._replace(channels=case.plane.channels[:1]), tmp_path / "one.png", case.verdicts)
    assert pixels(tmp_path / "several.png").shape[0] > 2.5 * pixels(tmp_path / "one.png").shape[0]
    alone = Overlays(tmp_path, TASKS[3:]).shown("a", output)
    assert alone.score == 0.25 and not alone.plane.channels
    overlay(alone.plane, tmp_path / "none.png", alone.verdicts)


def test_first_and_worst_cases_of_the_best_validation_are_drawn(tmp_path: Path) -> None:
    parts = engines()
    Overlays(tmp_path, parts.network.tasks, first=2, worst=2).attach(parts.evaluator)  # type: ignore[arg-type]
    parts.evaluator.run(1)
    index = json.loads((tmp_path / "overlays" / "index.json").read_text())
    assert sorted(index) == ["first_1.png", "first_2.png", "worst_1.png", "worst_2.png"]
    assert [index[f"first_{n}.png"]["case"] for n in (1, 2)] == ["case00", "case01"]
    scores = sorted(parts.evaluator.state.metric_details["val_mean_dice"].nanmean(1).tolist())
    assert [index[f"worst_{n}.png"]["score"] for n in (1, 2)] == pytest.approx(scores[:2], abs=1e-6)
    before = (tmp_path / "overlays" / "worst_1.png").read_bytes()
    with torch.no_grad():
        parts.network.decoder[-1].weight.mul_(-1)
        parts.network.decoder[-1].bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    parts.evaluator.run(2)
    assert (tmp_path / "overlays" / "worst_1.png").read_bytes() == before


def test_the_orientation_of_a_volume_comes_from_its_image(tmp_path: Path) -> None:
    image, label = volume()
    affine = torch.diag(torch.tensor([-1.0, -1.0, 4.0, 1.0], dtype=torch.float64))
    output = {"image": MetaTensor(image, affine=affine), "target_label": label, "pred_label": onehot(label)}
    found = Overlays(tmp_path, [TASK]).shown("a", output).plane
    assert np.array_equal(found.channels[0].truth[1], label[0, :, :, 7].numpy().T[:, ::-1] == 2)
