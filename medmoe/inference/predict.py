# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Prediction with a checkpoint, through the same bundle that ``monai.bundle run`` runs."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from medmoe.errors import CheckpointError, ConfigError, some
from medmoe.experts.build import RANDOM
from medmoe.inference.inputs import find_inputs, first_file
from medmoe.inference.writer import IMAGES, case_masks, check_output
from medmoe.training.checkpoint import read_metadata, tasks_of
from medmoe.training.excepthook import find_error
from medmoe.training.preflight import WEIGHTS

BUNDLES = ("pmoe_seg.json", "inference.json")
CODE = ("$", "@", "%")  # what MONAI evaluates, looks up or includes
LOCAL = {"dataset_dir", "output_dir", "tracking_uri", "experiment", "run_name", "resume", "num_workers"}


def bundle_file(name: str) -> Path:
    """A file of the bundle: inside the installed package, or beside it in a checkout.

    Raises:
        ConfigError: it is in neither.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "bundles" / name, package.parent / "bundles" / name]
    for place in places:
        if place.is_file():
            return place
    raise ConfigError(f"The bundle's {name} is missing (looked for {' and '.join(map(str, places))}). Install again.")


def predict(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    overlay: bool = False,
    **overrides: Any,
) -> list[Path]:
    """Writes the masks of every input, and what is said of whole images.

    Args:
        input: see :func:`medmoe.inference.inputs.find_inputs`.
        output: folder for the masks, see :mod:`medmoe.inference.writer`.
        checkpoint: of a training run. The bundle runs with the settings that it holds, but for those that
            ``inference.json`` itself makes.
        overlay: for pictures, also writes the picture with the classes in color over it.
        overrides: further settings of the bundle, which win over those of the checkpoint.

    Returns:
        the masks, by the order of their cases, and the table of what is said of whole images.

    Raises:
        DataError: there is nothing to predict, the output folder is not fit for it, or some inputs could not be
            predicted: the masks of the others are there by then.
        CheckpointError: the checkpoint is missing, damaged, or holds settings that are no plain values.
    """
    settings = {**settings_of(checkpoint), **overrides}
    sources = {item["case"]: first_file(item) for item in find_inputs(input, settings.get("in_channels", 1))}
    tasks = tasks_of(checkpoint)
    check_output(Path(output), sources, tasks, overlay)
    with opened(input, output, checkpoint, {**settings, "overlay": overlay}) as workflow:
        workflow.run()
        workflow.finalize()
    tables = [Path(output) / IMAGES] if any(not task.dense for task in tasks) else []
    return case_masks(Path(output), sources, tasks) + tables


def settings_of(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a checkpoint that the inference bundle is to run with, see :func:`checkpoint_settings`."""
    metadata = read_metadata(checkpoint)
    training, inference = (json.loads(bundle_file(name).read_text(encoding="utf-8")) for name in BUNDLES)
    own = {name: value for name, value in training.items() if name not in inference}
    return checkpoint_settings(metadata.settings, own, checkpoint)


@contextmanager
def opened(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    settings: Mapping[str, Any],
) -> Iterator[ConfigWorkflow]:
    """The inference bundle, initialized in this process, whose logging and ``sys.excepthook`` stay as they are.

    Errors that a user can put right are raised as they are, not as MONAI wraps them.
    """
    paths = {"input": input, "output": output, "output_dir": output, "checkpoint": checkpoint}
    places = {name: str(Path(path).absolute()) for name, path in paths.items()}
    files = [str(bundle_file(name)) for name in BUNDLES]
    remarks, hook = logging.getLogger("monai.bundle.workflows"), sys.excepthook
    level = remarks.level
    try:
        remarks.setLevel(logging.ERROR)  # it warns of what is meant so: that logging stays as it is
        workflow = ConfigWorkflow(files, workflow_type="infer", logging_file=False, **{**settings, **places})
        remarks.setLevel(level)
        workflow.initialize()
        yield workflow
    except Exception as error:
        ours = find_error(error)
        if ours is None or ours is error:
            raise
        raise ours from error
    finally:
        remarks.setLevel(level)
        sys.excepthook = hook


def checkpoint_settings(
    saved: Mapping[str, Any], config: Mapping[str, Any], checkpoint: str | os.PathLike[str]
) -> dict[str, Any]:
    """The settings of a checkpoint that override those of the bundle: plain values in place of plain values.

    A bundle's strings can be code. A checkpoint may come from anybody, so none of its values may be anything that MONAI
    would evaluate; nor does it decide about folders here. An expert's weights file is left out where it does not exist,
    as on another machine than that of training: the expert then comes from the cache.

    Raises:
        CheckpointError: a value is an expression, a reference, an inclusion or a component.
    """
    chosen = {name: saved[name] for name in saved if name in config and name not in LOCAL and is_plain(config[name])}
    code = [name for name, value in chosen.items() if not is_plain(value)]
    if code:
        raise CheckpointError(
            f"checkpoint {checkpoint} holds settings that are no plain values: {some(code)}. medmoe writes no such "
            "checkpoint; do not trust this file."
        )
    return {name: value for name, value in chosen.items() if name not in WEIGHTS or is_here(value)}


def is_here(weights: Any) -> bool:
    """Whether a setting of an expert's weights can be used on this machine."""
    return not isinstance(weights, str) or weights == RANDOM or Path(weights).expanduser().is_file()


def is_plain(value: Any) -> bool:
    """Whether a value of a bundle is only a value, whatever MONAI does with it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and not key.startswith("_") and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    if isinstance(value, str):
        return not value.lstrip().startswith(CODE)
    return value is None or isinstance(value, (bool, int, float))
