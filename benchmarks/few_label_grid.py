# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Methods side by side on few labelled images: every cell is a run of bundles/pmoe_seg.json with overrides.

    python benchmarks/few_label_grid.py --dataset_dir kvasir_seg --output docs/benchmarks/kvasir_32

Each cell trains 100 steps of batch 4 on 32 images that its seed draws from the training split, and is judged once,
after the last step, on the validation split. Cells that have a result are skipped, so that a killed grid goes on.
Control: the probabilities of two separately tuned networks, averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GENERAL = {"medical": None}
MEDICAL = {"general": None}
PLAIN = {"prompter": "none", "general_lora": 0, "medical_lora": 0}
VPT = {"prompter": "vpt", "general_lora": 0, "medical_lora": 0}
PMOE = {"fusion": "late", "general_lora": 0, "medical_lora": 0}
CHEAP = {"prompt_medical": False, "general_lora": 8, "medical_lora": 0, "fusion": "late"}

METHODS: dict[str, dict[str, Any]] = {
    "general, linear": {**GENERAL, **PLAIN},
    "general, VPT": {**GENERAL, **VPT},
    "general, LoRA": {**GENERAL, **PLAIN, "general_lora": 8},
    "medical, linear": {**MEDICAL, **PLAIN},
    "medical, VPT": {**MEDICAL, **VPT, "prompt_medical": True},
    "medical, LoRA": {**MEDICAL, **PLAIN, "medical_lora": 8},
    "both, LoRA": {**PLAIN, "general_lora": 8, "medical_lora": 8, "fusion": "late"},
    "both, pMoE": PMOE,
    "both, pMoE + LoRA": {**PMOE, "general_lora": 8, "medical_lora": 8},
    "both, medical untouched, LoRA": {**CHEAP, "prompter": "none"},
    "both, medical untouched, pMoE + LoRA": CHEAP,
}
AVERAGES = {
    "average of two networks: general, LoRA and medical, LoRA": ("general, LoRA", "medical, LoRA"),
    "average of two networks: general, LoRA and medical, linear": ("general, LoRA", "medical, linear"),
}
SETTINGS: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 3,
    "num_classes": 2,
    "label_threshold": 127,
    "intensity": "unit",
    "roi_size": [352, 352],
    "general_size": 154,
    "medical_size": 128,
    "batch_size": 4,
    "max_epochs": 1,
    "steps_per_epoch": 100,
    "train::handlers::0::before": False,
}


def file_name(method: str, seed: int) -> str:
    """A file name for a cell."""
    return "".join(c if c.isalnum() else "_" for c in method).strip("_") + f"-seed{seed}"


def dice(prediction: np.ndarray, label: np.ndarray) -> float:
    """Dice of two masks; 1 where both are empty."""
    total = int(prediction.sum() + label.sum())
    return 2 * int((prediction & label).sum()) / total if total else 1.0


