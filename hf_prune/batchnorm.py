"""Batch-norm statistics of the pruned network: re-estimated on the calibration images, if that helps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import ranks
from .sites import feed, quiet

CHOICES = ("keep", "renew", "auto")


def norms(model: nn.Module) -> list[_BatchNorm]:
    found = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [m for m in found if m.track_running_stats and m.running_mean is not None]


def snapshot(found: list[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    return [(m.running_mean.clone(), m.running_var.clone()) for m in found]  # type: ignore[union-attr]


def restore(found: list[_BatchNorm], saved: list[tuple[Tensor, Tensor]]) -> None:
    for m, (mean, var) in zip(found, saved, strict=True):
        m.running_mean.copy_(mean)  # type: ignore[union-attr]
        m.running_var.copy_(var)  # type: ignore[union-attr]


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
