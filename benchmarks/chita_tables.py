"""The tables of docs/chita.md: the CHITA family on the networks of its paper and on ViT-Tiny, method beside method.

    python benchmarks/chita_tables.py mlpnet                         # every method, sparsity and seed not yet measured
    python benchmarks/chita_tables.py resnet20 --methods "CHITA++" --sparsities .9 --seeds 1
    python benchmarks/chita_tables.py resnet20 --methods "magnitude, BN" --sparsities dense  # norms renewed, no more
    python benchmarks/chita_tables.py gradients                      # per-image gradients against one backward each
    python benchmarks/chita_tables.py docs                           # write what was measured into docs/chita.md

Checkpoints and images are looked for in ../shared/data and are no part of the project.  Every run is a process of its
own, whose peak memory is its own, and is written to benchmarks/results/chita-NETWORK.json as soon as it ends; a run
that stands there already is not repeated.  A seed draws the calibration images.  Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs" / "chita.md"
WHOLE = {"scope": "model", "prune_stem": True, "prune_head": True}
PLAIN = {"target": {"mix": 0.0, "residual": False, "bias": False}}  # of rows that are no recipe's
ONE = {"minibatch": 1, "labels": "true", "first_order": False}  # a gradient per image, and the OBS assumption

PUBLISHED: dict[str, dict[str, Any]] = {
    "mlpnet": {"dense": 93.97, "columns": [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98], "rows": {
        "magnitude": {0.9: 90.30, 0.98: 32.25}, "WoodFisher": {0.9: 91.69, 0.98: 38.26},
        "CBS": {0.9: 93.14, 0.98: 55.45},
        "CHITA": [93.97, 93.94, 93.80, 93.59, 92.46, 88.09, 46.25],
        "CHITA++": [95.97, 95.93, 95.89, 95.80, 95.55, 94.70, 90.73]}},
    "resnet20": {"dense": 91.36, "columns": [0.5, 0.6, 0.7, 0.8, 0.9], "rows": {
        "magnitude": {0.7: 78.79, 0.9: 11.79}, "WoodFisher": {0.7: 81.05, 0.9: 11.49}, "CBS": {0.7: 81.84, 0.9: 13.68},
        "CHITA": [90.60, 89.22, 84.12, 57.90, 15.60], "CHITA++": [91.04, 90.78, 90.38, 88.72, 79.32]}},
    "mobilenet": {"dense": 71.95, "columns": [0.5, 0.6, 0.7, 0.8], "rows": {
        "magnitude": {0.7: 6.78, 0.8: 0.11}, "WoodFisher": {0.7: 29.36, 0.8: 0.24}, "CBS": {0.7: 55.11, 0.8: 16.38},
        "CHITA": [70.42, 67.30, 59.40, 29.78], "CHITA++": [70.99, 69.54, 66.42, 47.45]}},
    "vit-tiny": {"dense": 0.0, "columns": ["2:4", 0.5, 0.6, 0.7], "rows": {}},
}  # fmt: skip
TITLES = {
    "mlpnet": "MLPNet on MNIST (the paper's checkpoint; 10000 test images)",
    "resnet20": "ResNet20 on CIFAR-10 (the paper's checkpoint; 10000 test images stored as JPEG)",
    "mobilenet": "MobileNetV1 1.0/224 on ImageNet",
    "vit-tiny": "ViT-Tiny/16 on ImageNet",
}


# ------------------------------------------------------------------------------------------------------- the methods
def mlpnet() -> dict[str, Any]:
    one = {"rows": 1000, **ONE}
    # minibatches of 16 with the first-order term; higher first stages, later halvings and a long stay at the goal
    slow = {"rows": 300, "minibatch": 16, "labels": "true", "first_stage": 0.5, "halvings": 8, "dwell": 0.3,
            "average": 0.2}  # fmt: skip
    chita = {"method": "chita", "ridge": 1e-3}
    return {
        "magnitude": {"mask": "magnitude", "solve": "none"},
        "magnitude, LAMP": {"mask": "magnitude", "solve": "none", "allocation": "lamp"},
        "magnitude, ERK": {"mask": "magnitude", "solve": "none", "allocation": "erk"},
        "OBD": {"mask": "obd", "solve": "none", "fisher": one},
        "WoodFisher": {"mask": {"method": "woodfisher", "ridge": 1e-3, "block": 500}, "solve": "none", "fisher": one},
        "M-FAC": {"mask": {"method": "mfac", "ridge": 1e-3}, "solve": "none", "fisher": one},
        "CBS": {"mask": {"method": "cbs", "ridge": 1e-3}, "solve": "none", "fisher": one},
        "CHITA": {"mask": {**chita, "ridge": 1e-4}, "solve": "none", "fisher": {"rows": 2000, **ONE}},
        "CHITA, n = 5000": {"mask": {**chita, "ridge": 1e-4}, "solve": "none", "fisher": {"rows": 5000, **ONE}},
        "CHITA, removal costs": {"mask": {**chita, "ridge": 1e-4, "support": "cost", "rounds": 6}, "solve": "none",
                                 "fisher": one},
        "CHITA, removal costs, LAMP": {"mask": {**chita, "ridge": 1e-4, "support": "cost", "rounds": 2},
                                       "solve": "none", "allocation": "lamp", "fisher": {"rows": 2000, **ONE}},
        "CHITA mask + least squares": {"mask": chita, "solve": "least_squares", "fisher": one},
        "CHITA++ 60": {"mask": chita, "solve": "none", "fisher": slow, "stages": 60, "augment": warp},
        **{f"CHITA++ {stages}, removal costs": {"mask": {**chita, "support": "cost", "rounds": 1}, "solve": "none",
                                                "fisher": slow, "stages": stages, "augment": warp}
           for stages in (60, 120, 240)},
    }  # fmt: skip


def resnet20() -> dict[str, Any]:
    one = {"rows": 500, **ONE}
    # statistics as in training, over flips and crops: plain images leave the dense network 5 points worse
    renew = {"batchnorm": "renew", "samples": 2000, "augment": crop}
    chita = {"method": "chita", "ridge": 1e-2, "block": 500}
    # each row asks for its own loss: the network fits its training images, the same fall from all is not there to have
    slow = {"rows": 240, "minibatch": 2, "labels": "true", "first_order": "loss", "first_stage": 0.5, "halvings": 5,
            "dwell": 0.5, "average": 0.15, "dtype": "bfloat16"}  # fmt: skip
    # towards the dense network's answers: they have something to say where the labels are fitted already
    distil = {"mask": {"method": "chita", "ridge": 1.0}, "solve": "none", **renew, "samples": 1000,
              "fisher": {"rows": 480, "labels": "dense", "first_stage": 0.5, "halvings": 5, "dwell": 0.7,
                         "average": 0.2, "dtype": "bfloat16"}}  # fmt: skip
    return {
        "magnitude": {"mask": "magnitude", "solve": "none"},
        "magnitude, BN": {"mask": "magnitude", "solve": "none", **renew},
        "magnitude, BN of plain images": {"mask": "magnitude", "solve": "none", **renew, "augment": None},
        "magnitude, matched BN of plain images": {"mask": "magnitude", "solve": "none", "batchnorm": "match",
                                                  "samples": 2000},
        "WoodFisher, BN": {"mask": {"method": "woodfisher", "ridge": 1e-2}, "solve": "none", **renew, "fisher": one},
        "CHITA": {"mask": {**chita, "ridge": 1e-4}, "solve": "none", "fisher": one},
        "CHITA, BN": {"mask": chita, "solve": "none", "fisher": one, **renew},
        "CHITA mask + least squares, BN": {"mask": chita, "solve": "least_squares", "fisher": one, **renew},
        "CHITA++ 40, BN": {"mask": {"method": "chita", "ridge": 1e-4}, "solve": "none", "stages": 40, **renew,
                           "samples": 480, "fisher": slow},
        "magnitude, BN, JPEG": {"mask": "magnitude", "solve": "none", **renew, "images": "other"},
        "CHITA, BN, JPEG": {"mask": chita, "solve": "none", "fisher": one, **renew, "images": "other"},
        **{f"CHITA++ {stages}, dense labels": {**distil, "stages": stages} for stages in (40, 80, 160)},
        **{f"CHITA++ {stages}, dense labels, both": {**distil, "stages": stages, "images": "both"}
           for stages in (40, 80, 160)},
    }  # fmt: skip


def mobilenet() -> dict[str, Any]:
    one = {"rows": 160, **ONE}
    # the checkpoint's norms are folded into its weights: their statistics are matched, not renewed, and one threshold
    # on |w| compares channels of any scale, so that the layers' budgets are LAMP's
    chita = {"method": "chita", "ridge": 1e-2, "block": 500}
    match = {"batchnorm": "match", "samples": 160}
    lamp = {"allocation": "lamp"}
    snows = {"recipe": "snows", **lamp, "images": "both"}
    distil = {"mask": {"method": "chita", "ridge": 20000.0}, "solve": "none", **match, "samples": 96, **lamp,
              "images": "both", "augment": frame,
              "fisher": {"rows": 96, "labels": "dense", "first_stage": 0.4, "halvings": 5, "dwell": 0.7,
                         "average": 0.2, "dtype": "bfloat16"}}  # fmt: skip
    return {
        "magnitude": {"mask": "magnitude", "solve": "none", "samples": 16},
        "magnitude, renewed BN": {"mask": "magnitude", "solve": "none", "samples": 160, "batchnorm": "renew"},
        "magnitude, BN": {"mask": "magnitude", "solve": "none", **match},
        "magnitude, LAMP, BN": {"mask": "magnitude", "solve": "none", **match, **lamp},
        "CHITA": {"mask": chita, "solve": "none", "fisher": one},
        "CHITA, LAMP": {"mask": chita, "solve": "none", "fisher": one, **lamp},
        "CHITA, LAMP, BN": {"mask": chita, "solve": "none", "fisher": one, **match, **lamp},
        "CHITA++ 6, LAMP, BN": {"mask": chita, "solve": "none", "stages": 6, **match, **lamp,
                                "fisher": {**one, "first_stage": 0.4}},
        "CHITA mask + least squares, LAMP, BN": {"mask": chita, "solve": "least_squares", "fisher": one, **match,
                                                 **lamp},
        **{f"CHITA++ {stages}, dense labels, LAMP, BN": {**distil, "stages": stages} for stages in (20, 40, 80)},
        "snows, LAMP": {**snows, "samples": 480},
        "snows, LAMP, n = 1000": {**snows, "samples": 1000},
        "snows, LAMP, n = 1000, metric 0": {**snows, "samples": 1000, "target": {"metric": 0.0}},
    }  # fmt: skip


def vit_tiny() -> dict[str, Any]:
    one = {"rows": 128, **ONE}
    free = {"rows": 128, "minibatch": 1, "labels": "projected"}
    wide = {"scope": "model", "samples": 128, "solve": "none"}
    layer = {"samples": 128}
    chita = {"method": "chita", "ridge": 1e-3}
    blocks = {**chita, "block": 500}
    costs = {**blocks, "support": "cost", "rounds": 1}
    return {
        "magnitude": {"recipe": "magnitude", **layer},
        "magnitude, one threshold": {"recipe": "magnitude", "scope": "model", **layer},
        "wanda": {"recipe": "wanda", **layer},
        "sparsegpt": {"recipe": "sparsegpt", **layer},
        "alps": {"recipe": "alps", **layer},
        "snows": {"recipe": "snows", **layer},
        "OBD": {"mask": "obd", "fisher": one, **wide},
        "WoodFisher": {"mask": {"method": "woodfisher", "ridge": 1e-3}, "fisher": one, **wide},
        "M-FAC": {"mask": {"method": "mfac", "ridge": 1e-3}, "fisher": one, **wide},
        "CBS": {"mask": {"method": "cbs", "ridge": 1e-3}, "fisher": one, **wide},
        "CHITA": {"mask": chita, "fisher": one, **wide},
        "CHITA, removal costs": {"mask": {**chita, "ridge": 1e-5, "support": "cost"}, "fisher": one, **wide},
        "CHITA, blocks": {"mask": blocks, "fisher": free, **wide},
        "CHITA, blocks, removal costs": {"mask": costs, "fisher": free, **wide},
        "CHITA mask + least squares": {"mask": costs, "fisher": free, **wide, "solve": "least_squares"},
        "CHITA mask + K-step solve": {"mask": costs, "fisher": free, **wide, "solve": {"method": "snows", "k": 3}},
        "CHITA, n = 512": {"mask": chita, "fisher": {**one, "rows": 512}, **wide, "samples": 512},
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the images
class Network(NamedTuple):
    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    methods: dict[str, Any]
    about: str  # which images, for the docs
    whole: bool = True  # the paper's protocol: every weight of the model under one threshold, stem and classifier too
    other: tuple[Tensor, Tensor] | None = None  # other images to calibrate on

    def calibration(self, images: str) -> tuple[Tensor, Tensor]:
        """What a method's `images` asks for: train, other, or both."""
        sets = [s for s, names in ((self.train, ("train", "both")), (self.other, ("other", "both"))) if images in names]
        return torch.cat([s[0] for s in sets if s]), torch.cat([s[1] for s in sets if s])


