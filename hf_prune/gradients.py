"""Per-sample gradients of the loss, for any layer kind, without a loop over samples.

One forward and one backward over a chunk of images give, at each product, its inputs x and the gradient dy of its
outputs.  The gradient of image i with respect to the weight is the sum over its positions of dy xᵀ, one batched matrix
product per layer; the gradients of all images together are never added up on the way.

Images run channels last and a few dozen at a time, because on a CPU the activations of a chunk should stay in its
caches; `dtype: bfloat16` halves the time again on processors with matrix units for it.
"""

from __future__ import annotations

import copy as copies
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import batchnorm, sites
from .sites import Conv, Site, Tape, Use, feed, parameters, quiet

LABELS = ("auto", "true", "sampled", "projected", "dense")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = 2**20  # entries of unfolded input that one batched product may read: about what a core's cache holds


@dataclass(frozen=True)
class Rows:
    """Which gradients make up the empirical Fisher matrix H = AᵀA / n, A being (rows, weights).

    rows: n, None for as many as the calibration images give.  minibatch: images whose mean gradient is one row.
    labels: `true` (the empirical Fisher; needs labelled images), `sampled` from the model's own prediction, `projected`
    (a random projection of the Jacobian of the outputs, whose mean is the Gauss-Newton matrix), `dense` (the same for
    the squared distance to the dense model's outputs on the same images, with what separates them as the first-order
    term); `auto` takes the true labels where the calibration images have them and samples otherwise.  first_order:
    keep the gradient term of the loss; None keeps it with `dense`, and where a row is the mean of several true-label
    gradients, since a single one is mostly noise.  `loss`: every row asks for its own loss back instead of the same
    fall 1 / minibatch from all, see staged.py.
    """

    rows: int | None = None
    minibatch: int = 1
    labels: str = "auto"
    first_order: bool | str | None = None
    memory: float = 0.125  # GiB that inputs and output gradients of one chunk may take
    spill: float = 4.0  # GiB of gradients beyond which they are kept in a temporary file instead of memory
    dtype: str = "float32"  # of the forward and backward; the gradients are stored and used in float32 either way

    def __post_init__(self) -> None:
        if self.labels not in LABELS:
            raise ValueError(f"fisher.labels {self.labels}: choose one of {', '.join(LABELS)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"fisher.dtype {self.dtype}: choose one of {', '.join(DTYPES)}.")
        if self.first_order not in (None, True, False, "loss"):
            raise ValueError(f"fisher.first_order {self.first_order}: choose one of true, false, loss, null.")
        if self.labels == "dense" and self.first_order is True:
            raise ValueError("fisher.first_order true asks the same of every row; with labels dense use loss or false.")
        if self.minibatch < 1 or (self.rows is not None and self.rows < 2):
            raise ValueError(f"fisher: 2 rows of 1 image are the least, found {self.rows} of {self.minibatch}.")


class Watch:
    """Sees every product of one forward and hands over (site number, x, dy) when its output gradient arrives."""

    def __init__(self, model: nn.Module, found: list[Site], take: Callable[[int, Tensor, Tensor], None], copy: bool):
        self.take, self.copy = take, copy
        self.place = {(s.parameter, s.rows): k for k, s in enumerate(found)}
        named = parameters(model)
        me = weakref.proxy(self)  # a cycle would keep the rows, gigabytes of them, until Python looks for cycles
        self.tape = Tape(
            {s.parameter: named[s.parameter] for s in found}, lambda use: me.use(use), lambda *done: me.other(*done)
        )
        self.waiting: list[tuple[int, Tensor, Tensor, int]] = []
        self.spoiled = False
        self.products = 0

    def use(self, use: Use) -> None:
        self.hook()
        k = self.place.get((use.parameter, use.rows))
        if k is not None:
            x = use.x.detach().clone() if self.copy else use.x.detach()
            self.waiting.append((k, x, use.y, x._version))

    def other(self, func: Any, args: tuple, out: Any) -> None:
        self.hook()

    def hook(self) -> None:
        """Ask for dy as soon as autograd has made the output part of its graph: at the next operation, before a later
        in-place one can change what the output means."""
        for k, x, y, version in self.waiting:
            if not y.requires_grad:
                raise AssertionError("a product behind the images has no gradient")
            self.products += 1
            y.register_hook(lambda dy, k=k, x=x, version=version: self.arrive(k, x, version, dy))
        self.waiting = []

    def arrive(self, k: int, x: Tensor, version: int, dy: Tensor) -> None:
        if x._version != version:
            self.spoiled = True  # something wrote into the input after the product read it: this pass is run again
        else:
            self.take(k, x, dy)


def image_axis(model: nn.Module, found: list[Site], batch: Any) -> list[int]:
    """How images lie among the rows of each site's inputs: 0 image by image, 1 position by position.

    Found by replacing the second of two images and looking which rows change.  Raises ValueError where the rows of a
    site do not belong to images at all, since no per-image gradient exists there.
    """
    two = sites.cut(batch, 0, 2)
    if len(_first(two)) < 2:
        raise ValueError("per-image gradients need calibration batches of at least 2 images.")
    generator = torch.Generator().manual_seed(0)

    def other(t: Any) -> Any:
        if torch.is_tensor(t) and t.is_floating_point() and len(t) == 2:
            t = t.clone()
            t[1] = t[1] + torch.randn(t[1].shape, generator=generator).to(t) * t.std().clamp_min(1e-3)
        return t

    seen: list[list[list[Tensor]]] = []
    named = parameters(model)
    place = {(s.parameter, s.rows): k for k, s in enumerate(found)}
    for inputs in (two, torch.utils._pytree.tree_map(other, two)):
        got: list[list[Tensor]] = [[] for _ in found]

        def note(use: Use, got: list[list[Tensor]] = got) -> None:
            k = place.get((use.parameter, use.rows))
            if k is not None:
                got[k].append(found[k].outputs(use.y.detach()).clone())

        with quiet(model), torch.no_grad(), Tape({s.parameter: named[s.parameter] for s in found}, note):
            feed(model, inputs)
        seen.append(got)
    axes = []
    for k, site in enumerate(found):
        (a, *_), (b, *_) = seen[0][k], seen[1][k]
        moved = (a != b).any(-1).any(0)
        half = len(moved) // 2
        if len(moved) % 2 == 0 and not moved[:half].any() and moved[half:].any():
            axes.append(0)
        elif len(moved) % 2 == 0 and not moved[0::2].any() and moved[1::2].any():
            axes.append(1)
        else:
            raise ValueError(
                f"{site.name}: its inputs belong to no single image, so there is no per-image gradient. Add it to skip."
            )
    return axes


def _first(batch: Any) -> Tensor:
    return sites._tensors(batch)[0]


def logits_of(out: Any) -> Tensor:
    """The tensor (images, ...) that a loss would read: logits, else the pooled or last representation."""
    if torch.is_tensor(out):
        return out
    for name in ("logits", "pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    if isinstance(out, (tuple, list)) and out and torch.is_tensor(out[0]):
        return out[0]
    raise ValueError(f"the model returns {type(out).__name__}; per-image gradients need logits or a representation.")


def has_logits(out: Any) -> bool:
    return getattr(out, "logits", None) is not None or (torch.is_tensor(out) and out.dim() == 2)


def cotangent(z: Tensor, kind: str, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Gradient of each image's loss with respect to its outputs z (images, ...), like z.

    `sampled` and `projected` have the same second moment over draws where z are logits, diag(p) - p pᵀ.  `dense` is a
    direction in which the distance to the dense outputs is measured, its second moment the identity over their number.
    """
    if kind in ("projected", "dense"):
        xi = torch.randn(z.shape, generator=generator).to(z)
        if kind == "dense" or z.dim() != 2:
            return xi / z[0].numel() ** 0.5
        root = z.softmax(-1).sqrt()
        return root * xi - root.square() * (root * xi).sum(-1, keepdim=True)
    p = z.softmax(-1)
    if kind == "sampled":
        labels = torch.multinomial(p.float().cpu(), 1, generator=generator).squeeze(1)
    assert labels is not None
    return p - F.one_hot(labels.to(p.device), p.shape[-1]).to(p)


def asked(z: Tensor, dz: Tensor, kind: str, known: Tensor) -> Tensor:
    """(images,) what a step should take off each image's loss: cross-entropy, or distance to the dense z along dz."""
    known = known.to(z.device)
    if kind == "dense":
        return (dz.float() * (z.float() - known.float())).flatten(1).sum(1)
    return F.cross_entropy(z.float(), known, reduction="none")


def resolve_labels(kind: str, labels: Tensor | None, out: Any) -> str:
    """What `labels: auto` means here.  Raises ValueError where the choice needs what is not there."""
    logits = has_logits(out)
    if kind == "auto":
        return "true" if labels is not None and logits else "sampled" if logits else "projected"
    if kind == "true" and labels is None:
        raise ValueError("fisher.labels true: the calibration images carry no label; sampled and projected need none.")
    if kind not in ("projected", "dense") and not logits:
        raise ValueError(f"fisher.labels {kind}: the model returns no logits. Use projected.")
    return kind


def outer(site: Site, x: Tensor, dy: Tensor, images: int, axis: int, rows: int) -> Tensor:
    """Sum of dy xᵀ over the positions of each row's images: (rows, numel of the site) in the canonical order.

    x, dy: raw input and output gradient of one product over `images` images, of which images / rows make up one row.
    """
    c = site.conv
    if c is not None and c.groups == 1 and len(c.kernel) == 2:
        return unfolded(c, x, dy, rows)
    if c is not None:
        # the weight gradient of one convolution whose groups are the rows: no unfolded copy of the input is made
        def grouped(t: Tensor) -> Tensor:
            t = t.reshape(rows, images // rows, *t.shape[1:]).transpose(0, 1)
            return t.reshape(images // rows, -1, *t.shape[3:])

        x, dy = grouped(x), grouped(dy)
        weight = x.new_empty(dy.shape[1], site.channels, *c.kernel)  # only its shape is read
        how = (c.stride, c.padding, c.dilation, False, [0] * len(c.kernel), rows * c.groups)
        _, each, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *how, [False, True, False])
        return each.view(rows, -1, site.channels, math.prod(c.kernel)).transpose(2, 3).reshape(rows, -1)
    cols, g = site.columns(x), site.outputs(dy)  # (groups, samples, in), (groups, samples, out)
    if axis == 1:
        cols = cols.view(cols.shape[0], -1, images, cols.shape[-1]).transpose(1, 2)
        g = g.view(g.shape[0], -1, images, g.shape[-1]).transpose(1, 2)
    cols = cols.reshape(cols.shape[0], rows, -1, cols.shape[-1])
    g = g.reshape(g.shape[0], rows, -1, g.shape[-1])
    return (g.mT @ cols).transpose(0, 1).reshape(rows, -1)


def unfolded(c: Conv, x: Tensor, dy: Tensor, rows: int) -> Tensor:
    """`outer` of an ordinary two-dimensional convolution: (rows, out * kernel positions * channels).

    With the channels last, what the kernel covers is a few stretches of memory, so unfolding is a cheap copy; it is
    made for as many rows at a time as fit a cache.
    """
    n, channels, out = len(x), x.shape[1], dy.shape[1]
    x = F.pad(x, (c.padding[1], c.padding[1], c.padding[0], c.padding[0])).permute(0, 2, 3, 1).contiguous()
    dy = dy.permute(0, 2, 3, 1).reshape(rows, -1, out)
    a, b, e, _ = x.stride()
    high, wide = (x.shape[k + 1] - c.dilation[k] * (c.kernel[k] - 1) - 1 for k in (0, 1))
    shape = (n, high // c.stride[0] + 1, wide // c.stride[1] + 1, *c.kernel, channels)
    view = x.as_strided(shape, (a, b * c.stride[0], e * c.stride[1], b * c.dilation[0], e * c.dilation[1], 1))
    width = math.prod(c.kernel) * channels
    found = x.new_empty(rows, out, width)
    each = n // rows
    step = max(1, COLUMNS // (dy.shape[1] * width))
    for r in range(0, rows, step):
        columns = view[r * each : (r + step) * each].reshape(min(step, rows - r), -1, width)
        torch.bmm(dy[r : r + step].mT, columns, out=found[r : r + step])
    return found.flatten(1)


def chunks(batches: list[Any], labels: list[Tensor | None], size: int) -> Iterator[tuple[Any, Tensor | None]]:
    """The same images in calls of `size`, whatever batches they came in; mappings are joined key by key."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    trees = [tree_flatten(b) for b in batches]
    spec = trees[0][1]
    counts = [len(next(t for t in leaves if torch.is_tensor(t))) for leaves, _ in trees]
    joined = []
    for parts in zip(*(leaves for leaves, _ in trees), strict=True):
        tensors = torch.is_tensor(parts[0]) and parts[0].dim()
        whole = tensors and all(len(p) == n for p, n in zip(parts, counts, strict=True))
        joined.append(torch.cat(parts) if whole else parts[0])
    total = sum(counts)
    known = torch.cat(labels) if all(t is not None for t in labels) else None  # type: ignore[arg-type]
    for start in range(0, total, size):
        part = [t[start : start + size] if torch.is_tensor(t) and t.dim() and len(t) == total else t for t in joined]
        yield tree_unflatten(part, spec), None if known is None else known[start : start + size]


def images_per_chunk(model: nn.Module, found: list[Site], batch: Any, budget: float) -> int:
    """How many images one forward may take so that activations and one layer's gradients fit `budget` GiB."""
    size = 0

    def note(use: Use) -> None:
        nonlocal size
        size += use.x.numel() * use.x.element_size() + 3 * use.y.numel() * use.y.element_size()

    named = parameters(model)
    with quiet(model), torch.no_grad(), Tape({s.parameter: named[s.parameter] for s in found}, note):
        feed(model, sites.cut(batch, 0, 1))
    widest = max(4 * s.numel for s in found)
    return max(1, int(budget * 2**30 / (size + 2 * widest)))


def per_row(
    model: nn.Module,
    found: list[Site],
    batches: list[Any],
    labels: list[Tensor | None],
    options: Rows,
    *,
    seed: int,
    axes: list[int] | None = None,
    losses: Tensor | None = None,
) -> tuple[Tensor, str]:
    """(A, kind of labels used): A (n, p) float32, row r the mean gradient of `options.minibatch` images, p the weights
    of `found` one after another, each flattened in its canonical order.

    labels: one tensor of class indices per batch, or None; for `options.labels` dense, the dense model's outputs.
    losses: (n,) to be filled with the mean over the images of each row of what they ask for, see `asked`, where labels
    are true or dense.  Raises ValueError where there are too few images.
    """
    images = sum(len(_first(b)) for b in batches)
    n = images // options.minibatch if options.rows is None else options.rows
    if n < 2 or n * options.minibatch > images:
        raise ValueError(
            f"fisher: {options.rows or 'any'} rows of {options.minibatch} images need at least "
            f"{(options.rows or 2) * options.minibatch} images, found {images}. Raise samples or lower fisher.rows."
        )
    generator = torch.Generator().manual_seed(seed)
    axes = image_axis(model, found, batches[0]) if axes is None else axes
    sizes = [s.numel for s in found]
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    device = next(model.parameters()).device
    a = storage(n, sum(sizes), options.spill, device)
    kind = ""
    dtype = None if options.dtype == "float32" else DTYPES[options.dtype]
    if dtype is not None:
        model = lowered(model, dtype)
    tree_map = torch.utils._pytree.tree_map
    step = images_per_chunk(model, found, tree_map(lambda t: _leaf(t, dtype), batches[0]), options.memory)
    step = max(1, step // options.minibatch) * options.minibatch
    row = 0
    for inputs, known in chunks(batches, labels, step):
        take = min(len(_first(inputs)), (n - row) * options.minibatch) // options.minibatch * options.minibatch
        if not take:
            break
        inputs, known = sites.cut(inputs, 0, take), None if known is None else known[:take]
        rows = take // options.minibatch
        part = a[row : row + rows]
        state = generator.get_state()
        for copy in (False, True):
            generator.set_state(state)
            touched: set[int] = set()

            def add(k: int, x: Tensor, dy: Tensor, part: Any = part, touched: Any = touched, take: int = take) -> None:
                one = outer(found[k], x, dy, take, axes[k], take // options.minibatch)
                where = part[:, starts[k] : starts[k] + sizes[k]]
                if k in touched:  # a weight that the forward uses more than once
                    where += one
                else:
                    where.copy_(one)
                    touched.add(k)

            watch = Watch(model, found, add, copy)
            with quiet(model):
                leaves = tree_map(lambda t: _leaf(t, dtype), inputs)
                with watch.tape, torch.enable_grad():
                    out = feed(model, tree_map(_copy, leaves))
                    z = logits_of(out)
                    watch.hook()
                kind = resolve_labels(options.labels, known, out)
                dz = cotangent(z.detach(), kind, known, generator)
                if losses is not None and kind in ("true", "dense"):
                    assert known is not None
                    each = asked(z.detach(), dz, kind, known)
                    losses[row : row + rows] = each.view(rows, -1).mean(1).to(losses)
                wanted = [t for t in sites._tensors(leaves) if t.requires_grad]
                torch.autograd.grad(z, wanted, (dz / options.minibatch).to(z))
            if not watch.spoiled:
                break
        if len(touched) < len(found):
            idle = next(s.name for k, s in enumerate(found) if k not in touched)
            raise ValueError(f"{idle}: the outputs do not depend on it, so it has no gradient. Add it to skip.")
        row += rows
    if not bool(torch.isfinite(a[:row].sum())):
        raise ValueError("a gradient is not finite; check the weights and the calibration images for NaN.")
    return a[:row], kind


def lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy that computes in `dtype`; batch norms keep their statistics in the precision they have."""
    low = copies.deepcopy(model).to(dtype)
    for one, other in zip(batchnorm.norms(low), batchnorm.norms(model), strict=True):
        one.to(other.running_mean.dtype)  # type: ignore[union-attr]
        one.load_state_dict(other.state_dict())
    return low


def _leaf(t: Any, dtype: torch.dtype | None = None) -> Any:
    """Images as a leaf of the graph, channels last; other inputs as they are."""
    if not torch.is_tensor(t) or not t.is_floating_point():
        return t
    t = t.detach() if dtype is None else t.detach().to(dtype)
    return (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t).requires_grad_()


def _copy(t: Any) -> Any:
    return t.clone() if torch.is_tensor(t) and t.requires_grad else t  # so that the model may write into its input


def storage(rows: int, columns: int, spill: float, device: torch.device) -> Tensor:
    """(rows, columns) float32, uninitialised; beyond `spill` GiB on the CPU in a temporary file that goes with it."""
    if device.type != "cpu" or rows * columns * 4 <= spill * 2**30:
        return torch.empty(rows, columns, device=device)
    import os
    import tempfile

    handle, path = tempfile.mkstemp(prefix="hf_prune-gradients-")
    os.close(handle)
    try:
        return torch.from_file(path, shared=True, size=rows * columns, dtype=torch.float32).view(rows, columns)
    finally:
        os.unlink(path)  # the mapping keeps the file alive until the tensor goes
