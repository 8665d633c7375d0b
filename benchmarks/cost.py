"""How the cost grows with images, depth, width, the operations K of a window and the products of a Newton step.

    python benchmarks/cost.py --write docs/speed.md

Vision transformers with random weights, one thread.  The exponent is the slope of log seconds over log size: of the
whole run, and of choosing masks and refitting alone, which know nothing of the images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from stages import seconds, timed
from transformers import ViTConfig, ViTForImageClassification

from hf_prune import loop, recipe

BASE = {"images": 32, "depth": 4, "width": 192, "K": 3, "products": 8}
SWEEPS = {"images": [16, 32, 64, 128], "depth": [2, 4, 8], "width": [96, 192, 384, 768], "K": [1, 2, 4, 8],
          "products": [2, 4, 8, 16]}  # fmt: skip
BEGIN, END = "<!-- growth: begin -->\n", "<!-- growth: end -->"


def run(images: int, depth: int, width: int, k: int | None, products: int) -> tuple[float, float]:
    """CPU seconds of the whole run, and of masks and solves.  k: None for the default recipe."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=max(1, width // 64),
                       intermediate_size=4 * width, num_labels=100)  # fmt: skip
    model = ViTForImageClassification(config).eval()
    batches = [{"pixel_values": torch.randn(16, 3, 224, 224)} for _ in range(images // 16)]
    chosen = recipe.load("snows", nm="2:4", samples=images)
    if k is not None:
        step = {"method": "snows", "k": k, "cg": products, "tolerance": 0.0, "images": images}
        chosen = recipe.load("magnitude", nm="2:4", samples=images, solve=step)
    seconds.clear()
    began = time.process_time()
    loop.prune(model, batches, chosen)
    return time.process_time() - began, seconds["masks and solves"]


def slope(sizes: list[int], times: list[float]) -> float:
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SWEEPS, nargs="+", default=list(SWEEPS))
    parser.add_argument("--write", type=Path, help="a page with markers to put the table into")
    args = parser.parse_args()
    torch.set_num_threads(1)
    timed(loop, "call", "masks and solves")
    lines = ["| what grows | sizes | CPU s | exponent | masks and solves, s | exponent |", "|---|---|---|---|---|---|"]
    for what in args.only:
        newton = what in ("K", "products")
        whole, solves = [], []
        for size in SWEEPS[what]:
            now = {**BASE, "depth": 2 if newton else BASE["depth"], what: size}
            a, b = run(now["images"], now["depth"], now["width"], now["K"] if newton else None, now["products"])
            whole.append(a)
            solves.append(b)
            print(f"{what} {size}: {a:.1f} s, {b:.1f} s of it masks and solves", flush=True)
        sizes = SWEEPS[what]
        cells = [f"{what} (K-step)" if newton else what, ", ".join(map(str, sizes)),
                 ", ".join(f"{t:.1f}" for t in whole), f"{slope(sizes, whole):.2f}"]  # fmt: skip
        cells += ["", ""] if newton else [", ".join(f"{t:.2f}" for t in solves), f"{slope(sizes, solves):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if args.write:
        head, rest = args.write.read_text().split(BEGIN)
        args.write.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
