# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Pictures to look at: image, truth and prediction side by side, and where the routers send their weights."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ignite.engine import Events
from monai.engines.workflow import Workflow
from numpy.typing import ArrayLike, NDArray

from medmoe.files import atomic_path, write_text
from medmoe.moe.routing import RoutingRecord
from medmoe.training.handlers import MetricsLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable under the common color vision deficiencies, without yellow and black. Blue
# comes first because it stands out from gray and from tissue alike.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


class Slice(NamedTuple):
    """One plane of a case, ready to be drawn with its first row at the top.

    Attributes:
        image: (H, W) or (H, W, 3), in [0, 1].
        label: (H, W), classes.
        prediction: (H, W), classes.
        aspect: height of a pixel over its width.
        dice: of each class after the background over the whole case; NaN where truth and prediction are both empty.
        place: such as ``"slice 12 of 40"``; empty in 2-D.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    aspect: float
    dice: list[float]
    place: str

    @property
    def mean_dice(self) -> float:
        """Over the classes that occur; 1 where none does."""
        return float(np.nanmean(self.dice)) if not np.all(np.isnan(self.dice)) else 1.0


def to_array(data: Any) -> NDArray[Any]:
    """A tensor on any device, or anything like an array, as NumPy's."""
    return np.asarray(data.detach().cpu() if hasattr(data, "detach") else data)


def to_classes(data: ArrayLike, spatial_dims: int) -> NDArray[np.uint8]:
    """Class indices (H, W[, D]) from (H, W[, D]), (1, H, W[, D]) or one-hot (C, H, W[, D])."""
    array = to_array(data)
    if array.ndim == spatial_dims:
        return array.astype(np.uint8)
    return (array[0] if len(array) == 1 else array.argmax(0)).astype(np.uint8)


def class_dice(label: NDArray[np.uint8], prediction: NDArray[np.uint8], num_classes: int) -> list[float]:
    """Dice of classes 1 to num_classes - 1; NaN where a class is in neither."""
    scores = []
    for index in range(1, num_classes):
        truth, found = label == index, prediction == index
        total = int(truth.sum()) + int(found.sum())
        scores.append(2 * int((truth & found).sum()) / total if total else float("nan"))
    return scores


