"""Dense and pruned model on the same images, in one pass: accuracy, agreement, relative error of the logits.

`evaluate` does it all. For several ranks: `measure` on each one's images, `merge` of what they gathered, `summarize`.
Shares are between 0 and 1; intervals hold 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import ImageSet, groups
from .labels import label_map, match

if TYPE_CHECKING:
    from .models import Loaded

__all__ = ["evaluate", "label_map", "measure", "merge", "summarize", "wilson"]

TOP = 5
DRAWS = 2000  # bootstrap resamples


class PerImage(TypedDict):
    """What is kept of each image: plain lists, so that ranks can gather them. All lists have one entry per image."""

    position: list[int]  # in the global order; unique over all ranks
    label: list[int]  # class in the model's numbering, -1 where the image has none
    dense: list[list[int]]  # classes of the highest logits, best first; empty lists for a bare backbone
    pruned: list[list[int]]
    error: list[float]  # ||z - z_d||^2
    norm: list[float]  # ||z_d||^2
    cosine: list[float]  # between z and z_d
    skipped: int
    notes: list[str]


def evaluate(
    dense: Loaded,
    pruned: Loaded | nn.Module,
    image_set: ImageSet,
    *,
    batch_size: int,
    progress: Callable[[int, int | None], None] | None = None,
    gather: Callable[[PerImage], Sequence[PerImage]] | None = None,
) -> dict[str, Any]:
    """Measure both models on every image of `image_set`.

    progress: called with (images done, images expected or None). gather: hands back what all ranks measured, where
    `image_set` is one rank's share. Returns {"dense": {top1, top1_interval, top5, top5_interval} or None, "pruned":
    ..., "agreement", "agreement_interval", "logit_error", "logit_error_interval", "difference", "samples",
    "labelled", "skipped", "notes", "dataset", "split"}; for a bare backbone "representation_error" and "cosine", and
    None for what needs logits. Raises ValueError when labels cannot be matched or a model's outputs are not finite.
    """
    mine = measure(dense, pruned, image_set, batch_size=batch_size, progress=progress)
    parts = gather(mine) if gather is not None else [mine]
    found = summarize(merge(parts), has_logits=dense.has_logits)
    return {**found, "dataset": image_set.dataset, "split": image_set.split}


def measure(
    dense: Loaded,
    pruned: Loaded | nn.Module,
    image_set: ImageSet,
    *,
    batch_size: int,
    progress: Callable[[int, int | None], None] | None = None,
) -> PerImage:
    """Run both models over the images of `image_set` (one rank's share); see `evaluate`."""
    module = pruned if isinstance(pruned, nn.Module) else pruned.module
    labelled = image_set.label_column is not None and dense.has_logits
    classes, note = match(image_set.label_names, dense.labels, dense.num_classes) if labelled else ([], None)
    found: PerImage = {
        "position": [],
        "label": [],
        "dense": [],
        "pruned": [],
        "error": [],
        "norm": [],
        "cosine": [],
        "skipped": 0,
        "notes": [note] if note else [],
    }
    was_training = [each for each in (dense.module, module) if each.training]
    for each in was_training:
        each.eval()
    try:
        with torch.inference_mode():
            for group in groups(image_set, batch_size):
                batch = dense.batch(dense.processor([image for image, _ in group]))
                before, after = dense.outputs(batch).double(), dense.outputs(batch, module).double()
                _refuse_not_finite(dense.source, before, after)
                error = (after - before).square().sum(1)
                found["error"] += error.tolist()
                found["norm"] += before.square().sum(1).tolist()
                found["cosine"] += torch.nn.functional.cosine_similarity(before, after, dim=1).tolist()
                found["dense"] += _best(before, dense.has_logits)
                found["pruned"] += _best(after, dense.has_logits)
                found["label"] += [_class(label, classes) if labelled else -1 for _, label in group]
                done = len(found["label"])
                found["position"] += [
                    image_set.rank + i * image_set.world_size for i in range(len(found["position"]), done)
                ]
                if progress is not None:
                    progress(done, image_set.expected)
    finally:
        for each in was_training:
            each.train()
    found["skipped"] = image_set.skipped
    found["notes"] += image_set.notes
    return found


def merge(parts: Sequence[PerImage]) -> PerImage:
    """One record from those of all ranks, in the global order. Every image must be there once (AssertionError)."""
    lists = ("position", "label", "dense", "pruned", "error", "norm", "cosine")
    merged: dict[str, Any] = {key: [value for part in parts for value in part[key]] for key in lists}  # type: ignore[literal-required]
    assert len(set(merged["position"])) == len(merged["position"]), "an image was measured by two ranks"
    order = np.argsort(merged["position"])
    merged = {key: [values[i] for i in order] for key, values in merged.items()}
    merged["skipped"] = sum(part["skipped"] for part in parts)
    merged["notes"] = list(dict.fromkeys(note for part in parts for note in part["notes"]))
    return merged  # type: ignore[return-value]


def summarize(found: PerImage, *, has_logits: bool = True, seed: int = 0) -> dict[str, Any]:
    """The figures of `evaluate` from the record of every image. seed: of the bootstrap."""
    from . import metrics

    count = len(found["error"])
    if count == 0:
        raise ValueError("no image was measured.")
    error, norm = np.array(found["error"]), np.array(found["norm"])
    relative = metrics.compute(metrics.RelativeError, error, norm)
    interval = _bootstrap(lambda draw: error[draw].sum(-1) / norm[draw].sum(-1), count, seed)
    figures: dict[str, Any] = {
        "dense": None,
        "pruned": None,
        "difference": None,
        "agreement": None,
        "agreement_interval": None,
        "logit_error": relative if has_logits else None,
        "logit_error_interval": interval if has_logits else None,
        "samples": count,
        "labelled": 0,
        "skipped": found["skipped"],
        "notes": list(found["notes"]),
    }
    if not has_logits:
        figures |= {"representation_error": relative, "representation_error_interval": interval}
        figures["cosine"] = float(np.mean(found["cosine"]))
        return figures
    dense, pruned, label = (np.array(found[key]) for key in ("dense", "pruned", "label"))  # type: ignore[literal-required]
    figures["agreement"] = metrics.compute(metrics.Agreement, pruned[:, 0], dense[:, 0])
    figures["agreement_interval"] = wilson(int((pruned[:, 0] == dense[:, 0]).sum()), count)
    known = label >= 0
    figures["labelled"] = int(known.sum())
    if known.any():
        figures["dense"] = _accuracy(dense[known], label[known])
        figures["pruned"] = _accuracy(pruned[known], label[known])
        was, now = dense[known, 0] == label[known], pruned[known, 0] == label[known]
        change = now.astype(float) - was
        figures["difference"] = {
            "top1": float(change.mean()),
            "top1_interval": _bootstrap(lambda draw: change[draw].mean(-1), len(change), seed),
            "mcnemar_p": mcnemar(int((was & ~now).sum()), int((now & ~was).sum())),
        }
    if 0 < figures["labelled"] < count:
        figures["notes"].append(f"{count - figures['labelled']} of the {count} images have no label.")
    return figures


def wilson(hits: int, count: int) -> list[float]:
    """95 % interval of a share (Wilson 1927): never outside 0 and 1, and not empty at 0 or 1."""
    z = 1.959963984540054
    share, square = hits / count, z * z / count
    middle = (share + square / 2) / (1 + square)
    reach = z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return [max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))]  # rounding must not exclude it


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: images only dense gets right (lost), images only pruned gets right (won)."""
    count, less = lost + won, min(lost, won)
    log = [math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in range(less + 1)]
    return min(1.0, 2 * sum(math.exp(each - count * math.log(2)) for each in log))


def _accuracy(best: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """best (n, 5) classes, label (n,) -> top-1 and top-5 with intervals."""
    from . import metrics

    found: dict[str, Any] = {}
    for k in (1, TOP):
        hits = int((best[:, :k] == label[:, None]).any(1).sum())
        found[f"top{k}"] = metrics.compute(metrics.TopK, best, label, k=k)
        found[f"top{k}_interval"] = wilson(hits, len(label))
    return found


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> list[float]:
    """95 % percentile interval over resampled images; statistic takes indices (draws, count)."""
    random = np.random.default_rng(seed)
    size = max(1, min(DRAWS, 2_000_000 // count))  # a bounded table of indices, whatever the number of images
    drawn = [statistic(random.integers(0, count, (min(size, DRAWS - start), count))) for start in range(0, DRAWS, size)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return [float(low), float(high)]


def _best(outputs: Tensor, has_logits: bool) -> list[list[int]]:
    """The classes of the highest logits, best first: (n, 5), or fewer where there are fewer classes."""
    if not has_logits:
        return [[] for _ in range(len(outputs))]
    return outputs.topk(min(TOP, outputs.shape[1])).indices.tolist()


def _class(label: int | None, classes: list[int]) -> int:
    if label is None:
        return -1
    if label >= len(classes):
        raise ValueError(f"the dataset holds class number {label}, but there are {len(classes)} classes to match.")
    return classes[label]


def _refuse_not_finite(source: str, before: Tensor, after: Tensor) -> None:
    for which, outputs in (("dense", before), ("pruned", after)):
        if not torch.isfinite(outputs).all():
            bad = int((~torch.isfinite(outputs)).any(1).sum())
            raise ValueError(f"{source}: the {which} model's outputs are not finite on {bad} of {len(outputs)} images.")
