"""Batch-norm statistics of the pruned network: re-estimated on the calibration images, if that helps.

`renew` puts the statistics of the calibration images in place of those of training, which are others where training
cropped and flipped, and have nothing to do with the data where a converter folded them into the weights and left
means of 0 and variances of 1.  `match` says the dense network's norms in terms of what they see on the calibration
images first (`anchor`, which changes no output); renewed after pruning, every channel then has the mean and the spread
there that it had in the dense network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ranks
from .sites import feed, quiet
from .walk import _hooks

CHOICES = ("keep", "renew", "match", "auto")


def norms(model: nn.Module) -> list[_BatchNorm]:
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [m for m in found if m.track_running_stats and m.running_mean is not None]


def snapshot(found: list[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    return [(m.running_mean.clone(), m.running_var.clone()) for m in found]  # type: ignore[union-attr]


def restore(found: list[_BatchNorm], saved: list[tuple[Tensor, Tensor]]) -> None:
    for m, (mean, var) in zip(found, saved, strict=True):
        m.running_mean.copy_(mean)  # type: ignore[union-attr]
        m.running_var.copy_(var)  # type: ignore[union-attr]


def scaled(model: nn.Module) -> bool:
    """Whether there are norms, all with a scale and a shift, so that `anchor` works."""
    found = norms(model)
    return bool(found) and all(m.weight is not None for m in found)


def anchor(model: nn.Module, batches: list[Any]) -> int:
    """Write every norm with the statistics of its inputs on the calibration images, scale and shift making up for it.

    The model computes what it did.  Means and variances are averages over the batches of all ranks, as in `renew`.
    Returns how many there are; raises ValueError for a norm without scale and shift.
    """
    known = set(norms(model))
    found = {name: m for name, m in model.named_modules() if m in known}
    for name, m in found.items():
        if m.weight is None:
            raise ValueError(f"batchnorm match: {name} has no scale and shift to make up with; use renew or keep.")
    sums = [torch.zeros(2, m.num_features, dtype=torch.float64, device=m.weight.device) for m in found.values()]

    def note(at: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1)  # (channels, images and positions)
            sums[at] += torch.stack([x.mean(1), x.var(1)])

        return hook

    hooks = [m.register_forward_pre_hook(note(i)) for i, m in enumerate(found.values())]
    with _hooks(*hooks), quiet(model), torch.no_grad():
        for batch in batches:
            feed(model, batch)
    ranks.sum_(sums)
    calls = ranks.agree(float(len(batches)))
    with torch.no_grad():
        for m, total in zip(found.values(), sums, strict=True):
            assert m.running_mean is not None and m.running_var is not None
            mean, var = total / calls
            scale = m.weight.double() / (m.running_var.double() + m.eps).sqrt()
            m.bias.add_(scale * (mean - m.running_mean.double()))
            m.weight.copy_(scale * (var + m.eps).sqrt())
            m.running_mean.copy_(mean)
            m.running_var.copy_(var)
    return len(found)


def renew(model: nn.Module, batches: list[Any]) -> int:
    """Set every running mean and variance to the average over the batches of all ranks; returns how many there are.

    Every norm sees the outputs of norms that use the statistics of the batch, as in training.
    """
    found = norms(model)
    if not found:
        return 0
    before = [(m.momentum, m.training, m.num_batches_tracked.clone()) for m in found]  # type: ignore[union-attr]
    with quiet(model), torch.no_grad():
        for m in found:
            m.momentum, m.training = None, True  # None: a plain average over the batches
            m.reset_running_stats()
        for batch in batches:
            feed(model, batch)
        calls = ranks.agree(float(len(batches)))
        for m in found:  # each process averaged over its own batches
            for statistic in (m.running_mean, m.running_var):
                statistic.mul_(len(batches) / calls)  # type: ignore[union-attr]
                ranks.sum_([statistic])  # type: ignore[list-item]
        for m, (momentum, _, tracked) in zip(found, before, strict=True):
            m.momentum, m.training = momentum, False
            m.num_batches_tracked.copy_(tracked)  # type: ignore[union-attr]
    for m, (_, training, _) in zip(found, before, strict=True):
        m.training = training
    return len(found)
