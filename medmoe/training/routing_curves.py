# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of how the routers developed over a training, out of its metrics log."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines.workflow import Workflow

from medmoe.moe.routing import Gates, RoutingRecord
from medmoe.training.handlers import MetricsLog
from medmoe.training.pictures import write_figure
from medmoe.training.routing_pictures import shares_picture, site_word, slice_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRIC = re.compile(r"routing/(?P<router>[^/]+)/(?P<receiver>.+)/site(?P<site>\d+)/(?P<kind>entropy|usage/.+)")
SOURCES = ("own prompts", "foreign prompts", "own outputs", "foreign outputs", "patches", "condition")
"""The kinds of tokens in pMoE's records: they share out the same weight as the experts."""

Curves = dict[tuple[str, str], dict[str, dict[int, list[tuple[int, float]]]]]
"""(router, receiver) -> "entropy" or "usage/<candidate>" -> site -> (epoch, value) of each epoch."""


def curves_of(rows: Iterable[Mapping[str, Any]]) -> Curves:
    """What the rows of ``metrics.jsonl`` say of the routers."""
    found: Curves = {}
    for row in rows:
        for metric, value in row.get("routing", {}).items():
            match = METRIC.fullmatch(metric)
            if match and value is not None:
                kinds = found.setdefault((match["router"], match["receiver"]), {})
                kinds.setdefault(match["kind"], {}).setdefault(int(match["site"]), []).append((row["epoch"], value))
    return found


def curves_picture(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Writes a PNG with a row for each router and receiver: entropy of each site, and usage, over the epochs.

    Args:
        rows: of ``metrics.jsonl``, at least one with ``routing``.
        path: a ``.png`` file.
    """
    from matplotlib.figure import Figure

    curves = curves_of(rows)
    figure = Figure(figsize=(10, 0.6 + 2.3 * len(curves)), layout="constrained", dpi=110)
    grid = figure.subplots(len(curves), 2, squeeze=False, sharex=True)
    for (left, right), ((router, receiver), kinds) in zip(grid, curves.items(), strict=True):
        entropy_lines(left, kinds["entropy"], site_word(router))
        left.set_title(f"{router}: {receiver}", fontsize=9)
        usage_lines(right, {kind.removeprefix("usage/"): sites for kind, sites in kinds.items() if kind != "entropy"})
        right.set_title("usage", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("epoch", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle("Routers over the training: entropy, and usage as the mean over sites", fontsize=10)
    write_figure(figure, path)


def entropy_lines(axes: Axes, sites: Mapping[int, Sequence[tuple[int, float]]], word: str) -> None:
    """A line for each site, dark for the first and bright for the last."""
    from matplotlib import colormaps

    first, last = min(sites), max(sites)
    for site, points in sorted(sites.items()):
        shade = 0.9 * (site - first) / max(1, last - first)
        label = f"{word} {site}" if site in (first, last) else None
        axes.plot(*zip(*points, strict=True), color=colormaps["cividis"](shade), linewidth=1.2, label=label)
    axes.set_ylim(-0.03, 1.03)
    finish(axes, "entropy / maximum")


def usage_lines(axes: Axes, candidates: Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]) -> None:
    """A line for each candidate; those of the kinds of pMoE's tokens, which sum up the same weight, are dashed."""
    for index, (name, sites) in enumerate(candidates.items()):
        values: dict[int, list[float]] = {}
        for epoch, value in (point for points in sites.values() for point in points):
            values.setdefault(epoch, []).append(value)
        means = [float(np.mean(each)) for each in values.values()]
        style = "--" if name in SOURCES else "-"
        axes.plot(list(values), means, style, color=slice_color(index), linewidth=1.2, label=name)
    axes.set_ylim(bottom=0)
    finish(axes, "share of weight")


def finish(axes: Axes, label: str) -> None:
    """Label, grid and legend of a panel with lines."""
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    columns = 1 + len(axes.get_legend_handles_labels()[0]) // 10
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, ncols=columns)


def as_gates(record: RoutingRecord) -> list[Gates]:
    """A record as gates: its usage, and as another part its sources."""
    parts = {"whose tokens": record.usage, "which tokens": record.sources} if record.sources else {"": record.usage}
    return [
        Gates(record.router, record.expert, record.site, part, torch.tensor([list(values.values())]), tuple(values))
        for part, values in parts.items()
    ]


class RoutingPictures:
    """Writes ``routing_<router>.png`` and ``routing_curves.png`` to ``output_dir`` when the training ends.

    Args:
        log: the metrics log of the same trainer, which has the network's routing.
        output_dir: of the run.
    """

    def __init__(self, log: MetricsLog, output_dir: str | os.PathLike[str]) -> None:
        self.log, self.folder = log, Path(output_dir)

    def attach(self, trainer: Workflow) -> None:
        """Registers with ``trainer``."""
        trainer.add_event_handler(Events.COMPLETED, self)

    def __call__(self, trainer: Workflow) -> None:
        for router in dict.fromkeys(record.router for record in self.log.routing):
            gates = [gate for record in self.log.routing if record.router == router for gate in as_gates(record)]
            shares_picture(gates, self.folder / f"routing_{router}.png", "in the last training step")
        if self.log.routing:
            curves_picture(self.log.rows, self.folder / "routing_curves.png")
