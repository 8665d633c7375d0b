"""The weights of a model that can be pruned: found by watching one forward, not by module type.

A *site* is a parameter (or some of its rows) that a matrix product or a convolution multiplies its input with.  Because
the products themselves are watched, `nn.MultiheadAttention`, fused qkv, transformers' `Conv1D` and a custom module that
calls `F.linear` are all found, and need no code of their own.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# position of (input, weight) among the arguments of each product
PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.convolution.default: (0, 1),
}
NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm")


@dataclass(frozen=True)
class Conv:
    """How a convolution slides; `kernel` has one entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass
class Site:
    """A prunable weight: `rows` of `parameter`, seen as (groups, out, in)."""

    parameter: str
    rows: tuple[int, int] | None  # None: the whole parameter
    shape: tuple[int, int, int]  # (groups, out / groups, kernel positions * in / groups)
    channels: int  # consecutive input channels at the end of `in`, what N:M groups lie along
    conv: Conv | None = None
    transposed: bool = False  # stored (in, out)
    bias: str | None = None
    norm: str | None = None  # running mean of the batch norm that reads the output directly
    uses: int = 1  # products per forward
    source: int = 0  # sites with the same number read the same input
    unit: int = -1  # which unit of the walk runs it
    junction: int | None = None  # which addition of the unit joins its output to the residual stream (walk.py)
    scale: Tensor | None = None  # (out,) per-channel factor between the output and that junction

    @property
    def name(self) -> str:
        return self.parameter if self.rows is None else f"{self.parameter}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def module(self) -> str:
        return self.parameter.rpartition(".")[0]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def read(self, parameter: Tensor) -> Tensor:
        """The canonical view (groups, out, in) of the stored parameter, float32 unless it is float64, a copy."""
        return self.canonical(parameter).clone()

    def canonical(self, parameter: Tensor) -> Tensor:
        """The same, without a copy where the layout allows."""
        w = parameter.detach()
        if w.dtype not in (torch.float32, torch.float64):
            w = w.float()
        if self.conv is not None:  # (out, in/groups, *kernel) -> (groups, out/groups, *kernel, in/groups)
            return w.movedim(1, -1).reshape(self.shape)
        w = w.reshape(w.shape[0], -1)
        w = w.mT if self.transposed else w
        return (w if self.rows is None else w[slice(*self.rows)]).reshape(self.shape)

    def write(self, parameter: Tensor, weight: Tensor) -> None:
        """Store a canonical (groups, out, in) tensor; zeros become +0.0."""
        self.place(parameter, torch.where(weight == 0, torch.zeros_like(weight), weight).to(parameter.dtype))

    def place(self, parameter: Tensor, weight: Tensor) -> None:
        """The same for a tensor that is no weight, as it is."""
        with torch.no_grad():
            if self.conv is not None:
                out = parameter.movedim(1, -1)
                out.copy_(weight.reshape(out.shape))
            else:
                flat = parameter.view(parameter.shape[0], -1)
                flat = flat.mT if self.transposed else flat
                (flat if self.rows is None else flat[slice(*self.rows)]).copy_(weight[0])

    def columns(self, x: Tensor) -> Tensor:
        """The rows that the weight multiplies: (groups, samples, in) from the raw input of the product."""
        if self.conv is None:
            return x.reshape(1, -1, x.shape[-1])
        c = self.conv
        spatial = len(c.kernel)
        if any(c.padding):
            x = F.pad(x, [p for pad in reversed(c.padding) for p in (pad, pad)])
        for i, (k, s, d) in enumerate(zip(c.kernel, c.stride, c.dilation, strict=True)):
            span = d * (k - 1) + 1
            x = x.unfold(2 + i, span, s)[..., ::d]  # appends one axis of length k
        n, channels = x.shape[:2]
        x = x.reshape(n, c.groups, channels // c.groups, *x.shape[2:])
        # (n, groups, c/g, *out, *kernel) -> (groups, n, *out, *kernel, c/g)
        order = [1, 0, *range(3, 3 + spatial), *range(3 + spatial, 3 + 2 * spatial), 2]
        return x.permute(order).reshape(c.groups, -1, self.shape[2])

    def outputs(self, y: Tensor) -> Tensor:
        """(groups, samples, out) from the raw output of the product."""
        if self.conv is None:
            return y.reshape(1, -1, y.shape[-1])
        n, channels = y.shape[:2]
        y = y.reshape(n, self.conv.groups, channels // self.conv.groups, *y.shape[2:])
        return y.permute(1, 0, *range(3, y.dim()), 2).reshape(self.conv.groups, -1, self.shape[1])


@dataclass
class Use:
    """One product seen by the tape.  x and y are raw, as the operator saw them."""

    parameter: str
    rows: tuple[int, int] | None
    transposed: bool
    conv: Conv | None
    bias: Tensor | None
    x: Tensor
    y: Tensor


class Stop(Exception):
    """Ends a forward once everything wanted was seen; always caught by the room that raised it."""


@dataclass
class Tape(TorchDispatchMode):
    """Calls `on_use` for each product with one of `parameters`, whoever calls it.  Use as a context manager."""

    parameters: dict[str, Tensor]
    on_use: Callable[[Use], None]
    on_other: Callable[[Any, tuple, Any], None] | None = None  # (operator, arguments, result) of everything else
    owners: dict[int, list[tuple[str, Tensor]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        for name, p in self.parameters.items():
            self.owners.setdefault(p.untyped_storage().data_ptr(), []).append((name, p))
        self.fastpath: bool | None = None

    def __enter__(self) -> Tape:
        # the fused encoder kernels hide their products; the ordinary path computes the same thing
        self.fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        torch.backends.mha.set_fastpath_enabled(bool(self.fastpath))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = PRODUCTS.get(func)
        if places is not None:
            use = self.match(func, args, out, *places)
            if use is not None:
                self.on_use(use)
                return out
        if self.on_other is not None:
            self.on_other(func, args, out)
        return out

    def match(self, func: Any, args: tuple, y: Tensor, i: int, j: int) -> Use | None:
        x, w = args[i], args[j]
        for name, p in self.owners.get(w.untyped_storage().data_ptr(), ()):
            offset = w.storage_offset() - p.storage_offset()
            if not 0 <= offset < max(1, p.numel()) or not p.is_contiguous():
                continue
            if func is aten.convolution.default:
                stride, padding, dilation, transposed, _, groups = args[3:9]
                if transposed or w.shape != p.shape:
                    return None
                spatial = p.dim() - 2
                steps = [tuple(v) * (spatial if len(v) == 1 else 1) for v in (stride, padding, dilation)]
                conv = Conv(tuple(p.shape[2:]), steps[0], steps[1], steps[2], groups)
                return Use(name, None, False, conv, args[2], x, y)
            bias = args[0] if func is aten.addmm.default else None
            if func is aten.bmm.default:
                if w.stride(0) != 0 and w.shape[0] != 1:
                    return None
                w = w[0]
            rows, cols = p.shape[0], p.numel() // p.shape[0]
            if w.stride() == (1, cols) and w.shape[0] == cols and offset % cols == 0:
                first = offset // cols
                whole = first == 0 and w.shape[1] == rows
                return Use(name, None if whole else (first, first + w.shape[1]), False, None, bias, x, y)
            if w.stride() == (cols, 1) and w.shape == (rows, cols) and p.dim() == 2:
                return Use(name, None, True, None, bias, x, y)
        return None


def feed(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch: a mapping gives keyword arguments, of (input, label) the input is taken."""
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return model(**batch) if hasattr(batch, "keys") else model(batch)


def cut(batch: Any, first: int, last: int) -> Any:
    """Images `first` to `last` of a batch, whatever its form."""
    return torch.utils._pytree.tree_map(lambda t: t[first:last] if torch.is_tensor(t) and t.dim() else t, batch)


def marks(batch: Any) -> list[int]:
    """A number for each image of a batch, by its content alone: neither batches nor ranks change it."""
    inputs = _tensors(batch)
    images = next((t for t in inputs if t.is_floating_point()), inputs[0]).detach().cpu()  # token ids have no floats
    return [zlib.crc32(image.reshape(-1).view(torch.uint8).numpy().tobytes()) for image in images]  # numpy: no bfloat16


def placed(batch: Any, device: torch.device | str) -> Any:
    """A batch, whatever its form, with its tensors on a device."""
    return torch.utils._pytree.tree_map(lambda t: t.to(device) if torch.is_tensor(t) else t, batch)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, under its first name; tied weights are one.

    Raises ValueError for weights that are not in memory, as accelerate's offloading leaves them.
    """
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=True))
    away = [n for n, p in named.items() if p.is_meta]
    if away:
        raise ValueError(
            f"{away[0]}: is offloaded, as are {len(away)} of {len(named)} weights; load the model without offloading "
            "(no device_map, no disk offload)."
        )
    return named


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """eval() and no gradients for the length of a `with`, restored after."""
    training = [m for m in model.modules() if m.training]
    wanted = [p for p in model.parameters() if p.requires_grad]
    if training:
        model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for m in training:
            m.training = True


@dataclass
class Found:
    """What one forward showed: the sites in execution order and, for the other weights, why they are not sites."""

    sites: list[Site]
    dense: dict[str, str]  # parameter -> reason
    stem: set[str]  # parameters that read the image itself
    head: set[str]  # the last product of the forward


def find(model: nn.Module, batch: Any) -> Found:
    """Watch one forward in eval mode and list what can be pruned.  batch: one or two images are enough."""
    named = parameters(model)
    buffers = {b.untyped_storage().data_ptr(): n for n, b in model.named_buffers() if b.numel() > 1}
    uses: list[Use] = []
    norms: dict[int, str] = {}  # storage of a product's output -> running mean of the batch norm that reads it

    made: dict[int, tuple[int, int]] = {}  # storage of a product's output -> its version and size when it was made

    def product(use: Use) -> None:
        uses.append(use)
        made[use.y.untyped_storage().data_ptr()] = (use.y._version, use.y.numel())

    def other(func: Any, args: tuple, out: Any) -> None:
        if any(n in str(func) for n in NORMS) or "batch_norm" in str(func):
            y = args[0]
            if made.get(y.untyped_storage().data_ptr()) != (y._version, y.numel()):
                return  # not a product's output, or one that was changed in place
            mean = next((a for a in args[1:] if torch.is_tensor(a) and a.untyped_storage().data_ptr() in buffers), None)
            if mean is not None:
                norms[y.untyped_storage().data_ptr()] = buffers[mean.untyped_storage().data_ptr()]

    with quiet(model), torch.no_grad(), Tape(named, product, other):
        result = feed(model, batch)  # noqa: F841  kept alive with `uses`, so that no storage is reused meanwhile
    if not uses:
        raise ValueError("the model's forward multiplied no parameter with its input; there is nothing to prune.")

    inputs = {t.untyped_storage().data_ptr() for t in _tensors(batch)}
    by_storage = {p.untyped_storage().data_ptr(): n for n, p in named.items()}
    sources: dict[tuple, int] = {}
    sites: dict[tuple, Site] = {}
    dense: dict[str, str] = {}
    stem: set[str] = set()
    ranges: dict[str, set] = {}
    for use in uses:
        ranges.setdefault(use.parameter, set()).add(use.rows)
        p = named[use.parameter]
        key = (use.parameter, use.rows)
        image = use.conv is not None and use.x.shape[1] <= 4
        if image and (use.x.untyped_storage().data_ptr() in inputs or not sites):
            stem.add(use.parameter)
        where = (use.x.untyped_storage().data_ptr(), use.x.storage_offset(), use.x.numel(), use.x._version, use.conv)
        source = sources.setdefault(where, len(sources))
        bias = by_storage.get(use.bias.untyped_storage().data_ptr()) if use.bias is not None else None
        norm = norms.get(use.y.untyped_storage().data_ptr()) if use.conv is not None else None
        if key in sites:
            site = sites[key]
            site.uses += 1
            if (bias, norm) != (site.bias, site.norm):  # what follows differs between the uses: neither can be refit
                site.bias = site.norm = None
            continue
        if use.conv is not None:
            c = use.conv
            shape = (c.groups, p.shape[0] // c.groups, p.numel() // p.shape[0])
            channels = p.shape[1]
        else:
            rows, cols = p.shape[0], p.numel() // p.shape[0]
            rows, cols = (cols, rows) if use.transposed else (rows, cols)
            rows = rows if use.rows is None else use.rows[1] - use.rows[0]
            shape, channels = (1, rows, cols), cols
        if use.rows is not None or (bias is not None and named[bias].numel() != shape[0] * shape[1]):
            bias = None
        sites[key] = Site(
            use.parameter, use.rows, shape, channels, use.conv, use.transposed, bias,
            norm, 1, source,
        )
    for name, parts in ranges.items():
        if len(parts) > 1 and None in parts:
            dense[name] = "used whole in one place and by rows in another"
    last = uses[-1].parameter
    head = {last} if uses[-1].conv is None or uses[-1].y.shape[2:].numel() == 1 else set()
    for name, p in named.items():
        if p.dim() >= 2 and name not in ranges and name.endswith("weight"):  # tokens and positions are no weights
            dense[name] = "no matrix product or convolution reads it unchanged"
    found = [s for s in sites.values() if s.parameter not in dense]
    biases: dict[str, list[Site]] = {}
    for s in found:  # a bias shared by several sites cannot be refit for one of them
        if s.bias is not None:
            biases.setdefault(s.bias, []).append(s)
    for shared in biases.values():
        if len(shared) > 1:
            for s in shared:
                s.bias = None
    return Found(found, dense, stem, head)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(t)]
