"""How alike the dense and the pruned model are inside, block by block, on the same images.

CKA is the debiased linear one over images: Kornblith et al. 2019 (arXiv 1905.00414), with the unbiased HSIC of Song et
al. 2012 (JMLR 13, eq. 5) averaged over batches (Nguyen et al. 2021, arXiv 2010.15327, eq. 6). It asks whether the same
images are alike to both models, and does not see a rotation; cosine and relative error compare value by value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import sites, walk


def by_depth(
    dense: nn.Module, pruned: nn.Module, batches: Iterable[Any], *, ordered: bool = True
) -> list[dict[str, Any]]:
    """One entry per block in execution order: {"name", "relative_error", "cosine", "cka", "largest"}.

    batches: as the models take them, at least one; CKA needs 4 images in one, and is None without. relative_error:
    sum ||z - z_d||^2 / sum ||z_d||^2 of the block's output. cosine: mean over images of the whole output.
    ordered: whether channels stand in the same order in both; if not, what compares value by value is None.
    largest: share of sum ||z_d||^2 that the largest value of each image holds; near 1, it decides the other three.
    """
    names: list[str] = []
    sums: dict[str, Tensor] = {}
    for batch in batches:
        if not names:
            small = sites.cut(batch, 0, 2)
            with torch.no_grad():
                found = sites.find(dense, small)
            units, _ = walk.units(dense, found, found.sites, small)
            names = [unit.name for unit in units]
        before, after = _outputs(dense, names, batch), _outputs(pruned, names, batch)
        for name in names:
            if name in before and name in after and before[name].shape == after[name].shape:
                add = _sums(before[name], after[name])
                sums[name] = sums[name] + add if name in sums else add
    return [{"name": name, **_figures(sums[name], ordered)} for name in names if name in sums]


def _outputs(model: nn.Module, names: list[str], batch: Any) -> dict[str, Tensor]:
    """The output of each named module as (images, values)."""
    modules = dict(model.named_modules())
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = sites._tensors(output)
            if tensors and tensors[0].is_floating_point() and tensors[0].dim() >= 2:
                kept[name] = tensors[0].detach().flatten(1)

        return hook

    with walk._hooks(*(modules[name].register_forward_hook(keep(name)) for name in names if name in modules)):
        with sites.quiet(model), torch.no_grad():
            sites.feed(model, batch)
    return kept


def _sums(before: Tensor, after: Tensor) -> Tensor:
    """before, after (n, p) -> (8,) float64: squared error and norm, cosines, n, largest squares, and the three HSIC."""
    norm = before.square().sum().double()
    error = (after - before).square().sum().double()
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=1).sum()
    largest = before.abs().amax(1).double().square().sum()
    dependence = before.new_zeros(3, dtype=torch.float64)
    if len(before) >= 4:
        k, ell = _gram(before), _gram(after)
        dependence = torch.stack([hsic(k, ell), hsic(k, k), hsic(ell, ell)])
    count = norm.new_tensor(float(len(before)))
    return torch.cat([torch.stack([error, norm, cosine, count, largest]), dependence]).cpu()


def _gram(features: Tensor) -> Tensor:
    """(n, p) -> (n, n) inner products. The mean goes first: HSIC does not see it, and rounding would."""
    centred = features - features.mean(0)
    return (centred @ centred.T).double()


def hsic(k: Tensor, ell: Tensor) -> Tensor:
    """The unbiased HSIC of two Gram matrices (n, n), n >= 4; their diagonals are not used."""
    n = len(k)
    k, ell = k - k.diag().diag(), ell - ell.diag().diag()
    product = (k * ell.T).sum() + k.sum() * ell.sum() / ((n - 1) * (n - 2))
    return (product - 2 * (k.sum(0) @ ell.sum(1)) / (n - 2)) / (n * (n - 3))


def _figures(sums: Tensor, ordered: bool = True) -> dict[str, float | None]:
    error, norm, cosine, count, largest, both, one, other = sums.tolist()
    scale = one * other
    return {
        "relative_error": error / norm if norm and ordered else None,
        "cosine": cosine / count if ordered else None,
        "largest": largest / norm if norm else None,
        # of unrelated outputs the estimate scatters around 0; where one side does not vary at all there is none
        "cka": both / math.sqrt(scale) if one > 0 and other > 0 else None,
    }
