"""`hf-prune demo`: prune the embedded model on real images, offline, in less than a minute.

The model (data/demo, trained by data/demo/train.py) is a small ViT on scikit-learn's handwritten digits. It goes
through the same functions as any other model; only the images do not come from a dataset library.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

    from .calibration import ImageSet
    from .models import Loaded

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CALIBRATION, TEST = 200, 450  # of 1797 images; the rest trained the model
PATTERN = "1:4"
RECIPES = ("magnitude", "sparsegpt", "snows")  # the last one is written to the output folder
FOLDER = "demo-1of4"

Labelled = list[tuple["Image", int]]


class Digits(NamedTuple):
    """The three disjoint parts of the data, each a list of (8x8 greyscale image, label 0..9)."""

    train: Labelled
    calibration: Labelled
    test: Labelled


def digits() -> Digits:
    """Scikit-learn's 1797 handwritten digits (bundled with it, no download), always split the same way.

    The split is drawn by image, so the same writers appear in all three parts.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)  # the scans count black sub-pixels, 0..16
    pairs = [(Image.fromarray(p), int(label)) for p, label in zip(pixels, data.target, strict=True)]
    # RandomState and not default_rng or torch: its stream is frozen, and another stream would test on trained images.
    order = np.random.RandomState(0).permutation(len(pairs)).tolist()
    shuffled = [pairs[i] for i in order]
    return Digits(
        train=shuffled[CALIBRATION + TEST :],
        calibration=shuffled[TEST : TEST + CALIBRATION],
        test=shuffled[:TEST],
    )


def image_set(images: Labelled, split: str, *, labelled: bool) -> ImageSet:
    """The images as calibration.images() would hand them over."""
    from .calibration import ImageSet

    rows = []
    for image, label in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue()}, "label": label})
    return ImageSet(
        rows,
        dataset="scikit-learn digits",
        split=split,
        image_column="image",
        label_column="label" if labelled else None,
        label_names=NAMES if labelled else None,
        available_splits=list(Digits._fields),
        samples=None,
        length=len(rows),
        streaming=False,
    )


def run(words: Sequence[str]) -> int:
    """Prune the embedded model with each recipe, print the table, write the last one's folder; the exit code.

    words: what was typed after `hf-prune demo`. Raises ValueError for an output folder that must not be written to.
    """
    args = _parser().parse_args(words)
    folder = args.output_dir or FOLDER
    began = time.perf_counter()

    from . import assets, calibration, checkpoint, recipe

    # The demo's own folder can be made again at any time; one that the user named is asked about.
    overwrite = args.overwrite or args.output_dir is None
    source = assets.path("data", "demo")
    checkpoint.refuse_existing(folder, overwrite=overwrite, source=source)
    checkpoint.refuse_unwritable(folder)

    import torch

    from . import card, evaluation, models, report
    from .loop import prune

    # Matrices of 64 columns: a second thread gains nothing, and on a busy machine costs ten times the time.
    torch.set_num_threads(1)
    data = digits()
    shown = image_set(data.calibration, "calibration", labelled=False)
    judged = image_set(data.test, "test", labelled=True)
    dense = models.load(str(source))
    print(
        f"A vision transformer of {sum(p.numel() for p in dense.module.parameters()):,} weights reads handwritten "
        f"digits. Three recipes\nprune it to {PATTERN} on {len(data.calibration)} images without labels; "
        f"{len(data.test)} other images judge them, none of which it was trained on.\n"
    )
    print(f"{'':<12}{'accuracy':>10}{'95 % interval':>18}{'logit error':>14}{'seconds':>10}")
    result: dict[str, Any] = {}
    for number, name in enumerate(RECIPES):
        chosen = dataclasses.replace(
            recipe.resolve(name, flags={"nm": PATTERN, "samples": len(data.calibration)}), dataset=shown.dataset
        )
        pruned = dataclasses.replace(dense, module=copy.deepcopy(dense.module))
        done = prune(pruned.module, calibration.batches(shown, pruned, chosen.recipe.batch_size), chosen.recipe)
        found = evaluation.evaluate(dense, pruned, judged, batch_size=150)
        if number == 0:
            _line("dense", found["dense"], None, None)
        _line(name, found["pruned"], found["logit_error"], done.resources["seconds"])
        result = {"loaded": pruned, "run": chosen, "done": done, "found": found}

    written = report.compose(
        result["loaded"],
        result["run"],
        result["done"],
        calibration={
            "samples": shown.yielded, "skipped": shown.skipped, "dataset": shown.dataset, "split": shown.split
        },
        evaluation=result["found"],
        command="hf-prune demo",
    )  # fmt: skip
    checkpoint.write(
        folder,
        result["loaded"],
        written,
        card.render(written, name=Path(folder).resolve().name),
        recipe=recipe.to_yaml(result["run"]),
        overwrite=overwrite,
    )
    print(f"\n{_closing(folder, result['loaded'])}\n\nDone in {time.perf_counter() - began:.0f} seconds.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-prune demo",
        description="Prune a small vision transformer that ships with hf-prune, on real images, offline.",
        allow_abbrev=False,
    )
    parser.add_argument("--output-dir", metavar="DIR", help=f"default: {FOLDER} in this folder")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if hf-prune wrote it")
    return parser


def _line(name: str, scores: dict[str, Any], error: float | None, seconds: float | None) -> None:
    low, high = scores["top1_interval"]
    print(
        f"{name:<12}{100 * scores['top1']:>8.1f} %{f'[{100 * low:.1f}, {100 * high:.1f}]':>18}"
        f"{'' if error is None else f'{error:.3f}':>14}{'' if seconds is None else f'{seconds:.1f}':>10}",
        flush=True,
    )


def _closing(folder: str, loaded: Loaded) -> str:
    return (
        f"{folder}/ holds the {RECIPES[-1]} model, hf_prune.json and a model card. It loads without hf_prune:\n"
        f'  transformers.AutoModelForImageClassification.from_pretrained("{folder}")\n'
        f"\n"
        f"Next, your own model:\n"
        f"  hf-prune google/vit-base-patch16-224 --nm 2:4 --dry-run      what would be pruned\n"
        f"  hf-prune google/vit-base-patch16-224 --nm 2:4                prune, measure, write\n"
        f"  hf-prune ./my-model --nm 2:4 --dataset ./my-images           without any network"
    )
