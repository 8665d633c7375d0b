"""What reordering channels before an N:M mask gains, score beside score, on the real models of ../shared/data.

    python benchmarks/permutation.py vit-tiny-patch16-224-hf --recipes sparsegpt snows --samples 256 --draws 3
    python benchmarks/permutation.py mobilenet_v1_0.25_128-hf cifar10_resnet20 --recipes magnitude snows
    python benchmarks/permutation.py --write          docs/permutation.md from every result there is

Each run is one (model, pattern, recipe, score, samples, draw of the calibration images); it is added to
benchmarks/results/permutation.json when it ends, and is not repeated by a later call.  Top-1 and logit error (squared
distance of the logits to the dense model's, over their squared norm) are over the second half of the validation
images; a draw changes the calibration images alone.  Seconds are CPU seconds, the order's and pruning's.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import Tensor, nn

from hf_prune import calibration, models, permute, recipe
from hf_prune.labels import match
from hf_prune.loop import prune

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results" / "permutation.json"
PAGE = ROOT / "docs" / "permutation.md"
HEAD = """# Channel permutation

Written by `python benchmarks/permutation.py --write`; the runs are in
[benchmarks/results/permutation.json](../benchmarks/results/permutation.json).

The order of hidden units, of the channels of v and o inside a head, and of the channels between two convolutions is
arbitrary, but it decides which weights share a group of m. `--permute SCORE` reorders them before the mask is chosen,
so that as much as possible of the score is kept; the dense model computes what it did. Kept: the share of the score
that a mask keeps, before and after, over the weights that read the reordered channels. Logit error: squared distance
to the dense model's logits over their squared norm. Where there are several draws of the calibration images, mean ±
standard deviation. CPU seconds are of everything, on a machine that did other work too.
"""
CIFAR = {"cifar10_resnet20": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "chita_resnet20": ((0.5,) * 3, (0.5,) * 3)}
CIFAR["cifar10_resnet32"] = CIFAR["cifar10_resnet20"]
MLPNET = "mnist_mlpnet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--nm", default="2:4")
    parser.add_argument("--recipes", nargs="+", default=["sparsegpt", "snows"])
    parser.add_argument("--scores", nargs="+", default=list(permute.SCORES), choices=permute.SCORES)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--images", type=int, default=400, help="validation images at most")
    parser.add_argument("--write", action="store_true", help="write docs/permutation.md and stop")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(read()))
        return
    for name in args.models:
        module, draw_images, pixels, labels, outputs = load(name, args.images)
        dense = outputs(module, pixels)
        top1 = accuracy(dense, labels)
        print(f"{name}: dense top-1 {100 * top1:.1f} % on {len(labels)} images", flush=True)
        for draw in range(args.draws):
            for of in args.recipes:
                for score in args.scores:
                    key = {"model": name, "nm": args.nm, "recipe": of, "score": score, "samples": args.samples,
                           "draw": draw, "images": len(labels)}  # fmt: skip
                    if any(key.items() <= run.items() for run in read()):
                        continue
                    chosen = recipe.load(of, nm=args.nm, samples=args.samples, seed=draw, permute=score)
                    work = copy.deepcopy(module)
                    batches = draw_images(args.samples, draw, chosen.batch_size)
                    ended = [time.process_time()]
                    began = ended[0]

                    def tell(event: dict[str, Any], ended: list[float] = ended) -> None:
                        ended.append(time.process_time())

                    report = prune(work, batches, chosen, progress=tell)
                    seconds = time.process_time() - began
                    found = outputs(work, pixels)
                    error = float((found - dense).square().sum() / dense.square().sum())
                    groups = (report.permutation or {"groups": []})["groups"]
                    run = key | {
                        "top1": accuracy(found, labels), "dense": top1, "logit_error": error, "cpu_seconds": seconds,
                        "groups": len(groups), "kept_before": mean(groups, "kept_before"),
                        "kept_after": mean(groups, "kept_after"),
                        "put_back": sum(g["reason"] is not None for g in groups),
                    }  # fmt: skip
                    RESULTS.parent.mkdir(parents=True, exist_ok=True)
                    RESULTS.write_text(json.dumps([*read(), run], indent=1) + "\n")
                    print(f"  {of}, {score}, draw {draw}: top-1 {100 * run['top1']:.1f} %, logit error {error:.4f}, "
                          f"{len(groups)} sets of channels, {seconds:.0f} CPU s", flush=True)  # fmt: skip


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def mean(groups: list[dict[str, Any]], key: str) -> float | None:
    return statistics.fmean(g[key] for g in groups) if groups else None


def accuracy(found: Tensor, labels: list[Any]) -> float:
    return sum(int(p) == y for p, y in zip(found.argmax(1), labels, strict=True)) / len(labels)


Draw = Callable[[int, int, int], list[Any]]
Outputs = Callable[[nn.Module, Tensor], Tensor]


def load(name: str, most: int) -> tuple[nn.Module, Draw, Tensor, list[Any], Outputs]:
    """(module, calibration batches by (samples, draw, batch size), pixels, labels, logits of a module)."""
    if name in CIFAR or name == MLPNET:
        return small(name, most)
    loaded = models.load(str(DATA / name))
    judged = calibration.images(str(DATA / "imagenet_val_800.parquet"), samples=None, seed=0)
    kept = list(judged)[400:][:most]
    pixels = torch.cat([loaded.processor([image for image, _ in kept[i : i + 50]]) for i in range(0, len(kept), 50)])
    classes = match(judged.label_names, loaded.labels).classes

    def draw(samples: int, seed: int, batch: int) -> list[Any]:
        images = calibration.images(str(DATA / "imagenet_sample1000_256.parquet"), samples=samples, seed=seed)
        return list(calibration.batches(images, loaded, batch))

    @torch.no_grad()
    def outputs(module: nn.Module, pixels: Tensor) -> Tensor:
        return torch.cat([loaded.outputs(loaded.batch(p), module) for p in pixels.split(50)])

    return loaded.module, draw, pixels, [classes[label] for _, label in kept], outputs


def small(name: str, most: int) -> tuple[nn.Module, Draw, Tensor, list[Any], Outputs]:
    """The CIFAR-10 networks, and MLPNet on MNIST."""
    sys.path.insert(0, str(DATA))
    import loaders

    if name == MLPNET:
        module, mode, size, first = loaders.mnist_mlpnet(), "L", 28, 0
        train, test = "mnist_train_10000.parquet", "mnist_test.parquet"
        centre, spread = torch.tensor(0.1307), torch.tensor(0.3081)
    else:
        module = loaders.chita_resnet20() if name.startswith("chita") else loaders.cifar10_resnet(int(name[-2:]))
        mode, size, first = "RGB", 32, 5000
        train, test = "cifar10_lossless_train_4000.parquet", "cifar10jpeg_test.parquet"
        centre, spread = (torch.tensor(v).view(3, 1, 1) for v in CIFAR[name])
    pool = parquet.read_metadata(DATA / train).num_rows

    def read_images(file: str, rows: Any) -> tuple[Tensor, list[int]]:
        table = parquet.read_table(DATA / file).take(rows)
        images = [Image.open(io.BytesIO(i["bytes"])).convert(mode) for i in table.column("image").to_pylist()]
        raw = [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(size, size, -1) for i in images]
        pixels = torch.stack(raw).permute(0, 3, 1, 2).float() / 255
        return (pixels - centre) / spread, table.column("label").to_pylist()

    def draw(samples: int, seed: int, batch: int) -> list[Any]:
        rows = torch.randperm(pool, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
        return list(read_images(train, rows)[0].split(batch))

    @torch.no_grad()
    def outputs(model: nn.Module, pixels: Tensor) -> Tensor:
        return torch.cat([model(p) for p in pixels.split(100)])

    pixels, labels = read_images(test, list(range(first, first + most)))
    return module, draw, pixels, labels, outputs


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    middle = f"{scale * statistics.fmean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {scale * statistics.stdev(values):.{digits}f}"


def short(runs: list[dict[str, Any]]) -> str:
    """One line for every setting that was run without an order and with one, `activation` where there is a choice."""
    lines = []
    for run in runs:
        if run["score"] != "none" or run["draw"]:
            continue
        same = ("model", "nm", "recipe", "samples", "images", "draw")
        others = {r["score"]: r for r in runs if r["score"] != "none" and all(r[k] == run[k] for k in same)}
        if not others:
            continue
        score = "activation" if "activation" in others else next(iter(others))
        cells = (run["model"], f"`{run['recipe']}`", run["nm"], score, f"{100 * run['dense']:.1f}",
                 *(f"{100 * r['top1']:.1f}" for r in (run, others[score])),
                 *(f"{r['logit_error']:.4f}" for r in (run, others[score])),
                 f"{100 * (others[score]['logit_error'] / run['logit_error'] - 1):+.0f} %")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |\n")
    falls = sum("| -" in line for line in lines)
    return (
        f"\n## In short\n\nEvery setting that was run both ways, draw 0. The logit error falls in {falls} of "
        f"{len(lines)}; top-1 rises or falls by what a few hundred images can tell.\n\n"
        "| model | recipe | keep | order by | dense top-1 | none | ordered | logit error, none | ordered | change |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n" + "".join(sorted(lines))
    )


def page(runs: list[dict[str, Any]]) -> str:
    parts = [HEAD, short(runs)]
    for model in dict.fromkeys(r["model"] for r in runs):
        mine = [r for r in runs if r["model"] == model]
        for setting in dict.fromkeys((r["nm"], r["samples"], r["images"]) for r in mine):
            nm, samples, images = setting
            some = [r for r in mine if (r["nm"], r["samples"], r["images"]) == setting]
            parts.append(
                f"\n## {model}, {nm}, {samples} calibration images\n\nTop-1 on {images} images, dense "
                f"{100 * some[0]['dense']:.1f} %.\n\n"
                "| recipe | order by | kept | top-1 % | logit error | CPU s | draws |\n"
                "|---|---|---|---|---|---|---|\n"
            )
            for of, score in dict.fromkeys((r["recipe"], r["score"]) for r in some):
                cell = [r for r in some if (r["recipe"], r["score"]) == (of, score)]
                kept = ""
                if cell[0]["kept_before"] is not None:
                    before, after = (statistics.fmean(r[k] for r in cell) for k in ("kept_before", "kept_after"))
                    kept = f"{before:.3f} → {after:.3f}"
                parts.append(
                    f"| `{of}` | {score} | {kept} | {spread([r['top1'] for r in cell], 100)} | "
                    f"{spread([r['logit_error'] for r in cell], 1, 3)} | "
                    f"{spread([r['cpu_seconds'] for r in cell], 1, 0)} | {len(cell)} |\n"
                )
    return "".join(parts)


if __name__ == "__main__":
    main()
