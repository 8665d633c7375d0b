"""How much each position of a layer's output matters to the model's output.

Least squares over tokens or pixels treats all alike, but a classifier may read one token of two hundred.  With
z = f(y) the model's output and y one position of a layer's output, a change dy moves z by J dy, so that position weighs
||J||²_F in the reconstruction, beside the others of its image.  It is estimated without labels: for a random v with
unit covariance, the gradient of v·z with respect to y has expected squared norm ||J||²_F (Hutchinson's estimator).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ranks
from .linalg import matmul_precision, single, symmetric
from .linearised import linear
from .sites import Site, _tensors, cut, feed, marks, placed, quiet
from .streams import Store, load
from .walk import _hooks

TOGETHER = 8  # images whose gradients are counted in one product
STRONG = 4  # the second moment takes one in so many samples of an image: those that weigh most carry nearly all of it
# of products in the estimate, which is off by half of itself or so: what TF32 and bfloat16 round is nothing beside it
PRECISION = "medium"
Key = tuple[int, Any]  # (source, conv): sites that share their input share its weights
Strong = tuple[dict[str, slice], list[Any]]  # site name -> its columns; gradients (samples, out) as a store keeps them


@dataclass
class Metric:
    """What an error in each direction of the outputs of some layers weighs."""

    rows: dict[str, slice]  # site name -> its rows
    moment: Any  # (out of all of them, the same), as a store keeps it
    device: Any = "cpu"  # where it is used
    dtype: torch.dtype = torch.float32  # once it is whole

    def of(self, names: list[str]) -> Tensor | None:
        """The part that belongs to these layers, in their order; None where one is not in it."""
        if not all(n in self.rows for n in names):
            return None
        moment: Tensor = load(self.moment).to(self.device)
        index = torch.cat([torch.arange(self.rows[n].start, self.rows[n].stop) for n in names]).to(moment.device)
        return moment if torch.equal(index, torch.arange(len(moment)).to(index)) else moment[index][:, index]


def importance(
    model: nn.Module, sites: list[Site], batches: list[Any], share: float, metric: float = 0.0, probes: int = 2,
    seed: int = 0, micro: int = TOGETHER, store: Store | None = None,
) -> tuple[list[dict[Key, Tensor]], dict[Key, Metric]]:  # fmt: skip
    """(weights, metrics): what each sample and each direction of a layer's output weighs.

    weights: one per sample of each layer's input, for every batch; their mean over an image's samples is 1.  metrics:
    the second moment of the same gradients, which says in what directions an error at the output moves the model; the
    mean of its diagonal is 1.  Layers that read the same input share one, over all their outputs, so that separate
    query, key and value projections weigh as one fused layer does.
    share, metric: 0 weighs all alike, 1 by influence alone.  probes: random vectors per image.  micro: images that are
    differentiated together, which bounds the memory.  Layers whose output no module returns, or whose output does not
    have the images as its first dimension, get neither.  store: where the metrics of all layers wait.
    """
    store = store or Store()
    modules = dict(model.named_modules())
    sites = images_first(model, modules, sites, batches[0]) if len(batches) else sites
    moments: dict[Key, Metric] = {}
    found: list[dict[Key, Tensor]] = []
    strong: dict[Key, Strong] = {}
    waiting = 0
    for k, batch in enumerate(batches):
        pieces: dict[Key, list[Tensor]] = {}
        size = len(_tensors(batch)[0])
        for first in range(0, size, micro):
            part = cut(batch, first, first + micro)
            gather = strong if metric > 0 else None
            for key, value in _influence(model, modules, sites, part, probes, seed, gather, store).items():
                pieces.setdefault(key, []).append(value)
            waiting += min(micro, size - first)
            # where memory is short the moments of all layers lie on disk, and few images are differentiated at once:
            # then those of several parts are counted together
            if max(waiting, micro) >= TOGETHER or (k + 1 == len(batches) and first + micro >= size):
                for key in list(strong):
                    add(moments, key, *strong.pop(key), store)
                waiting = 0
        found.append({key: torch.cat(values) for key, values in pieces.items()})
    for weights in found:
        for value in weights.values():
            value.mul_(share).add_(1 - share)
    if ranks.world_size() > 1:  # the same ones in the same order, on a rank without images too
        own = [(k, (m.rows, m.dtype)) for k, m in moments.items()]
        known = {key: told for told_ in ranks.gather(own) for key, told in told_}
        for key, (places, dtype) in known.items():
            width = max(r.stop for r in places.values())
            if key not in moments:
                moments[key] = _nothing(places, torch.empty(0, width, dtype=dtype, device=_device(model)), store)
        moments = {key: moments[key] for key in known}
    for m in moments.values():
        moment: Tensor = load(m.moment).to(m.device)
        ranks.sum_([moment])
        scale = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
        moment.mul_(metric).div_(scale).diagonal().add_(1 - metric)
        m.moment = None  # where it waited is free again
        m.moment = store.keep(moment.to(m.dtype).to(store.home(m.device)))
    return found, moments


def images_first(model: nn.Module, modules: dict[str, nn.Module], sites: list[Site], batch: Any) -> list[Site]:
    """The sites that can be weighed image by image: their output is twice as long for two images as for one.

    Where tokens come before images, what a few images at a time give cannot be put behind each other.
    """
    lengths: list[dict[str, int]] = []
    for count in (1, 2):
        seen: dict[str, int] = {}

        def note(s: Site, seen: dict[str, int] = seen) -> Any:
            def hook(module: nn.Module, args: Any, out: Any) -> None:
                if torch.is_tensor(out):
                    seen[s.name] = len(out)

            return hook

        with quiet(model), torch.no_grad(), _hooks(*(modules[s.module].register_forward_hook(note(s)) for s in sites)):
            feed(model, placed(cut(batch, 0, count), _device(model)))
        lengths.append(seen)
    one, two = lengths
    alone = len(_tensors(batch)[0]) < 2
    return [s for s in sites if s.conv is not None or alone or two.get(s.name) == 2 * one.get(s.name, -1)]


def _influence(
    model: nn.Module, modules: dict[str, nn.Module], sites: list[Site], part: Any, probes: int, seed: int,
    strong: dict[Key, Strong] | None, store: Store,
) -> dict[Key, Tensor]:  # fmt: skip
    outputs: dict[int, Tensor] = {}
    images = len(_tensors(part)[0])

    def keep(k: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            s = sites[k]
            if torch.is_tensor(out) and out.shape[1 if s.conv is not None else -1] == s.shape[0] * s.shape[1]:
                if not out.requires_grad:
                    out.requires_grad_(True)
                outputs[k] = out
                return out.clone()  # the layer after may write into its input
            return None

        return hook

    eligible = [k for k, s in enumerate(sites) if s.rows is None and s.uses == 1]
    hooks = [modules[sites[k].module].register_forward_hook(keep(k)) for k in eligible]
    with quiet(model), torch.enable_grad(), matmul_precision(PRECISION):
        with _hooks(*hooks), linear():
            result = feed(model, placed(part, _device(model)))
        ends = [t for t in _tensors(result) if t.is_floating_point() and t.requires_grad]
        if not ends or not outputs:
            return {}
        influence: dict[int, Tensor] = {}
        for probe in range(probes):
            seeds = [_directions(t, part, seed + 7919 * probe) for t in ends]
            grads = torch.autograd.grad(
                ends, list(outputs.values()), seeds, retain_graph=probe < probes - 1, allow_unused=True
            )
            together: dict[Key, dict[str, tuple[Tensor, Tensor]]] = {}
            for k, g in zip(outputs, grads, strict=True):
                if g is None:
                    g = torch.zeros_like(outputs[k])
                rows = single((g.movedim(1, -1) if sites[k].conv is not None else g).flatten(0, -2))
                size = torch.linalg.vector_norm(rows, dim=-1).square()
                influence[k] = influence.get(k, 0) + size
                if sites[k].shape[0] == 1:
                    together.setdefault((sites[k].source, sites[k].conv), {})[sites[k].name] = rows, size
            if strong is not None:
                for key, parts in together.items():
                    places, kept = strong.setdefault(key, (_places(parts), []))
                    kept.append(store.keep(strongest(parts, images)))
    grouped: dict[Key, list[Tensor]] = {}
    for k, value in influence.items():
        grouped.setdefault((sites[k].source, sites[k].conv), []).append(value)
    return {key: within_images(torch.stack(values).mean(0), images) for key, values in grouped.items()}


def within_images(influence: Tensor, images: int) -> Tensor:
    """Influence (samples,), one image's samples behind the other's, over its mean in each image.

    All images weigh alike: one to which the model reacts strongly would else stand for several, of few there are.
    """
    each = influence.view(images if len(influence) % images == 0 else 1, -1)
    mean = each.mean(1, keepdim=True)
    return torch.where(mean > 0, each / mean, torch.ones_like(each)).flatten()


def _places(parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, slice]:
    ends = list(itertools.accumulate((rows.shape[1] for rows, _ in parts.values()), initial=0))
    return {name: slice(a, b) for name, a, b in zip(parts, ends, ends[1:], strict=False)}


def strongest(parts: dict[str, tuple[Tensor, Tensor]], images: int) -> Tensor:
    """The gradients (samples, out) at the outputs of the layers of one input that count in their second moment.

    parts: of each layer, the gradients of all samples, and their squared norms (samples,).
    """
    chosen: Any = slice(None)
    size = torch.stack([size for _, size in parts.values()]).sum(0)
    if len(size) % images == 0 and len(size) > STRONG * images:
        each = size.view(images, -1)
        first = torch.arange(0, len(size), each.shape[1], device=size.device)[:, None]
        chosen = (each.topk(each.shape[1] // STRONG, dim=1).indices + first).flatten()
    return torch.cat([rows[chosen] for rows, _ in parts.values()], dim=1)


def add(moments: dict[Key, Metric], key: Key, places: dict[str, slice], rows: list[Any], store: Store) -> None:
    """Count gradients into their second moment."""
    joined = torch.cat([load(r) for r in rows])
    if key not in moments:
        moments[key] = _nothing(places, joined, store)
    kept = moments[key].moment
    store.update(kept, load(kept).to(joined.device).add_(symmetric(joined, joined)))


def _nothing(rows: dict[str, slice], like: Tensor, store: Store) -> Metric:
    """Of gradients (samples, out), before the first.

    Products are in the gradients' type, their sum is wider: the order of the batches leaves no trace.
    """
    width = like.shape[1]
    zeros = torch.zeros(width, width, dtype=ranks.wide(like), device=store.home(like.device))
    return Metric(rows, store.keep(zeros), like.device, like.dtype)


def _directions(output: Tensor, part: Any, seed: int) -> Tensor:
    """Standard normal, a function of each image and the seed alone: neither batches nor ranks change it."""
    inputs = marks(part)
    if len(inputs) != len(output):
        return torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output)
    made = [torch.Generator().manual_seed(mark + seed) for mark in inputs]
    return torch.stack([torch.randn(output.shape[1:], generator=g) for g in made]).to(output)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
