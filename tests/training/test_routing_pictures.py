# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Pictures of routing: the tables behind them, and that what is drawn is there to be seen."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe.moe.routing import Gates, RoutingRecord, flat_metrics
from medmoe.training import routing_pictures as pictures
from medmoe.training.routing_curves import RoutingPictures, as_gates, curves_of, curves_picture

EXPERTS = ("timm/vit_tiny_patch16_224", "tiny")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def gates(router: str, candidates: tuple[str, ...], receiver: str = "tiny", site: int = 0, part: str = "") -> Gates:
    weights = torch.randn(3, len(candidates)).softmax(1)
    return Gates(router, receiver, site, part, weights, candidates)


def pmoe(site: int, receiver: int = 0) -> Gates:
    other = EXPERTS[1 - receiver]
    outputs = ("own outputs", f"outputs of {other}") if site else ()
    candidates = (f"prompts of {other}", "own prompts", *outputs, "patches", "condition")
    return gates("pmoe", candidates, EXPERTS[receiver], site)


def numbered(stem: str, count: int) -> tuple[str, ...]:
    return tuple(f"{stem} {index}" for index in range(count))


def test_shares_are_means_over_images_and_tokens_whatever_top_k_took() -> None:
    weights = torch.zeros(2, 3, 2, 2)
    weights[0, 0], weights[1, 0, 0], weights[1, 2, 1] = 0.4, 0.2, 0.6
    found = pictures.mean_shares(Gates("fgmoe", "organs", 0, "slices", weights, ("a", "b", "c")))
    assert found == pytest.approx([0.75, 0, 0.25])


def test_a_table_has_a_row_for_each_site_and_gaps_where_there_is_no_candidate() -> None:
    own = [pmoe(0), pmoe(1)]
    names = pictures.candidates_of(own)
    assert names == [
        "own prompts", "prompts of tiny", "own outputs", "outputs of tiny", "patches", "condition"
    ]  # fmt: skip
    table = pictures.share_table(own, names)
    assert np.isnan(table[0, 2:4]).all() and np.nansum(table, 1) == pytest.approx([1, 1])
    assert table[1, 0] == pytest.approx(own[1].weights[:, 1].mean().item())
    assert pictures.candidates_of([gates("mope", numbered("expert", 12))]) == list(numbered("expert", 12))


def test_the_scale_ends_at_one_but_where_there_are_too_many_for_it() -> None:
    assert pictures.bright_end([np.array([[0.1, 0.2]])]) == 1
    many = np.full((2, 12), 1 / 12)
    assert pictures.bright_end([many]) == pytest.approx(0.1)
    many[0, 3] = 0.31
    assert pictures.bright_end([many, np.full((1, 12), np.nan)]) == pytest.approx(0.4)


def test_owners_of_tokens() -> None:
    kinds = ("own prompts", "patches", "prompts of timm/vit of x", "condition")
    assert [pictures.owner_of("tiny", kind) for kind in kinds] == ["tiny", "tiny", "timm/vit of x", "condition"]


def test_numbers_at_the_end_become_ticks() -> None:
    assert pictures.without_stem(("prompt expert 1", "prompt expert 2")) == (["1", "2"], "prompt expert")
    assert pictures.without_stem(("expert0", "expert10")) == (["0", "10"], "expert")
    assert pictures.without_stem(("own prompts", "patches")) == (["own prompts", "patches"], "")
    assert pictures.without_stem(("a 1", "b 2")) == (["a 1", "b 2"], "")


def test_every_router_can_be_drawn_and_more_weight_is_brighter(tmp_path: Path) -> None:
    parts = [gates("adaroute", numbered("expert", n), "tiny", k, p) for k, n in enumerate((2, 6)) for p in ("A", "B")]
    drawn = {
        "pmoe": [pmoe(site, receiver) for site in range(3) for receiver in (0, 1)],
        "mope": [gates("mope", numbered("prompt expert", 16), site=site) for site in range(2)],
        "adaroute": parts,
    }
    for name, own in drawn.items():
        pictures.shares_picture(own, tmp_path / f"{name}.png", "case 1")
        assert pixels(tmp_path / f"{name}.png").std() > 10
    for name, share in (("low", 0.5), ("high", 1.0)):
        weights = torch.tensor([[share, 1 - share]])
        pictures.shares_picture([Gates("mope", "tiny", 0, "", weights, ("a", "b"))], tmp_path / f"{name}.png")
    yellow = [
        (np.abs(pixels(tmp_path / f"{name}.png") - (254, 232, 56)).max(-1) < 12).sum() for name in ("low", "high")
    ]
    assert yellow[1] > yellow[0] + 1000


