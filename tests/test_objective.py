"""Gram against brute force over samples, and the masked solve against one linear system per row; all in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_prune import linalg
from hf_prune.linalg import cholesky, inverse_of, masked_solve, symmetric
from hf_prune.objective import Gram

G, N, O, I = 2, 40, 3, 6  # noqa: E741
D = torch.float64


def problem(bias, mix, weighted, seed=0, batches=3, groups=G):
    """A Gram summed over batches, and the samples it was made of."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=D)

    w = randn(groups, O, I)
    x, d = randn(groups, N, I) + 1.5, 0.3 * randn(groups, N, O) + 0.2
    weight = torch.rand(N, generator=generator, dtype=D) + 0.1 if weighted else None
    gram = Gram.zeros(w)
    for part in torch.arange(N).chunk(batches):
        p = None if weight is None else weight[part]
        gram.add_inputs(x[:, part], p)
        gram.add_corrections(x[:, part], d[:, part], p)
    gram.bias, gram.mix = bias, mix
    return gram, x, d, weight if weighted else torch.ones(N, dtype=D)


def brute(gram, x, d, weight, w):
    """sum of weighted squares of w x + b - (W x + mix d), b at its best where a bias is refit."""
    residual = x @ (w - gram.weight).mT - gram.mix * d
    if gram.bias:
        residual = residual - (weight[:, None] * residual).sum(1, keepdim=True) / weight.sum()
    return (weight[:, None] * residual.square()).sum(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_average_counts_position_by_position(weighted):
    """The second moment of averages and of what lies around them is that of all positions."""
    torch.manual_seed(0)
    positions = torch.randn(N, 7, I, dtype=D) + torch.randn(N, 1, I, dtype=D)
    weight = torch.rand(N, dtype=D) + 0.1 if weighted else None
    gram = Gram.zeros(torch.randn(1, O, I, dtype=D))
    for part in torch.arange(N).chunk(3):
        p = None if weight is None else weight[part]
        gram.add_inputs(positions[part].mean(1)[None], p)
        gram.add_positions(positions[part], p)
    each = torch.ones(N, dtype=D) if weight is None else weight
    expected = sum(each[k] * positions[k].T @ positions[k] / 7 for k in range(N))
    torch.testing.assert_close(gram.xx[0], expected)
    torch.testing.assert_close(gram.sx[0], (each[:, None] * positions.mean(1)).sum(0))
    assert gram.count == pytest.approx(float(each.sum()))


CASES = list(itertools.product([False, True], [0.0, 0.5, 1.0], [False, True]))


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize(("bias", "mix", "weighted"), CASES)
def test_value_gradient_and_product_against_brute_force(bias, mix, weighted, groups):
    gram, x, d, weight = problem(bias, mix, weighted, groups=groups)
    w = gram.weight + 0.5 * torch.randn(groups, O, I, dtype=D)
    assert torch.allclose(gram.rows(w), brute(gram, x, d, weight, w), rtol=1e-10)
    assert torch.allclose(gram.value(w), brute(gram, x, d, weight, w).sum(), rtol=1e-10)
    w_ = w.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(brute(gram, x, d, weight, w_).sum(), w_)
    assert torch.allclose(gram.gradient(w), expected, rtol=1e-9, atol=1e-9)
    v, h = torch.randn(groups, O, I, dtype=D), 1e-4
    difference = (gram.value(w + h * v) - gram.value(w - h * v)) / (2 * h)
    assert torch.allclose((gram.gradient(w) * v).sum(), difference, rtol=1e-7)
    hessian = torch.autograd.functional.hessian(lambda u: brute(gram, x, d, weight, u).sum(), w).view(
        w.numel(), w.numel()
    )
    assert torch.allclose(gram.product(w, v).flatten(), hessian @ v.flatten(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mix", "weighted"), itertools.product([0.0, 0.5], [False, True]))
def test_the_best_bias_is_the_best(mix, weighted):
    gram, x, d, weight = problem(True, mix, weighted)
    w = gram.weight + 0.5 * torch.randn(G, O, I, dtype=D)
    residual = x @ (w - gram.weight).mT - mix * d + gram.best_bias(w)[:, None]
    assert torch.allclose((weight[:, None] * residual.square()).sum((0, 1)).sum(), gram.value(w), rtol=1e-10)
    assert torch.allclose((weight[:, None] * residual).sum(1), torch.zeros(G, O, dtype=D), atol=1e-10)


def test_energy_is_that_of_the_dense_output():
    for bias in (False, True):
        gram, x, _, weight = problem(bias, 0.0, True)
        y = x @ gram.weight.mT
        y = y - (weight[:, None] * y).sum(1, keepdim=True) / weight.sum() if bias else y
        assert torch.allclose(gram.energy(), (weight[:, None] * y.square()).sum())


def test_sums_do_not_depend_on_the_batches_and_add_up():
    one, x, d, weight = problem(True, 0.5, True, batches=1)
    many, *_ = problem(True, 0.5, True, batches=7)
    half = [Gram.zeros(one.weight), Gram.zeros(one.weight)]
    for k, part in enumerate(torch.arange(N).chunk(2)):
        half[k].add_inputs(x[:, part], weight[part])
        half[k].add_corrections(x[:, part], d[:, part], weight[part])
    for other in (many, half[0] + half[1]):
        for name in ("xx", "xd", "dd", "sx", "sd"):
            assert torch.allclose(getattr(other, name), getattr(one, name), rtol=1e-12), name
        assert other.count == pytest.approx(one.count)
        assert other.squares == pytest.approx(float(weight.square().sum()))
    assert one.per_sample() == pytest.approx(I / float(weight.sum() ** 2 / weight.square().sum()))


def test_caution_is_a_larger_ridge():
    gram, *_ = problem(True, 0.5, True)
    for ridge in (0.1, 1e-9):  # the second lies below the floor that no ridge goes under
        for one, other in zip(replace(gram, caution=3.0).normal(ridge), gram.normal(3 * ridge), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("bias", "mix", "ridge"), itertools.product([False, True], [0.0, 0.5], [0.0, 0.1]))
def test_the_masked_normal_equations_give_the_least_squares_solution(bias, mix, ridge):
    """K = 0: on every support the solution is that of the samples, with the ridge towards the dense weights."""
    gram, x, d, weight = problem(bias, mix, True)
    mask = torch.rand(G, O, I) > 0.5
    mask[..., 0] = True
    h, b = gram.normal(ridge)
    w = masked_solve(h, b, mask, tolerance=1e-14)
    assert not w[~mask].any()
    for g, o in itertools.product(range(G), range(O)):
        support = mask[g, o]
        root = weight.sqrt()[:, None]
        a, t = x[g], x[g] @ gram.weight[g, o] + mix * d[g, :, o]
        if bias:
            a = a - (weight[:, None] * a).sum(0) / weight.sum()
            t = t - (weight * t).sum() / weight.sum()
        strength = ridge * (weight[:, None] * a.square()).sum(0).mean()
        rows = torch.cat([root * a, strength.sqrt() * torch.eye(I, dtype=D)])
        right = torch.cat([root[:, 0] * t, strength.sqrt() * gram.weight[g, o]])
        expected = torch.linalg.lstsq(rows[:, support], right[:, None]).solution[:, 0]
        assert torch.allclose(w[g, o][support], expected, rtol=1e-8, atol=1e-9)
        # and nothing near it is better
        assert torch.allclose(
            (rows[:, support].T @ (rows @ w[g, o] - right)), torch.zeros(int(support.sum()), dtype=D), atol=1e-7
        )


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_masked_solve_against_one_system_per_row(condition):
    generator = torch.Generator().manual_seed(1)
    q, _ = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=D))
    h = (q * torch.logspace(0, -torch.log10(torch.tensor(condition)), 24, dtype=D)) @ q.T
    b = torch.randn(5, 24, generator=generator, dtype=D)
    mask = torch.rand(5, 24, generator=generator) > 0.5
    mask[3] = False  # a row that loses everything
    mask[4] = True  # and one that keeps everything
    w = masked_solve(h[None], b[None], mask[None], tolerance=1e-13)[0]
    for row in range(5):
        s = mask[row]
        expected = torch.linalg.solve(h[s][:, s], b[row, s]) if s.any() else b.new_zeros(0)
        assert torch.allclose(w[row, s], expected, rtol=1e-7, atol=1e-9)
    assert not w[~mask].any()


def test_masked_solve_with_a_metric_over_outputs_against_the_whole_system():
    generator = torch.Generator().manual_seed(2)
    a, c = torch.randn(6, 9, generator=generator, dtype=D), torch.randn(4, 9, generator=generator, dtype=D)
    h, metric = a @ a.T + torch.eye(6, dtype=D), c @ c.T + torch.eye(4, dtype=D)
    b = torch.randn(4, 6, generator=generator, dtype=D)
    mask = torch.rand(4, 6, generator=generator) > 0.4
    w = masked_solve(h[None], b[None], mask[None], tolerance=1e-13, metric=metric[None])[0]
    s = mask.flatten()
    whole = torch.kron(metric, h)
    expected = torch.linalg.solve(whole[s][:, s], (metric @ b).flatten()[s])
    assert torch.allclose(w.flatten()[s], expected, rtol=1e-8) and not w[~mask].any()


def test_a_start_changes_nothing_but_the_way():
    gram, *_ = problem(False, 0.5, False)
    h, b = gram.normal(0.1)
    mask = torch.rand(G, O, I) > 0.5
    start = torch.randn(G, O, I, dtype=D)
    kept = start.clone()
    assert torch.allclose(
        masked_solve(h, b, mask, start, 1e-13), masked_solve(h, b, mask, None, 1e-13), rtol=1e-8, atol=1e-9
    )
    assert torch.equal(start, kept), "inputs are not written"


def test_a_singular_gram_names_rank_and_remedy():
    x = torch.randn(4, 2, dtype=D) @ torch.randn(2, 6, dtype=D)
    with pytest.raises(
        ValueError, match=r"Gram matrix is singular \(rank 2 of 6\); give more calibration images or a larger ridge"
    ):
        cholesky(x.T @ x - 1e-9 * torch.eye(6, dtype=D))


@pytest.mark.parametrize("width", [5, 127, 128, 130, 512, 515])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_known_to_be_symmetric_is_the_whole_product(width, groups):
    """The blocks below the diagonal are those above it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 9, width, generator=generator, dtype=torch.float64)
    weighed = x * torch.rand(9, 1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(symmetric(weighed, x), torch.einsum("gsi,gsj->gij", weighed, x))


class Rounding(TorchFunctionMode):
    """A machine whose "medium" products have factors of 8 bits, in the layouts of which `rounds` is true."""

    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dtype == torch.float32:
            if torch.get_float32_matmul_precision() == "medium" and self.rounds(*args):
                args = [t.bfloat16().float() for t in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "rounds",
    [lambda a, b: True, lambda a, b: a.dim() == 3, lambda a, b: not a.is_contiguous()],
    ids=["always", "batches", "transposed"],
)
def test_the_faster_kernel_is_taken_only_where_it_does_not_round(rounds, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Rounding(lambda a, b: False):
        assert linalg.exact.__wrapped__() in ("medium", "highest")
    with Rounding(rounds):
        assert linalg.exact.__wrapped__() == "highest"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert linalg.exact.__wrapped__() == "highest"


def test_exact_products_have_the_precision_of_float32():
    before = torch.get_float32_matmul_precision()
    x = torch.randn(300, 500)
    with linalg.exact_matmul():
        made = x @ x.t()
    exact = x.double() @ x.double().t()
    assert float((made - exact).norm() / exact.norm()) < 2e-6
    assert torch.get_float32_matmul_precision() == before


def test_inverse_of():
    a = torch.randn(2, 6, 9, dtype=D)
    h = a @ a.mT
    assert torch.allclose(inverse_of(h), torch.linalg.inv(h))


@pytest.mark.parametrize("level", [0.0, 1.0, 100.0])
def test_a_constant_input_keeps_the_dense_weights_and_is_exact(level):
    """A learned query or a dead branch: centred, nothing is left but rounding, and the bias makes any mask exact."""
    gram = Gram.zeros(torch.randn(1, O, I))
    x = torch.full((1, 5000, I), level)
    gram.add_inputs(x[:, :2500]), gram.add_inputs(x[:, 2500:])
    gram.bias = True
    mask = torch.rand(1, O, I) > 0.5
    w = masked_solve(*gram.normal(0.1), mask)
    assert torch.allclose(w, gram.weight * mask, atol=1e-3)
    y = x[:, :1] @ w.mT + gram.best_bias(w)[:, None]
    assert torch.allclose(y, x[:, :1] @ gram.weight.mT, rtol=1e-4, atol=1e-4)
    assert 0 <= float(gram.value(w)) <= (float(gram.energy()) if level else 1e-12), "an error in the report is a number"
    with pytest.raises(ValueError, match="constant"):
        gram.normal(0.0)


def test_inputs_that_are_not_finite_are_refused():
    gram = Gram.zeros(torch.randn(1, O, I))
    gram.add_inputs(torch.full((1, 3, I), float("nan")))
    with pytest.raises(ValueError, match="not finite"):
        gram.normal(0.1)
