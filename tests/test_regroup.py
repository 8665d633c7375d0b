"""The order of columns: worth of an exchange and best order against brute force."""

import itertools

import pytest
import torch

from hf_prune import regroup


def kept(score, order, n, m):
    taken = score.gather(2, order[:, None, :].expand_as(score))
    return taken.unflatten(-1, (-1, m)).topk(n, dim=-1).values.sum((1, 2, 3))


def best(score, n, m):
    """The most that any order of the columns keeps, by trying every partition into groups of m."""

    def partitions(columns):
        if not columns:
            yield []
            return
        first, *rest = columns
        for others in itertools.combinations(rest, m - 1):
            for more in partitions([c for c in rest if c not in others]):
                yield [first, *others, *more]

    orders = torch.tensor(list(partitions(list(range(score.shape[2])))))
    return kept(score.expand(len(orders), -1, -1), orders, n, m).max()


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 8), (1, 4, 8), (2, 4, 12), (3, 4, 8), (1, 2, 8)])
def test_near_the_best_of_all_orders(n, m, columns):
    generator = torch.Generator().manual_seed(columns + n)
    score = torch.rand(1, 6, columns, generator=generator, dtype=torch.float64).square()
    order = regroup.order(score, n, m, rounds=50)
    assert sorted(order[0].tolist()) == list(range(columns))
    top, first = best(score, n, m), kept(score, torch.arange(columns)[None], n, m)[0]
    found = kept(score, order, n, m)[0]
    assert found >= first
    assert found - first >= 0.8 * (top - first), "exchanges of two columns end near the best order, not in it"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8)])
def test_never_less_and_every_problem_for_itself(n, m):
    score = torch.rand(3, 10, 32, dtype=torch.float64) ** 3
    order = regroup.order(score, n, m, rounds=20)
    assert bool((kept(score, order, n, m) > kept(score, torch.arange(32).expand(3, -1), n, m)).all())
    assert bool((order.sort(1).values == torch.arange(32)).all())
    again = regroup.order(score, n, m, rounds=20)
    assert torch.equal(order, again)


def test_worth_of_a_column_is_what_the_group_keeps_more():
    taken, rest = torch.rand(1, 5, 7, dtype=torch.float64), torch.rand(1, 5, 3, 7, dtype=torch.float64)
    worth = regroup._worth(taken, rest.topk(2, dim=2).values[:, :, -1])
    for i in range(5):
        for j in range(5):
            group = torch.cat([rest[0, j], taken[0, i : i + 1]])
            more = group.topk(2, dim=0).values.sum() - rest[0, j].topk(2, dim=0).values.sum()
            assert abs(float(worth[0, i, j] - more)) < 1e-12


def test_alike_columns_stay_where_they_are():
    assert torch.equal(regroup.order(torch.ones(1, 4, 16), 2, 4), torch.arange(16)[None])
    assert torch.equal(regroup.order(torch.rand(1, 4, 4), 2, 4), torch.arange(4)[None])
