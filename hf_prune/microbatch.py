"""Fewer images at once when memory runs out: entries of a stream cut in two, and work that is tried again.

Along which dimension the images of an activation lie is found by running the model on one image and on two: it is the
one dimension that doubles, and its first half must hold what the single image gives.  What does not change is shared.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import ranks
from .collect import Pair
from .sites import cut, quiet
from .streams import Lazy, load
from .walk import Walk

Axis = tuple[int, int] | None  # (dimension, entries of it per image); None: the same for every image
T = TypeVar("T")
# what torch raises on a device, what it says of the host, and Python's own
HOST = "can't allocate memory"


def ran_out(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or HOST in str(error)


def release() -> None:
    gc.collect()  # a traceback may hold the activations of the forward that failed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def axes(way: Walk, i: int, batch: Any) -> tuple[list[Axis], list[list[Axis]]]:
    """Where images lie in unit i's arguments, and in the outputs of the units before it.  batch: two images."""
    one, two = cut(batch, 0, 1), cut(batch, 0, 2)
    with quiet(way.model), torch.no_grad():
        ins, outs = zip(way._record(one), way._record(two), strict=True)
    name = way.units[i].name
    before = [_axes(outs[0][j][1], outs[1][j][1], name) for j in range(i)] if way.mode == "splice" else []
    return _axes(ins[0][i][1], ins[1][i][1], name), before