def network(name: str) -> Network:
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} does not exist: the checkpoints and images of the tables are no part of the project.")
    sys.path.insert(0, str(DATA))
    import loaders

    if name == "mlpnet":
        norm = (0.1307, 0.3081)
        train, test = images("mnist_train_10000.parquet", *norm), images("mnist_test.parquet", *norm)
        return Network(loaders.mnist_mlpnet, train, test, mlpnet(), "10000 test images")
    if name == "resnet20":
        train = images("cifar10_lossless_train_4000.parquet", 0.5, 0.5)
        test = images("cifar10jpeg_test.parquet", 0.5, 0.5)
        jpeg = images("cifar10jpeg_train_5000.parquet", 0.5, 0.5)
        return Network(loaders.chita_resnet20, train, test, resnet20(), "10000 JPEG test images", other=jpeg)
    from hf_prune import models

    folder = DATA / ("mobilenet_v1_1.0_224-hf" if name == "mobilenet" else "vit-tiny-patch16-224-hf")
    loaded = models.load(str(folder))
    more = 488 if name == "mobilenet" else 0  # the rest is for rows with `images` alone, and counts as memory
    train = photographs(loaded, "imagenet_sample1000_256.parquet", 512 + more)
    test = photographs(loaded, "imagenet_val_800.parquet", 400)
    methods = mobilenet() if name == "mobilenet" else vit_tiny()
    (some, rest), (known, others) = (t.split([512, more]) for t in train)
    return Network(lambda: models.load(str(folder)).module, (some, known), test, methods, "400 validation images",
                   whole=name == "mobilenet", other=(rest, others))  # fmt: skip


