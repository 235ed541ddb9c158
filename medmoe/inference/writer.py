# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Masks on the grid of the files that they belong to.

A NIfTI image gives a ``.nii.gz`` with its shape and header (affine, sform and qform with their codes, units). A DICOM
series gives a ``.nii.gz`` on the grid of the series. A picture gives a ``.png`` of its size whose gray values are the
classes. Masks are named by their case. What a folder holds is written down in its ``predictions.json``; only files that
are listed there are ever overwritten.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from PIL import Image, ImageColor
from scipy.ndimage import maximum_filter, minimum_filter

from medmoe.data.datalist import NIFTI_SUFFIXES, suffix_of
from medmoe.errors import DataError, some
from medmoe.files import atomic_path, write_text
from medmoe.inference.inputs import InputDataset, first_file
from medmoe.training.pictures import color

logger = logging.getLogger(__name__)

MANIFEST = "predictions.json"

Mask = npt.NDArray[np.integer[Any]]


class SaveMask:
    """Writes the prediction of every case as soon as it is there.

    The evaluator's output must hold ``pred``: class indices (1, H, W[, D]) on the grid of the file.

    Args:
        dataset: what is predicted.
        output: folder for the masks; made if it is missing.
        overlay: for pictures, also writes ``<case>_overlay.png`` with the classes in color over the picture.

    Raises:
        DataError: the folder holds the inputs, or files of the same names that no earlier prediction wrote. This is
            checked when the handler is made, before anything is predicted.
    """

    def __init__(self, dataset: InputDataset, output: str | os.PathLike[str], overlay: bool = False) -> None:
        self.dataset, self.output, self.overlay = dataset, Path(output), overlay
        self.sources = {item["case"]: first_file(item) for item in dataset.data}
        self.written = check_output(self.output, self.sources, overlay)

    def attach(self, engine: Engine) -> None:
        """Registers with a MONAI evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def __call__(self, engine: Engine) -> None:
        """Writes the masks of a batch, and the list of masks after each of them."""
        state: Any = engine.state
        for item, result in zip(state.batch, state.output, strict=True):
            try:
                self.save(item["case"], result["pred"])
            except OSError as error:
                reason = error.strerror or error
                raise DataError(f"The mask of {item['case']} cannot be written to {self.output}: {reason}.") from error

    def finish(self, engine: Engine) -> None:
        """Says where the masks are."""
        number = len(self.sources) - len(self.dataset.failures)
        logger.info("%d mask%s in %s", number, "" if number == 1 else "s", self.output)

    def save(self, case: str, prediction: MetaTensor) -> None:
        """Writes the mask of one case, (1, H, W[, D]), and lists it."""
        source = self.sources[case]
        target = mask_path(self.output, case, source)
        mask = as_classes(np.asarray(prediction.cpu())[0])
        write_mask(mask, np.asarray(prediction.affine, dtype=np.float64), source, target)
        self.written[target.name] = str(source)
        if self.overlay and target.suffix == ".png":
            write_overlay(mask, source, overlay_path(target))
            self.written[overlay_path(target).name] = str(source)
        write_text(self.output / MANIFEST, json.dumps(self.written, indent=1) + "\n")


def mask_path(output: Path, case: str, source: Path) -> Path:
    """Where the mask of a case goes."""
    is_volume = suffix_of(source) in ("", *NIFTI_SUFFIXES)
    return output / (case + (".nii.gz" if is_volume else ".png"))


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


def check_output(output: Path, sources: Mapping[str, Path], overlay: bool = False) -> dict[str, str]:
    """What predictions already wrote to ``output``, as :func:`read_manifest` gives it.

    Raises:
        DataError: a mask would take the place of anything else.
    """
    written = read_manifest(output)
    folders = {(path if path.is_dir() else path.parent).resolve() for path in sources.values()}
    if output.resolve() in folders:
        raise DataError(f"The output {output} is the folder of the inputs: give the masks a folder of their own.")
    masks = [mask_path(output, case, source) for case, source in sources.items()]
    targets = masks + ([overlay_path(mask) for mask in masks if mask.suffix == ".png"] if overlay else [])
    twice = [path.name for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise DataError(f"Two inputs would be written to one file: {some(twice)}. Rename one of them.")
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
