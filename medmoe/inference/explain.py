# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Shows how a trained network routed: in single images as pictures, over the cases of a split as a table."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ignite.engine import Events
from monai.engines.workflow import Workflow
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from medmoe.errors import ConfigError
from medmoe.files import write_text
from medmoe.inference.inferer import WindowInferer
from medmoe.inference.predict import opened, settings_of
from medmoe.moe.routing import Gates
from medmoe.networks import ExpertNetwork
from medmoe.networks.network import plain
from medmoe.tasks import Task
from medmoe.training.handlers import on_failure
from medmoe.training.pictures import to_gray_or_color
from medmoe.training.routing_pictures import groups_picture, mean_shares, shares_picture, slices_picture

MOST_GROUPS = 12
"""With more groups a picture of their means says nothing."""
FEWEST_CASES = 2
"""A group of a single patient is no mean, and is nobody's business."""
COLUMNS = ("case", "router", "receiver", "site", "part", "candidate", "share")


class GateCollector:
    """Within it, the gates of all forward passes of ``network`` are averaged, until they are taken.

    Args:
        network: whose routers record meanwhile.
    """

    def __init__(self, network: ExpertNetwork) -> None:
        self.network = network
        self.sums: dict[tuple[Any, ...], tuple[Gates, Tensor, int]] = {}

    def __enter__(self) -> GateCollector:
        self.before, self.network.recording = self.network.recording, True
        self.hook = self.network.register_forward_hook(lambda *_: self.add(self.network.gates()))
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
        self.network.recording = self.before

    def add(self, gates: Iterable[Gates]) -> None:
        """Adds the gates of one pass; tokens are averaged away."""
        for gate in gates:
            key, mean, count = gate[:4], torch.from_numpy(mean_shares(gate)), len(gate.weights)
            _, total, seen = self.sums.get(key, (gate, torch.zeros_like(mean), 0))
            self.sums[key] = (gate, total + count * mean, seen + count)

    def take(self) -> list[Gates]:
        """The mean shares (1, n) of every router since the last call."""
        # The hook sees network(...), as for windows, but neither network.outputs(...) nor network.image_outputs(...).
        # Without windows one of these was the only pass, and the routers still have its gates.
        if not self.sums:
            self.add(self.network.gates())
        found = [gate._replace(weights=(total / seen).float()[None]) for gate, total, seen in self.sums.values()]
        self.sums = {}
        return found


def explain(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    **overrides: Any,
) -> list[Path]:
    """Writes pictures of how a trained network routed each input, and a table of all of them.

    Args:
        input: see :func:`medmoe.inference.inputs.find_inputs`.
        output: folder for ``<case>/<router>.png`` and ``routing.csv``; made if it is missing.
        checkpoint: of a training run, see :func:`medmoe.inference.predict.predict`.
        overrides: further settings of the bundle.

    Returns:
        the files.

    Raises:
        ConfigError: nothing in this network routes.
        DataError: there is no input, or some could not be read: the pictures of the others are there by then.
        CheckpointError: the checkpoint is missing, damaged, or holds settings that are no plain values.
    """
    folder, files, rows = Path(output), [], []
    with opened(input, output, checkpoint, {**settings_of(checkpoint), **overrides}) as workflow:
        part = workflow.parser.get_parsed_content
        network, dataset, inferer = part("network"), part("dataset"), part("inferer")
        if not network.routers:
            raise ConfigError(
                f"nothing in the network of {checkpoint} routes: it has no dispatchers, no MoPE, no AdaRoute and no "
                "FGMoE, so that there is nothing to explain"
            )
        for sample in dataset:
            gates, drawn = explain_case(network, inferer, sample, folder / sample["case"])
            files += drawn
            rows += table_rows(sample["case"], gates)
        write_table(folder / "routing.csv", rows)
        dataset.raise_failures()
    return [*files, folder / "routing.csv"]


