# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""What there is to predict: files, folders of files, or DICOM series."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from monai.transforms import Compose
from torch.utils.data import IterableDataset

from medmoe.conditions import Schema
from medmoe.data.conditions import never_seen
from medmoe.data.datalist import stem_of, suffix_of
from medmoe.data.series import holds_series
from medmoe.data.table import is_missing, read_table
from medmoe.data.targets import rows_of
from medmoe.data.text import encoder_of
from medmoe.data.transforms import apply
from medmoe.errors import DataError, MedMoEError, some
from medmoe.progress import Progress

logger = logging.getLogger(__name__)

KINDS = "NIfTI (.nii, .nii.gz), pictures (.png, .jpg, .bmp, .tif) or one DICOM series"


class Input(TypedDict, total=False):
    """One image to predict: a file, the folder or a file of a DICOM series, or a list with one file a channel.

    ``condition`` is there where the network has conditions: by name the table's text, or the files of a second image;
    None where it is missing.
    """

    case: str
    image: str | list[str]
    condition: dict[str, Any]


def first_file(item: Input) -> Path:
    """The file whose grid an input has."""
    image = item["image"]
    return Path(image if isinstance(image, str) else image[0])


def find_inputs(path: str | os.PathLike[str], in_channels: int = 1) -> list[Input]:
    """The inputs that ``path`` names, sorted by case. Cases are named by files without suffix, series by folders.

    ``path`` is an image file; a folder of them; a DICOM series' folder, or one of its files where the folder holds
    several; or a folder of such folders. With more than one channel, files that differ by the endings ``_0000``,
    ``_0001`` and so on are one image.

    Raises:
        DataError: there is nothing at ``path``, no image in it, or names that would lead to one mask.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"The input {path} does not exist (looked for {path.absolute()}): give {KINDS}, or a folder.")
    if path.is_dir():
        inputs = _folder_inputs(path, in_channels)
    elif suffix_of(path):
        inputs = [Input(case=stem_of(path), image=str(path))]
    elif holds_series(path):
        inputs = [Input(case=path.absolute().parent.name, image=str(path))]
    else:
        raise DataError(f"The input {path} is no image that can be read: give {KINDS}.")
    twice = [name for name, count in Counter(item["case"] for item in inputs).items() if count > 1]
    if twice:
        raise DataError(f"Several files in {path} would give one mask, for they differ by suffix alone: {some(twice)}.")
    return sorted(inputs, key=lambda item: item["case"])


def _folder_inputs(folder: Path, in_channels: int) -> list[Input]:
    images = [file for file in folder.iterdir() if suffix_of(file) and not file.name.startswith(".") and file.is_file()]
    has_series = holds_series(folder)
    if images and has_series:
        raise DataError(
            f"{folder} holds image files ({some(sorted(file.name for file in images))}) and DICOM: separate them, or "
            "give one file. A DICOM file stands for its whole series."
        )
    if images:
        return _by_channels(sorted(images), in_channels)
    series = [folder] if has_series else [sub for sub in folder.iterdir() if sub.is_dir() and holds_series(sub)]
    if not series:
        found = some(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        raise DataError(f"There is no image in {folder} (it holds {found}): give {KINDS}, or a folder of them.")
    return [Input(case=sub.absolute().name, image=str(sub)) for sub in series]


def _by_channels(images: Sequence[Path], in_channels: int) -> list[Input]:
    """Files as inputs; those with endings _0000, _0001, ... are put together where an image has several channels."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for file in images:
        stem = stem_of(file)
        groups[re.sub(r"_\d{4}$", "", stem) if in_channels > 1 else stem].append(str(file))
    if in_channels > 1 and all(len(files) == in_channels for files in groups.values()):
        return [Input(case=case, image=files) for case, files in groups.items()]
    return [Input(case=stem_of(file), image=str(file)) for file in images]


