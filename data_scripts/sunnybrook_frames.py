# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Makes a data set of cardiac MR frames with overlapping and partial labels out of Sunnybrook's DICOM files.

The source is a folder with dicom/<patient>/<frame>.dcm and masks/<patient>/<frame>_endo_epi.png or _endo_only.png, with
1 for the cavity of the left ventricle and 2 for the myocardium. In "endo_only" frames (end-systole) nobody has drawn
the myocardium: they get no file for it, which means not labelled, and not that there is none. Splits are by patient.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from medmoe.data.making import command, digest, make_folder, split_by_patient
from medmoe.errors import DataError, one_line, some
from medmoe.progress import track

SCRIPT = "data_scripts/sunnybrook_frames.py"
LABELS = {"cavity": 1, "myocardium": 2}
ENDINGS = {"_endo_epi": ("cavity", "myocardium"), "_endo_only": ("cavity",)}

README = """Sunnybrook frames
=================

{cases} frames of {patients} patients, made by {script} with seed {seed}.

images/            16 bits, the values of the DICOM files
masks/cavity/      0 and 255, the cavity of the left ventricle: all frames
masks/myocardium/  0 and 255, the myocardium: {both} frames; in the others (end-systole) nobody has drawn it
splits.json        by patient: {splits} frames

Source: Sunnybrook Cardiac Data, from the MICCAI 2009 challenge on the segmentation of the left ventricle. P. Radau and
others, Evaluation framework for algorithms segmenting short axis cardiac MRI, The MIDAS Journal (2009).
License: CC0 1.0.
"""


class Frame(NamedTuple):
    """A frame of a patient with the mask that belongs to it and the labels that are drawn in it."""

    patient: str
    name: str
    image: Path
    mask: Path
    drawn: tuple[str, ...]


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return command(make, __doc__, "dicom/ and masks/", "sunnybrook_frames", arguments)


def make(source: Path, output: Path, seed: int = 0, force: bool = False) -> None:
    """Makes the data set in ``output``, whole or not at all; does nothing if it is there already.

    Raises:
        DataError: the source is not as described, or ``output`` holds something else.
    """
    frames = find_frames(source)
    files = [file for frame in frames for file in (frame.image, frame.mask)]
    recipe = {"script": SCRIPT, "seed": seed, "source_sha256": digest(files, source)}
    if make_folder(output, recipe, lambda folder: _write(folder, frames, seed), force):
        print(f"{output}: {len(frames)} frames; see its README.md.")
    else:
        print(f"{output} is complete: nothing to do.")


def find_frames(source: Path) -> list[Frame]:
    """The frames of all patients.

    Raises:
        DataError: there are none, or frames without exactly one mask.
    """
    frames, wrong = [], []
    for image in sorted((source / "dicom").glob("*/*.dcm")):
        patient = image.parent.name
        masks = {source / "masks" / patient / f"{image.stem}{end}.png": drawn for end, drawn in ENDINGS.items()}
        found = [(mask, drawn) for mask, drawn in masks.items() if mask.is_file()]
        if len(found) == 1:
            frames.append(Frame(patient, f"{patient}_{image.stem.zfill(4)}", image, *found[0]))
        else:
            wrong.append(f"{patient}/{image.stem} ({len(found)} masks)")
    if wrong or not frames:
        found_text = f"expected one mask each for {some(wrong)}" if wrong else "there are no frames"
        raise DataError(f"{source} is not the source: {found_text}; looked for dicom/<patient>/<frame>.dcm and masks/.")
    return frames


def _write(folder: Path, frames: list[Frame], seed: int) -> None:
    """Images, masks, splits and the README."""
    for name in ("images", *(f"masks/{label}" for label in LABELS)):
        (folder / name).mkdir(parents=True)
    for frame in track(frames, "writing frames"):
        pixels, classes = _pixels(frame.image), _classes(frame)
        if pixels.shape != classes.shape:
            raise DataError(f"{frame.mask} is {classes.shape}, its frame {frame.image} is {pixels.shape}.")
        Image.fromarray(pixels).save(folder / "images" / f"{frame.name}.png")
        for label in frame.drawn:
            mask = (classes == LABELS[label]).astype(np.uint8) * 255
            Image.fromarray(mask).save(folder / "masks" / label / f"{frame.name}.png")
    sizes = split_by_patient({frame.name: frame.patient for frame in frames}, folder, seed)
    facts = {
        "cases": len(frames),
        "patients": len({frame.patient for frame in frames}),
        "script": SCRIPT,
        "seed": seed,
        "both": sum("myocardium" in frame.drawn for frame in frames),
        "splits": ", ".join(f"{size} {split}" for split, size in sizes.items()),
    }
    (folder / "README.md").write_text(README.format(**facts), encoding="utf-8")


def _pixels(path: Path) -> npt.NDArray[np.uint16]:
    """The values of a frame (rows, columns)."""
    from pydicom import dcmread

    try:
        pixels = np.asarray(dcmread(path).pixel_array)
    except Exception as error:  # pydicom raises whatever a broken file leads to
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error
    if pixels.ndim != 2 or pixels.min() < 0 or pixels.max() >= 2**16:
        raise DataError(
            f"{path} has {pixels.shape} pixels from {pixels.min()} to {pixels.max()}: expected 16-bit gray."
        )
    return pixels.astype(np.uint16)


def _classes(frame: Frame) -> npt.NDArray[np.uint8]:
    """The mask of a frame: 0, and the numbers of the labels that are drawn."""
    try:
        with Image.open(frame.mask) as picture:
            classes = np.asarray(picture)
    except OSError as error:
        raise DataError(f"{frame.mask} cannot be read: {one_line(error)}") from error
    allowed = {0, *(LABELS[label] for label in frame.drawn)}
    found = set(np.unique(classes).tolist())
    if not found <= allowed:
        raise DataError(f"{frame.mask} has the values {sorted(found)}, expected only {sorted(allowed)}.")
    return classes


if __name__ == "__main__":
    sys.exit(main())
