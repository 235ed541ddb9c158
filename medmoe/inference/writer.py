# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Masks on the grid of the files that they belong to.

A NIfTI image gives a ``.nii.gz`` with its shape and header (affine, sform and qform with their codes, units). A DICOM
series gives a ``.nii.gz`` on the grid of the series. A picture gives a ``.png`` of its size whose gray values are the
classes. Masks are named by their case; where labels may overlap each has a file of 0 and 1, ``<case>_<label>``. The
masks of further tasks have the task's name too: ``<case>_<task>``, ``<case>_<task>_<label>``. What is said of whole
images is in ``images.csv``, a probability for each class. What a folder holds is written down in its
``predictions.json``; only files that are listed there are ever overwritten.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from ignite.engine import Engine, Events
from PIL import Image, ImageColor
from scipy.ndimage import maximum_filter, minimum_filter

from medmoe.data.datalist import NIFTI_SUFFIXES, suffix_of
from medmoe.data.postprocess import decided, main_task
from medmoe.errors import DataError, some
from medmoe.files import atomic_path, plain_name, write_text
from medmoe.inference.inputs import InputDataset, first_file
from medmoe.tasks import Task
from medmoe.training.pictures import color

logger = logging.getLogger(__name__)

MANIFEST = "predictions.json"
IMAGES = "images.csv"

Mask = npt.NDArray[np.integer[Any]]


class SaveMask:
    """Writes the prediction of every case as soon as it is there.

    The evaluator's output must hold what :class:`medmoe.data.TaskResults` gives without labels. Boundaries and
    distances are not written: they follow from masks.

    Args:
        dataset: what is predicted.
        tasks: of the network.
        output: folder for the masks; made if it is missing.
        overlay: for pictures, also writes ``<case>_overlay.png`` with the classes in color over the picture.

    Raises:
        DataError: the folder holds the inputs, or files of the same names that no earlier prediction wrote. This is
            checked when the handler is made, before anything is predicted.
    """

    def __init__(
        self, dataset: InputDataset, output: str | os.PathLike[str], tasks: Sequence[Task], overlay: bool = False
    ) -> None:
        self.dataset, self.output, self.overlay = dataset, Path(output), overlay
        self.tasks, self.image_tasks = list(tasks), [task for task in tasks if not task.dense]
        self.sources = {item["case"]: first_file(item) for item in dataset.data}
        self.written = check_output(self.output, self.sources, tasks, overlay)
        self.rows: list[dict[str, str]] = []

    def attach(self, engine: Engine) -> None:
        """Registers with a MONAI evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def __call__(self, engine: Engine) -> None:
        """Writes the masks of a batch, and the list of masks after each of them."""
        state: Any = engine.state
        for item, result in zip(state.batch, state.output, strict=True):
            try:
                self.save(item["case"], result)
            except OSError as error:
                reason = error.strerror or error
                raise DataError(
                    f"What is predicted of {item['case']} cannot be written to {self.output}: {reason}."
                ) from error

    def finish(self, engine: Engine) -> None:
        """Says where the predictions are."""
        number = len(self.sources) - len(self.dataset.failures)
        logger.info("%d case%s predicted, in %s", number, "" if number == 1 else "s", self.output)

    def save(self, case: str, result: Mapping[str, Any]) -> None:
        """Writes what is said of one case, and lists the files."""
        source = self.sources[case]
        for task, targets in mask_paths(self.output, case, source, self.tasks).items():
            main = task is main_task(self.tasks)
            prediction: Any = result["pred"] if main else decided(task, result[f"pred_{task.name}"])
            affine = np.asarray(prediction.affine, dtype=np.float64)
            for mask, target in zip(np.asarray(prediction.cpu()), targets, strict=True):
                self.save_mask(as_classes(mask), affine, source, target)
        if self.image_tasks:
            self.rows.append({"case": case, **image_columns(self.image_tasks, result)})
            text = io.StringIO()
            table = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(self.rows)
            write_text(self.output / IMAGES, text.getvalue())
            self.written[IMAGES] = str(source.parent)
        write_text(self.output / MANIFEST, json.dumps(self.written, indent=1) + "\n")

    def save_mask(self, mask: Mask, affine: npt.NDArray[np.float64], source: Path, target: Path) -> None:
        """Writes one mask, and for pictures its overlay."""
        write_mask(mask, affine, source, target)
        self.written[target.name] = str(source)
        if self.overlay and target.suffix == ".png":
            write_overlay(mask, source, overlay_path(target))
            self.written[overlay_path(target).name] = str(source)


def image_columns(tasks: Sequence[Task], result: Mapping[str, Any]) -> dict[str, str]:
    """The image-level results of a case: of each task the likeliest class, and the probability of every class."""
    columns = {}
    for task in tasks:
        probabilities = result[f"pred_{task.name}"].tolist()
        columns[task.name] = task.names[max(range(task.channels), key=probabilities.__getitem__)]
        columns |= {f"{task.name}: {name}": f"{p:.4f}" for name, p in zip(task.names, probabilities, strict=True)}
    return columns


def mask_paths(output: Path, case: str, source: Path, tasks: Sequence[Task]) -> dict[Task, list[Path]]:
    """Where the masks of a case go, by their task: one, or one for each label where they may overlap."""
    suffix = ".nii.gz" if suffix_of(source) in ("", *NIFTI_SUFFIXES) else ".png"
    main, found = main_task(tasks), {}
    for task in tasks:
        if task.kind in ("classes", "labels"):
            stem = case if task is main else f"{case}_{task.name}"
            endings = [""] if task.kind == "classes" else ["_" + plain_name(name) for name in task.names]
            found[task] = [output / f"{stem}{ending}{suffix}" for ending in endings]
    return found


def case_masks(output: Path, sources: Mapping[str, Path], tasks: Sequence[Task]) -> list[Path]:
    """Where the masks of all cases go, in their order."""
    paths = (mask_paths(output, case, source, tasks) for case, source in sources.items())
    return [path for each in paths for masks in each.values() for path in masks]


def overlay_path(mask: Path) -> Path:
    """Where the overlay of a picture's mask goes."""
    return mask.with_name(f"{mask.name.removesuffix('.png')}_overlay.png")


