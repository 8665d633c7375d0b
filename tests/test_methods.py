"""Every mask with every solve on every pattern; K = 0 against the normal equations; SparseGPT, OBS and Wanda against
their formulas by brute force."""

import copy
import itertools

import pytest
import torch
from torch import nn

from hf_prune import methods
from hf_prune.loop import Recipe, prune
from hf_prune.methods import Draft, Problem
from hf_prune.objective import Gram
from hf_prune.pattern import Pattern, allocate

D = torch.float64
MASKS = [m for m in methods.MASKS if methods.evidence(m) in (None, "gram")]
GRAM_SOLVES = [s for s in methods.SOLVES if methods.evidence(s) == "gram"]
PATTERNS = {
    "2:4": Pattern.parse("2:4"),
    "1:4": Pattern.parse("1:4"),
    "3:8": Pattern.parse("3:8"),
    "50% row": Pattern.unstructured(0.5, "row"),
    "70% row": Pattern.unstructured(0.7, "row"),
    "60% layer": Pattern.unstructured(0.6, "layer"),
    "95% layer": Pattern.unstructured(0.95, "layer"),
    "40% model": Pattern.unstructured(0.4, "model"),
}


def gram(groups=2, out=5, inputs=16, samples=60, *, mix=0.0, bias=False, dtype=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=dtype)
    x = torch.randn(groups, samples, inputs, generator=generator, dtype=dtype) @ mixing + 0.3
    g = Gram.zeros(torch.randn(groups, out, inputs, generator=generator, dtype=dtype))
    g.add_inputs(x)
    g.add_corrections(x, 0.2 * torch.randn(groups, samples, out, generator=generator, dtype=dtype))
    g.mix, g.bias = mix, bias
    return g


def counts(pattern, mask):
    g, k = pattern.group(mask)
    return mask.reshape(-1, g).sum(1), k


@pytest.mark.parametrize(("mask", "pattern"), itertools.product(MASKS, PATTERNS))
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
def test_every_mask_and_solve_keeps_exactly_the_pattern(mask, pattern, dtype):
    for mix, bias in ((0.0, False), (0.5, True)):
        evidence = gram(mix=mix, bias=bias, dtype=dtype)
        (chosen,) = allocate(PATTERNS[pattern], [evidence.weight])
        problem = Problem(evidence.weight, chosen, evidence)
        before = copy.deepcopy(problem)
        draft = methods.function("select", mask)(problem)
        kept, k = counts(chosen, draft.mask)
        assert (kept == k).all(), "exactly k of each group, neither fewer nor more"
        assert not draft.weight[~draft.mask].any() and torch.isfinite(draft.weight).all()
        start = copy.deepcopy(draft)
        for solve in GRAM_SOLVES:
            w = methods.function("solve", solve)(problem, draft)
            assert not w[~draft.mask].any() and torch.isfinite(w).all() and w.dtype == dtype
            chosen.verify(w)
        assert torch.equal(draft.weight, start.weight) and torch.equal(draft.mask, start.mask), (
            "a method writes no input"
        )
        assert torch.equal(problem.weight, before.weight) and torch.equal(problem.objective.xx, before.objective.xx)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.head(x)


@pytest.mark.parametrize(("mask", "solve"), itertools.product(MASKS, [None, "least_squares", "snows"]))
def test_every_mask_with_every_solve_through_the_loop(mask, solve):
    """Fewer products than the defaults: what is tested is that they compose."""
    options = {"k": 1, "cg": 2} if solve == "snows" else {}
    for pattern in ({"nm": "2:4"}, {"sparsity": 0.5, "scope": "model"}):
        model = Small()
        recipe = Recipe(**pattern, mask={"method": mask}, solve=solve and {"method": solve, **options})
        report = prune(model, [torch.randn(6, 8), torch.randn(6, 8)], recipe)
        done = [r for r in report.layers if r["pattern"]]
        assert len(done) == 4
        if "nm" in pattern:
            for r in done:
                assert ((model.get_parameter(r["name"]) != 0).reshape(-1, 4).sum(1) <= 2).all()
        kept = sum(int((model.get_parameter(r["name"]) != 0).sum()) for r in done)
        assert kept <= 4 * 8 * 16 // 2 and kept > 4 * 8 * 16 // 4


