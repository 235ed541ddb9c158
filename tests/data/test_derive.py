# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medmoe.data.derive import boundary, derive, signed_distance
from medmoe.tasks import DISTANCE_LIMIT, UNLABELLED, make_tasks

SHAPES = [(17, 23), (9, 12, 7)]


def blobs(shape: tuple[int, ...]) -> np.ndarray:
    """A random mask with smooth parts, some of which touch the border."""
    noise = ndimage.gaussian_filter(torch.randn(*shape).numpy(), 1.5)
    return (noise > np.quantile(noise, 0.7)).astype(np.uint8)


def brute_force(mask: np.ndarray, sampling: list[float]) -> np.ndarray:
    """Signed distances by comparing every voxel with every other."""
    points = np.stack(np.nonzero(np.ones_like(mask)), 1) * np.asarray(sampling)
    values = mask.ravel()
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    other = np.where(values[:, None] != values[None], distances, np.inf).min(1)
    return (np.where(values == 1, 1, -1) * np.minimum(other / DISTANCE_LIMIT, 1)).reshape(mask.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [None, 0.5, 3.0])
def test_signed_distance_is_that_to_the_nearest_voxel_of_the_other_side(
    shape: tuple[int, ...], step: float | None
) -> None:
    mask = blobs(shape)
    sampling = None if step is None else [step, *[1.0] * (len(shape) - 1)]
    found = signed_distance(mask, sampling)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, brute_force(mask, sampling or [1.0] * len(shape)), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_boundary_is_dilation_minus_erosion(shape: tuple[int, ...]) -> None:
    mask = blobs(shape)
    cross = ndimage.generate_binary_structure(len(shape), 1)
    expected = ndimage.binary_dilation(mask, cross) & ~ndimage.binary_erosion(mask, cross, border_value=1)
    assert np.array_equal(boundary(mask), expected)
    nearly_one = [1 - 1e-9] * len(shape)  # goes by distances
    assert np.array_equal(boundary(mask, nearly_one), expected)
    assert np.array_equal(boundary(mask, [2.0] * len(shape)), expected)


def test_boundary_on_a_finer_grid_is_as_thick_as_on_the_networks() -> None:
    coarse = blobs((20, 20))
    fine = coarse.repeat(4, 0).repeat(4, 1)
    edge = np.zeros((40, 8), np.uint8)
    edge[20:] = 1
    assert boundary(edge, [0.25, 0.25]).sum(0).tolist() == [8] * 8  # two voxels of the network's grid
    on_coarse = boundary(coarse).repeat(4, 0).repeat(4, 1)
    on_fine = boundary(fine, [0.25, 0.25])
    assert 2 * (on_coarse & on_fine).sum() / (on_coarse.sum() + on_fine.sum()) > 0.8


@pytest.mark.parametrize(("value", "sign"), [(0, -1), (1, 1)])
def test_empty_and_full_masks(value: int, sign: int) -> None:
    mask = np.full((5, 6), value, np.uint8)
    assert (signed_distance(mask) == sign).all() and not boundary(mask).any()


def test_what_is_not_labelled_stays_so() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 1
    mask[:, 50:] = UNLABELLED
    distance, edge = signed_distance(mask), boundary(mask)
    known = np.broadcast_to(np.arange(60), mask.shape)
    # Columns 30 to 39 are nearer to the background than to what is not known; 30 - 16 and before are cut off anyway.
    assert np.isnan(distance[known >= 40]).all()
    assert np.isfinite(distance[known < 40]).all()
    np.testing.assert_allclose(distance[0, 28:32], np.array([-2, -1, 1, 2]) / DISTANCE_LIMIT, atol=1e-7)
    assert (edge[known >= 49] == UNLABELLED).all() and set(np.unique(edge[known < 49])) == {0, 1}
    assert np.flatnonzero(edge[0] == 1).tolist() == [29, 30]
    fine = boundary(mask, [0.5, 0.5])
    assert np.flatnonzero(fine[0] == 1).tolist() == [28, 29, 30, 31] and (fine[:, 48:] == UNLABELLED).all()


@pytest.mark.parametrize("kind", ["boundary", "distance"])
def test_unlabelled_planes_and_classes_become_channels(kind: str) -> None:
    organs, derived = make_tasks(
        [{"name": "organs", "kind": "labels", "names": ["a", "b"]}, {"name": "d", "kind": kind, "of": "organs"}]
    )
    masks = np.stack([blobs((9, 8)), np.full((9, 8), UNLABELLED, np.uint8)])
    target = derive(derived, organs, masks)
    assert target.shape == (2, 9, 8)
    unknown = np.isnan(target) if kind == "distance" else target == UNLABELLED
    assert not unknown[0].any() and unknown[1].all()
    classes, derived = make_tasks(
        [{"name": "c", "kind": "classes", "names": ["none", "a", "b"]}, {"name": "d", "kind": kind, "of": "c"}]
    )
    mask = torch.randint(0, 3, (1, 9, 8), dtype=torch.uint8).numpy()
    make = signed_distance if kind == "distance" else boundary
    expected = np.stack([make((mask[0] == index).astype(np.uint8)) for index in (1, 2)])
    assert np.array_equal(derive(derived, classes, mask), expected)
