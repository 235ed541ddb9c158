# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Pictures to look at: image, truth and prediction side by side, task by task."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ignite.engine import Events
from monai.engines.workflow import Workflow
from numpy.typing import ArrayLike, NDArray

from medmoe.files import atomic_path, write_text
from medmoe.tasks import UNLABELLED, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable under the common color vision deficiencies, without yellow and black. Blue
# comes first because it stands out from gray and from tissue alike.
PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
SIDES = (("#b40426", "inside"), ("#3b4cc0", "outside"))
"""The ends of the color map of a signed distance."""


class Channels(NamedTuple):
    """What one dense task says, and what is true.

    Attributes:
        task: dense.
        truth: (n, H, W[, D]): of masks the foreground's areas, bool; of a distance its values, NaN where not labelled.
        prediction: likewise.
        labelled: of each channel, whether anything of it is labelled.
        dice: of each mask over the whole case; NaN where truth and prediction are both empty or nothing is labelled.
    """

    task: Task
    truth: NDArray[Any]
    prediction: NDArray[Any]
    labelled: list[bool]
    dice: list[float]


class Slice(NamedTuple):
    """One plane of a case, ready to be drawn with its first row at the top.

    Attributes:
        image: (H, W) or (H, W, 3), in [0, 1].
        channels: of every dense task, in this plane.
        aspect: height of a pixel over its width.
        place: such as ``"slice 12 of 40"``; empty in 2-D.
    """

    image: NDArray[np.float32]
    channels: list[Channels]
    aspect: float
    place: str

    @property
    def mean_dice(self) -> float:
        """Over the masks of the first task that has masks, those that occur; 1 where none does."""
        dice = next((each.dice for each in self.channels if each.dice), [])
        return float(np.nanmean(dice)) if not np.all(np.isnan(dice)) else 1.0


def to_array(data: Any) -> NDArray[Any]:
    """A tensor on any device, or anything like an array, as NumPy's."""
    return np.asarray(data.detach().cpu() if hasattr(data, "detach") else data)


def compare(task: Task, target: ArrayLike, prediction: ArrayLike) -> Channels:
    """What a dense task says over a whole case, beside the truth.

    Args:
        task: dense.
        target: as in a sample: (1, H, W[, D]) class indices or (channels, H, W[, D]) masks, 255 where not labelled;
            one-hot classes; or (channels, H, W[, D]) distances, NaN where not labelled.
        prediction: (channels, H, W[, D]) probabilities, or distances.

    Raises:
        ValueError: where the two are not on one grid.
    """
    truth, found = to_array(target), to_array(prediction)
    if truth.shape[1:] != found.shape[1:]:
        raise ValueError(f"{task.name}: truth {truth.shape[1:]} and prediction {found.shape[1:]} differ in shape")
    if task.kind == "distance":
        known = ~np.isnan(truth)
        return Channels(task, truth, found, channels_of(known), [])
    if task.kind == "classes":
        indices = truth[0] if len(truth) == 1 else truth.argmax(0)
        truth = np.stack([np.where(indices == UNLABELLED, UNLABELLED, indices == k) for k in range(1, task.channels)])
        found = np.stack([found.argmax(0) == k for k in range(1, task.channels)])
    known = truth != UNLABELLED
    truth, found = (truth == 1), (found >= 0.5)
    dice = channel_dice(truth & known, found & known) if task.kind != "boundary" else []
    return Channels(task, truth, found, channels_of(known), dice)


def channels_of(known: NDArray[np.bool_]) -> list[bool]:
    """Of each channel (n, ...), whether anything in it is known."""
    return [bool(channel.any()) for channel in known]


def channel_dice(truth: NDArray[np.bool_], prediction: NDArray[np.bool_]) -> list[float]:
    """Dice of each of the masks (n, ...); NaN where a mask is empty in both."""
    scores = []
    for one, other in zip(truth, prediction, strict=True):
        total = int(one.sum()) + int(other.sum())
        scores.append(2 * int((one & other).sum()) / total if total else float("nan"))
    return scores