def to_canonical(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """A volume ([C,] X, Y, Z) with its axes turned and flipped to right, anterior, superior."""
    from nibabel.orientations import apply_orientation, io_orientation

    last = array if array.ndim == 3 else np.moveaxis(array, 0, -1)
    turned: NDArray[Any] = apply_orientation(last, io_orientation(affine))
    return turned if array.ndim == 3 else np.moveaxis(turned, -1, 0)


def pick(
    image: ArrayLike,
    label: ArrayLike,
    prediction: ArrayLike,
    num_classes: int,
    spacing: Sequence[float] | None = None,
    affine: ArrayLike | None = None,
) -> Slice:
    """The plane to show: the whole of a 2-D image; of a volume, the one with most label across its coarsest axis.

    Args:
        image: (C, H, W[, D]) in [0, 1]; three channels are shown in color, otherwise the first.
        label: (H, W[, D]) or (1, H, W[, D]) classes, or (num_classes, H, W[, D]) one-hot, on the grid of the image.
        prediction: likewise.
        num_classes: background included.
        spacing: of a pixel along each axis; 1 by default, or what the affine says.
        affine: (4, 4) of a volume, which is then shown in its anatomical directions (patient's right at the right).

    Raises:
        ValueError: where the three are not on one grid.
    """
    picture = to_array(image)
    dims = picture.ndim - 1
    truth, found = to_classes(label, dims), to_classes(prediction, dims)
    if not picture.shape[1:] == truth.shape == found.shape:
        raise ValueError(f"image {picture.shape[1:]}, label {truth.shape}, prediction {found.shape} differ in shape")
    dice = class_dice(truth, found, num_classes)
    if dims == 2:
        rows, columns = spacing or (1.0, 1.0)
        return Slice(to_gray_or_color(picture), truth, found, rows / columns, dice, "")
    if affine is not None:
        matrix = to_array(affine).astype(np.float64)
        picture, truth, found = (to_canonical(array, matrix) for array in (picture, truth, found))
        spacing = canonical_spacing(matrix)
    step = np.asarray(spacing or (1.0, 1.0, 1.0))
    axis = 2 - int(np.argmax(step[::-1]))
    index = most_label(truth, axis)
    across, up = (other for other in range(3) if other != axis)

    def plane(array: NDArray[Any]) -> NDArray[Any]:
        return np.swapaxes(np.take(array, index, axis=axis - 3), -2, -1)[..., ::-1, :].copy()

    place = f"slice {index + 1} of {truth.shape[axis]}"
    return Slice(to_gray_or_color(plane(picture)), plane(truth), plane(found), step[up] / step[across], dice, place)


def canonical_spacing(affine: NDArray[np.float64]) -> list[float]:
    """Millimeters of a voxel along the right, anterior and superior axes of :func:`to_canonical`."""
    from nibabel.orientations import io_orientation

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return [float(lengths[np.flatnonzero(io_orientation(affine)[:, 0] == axis)[0]]) for axis in range(3)]


def most_label(truth: NDArray[np.uint8], axis: int) -> int:
    """The index along ``axis`` with most labelled voxels; the middle where nothing is labelled."""
    areas = (truth > 0).sum(tuple(other for other in range(3) if other != axis))
    return int(areas.argmax()) if areas.any() else truth.shape[axis] // 2


def to_gray_or_color(picture: NDArray[Any]) -> NDArray[np.float32]:
    """(C, H, W) as (H, W, 3) where there are three channels, else its first channel (H, W); clipped to [0, 1]."""
    clipped = np.clip(picture, 0, 1).astype(np.float32)
    return np.moveaxis(clipped, 0, -1) if len(clipped) == 3 else clipped[0]


def overlay(
    plane: Slice, path: str | os.PathLike[str], class_names: Sequence[str] = (), title: str = "", dpi: int = 100
) -> None:
    """Writes a PNG: image, truth and prediction side by side, classes as tinted areas with an outline.

    Args:
        plane: from :func:`pick`.
        path: a ``.png`` file.
        class_names: of all classes, background first.
        title: shown before the Dice of the case.
        dpi: pixels per inch of the 9 inch wide picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = plane.label.shape
    ratio = min(2.5, max(0.4, height * plane.aspect / width))
    figure = Figure(figsize=(9, 3 * ratio + 0.9), layout="constrained", dpi=dpi)
    shown = {"image": np.zeros_like(plane.label), "truth": plane.label, "prediction": plane.prediction}
    for axes, (name, classes) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        draw_plane(axes, plane, classes)
        axes.set_title(name, fontsize=9)
    names = [class_name(index, class_names) for index in range(1, len(plane.dice) + 1)]
    parts = [title, plane.place, f"mean Dice {plane.mean_dice:.3f}"]
    figure.suptitle("  ".join(part for part in parts if part), fontsize=10)
    scores = ["absent" if np.isnan(score) else f"Dice {score:.3f}" for score in plane.dice]
    patches = [
        Patch(color=color(index), label=f"{name}  {score}")
        for index, (name, score) in enumerate(zip(names, scores, strict=True), 1)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(4, len(patches)), fontsize=8, frameon=False)
    write_figure(figure, path)


def class_name(index: int, class_names: Sequence[str]) -> str:
    """The name of class ``index``, or its number."""
    return class_names[index] if index < len(class_names) else f"class {index}"


def color(index: int) -> str:
    """The color of class ``index``, from 1; they repeat after six."""
    return PALETTE[(index - 1) % len(PALETTE)]


def draw_plane(axes: Axes, plane: Slice, classes: NDArray[np.uint8]) -> None:
    """The image in gray or color, and over it the areas and outlines of ``classes``."""
    from matplotlib.colors import to_rgba

    axes.imshow(plane.image, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
    axes.set_axis_off()
    for index in np.unique(classes[classes > 0]).tolist():
        inside: NDArray[np.bool_] = np.equal(classes, index)
        tint = np.zeros((*inside.shape, 4))
        tint[inside] = to_rgba(color(index), 0.3)
        axes.imshow(tint, aspect=plane.aspect, interpolation="nearest")
        # A margin closes outlines at the border of the image.
        extent = np.arange(-1, inside.shape[1] + 1), np.arange(-1, inside.shape[0] + 1)
        for ink, line in (("black", 2.4), (color(index), 1.2)):
            axes.contour(*extent, np.pad(inside, 1).astype(float), [0.5], colors=ink, linewidths=line)
    axes.set_xlim(-0.5, plane.label.shape[1] - 0.5)
    axes.set_ylim(plane.label.shape[0] - 0.5, -0.5)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Renders ``figure`` without a display and without pyplot's global state, and writes it atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def routing_picture(records: Sequence[RoutingRecord], path: str | os.PathLike[str]) -> None:
    """Writes a PNG with a panel for each expert: the weight of each expert's tokens at each site, and the entropy.

    Args:
        records: one for each router, at least one.
        path: a ``.png`` file.
    """
    from matplotlib.figure import Figure

    receivers = list(dict.fromkeys(record.expert for record in records))
    sources = list(dict.fromkeys(name for record in records for name in record.usage))
    sites = max(sum(record.expert == name for record in records) for name in receivers)
    size = (1.2 + len(receivers) * (1.1 + 0.8 * len(sources)), 1.9 + 0.32 * sites)
    figure = Figure(figsize=(max(5.0, size[0]), size[1]), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(receivers), squeeze=False)[0]
    for axes, receiver in zip(panels, receivers, strict=True):
        own = sorted((record for record in records if record.expert == receiver), key=lambda record: record.site)
        values = np.array([[record.usage.get(name, 0.0) for name in sources] + [record.entropy] for record in own])
        shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.axvline(len(sources) - 0.5, color="white", linewidth=3)
        axes.set_xticks(range(len(sources) + 1), [*sources, "entropy"], rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(own)), [str(record.site) for record in own], fontsize=8)
        axes.set_title(f"prompts of {receiver}", fontsize=9)
        axes.set_ylabel("site", fontsize=8)
        for (row, column), value in np.ndenumerate(values):
            ink = "black" if value > 0.55 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(shown, ax=panels.tolist())
    bar.set_label("share of weight; entropy / maximum", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    write_figure(figure, path)


class RoutingPicture:
    """Writes ``routing.png`` to ``output_dir`` when the training ends.

    Args:
        log: the metrics log of the same trainer, which has the network's routing.
        output_dir: of the run.
    """

    def __init__(self, log: MetricsLog, output_dir: str | os.PathLike[str]) -> None:
        self.log, self.path = log, Path(output_dir) / "routing.png"

    def attach(self, trainer: Workflow) -> None:
        """Registers with ``trainer``."""
        trainer.add_event_handler(Events.COMPLETED, self)

    def __call__(self, trainer: Workflow) -> None:
        if self.log.routing:
            routing_picture(self.log.routing, self.path)


class Overlays:
    """Writes overlays of the first and of the worst validation cases, whenever the key metric is the best so far.

    The files in ``output_dir/overlays`` are numbered; ``index.json`` beside them, which is not sent to MLflow, says
    which case each one shows. Batches must be decollated, and image, label and prediction on one grid.

    Args:
        output_dir: of the run.
        num_classes: background included.
        class_names: of all classes, background first.
        first: how many of the first cases to show.
        worst: how many of the cases with the lowest mean Dice to show.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        num_classes: int,
        class_names: Sequence[str] = (),
        first: int = 2,
        worst: int = 2,
    ) -> None:
        self.folder, self.num_classes, self.class_names = Path(output_dir) / "overlays", num_classes, class_names
        self.first, self.worst = first, worst

    def attach(self, evaluator: Workflow) -> None:
        """Registers with ``evaluator``."""
        evaluator.add_event_handler(Events.STARTED, self.start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        evaluator.add_event_handler(Events.COMPLETED, self.draw)

    def start(self, evaluator: Workflow) -> None:
        """Forgets the cases of the last validation."""
        self.count = 0
        self.firsts: list[tuple[str, Slice]] = []
        self.worsts: list[tuple[float, int, str, Slice]] = []

    def collect(self, evaluator: Workflow) -> None:
        """Keeps one plane of each case that is among the first or, so far, the worst."""
        for item, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            affine = getattr(output["label"], "affine", None) if output["image"].ndim == 4 else None
            plane = pick(output["image"], output["label"], output["pred"], self.num_classes, affine=affine)
            name = str(item.get("case", self.count))
            if self.count < self.first:
                self.firsts.append((name, plane))
            heapq.heappush(self.worsts, (-plane.mean_dice, -self.count, name, plane))
            if len(self.worsts) > self.worst:
                heapq.heappop(self.worsts)
            self.count += 1

    def draw(self, evaluator: Workflow) -> None:
        """Writes the pictures, if this validation is the best so far."""
        if evaluator.state.best_metric_epoch not in (-1, evaluator.state.epoch):
            return
        worst = [(name, plane) for _, _, name, plane in sorted(self.worsts, reverse=True, key=lambda entry: entry[:2])]
        shown = {f"first_{number}.png": entry for number, entry in enumerate(self.firsts, 1)}
        shown |= {f"worst_{number}.png": entry for number, entry in enumerate(worst, 1)}
        for file, (_, plane) in shown.items():
            overlay(plane, self.folder / file, self.class_names, Path(file).stem.replace("_", " "))
        index = {file: {"case": name, "mean_dice": plane.mean_dice} for file, (name, plane) in shown.items()}
        write_text(self.folder / "index.json", json.dumps(index, indent=2) + "\n")
