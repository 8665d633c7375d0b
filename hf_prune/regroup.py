"""Which columns should share a group of m, so that an n:m mask loses as little as possible.

The order of the columns decides what an n:m mask may keep: four large weights in one group cost two of them.  Channel
permutations for 2:4 are from Pool and Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021), who try every swap of
two columns one after another.  Here all swaps of one column per group are valued at once: with t the n-th largest score
among the other m - 1 columns of a group, a column of scores s adds max(s - t, 0) to what the group keeps, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order(
    score: Tensor,  # (problems, rows, columns), not negative
    n: int,
    m: int,
    *,
    rounds: int = 100,
    seed: int = 0,
) -> Tensor:
    """An order of the columns, (problems, columns), whose n:m mask keeps no less of the score than the given one.

    Each round takes one column out of every group, values all exchanges between two groups, and makes those that are
    the best for both.  Exchanges of different groups do not touch each other, so every round gains their sum.
    """
    problems, rows, columns = score.shape
    groups = columns // m
    place = torch.arange(columns, device=score.device).expand(problems, -1).reshape(problems, groups, m).clone()
    if groups < 2:
        return place.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    by_column = score.mT.contiguous()  # (problems, columns, rows)
    every = torch.arange(groups, device=score.device)
    idle = 0
    for _ in range(rounds):
        if idle == 2 * m * m:  # every pair of places had its turn, and stayed
            break
        idle += 1
        slot = torch.randint(m, (problems, groups, 1), generator=generator).to(score.device)
        out = place.gather(2, slot).squeeze(2)  # (problems, groups) column taken out of each group
        others = (slot + torch.arange(1, m, device=score.device)) % m
        rest = place.gather(2, others)  # (problems, groups, m - 1)
        taken = _columns(by_column, out)  # (problems, groups, rows)
        left = _columns(by_column, rest.flatten(1)).unflatten(1, (groups, m - 1))
        threshold = left.topk(n, dim=2).values[:, :, -1]  # (problems, groups, rows)
        worth = _worth(taken, threshold)  # (problems, column taken from group i, put into group j)
        own = worth.diagonal(dim1=1, dim2=2)
        gain = worth + worth.mT - own[:, :, None] - own[:, None, :]
        floor = 1e-6 * own.mean(1)  # below it is rounding
        gain.diagonal(dim1=1, dim2=2).fill_(0)
        for _ in range(4):  # each pass makes the exchanges that both sides like best, then takes these groups out
            best, partner = gain.max(2)
            mutual = (partner.gather(1, partner) == every) & (best > floor[:, None])
            if not bool(mutual.any()):
                break
            idle = 0
            source = torch.where(mutual, partner, every)
            place = place.scatter(2, slot, out.gather(1, source).unsqueeze(2))
            out = place.gather(2, slot).squeeze(2)
            gain = gain.masked_fill(mutual[:, :, None] | mutual[:, None, :], 0)
    return place.flatten(1)


def _columns(by_column: Tensor, index: Tensor) -> Tensor:
    return by_column.gather(1, index[:, :, None].expand(-1, -1, by_column.shape[2]))


def _worth(taken: Tensor, threshold: Tensor) -> Tensor:
    """worth[p, i, j] = sum over rows of max(taken[p, i] - threshold[p, j], 0); max(a, 0) is (|a| + a) / 2."""
    distance = torch.cdist(taken, threshold, p=1.0)
    return (distance + taken.sum(2)[:, :, None] - threshold.sum(2)[:, None, :]) / 2
