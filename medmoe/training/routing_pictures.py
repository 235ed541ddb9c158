# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of where the routers send their weights, in one case and in groups of cases.

Shares are shown in one color map, dark for none and bright for all; whatever is a name and not an amount (experts,
slices) has a color of its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medmoe.moe.routing import Gates, shares
from medmoe.training.pictures import PALETTE, color, thinning, tinted, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "pmoe": "pMoE: where the prompts that enter each site come from",
    "mope": "MoPE: which prompt experts the condition and the image chose",
    "adaroute": "AdaRoute: which parameter experts each layer mixed",
    "fgmoe": "FGMoE: which slices of the decoder's MLP each task used",
}
MOST_NUMBERS = 8
"""Up to so many candidates, shares are written into a heat map, and its scale goes to 1."""
KINDS = (
    *("own prompts", "prompts of", "foreign prompts", "own outputs", "outputs of", "foreign outputs"),
    *("patches", "condition"),
)
OWNER_COLORS = (*PALETTE, "#F0E442")


def mean_shares(gates: Gates) -> NDArray[np.float64]:
    """Share of each candidate (n,), averaged over images and tokens."""
    return shares(gates.weights.double()).transpose(0, 1).flatten(1).mean(1).numpy()


def by_panel(gates: Iterable[Gates]) -> dict[tuple[str, str], list[Gates]]:
    """Gates by receiver and part, each in the order of the sites."""
    panels: dict[tuple[str, str], list[Gates]] = {}
    for gate in sorted(gates, key=lambda gate: gate.site):
        panels.setdefault((gate.receiver, gate.part), []).append(gate)
    return panels


def candidates_of(gates: Iterable[Gates]) -> list[str]:
    """All candidates, in the order of the gates that have most; pMoE's by kind, so that experts can be compared."""
    longest = sorted(gates, key=lambda gate: -len(gate.candidates))
    names = dict.fromkeys(name for gate in longest for name in gate.candidates)
    return sorted(names, key=lambda name: next((rank for rank, kind in enumerate(KINDS) if name.startswith(kind)), 0))


def share_table(gates: Sequence[Gates], names: Sequence[str]) -> NDArray[np.float64]:
    """Shares (sites, candidates); NaN where a site does not have a candidate."""
    table = np.full((len(gates), len(names)), np.nan)
    for row, gate in enumerate(gates):
        table[row, [names.index(name) for name in gate.candidates]] = mean_shares(gate)
    return table


def bright_end(tables: Iterable[NDArray[np.float64]]) -> float:
    """The share at the bright end of the color scale of tables that are shown together.

    It is 1, but of many candidates none gets that much: there it is the largest share, rounded up to a tenth.
    """
    several = list(tables)
    if min(table.shape[1] for table in several) <= MOST_NUMBERS:
        return 1.0
    return math.ceil(10 * max(float(np.nanmax(table, initial=0.0)) for table in several) - 1e-9) / 10


def without_stem(names: Sequence[str]) -> tuple[list[str], str]:
    """("expert0", "expert1") as the tick labels ("0", "1") and the axis label "expert"."""
    split = [re.fullmatch(r"(.*?)\s*(\d+)", name) for name in names]
    stems = {match.group(1) for match in split if match}
    if None in split or len(stems) != 1:
        return list(names), ""
    return [match.group(2) for match in split if match], stems.pop()


def heat_map(axes: Axes, table: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], end: float) -> Any:
    """Draws shares (rows, columns), with their numbers where there is room."""
    shown = axes.imshow(np.ma.masked_invalid(table), cmap="cividis", vmin=0, vmax=end, aspect="auto")
    axes.set_facecolor("#DDDDDD")
    ticks, stem = without_stem(columns)
    turned = max(map(len, ticks)) > 3
    axes.set_xticks(
        range(len(ticks)), ticks, fontsize=8, rotation=35 if turned else 0, ha="right" if turned else "center",
        rotation_mode="anchor" if turned else "default",
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel(stem, fontsize=8)
    if len(columns) <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                ink = "black" if value > 0.55 * end else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    return shown


def scale(figure: Figure, shown: Any, panels: Sequence[Axes], label: str = "share of weight") -> None:
    """The color scale at the right of ``panels``."""
    bar = figure.colorbar(shown, ax=list(panels), shrink=min(1.0, 3.0 / figure.get_size_inches()[1] + 0.4), aspect=25)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)


def site_word(router: str) -> str:
    """What a router calls the places where it routes."""
    return "layer" if router == "adaroute" else "site"


