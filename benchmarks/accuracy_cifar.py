"""Rows of docs/accuracy.md for the CIFAR-10 ResNets, which are plain modules and come with no processor.

    python benchmarks/accuracy_cifar.py 20 --nm 1:4 --recipes magnitude sparsegpt snows

Checkpoints and images are looked for in ../shared/data.  Calibration and test images both went through JPEG.
`--set batchnorm=renew` re-estimates the norms on the calibration images afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from accuracy import accuracy, measured, settings, table
from chita_tables import DATA, images
from torch import Tensor

from hf_prune import recipe


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
    if not (DATA / "loaders.py").exists():
        raise SystemExit(f"{DATA}: the checkpoints are not there.")
    sys.path.insert(0, str(DATA))
    import loaders

    mean, std = (torch.tensor(values)[:, None, None] for values in loaders.NORM["cifar10_resnet"])
    train, _ = images("cifar10jpeg_train_5000.parquet", mean, std)
    test, classes = images("cifar10jpeg_test.parquet", mean, std)
    train, test = train.contiguous(), test.contiguous()
    test, labels = test[-args.test :], classes[-args.test :].tolist()
    model = loaders.cifar10_resnet(args.depth)

    @torch.no_grad()
    def outputs(module: torch.nn.Module) -> Tensor:
        return torch.cat([module(x) for x in test.split(250)])

    dense, rows = outputs(model), []
    for name in args.recipes:
        runs = []
        for draw in range(args.draws):
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(draw))[: args.samples]
            chosen = recipe.load(name, nm=args.nm, samples=args.samples, seed=draw, **settings(args.set))
            run = measured(model, list(train[drawn].split(64)), chosen, name, outputs, dense, labels)
            runs.append({"draw": draw, **run})
        rows.append({"recipe": ", --set ".join([name, *args.set]), "runs": runs})
    result = {"model": f"CIFAR-10 ResNet{args.depth}", "pattern": args.nm, "samples": args.samples,
              "images": len(labels), "half": "both", "dense": accuracy(dense, labels), "threads": 1,
              "torch": torch.__version__, "rows": rows}  # fmt: skip
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
