"""Spectra by Lanczos quadrature, and the share of the weights that a curvature lets go.

Yang, Wang and Xiong, "How Sparse Can We Prune A Deep Network: A Fundamental Limit Perspective" (arXiv 2306.05857).
Where the loss is quadratic around w*, { loss <= loss(w*) + eps } is an ellipsoid with radii r_i = sqrt(2 eps / |l_i|),
l_i the eigenvalues of the Hessian H over the D prunable weights.  Zeroing the smallest share s of the weights moves w*
by R(s).  A subspace in general position meets the ellipsoid from that distance once its share of the dimensions exceeds
the statistical dimension, which leaves

    s = (1/D) sum_i r_i² / (R(s)² + r_i²),    that is    1 - s = tr |H| (|H| + mu I)⁻¹ / D    with    mu = 2 eps / R(s)²

The paper's "pruning ratio" is the share that is kept, 1 - s; here sparsity s is the share of zeros.  The trace is
estimated by stochastic Lanczos quadrature (Golub and Meurant, "Matrices, Moments and Quadrature"): the mean over random
vectors v of vᵀ f(H) v / D, each by a Gauss rule that k products with H give.  The Ritz values are summed as they are:
a smoothed density loses mass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rule = tuple[Tensor, Tensor]  # (nodes (k,), weights (k,) that sum to 1), float64
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, 97.5 %, 1 to 10 degrees of freedom


def probe(size: int, seed: int, number: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Random signs, (size,): a third of the spread of Gaussian vectors.  Drawn on the CPU: the same on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + number)
    return (2 * torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) - 1).to(device=device, dtype=dtype)


class Lanczos:
    """The tridiagonal matrix T of one start vector, grown one product at a time; T is float64.

    product: v (D,) -> H v.  start: (D,), not zero.  basis: keep every vector and orthogonalise against all of them,
    twice (m D numbers of memory).  Without it, rounding repeats converged Ritz values; the quadrature survives that,
    but Gauss rules of an indefinite matrix converge slowly enough for it to hurt.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], start: Tensor, *, basis: bool) -> None:
        self.product = product
        self.alphas: list[float] = []
        self.betas: list[float] = []  # betas[k] couples step k to the next one
        self.now = start / _norm(start)
        self.before: Tensor | None = None
        self.basis: list[Tensor] | None = [self.now] if basis else None
        self.ended = False  # the Krylov space is exhausted: the rule is exact

    def step(self) -> None:
        """One product.  Does nothing once the space is exhausted."""
        if self.ended:
            return
        w = self.product(self.now)
        alpha = _dot(self.now, w)
        if not math.isfinite(alpha):
            raise ValueError("a curvature product is not finite; check the weights and the calibration images for NaN.")
        w = w - alpha * self.now
        if self.before is not None:
            w -= self.betas[-1] * self.before
        if self.basis is not None:
            for _ in range(2):
                for q in self.basis:
                    w -= _dot(q, w) * q
        beta = _norm(w)
        self.alphas.append(alpha)
        self.betas.append(beta)
        scale = max(map(abs, self.alphas)) + max(self.betas[:-1], default=0.0)
        if beta <= 10 * torch.finfo(w.dtype).eps * scale or len(self.alphas) >= len(w):
            self.ended = True
            return
        self.before, self.now = self.now, w / beta
        if self.basis is not None:
            self.basis.append(self.now)

    def free(self) -> Lanczos:
        """Drop the vectors; T stays."""
        self.basis = self.before = None
        self.now = torch.empty(0)
        return self

    @property
    def steps(self) -> int:
        return len(self.alphas)

    def gauss(self, steps: int | None = None) -> Rule:
        """The rule of the first `steps` steps (all by default)."""
        k = self.steps if steps is None else min(steps, self.steps)
        return _rule(torch.tensor(self.alphas[:k], dtype=torch.float64), self.betas[: k - 1])

    def radau(self) -> Rule:
        """Gauss-Radau: one node more, fixed at the lower end of a positive semi-definite spectrum.

        The node lies below 0 by the rounding of the products, so that the system for it stays definite.
        """
        if self.ended:
            return self.gauss()
        nodes, _ = self.gauss()
        lower = min(0.0, 2 * float(nodes.min())) - 1e-12 * float(nodes.abs().max())
        k = self.steps
        t = torch.diag(torch.tensor(self.alphas, dtype=torch.float64) - lower)
        off = torch.tensor(self.betas[: k - 1], dtype=torch.float64)
        t += torch.diag(off, 1) + torch.diag(off, -1)
        right = torch.zeros(k, dtype=torch.float64)
        right[-1] = self.betas[-1] ** 2
        last = lower + float(torch.linalg.solve(t, right)[-1])
        return _rule(torch.tensor([*self.alphas, last], dtype=torch.float64), self.betas)


def _rule(diagonal: Tensor, off: Sequence[float]) -> Rule:
    t = torch.diag(diagonal)
    if len(off):
        side = torch.tensor(off, dtype=torch.float64)
        t = t + torch.diag(side, 1) + torch.diag(side, -1)
    nodes, vectors = torch.linalg.eigh(t)
    return nodes, vectors[0].square()


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _norm(a: Tensor) -> float:
    return math.sqrt(_dot(a, a))