def explain_case(
    network: ExpertNetwork, inferer: WindowInferer, sample: Mapping[str, Any], folder: Path
) -> tuple[list[Gates], list[Path]]:
    """Draws how ``network`` routed one case.

    Args:
        network: with routers.
        inferer: of windows.
        sample: with ``image`` (C, H, W[, D]), ``case`` and perhaps ``condition``.
        folder: for the pictures, one for each router; of FGMoE one for the slices of the tasks, one for the global
            experts.

    Returns:
        the mean shares (1, n) of every router over all windows, and the pictures.
    """
    network.eval()
    image = plain(sample["image"]).to(network.device)[None]
    condition = {name: torch.as_tensor(v)[None].to(network.device) for name, v in sample.get("condition", {}).items()}
    given = {"condition": condition} if condition else {}
    title, files = str(sample["case"]), []
    with torch.no_grad(), GateCollector(network) as collector:
        outputs = inferer(image, network, **given)
        gates = collector.take()
        for router in dict.fromkeys(gate.router for gate in gates if gate.router != "fgmoe"):
            files.append(folder / f"{router}.png")
            shares_picture([gate for gate in gates if gate.router == router], files[-1], title)
        sliced = [gate for gate in gates if gate.router == "fgmoe"]
        if sliced:
            named = outputs if isinstance(outputs, Mapping) else {network.tasks[0].name: outputs}
            shown = Plane(image, predicted(network.dense, named), inferer.roi_size[-1], spacing_of(sample["image"]))
            winners = {part: shown.cut(map_) for part, map_ in winning(network, inferer, shown.slab, given).items()}
            for name in dict.fromkeys(gate.part for gate in sliced):
                files.append(folder / f"fgmoe_{name}.png")
                usage = {g.receiver: (g.candidates, mean_shares(g)) for g in sliced if g.part == name}
                maps = {receiver: map_ for (part, receiver), map_ in winners.items() if part == name}
                slices_picture(shown.picture, maps, usage, files[-1], title + shown.place, shown.aspect, shown.areas)
    return gates, files


def predicted(tasks: Sequence[Task], outputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.bool_]]:
    """Of each dense task the areas (n, H, W[, D]) that are predicted, the background left out."""
    found = {}
    for task in tasks:
        logits = outputs[task.name][0]
        if task.kind == "classes":
            areas = torch.stack([logits.argmax(0) == index for index in range(1, task.channels)])
        else:
            areas = logits > 0
        found[task.name] = areas.cpu().numpy()
    return found


def spacing_of(image: Any) -> list[float]:
    """Size of a voxel along each axis of an image (C, H, W[, D]); 1 where it has no affine."""
    affine = getattr(image, "affine", None)
    return [1.0] * (image.ndim - 1) if affine is None else torch.linalg.norm(affine[:3, :3], dim=0).tolist()


