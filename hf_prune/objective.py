"""What must be preserved, as a function of the weights of one layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .linalg import outer, symmetric


@dataclass
class Gram:
    """Sums over calibration samples that turn layer-wise least squares into matrix products (SNOWS with K = 0).

    With x the layer's input in the pruned network, W its dense weight and d the correction that would carry its output
    to the dense network's, the target is t = W x + mix * d: mix 0 is the cascade (the dense layer on pruned inputs),
    mix 1 the dense stream.  The value is sum ||w x + b - t||², b at its best where `bias` is set.
    """

    weight: Tensor  # (groups, out, in), dense
    xx: Tensor  # (groups, in, in)   sum x xᵀ
    xd: Tensor  # (groups, in, out)  sum x dᵀ
    dd: Tensor  # (groups, out)      sum d²
    sx: Tensor  # (groups, in)
    sd: Tensor  # (groups, out)
    count: float  # samples, or the sum of their weights
    squares: float = 0.0  # of those weights
    mix: float = 0.5
    caution: float = 1.0  # what ridges are multiplied by
    bias: bool = False
    metric: Tensor | None = None  # (out, out), what an error in each direction of the output weighs when solving

    @classmethod
    def zeros(cls, weight: Tensor, sums: torch.dtype | None = None) -> Gram:
        """sums: the type of the sums while they grow, that of the weight by default."""
        g, o, i = weight.shape
        new = functools.partial(weight.new_zeros, dtype=sums)
        return cls(weight, new(g, i, i), new(g, i, o), new(g, o), new(g, i), new(g, o), 0.0)

    @classmethod
    def join(cls, grams: list[Gram], metric: Tensor | None) -> Gram:
        """Layers that read the same input as one, their outputs behind each other.  metric: over all outputs."""
        weight, dd, sd = (torch.cat([getattr(g, k) for g in grams], 1) for k in ("weight", "dd", "sd"))
        return replace(grams[0], weight=weight, dd=dd, sd=sd, xd=torch.cat([g.xd for g in grams], 2), metric=metric)

    def add_inputs(self, x: Tensor, weight: Tensor | None = None) -> None:
        """x (groups, samples, in), weight (samples,) or None for ones."""
        xw = x if weight is None else x * weight[:, None]
        self.xx += symmetric(xw, x)
        self.sx += x.sum(1) if weight is None else outer(x, weight[None, :, None]).squeeze(-1)
        self.count_in(x.shape[1], weight)

    def add_positions(self, positions: Tensor, weight: Tensor | None = None) -> None:
        """Have an input that is an average over positions count position by position.

        A linear layer commutes with the average, so what it does at every position decides what it does to the mean,
        and an image says as much as it has positions.  To the sum of x xᵀ, for the averages x, their spread is added:
        the sum over images of the mean over positions of (p - x) (p - x)ᵀ.  positions (images, positions, in), weight
        (images,) or None for ones.
        """
        apart = positions - positions.mean(1, keepdim=True)
        rows = apart.flatten(0, 1)[None]
        share = torch.ones_like(apart[:, 0, 0]) if weight is None else weight.to(apart)
        self.xx += symmetric(rows * (share / apart.shape[1]).repeat_interleave(apart.shape[1])[:, None], rows)

    def count_in(self, samples: int, weight: Tensor | None) -> None:
        """How many samples there are, and what they weigh (samples,); None for ones."""
        self.count += samples if weight is None else float(weight.sum())
        self.squares += samples if weight is None else float(weight.square().sum())

    def per_sample(self) -> float:
        """Inputs of the layer per effective sample, (sum of weights)² / sum of their squares (Kish 1965)."""
        return self.weight.shape[-1] * self.squares / max(self.count, 1e-30) ** 2

    def add_corrections(self, x: Tensor, d: Tensor, weight: Tensor | None = None) -> None:
        """x (groups, samples, in), d (groups, samples, out), weight (samples,) or None for ones."""
        dw = d if weight is None else d * weight[:, None]
        self.xd += outer(x, dw)
        self.dd += (d * dw).sum(1)
        self.sd += dw.sum(1)

    def __add__(self, other: Gram) -> Gram:
        sums = {k: getattr(self, k) + getattr(other, k) for k in ("xx", "xd", "dd", "sx", "sd", "count", "squares")}
        return replace(self, **sums)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """(xx, xd, dd), centred where a bias is refit, since the best bias removes the means."""
        if not self.bias:
            return self.xx, self.xd, self.dd
        n = max(self.count, 1.0)
        return (
            self.xx - self.sx[..., :, None] * self.sx[..., None, :] / n,
            self.xd - self.sx[..., :, None] * self.sd[..., None, :] / n,
            self.dd - self.sd.square() / n,
        )

    def rows(self, w: Tensor) -> Tensor:
        """Squared error of each output, (groups, out), for weights w (groups, out, in)."""
        xx, xd, dd = self.moments()
        step = w - self.weight
        rows = (step @ xx * step).sum(-1) - 2 * self.mix * (step * xd.mT).sum(-1) + self.mix**2 * dd
        return rows.clamp_min(0)  # below 0 is rounding

    def value(self, w: Tensor) -> Tensor:
        return self.rows(w).sum()

    def energy(self) -> Tensor:
        """sum ||W x||² (about its mean where a bias is refit): what errors are divided by.

        Never below the rounding of the sums, so that a layer whose input is constant has an error near 0, not 0 / 0.
        """
        xx, _, _ = self.moments()
        raw = (self.weight @ self.xx * self.weight).sum()
        return torch.maximum((self.weight @ xx * self.weight).sum(), 8192 * torch.finfo(xx.dtype).eps * raw)

    def gradient(self, w: Tensor) -> Tensor:
        xx, xd, _ = self.moments()
        return 2 * ((w - self.weight) @ xx - self.mix * xd.mT)

    def product(self, w: Tensor, v: Tensor) -> Tensor:
        return 2 * v @ self.moments()[0]

    def best_bias(self, w: Tensor) -> Tensor:
        """What to add to the layer's bias when its weights become w: (groups, out)."""
        n = max(self.count, 1.0)
        return self.mix * self.sd / n - ((w - self.weight) @ self.sx[..., None]).squeeze(-1) / n

    def normal(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(H, B): least squares with a ridge towards W has w_S = H_SS⁻¹ B_S on each support S.

        ridge is a share of the mean diagonal of xx, times `caution`.  An input that is constant over images, such as
        a learned query or a dead branch, leaves only rounding in xx once it is centred; the ridge therefore never falls
        below the rounding of the sums, and such a layer keeps the dense values of its largest weights, which a refit
        bias makes exact.  Raises ValueError for a ridge of 0 on such a layer, and for sums that are not finite.
        """
        if ridge < 0:
            raise ValueError(f"ridge {ridge:g}: a share of the mean diagonal cannot be negative; give 0 or more.")
        ridge *= self.caution
        xx, xd, _ = self.moments()
        if not torch.isfinite(xx).all():
            raise ValueError("the layer's calibration inputs are not finite; check the images and the weights for NaN.")
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1)
        raw = self.xx.diagonal(dim1=-2, dim2=-1).mean(-1)
        rounding = 8192 * torch.finfo(xx.dtype).eps * raw  # measured: centring sums of 10⁴ samples loses up to 2000 eps
        if ridge == 0 and bool((scale <= rounding).any()):
            raise ValueError(
                "the calibration inputs of this layer are constant, so least squares without a ridge has no solution; "
                "give a ridge above 0 or other images."
            )
        floor = torch.where(raw > 0, rounding, torch.ones_like(raw)) if ridge else torch.zeros_like(raw)
        eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
        h = xx + torch.maximum(ridge * scale, floor)[..., None, None] * eye
        return h, self.weight @ h + self.mix * xd.mT
