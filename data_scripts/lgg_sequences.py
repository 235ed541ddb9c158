# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Makes a data set with two MR sequences and a clinical table out of slices of the LGG segmentation data set.

The source is a folder with images/*.png, whose colors are three sequences (pre-contrast, FLAIR, post-contrast),
masks/*.png of the FLAIR abnormality, and clinical.csv with a row for each image. Here FLAIR becomes the image and the
post-contrast sequence a second image to condition on. The authors of the data replaced sequences that do not exist by
FLAIR: where the post-contrast one equals it, it is left out, so that it counts as missing. Splits are by patient.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from medmoe.data.making import command, digest, make_folder, split_by_patient
from medmoe.data.table import Table, read_table
from medmoe.errors import DataError, one_line, some
from medmoe.progress import track

SCRIPT = "data_scripts/lgg_sequences.py"
FLAIR, POST = 1, 2  # positions among the colors
SHORTER = {
    "age_at_initial_pathologic": "age",
    "neoplasm_histologic_grade": "grade",
    "histological_type": "histology",
    "death01": "death",
}
MEANINGS = {"grade": {"1": "II", "2": "III"}}
"""Codes of the source that are written out."""

README = """LGG sequences
=============

{cases} slices of {patients} patients with lower-grade glioma, made by {script} with seed {seed}.

images/       FLAIR, 8 bits
post/         post-contrast T1, 8 bits; missing for {missing} slices, whose source repeats FLAIR in its place
masks/        0 and 255, the FLAIR abnormality (label_threshold 127)
clinical.csv  attributes of each patient, coded but for the grade: {columns}
splits.json   by patient: {splits} slices

Source: M. Buda, A. Saha and M. A. Mazurowski, Association of genomic subtypes of lower-grade gliomas with shape
features automatically extracted by a deep learning algorithm, Computers in Biology and Medicine 109 (2019),
doi:10.1016/j.compbiomed.2019.05.002; images from The Cancer Imaging Archive, TCGA-LGG.
License of the data set: CC BY-NC-SA 4.0. Redistribution is allowed for non-commercial purposes under the same license.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    return command(make, __doc__, "images/, masks/ and clinical.csv", "lgg_sequences", arguments)


def make(source: Path, output: Path, seed: int = 0, force: bool = False) -> None:
    """Makes the data set in ``output``, whole or not at all; does nothing if it is there already.

    Raises:
        DataError: the source is not as described, or ``output`` holds something else.
    """
    images = sorted((source / "images").glob("*.png"))
    table = source / "clinical.csv"
    masks = [source / "masks" / image.name for image in images]
    lacking = [mask.name for mask in masks if not mask.is_file()]
    if not images or lacking or not table.is_file():
        found = f"masks are missing for {some(lacking)}" if lacking else f"there are {len(images)} images"
        raise DataError(f"{source} is not the source: expected images/*.png, masks/ alike and clinical.csv; {found}.")
    rows = read_table(table)
    absent = [image.stem for image in images if image.stem not in rows.rows]
    if absent:
        raise DataError(f"{table} has no row for {len(absent)} images: {some(absent)}.")
    recipe = {"script": SCRIPT, "seed": seed, "source_sha256": digest([*images, *masks, table], source)}
    if make_folder(output, recipe, lambda folder: _write(folder, images, masks, table, seed), force):
        print(f"{output}: {len(images)} slices; see its README.md.")
    else:
        print(f"{output} is complete: nothing to do.")


def _write(folder: Path, images: list[Path], masks: list[Path], table: Path, seed: int) -> None:
    """Images, masks, the table, splits and the README."""
    for name in ("images", "post", "masks"):
        (folder / name).mkdir()
    missing = 0
    for image, mask in track(list(zip(images, masks, strict=True)), "writing slices"):
        colors = _colors(image)
        Image.fromarray(colors[..., FLAIR]).save(folder / "images" / image.name)
        if np.array_equal(colors[..., POST], colors[..., FLAIR]):
            missing += 1
        else:
            Image.fromarray(colors[..., POST]).save(folder / "post" / image.name)
        shutil.copyfile(mask, folder / "masks" / image.name)
    columns = _write_table(folder / "clinical.csv", read_table(table), [image.stem for image in images])
    patients = {image.stem: "_".join(image.stem.split("_")[:3]) for image in images}
    sizes = split_by_patient(patients, folder, seed)
    facts = {
        "cases": len(images),
        "patients": len(set(patients.values())),
        "script": SCRIPT,
        "seed": seed,
        "missing": missing,
        "columns": ", ".join(columns),
        "splits": ", ".join(f"{size} {split}" for split, size in sizes.items()),
    }
    (folder / "README.md").write_text(README.format(**facts), encoding="utf-8")


def _write_table(target: Path, table: Table, cases: list[str]) -> list[str]:
    """The rows of the cases, without what names a patient. Returns the columns."""
    kept = [column for column in table.columns if column != "Patient"]
    columns = [SHORTER.get(column, column) for column in kept]
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *columns])
        for case in cases:
            values = [(SHORTER.get(column, column), table.rows[case][column]) for column in kept]
            writer.writerow([case, *(MEANINGS.get(column, {}).get(value, value) for column, value in values)])
    return columns


def _colors(path: Path) -> npt.NDArray[np.uint8]:
    """The three sequences (H, W, 3) of a slice."""
    try:
        with Image.open(path) as picture:
            if picture.mode != "RGB":
                raise DataError(f"{path} is {picture.mode}, expected RGB: three sequences as colors.")
            return np.asarray(picture)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