def images(file: str, mean: float | Tensor, std: float | Tensor) -> tuple[Tensor, Tensor]:
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(DATA / file)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in table.column("image").to_pylist()])
    x = torch.tensor(pixels)
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)
    return (x.float() / 255 - mean) / std, torch.tensor(table.column("label").to_pylist())


def photographs(loaded: Any, file: str, count: int) -> tuple[Tensor, Tensor]:
    """`count` images as the model's processor makes them, and the model's class of each."""
    from hf_prune import calibration
    from hf_prune.labels import match

    found = calibration.images(str(DATA / file), samples=count, seed=0)
    kept = list(found)
    pixels = torch.cat([loaded.processor([i for i, _ in kept[k : k + 50]]) for k in range(0, len(kept), 50)])
    classes = match(found.label_names, loaded.labels, loaded.num_classes).classes
    return pixels, torch.tensor([classes[label] for _, label in kept])


def warp(x: Tensor, g: torch.Generator) -> Tensor:
    """Small random rotations, shifts, scalings: the calibration images are few, and the first-order term fits them."""

    def draw(size: float) -> Tensor:
        return (torch.rand(len(x), generator=g) * 2 - 1) * size

    turn, scale, shear = draw(10 * math.pi / 180), 1 + draw(0.1), draw(0.1)
    m = torch.zeros(len(x), 2, 3)
    m[:, 0, 0], m[:, 0, 1] = turn.cos() * scale, -turn.sin() * scale + shear
    m[:, 1, 0], m[:, 1, 1] = turn.sin() * scale, turn.cos() * scale
    m[:, 0, 2], m[:, 1, 2] = draw(2.8 / x.shape[-1]), draw(2.8 / x.shape[-1])
    low = x.min()
    return F.grid_sample(x - low, F.affine_grid(m, list(x.shape), align_corners=False), align_corners=False) + low