@pytest.mark.parametrize(("mix", "bias"), itertools.product([0.0, 0.5], [False, True]))
def test_least_squares_solves_the_masked_normal_equations(mix, bias):
    g = gram(mix=mix, bias=bias)
    mask = Pattern.parse("2:4").mask(g.weight.abs())
    draft = Draft(g.weight * mask, mask)
    w = methods.function("solve", "least_squares")(
        Problem(g.weight, Pattern.parse("2:4"), g), draft, ridge=0.0, tolerance=1e-13
    )
    xx, xd, _ = g.moments()
    for i, o in itertools.product(range(2), range(5)):
        s = mask[i, o]
        b = xx[i] @ g.weight[i, o] + mix * xd[i][:, o]
        assert torch.allclose(w[i, o, s], torch.linalg.solve(xx[i][s][:, s], b[s]), rtol=1e-8)
    assert float(g.value(w)) < float(g.value(draft.weight))
    slope = g.gradient(w)[mask].abs().max()
    assert float(slope) < 1e-6 * float(g.gradient(draft.weight)[mask].abs().max())


def test_magnitude_and_wanda_are_their_formulas():
    g = gram(groups=1)
    x_norm = g.xx[0].diagonal().sqrt()
    for name, score in (("magnitude", g.weight.abs()), ("wanda", g.weight.abs() * x_norm)):
        draft = methods.function("select", name)(Problem(g.weight, Pattern.parse("2:4"), g))
        top = score.reshape(-1, 4).topk(2, dim=1).indices
        expected = torch.zeros(score.numel() // 4, 4, dtype=torch.bool).scatter_(1, top, True).view_as(score)
        assert torch.equal(draft.mask, expected)
        assert torch.equal(draft.weight, g.weight * expected), "the kept weights stay as they were"


def test_obs_scores_are_the_exact_cost_of_removing_one_weight():
    """w_j² / [H⁻¹]_jj is what the objective rises by when weight j alone goes and the others are refit."""
    g = gram(groups=1, out=2, inputs=6)
    h = g.normal(0.1)[0][0]
    for row in range(2):
        w = g.weight[0, row]
        rises = []
        for j in range(6):
            rest = [i for i in range(6) if i != j]
            refit = torch.zeros(6, dtype=D)
            refit[rest] = torch.linalg.solve(h[rest][:, rest], (h @ w)[rest])
            rises.append(float((refit - w) @ h @ (refit - w)))
        score = w.square() / torch.linalg.inv(h).diagonal()
        assert torch.tensor(rises, dtype=D).allclose(score)
    draft = methods.function("select", "obs")(Problem(g.weight, Pattern.unstructured(0.5, "row"), g), ridge=0.1)
    score = g.weight.square() / torch.linalg.inv(h).diagonal()
    assert torch.equal(draft.mask, Pattern.unstructured(0.5, "row").mask(score))


def obs_left_to_right(w, h, groups, keep):
    """SparseGPT on one row, with the inverse of what is left computed anew at each column (Algorithm 1)."""
    w, n = w.clone(), len(w)
    mask = torch.ones(n, dtype=torch.bool)
    for j in range(n):
        inverse = torch.linalg.inv(h[j:, j:])
        if j % groups == 0:
            left = []
            for i in range(groups):  # diag of the factor: the pivot of column j + i once all before it are gone
                left.append(torch.linalg.inv(h[j + i :, j + i :])[0, 0])
            score = w[j : j + groups].square() / torch.stack(left)
            mask[j : j + groups] = False
            mask[j + score.topk(keep).indices] = True
        if not mask[j]:
            w[j:] -= w[j] / inverse[0, 0] * inverse[0]
    return w * mask, mask


@pytest.mark.parametrize("block", [4, 8, 128])
def test_sparsegpt_is_obs_from_left_to_right(block):
    g = gram(groups=1, out=3)
    h = g.normal(0.01)[0][0]
    draft = methods.function("select", "sparsegpt")(Problem(g.weight, Pattern.parse("2:4"), g), damp=0.01, block=block)
    for row in range(3):
        w, mask = obs_left_to_right(g.weight[0, row], h, 4, 2)
        assert torch.equal(draft.mask[0, row], mask)
        assert torch.allclose(draft.weight[0, row], w, rtol=1e-8, atol=1e-10)


def test_a_refit_is_better_than_sparsegpt_on_its_own_mask_and_that_better_than_none():
    g = gram()
    problem = Problem(g.weight, Pattern.parse("2:4"), g)
    draft = methods.function("select", "sparsegpt")(problem)
    refit = methods.function("solve", "least_squares")(problem, draft, ridge=0.0, tolerance=1e-12)
    assert g.value(refit) < g.value(draft.weight) < g.value(g.weight * draft.mask)


def refit(g, mask, ridge):
    """What each row's objective, ridge included, rises by above its minimum when only `mask` stays."""
    h, b = g.normal(ridge)
    free = torch.linalg.solve(h, b.mT).mT
    rises = torch.zeros(mask.shape[:2], dtype=D)
    for i, o in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        s, w = mask[i, o], torch.zeros(mask.shape[2], dtype=D)
        w[s] = torch.linalg.solve(h[i][s][:, s], b[i, o, s])
        rises[i, o] = (w - free[i, o]) @ h[i] @ (w - free[i, o])
    return rises


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "40% model"])
def test_exchanges_never_make_a_row_or_a_layer_worse_than_sparsegpt(pattern):
    better = 0
    for seed in range(6):
        g = gram(out=8, mix=0.5, seed=seed)
        problem = Problem(g.weight, PATTERNS[pattern], g)
        before = refit(g, methods.function("select", "sparsegpt")(problem, damp=0.1).mask, 0.1)
        draft = methods.function("select", "exchange")(problem, rounds=8, steps=60)
        after = refit(g, draft.mask, 0.1)
        if "layer" in pattern:
            before, after = before.sum(), after.sum()
        assert (after <= before * (1 + 1e-9)).all()
        better += float(after.sum()) < 0.99 * float(before.sum())
    assert better >= 3, "and in most problems it makes them better"


