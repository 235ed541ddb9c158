# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Variants of a bundle side by side, each trained and judged once on the test cases.

    python benchmarks/comparisons.py multimodal --dataset_dir lgg_sequences --output docs/benchmarks/lgg_conditions

Every cell is a run of the bundle with overrides, and of its evaluation. Cells that have a result are skipped, so that a
killed comparison goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from few_label_grid import bootstrap, file_name, grid_parser, run_missing, settings_of, write_cell

ROOT = Path(__file__).resolve().parents[1]
ORGANS = ["left lung", "right lung", "heart", "left clavicle", "right clavicle"]
ORGAN_TASK = {"name": "organs", "kind": "labels", "names": ORGANS}
EDGE_TASK = {"name": "edges", "kind": "boundary", "of": "organs"}
DISTANCE_TASK = {"name": "distances", "kind": "distance", "of": "organs"}
NODULE_TASK = {"name": "nodule", "kind": "image", "names": ["no nodule", "nodule"]}
LESION = {"name": "lesion", "kind": "classes", "names": ["background", "lesion"]}
NO_ADAROUTE = {"general_adaroute": 0, "medical_adaroute": 0}
NO_LORA = {"general_lora": 0, "medical_lora": 0}


class Comparison(NamedTuple):
    """A bundle, its variants by name, the one that the others are compared to, and what to keep of each."""

    bundle: str
    variants: dict[str, dict[str, Any]]
    reference: str


MAIN_METRICS = {
    "organs": "val_organs_mean_dice",
    "edges": "val_edges_mean_f1",
    "distances": "val_distances_mean_mae",
    "nodule": "val_nodule_cross_entropy",
}
LOWER_IS_BETTER = ("val_distances_mean_mae", "val_nodule_cross_entropy")

COMPARISONS = {
    "multitask": Comparison(
        "pmoe_multitask",
        {
            "all four tasks, FGMoE": {},
            "all four tasks, plain head": {"decoder": "plain"},
            "all four tasks, FGMoE, uncertainty weighting": {"task_weighting": "uncertainty"},
            # A boundary or a distance is made of masks, so that these tasks cannot be without them: with weight 0 the
            # masks have no say.
            "organs alone": {"tasks": [ORGAN_TASK], "decoder": "plain"},
            "edges alone": {"tasks": [EDGE_TASK, {**ORGAN_TASK, "weight": 0}], "decoder": "plain"},
            "distances alone": {"tasks": [DISTANCE_TASK, {**ORGAN_TASK, "weight": 0}], "decoder": "plain"},
            "nodule alone": {"tasks": [NODULE_TASK], "decoder": "plain"},
        },
        "all four tasks, FGMoE",
    ),
    "multimodal": Comparison(
        "pmoe_multimodal",
        {
            "no condition": {"conditions": None},
            "table and second sequence": {},
            "shuffled pairing": {"shuffle_conditions": True},
            "half of the conditions missing": {"missing_conditions": 0.5},
            "no condition at the test": {"missing_conditions": 1.0},
            "second sequence alone": {"conditions": [{"name": "post", "kind": "image"}]},
        },
        "no condition",
    ),
    "full": Comparison(
        "pmoe_full",
        {
            "everything": {},
            "without pMoE's dispatchers (VPT)": {"prompter": "vpt"},
            "without MoPE": {"conditions": None},
            "without AdaRoute": NO_ADAROUTE,
            "without LoRA": NO_LORA,
            "without FGMoE": {"decoder": "plain"},
            "without the other tasks": {"tasks": [LESION], "task_weighting": "fixed"},
            "none of the four (LoRA)": {
                "prompter": "none",
                "conditions": None,
                **NO_ADAROUTE,
                "decoder": "plain",
                "tasks": [LESION],
                "task_weighting": "fixed",
            },
        },
        "everything",
    ),
    "cls": Comparison(
        "pmoe_cls",
        {
            "pMoE + LoRA": {},
            "LoRA": {"prompter": "none"},
            "frozen": {"prompter": "none", **NO_LORA},
        },
        "pMoE + LoRA",
    ),
}