def shares_picture(gates: Sequence[Gates], path: str | os.PathLike[str], title: str = "") -> None:
    """Writes a PNG of one router: a heat map of sites and candidates for each receiver (row) and part (column).

    Of pMoE, bars beside each heat map sum up whose tokens they are: those of the receiver itself, of other experts, of
    the condition.

    Args:
        gates: of one router, for one case or several, at least one.
        path: a ``.png`` file.
        title: such as the case, before what the picture shows.
    """
    from matplotlib.figure import Figure

    router = gates[0].router
    panels = by_panel(gates)
    receivers = list(dict.fromkeys(receiver for receiver, _ in panels))
    parts = list(dict.fromkeys(part for _, part in panels))
    names = {panel: candidates_of(own) for panel, own in panels.items()}
    tables = {panel: share_table(own, names[panel]) for panel, own in panels.items()}
    end = bright_end(tables.values())
    widest, bars = max(map(len, names.values())), int(router == "pmoe" and not any(parts))
    width = len(parts) * max(2.4, 0.3 * widest if widest > MOST_NUMBERS else 0.55 * widest) + 3.4 * bars + 1.2
    heights = [max(len(own) for (name, _), own in panels.items() if name == receiver) for receiver in receivers]
    figure = Figure(figsize=(max(5.5, width), 1.6 + sum(1.0 + 0.24 * rows for rows in heights)), dpi=110)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(
        len(receivers), len(parts) + bars, squeeze=False, height_ratios=[rows + 3 for rows in heights]
    )
    for (receiver, part), own in panels.items():
        axes = grid[receivers.index(receiver)][parts.index(part)]
        sites = [str(gate.site) for gate in own]
        table = tables[receiver, part]
        shown = heat_map(axes, table, sites, names[receiver, part], end)
        axes.set_title(": ".join(filter(None, [receiver, part])), fontsize=9)
        axes.set_ylabel(site_word(router), fontsize=8)
        if bars:
            owner_bars(grid[receivers.index(receiver)][-1], receivers, receiver, names[receiver, part], table)
    scale(figure, shown, grid.ravel().tolist())
    if bars:
        owners = {bar.get_label(): bar for axes in grid[:, -1] for bar in axes.containers}
        figure.legend(owners.values(), owners.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("\n".join(filter(None, [title, TITLES.get(router, router)])), fontsize=10)
    write_figure(figure, path)


def owner_of(receiver: str, source: str) -> str:
    """Whose tokens a source of pMoE's prompts holds: an expert, or "condition"."""
    if " of " in source:
        return source.split(" of ", 1)[1]
    return "condition" if source == "condition" else receiver


def owner_bars(
    axes: Axes, experts: Sequence[str], receiver: str, sources: Sequence[str], table: NDArray[np.float64]
) -> None:
    """Stacked bars, one a site: the share of each owner's tokens, the receiver's own first, the condition's last."""
    owned = {owner_of(receiver, source) for source in sources}
    known = [*experts, *sorted(owned - {*experts, "condition"}), "condition"]
    left = np.zeros(len(table))
    for owner in sorted(owned, key=lambda owner: (owner != receiver, known.index(owner))):
        columns = [column for column, source in enumerate(sources) if owner_of(receiver, source) == owner]
        share = np.nansum(table[:, columns], 1)
        color = OWNER_COLORS[known.index(owner) % len(OWNER_COLORS)]
        axes.barh(range(len(table)), share, left=left, height=0.85, color=color, label=owner)
        left = left + share
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xlabel("share of weight", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title("whose tokens", fontsize=9)


def slices_picture(
    image: NDArray[np.float32],
    winners: Mapping[str, NDArray[np.int64]],
    usage: Mapping[str, tuple[Sequence[str], NDArray[np.float64]]],
    path: str | os.PathLike[str],
    title: str = "",
    aspect: float = 1.0,
    outlines: Mapping[str, NDArray[np.bool_]] | None = None,
) -> None:
    """Writes a PNG with a row for each of FGMoE's routers: the image, the winning slices over it, and their usage.

    The bars at the right are the legend.

    Args:
        image: (H, W) or (H, W, 3) in [0, 1].
        winners: of each router, such as a task, the winning candidate (H, W) of each pixel.
        usage: of the same, the candidates and their mean shares of the weight (n,) over the whole case.
        path: a ``.png`` file.
        title: such as the case.
        aspect: height of a pixel over its width.
        outlines: of some routers, areas (n, H, W) that were predicted, to be drawn on the image.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    step = thinning(image.shape)
    image = image[::step, ::step]
    ratio = min(2.0, max(0.5, image.shape[0] * aspect / image.shape[1]))
    figure = Figure(figsize=(10, 0.7 + len(winners) * (2.9 * ratio + 0.35)), layout="constrained", dpi=110)
    rows = figure.subplots(len(winners), 3, squeeze=False)
    for (plain, over, bars), (name, map_) in zip(rows, winners.items(), strict=True):
        candidates, share = usage[name]
        colors = np.array([to_rgb(slice_color(index)) for index in range(len(candidates))])
        for axes in (plain, over):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=aspect, interpolation="nearest")
            axes.set_axis_off()
        over.imshow(colors[map_[::step, ::step]], alpha=0.6, aspect=aspect, interpolation="nearest")
        areas = (outlines or {}).get(name.split("/")[0], ())
        drawn = [(color(index), area[::step, ::step]) for index, area in enumerate(areas, 1)]
        plain.imshow(tinted(drawn, image.shape[:2]), aspect=aspect, interpolation="nearest")
        plain.set_title("image" if len(areas) == 0 else f"{name}: prediction", fontsize=9)
        over.set_title(f"{name}: winning slice", fontsize=9)
        won = np.bincount(map_.ravel(), minlength=len(candidates)) / map_.size
        usage_bars(bars, candidates, share, won)
    figure.suptitle(
        "\n".join(filter(None, [title, "FGMoE: which slice of the decoder's MLP won at each token"])), fontsize=10
    )
    write_figure(figure, path)


def slice_color(index: int) -> Any:
    """The color of a slice: nine that differ well from each other and from gray, then nine lighter ones, and again."""
    from matplotlib import colormaps

    order = [color for first in (0, 1) for color in range(first, 20, 2) if color // 2 != 7]  # the eighth pair is gray
    return colormaps["tab20"](order[index % len(order)])


def usage_bars(axes: Axes, candidates: Sequence[str], share: NDArray[np.float64], won: NDArray[np.float64]) -> None:
    """Mean shares of the weight as bars in the slices' colors, and a dot at the share of the pixels that each won."""
    places = range(len(candidates))
    axes.barh(places, share, color=[slice_color(index) for index in places])
    axes.plot(won, places, "o", color="black", markersize=4)
    axes.set_yticks(places, candidates, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(0.05, 1.1 * float(max(share.max(), won.max()))))
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("bar: share of weight;  dot: share of pixels won", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def groups_picture(
    groups: Mapping[str, Sequence[Sequence[Gates]]], path: str | os.PathLike[str], by: str = "group"
) -> None:
    """Writes a PNG with a heat map for each receiver of MoPE: the mean shares of the prompt experts in each group.

    Shares are averaged over sites, then over the cases of a group.

    Args:
        groups: of each group, the gates of each of its cases; at least one case.
        path: a ``.png`` file.
        by: what the groups are, such as the name of a column.
    """
    from matplotlib.figure import Figure

    every = [gate for cases in groups.values() for gates in cases for gate in gates]
    receivers, names = list(dict.fromkeys(gate.receiver for gate in every)), candidates_of(every)
    tables = {name: group_table(groups, name, names) for name in receivers}
    rows = [f"{group} ({len(cases)})" for group, cases in groups.items()]
    width = len(receivers) * max(2.6, (0.3 if len(names) > MOST_NUMBERS else 0.5) * len(names) + 1.0) + 1.4
    figure = Figure(figsize=(max(5.5, width), 1.8 + 0.3 * len(rows)), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(receivers), squeeze=False)[0]
    for axes, (receiver, table) in zip(panels, tables.items(), strict=True):
        shown = heat_map(axes, table, rows, names, bright_end(tables.values()))
        axes.set_title(receiver, fontsize=9)
    panels[0].set_ylabel(f"{by} (cases)", fontsize=8)
    scale(figure, shown, panels.tolist())
    figure.suptitle(f"MoPE: mean routing for each {by}", fontsize=10)
    write_figure(figure, path)


def group_table(
    groups: Mapping[str, Sequence[Sequence[Gates]]], receiver: str, names: Sequence[str]
) -> NDArray[np.float64]:
    """Mean shares (groups, candidates) that a receiver had."""
    table = []
    for cases in groups.values():
        own = [[gate for gate in gates if gate.receiver == receiver] for gates in cases]
        table.append(np.mean([share_table(gates, names).mean(0) for gates in own if gates], 0))
    return np.array(table)