def crop(x: Tensor, g: torch.Generator) -> Tensor:
    """The flips and padded crops of CIFAR training."""
    x = torch.where((torch.rand(len(x), generator=g) < 0.5)[:, None, None, None], x.flip(-1), x)
    padded, size = F.pad(x, (4, 4, 4, 4), value=-1.0), x.shape[-1]
    at = torch.randint(0, 9, (len(x), 2), generator=g).tolist()
    return torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in zip(padded, at, strict=True)])


def frame(x: Tensor, g: torch.Generator) -> Tensor:
    """The flips and frames of ImageNet training: a square of a random size, from half the width up, somewhere."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=g)

    m = torch.zeros(len(x), 2, 3)
    scale = draw(0.5, 1.0)
    m[:, 0, 0] = scale * torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    m[:, 1, 1] = scale
    m[:, :, 2] = torch.stack([draw(-1, 1), draw(-1, 1)], 1) * (1 - scale)[:, None]
    return F.grid_sample(x, F.affine_grid(m, list(x.shape), align_corners=False), align_corners=False)


def batches(train: tuple[Tensor, Tensor], need: int, g: torch.Generator, augment: Any) -> list[tuple[Tensor, Tensor]]:
    rounds = -(-need // len(train[1]))
    which = torch.cat([torch.randperm(len(train[1]), generator=g) for _ in range(rounds)])[:need]
    x = train[0][which]
    x = augment(x, g) if augment else x
    size = 250 if x.shape[-1] < 100 else 32
    return list(zip(x.split(size), train[1][which].split(size), strict=True))


# --------------------------------------------------------------------------------------------------------- measuring
def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return getattr(out, "logits", out)


def accuracy(model: nn.Module, test: tuple[Tensor, Tensor]) -> float:
    size = 500 if test[0].shape[-1] < 100 else 8  # a few photographs at a time, channels last: half the time
    if size < 500:
        model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        right = [(logits(model, x).argmax(1) == y).sum() for x, y in zip(test[0].split(size), test[1].split(size),
                                                                         strict=True)]  # fmt: skip
    return 100 * float(sum(right)) / len(test[1])


def pattern(column: float | str) -> dict[str, Any]:
    return {"nm": column} if isinstance(column, str) else {"sparsity": column}


def one_run(net: Network, options: dict[str, Any], column: float | str, seed: int) -> dict[str, Any]:
    """Prune once and measure: what the result file holds of a run."""
    import hf_prune
    from hf_prune import batchnorm

    options = dict(options)
    train = net.calibration(options.pop("images", "train"))
    augment, recipe = options.pop("augment", None), options.pop("recipe", None)
    fisher = options.get("fisher", {})
    need = options.pop("samples", fisher.get("rows", 1000) * fisher.get("minibatch", 1))
    g = torch.Generator().manual_seed(seed)

    def draw(stage: int) -> list:
        return batches(train, need, g, augment)

    model = net.make()
    keys: dict[str, Any] = {"seed": seed, **pattern(column), **options}
    if net.whole:
        keys = {**WHOLE, **({} if recipe else PLAIN), **keys}
    if "nm" in keys:
        keys.pop("scope", None)
    if column == "dense":  # what the calibration images alone do: batch norms renewed, no weight touched
        batchnorm.renew(model, [x for x, _ in draw(options.get("stages", 1) - 1)])
        return {"top1": accuracy(model, net.test)}
    began = time.process_time()
    report = hf_prune.prune(model, draw, recipe, **keys) if recipe else hf_prune.prune(model, draw, keys)
    return {
        "cpu_seconds": time.process_time() - began,
        "gradient_seconds": sum(s.get("gradient_cpu_seconds", 0.0) for s in report.stages),
        "solve_seconds": sum(s.get("solve_cpu_seconds", 0.0) for s in report.stages),
        "peak_host_bytes": report.resources["peak_host_bytes"],
        "norm_ratio": max(r["weight_norm_ratio"] for r in report.layers),
        "top1": accuracy(model, net.test),
    }


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`work` in a forked process, whose peak memory is then that of this work and of the images before it."""
    mine, other = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: other.send(work()))
    process.start()
    other.close()
    try:
        return mine.recv()
    except EOFError:
        raise SystemExit("the run ended without a result; its error stands above.") from None
    finally:
        process.join()


