"""Rows of docs/accuracy.md for the CIFAR-10 ResNets, which are plain modules and come with no processor.

    python benchmarks/accuracy_cifar.py 20 --nm 1:4 --recipes magnitude sparsegpt snows

Checkpoints and images are looked for in ../shared/data.  Calibration and test images both went through JPEG.
`--set batchnorm=renew` re-estimates the norms on the calibration images afterwards.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from accuracy import accuracy, settings, table
from PIL import Image
from torch import Tensor

from hf_prune import recipe
from hf_prune.loop import prune

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"


def images(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, list[int]]:
    rows = pq.read_table(DATA / name).to_pylist()
    pixels, labels = [], []
    for row in rows:
        picture = next(v for v in row.values() if isinstance(v, dict))
        labels.append(int(next(v for v in row.values() if isinstance(v, int))))
        pixels.append(np.asarray(Image.open(io.BytesIO(picture["bytes"])).convert("RGB"), dtype=np.float32) / 255)
    x = (torch.from_numpy(np.stack(pixels)) - torch.tensor(mean)) / torch.tensor(std)
    return x.permute(0, 3, 1, 2).contiguous(), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("depth", type=int, choices=(20, 32))
    parser.add_argument("--nm", required=True)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--recipes", nargs="+", default=["magnitude", "sparsegpt", "snows"])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="an option of every recipe")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("loaders", DATA / "loaders.py")
    if spec is None or spec.loader is None or not (DATA / "loaders.py").exists():
        raise SystemExit(f"{DATA}: the checkpoints are not there.")
    loaders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaders)
    norm = loaders.NORM["cifar10_resnet"]
    train, _ = images("cifar10jpeg_train_5000.parquet", *norm)
    test, labels = images("cifar10jpeg_test.parquet", *norm)
    test, labels = test[-args.test :], labels[-args.test :]
    model = loaders.cifar10_resnet(args.depth)

    @torch.no_grad()
    def outputs(module: torch.nn.Module) -> Tensor:
        return torch.cat([module(x) for x in test.split(250)])

    dense, rows = outputs(model), []
    for name in args.recipes:
        runs = []
        for draw in range(args.draws):
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))[: args.samples]
            module = copy.deepcopy(model)
            chosen = recipe.load(name, nm=args.nm, samples=args.samples, seed=draw, **settings(args.set))
            began, wall = time.process_time(), time.perf_counter()
            prune(module, list(train[drawn].split(64)), chosen)
            seconds, wall = time.process_time() - began, time.perf_counter() - wall
            found = outputs(module)
            error = float((found - dense).square().sum() / dense.square().sum())
            runs.append({"draw": draw, "top1": accuracy(found, labels), "logit_error": error,
                         "cpu_seconds": seconds, "seconds": wall})  # fmt: skip
        rows.append({"recipe": ", --set ".join([name, *args.set]), "runs": runs})
    result = {"model": f"CIFAR-10 ResNet{args.depth}", "pattern": args.nm, "samples": args.samples,
              "images": len(labels), "half": "both", "dense": accuracy(dense, labels), "threads": 1,
              "torch": torch.__version__, "rows": rows}  # fmt: skip
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