def run_cell(method: str, seed: int, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Trains and judges one cell in this process; keeps the probabilities of class 1 in ``scratch``."""
    from monai.bundle import ConfigWorkflow
    from monai.engines import IterationEvents

    from medmoe.training.handlers import peak_memory, read_rows

    folder = scratch / file_name(method, seed)
    overrides = {**SETTINGS, **METHODS[method], **settings, "seed": seed, "output_dir": str(folder), "tracking_uri": ""}
    workflow = ConfigWorkflow(str(ROOT / "bundles/pmoe_seg.json"), workflow_type="train", **overrides)
    workflow.initialize()
    evaluator = workflow.parser.get_parsed_content("validate::evaluator")
    kept: list[np.ndarray] = []

    def keep(engine: Any) -> None:
        kept.append(engine.state.output["pred"].softmax(1)[0, 1].cpu().numpy().astype(np.float16))

    evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, keep)
    workflow.run()
    np.save(folder / "probabilities.npy", np.stack(kept))
    labels = [np.asarray(sample["label"][0]) > 0 for sample in evaluator.data_loader.dataset.cache]
    np.save(folder / "labels.npy", np.stack(labels))
    record = json.loads((folder / "run.json").read_text())
    rows = read_rows(folder)
    return {
        "method": method,
        "seed": seed,
        "dice": [float(value) for value in evaluator.state.metric_details["val_mean_dice"][:, 0]],
        "seconds": rows[-1]["seconds"],
        "memory": peak_memory(),
        "checkpoint_mb": (folder / "best.safetensors").stat().st_size / 1e6,
        "settings": {key: value for key, value in record["settings"].items() if "dir" not in key},
        **{key: record[key] for key in ("parameters", "versions", "hardware", "experts", "data")},
    }


def average_cell(method: str, seed: int, scratch: Path) -> dict[str, Any]:
    """Dice of the averaged probabilities of two cells."""
    folders = [scratch / file_name(part, seed) for part in AVERAGES[method]]
    mean = sum(np.load(folder / "probabilities.npy").astype(np.float32) for folder in folders) / 2
    label = np.load(folders[0] / "labels.npy")
    return {"method": method, "seed": seed, "dice": [dice(p > 0.5, t) for p, t in zip(mean, label, strict=True)]}


def bootstrap(values: np.ndarray, seed: int = 0, rounds: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean over cases."""
    draws = np.random.default_rng(seed).integers(len(values), size=(rounds, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def report(results: list[dict[str, Any]], reference: str = "medical, LoRA") -> str:
    """A Markdown table: mean Dice by seed, its mean, and the paired difference to ``reference``."""
    seeds = sorted({r["seed"] for r in results})
    by = {(r["method"], r["seed"]): np.array(r["dice"]) for r in results}
    lines = [
        f"| method | trains, M (without decoder) | {' | '.join(f'seed {s}' for s in seeds)} | mean | "
        f"minus {reference} (paired over images, 95 % bootstrap) | s / run | peak GiB |",
        "|---" * (len(seeds) + 6) + "|",
    ]
    for method in [*METHODS, *AVERAGES]:
        have = [s for s in seeds if (method, s) in by]
        if not have:
            continue
        cells = [f"{by[method, s].mean():.3f}" if s in have else "-" for s in seeds]
        shared = [s for s in have if (reference, s) in by]
        text = "-"
        if shared and method != reference:
            gap = np.mean([by[method, s] - by[reference, s] for s in shared], 0)
            low, high = bootstrap(gap)
            text = f"{gap.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        runs = [r for r in results if r["method"] == method]
        cost = ["-", "-", "-"]
        if "seconds" in runs[0]:
            counts = runs[0]["parameters"]
            trains = counts["trainable"] / 1e6
            cost[0] = f"{trains:.2f} ({trains - counts.get('decoder', 0) / 1e6:.2f})"
            cost[1] = f"{np.median([r['seconds'] for r in runs]):.0f}"
            cost[2] = f"{max(r['memory']['ram'] for r in runs):.1f}"
        mean = np.mean([by[method, s].mean() for s in have])
        lines.append(f"| {method} | {cost[0]} | {' | '.join(cells)} | {mean:.3f} | {text} | {cost[1]} | {cost[2]} |")
    return "\n".join(lines) + "\n"


def grid_parser(description: str | None, scratch: str) -> argparse.ArgumentParser:
    """The options of every grid of runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results: a JSON a cell, report.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="further settings of the bundle")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / scratch)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a process with one thread each")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    return parser


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The bundle's settings that the command line names."""
    pairs = (item.partition("=") for item in arguments.set)
    return {"dataset_dir": arguments.dataset_dir, **{key: json.loads(value) for key, _, value in pairs}}


def write_cell(output: Path, name: str, seed: int, result: dict[str, Any]) -> None:
    """Writes the result of a cell, after which it is not run again."""
    (output / f"{file_name(name, seed)}.json").write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = grid_parser(__doc__, "few_label_grid")
    parser.add_argument("--num_labelled", type=int, default=32)
    parser.add_argument("--methods", nargs="+", help="only methods whose names contain one of these")
    arguments = parser.parse_args()
    settings = {"num_labelled": arguments.num_labelled, **settings_of(arguments)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.cell:
        method, seed = arguments.cell[0], int(arguments.cell[1])
        write_cell(arguments.output, method, seed, run_cell(method, seed, settings, arguments.scratch))
        return
    run_grid(arguments)


def run_missing(script: str, cells: list[tuple[str, int]], output: Path, scratch: Path, jobs: int) -> None:
    """Runs this command line once more, with --cell, for every cell without a result in ``output``."""

    def start(cell: tuple[str, int]) -> None:
        if (output / f"{file_name(*cell)}.json").exists():
            return
        command = [sys.executable, script, *sys.argv[1:], "--cell", cell[0], str(cell[1])]
        log = scratch / f"{file_name(*cell)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
        with open(log, "w") as file:
            code = subprocess.run(
                command, stdout=file, stderr=file, env={**os.environ, **threads}, check=False
            ).returncode
        print(f"{cell[0]}, seed {cell[1]}: {'done' if code == 0 else f'FAILED, see {log}'}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, cells))


def run_grid(arguments: argparse.Namespace) -> None:
    """Runs what is missing, in processes of their own, and writes the report."""
    wanted = [m for m in METHODS if not arguments.methods or any(part in m for part in arguments.methods)]
    cells = [(method, seed) for seed in arguments.seeds for method in wanted]
    run_missing(__file__, cells, arguments.output, arguments.scratch, arguments.jobs)
    for method, parts in AVERAGES.items():
        for seed in arguments.seeds:
            if all((arguments.scratch / file_name(part, seed) / "labels.npy").exists() for part in parts):
                write_cell(arguments.output, method, seed, average_cell(method, seed, arguments.scratch))
    results = [json.loads(path.read_text()) for path in sorted(arguments.output.glob("*-seed*.json"))]
    (arguments.output / "report.md").write_text(report(results))
    print((arguments.output / "report.md").read_text())


if __name__ == "__main__":
    main()