def measure(name: str, methods: list[str] | None, columns: Sequence[float | str] | None, seeds: int) -> None:
    file = RESULTS / f"chita-{name}.json"
    net = network(name)
    RESULTS.mkdir(exist_ok=True)
    if not file.exists():
        result = {"network": name, "dense": accuracy(net.make(), net.test), "images": net.about, "runs": []}
        file.write_text(json.dumps(result, indent=1) + "\n")
    for seed in range(seeds):
        for method in methods or net.methods:
            for column in columns or PUBLISHED[name]["columns"]:
                fixed = method.startswith("magnitude") and "BN" not in method  # no image decides anything
                done = {(r["method"], r["column"], r["seed"]) for r in json.loads(file.read_text())["runs"]}
                if (method, column, seed) in done or (fixed and seed):
                    continue
                run = apart(lambda m=method, c=column, s=seed: one_run(net, net.methods[m], c, s))  # type: ignore[misc]
                result = json.loads(file.read_text())  # another process may have added to it meanwhile
                result["runs"].append({"method": method, "column": column, "seed": seed, **run})
                file.write_text(json.dumps(result, indent=1) + "\n")
                if column == "dense":
                    print(f"{name}, {method}, dense, batch norms renewed: {run['top1']:.2f} %", flush=True)
                    continue
                took = f"{run['cpu_seconds']:.1f} CPU s"
                parts = f"gradients {run['gradient_seconds']:.1f}, solves {run['solve_seconds']:.1f}"
                print(f"{name}, {method}, {column}, seed {seed}: {run['top1']:.2f} % in {took} ({parts})", flush=True)


