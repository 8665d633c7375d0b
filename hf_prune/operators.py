"""What each operator does to the axes of its tensors.  A rule gives the labels of the results, None where it cannot.

Operators that torch tags as pointwise need no entry.  An operator without a rule freezes what it reads (channels.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .axes import Axis, Dimension, Label, freeze, fresh, join, outer_part
from .sites import aten

if TYPE_CHECKING:
    from .channels import Watch


def pointwise(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label] | None:
    if not torch.is_tensor(out):
        return None
    result: list[Dimension] = [()] * out.dim()
    for t in tree_leaves((args, kwargs)):
        if torch.is_tensor(t):
            for back, dimension in enumerate(reversed(watch.label(t)), 1):
                if dimension and result[-back]:
                    join(result[-back], dimension)
                elif dimension:
                    result[-back] = dimension
    return [tuple(result)]


def _constant(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label]:
    return [fresh(out.shape, None)]  # alike everywhere, so that any order is the same


def _view(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label] | None:
    """Axes in the order of the entries in memory are dealt out to the new dimensions."""
    if not out.numel():
        return None
    label = watch.label(args[0])
    left = tuple(axis for dimension in label for axis in dimension)
    result = []
    for size in out.shape:
        dealt = outer_part(left, size)
        if dealt is None:
            return None
        taken, left = dealt
        result.append(taken)
    return [tuple(result)]


def _expand(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = watch.label(args[0])
    label = ((),) * (out.dim() - len(label)) + label
    return [tuple(d or ((Axis(n),) if n > 1 else ()) for d, n in zip(label, out.shape, strict=True))]


def _transpose(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = list(watch.label(args[0]))
    if label:
        i, j = (args[1], args[2]) if len(args) > 2 else (0, len(label) - 1)
        label[i], label[j] = label[j], label[i]
    return [tuple(label)]


def _permute(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = watch.label(args[0])
    return [tuple(label[i] for i in args[1])]


def _squeeze(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    """Dimensions of size 1 come or go."""
    some = iter([d for d in watch.label(args[0]) if d])
    return [tuple(next(some) if n > 1 else () for n in out.shape)]


def _select(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = list(watch.label(args[0]))
    freeze(label.pop(args[1]), "one entry of it is read")
    return [tuple(label)]


def _unbind(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label]:
    label = list(watch.label(args[0]))
    freeze(label.pop(args[1] if len(args) > 1 else 0), "its entries are read apart")
    return [tuple(label)] * len(out)


def _split(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label]:
    """Equal parts of a dimension share the order inside; unequal ones freeze it."""
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    label = list(watch.label(args[0]))
    sizes = [t.shape[dim] for t in out]
    if len(set(sizes)) == 1 and sizes[0] > 1:
        whole = outer_part(label[dim], len(sizes))
        if whole is not None:
            freeze(whole[0], "its entries are read apart")
            label[dim] = whole[1]
            return [tuple(label)] * len(out)
    return [_cut(label, dim, size) for size in sizes]


def _cut(label: Sequence[Dimension], dim: int, size: int) -> Label:
    new = list(label)
    freeze(new[dim], "read in part")
    new[dim] = (Axis(size, "a part"),) if size > 1 else ()
    return tuple(new)


def _slice(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = watch.label(args[0])
    dim = (args[1] if len(args) > 1 else 0) % len(label)
    length = args[0].shape[dim]
    if out.shape[dim] == length:
        return [label]
    start, step = (args[2] if len(args) > 2 else 0) or 0, args[4] if len(args) > 4 else 1
    start, size = start + length if start < 0 else start, out.shape[dim]
    if step == 1 and size > 1 and length % size == 0 and start % size == 0:  # one of several equal parts
        whole = outer_part(label[dim], length // size)
        if whole is not None:
            freeze(whole[0], "its entries are read apart")
            return [(*label[:dim], whole[1], *label[dim + 1 :])]
    return [_cut(label, dim, size)]


def _cat(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    dim = args[1] if len(args) > 1 else 0
    parts = [watch.label(t) for t in args[0] if t.dim() == out.dim()]
    result: list[Dimension] = list(parts[0])
    for label in parts[1:]:
        for i, dimension in enumerate(label):
            if i != dim % out.dim():
                join(result[i], dimension)
    if len(parts) > 1:
        for label in parts:
            freeze(label[dim], "joined end to end with others")
        result[dim] = (Axis(out.shape[dim], "several in a row"),)
    return [tuple(result)]


def _stack(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    result = list(watch.label(args[0][0]))
    for t in args[0][1:]:
        for one, other in zip(result, watch.label(t), strict=True):
            join(one, other)
    result.insert(dim, (Axis(len(args[0]), "several in a row"),) if len(args[0]) > 1 else ())
    return [tuple(result)]


def _spatial(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label]:
    """Pooling and resizing: places are mixed, (images, channels) pass."""
    label = watch.label(args[0])
    outs = [t for t in tree_leaves(out) if torch.is_tensor(t)]
    keep = min(2, len(label) - 1)
    for dimension in label[keep:]:
        freeze(dimension, "places in an image")
    return [(*label[:keep], *fresh(t.shape[keep:], "places in an image")) for t in outs]


def _along(*which: int) -> Any:
    """Operators that move entries along the dimensions given by argument number `which` and leave the others alone."""

    def rule(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label] | None:
        label = watch.label(args[0])
        dims: set[int] = set()
        for i in which:
            given = args[i] if len(args) > i else ()
            dims |= {d % len(label) for d in ([given] if isinstance(given, int) else given)}
        if not dims:
            return None
        result = []
        for d, dimension in enumerate(label):
            if d in dims:
                freeze(dimension, f"read by {func.overloadpacket.__name__}")
            result.append(fresh([out.shape[d]], "moved")[0] if d in dims else dimension)
        return [tuple(result)]

    return rule


def _pad(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = list(watch.label(args[0]))
    for d in range(len(label)):
        if any(args[1][2 * (len(label) - 1 - d) :][:2]):
            label[d] = _cut(label, d, out.shape[d])[d]
    return [tuple(label)]


def _reduce(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label] | None:
    label = watch.label(args[0])
    place = 2 if func.overloadpacket is aten.linalg_vector_norm else 1
    given = args[place] if len(args) > place else kwargs.get("dim")
    dims = range(len(label)) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = {d % len(label) for d in dims}
    outs = [t for t in tree_leaves(out) if torch.is_tensor(t)]
    if any(t.dim() not in (len(label), len(label) - len(gone)) for t in outs):
        return None
    watch.mix([label[d] for d in gone], label)
    kept = [() if d in gone else dimension for d, dimension in enumerate(label)]
    short = [dimension for d, dimension in enumerate(label) if d not in gone]
    return [tuple(kept if t.dim() == len(label) else short) for t in outs]


def _softmax(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    label = watch.label(args[0])
    watch.mix([label[args[1]]], label)
    return [label]


def _layer_norm(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label]:
    label = watch.label(args[0])
    count = len(args[1])
    watch.mix(label[-count:], label)
    for t in args[2:4]:
        if torch.is_tensor(t):
            for one, other in zip(label[-count:], watch.label(t), strict=True):
                join(one, other)
    short = (*label[:-count], *((),) * count)
    outs = [t for t in tree_leaves(out) if torch.is_tensor(t)]
    return [label, *[short if t.dim() == len(label) else short[: t.dim()] for t in outs[1:]]]


def _group_norm(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label] | None:
    label, groups = watch.label(args[0]), args[6]
    parts = outer_part(label[1], groups) if groups > 1 else ((), label[1])
    if parts is None:
        return None
    watch.mix([parts[1], *label[2:]], label)
    for t in args[1:3]:
        if t is not None:
            join(label[1], watch.label(t)[0])
    return [label, *[fresh(t.shape, "statistics") for t in out[1:]]]


def _batch_norm(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Any) -> list[Label]:
    label = watch.label(args[0])
    watch.mix([label[0], *label[2:]], label)
    for t in args[1:5]:
        if torch.is_tensor(t):
            join(label[1], watch.label(t)[0])
    outs = [t for t in tree_leaves(out) if torch.is_tensor(t)]
    return [label, *[(label[1],) if t.shape == args[0].shape[1:2] else fresh(t.shape, None) for t in outs[1:]]]


def _product(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label]:
    """mm, bmm and what adds to them: the last dimension of one with the second last of the other."""
    *rest, a, b = [watch.label(t) for t in args if torch.is_tensor(t)]
    for one, other in zip(a[:-2], b[:-2], strict=True):
        join(one, other)
    join(a[-1], b[-2])
    result = (*a[:-1], b[-1])
    for label in rest:
        for one, other in zip(reversed(result), reversed(label), strict=False):
            if one and other:
                join(one, other)
    return [result]


def _convolution(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label] | None:
    x, w = watch.label(args[0]), watch.label(args[1])
    transposed, groups = args[6], args[8]
    if transposed:
        return None
    channels, made = x[1], w[0]
    if groups > 1:
        parts, rows = outer_part(channels, groups), outer_part(made, groups)
        if parts is None or rows is None:
            return None
        join(parts[0], rows[0])
        join(parts[1], w[1])
    else:
        join(channels, w[1])
    if args[2] is not None:
        join(made, watch.label(args[2])[0])
    for dimension in (*x[2:], *w[2:]):
        freeze(dimension, "places in an image")
    return [(x[0], made, *fresh(out.shape[2:], "places in an image"))]


def _index(watch: Watch, func: Any, args: tuple, kwargs: dict, out: Tensor) -> list[Label] | None:
    """x[indices] with one index: that dimension is read in an order of its own, the others pass."""
    given = [i for i, t in enumerate(args[1]) if t is not None]
    if len(given) != 1 or args[1][given[0]].dtype in (torch.bool, torch.uint8):
        return None
    label, i = watch.label(args[0]), given[0]
    freeze(label[i], "read by index")
    return [(*label[:i], *fresh(args[1][i].shape, "read by index"), *label[i + 1 :])]


RULES: dict[Any, Any] = {}
for _rule, _names in (
    # beside what torch itself tags as pointwise
    (pointwise, "_to_copy copy_ clone detach alias lift_fresh hardswish hardswish_ hardsigmoid hardsigmoid_ hardtanh "
                 "hardtanh_ fill_ zero_ gelu silu silu_ mish softplus leaky_relu leaky_relu_ _prelu_kernel"),
    (_constant, "zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
                "scalar_tensor"),
    (_view, "view _unsafe_view reshape _reshape_alias"),
    (_expand, "expand"),
    (_transpose, "t transpose"),
    (_permute, "permute"),
    (_squeeze, "squeeze unsqueeze"),
    (_select, "select"),
    (_unbind, "unbind"),
    (_split, "split split_with_sizes"),
    (_slice, "slice"),
    (_cat, "cat"),
    (_stack, "stack"),
    (_spatial, "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices "
               "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d "
               "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d "
               "replication_pad2d"),
    (_along(2), "roll"),
    (_along(1), "flip cumsum"),
    (_pad, "constant_pad_nd"),
    (_reduce, "mean sum amax amin var var_mean std std_mean logsumexp linalg_vector_norm"),
    (_softmax, "_softmax _log_softmax _safe_softmax"),
    (_layer_norm, "native_layer_norm"),
    (_group_norm, "native_group_norm"),
    (_batch_norm, "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm "
                  "miopen_batch_norm"),
    (_product, "mm bmm addmm baddbmm"),
    (_convolution, "convolution"),
    (_index, "index"),
):  # fmt: skip
    for _name in _names.split():
        if hasattr(aten, _name):
            RULES[getattr(aten, _name)] = _rule
