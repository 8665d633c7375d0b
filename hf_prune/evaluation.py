"""Dense and pruned model on the same images, in one pass: accuracy, agreement, error of the logits, calibration.

`evaluate` does it all. For several ranks: `measure` on each one's images, `merge` of what they gathered, `summarize`.
Shares are between 0 and 1; intervals hold 95 %.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import ImageSet, groups
from .intervals import bootstrap, mcnemar, wilson
from .labels import label_map, match

if TYPE_CHECKING:
    from .models import Loaded

__all__ = ["evaluate", "label_map", "mcnemar", "measure", "merge", "summarize", "wilson"]

TOP = 5
FEWEST = 5  # images of a class below which nothing is said about the class
CLASSES = 10  # listed of those that lost most


class PerImage(TypedDict):
    """What is kept of each image: plain lists, so that ranks can gather them. All lists have one entry per image."""

    position: list[int]  # in the global order; unique over all ranks
    label: list[int]  # class in the model's numbering, -1 where the image has none
    dense: list[list[int]]  # classes of the highest logits, best first; empty lists for a bare backbone
    pruned: list[list[int]]
    error: list[float]  # ||z - z_d||^2
    norm: list[float]  # ||z_d||^2
    cosine: list[float]  # between z and z_d
    sure_dense: list[float]  # the softmax of the best logit; empty lists for a bare backbone
    sure_pruned: list[float]
    crc: list[int]  # CRC-32 of the decoded pixels: tells whether two evaluations saw the same images
    timed: list[list[float]]  # [images, seconds of the dense model, seconds of the pruned one] of each batch
    skipped: int
    notes: list[str]


LISTS = ("position", "label", "dense", "pruned", "error", "norm", "cosine", "sure_dense", "sure_pruned", "crc")


def evaluate(
    dense: Loaded,
    pruned: Loaded | nn.Module,
    image_set: ImageSet,
    *,
    batch_size: int,
    progress: Callable[[int, int | None], None] | None = None,
    gather: Callable[[PerImage], Sequence[PerImage]] | None = None,
    done: PerImage | None = None,
    keep: Callable[[PerImage], None] | None = None,
) -> dict[str, Any]:
    """Measure both models on every image of `image_set`.

    progress: called with (images done, images expected or None). gather: hands back what all ranks measured, where
    `image_set` is one rank's share. done, keep: see `measure`. Returns the `evaluation` of hf_prune.json
    (docs/hf_prune.json.md); what needs logits or labels is None where there are none.
    Raises ValueError when labels cannot be matched or a model's outputs are not finite.
    """
    mine = measure(dense, pruned, image_set, batch_size=batch_size, progress=progress, done=done, keep=keep)
    parts = gather(mine) if gather is not None else [mine]
    found = summarize(merge(parts), has_logits=dense.has_logits, names=dense.labels)
    how = {"batch_size": batch_size, "device": str(dense.device)}
    return {**found, "dataset": image_set.dataset, "split": image_set.split, **how}


def nothing() -> PerImage:
    """The record of no image."""
    record: Any = {key: [] for key in (*LISTS, "timed", "notes")} | {"skipped": 0}
    return record


def measure(
    dense: Loaded,
    pruned: Loaded | nn.Module,
    image_set: ImageSet,
    *,
    batch_size: int,
    progress: Callable[[int, int | None], None] | None = None,
    done: PerImage | None = None,
    keep: Callable[[PerImage], None] | None = None,
) -> PerImage:
    """Run both models over the images of `image_set` (one rank's share); see `evaluate`.

    done: what an earlier, stopped call measured of the same share; these images are not run again. keep: is handed
    the record of every new batch, for such a later call.
    """
    module = pruned if isinstance(pruned, nn.Module) else pruned.module
    labelled = image_set.label_column is not None and dense.has_logits
    classes, note = match(image_set.label_names, dense.labels, dense.num_classes) if labelled else ([], None)
    parts = [done or nothing()]
    known = set(parts[0]["position"])
    count = len(known)
    was_training = [each for each in (dense.module, module) if each.training]
    for each in was_training:
        each.eval()
    try:
        with torch.inference_mode():
            for group in groups(_new(image_set, known), batch_size):
                part = _batch(dense, module, [image for _, image, _ in group])
                part["position"] = [position for position, _, _ in group]
                part["label"] = [_class(label, classes) if labelled else -1 for _, _, label in group]
                if keep is not None:
                    keep(part)
                parts.append(part)
                count += len(group)
                if progress is not None:
                    progress(count, image_set.expected)
    finally:
        for each in was_training:
            each.train()
    found = join(parts)
    found["skipped"] = image_set.skipped
    found["notes"] = ([note] if note else []) + image_set.notes
    return found


def _new(image_set: ImageSet, known: set[int]) -> Iterator[tuple[int, Any, int | None]]:
    """(position in the global order, image, label) of every image that was not measured yet."""
    for i, (image, label) in enumerate(image_set):
        position = image_set.rank + i * image_set.world_size
        if position not in known:
            yield position, image, label


def _batch(dense: Loaded, module: nn.Module, images: Sequence[Any]) -> PerImage:
    """What both models say to a few images; without positions and labels."""
    part = nothing()
    part["crc"] = [zlib.crc32(image.tobytes(), zlib.crc32(repr(image.size).encode())) for image in images]
    batch = dense.batch(dense.processor(images))
    times, outputs = [float(len(images))], []
    for each in (dense.module, module):
        began = _now(dense.device)
        outputs.append(dense.outputs(batch, each))
        times.append(_now(dense.device) - began)
    part["timed"] = [times]
    before, after = (each.double() for each in outputs)  # (n, classes)
    _refuse_not_finite(dense.source, before, after)
    part["error"] = (after - before).square().sum(1).tolist()
    part["norm"] = before.square().sum(1).tolist()
    part["cosine"] = torch.nn.functional.cosine_similarity(before, after, dim=1).tolist()
    part["dense"], part["pruned"] = _best(before, dense.has_logits), _best(after, dense.has_logits)
    if dense.has_logits:
        part["sure_dense"], part["sure_pruned"] = (each.softmax(1).amax(1).tolist() for each in (before, after))
    return part


def _now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def join(parts: Sequence[PerImage]) -> PerImage:
    """Records behind each other."""
    joined: Any = {key: [value for part in parts for value in part[key]] for key in (*LISTS, "timed")}  # type: ignore[literal-required]
    joined["skipped"] = sum(part["skipped"] for part in parts)
    joined["notes"] = list(dict.fromkeys(note for part in parts for note in part["notes"]))
    return joined


def merge(parts: Sequence[PerImage]) -> PerImage:
    """One record from those of all ranks, in the global order. Every image must be there once (AssertionError)."""
    merged: Any = join(parts)
    assert len(set(merged["position"])) == len(merged["position"]), "an image was measured by two ranks"
    order = np.argsort(merged["position"])
    for key in LISTS:
        if merged[key]:  # a bare backbone has no confidences
            merged[key] = [merged[key][i] for i in order]
    return merged


def summarize(
    found: PerImage, *, has_logits: bool = True, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """The figures of `evaluate` from the record of every image. seed: of the bootstrap. names: of the classes."""
    from . import metrics

    count = len(found["error"])
    if count == 0:
        raise ValueError("no image was measured.")
    error, norm = np.array(found["error"]), np.array(found["norm"])
    relative = metrics.compute(metrics.RelativeError, error, norm)
    interval = bootstrap(lambda draw: error[draw].sum(-1) / norm[draw].sum(-1), count, seed)
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
        "throughput": _throughput(found["timed"]),
        "images": {"sha256": hashlib.sha256(np.array(found["crc"], dtype="<u4").tobytes()).hexdigest()},
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
        label, answers = label[known], {"dense": dense[known], "pruned": pruned[known]}
        for side, best in answers.items():
            figures[side] = _accuracy(best, label)
            sure = np.array(found[f"sure_{side}"])[known]  # type: ignore[literal-required]
            figures[side]["ece"] = metrics.compute(metrics.CalibrationError, sure, best[:, 0] == label)
            # one bit per image, so that other prunings of the same model can be compared image by image
            figures["images"][side] = np.packbits(best[:, 0] == label).tobytes().hex()
        figures["difference"] = _difference(answers["dense"], answers["pruned"], label, seed)
        figures["classes"] = _worst(answers["dense"][:, 0] == label, answers["pruned"][:, 0] == label, label, names)
    if 0 < figures["labelled"] < count:
        figures["notes"].append(f"{count - figures['labelled']} of the {count} images have no label.")
    return figures


def _difference(dense: np.ndarray, pruned: np.ndarray, label: np.ndarray, seed: int) -> dict[str, Any]:
    """dense, pruned: (n, 5) classes, best first. Accuracies pruned - dense, by image."""
    found: dict[str, Any] = {}
    for k in (TOP, 1):
        was, now = ((best[:, :k] == label[:, None]).any(1) for best in (dense, pruned))
        change = paired(was, now, seed)
        found |= {f"top{k}": change["difference"], f"top{k}_interval": change["interval"]}
    return found | {"lost": change["lost"], "won": change["won"], "mcnemar_p": change["p"]}


def paired(was: np.ndarray, now: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """was, now: (n,) bool, whether two models are right on the same images. The share now - was with its interval by
    paired bootstrap, the images lost and won, and McNemar's exact p."""
    change = now.astype(float) - was
    lost, won = int((was & ~now).sum()), int((now & ~was).sum())
    return {
        "difference": float(change.mean()),
        "interval": bootstrap(lambda draw: change[draw].mean(-1), len(change), seed),
        "lost": lost,
        "won": won,
        "p": mcnemar(lost, won),
    }


def _worst(was: np.ndarray, now: np.ndarray, label: np.ndarray, names: Sequence[str] | None) -> dict[str, Any]:
    """The classes that lost most images, among those with at least FEWEST.

    p: McNemar's, times the number of classes looked at (Bonferroni): the worst of many classes is bad by chance too.
    """
    numbers, counts = np.unique(label, return_counts=True)
    enough = numbers[counts >= FEWEST]
    rows: list[dict[str, Any]] = []
    for number in enough.tolist():
        here = label == number
        lost, won = int((was & ~now & here).sum()), int((now & ~was & here).sum())
        rows.append(
            {
                "name": names[number] if names and number < len(names) else str(number),
                "images": int(here.sum()),
                "dense": int((was & here).sum()),
                "pruned": int((now & here).sum()),
                "p": min(1.0, mcnemar(lost, won) * len(enough)),
            }
        )
    rows.sort(key=lambda row: ((row["pruned"] - row["dense"]) / row["images"], row["p"]))
    return {
        "fewest": FEWEST,
        "judged": len(enough),
        "seen": len(numbers),
        "worst": [row for row in rows[:CLASSES] if row["pruned"] < row["dense"]],
    }


def _throughput(timed: Sequence[Sequence[float]]) -> dict[str, float] | None:
    """Images per second of one process, by the forward alone; None below five batches, the first of which warms up."""
    table = np.array(timed[1:], dtype=float).reshape(-1, 3)
    if len(table) < 4 or not table[:, 1:].sum(0).all():
        return None
    images, dense, pruned = table.sum(0)
    return {"dense": float(images / dense), "pruned": float(images / pruned)}


def _accuracy(best: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """best (n, 5) classes, label (n,) -> top-1 and top-5 with intervals."""
    from . import metrics

    found: dict[str, Any] = {}
    for k in (1, TOP):
        hits = int((best[:, :k] == label[:, None]).any(1).sum())
        found[f"top{k}"] = metrics.compute(metrics.TopK, best, label, k=k)
        found[f"top{k}_interval"] = wilson(hits, len(label))
    return found


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
