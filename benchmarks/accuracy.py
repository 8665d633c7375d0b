"""Accuracy after pruning, method beside method: same weights, same images, several calibration draws.

    python benchmarks/accuracy.py ../shared/data/vit-tiny-patch16-224-hf --nm 2:4 \
        --calibration ../shared/data/imagenet_sample1000_256.parquet \
        --validation ../shared/data/imagenet_val_800.parquet --samples 256 --draws 3 \
        --recipes magnitude wanda sparsegpt snows --output benchmarks/results/vit-tiny-2of4.json

Accuracies are over one half of the validation images (`--half`), so that options can be chosen on the other.  The
spread is the standard deviation over draws; one draw's images alone leave about +-4.6 points on 400 images.  CPU
seconds are of pruning alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from hf_prune import calibration, models, recipe
from hf_prune.labels import match
from hf_prune.loop import Recipe, plan, prune

HEAD = """# Accuracy, recipe beside recipe

Written by `python benchmarks/accuracy.py --write docs/accuracy.md` from `benchmarks/results/accuracy-*.json`; do not
edit.  Same weights, same validation images and, draw by draw, the same calibration images for every row; mean ±
standard deviation over the draws.  One draw's images alone leave about ± 4.7 points (95 %) on 400 images; the logit
error (squared distance of the logits to the dense model's, over their squared norm) is the sharper measure.  CPU
seconds of pruning, one thread, on a machine that other work shared: compare them within a factor of 1.5.  `--set`
names what differs from the recipe.  A few options of `snows` were chosen with the ViT's images in view.  Rows with
`mask.method=obs` are of the default before `exchange`, when images still weighed by their influence as positions do
(docs/methods.md), on another core, half as fast again.  CPU seconds
of `snows`, `snows-refined` and `snows-distilled` without `--set`, or with `batchnorm`, `refine.passes` or `distill`
alone, of `snows-paper`, of all rows with 64 images and of `sparsegpt` on ViT-Tiny at 2:4 with 256 are with the faster
of two libraries for float32 products (docs/speed.md), those of all other rows from before.  Draws of 1000 images are
the same images in another order, since the folder has no more.  Rows of `snows` at 70 % with `--set` are of 4 rounds
of exchanges, where 12 are the default now."""

PEER = "llm-compressor"  # a row of its own where that package is installed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration")
    parser.add_argument("--validation")
    parser.add_argument("--nm")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["magnitude", "wanda", "sparsegpt", "snows"])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="an option of every recipe")
    parser.add_argument("--half", choices=("first", "second", "both"), default="second")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, help="write this page from every result, and run nothing")
    args = parser.parse_args()
    if args.write:
        groups = collect(sorted((Path(__file__).parent / "results").glob("accuracy-*.json")))
        picture = args.write.with_name("frontier.svg")
        frontier(groups, picture)
        args.write.write_text(page(groups, picture.name))
        return
    if not (args.model and args.calibration and args.validation):
        parser.error("give a model, --calibration and --validation")
    torch.set_num_threads(args.threads)

    loaded = models.load(args.model)
    judged = calibration.images(args.validation, samples=None, seed=0)
    kept = list(judged)
    pixels = torch.cat([loaded.processor([image for image, _ in kept[i : i + 50]]) for i in range(0, len(kept), 50)])
    classes = match(judged.label_names, loaded.labels).classes
    labels = [classes[label] for _, label in kept]
    half = {"first": slice(0, len(kept) // 2), "second": slice(len(kept) // 2, None), "both": slice(None)}[args.half]
    pixels, labels = pixels[half], labels[half]
    dense = outputs(loaded, loaded.module, pixels)
    print(f"dense top-1 {100 * accuracy(dense, labels):.1f} % on {len(labels)} images", flush=True)
    pattern = ({"nm": args.nm} if args.nm else {"sparsity": args.sparsity}) | settings(args.set)
    rows = []
    for name in args.recipes:
        runs = []
        for draw in range(args.draws if name != "magnitude" else 1):
            images = calibration.images(args.calibration, samples=args.samples, seed=draw)
            chosen = recipe.load("sparsegpt" if name == PEER else name, samples=args.samples, seed=draw, **pattern)
            batches = list(calibration.batches(images, loaded, chosen.batch_size))
            run = measured(loaded.module, batches, chosen, name, lambda m: outputs(loaded, m, pixels), dense, labels)
            runs.append({"draw": draw, **run})
            print(
                f"  {name} draw {draw}: top-1 {100 * run['top1']:.1f} %, logit error {run['logit_error']:.3f}, "
                f"{run['cpu_seconds']:.0f} CPU s",
                flush=True,
            )
        rows.append({"recipe": ", --set ".join([name, *args.set]), "runs": runs})
    result = {
        "model": Path(args.model).name, "pattern": args.nm or args.sparsity, "samples": args.samples,
        "images": len(labels), "half": args.half, "dense": accuracy(dense, labels), "threads": args.threads,
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def measured(
    model: torch.nn.Module, batches: list, chosen: Recipe, name: str,
    outputs: Callable[[torch.nn.Module], torch.Tensor], dense: torch.Tensor, labels: list[int | None],
) -> dict:  # fmt: skip
    """Prune a copy of the model, with the peer where `name` is its row, and judge its outputs on validation images."""
    module = copy.deepcopy(model)
    began, wall = time.process_time(), time.perf_counter()
    (peer if name == PEER else prune)(module, batches, chosen)
    seconds, wall = time.process_time() - began, time.perf_counter() - wall
    found = outputs(module)
    error = float((found - dense).square().sum() / dense.square().sum())
    return {"top1": accuracy(found, labels), "logit_error": error, "cpu_seconds": seconds, "seconds": wall}


def settings(texts: list[str]) -> dict:
    """`--set` pairs as keys of a recipe."""
    found: dict = {}
    for text in texts:
        key, _, value = text.partition("=")
        role, _, option = key.partition(".")
        if option:
            found.setdefault(role, {})[option] = yaml.safe_load(value)
        else:
            found[role] = yaml.safe_load(value)
    return found


def peer(module: torch.nn.Module, batches: list, chosen: Recipe) -> None:
    """The SparseGPT of llm-compressor (Apache-2.0, on PyPI), on the same weights and images, block after block."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from loguru import logger

    logger.remove()
    pattern = chosen.pattern()
    planned = [row for row in plan(module, batches[0], chosen).rows if row.pattern]
    blocks = {type(module.get_submodule(row.unit)).__name__ for row in planned}
    wanted = [row.name.removesuffix(".weight") for row in planned]
    modifier = SparseGPTModifier(
        sparsity=1 - pattern.density, mask_structure=f"{pattern.n}:{pattern.m}", targets=wanted, dampening_frac=0.01
    )
    oneshot(
        model=module, recipe=modifier, dataset=torch.utils.data.DataLoader(batches, batch_size=None),
        pipeline="sequential", sequential_targets=sorted(blocks), num_calibration_samples=len(batches),
        output_dir=None,
    )  # fmt: skip


@torch.no_grad()
def outputs(loaded: models.Loaded, module: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([loaded.outputs(loaded.batch(p), module) for p in pixels.split(50)])


def accuracy(found: torch.Tensor, labels: list[int | None]) -> float:
    return sum(int(p) == y for p, y in zip(found.argmax(1), labels, strict=True)) / len(labels)


def spread(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def collect(results: list[Path]) -> list[dict]:
    """One group for each model, pattern and number of calibration images, with the rows of every file."""
    groups: dict[tuple, dict] = {}
    for path in results:
        result = json.loads(path.read_text())
        key = (result["model"], str(result["pattern"]), result["samples"], result["half"])
        group = groups.setdefault(key, {**result, "rows": []})
        group["rows"] += result["rows"]
    for group in groups.values():
        group["rows"].sort(key=lambda row: statistics.fmean(r["logit_error"] for r in row["runs"]), reverse=True)
    return [groups[key] for key in sorted(groups)]


def page(groups: list[dict], picture: str) -> str:
    """docs/accuracy.md: a table for every group."""
    parts = [HEAD, f"Accuracy against time, ViT-Tiny at 2:4:\n\n![accuracy against CPU seconds]({picture})"]
    for group in groups:
        title = f"{group['model']}, {group['pattern']}, {group['samples']} images"
        parts.append(f"## {title}\n\n{table(group)}")
    return "\n\n".join(parts) + "\n"


def frontier(groups: list[dict], path: Path) -> None:
    """Top-1 accuracy against CPU seconds of pruning, ViT-Tiny at 2:4; variants of a recipe (`--set`) are left out."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "frontier"  # the same file for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    wanted = [g for g in groups if g["model"].startswith("vit-tiny") and g["pattern"] == "2:4" and g["samples"] >= 256]
    aside = {PEER: (-22, -14), "snows-refined": (0, -14)}  # of the first group: labels that others stand in the way of
    for group, colour in zip(wanted, ("tab:blue", "tab:orange"), strict=False):
        rows = [r for r in group["rows"] if "--set" not in r["recipe"]]
        label = f"{group['samples']} images"
        for row in rows:
            tops = [100 * r["top1"] for r in row["runs"]]
            x, y = statistics.fmean(r["cpu_seconds"] for r in row["runs"]), statistics.fmean(tops)
            spread_ = statistics.stdev(tops) if len(tops) > 1 else 0.0
            axes.errorbar(max(x, 0.5), y, yerr=spread_, fmt="o", color=colour, capsize=3, label=label)
            axes.annotate(row["recipe"], (max(x, 0.5), y), textcoords="offset points", ha="center", fontsize=8,
                          xytext=aside.get(row["recipe"], (0, 8)) if group is wanted[0] else (0, 8))  # fmt: skip
            label = None
    axes.axhline(100 * wanted[0]["dense"], color="grey", linestyle=":", label="dense")
    axes.set(xscale="log", xlabel="CPU seconds of pruning, one thread", ylabel="top-1 accuracy, %", ylim=(0, 90))
    axes.margins(x=0.15)
    axes.legend(loc="center left", frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(result: dict) -> str:
    lines = [
        f"{result['model']}, {result['pattern']}, {result['samples']} calibration images, "
        f"{result['images']} validation images,"
        f" dense {100 * result['dense']:.1f} %", "",
        "| recipe | top-1 % | logit error | CPU s | draws |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        runs = row["runs"]
        cells = (spread([r["top1"] for r in runs], 100), spread([r["logit_error"] for r in runs], 1, 3),
                 spread([r["cpu_seconds"] for r in runs], 1, 0), str(len(runs)))  # fmt: skip
        lines.append(f"| {row['recipe']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