def _axes(one: Any, two: Any, name: str) -> list[Axis]:
    found: list[Axis] = []
    for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True):
        if not torch.is_tensor(a) or a.shape == b.shape:
            found.append(None)
            continue
        grown = [d for d, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        d = grown[0]
        close = len(grown) == 1 and b.shape[d] == 2 * a.shape[d]
        if close and a.is_floating_point():
            step = (b.narrow(d, 0, a.shape[d]) - a).abs().max()
            close = float(step) <= 1e-2 * float(a.abs().max().clamp_min(1e-30))
        if not close:
            raise ValueError(f"{name}: its inputs cannot be cut into single images; give a smaller --batch-size.")
        found.append((d, a.shape[d]))
    return found


def _cut(tree: Any, axes_: list[Axis], first: int, last: int) -> Any:
    leaves, spec = tree_flatten(tree)
    made = []
    for leaf, axis in zip(leaves, axes_, strict=True):
        if axis is None:
            made.append(leaf)
        else:
            d, per = axis
            t = load(leaf)
            made.append(t.narrow(d, first * per, min(last * per, t.shape[d]) - first * per).clone())
    return tree_unflatten(made, spec)


def images_in(pair: Pair, where: tuple[list[Axis], list[list[Axis]]]) -> int:
    """How many images an entry holds."""
    entry = pair.pruned
    if "call" in entry:
        for leaf, axis in zip(tree_leaves(entry["call"]), where[0], strict=True):
            if axis is not None:
                return leaf.shape[axis[0]] // axis[1]
    return len(next(t for t in tree_leaves(entry["batch"]) if hasattr(t, "shape") and len(t.shape)))


def halve(way: Walk, i: int, pair: Pair, batch: Any) -> list[Pair]:
    """The pair's images in two pairs.  Raises ValueError where it holds one image, or cannot be cut."""
    where = axes(way, i, batch) if way.mode != "prefix" else ([], [])
    count = images_in(pair, where)
    if count < 2:
        raise ValueError(
            f"{way.units[i].name}: memory ran out on a single image; use another device, or more processes."
        )
    parts = []
    for first, last in ((0, count // 2), (count // 2, count)):

        def part(entry: dict[str, Any], first: int = first, last: int = last) -> dict[str, Any]:
            made = dict(entry)
            if "batch" in entry:
                made["batch"] = way.store.keep(_whole(entry["batch"], first, last))
            if "outputs" in entry:
                made["outputs"] = [
                    way.store.keep(_cut(o, a, first, last)) for o, a in zip(entry["outputs"], where[1], strict=True)
                ]
            if "call" in entry:
                made["call"] = way.store.keep(_cut(entry["call"], where[0], first, last))
            if "positions" in entry:
                made["positions"] = way.store.keep(load(entry["positions"])[first:last].clone())
            return made

        pruned = part(pair.pruned)
        dense = part(pair.dense) if pair.drifted else pruned
        weights = Lazy(way.store.keep({k: _rows(load(w), first, last, count) for k, w in pair.weights.items()}))
        parts.append(Pair(dense, pruned, weights))
    return parts


def _whole(batch: Any, first: int, last: int) -> Any:
    from torch.utils._pytree import tree_map

    return cut(tree_map(load, batch), first, last)


def _rows(weights: Tensor, first: int, last: int, count: int) -> Tensor:
    per = len(weights) // count
    return weights[first * per : last * per].clone()


def with_less(work: Callable[[], T], way: Walk, i: int, pairs: list[Pair], batch: Any, tell: Any) -> T:
    """`work`, which runs unit i on `pairs`; where memory runs out, every pair is cut in two, in place, and it starts
    again.  Says so through `tell`.  batch: two images, to find out how entries are cut; None: they are not."""
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e) or batch is None:
                raise
        release()
        pairs[:] = [half for pair in pairs for half in halve(way, i, pair, batch)]
        said(way, i, pairs[0], batch, tell)


def said(way: Walk, i: int, pair: Pair, batch: Any, tell: Any) -> None:
    where = axes(way, i, batch) if way.mode != "prefix" else ([], [])
    count = images_in(pair, where)
    text = f"memory ran out in {way.units[i].name}: going on with {count} image{'s' * (count != 1)} at once"
    tell({"event": "warn", "text": text})


def again(
    prune: Callable[..., list[dict]], block: Any, tensors: dict[str, Tensor], names: list[str], report: list[dict],
    done: Callable[[dict], None],
) -> list[dict]:  # fmt: skip
    """A whole block, from its dense weights again where memory runs out in the part that sums over ranks on its way."""
    before = len(report)

    def attempt() -> list[dict]:
        del report[before:]
        with torch.no_grad():
            for n in names:
                tensors[n].copy_(block.dense[n])
        return prune(tensors, done)

    if ranks.world_size() > 1:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            raise ValueError(f"{block.unit.name}: memory ran out; give a smaller --batch-size.") from e
    return with_less(attempt, block.way, block.index, block.pairs, block.batch, block.tell)


def sizes(way: Walk, i: int, pairs: list[Pair], batch: Any) -> list[int]:
    """Images in each pair."""
    where = axes(way, i, batch) if way.mode != "prefix" else ([], [])
    return [images_in(pair, where) for pair in pairs]


def like(way: Walk, i: int, pairs: list[Pair], wanted: list[int] | None, batch: Any) -> None:
    """Cut the pairs, in place, as a run was cut that memory ran out of: the same sums in the same order."""
    if wanted is None or len(wanted) == len(pairs):
        return
    waiting = list(reversed(pairs))
    made: list[Pair] = []
    while waiting:
        pair = waiting.pop()
        if len(made) < len(wanted) and sizes(way, i, [pair], batch)[0] > wanted[len(made)]:
            waiting += reversed(halve(way, i, pair, batch))
        else:
            made.append(pair)
    pairs[:] = made


def advance(
    way: Walk, i: int, pairs: list[Pair], step: Callable[[Pair], None], batch: Any, tell: Any
) -> list[Pair]:  # fmt: skip
    """`step` every pair from unit i to the next; one that does not fit is cut in two first."""
    waiting, done = list(reversed(pairs)), []
    while waiting:
        pair = waiting.pop()
        entries = pair.dense, pair.pruned
        try:
            step(pair)
        except (RuntimeError, MemoryError) as e:
            if not ran_out(e):
                raise
            pair.dense, pair.pruned = entries
            failed = True
        else:
            failed = False
        if failed:
            release()
            halves = halve(way, i, pair, batch)
            said(way, i, halves[0], batch, tell)
            waiting += reversed(halves)
        else:
            done.append(pair)
    return done
