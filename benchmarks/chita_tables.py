"""The tables of docs/chita.md: the CHITA family on the networks of its paper, method beside method.

    python benchmarks/chita_tables.py mlpnet --seeds 5 --output benchmarks/results/mlpnet.json
    python benchmarks/chita_tables.py resnet20 --seeds 1 --output benchmarks/results/resnet20.json

Checkpoints and images are looked for in ../shared/data and are no part of the project.  Every cell is the mean over
seeds (a seed draws the calibration images) with its spread; seconds are CPU seconds of gradients and of optimisation.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import hf_prune

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
PUBLISHED = {
    "mlpnet": {"dense": 93.97, "columns": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98],
               "CHITA": [93.97, 93.94, 93.80, 93.59, 92.46, 88.09, 46.25],
               "CHITA++": [95.97, 95.93, 95.89, 95.80, 95.55, 94.70, 90.73]},
    "resnet20": {"dense": 91.36, "columns": [0.5, 0.6, 0.7, 0.8, 0.9],
                 "CHITA": [90.60, 89.22, 84.12, 57.90, 15.60], "CHITA++": [91.04, 90.78, 90.38, 88.72, 79.32]},
}  # fmt: skip
WHOLE = {"scope": "model", "prune_stem": True, "prune_head": True,
         "target": {"mix": 0.0, "residual": False, "bias": False}}  # fmt: skip


def images(file: str, mean: float, std: float) -> tuple[Tensor, Tensor]:
    table = parquet.read_table(DATA / file)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in table.column("image").to_pylist()])
    x = torch.tensor(pixels)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return (x.float() / 255 - mean) / std, torch.tensor(table.column("label").to_pylist())


def warp(x: Tensor, g: torch.Generator) -> Tensor:
    """Small random rotations, shifts, scalings: the calibration images are few, and the first-order term fits them."""

    def draw(size: float) -> Tensor:
        return (torch.rand(len(x), generator=g) * 2 - 1) * size

    turn, scale, shear = draw(5 * math.pi / 180), 1 + draw(0.05), draw(0.05)
    m = torch.zeros(len(x), 2, 3)
    m[:, 0, 0], m[:, 0, 1] = turn.cos() * scale, -turn.sin() * scale + shear
    m[:, 1, 0], m[:, 1, 1] = turn.sin() * scale, turn.cos() * scale
    m[:, 0, 2], m[:, 1, 2] = draw(1.4 / x.shape[-1]), draw(1.4 / x.shape[-1])
    low = x.min()
    return F.grid_sample(x - low, F.affine_grid(m, list(x.shape), align_corners=False), align_corners=False) + low


def crop(x: Tensor, g: torch.Generator) -> Tensor:
    """The flips and padded crops of CIFAR training."""
    x = torch.where((torch.rand(len(x), generator=g) < 0.5)[:, None, None, None], x.flip(-1), x)
    padded, size = F.pad(x, (4, 4, 4, 4), value=-1.0), x.shape[-1]
    at = torch.randint(0, 9, (len(x), 2), generator=g).tolist()
    return torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in zip(padded, at, strict=True)])


def mlpnet() -> dict[str, Any]:
    def fisher(rows: int, batch: int, **more: Any) -> dict[str, Any]:
        return {"rows": rows, "minibatch": batch, "labels": "true", **more}

    one = {"rows": 1000, "minibatch": 1, "labels": "true", "first_order": False}
    slow = {"first_stage": 0.5, "halvings": 8, "dwell": 0.3}
    return {
        "magnitude": {"mask": "magnitude", "solve": "none"},
        "OBD": {"mask": "obd", "solve": "none", "fisher": one},
        "WoodFisher": {"mask": {"method": "woodfisher", "ridge": 1e-3, "block": 500}, "solve": "none", "fisher": one},
        "M-FAC": {"mask": {"method": "mfac", "ridge": 1e-3}, "solve": "none", "fisher": one},
        "CBS": {"mask": {"method": "cbs", "ridge": 1e-3}, "solve": "none", "fisher": one},
        "CHITA": {"mask": {"method": "chita", "ridge": 1e-4, "support": "cost"}, "solve": "none", "fisher": one},
        "CHITA mask + least squares": {"mask": {"method": "chita", "ridge": 1e-4}, "solve": "least_squares",
                                       "fisher": one},
        "CHITA++ 15": {"mask": {"method": "chita", "ridge": 1e-3, "support": "cost", "rounds": 1}, "solve": "none",
                       "fisher": fisher(1000, 16), "stages": 15, "augment": warp},
        "CHITA++ 30": {"mask": {"method": "chita", "ridge": 1e-3}, "solve": "none",
                       "fisher": fisher(500, 16, **slow), "stages": 30, "augment": warp},
        "CHITA++ 60, costs": {"mask": {"method": "chita", "ridge": 1e-3, "support": "cost", "rounds": 1},
                              "solve": "none", "fisher": fisher(500, 16, **slow), "stages": 60, "augment": warp},
    }  # fmt: skip


def resnet20() -> dict[str, Any]:
    one = {"rows": 500, "minibatch": 1, "labels": "true", "first_order": False}
    renew = {"batchnorm": "renew"}
    slow = {"first_stage": 0.5, "halvings": 5, "dwell": 0.25}
    chita = {"method": "chita", "ridge": 1e-2, "block": 500}
    return {
        "magnitude": {"mask": "magnitude", "solve": "none"},
        "magnitude, BN": {"mask": "magnitude", "solve": "none", **renew},
        "CHITA": {"mask": {**chita, "ridge": 1e-4}, "solve": "none", "fisher": one},
        "CHITA, BN": {"mask": chita, "solve": "none", "fisher": one, **renew},
        "CHITA mask + least squares, BN": {"mask": chita, "solve": "least_squares", "fisher": one, **renew},
        "WoodFisher, BN": {"mask": {"method": "woodfisher", "ridge": 1e-2}, "solve": "none", **renew,
                           "fisher": one},
        "CHITA++ 16, BN": {"mask": {**chita, "ridge": 1e-3}, "solve": "none", "stages": 16, "augment": crop, **renew,
                           "fisher": {"rows": 250, "minibatch": 8, "labels": "true", **slow}},
    }  # fmt: skip


def network(name: str) -> tuple[Callable[[], nn.Module], tuple[Tensor, Tensor], tuple[Tensor, Tensor], dict[str, Any]]:
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} does not exist: the checkpoints and images of the tables are no part of the project.")
    sys.path.insert(0, str(DATA))
    import loaders

    if name == "mlpnet":
        norm = (0.1307, 0.3081)
        train, test = images("mnist_train_10000.parquet", *norm), images("mnist_test.parquet", *norm)
        return loaders.mnist_mlpnet, train, test, mlpnet()
    train, test = images("cifar10_lossless_train_4000.parquet", 0.5, 0.5), images("cifar10jpeg_test.parquet", 0.5, 0.5)
    return loaders.chita_resnet20, train, test, resnet20()


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).sum() for x, y in zip(test[0].split(500), test[1].split(500), strict=True)]
    return 100 * float(sum(right)) / len(test[1])


def batches(train: tuple[Tensor, Tensor], need: int, g: torch.Generator, augment: Any) -> list[tuple[Tensor, Tensor]]:
    rounds = -(-need // len(train[1]))
    which = torch.cat([torch.randperm(len(train[1]), generator=g) for _ in range(rounds)])[:need]
    x = train[0][which]
    x = augment(x, g) if augment else x
    return list(zip(x.split(250), train[1][which].split(250), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", choices=("mlpnet", "resnet20"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--sparsities", nargs="*", type=float)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    make, train, test, methods = network(args.network)
    published = PUBLISHED[args.network]
    columns = args.sparsities or published["columns"]
    dense = accuracy(make(), test)
    print(f"{args.network}: dense {dense:.2f} here, {published['dense']} published; {args.seeds} seeds", flush=True)
    result: dict[str, Any] = {"network": args.network, "dense": dense, "columns": columns, "rows": {}}
    for name in args.methods or methods:
        row = []
        for sparsity in columns:
            runs = []
            for seed in range(args.seeds):
                options = dict(methods[name])
                augment = options.pop("augment", None)
                rows = options.get("fisher", {}).get("rows", 1000)
                need = rows * options.get("fisher", {}).get("minibatch", 1)
                g = torch.Generator().manual_seed(seed)

                def draw(stage: int, need: int = need, g: Any = g, augment: Any = augment) -> list:
                    return batches(train, need, g, augment)

                model, began = make(), time.process_time()
                report = hf_prune.prune(model, draw, {"sparsity": sparsity, "seed": seed, **WHOLE, **options})
                seconds = time.process_time() - began
                said = " ".join(report.notes)
                gradients = sum(float(t) for t in re.findall(r"labels, ([\d.]+) s", said))
                solving = sum(float(t) for t in re.findall(r"solved in ([\d.]+) s", said))
                runs.append({"top1": accuracy(model, test), "cpu_seconds": seconds, "gradient_seconds": gradients,
                             "solve_seconds": solving,
                             "peak_host_bytes": report.resources["peak_host_bytes"]})  # fmt: skip
            row.append(runs)
            top = [r["top1"] for r in runs]
            spread = statistics.stdev(top) if len(top) > 1 else 0
            took = statistics.mean(r["cpu_seconds"] for r in runs)
            parts = f"wall: gradients {runs[0]['gradient_seconds']:.1f}, solves {runs[0]['solve_seconds']:.1f}"
            mean = statistics.mean(top)
            print(f"  {name} {sparsity:g}: {mean:.2f} +- {spread:.2f}, {took:.1f} CPU s ({parts})", flush=True)
        result["rows"][name] = row
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result, published))


def table(result: dict[str, Any], published: dict[str, Any]) -> str:
    head = "| method | " + " | ".join(f"{c:g}" for c in result["columns"]) + " | CPU s | peak MB |"
    lines = [head, "|" + "---|" * (len(result["columns"]) + 3)]
    for name in ("CHITA", "CHITA++"):
        at = dict(zip(published["columns"], published[name], strict=True))
        cells = [f"{at[c]:.2f}" if c in at else "" for c in result["columns"]]
        lines.append(f"| {name}, published (dense {published['dense']}) | " + " | ".join(cells) + " | | |")
    for name, row in result["rows"].items():
        cells = []
        for runs in row:
            top = [r["top1"] for r in runs]
            spread = f" ± {statistics.stdev(top):.2f}" if len(top) > 1 else ""
            cells.append(f"{statistics.mean(top):.2f}{spread}")
        every = [r for runs in row for r in runs]
        seconds = statistics.mean(r["cpu_seconds"] for r in every)
        peak = max(r["peak_host_bytes"] for r in every) / 2**20
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds:.1f} | {peak:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
