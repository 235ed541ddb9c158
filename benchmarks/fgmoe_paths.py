# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""When is it faster to gather tokens for each slice of FGMoE's MLP than to run the undivided MLP on all?

    python benchmarks/fgmoe_paths.py [--threads 1] [--device cpu]

Prints, for each size, the time of "gather" over that of "dense", each the best of several in turns: below 1, gathering
is faster. What execution="auto" chooses (medmoe/moe/fgmoe.py) was set by these numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product

import torch

from medmoe.moe.fgmoe import SlicedMLP, keep_top_k


def seconds(function: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(dense: Callable[[], object], gather: Callable[[], object], device: str, repeats: int) -> float:
    """Time of ``gather`` over that of ``dense``, in turns, so that what else runs slows both."""
    times = [(seconds(dense, device), seconds(gather, device)) for _ in range(repeats + 1)][1:]
    return min(t for _, t in times) / min(t for t, _ in times)


def compared(
    channels: int, tokens: int, slices: int, shared: int, top_k: int, device: str, repeats: int
) -> tuple[float, float]:
    """The ratio forward, and forward and backward."""
    both = [SlicedMLP(channels, 4 * channels // slices, slices, shared, top_k, way) for way in ("dense", "gather")]
    dense, gather = (mlp.to(device) for mlp in both)
    x = torch.randn(2, tokens // 2, channels, device=device, requires_grad=True)
    weights = keep_top_k(torch.randn(2, tokens // 2, slices, device=device).softmax(-1), top_k)

    def step(mlp: SlicedMLP) -> None:
        mlp(x, weights).sum().backward()

    with torch.no_grad():
        forward = ratio(lambda: dense(x, weights), lambda: gather(x, weights), device, repeats)
    return forward, ratio(lambda: step(dense), lambda: step(gather), device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("slices + shared  channels  tokens  top_k  forward  forward and backward")
    layouts = [((8, 1), (2, 3, 4)), ((4, 0), (1, 2)), ((16, 1), (4, 8))]
    for ((slices, shared), kept), channels in product(layouts, (64, 256)):
        for tokens, top_k in product((256, 1024, 4096, 8192), kept):
            pair = compared(channels, tokens, slices, shared, top_k, arguments.device, arguments.repeats)
            print(
                f"{slices:>6} + {shared:<6}  {channels:>8}  {tokens:>6}  {top_k:>5}  {pair[0]:>7.2f}  {pair[1]:>20.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