def to_canonical(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """A volume ([C,] X, Y, Z) with its axes turned and flipped to right, anterior, superior."""
    from nibabel.orientations import apply_orientation, io_orientation

    last = array if array.ndim == 3 else np.moveaxis(array, 0, -1)
    turned: NDArray[Any] = apply_orientation(last, io_orientation(affine))
    return turned if array.ndim == 3 else np.moveaxis(turned, -1, 0)


def pick(
    image: ArrayLike,
    channels: Sequence[Channels],
    spacing: Sequence[float] | None = None,
    affine: ArrayLike | None = None,
) -> Slice:
    """The plane to show: the whole of a 2-D image; of a volume, the one with most label across its coarsest axis.

    Args:
        image: (C, H, W[, D]) in [0, 1]; three channels are shown in color, otherwise the first.
        channels: from :func:`compare`, on the grid of the image; the label is that of the first task with masks.
        spacing: of a pixel along each axis; 1 by default, or what the affine says.
        affine: (4, 4) of a volume, which is then shown in its anatomical directions (patient's right at the right).

    Raises:
        ValueError: where they are not on one grid.
    """
    picture = to_array(image)
    for each in channels:
        if each.truth.shape[1:] != picture.shape[1:]:
            raise ValueError(f"image {picture.shape[1:]} and {each.task.name} {each.truth.shape[1:]} differ in shape")
    if picture.ndim == 3:
        rows, columns = spacing or (1.0, 1.0)
        return Slice(to_gray_or_color(picture), list(channels), rows / columns, "")
    if affine is not None:
        matrix = to_array(affine).astype(np.float64)
        picture = to_canonical(picture, matrix)
        channels = [
            each._replace(truth=to_canonical(each.truth, matrix), prediction=to_canonical(each.prediction, matrix))
            for each in channels
        ]
        spacing = canonical_spacing(matrix)
    step = np.asarray(spacing or (1.0, 1.0, 1.0))
    axis = 2 - int(np.argmax(step[::-1]))
    index = most_label(next((each.truth for each in channels if each.dice), np.zeros((1, *picture.shape[1:]))), axis)
    across, up = (other for other in range(3) if other != axis)

    def plane(array: NDArray[Any]) -> NDArray[Any]:
        return np.swapaxes(np.take(array, index, axis=axis - 3), -2, -1)[..., ::-1, :].copy()

    place = f"slice {index + 1} of {picture.shape[axis + 1]}"
    flat = [each._replace(truth=plane(each.truth), prediction=plane(each.prediction)) for each in channels]
    return Slice(to_gray_or_color(plane(picture)), flat, step[up] / step[across], place)


def canonical_spacing(affine: NDArray[np.float64]) -> list[float]:
    """Millimeters of a voxel along the right, anterior and superior axes of :func:`to_canonical`."""
    from nibabel.orientations import io_orientation

    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    return [float(lengths[np.flatnonzero(io_orientation(affine)[:, 0] == axis)[0]]) for axis in range(3)]


def most_label(masks: NDArray[Any], axis: int) -> int:
    """The index along ``axis`` with most labelled voxels of (n, X, Y, Z); the middle where nothing is labelled."""
    areas = (masks > 0).sum((0, *(other + 1 for other in range(3) if other != axis)))
    return int(areas.argmax()) if areas.any() else masks.shape[axis + 1] // 2


def to_gray_or_color(picture: NDArray[Any]) -> NDArray[np.float32]:
    """(C, H, W) as (H, W, 3) where there are three channels, else its first channel (H, W); clipped to [0, 1]."""
    clipped = np.clip(picture, 0, 1).astype(np.float32)
    return np.moveaxis(clipped, 0, -1) if len(clipped) == 3 else clipped[0]


def thinning(shape: Sequence[int], longest: int = 512) -> int:
    """The n for which every n-th pixel of an image (H, W, ...) makes no side longer than ``longest``."""
    return -(-max(shape[:2]) // longest)


def smaller(plane: Slice, longest: int = 512) -> Slice:
    """The plane with every n-th pixel, so that no side is longer than ``longest``: panels show no more."""
    step = thinning(plane.image.shape, longest)
    if step == 1:
        return plane
    thin = [
        each._replace(truth=each.truth[:, ::step, ::step], prediction=each.prediction[:, ::step, ::step])
        for each in plane.channels
    ]
    return plane._replace(image=plane.image[::step, ::step], channels=thin)


def overlay(plane: Slice, path: str | os.PathLike[str], title: str = "", dpi: int = 100) -> None:
    """Writes a PNG: image, truth and prediction side by side, a row for each dense task.

    Masks are tinted areas with an outline; a signed distance is red inside and blue outside.

    Args:
        plane: from :func:`pick`.
        path: a ``.png`` file.
        title: shown before the Dice of the case.
        dpi: pixels per inch of the picture.
    """
    from matplotlib.figure import Figure

    plane = smaller(plane)
    height, width = plane.image.shape[:2]
    ratio = min(2.5, max(0.4, height * plane.aspect / width))
    rows = max(1, len(plane.channels))
    figure = Figure(figsize=(11, rows * (3 * ratio + 0.35) + 0.5), layout="constrained", dpi=dpi)
    grid = figure.subplots(rows, 3, squeeze=False)
    for axes in grid.ravel():
        axes.imshow(plane.image, cmap="gray", vmin=0, vmax=1, aspect=plane.aspect, interpolation="nearest")
        axes.set_axis_off()
    for (first, second, third), each in zip(grid, plane.channels, strict=False):
        draw_channels(second, each, each.truth, plane.aspect)
        draw_channels(third, each, each.prediction, plane.aspect)
        names = ("image", "truth", "prediction") if len(plane.channels) == 1 else ("image", *names_of(each.task))
        for axes, name in zip((first, second, third), names, strict=True):
            axes.set_title(name, fontsize=9)
        draw_legend(third, each)
    scored = [f"mean Dice {plane.mean_dice:.3f}"] if any(each.dice for each in plane.channels) else []
    figure.suptitle("  ".join(part for part in [title, plane.place, *scored] if part), fontsize=10)
    write_figure(figure, path)


def names_of(task: Task) -> tuple[str, str]:
    """Titles of the panels of a task that is not alone."""
    return f"{task.name}: truth", f"{task.name}: prediction"


def color(index: int) -> str:
    """The color of class ``index``, from 1; they repeat after six."""
    return PALETTE[(index - 1) % len(PALETTE)]


def draw_channels(axes: Axes, channels: Channels, values: NDArray[Any], aspect: float) -> None:
    """The areas, or the first distance, of a task over the image."""
    if channels.task.kind == "distance":
        axes.imshow(values[0], cmap="coolwarm", vmin=-1, vmax=1, alpha=0.6, aspect=aspect, interpolation="nearest")
        return
    known = [(color(index), area) for index, area in enumerate(values, 1) if channels.labelled[index - 1]]
    axes.imshow(tinted(known, values.shape[1:]), aspect=aspect, interpolation="nearest")


def tinted(areas: Sequence[tuple[str, NDArray[np.bool_]]], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Areas (H, W), each with its color, as one layer (H, W, 4) of colors and opacities.

    Outlines as paths and a layer for each area take gigabytes where a prediction is noisy.
    """
    layer = np.zeros((*shape, 4), np.float32)
    for ink, area in areas:
        tint(layer, area * np.float32(0.3), ink)
    for ink, area in areas:  # after all areas, so that none covers another's border
        tint(layer, border(area).astype(np.float32), ink)
    return layer


def border(area: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The outermost pixels of an area (H, W), as wide as can be seen."""
    from scipy.ndimage import binary_erosion

    inner: NDArray[np.bool_] = binary_erosion(area, iterations=max(1, max(area.shape) // 200))
    return area & ~inner


def tint(layer: NDArray[np.float32], opacity: NDArray[np.float32], ink: str) -> None:
    """Lays a color of some opacity (H, W) over a layer (H, W, 4) of colors and opacities."""
    from matplotlib.colors import to_rgb

    over = opacity[..., None]
    under = layer[..., 3:] * (1 - over)
    total = over + under
    layer[..., :3] = (np.asarray(to_rgb(ink), np.float32) * over + layer[..., :3] * under) / np.maximum(total, 1e-6)
    layer[..., 3:] = total


def draw_legend(axes: Axes, channels: Channels) -> None:
    """The names of a task's channels at the right of ``axes``, with their Dice over the whole case."""
    from matplotlib.patches import Patch

    task, lines = channels.task, []
    for index, (name, known) in enumerate(zip(task.foreground, channels.labelled, strict=True)):
        score = f"Dice {channels.dice[index]:.3f}" if channels.dice and not np.isnan(channels.dice[index]) else ""
        remark = "not labelled" if not known else score or ("absent" if channels.dice else "")
        lines.append(f"{name}  {remark}".rstrip())
    handles = [Patch(color=color(index), label=line) for index, line in enumerate(lines, 1)]
    if task.kind == "distance":
        inside, outside = (Patch(color=ink, label=f"{word} {task.names[0]}") for ink, word in SIDES)
        handles = [inside, outside]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8, frameon=False)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Renders ``figure`` without a display and without pyplot's global state, and writes it atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


class Overlays:
    """Writes overlays of the first and of the worst validation cases, whenever the key metric is the best so far.

    The files in ``output_dir/overlays`` are numbered; ``index.json`` beside them, which is not sent to MLflow, says
    which case each one shows. Batches must be decollated, and image, targets and predictions on one grid, see
    :class:`medmoe.data.postprocess.TaskResults`. What is said of whole images stands in the titles.

    Args:
        output_dir: of the run.
        tasks: of the network.
        first: how many of the first cases to show.
        worst: how many of the cases with the lowest score to show: mean Dice, or without masks the probability of the
            true class of the first image-level task.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], tasks: Sequence[Task], first: int = 2, worst: int = 2
    ) -> None:
        self.folder, self.tasks = Path(output_dir) / "overlays", list(tasks)
        self.first, self.worst = first, worst

    def attach(self, evaluator: Workflow) -> None:
        """Registers with ``evaluator``."""
        evaluator.add_event_handler(Events.STARTED, self.start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        evaluator.add_event_handler(Events.COMPLETED, self.draw)

    def start(self, evaluator: Workflow) -> None:
        """Forgets the cases of the last validation."""
        self.count = 0
        self.firsts: list[Shown] = []
        self.worsts: list[tuple[float, int, Shown]] = []

    def collect(self, evaluator: Workflow) -> None:
        """Keeps one plane of each case that is among the first or, so far, the worst."""
        for item, output in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            shown = self.shown(str(item.get("case", self.count)), output)
            if self.count < self.first:
                self.firsts.append(shown)
            heapq.heappush(self.worsts, (-shown.score, -self.count, shown))
            if len(self.worsts) > self.worst:
                heapq.heappop(self.worsts)
            self.count += 1

    def shown(self, case: str, output: Mapping[str, Any]) -> Shown:
        """What there is to show of a case."""
        pairs = {task: pair_of(task, output) for task in self.tasks}
        affine = getattr(output["image"], "affine", None) if output["image"].ndim == 4 else None
        plane = pick(output["image"], [compare(task, *pairs[task]) for task in self.tasks if task.dense], affine=affine)
        said = [(task, int(pairs[task][0]), to_array(pairs[task][1])) for task in self.tasks if not task.dense]
        verdicts = [verdict(*each) for each in said]
        certain = [float(found[target]) for _, target, found in said if target >= 0]
        score = plane.mean_dice if plane.channels else (certain or [1.0])[0]
        return Shown(case, plane, score, "  ".join(verdicts))

    def draw(self, evaluator: Workflow) -> None:
        """Writes the pictures, if this validation is the best so far."""
        if evaluator.state.best_metric_epoch not in (-1, evaluator.state.epoch):
            return
        worst = [shown for _, _, shown in sorted(self.worsts, reverse=True, key=lambda entry: entry[:2])]
        files = {f"first_{number}.png": shown for number, shown in enumerate(self.firsts, 1)}
        files |= {f"worst_{number}.png": shown for number, shown in enumerate(worst, 1)}
        for file, shown in files.items():
            title = "  ".join(filter(None, [Path(file).stem.replace("_", " "), shown.verdicts]))
            overlay(shown.plane, self.folder / file, title)
        index = {file: {"case": shown.case, "score": shown.score} for file, shown in files.items()}
        write_text(self.folder / "index.json", json.dumps(index, indent=2) + "\n")


class Shown(NamedTuple):
    """A case that may be drawn.

    Attributes:
        case: its name.
        plane: to draw.
        score: by which the worst cases are chosen.
        verdicts: what is said of the whole image.
    """

    case: str
    plane: Slice
    score: float
    verdicts: str


def pair_of(task: Task, output: Mapping[str, Any]) -> tuple[Any, Any]:
    """Target and prediction of a task in an evaluator's output; where it stands alone they may be label and pred."""
    if f"pred_{task.name}" in output:
        return output[f"target_{task.name}"], output[f"pred_{task.name}"]
    return output["label"], output["pred"]


def verdict(task: Task, target: int, probabilities: NDArray[Any]) -> str:
    """Such as ``"nodule: yes (0.83), truth no"``."""
    best = int(probabilities.argmax())
    truth = f", truth {task.names[target]}" if target >= 0 else ""
    return f"{task.name}: {task.names[best]} ({probabilities[best]:.2f}){truth}"
