# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Windows over images in 2-D and 3-D."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from medmoe.data import augmentation
from medmoe.errors import ConfigError
from medmoe.inference.inferer import sliding_window, window_count
from medmoe.tasks import Task, single_task


class Counting(torch.nn.Module):
    """A network that looks around each voxel, and keeps what it was shown and its shapes."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        convolution = torch.nn.Conv2d if spatial_dims == 2 else torch.nn.Conv3d
        self.convolution = convolution(1, 3, 3, padding=1)
        self.seen: list[tuple[int, ...]] = []
        self.images: list[torch.Tensor] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(image.shape))
        self.images.append(image)
        return self.convolution(image)


@pytest.mark.parametrize(("size", "roi"), [((40, 33), (16, 20)), ((20, 17, 23), (8, 16, 9))])
@torch.no_grad()
def test_equals_monai_where_the_image_is_larger(size: tuple[int, ...], roi: tuple[int, ...]) -> None:
    network, image = Counting(len(size)), torch.rand(2, 1, *size)
    expected = SlidingWindowInferer(roi, 4, 0.25, mode="gaussian")(image, network)
    torch.testing.assert_close(sliding_window(roi, len(size))(image, network), expected)


@torch.no_grad()
def test_a_voxelwise_network_is_not_changed() -> None:
    image = torch.rand(1, 1, 30, 31, 29)
    result = sliding_window(12, 3)(image, lambda x: torch.cat([x, 2 * x], 1))
    torch.testing.assert_close(result, torch.cat([image, 2 * image], 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(24, 17), (9, 12, 14)])
@torch.no_grad()
def test_a_small_image_is_padded_as_in_training(size: tuple[int, ...]) -> None:
    """The network has to see it at the scale that it was trained at."""
    network, image = Counting(len(size)), torch.rand(1, 1, *size)
    result = sliding_window(32, len(size))(image, network)
    padded = augmentation(len(size), 32, "none")({"image": image[0], "label": image[0]})["image"]
    assert network.seen == [(1, 1, *[32] * len(size))]
    assert network.images[0].equal(padded[None])
    inside = tuple(slice((32 - side) // 2, (32 - side) // 2 + side) for side in size)
    torch.testing.assert_close(result, network(padded[None])[(..., *inside)], atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_image_of_the_windows_size_is_seen_as_it_is() -> None:
    network, image = Counting(2), torch.rand(1, 1, 24, 17)
    assert torch.equal(sliding_window((24, 17), 2)(image, network), network(image))


@torch.no_grad()
def test_a_window_may_take_an_axis_whole() -> None:
    network = Counting(3)
    sliding_window((-1, -1, 8), 3)(torch.rand(1, 1, 20, 40, 30), network)
    assert {shape[2:] for shape in network.seen} == {(20, 40, 8)}


@torch.no_grad()
def test_window_count_is_monais() -> None:
    for _ in range(20):
        size = torch.randint(10, 40, (3,)).tolist()
        roi = torch.randint(4, 14, (3,)).tolist()
        overlap = torch.rand(3).mul(0.8).tolist()
        network = Counting(3)
        SlidingWindowInferer(roi, 1, overlap)(torch.rand(1, 1, *size), network)
        assert window_count(size, roi, overlap) == len(network.seen)


@torch.no_grad()
def test_progress_counts_every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from medmoe.inference import inferer

    bars = []

    class Spy(inferer.Progress):
        def __exit__(self, *error: object) -> None:
            bars.append((self.description, self.done, self.total))

    monkeypatch.setattr(inferer, "Progress", Spy)
    sliding_window(8, 2, progress=True)(torch.rand(2, 1, 20, 21), Counting(2))
    sliding_window(8, 2, sw_batch_size=5, progress="looking")(torch.rand(1, 1, 20, 21), Counting(2))
    assert bars == [("windows", 24, 24), ("looking", 12, 12)]


@torch.no_grad()
def test_metadata_survive() -> None:
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    image = MetaTensor(torch.rand(1, 1, 20, 20, 20), affine=affine)
    assert torch.equal(sliding_window(8, 3)(image, lambda x: x).affine, affine)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"roi_size": (8, 8)}, "expected 3 positive numbers"),
        ({"roi_size": 0}, "positive"),
        ({"roi_size": 8, "overlap": 1.0}, "below 1"),
        ({"roi_size": 8, "sw_batch_size": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range(arguments: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        sliding_window(spatial_dims=3, **arguments)


def test_image_of_other_dimension() -> None:
    with pytest.raises(ConfigError, match=r"2-D .* 3 numbers"):
        sliding_window(8, 3)(torch.rand(1, 1, 20, 20), Counting(2))


ORGANS, EDGES = Task("organs", "labels", ("a", "b")), Task("edges", "boundary", ("a", "b"), of="organs")
GRADE = Task("grade", "image", ("low", "middle", "high"))


class Several(torch.nn.Module):
    """Dense tasks look around each voxel and at the condition; the image-level one sees means of all there is."""

    def __init__(self, tasks: list[Task]) -> None:
        super().__init__()
        self.tasks, self.dense = tasks, [task for task in tasks if task.dense]
        self.convolution = torch.nn.Conv2d(1, sum(task.channels for task in self.dense) or 1, 3, padding=1)
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def of_condition(self, image: torch.Tensor, condition: dict[str, torch.Tensor] | None) -> torch.Tensor:
        numbers = torch.zeros(1, 1) if condition is None else condition["numbers"]
        return numbers.expand(len(image), 1)

    def forward(self, image: torch.Tensor, condition: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        self.seen.append(("forward", tuple(image.shape)))
        return self.convolution(image) + self.of_condition(image, condition)[..., None, None]

    def split(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = logits.split([task.channels for task in self.dense], 1)
        return {task.name: part for task, part in zip(self.dense, parts, strict=True)}

    def image_outputs(self, image: torch.Tensor, condition: dict[str, torch.Tensor] | None = None) -> dict:
        self.seen.append(("image", tuple(image.shape)))
        mean = image.mean((1, 2, 3))[:, None] + self.of_condition(image, condition)
        return {task.name: mean.expand(-1, task.channels) for task in self.tasks if not task.dense}

    def outputs(self, image: torch.Tensor, condition: dict[str, torch.Tensor] | None = None) -> dict:
        dense = self.split(self(image, condition)) if self.dense else {}
        return dense | self.image_outputs(image, condition)


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_dense_tasks_come_from_windows_and_the_image_is_judged_once_and_whole(given: bool) -> None:
    network, image = Several([ORGANS, GRADE, EDGES]), torch.rand(2, 1, 30, 26)
    condition = {"numbers": torch.tensor([[1.0], [5.0]])} if given else None
    outputs = sliding_window(12, 2)(image, network, condition=condition)
    calls = network.seen.copy()
    assert calls.count(("image", (2, 1, 30, 26))) == 1 and sum(name == "image" for name, _ in calls) == 1
    assert {shape[2:] for name, shape in calls if name == "forward"} == {(12, 12)}
    assert {name: tuple(logits.shape) for name, logits in outputs.items()} == {
        "organs": (2, 2, 30, 26),
        "edges": (2, 2, 30, 26),
        "grade": (2, 3),
    }
    torch.testing.assert_close(outputs["grade"], network.image_outputs(image, condition)["grade"])
    for index in range(2):
        one = None if condition is None else {"numbers": condition["numbers"][index : index + 1]}
        bound = SlidingWindowInferer((12, 12), 4, 0.25, mode="gaussian")
        expected = network.split(bound(image[index : index + 1], lambda x, one=one: network(x, one)))
        for name, logits in expected.items():
            torch.testing.assert_close(outputs[name][index], logits[0])


@torch.no_grad()
def test_a_condition_belongs_to_its_image_in_plain_segmentation_too() -> None:
    network, image = Several([ORGANS]), torch.rand(2, 1, 20, 20)
    network.tasks = single_task(2)
    condition = {"numbers": torch.tensor([[1.0], [50.0]])}
    logits = sliding_window(8, 2)(image, network, condition=condition)
    assert logits.shape == (2, 2, 20, 20)
    difference = sliding_window(8, 2)(image, network) - logits
    torch.testing.assert_close(difference, -condition["numbers"][..., None, None].expand_as(logits))
    of_all = sliding_window(8, 2)(image, network, condition={"numbers": torch.tensor([[3.0]])})
    torch.testing.assert_close(of_all, logits + difference + 3)


@pytest.mark.parametrize("size", [(24, 17), (32, 32)])
@torch.no_grad()
def test_an_image_within_the_window_is_seen_once(size: tuple[int, int]) -> None:
    network, image = Several([ORGANS, GRADE]), torch.rand(1, 1, *size)
    outputs = sliding_window(32, 2)(image, network, condition={"numbers": torch.ones(1, 1)})
    assert network.seen == [("forward", (1, 1, 32, 32)), ("image", (1, 1, 32, 32))]
    padded = augmentation(2, 32, "none")({"image": image[0], "label": image[0]})["image"][None]
    expected = network.outputs(padded, {"numbers": torch.ones(1, 1)})
    top, left = ((32 - side) // 2 for side in size)
    inside = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    torch.testing.assert_close(outputs["organs"], expected["organs"][inside])
    torch.testing.assert_close(outputs["grade"], expected["grade"])


@pytest.mark.parametrize("size", [(20, 30), (50, 60), (-1, 60)])
@torch.no_grad()
def test_an_image_level_network_sees_the_whole_image(size: tuple[int, int]) -> None:
    network = Several([GRADE])
    outputs = sliding_window(32, 2)(torch.rand(3, 1, max(size[0], 10), size[1]), network)
    assert set(outputs) == {"grade"} and outputs["grade"].shape == (3, 3)
    assert network.seen == [("image", (3, 1, max(size[0], 32), max(size[1], 32)))]


@torch.no_grad()
def test_a_mask_with_another_name_than_that_of_plain_segmentation_is_in_a_dictionary() -> None:
    image = MetaTensor(torch.rand(1, 1, 20, 20))
    for size in (8, 20, 32):
        outputs = sliding_window(size, 2)(image, Several([ORGANS]))
        assert set(outputs) == {"organs"} and outputs["organs"].shape == (1, 2, 20, 20)
