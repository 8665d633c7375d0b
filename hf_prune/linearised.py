"""Layers whose gradient is cheap to differentiate again with respect to what flows back through it.

A Gauss-Newton product sees the network as linear in its weights around the present ones: J v, then Jᵀ u.  J v is the
derivative of Jᵀ u with respect to u, and torch takes it by its general second derivatives, which also hold everything
that depends on the layer's input.  None of that is needed here.  Under `linear()`, norms and elementwise activations
keep their derivative at the present input and apply it in one or two operations each way.  What comes out is the same
matrix; the exact Hessian does need the rest and is taken without this mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LONGEST = 8  # tokens over width of a head, beyond which tables of all pairs of tokens would fill the memory
SLOPES: set[Callable[..., Any]] = {F.gelu, F.silu, F.hardswish, F.hardsigmoid, F.softplus, F.mish, F.elu, torch.tanh,
                                   torch.sigmoid, Tensor.tanh, Tensor.sigmoid}  # fmt: skip


class _Slope(torch.autograd.Function):
    """y given, gradient by the slope of each entry: both like x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return g * ctx.saved_tensors[0], None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        return _NormBack.apply(g, *ctx.saved_tensors, ctx.shape), None, None, None, None  # type: ignore[return-value]


class _NormBack(torch.autograd.Function):
    """P (γ g), with P = rstd (1 - mean - x̂ x̂ᵀ / n) symmetric; its transpose takes v to γ P v."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, shape: list[int]
    ) -> Tensor:
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.shape = shape
        return _project(g, x, shape, mean, rstd, weight)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, rstd, weight = ctx.saved_tensors
        back = _project(v, x, ctx.shape, mean, rstd, None)
        return back if weight is None else back * weight, None, None, None, None, None


def _project(g: Tensor, x: Tensor, shape: list[int], mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    only_input = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(g.contiguous(), x, shape, mean, rstd, weight, None, only_input)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_LinearBack.apply(g, *ctx.saved_tensors, *ctx.needs_input_grad[:2]), None  # type: ignore[misc]


class _LinearBack(torch.autograd.Function):
    """g W and gᵀ x; the transpose takes (v, V) to v Wᵀ + x Vᵀ, summed where it is made."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, to_x: bool, to_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        to = g @ weight if to_x else None
        return to, g.flatten(0, -2).t() @ x.flatten(0, -2) if to_weight else None

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, of_weight: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        made = None if v is None else v.flatten(0, -2) @ weight.t()
        if of_weight is not None:
            flat = x.flatten(0, -2)
            made = flat @ of_weight.t() if made is None else made.addmm_(flat, of_weight.t())
        return None if made is None else made.view(*x.shape[:-1], -1), None, None, None, None


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ) v for tables (images * heads, tokens, width); the queries are scaled already."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = torch.bmm(q, k.mT).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return _AttentionBack.apply(g, *ctx.saved_tensors)  # type: ignore[return-value]


class _AttentionBack(torch.autograd.Function):
    """S k, Sᵀ q, pᵀ g, with S what g leaves at the scores; its transpose sums two products where they are made."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(q, k, v, p)
        bend = torch._softmax_backward_data(torch.bmm(g, v.mT), p, -1, p.dtype)
        return torch.bmm(bend, k), torch.bmm(bend.mT, q), torch.bmm(p.mT, g)

    @staticmethod
    def backward(ctx: Any, of_q: Tensor, of_k: Tensor, of_v: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, p = ctx.saved_tensors
        scores = torch.bmm(of_q, k.mT).baddbmm_(q, of_k.mT)
        out = torch.bmm(p, of_v).baddbmm_(torch._softmax_backward_data(scores, p, -1, p.dtype), v)
        return out, None, None, None, None


class linear(TorchFunctionMode):
    """For the length of a `with`, a forward whose gradients are to be differentiated in the seed alone."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if not (torch.is_tensor(x) and x.requires_grad and x.is_floating_point()):
            return func(*args, **kwargs)
        own = OWN.get(func)
        if own is not None:
            made = own(*args, **kwargs)
            return func(*args, **kwargs) if made is None else made
        in_place = kwargs.get("inplace") or any(a is True for a in args[1:])  # who reads x later reads the result
        if func in SLOPES and args and not in_place:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                y = func(leaf, *args[1:], **kwargs)
                (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            return _Slope.apply(x, y.detach(), slope)
        return func(*args, **kwargs)


def layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    if any(t is not None and t.requires_grad for t in (weight, bias)):
        return None
    return _Norm.apply(input, list(normalized_shape), weight, bias, eps)  # type: ignore[return-value]


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    """With fixed statistics it is a scale and a shift per channel."""
    if training or running_mean is None or running_var is None:
        return None
    scale = (running_var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - running_mean * scale
    wide = (1, -1, *[1] * (input.dim() - 2))
    return input * scale.view(wide) + shift.view(wide)


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor | None:  # fmt: skip
    """Plain attention, without torch's search for rows that a mask left empty."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return None
    if key.shape[-2] > LONGEST * key.shape[-1]:
        return None
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    if query.dim() != 4 or not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return (query @ key.mT).softmax(-1) @ value
    out = _Attention.apply(*(t.flatten(0, 1) for t in (query, key, value)))
    return out.unflatten(0, query.shape[:2])  # type: ignore[union-attr]


def dense(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Its two ways into a product, by the input and by the weights, are summed by the second matrix product itself."""
    if input.dim() < 2 or (bias is not None and bias.requires_grad):
        return None
    return _Linear.apply(input, weight, bias)  # type: ignore[return-value]


# what may return None where the general way is to be taken
OWN: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: dense, F.layer_norm: layer_norm, F.batch_norm: batch_norm, F.scaled_dot_product_attention: attention
}  # fmt: skip


@contextlib.contextmanager
def weighing(own: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves, by its address; the model's own weights do not count."""
    ours = {p.untyped_storage().data_ptr() for p in own}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield seen


class Graphs:
    """What multiplies with a batch's part of a curvature matrix, kept between products for as many batches as fit.

    memory: bytes they may take; the first graph of a kind of matrix is weighed.  own: the model's weights, which do not
    count.  The kinds share the room: to ask for one drops those of another.
    """

    def __init__(self, memory: float, own: Iterable[Tensor]) -> None:
        self.memory, self.own = memory, list(own)
        self.kind = ""
        self.kept: dict[int, Callable[..., Any]] = {}
        self.bytes: dict[str, int] = {}  # that the graph of one batch takes

    def get(self, kind: str, i: int, build: Callable[[int], Callable[..., Any]]) -> Callable[..., Any]:
        """Batch i's, by `build` where it is not kept."""
        if kind != self.kind:
            self.clear()
            self.kind = kind
        if i in self.kept:
            return self.kept[i]
        if kind in self.bytes:
            made = build(i)
        else:
            with weighing(self.own) as seen:
                made = build(i)
            self.bytes[kind] = max(1, sum(seen.values()))
        if (len(self.kept) + 1) * self.bytes[kind] <= self.memory:
            self.kept[i] = made
        return made

    def clear(self) -> None:
        """They are of weights that have changed."""
        self.kept.clear()