def test_the_winner_colors_its_pixels_and_stands_in_the_bars(tmp_path: Path) -> None:
    image = np.zeros((24, 16), dtype=np.float32)
    for winner in (0, 2):
        winners = {"organs": np.full((24, 16), winner)}
        usage = {"organs": (numbered("slice", 4), np.full(4, 0.25))}
        pictures.slices_picture(image, winners, usage, tmp_path / f"{winner}.png", "case 1", outlines={})
    counts = {}
    for winner in (0, 2):
        shade = 0.6 * np.array(pictures.slice_color(winner)[:3]) * 255
        for drawn in (0, 2):
            near = np.abs(pixels(tmp_path / f"{drawn}.png") - shade).max(-1) < 6
            counts[winner, drawn] = near.sum()
    assert counts[0, 0] > 5000 > 500 > counts[0, 2] and counts[2, 2] > 5000 > 500 > counts[2, 0]


def test_a_prediction_is_outlined_on_the_image(tmp_path: Path) -> None:
    image, winners = np.zeros((24, 16), dtype=np.float32), {"organs": np.zeros((24, 16), dtype=int)}
    usage = {"organs": (("a", "b"), np.array([0.75, 0.25]))}
    area = np.zeros((1, 24, 16), dtype=bool)
    area[0, 5:15, 4:12] = True
    pictures.slices_picture(image, winners, usage, tmp_path / "with.png", outlines={"organs": area})
    pictures.slices_picture(image, winners, usage, tmp_path / "without.png", outlines={"organs": area & False})
    blue = [
        (np.abs(pixels(tmp_path / f"{name}.png") - (0x56, 0xB4, 0xE9)).max(-1) < 12).sum()
        for name in ("with", "without")
    ]
    assert blue[0] > blue[1] + 200


def test_slices_have_colors_of_their_own_none_of_them_gray() -> None:
    colors = [pictures.slice_color(index) for index in range(18)]
    assert len(set(colors)) == 18 and all(max(c[:3]) - min(c[:3]) > 0.05 for c in colors)
    assert pictures.slice_color(18) == colors[0]


def test_groups_are_means_over_sites_then_cases(tmp_path: Path) -> None:
    names = numbered("prompt expert", 3)
    cases = [[gates("mope", names, e, s) for e in EXPERTS for s in range(4)] for _ in range(5)]
    groups = {"II": cases[:2], "III": cases[2:]}
    table = pictures.group_table(groups, EXPERTS[1], names)
    own = [np.mean([pictures.mean_shares(g) for g in case if g.receiver == EXPERTS[1]], 0) for case in cases]
    assert table == pytest.approx(np.stack([np.mean(own[:2], 0), np.mean(own[2:], 0)]))
    pictures.groups_picture(groups, tmp_path / "groups.png", "grade")
    assert pixels(tmp_path / "groups.png").std() > 10


def row(epoch: int) -> dict[str, object]:
    records = [
        RoutingRecord(EXPERTS[0], site, 1 / epoch, {"vit": 0.25, "tiny": 0.75}, {"patches": 1.0}) for site in (0, 1)
    ]
    routed = RoutingRecord("organs", 0, 0.5, {"slice 0": 1.0}, {}, "fgmoe")
    return {"epoch": epoch, "routing": {**flat_metrics(records), **flat_metrics([routed])}}


def test_curves_come_out_of_the_log_whatever_names_experts_have(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "metrics": {}}, *map(row, (1, 2, 3))]
    rows[2]["routing"][f"routing/pmoe/{EXPERTS[0]}/site01/entropy"] = None
    found = curves_of(rows)
    assert list(found) == [("pmoe", EXPERTS[0]), ("fgmoe", "organs")]
    assert found["pmoe", EXPERTS[0]]["entropy"] == {0: [(1, 1.0), (2, 0.5), (3, 1 / 3)], 1: [(1, 1.0), (3, 1 / 3)]}
    assert set(found["pmoe", EXPERTS[0]]) == {"entropy", "usage/vit", "usage/tiny", "usage/patches"}
    curves_picture(rows, tmp_path / "curves.png")
    assert pixels(tmp_path / "curves.png").std() > 10


def test_records_are_drawn_for_each_router_when_the_training_ends(tmp_path: Path) -> None:
    records = [
        RoutingRecord("vit", 0, 0.5, {"vit": 0.25, "tiny": 0.75}, {"patches": 0.5, "own prompts": 0.5}),
        RoutingRecord("vit", 2, 0.5, {"expert0": 0.5, "expert1": 0.5}, {}, "adaroute"),
    ]
    whose, which = as_gates(records[0])
    assert whose.candidates == ("vit", "tiny") and whose.weights.tolist() == [[0.25, 0.75]]
    assert which.candidates == ("patches", "own prompts") and (which.part, whose.receiver) == ("which tokens", "vit")
    log = SimpleNamespace(routing=[], rows=[])
    handler = RoutingPictures(log, tmp_path)  # type: ignore[arg-type]
    handler(None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    log.routing, log.rows = records, [{"epoch": 1, "routing": flat_metrics(records)}]
    handler(None)  # type: ignore[arg-type]
    names = ["routing_adaroute.png", "routing_curves.png", "routing_pmoe.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(pixels(tmp_path / name).std() > 10 for name in names)