# ------------------------------------------------------------------------------------------- the share that must stay
def kept(rules: Sequence[Rule], mu: float) -> float:
    """tr |H| (|H| + mu I)⁻¹ / D: the share of the directions that are stiffer than mu.  mu: curvature, may be inf."""
    return share(rules)(mu)


def share(rules: Sequence[Rule]) -> Callable[[float], float]:
    """mu -> `kept`, for many values of mu."""
    nodes, weights = torch.cat([x.abs() for x, _ in rules]), torch.cat([w for _, w in rules]) / len(rules)
    return lambda mu: 0.0 if math.isinf(mu) else float((weights * nodes / (nodes + mu).clamp_min(1e-300)).sum())


def mean_curvature(rules: Sequence[Rule]) -> float:
    """tr |H| / D."""
    return sum(float((w * x.abs()).sum()) for x, w in rules) / len(rules)


def bounds(runs: Sequence[Lanczos]) -> Callable[[float], tuple[float, float]]:
    """mu -> (low, high), an interval for the same share; H positive semi-definite.

    mu / (x + mu) has derivatives of alternating sign, so that for every probe the Gauss rule lies below its integral
    and the Radau rule with a node at the lower end above it.  The spread of the probes widens the interval to 95 %;
    with a single probe it is the interval of that probe alone.
    """
    sides = [_padded([run.radau() for run in runs]), _padded([run.gauss() for run in runs])]

    def interval(mu: float) -> tuple[float, float]:
        if math.isinf(mu):
            return 0.0, 0.0
        low, high = (1 - (w * mu / (x.clamp_min(0) + mu)).sum(1) for x, w in sides)
        reach = spread(((low + high) / 2).tolist())
        return max(0.0, float(low.mean()) - reach), min(1.0, float(high.mean()) + reach)

    return interval


def _padded(rules: Sequence[Rule]) -> Rule:
    """Rules of different lengths as (nodes, weights), each (rules, most nodes), filled up with weight 0."""
    pad = torch.nn.utils.rnn.pad_sequence
    return pad([x for x, _ in rules], batch_first=True), pad([w for _, w in rules], batch_first=True)


def spread(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean of a few values; 0 for a single one, which says nothing about it."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    quantile = T_95[n - 2] if n - 2 < len(T_95) else 1.96 + 2.6 / (n - 1)
    return quantile * math.sqrt(variance / n)


# ------------------------------------------------------------------------------------------------- the way to w minus
class Removal:
    """R(s)²: the squared norm of the smallest share s of the weights, exact up to 4 million weights.

    weight: (D,).  Beyond that the cumulative sum is kept at 4 million equally spaced places and interpolated.
    """

    POINTS = 1 << 22

    def __init__(self, weight: Tensor) -> None:
        order = weight.detach().flatten().square().sort().values
        sums = torch.cat([torch.zeros(1, dtype=torch.float64, device=order.device), order.double().cumsum(0)])
        if len(sums) > self.POINTS:
            sums = sums[torch.linspace(0, len(sums) - 1, self.POINTS, dtype=torch.float64).round().long()]
        self.sums = sums.cpu()

    def __call__(self, sparsity: float) -> float:
        at = min(max(sparsity, 0.0), 1.0) * (len(self.sums) - 1)
        low = min(int(at), len(self.sums) - 2)
        return float(self.sums[low] + (at - low) * (self.sums[low + 1] - self.sums[low]))

    def inverse(self, squared: float) -> float:
        """The sparsity whose R² is `squared`: how much unstructured pruning removes as much energy."""
        at = int(torch.searchsorted(self.sums, torch.tensor(squared, dtype=torch.float64)))
        if at >= len(self.sums):
            return 1.0
        if at == 0:
            return 0.0
        below, above = float(self.sums[at - 1]), float(self.sums[at])
        return (at - 1 + (squared - below) / max(above - below, 1e-300)) / (len(self.sums) - 1)


def fixed_point(needed: Callable[[float], float], removal: Removal, eps: float) -> float:
    """The sparsity s with 1 - s = needed(2 eps / R(s)²).

    needed: mu -> share that must stay, falling in mu.  It rises with s while 1 - s falls: they cross once.
    eps: tolerated rise of the loss, in the loss's own unit.  Raises ValueError where it is not positive.
    """
    if not eps > 0:
        raise ValueError(f"--eps {eps:g}: the tolerated rise of the loss must be greater than 0.")
    low, high = 0.0, 1.0
    for _ in range(34):  # to 1e-10
        middle = (low + high) / 2
        squared = removal(middle)
        mu = 2 * eps / squared if squared > 0 else math.inf
        low, high = (middle, high) if 1 - needed(mu) > middle else (low, middle)
    return (low + high) / 2


def from_trace(mean: float) -> Callable[[float], float]:
    """The share t / (1 + t), t = mean / mu, that a matrix of mean eigenvalue `mean` needs at the most."""
    return lambda mu: 0.0 if math.isinf(mu) else mean / (mean + mu)