def run_cell(name: str, variant: str, seed: int, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Trains and evaluates one variant in this process."""
    from monai.bundle import ConfigWorkflow

    from medmoe.inference.evaluation import read_cases
    from medmoe.training.handlers import peak_memory, read_rows

    comparison = COMPARISONS[name]
    folder = scratch / name / file_name(variant, seed)
    overrides = {
        **settings,
        **comparison.variants[variant],
        "seed": seed,
        "output_dir": str(folder),
        "tracking_uri": "",
    }
    bundle = str(ROOT / f"bundles/{comparison.bundle}.json")
    for files, kind in (([bundle], "train"), ([bundle, str(ROOT / "bundles/evaluate.json")], "train")):
        workflow = ConfigWorkflow(files, workflow_type=kind, **overrides)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    record = json.loads((folder / "run.json").read_text())
    rows = read_rows(folder)
    evaluation = next(folder.glob("evaluation_*"))
    return {
        "comparison": name,
        "variant": variant,
        "seed": seed,
        "overrides": comparison.variants[variant],
        "cases": nameless(read_cases(evaluation)),
        "seconds": rows[-1]["seconds"],
        "memory": peak_memory(),
        "routing": {row["epoch"]: rounded(row["routing"]) for row in rows if row.get("routing")},
        "settings": {key: value for key, value in record["settings"].items() if "dir" not in key},
        **{key: record.get(key) for key in ("parameters", "cost", "versions", "hardware", "experts", "data")},
    }


def rounded(metrics: dict[str, float]) -> dict[str, float]:
    """Four decimals are enough for shares and entropies."""
    return {name: round(value, 4) for name, value in metrics.items()}


def nameless(content: dict[str, Any]) -> dict[str, Any]:
    """The scores of ``cases.json`` without names and labels of the cases, whose order is that of the test split."""
    rows = [{key: value for key, value in row.items() if key.startswith("val_")} for row in content["cases"]]
    return {**content, "cases": rows}


def case_scores(result: dict[str, Any], metric: str) -> dict[int, float]:
    """A metric of every case that has it, by its place; the mean over the columns that belong to it."""
    prefix = metric.replace("mean_", "")
    found = {}
    for place, row in enumerate(result["cases"]["cases"]):
        values = [v for key, v in row.items() if key.startswith(prefix) and isinstance(v, float)]
        if values:
            found[place] = float(np.mean(values))
    return found


def report(name: str, results: list[dict[str, Any]]) -> str:
    """A Markdown table: every metric's mean over seeds, and the paired difference of the first one."""
    comparison = COMPARISONS[name]
    metrics = list(dict.fromkeys(metric for r in results for metric in r["cases"]["mean"]))
    first = metrics[0]
    reference = {r["seed"]: case_scores(r, first) for r in results if r["variant"] == comparison.reference}
    lines = [
        f"| variant | seeds | trains, M | {' | '.join(m.removeprefix('val_') for m in metrics)} | "
        f"{first.removeprefix('val_')} minus {comparison.reference} (paired over cases, 95 % bootstrap) | s / run |",
        "|---" * (len(metrics) + 5) + "|",
    ]
    for variant in comparison.variants:
        runs = [r for r in results if r["variant"] == variant]
        if not runs:
            continue
        cells = []
        for metric in metrics:
            values = [r["cases"]["mean"][metric] for r in runs if r["cases"]["mean"].get(metric) is not None]
            cells.append(f"{np.mean(values):.3f}" if values else "-")
        gap = "-"
        gaps = [
            [scores[case] - reference[r["seed"]][case] for case in sorted(reference[r["seed"]]) if case in scores]
            for r in runs
            if r["seed"] in reference and variant != comparison.reference and (scores := case_scores(r, first))
        ]
        if gaps and all(gaps):
            mean = np.mean(gaps, 0)
            low, high = bootstrap(mean)
            gap = f"{mean.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        trains = runs[0]["parameters"]["trainable"] / 1e6
        seconds = np.median([r["seconds"] for r in runs])
        lines.append(f"| {variant} | {len(runs)} | {trains:.2f} | {' | '.join(cells)} | {gap} | {seconds:.0f} |")
    lines += gain_lines(name, results) + routing_lines([r for r in results if r["variant"] == comparison.reference])
    return "\n".join(lines) + "\n"


def gain_lines(name: str, results: list[dict[str, Any]]) -> list[str]:
    """The multi-task gain of every variant with all tasks, against the runs of one task each."""
    from medmoe.inference.task_metrics import multi_task_gain

    if name != "multitask":
        return []
    means = {(r["variant"], r["seed"]): r["cases"]["mean"] for r in results}
    lines = ["", "| variant | multi-task gain, % | of the dense tasks alone, % |", "|---|---|---|"]
    for variant in COMPARISONS[name].variants:
        gains = []
        for (other, seed), multi in means.items():
            single = {m: means.get((f"{t} alone", seed), {}).get(m) for t, m in MAIN_METRICS.items()}
            own = {m: multi.get(m) for m in single}
            if other == variant and not any(v is None for v in [*single.values(), *own.values()]):
                dense = [m for m in single if "nodule" not in m]
                gains.append(
                    [
                        multi_task_gain({m: own[m] for m in chosen}, {m: single[m] for m in chosen}, LOWER_IS_BETTER)
                        for chosen in (list(single), dense)
                    ]
                )
        if gains:
            lines.append(f"| {variant} | " + " | ".join(f"{100 * gain:+.1f}" for gain in np.mean(gains, 0)) + " |")
    return lines


def routing_lines(results: list[dict[str, Any]]) -> list[str]:
    """Of each method's routers the mean entropy after the first and the last epoch, and the largest share of one."""
    if not results or not results[0].get("routing"):
        return []
    lines = [
        "",
        "| router | entropy, first epoch | last epoch | largest share of one candidate, last epoch |",
        "|---|---|---|---|",
    ]
    epochs = list(results[0]["routing"].values())
    for router in sorted({metric.split("/")[1] for metric in epochs[0]}):
        own = [
            {m: v for m, v in epoch.items() if m.startswith(f"routing/{router}/")} for epoch in (epochs[0], epochs[-1])
        ]
        first, last = (np.mean([v for m, v in epoch.items() if m.endswith("/entropy")]) for epoch in own)
        largest = max(v for m, v in own[1].items() if "/usage/" in m)
        lines.append(f"| {router} | {first:.2f} | {last:.2f} | {largest:.2f} |")
    return lines


def main() -> None:
    """The command line."""
    parser = grid_parser(__doc__, "comparisons")
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--variants", nargs="+", help="only variants whose names contain one of these")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.cell:
        variant, seed = arguments.cell[0], int(arguments.cell[1])
        result = run_cell(arguments.comparison, variant, seed, settings_of(arguments), arguments.scratch)
        write_cell(arguments.output, variant, seed, result)
        return
    run_cells(arguments)


def run_cells(arguments: argparse.Namespace) -> None:
    """Runs what is missing, in processes of their own, and writes the report."""
    variants = COMPARISONS[arguments.comparison].variants
    wanted = [v for v in variants if not arguments.variants or any(part in v for part in arguments.variants)]
    cells = [(variant, seed) for seed in arguments.seeds for variant in wanted]
    run_missing(__file__, cells, arguments.output, arguments.scratch / arguments.comparison, arguments.jobs)
    results = [json.loads(path.read_text()) for path in sorted(arguments.output.glob("*-seed*.json"))]
    (arguments.output / "report.md").write_text(report(arguments.comparison, results))
    print((arguments.output / "report.md").read_text())


if __name__ == "__main__":
    main()