def gradients() -> None:
    """CPU seconds of the gradients of 250 images on ResNet20, against one backward per image."""
    from hf_prune import gradients as per_image
    from hf_prune import sites

    net = network("resnet20")
    model, x, y = net.make(), net.train[0][:250], net.train[1][:250]
    found = sites.find(model, x[:2]).sites
    weights = [dict(model.named_parameters())[s.parameter] for s in found]
    axes = per_image.image_axis(model, found, x)

    def loop() -> Tensor:
        rows = []
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
        return torch.stack(rows)

    def ours(dtype: str) -> Tensor:
        rows = per_image.Rows(labels="true", dtype=dtype)
        return per_image.per_row(model, found, [x], [y], rows, seed=0, axes=axes)[0]

    def batch() -> None:
        torch.autograd.grad(F.cross_entropy(model(x), y), weights)

    def best(work: Callable[[], Any]) -> float:
        taken = []
        for _ in range(4):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
        return min(taken)

    exact, low = ours("float32"), ours("bfloat16")
    rows = {"one backward per image": best(loop), "float32": best(lambda: ours("float32")),
            "bfloat16": best(lambda: ours("bfloat16")), "one backward of the whole batch": best(batch)}  # fmt: skip
    said = {"images": len(x), "seconds": rows, "bfloat16_error": float((low - exact).norm() / exact.norm())}
    (RESULTS / "chita-gradients.json").write_text(json.dumps(said, indent=1) + "\n")
    print(gradient_table(said))