def read_manifest(output: Path) -> dict[str, str]:
    """The files in ``output`` that predictions wrote, with their images; empty where there are none."""
    try:
        content = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise DataError(f"The output {output} is a file: give a folder for the masks.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{output / MANIFEST} cannot be read ({error}): choose another output folder.") from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise DataError(f"{output / MANIFEST} is no list of predictions: choose another output folder.")
    return content


def check_output(
    output: Path, sources: Mapping[str, Path], tasks: Sequence[Task], overlay: bool = False
) -> dict[str, str]:
    """What predictions already wrote to ``output``, as :func:`read_manifest` gives it.

    Raises:
        DataError: a mask would take the place of anything else.
    """
    written = read_manifest(output)
    folders = {(path if path.is_dir() else path.parent).resolve() for path in sources.values()}
    if output.resolve() in folders:
        raise DataError(f"The output {output} is the folder of the inputs: give the masks a folder of their own.")
    masks = case_masks(output, sources, tasks)
    tables = [output / IMAGES] if any(not task.dense for task in tasks) else []
    targets = tables + masks + ([overlay_path(mask) for mask in masks if mask.suffix == ".png"] if overlay else [])
    twice = [path.name for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise DataError(f"Two predictions would be written to one file: {some(twice)}. Rename an input, or a label.")
    foreign = [path.name for path in targets if path.exists() and path.name not in written]
    if foreign:
        raise DataError(
            f"{output} holds {len(foreign)} files that masks would overwrite and that no earlier prediction wrote: "
            f"{some(foreign)}. Choose another output folder, or move them away."
        )
    return written


def as_classes(values: npt.NDArray[Any]) -> Mask:
    """Class indices in the smallest unsigned type."""
    return values.round().astype(np.uint8 if values.max(initial=0) < 256 else np.uint16)


def write_mask(mask: Mask, affine: npt.NDArray[np.float64], source: Path, target: Path) -> None:
    """Writes ``mask`` (H, W[, D]) to ``target``, atomically, on the grid of the file ``source``.

    Args:
        affine: (4, 4) of the mask in RAS+ millimeters; used for a DICOM series alone, other files are asked for theirs.

    Raises:
        DataError: the mask has another shape than the source.
    """
    if suffix_of(source) in NIFTI_SUFFIXES:
        save_nifti(like_nifti(mask, source), target)
    elif suffix_of(source):
        with Image.open(source) as picture:
            check_shape(mask, (picture.height, picture.width), source)
        with atomic_path(target) as temporary:
            Image.fromarray(mask).save(temporary, format="PNG")
    else:
        image = nib.Nifti1Image(mask, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        image.header.set_xyzt_units("mm")
        save_nifti(image, target)


def like_nifti(mask: Mask, source: Path) -> Any:
    """A nibabel image of the mask with the header of ``source``, but for extensions: they may name patients."""
    image: Any = nib.load(source)
    shape = image.shape[: 2 if mask.ndim == 2 else 3]
    check_shape(mask, shape, source)
    header = image.header.copy()
    header.extensions.clear()
    header.set_data_dtype(mask.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"classes"
    return type(image)(mask, None, header)


def check_shape(mask: Mask, shape: tuple[int, ...], source: Path) -> None:
    """Raises a DataError where the mask does not have the shape of its source."""
    if mask.shape != tuple(shape):
        raise DataError(f"The mask of {source} is {mask.shape}, but the image is {tuple(shape)}: it was not inverted.")


def save_nifti(image: Any, target: Path) -> None:
    """Writes a nibabel image, whole or not at all."""
    with atomic_path(target) as temporary:
        nib.save(image, temporary)


def write_overlay(mask: Mask, source: Path, target: Path) -> None:
    """Writes the picture ``source`` with the classes of ``mask`` (H, W) in color over it, and their outlines."""
    with Image.open(source) as picture:
        values = np.asarray(picture.convert("RGB"), dtype=np.float64)
    classes = range(1, int(mask.max(initial=0)) + 1)
    colors = np.asarray([(0, 0, 0), *(ImageColor.getrgb(color(index)) for index in classes)])[mask]
    outline = minimum_filter(mask, 3) != maximum_filter(mask, 3)
    opacity = np.where(mask > 0, np.where(outline, 1.0, 0.35), 0.0)[..., None]
    blend = (1 - opacity) * values + opacity * colors
    with atomic_path(target) as temporary:
        Image.fromarray(blend.round().astype(np.uint8)).save(temporary, format="PNG")
