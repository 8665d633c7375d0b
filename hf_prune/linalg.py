"""Linear algebra of the methods: batched over the rows of a layer, no loop over rows or groups."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Inside, products of float32 matrices are made with this `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def single(t: Tensor) -> Tensor:
    """A tensor of a smaller type in float32; any other as it is."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def exact_matmul() -> contextlib.AbstractContextManager[None]:
    """Products to float32's rounding, by the faster kernel that has it, while sums are taken and systems solved."""
    return matmul_precision(exact())


@functools.cache
def exact() -> str:
    """The setting of `torch.set_float32_matmul_precision` under which products keep float32's precision here.

    "medium" permits factors of 8 bits.  A CPU without units for them answers with oneDNN's float32 kernel, on AMD's
    processors twice as fast as the library that "highest" takes, so it is tried, on products of every layout.  The
    setting is one for all devices, and GPUs do round; the answer is the same in every run on a machine.
    """
    if torch.cuda.is_available():
        return "highest"
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 256, 256, generator=generator)
    layouts = (a[0], b[0]), (a[0].t(), b[0]), (a[0], b[0].t()), (a, b), (a.mT, b)

    def errors() -> list[float]:
        return [float((x @ y - x.double() @ y.double()).norm() / (x.double() @ y.double()).norm()) for x, y in layouts]

    with matmul_precision("highest"):
        least = max(errors())
    with matmul_precision("medium"):
        return "medium" if max(errors()) <= 4 * least else "highest"


_SEEN: ContextVar[list[Tensor] | None] = ContextVar("residuals", default=None)

# (some columns of a matrix, what all of it costs in multiplications, how many columns it has) -> all of it
Columns = Callable[[Callable[[slice], Tensor], int, int], Tensor]
_COLUMNS: ContextVar[Columns] = ContextVar("columns", default=lambda some, cost, count: some(slice(0, count)))


def bands(n: int) -> int:
    """How many bands `symmetric` makes an n x n product in: with b it multiplies (b + 1) / 2b of the entries."""
    return 4 if n >= 192 else 2 if n >= 96 else 1


def outer(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b (..., n, m) of a (..., samples, n), b (..., samples, m): sums of outer products.

    A batch of one goes as plain matrices, whose transposition costs nothing; in a batch it takes up to twice as long.
    """
    if a.dim() == b.dim() == 3 and len(a) == len(b) == 1:
        return (a[0].t() @ b[0])[None]
    return a.mT @ b


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b (..., n, n) of a, b (..., samples, n) whose product is symmetric, as sums of outer products are.

    Only blocks on and above the diagonal are multiplied: five eighths of the operations where n is large.
    """
    n = b.shape[-1]
    parts = bands(n)
    if parts == 1:
        return outer(a, b)
    out = b.new_empty(*b.shape[:-2], n, n)
    cuts = [n * k // parts for k in range(parts + 1)]
    for first, last in zip(cuts, cuts[1:], strict=False):
        out[..., first:last, first:] = outer(a[..., first:last], b[..., first:])
        out[..., first:last, :first] = out[..., :first, first:last].mT
    return out


def cholesky(h: Tensor, what: str = "the Gram matrix") -> Tensor:
    """Lower factor of h (..., n, n).  Raises ValueError, naming rank and remedy, where h is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(h)
    if bool((info != 0).any()):
        spectrum = torch.linalg.eigvalsh(h.double())  # ascending; below the rounding of h's own precision counts as 0
        rank = int((spectrum > h.shape[-1] * torch.finfo(h.dtype).eps * spectrum[..., -1:]).sum(-1).min())
        raise ValueError(
            f"{what} is singular (rank {rank} of {h.shape[-1]}); give more calibration images or a larger ridge."
        )
    return factor


def inverse_of(h: Tensor, what: str = "the Gram matrix") -> Tensor:
    """h⁻¹ for positive definite h (..., n, n).  Raises ValueError as `cholesky`."""
    return torch.cholesky_inverse(cholesky(h, what))


@contextlib.contextmanager
def residuals() -> Iterator[list[Tensor]]:
    """While open, the list holds ||r|| / ||b|| of the last `masked_solve`: before its first step, and after each."""
    seen: list[Tensor] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


@contextlib.contextmanager
def dividing(columns: Columns) -> Iterator[None]:
    """While open, `masked_solve` with a metric lets `columns` make its products: by several processes."""
    token = _COLUMNS.set(columns)
    try:
        yield
    finally:
        _COLUMNS.reset(token)


def masked_solve(
    h: Tensor,  # (..., n, n) positive definite
    b: Tensor,  # (..., rows, n)
    mask: Tensor,  # (..., rows, n) bool
    start: Tensor | None = None,  # (..., rows, n)
    tolerance: float = 1e-5,
    steps: int = 500,
    metric: Tensor | None = None,  # (..., rows, rows) positive definite
    inverse: Tensor | None = None,  # of h, where it is known
) -> Tensor:
    """w, zero off `mask`, that minimises tr(M w h wᵀ) - 2 tr(M w bᵀ): conjugate gradients on all rows at once.

    Without a metric M every row is its own problem, w_S = h_SS⁻¹ b_S on its support S, and one step is one matrix
    product whatever the supports are.  A metric couples the rows.  Preconditioned with the masked inverses of h and M,
    which need about a third of the steps of plain conjugate gradients.  Stops once the residual is below `tolerance`
    times the right-hand side, in every row.
    """
    m = mask.to(b.dtype)
    if inverse is None:
        inverse = inverse_of(h)
    apply, precondition = (lambda v: v @ h), (lambda v: v @ inverse)
    over: tuple[int, ...] = (-1,)
    if metric is not None:
        inverse_metric = inverse_of(metric, "the output metric")
        columns, n = _COLUMNS.get(), h.shape[-1]
        cost = b.shape[-2] * n * (b.shape[-2] + n)
        # a column of M v h needs all of v and one of h, so that processes can share a product though M couples the rows
        apply = lambda v: columns(lambda c: metric @ (v @ h[..., c]), cost, n)  # noqa: E731
        precondition = lambda v: columns(lambda c: inverse_metric @ (v @ inverse[..., c]), cost, n)  # noqa: E731
        over, b = (-2, -1), metric @ b
    target = b * m
    w = torch.zeros_like(b) if start is None else start * m
    r = target - apply(w) * m
    z = precondition(r) * m
    p = z.clone()
    rz = (r * z).sum(over, keepdim=True)
    seen = _SEEN.get()
    if seen is not None:
        scale = target.norm().clamp_min(1e-30)
        seen[:] = [r.norm() / scale]
    limit = (tolerance**2) * target.square().sum(over, keepdim=True)
    for step in range(steps):
        hp = apply(p) * m
        curvature = (p * hp).sum(over, keepdim=True)
        alpha = torch.where(curvature > 0, rz / curvature, torch.zeros_like(rz))
        w += alpha * p
        r -= alpha * hp
        if seen is not None:
            seen.append(r.norm() / scale)
        if step % 10 == 9 and bool((r.square().sum(over, keepdim=True) <= limit).all()):
            break
        z = precondition(r) * m
        after = (r * z).sum(over, keepdim=True)
        p = z + torch.where(rz > 0, after / rz, torch.zeros_like(rz)) * p
        rz = after
    return w