# ----------------------------------------------------------------------------------------------------------- writing
def table(result: dict[str, Any]) -> str:
    """Markdown: published rows, then ours; mean and standard deviation over seeds, and how many."""
    known = PUBLISHED[result["network"]]
    columns = known["columns"]
    heads = [c if isinstance(c, str) else f"{c:g}".lstrip("0") for c in columns]
    lines = ["| method | seeds | " + " | ".join(heads) + " | CPU s | gradients | solves | peak MB |",
             "|" + "---|" * (len(columns) + 6)]  # fmt: skip
    for name, cells in known["rows"].items():
        at = cells if isinstance(cells, dict) else dict(zip(columns, cells, strict=True))
        shown = [f"*{at[c]:.2f}*" if c in at else "" for c in columns]
        lines.append(f"| *{name}, published (dense {known['dense']})* | | " + " | ".join(shown) + " | | | | |")
    pruned = [r for r in result["runs"] if r["column"] != "dense"]
    for name in dict.fromkeys(r["method"] for r in pruned):
        runs = [r for r in pruned if r["method"] == name]
        cells = [cell([r["top1"] for r in runs if r["column"] == c]) for c in columns]
        counts = {len([r for r in runs if r["column"] == c]) for c in columns} - {0}
        seeds = f"{min(counts)}" + (f"-{max(counts)}" if len(counts) > 1 else "")
        each = [f"{statistics.mean(r[key] for r in runs):.1f}" for key in
                ("cpu_seconds", "gradient_seconds", "solve_seconds")]  # fmt: skip
        peak = max(r["peak_host_bytes"] for r in runs) / 2**20
        lines.append(f"| {name} | {seeds} | " + " | ".join([*cells, *each]) + f" | {peak:.0f} |")
    return "\n".join(lines)


def cell(top: list[float]) -> str:
    if not top:
        return ""
    return f"{statistics.mean(top):.2f}" + (f" ± {statistics.stdev(top):.2f}" if len(top) > 1 else "")


def gradient_table(said: dict[str, Any]) -> str:
    rows = said["seconds"]
    loop = rows["one backward per image"]
    lines = [f"| {said['images']} images of ResNet20 | CPU s | against one backward per image |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.2f} | {loop / seconds:.1f} times |" for name, seconds in rows.items()]
    error = f"Error of the bfloat16 gradients: {100 * said['bfloat16_error']:.1f} % of their norm."
    return "\n".join([*lines, "", error])


def sections() -> dict[str, str]:
    """Marker -> text, of every result that there is."""
    found = {}
    for name in PUBLISHED:
        file = RESULTS / f"chita-{name}.json"
        if file.exists():
            result = json.loads(file.read_text())
            head = f"{TITLES[name]}: dense {result['dense']:.2f} % on {result['images']}."
            renewed = [(r["method"], r["top1"]) for r in result["runs"] if r["column"] == "dense"]
            if renewed:
                each = "; ".join(f"{top1:.2f} % on the images of {method}" for method, top1 in renewed)
                head += f" Dense with its batch norms renewed: {each}."
            found[name] = f"{head}\n\n{table(result)}"
    file = RESULTS / "chita-gradients.json"
    if file.exists():
        found["gradients"] = gradient_table(json.loads(file.read_text()))
    return found


def docs() -> str:
    """docs/chita.md with every table between its markers made anew."""
    text = DOCS.read_text(encoding="utf-8")
    for name, said in sections().items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, b=begin, s=said, e=end: f"{b}\n{s}\n{e}",
                      text, flags=re.DOTALL)  # fmt: skip
    return text


def column(text: str) -> float | str:
    return text if ":" in text or text == "dense" else float(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=(*PUBLISHED, "gradients", "docs"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--sparsities", nargs="*", type=column)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "gradients":
        gradients()
    elif args.what == "docs":
        DOCS.write_text(docs(), encoding="utf-8")
    else:
        measure(args.what, args.methods, args.sparsities, args.seeds)
        print("\n" + sections()[args.what])


if __name__ == "__main__":
    main()