def test_exchanges_go_on_where_a_layer_has_one_budget():
    """By default as many rounds as 12, and more than the 4 of N:M groups, which they improve on."""
    select = methods.function("select", "exchange")
    better = 0
    for seed in range(6):
        g = gram(groups=1, out=32, inputs=48, samples=200, mix=0.5, seed=seed)
        layer, groups = (Problem(g.weight, Pattern(**p), g) for p in ({"sparsity": 0.7}, {"n": 2, "m": 4}))
        masks = {rounds: select(layer, rounds=rounds, steps=60).mask for rounds in (4, 12, None)}
        assert torch.equal(masks[12], masks[None])
        four, twelve = (float(refit(g, masks[rounds], 0.1).sum()) for rounds in (4, 12))
        assert twelve <= four * (1 + 1e-9)
        better += twelve < 0.999 * four
        assert torch.equal(select(groups).mask, select(groups, rounds=4).mask)
    assert better >= 4


def test_exchanges_come_close_to_the_best_mask_of_all():
    """All 36 masks 2:4 of a row of eight, refit each: the search ends at the best of them in most rows."""
    pairs = list(itertools.combinations(range(4), 2))
    every = torch.zeros(36, 8, dtype=torch.bool)
    for n, (a, b) in enumerate(itertools.product(pairs, pairs)):
        every[n, [*a, b[0] + 4, b[1] + 4]] = True
    best, found, start = [], [], []
    for seed in range(8):
        g = gram(groups=1, out=6, inputs=8, seed=seed)
        problem = Problem(g.weight, Pattern.parse("2:4"), g)
        best.append(torch.stack([refit(g, m.expand(1, 6, 8), 0.1)[0] for m in every]).min(0).values)
        mask = methods.function("select", "exchange")(problem, rounds=12, steps=60).mask
        found.append(refit(g, mask, 0.1)[0])
        start.append(refit(g, methods.function("select", "sparsegpt")(problem, damp=0.1).mask, 0.1)[0])
    best, found, start = torch.cat(best), torch.cat(found), torch.cat(start)
    assert (found >= best * (1 - 1e-9)).all()
    hit, hit_before = (found <= best * (1 + 1e-6)).sum(), (start <= best * (1 + 1e-6)).sum()
    assert hit >= 40 and hit_before <= 30, "of 48 rows"
    assert found.sum() < 1.08 * best.sum() < start.sum()


def test_exchanges_treat_every_row_alike():
    g = gram(out=8)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    turned = Gram(g.weight[:, order], g.xx, g.xd[..., order], g.dd[:, order], g.sx, g.sd[:, order], g.count, mix=g.mix)
    masks = [methods.function("select", "exchange")(Problem(x.weight, Pattern.parse("2:4"), x)).mask
             for x in (g, turned)]  # fmt: skip
    assert torch.equal(masks[0][:, order], masks[1])


def test_unknown_methods_name_the_known_ones():
    with pytest.raises(ValueError, match="no such method: magnitud. Choose one of magnitude, wanda, obs"):
        methods.function("select", "magnitud")
    with pytest.raises(ValueError, match="least_squares"):
        methods.function("solve", "lsq")