class Plane:
    """What is drawn of a case: a picture as it is; of a volume, the plane along its last axis with most prediction.

    Args:
        image: (1, C, H, W[, D]).
        areas: (n, H, W[, D]) by name, that were predicted.
        depth: of a window.
        spacing: of a voxel along each axis.

    Attributes:
        slab: the part of ``image`` that the network has to see for this plane.
        picture: (H, W[, 3]) of the plane, rows downwards.
        areas: (n, H, W) of the plane.
        aspect: height of a pixel over its width.
        place: such as ``"  slice 12 of 40"``; empty in 2-D.
    """

    def __init__(
        self, image: Tensor, areas: Mapping[str, NDArray[np.bool_]], depth: int, spacing: Sequence[float]
    ) -> None:
        self.volume, self.slab, self.place, self.index = image.dim() == 5, image, "", 0
        self.aspect = spacing[0] / spacing[1]
        if self.volume:
            total, depth = image.shape[-1], depth if depth > 0 else image.shape[-1]
            sizes = sum((area.sum((0, 1, 2)) for area in areas.values()), np.zeros(total))
            index = int(sizes.argmax()) if sizes.any() else total // 2
            first = max(0, min(index - depth // 2, total - depth))
            self.slab, self.index = image[..., first : first + depth], index - first
            self.place, self.aspect = f"  slice {index + 1} of {total}", 1 / self.aspect
            areas = {name: upright(area[..., index]) for name, area in areas.items()}
        self.areas = areas
        self.picture = to_gray_or_color(self.cut(self.slab[0].cpu().numpy()))

    def cut(self, values: NDArray[Any]) -> NDArray[Any]:
        """The plane of values (..., H, W[, D]) on the slab."""
        return upright(values[..., self.index]) if self.volume else values


def upright(values: NDArray[Any]) -> NDArray[Any]:
    """(..., X, Y) of a volume in RAS as rows downwards, the patient's right at the right."""
    return np.swapaxes(values, -2, -1)[..., ::-1, :]


def winning(
    network: ExpertNetwork, inferer: WindowInferer, image: Tensor, given: Mapping[str, Any]
) -> dict[tuple[str, str], NDArray[np.int64]]:
    """The winner (H, W[, D]) among the candidates of each of FGMoE's routers, by (part, receiver).

    The weights of overlapping windows are blended as predictions are.
    """
    found: dict[tuple[str, str], int] = {}

    def weights(windows: Tensor, **condition: Any) -> Tensor:
        network(windows, **condition)
        sliced = [gate for gate in network.gates() if gate.router == "fgmoe"]
        found.update({(gate.part, gate.receiver): gate.weights.shape[1] for gate in sliced})
        return torch.cat([interpolate(gate.weights, windows.shape[2:]) for gate in sliced], 1).to(windows.device)

    blended = cast(Tensor, inferer(image, weights, **given))[0]
    split = blended.split(list(found.values()))
    return {key: maps.argmax(0).cpu().numpy() for key, maps in zip(found, split, strict=True)}


def table_rows(case: str, gates: Iterable[Gates]) -> list[dict[str, Any]]:
    """The shares of one case as rows of a table: one for each router, receiver, site, part and candidate."""
    return [
        dict(zip(COLUMNS, (case, *gate[:4], name, f"{share:.6f}"), strict=True))
        for gate in gates
        for name, share in zip(gate.candidates, mean_shares(gate), strict=True)
    ]


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows of :func:`table_rows` as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


class RoutingTable:
    """Writes how every case of a split was routed: ``routing.csv``, and MoPE's mean routing for groups of cases.

    The groups are those of each image-level task (their classes in the labels) and of each category of the condition;
    a picture ``routing_by_<name>.png`` each. Names of cases are in the table only. Batches must be of one case.

    Args:
        network: of the evaluator.
        output_dir: for the files, which each run of the evaluator replaces.
    """

    def __init__(self, network: ExpertNetwork, output_dir: str | os.PathLike[str]) -> None:
        self.network, self.folder = network, Path(output_dir)
        self.collector: GateCollector | None = None

    def attach(self, evaluator: Workflow) -> None:
        """Registers with ``evaluator``, if anything in the network routes."""
        if self.network.routers:
            evaluator.add_event_handler(Events.STARTED, self.start)
            evaluator.add_event_handler(Events.ITERATION_STARTED, self.listen)
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
            evaluator.add_event_handler(Events.COMPLETED, self.write)
            on_failure(evaluator, self.close)

    def start(self, evaluator: Workflow) -> None:
        """Forgets the cases of the last run."""
        self.cases: list[tuple[str, list[Gates], dict[str, str]]] = []

    def listen(self, evaluator: Workflow) -> None:
        """Has the routers record."""
        self.collector = GateCollector(self.network).__enter__()

    def collect(self, evaluator: Workflow) -> None:
        """Keeps the mean gates of a case, and its groups."""
        assert self.collector is not None  # since the iteration started
        gates = self.collector.take()
        self.close()
        (item,) = evaluator.state.batch
        self.cases.append((str(item["case"]), gates, groups_of(self.network, item)))

    def close(self, error: BaseException | None = None) -> None:
        """Has the routers record no longer, also where a case failed."""
        if self.collector is not None:
            self.collector.__exit__()
            self.collector = None

    def write(self, evaluator: Workflow) -> None:
        """Writes the table and the pictures."""
        write_table(
            self.folder / "routing.csv", [row for case, gates, _ in self.cases for row in table_rows(case, gates)]
        )
        for name in dict.fromkeys(name for _, _, groups in self.cases for name in groups):
            cases: dict[str, list[list[Gates]]] = {}
            for _, gates, groups in self.cases:
                if name in groups:
                    cases.setdefault(groups[name], []).append([gate for gate in gates if gate.router == "mope"])
            cases = {group: each for group, each in cases.items() if len(each) >= FEWEST_CASES}
            if 1 < len(cases) <= MOST_GROUPS and all(gates for each in cases.values() for gates in each):
                ordered = {group: cases[group] for group in sorted(cases)}
                groups_picture(ordered, self.folder / f"routing_by_{name}.png", name)


def groups_of(network: ExpertNetwork, item: Mapping[str, Any]) -> dict[str, str]:
    """The groups that a case belongs to, by the name of an image-level task or of a category of the condition."""
    found = {}
    for task in network.tasks:
        index = -1 if task.dense or task.name not in item else int(item[task.name])
        if index >= 0:
            found[task.name] = task.names[index]
    columns = () if network.schema is None else network.schema.of_kind("category")
    if columns and "condition" in item:
        indices = torch.as_tensor(item["condition"]["categories"]).flatten().tolist()
        for column, index in zip(columns, indices, strict=True):
            found[column.name] = column.values[index - 1] if index else "missing"
    return found