def with_conditions(
    inputs: Sequence[Input],
    schema: Schema | None,
    table: str | os.PathLike[str] | None = None,
    condition_dir: str | os.PathLike[str] | None = None,
) -> list[Input]:
    """The inputs with what is known of their conditions; the network takes what is missing as it learned to.

    Args:
        inputs: such as :func:`find_inputs` gives.
        schema: of the conditions that the network was trained with; none: the inputs stay as they are.
        table: a CSV file with a row for each input and the columns of the training table.
        condition_dir: folder of the second images, called like the inputs; or one file for one input.

    Raises:
        DataError: the table or folder cannot be read, or has nothing for any of the inputs.
        ConfigError: there are texts, but not the encoder that the network was trained with.
    """
    if schema is None:
        return list(inputs)
    names = [item["case"] for item in inputs]
    source = read_table(table) if table else None
    rows = rows_of(source, names) if source else {}
    columns = [column.name for column in schema.columns if column.kind != "image"]
    absent = [name for name in columns if source is None or name not in source.columns]
    if absent:
        logger.warning("conditions that are missing for all inputs: %s", ", ".join(absent))
    seconds = _second_images(names, schema, condition_dir)
    conditioned = []
    for item in inputs:
        row = rows.get(item["case"], {})
        known: dict[str, Any] = {name: None if is_missing(row.get(name)) else row[name] for name in columns}
        known |= {column.name: seconds.get(item["case"]) for column in schema.of_kind("image")}
        conditioned.append(Input(case=item["case"], image=item["image"], condition=known))
    given = [item["condition"] for item in conditioned]
    for line in never_seen(schema, given):
        logger.warning(line)
    if any(row[column.name] is not None for column in schema.of_kind("text") for row in given):
        encoder_of(schema)  # one error here rather than one for each input
    return conditioned


def _second_images(
    names: Sequence[str], schema: Schema, folder: str | os.PathLike[str] | None
) -> dict[str, str | list[str]]:
    """The second images by case."""
    column = next(iter(schema.of_kind("image")), None)
    if column is None:
        return {}
    found = {item["case"]: item["image"] for item in find_inputs(folder, schema.image_channels)} if folder else {}
    if len(names) == 1 and folder is not None and Path(folder).is_file():
        return {names[0]: next(iter(found.values()))}
    missing = [name for name in names if name not in found]
    if found and len(missing) == len(names):
        raise DataError(
            f"No image in {folder} is called like an input: inputs are called {some(names, 2)}, the images "
            f"{some(list(found), 2)}."
        )
    if missing:
        logger.warning("the second image (%s) is missing for %d of %d inputs", column.name, len(missing), len(names))
    return found


class InputDataset(IterableDataset[dict[str, Any]]):
    """Prepared inputs, one after the other; what cannot be prepared is noted and passed over.

    Use it with ``num_workers=0``: the failures are noted in the process that reads. The progress that it shows is that
    of whoever takes the inputs.

    Args:
        data: inputs, such as :func:`find_inputs` gives.
        transform: from an input to a sample with ``image`` (C, H, W[, D]).
        smallest: least number of voxels along the first two axes: the largest patch of the experts.

    Attributes:
        failures: why each input that was passed over could not be prepared, by case.
    """

    def __init__(self, data: Sequence[Input], transform: Compose | Callable[[Any], Any], smallest: int = 1) -> None:
        self.data, self.transform, self.smallest = list(data), transform, smallest
        self.failures: dict[str, str] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.failures = {}
        with Progress("predicting", len(self.data)) as progress:
            for item in self.data:
                sample = self.prepare(item)
                if sample is not None:
                    yield sample
                progress.advance(note=item["case"])

    def prepare(self, item: Input) -> dict[str, Any] | None:
        """The sample of an input, or ``None`` where there is none."""
        try:
            sample: dict[str, Any] = apply(self.transform, item)
            self.check_size(sample, item)
            return sample
        except MedMoEError as error:
            reason = str(error)
        except Exception as error:  # whatever it is, the other inputs can still be predicted
            logger.debug("unexpected error", exc_info=True)
            reason = f"{first_file(item)}: {type(error).__name__}: {error}"
        logger.error("passed over %s: %s", item["case"], reason)
        self.failures[item["case"]] = reason
        return None

    def check_size(self, sample: dict[str, Any], item: Input) -> None:
        """Raises a DataError for an image that is smaller than a patch."""
        size = tuple(sample["image"].shape[1:])
        if min(size[:2]) < self.smallest:
            raise DataError(
                f"{first_file(item)}: the image is {' x '.join(map(str, size))} on the network's grid; an expert needs "
                f"at least {self.smallest} x {self.smallest}. Give a larger image."
            )

    def raise_failures(self) -> None:
        """Raises a DataError that lists what was passed over in the last pass, if anything was."""
        if self.failures:
            lines = [f"\n  - {case}: {reason}" for case, reason in self.failures.items()]
            raise DataError(f"{len(lines)} of {len(self.data)} inputs could not be predicted:{''.join(lines)}")
