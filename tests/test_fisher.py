"""The quadratic model of the loss and the methods on it, against closed forms and brute force."""

import copy
import itertools
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import hf_prune
from hf_prune import assets, loop, staged
from hf_prune import recipe as recipes
from hf_prune.fisher import Fisher
from hf_prune.joined import Joined, schedule
from hf_prune.methods import Draft, Problem, cbs, chita, mfac, obc, sparsegpt, woodfisher
from hf_prune.objective import Gram
from hf_prune.pattern import Pattern

PATTERNS = [{"nm": "2:4"}, {"nm": "1:4"}, *({"sparsity": 0.7, "scope": s} for s in ("layer", "row", "model"))]
RECIPES = ["chita", "chita-plus-plus", "obd", "woodfisher", "mfac", "cbs", "alps", "obc"]


def problem(n=7, p=12, sparsity=0.5, nm=None, first=0.0, ridge=0.05, seed=0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(p, generator=g).double()
    fisher = Fisher(torch.randn(n, p, generator=g).double(), weight, [p], first, ridge)
    pattern = Pattern.parse(nm) if nm else Pattern.unstructured(sparsity, "model")
    return Problem(weight, Joined.of(pattern, [(1, 1, p)]), fisher)


def supports(p, pattern):
    """Every mask that the pattern allows and that keeps as much as it may."""
    if pattern.pattern.m:
        n, m = pattern.pattern.n, pattern.pattern.m
        for choice in itertools.product(itertools.combinations(range(m), n), repeat=p // m):
            mask = torch.zeros(p, dtype=torch.bool)
            mask[[g * m + i for g, kept in enumerate(choice) for i in kept]] = True
            yield mask
    else:
        for kept in itertools.combinations(range(p), int(pattern.mask(torch.rand(p)).sum())):
            mask = torch.zeros(p, dtype=torch.bool)
            mask[list(kept)] = True
            yield mask


# ------------------------------------------------------------------------------------------------------- quadratic
@pytest.mark.parametrize("first", [0.0, 0.3])
def test_value_gradient_and_product_agree(first):
    fisher = problem(first=first).objective
    w, v = torch.randn(12).double().requires_grad_(), torch.randn(12).double()
    (g,) = torch.autograd.grad(fisher.value(w), w)
    torch.testing.assert_close(fisher.gradient(w.detach()), g)
    step = (fisher.gradient(w.detach() + v) - fisher.gradient(w.detach()))
    torch.testing.assert_close(fisher.product(w, v), step)


@pytest.mark.parametrize("first", [0.0, 0.3])
@pytest.mark.parametrize("n", [3, 30])  # n x n and primal systems
def test_the_back_solve_is_least_squares(n, first):
    fisher = problem(n=n, p=16, first=first).objective
    mask = torch.rand(16) < 0.5
    root = (fisher.n * fisher.ridge) ** 0.5
    a = torch.cat([fisher.grads, root * torch.eye(16).double()])
    b = torch.cat([fisher.grads @ fisher.weight - first, root * fisher.weight])
    expected = torch.zeros(16).double()
    expected[mask] = torch.linalg.lstsq(a[:, mask], b[:, None]).solution[:, 0]
    torch.testing.assert_close(fisher.refit(mask), expected)


def test_the_back_solve_is_stable_in_float32_at_a_small_ridge():
    g = torch.Generator().manual_seed(0)
    grads, weight, mask = torch.randn(40, 3000, generator=g), torch.randn(3000, generator=g), torch.rand(3000) < 0.5
    exact = Fisher(grads.double(), weight.double(), ridge=1e-7).refit(mask)
    found = Fisher(grads, weight, ridge=1e-7).refit(mask)
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-5


def test_leverages_are_the_diagonal_of_the_inverse():
    fisher = problem().objective
    mask = torch.rand(12) < 0.6
    f = fisher.grads[:, mask].mT @ fisher.grads[:, mask] / fisher.n + fisher.ridge * torch.eye(int(mask.sum())).double()
    torch.testing.assert_close((1 - fisher.leverage(mask, None, mask)) / fisher.ridge, torch.linalg.inv(f).diagonal())


def test_removal_costs_and_insertion_gains_are_exact():
    fisher = problem(first=0.2).objective
    mask = torch.tensor([True, False] * 6)
    w = fisher.refit(mask)
    value, nl = float(fisher.value(w)), fisher.n * fisher.ridge
    cost, gain = chita.costs(fisher, w, mask, None), chita.gains(fisher, w, mask, None)
    for i in range(12):
        other = mask.clone()
        other[i] = ~other[i]
        change = float(fisher.value(fisher.refit(other))) - value
        assert change == pytest.approx(nl / 2 * float(cost[i] if mask[i] else -gain[i]), rel=1e-6)


def test_blocks_never_cross_layers_and_cover_everything():
    fisher = Fisher(torch.randn(2, 1700), torch.randn(1700), [1200, 30, 470])
    blocks = fisher.blocks(500)
    assert [b.start for b in blocks] == [0, 600, 1200, 1230] and blocks[-1].stop == 1700
    assert len(fisher.blocks("layer")) == 3 and len(fisher.blocks(None)) == 1
    with pytest.raises(ValueError, match="expected a number of weights"):
        fisher.blocks("row")


# ----------------------------------------------------------------------------------------------------------- CHITA
@pytest.mark.parametrize("nm", [None, "2:4"])
def test_chita_against_every_support(nm):
    """Never below the optimum, never above magnitude; swaps find the optimum in most cases and come close in all."""
    hits, excess = {"iht": 0, "splice": 0}, {"iht": 0.0, "splice": 0.0}
    for seed in range(6):
        case = problem(p=12, nm=nm, seed=seed)
        best = min(float(case.objective.value(case.objective.refit(m))) for m in supports(12, case.pattern))
        start = float(case.objective.value(chita.select(case, ridge=0.05).weight))
        for support in hits:
            draft = chita.select(case, ridge=0.05, support=support)
            value = float(case.objective.value(draft.weight))
            assert best - 1e-9 <= value <= start * (1 + 1e-9), (support, seed)
            assert int(draft.mask.sum()) == 6
            hits[support] += value <= best * (1 + 1e-9)
            excess[support] += (value - best) / start / 6
    assert hits["splice"] >= 3 and excess["splice"] < 0.1, (hits, excess)
    assert excess["iht"] < 0.5, (hits, excess)


@pytest.mark.parametrize("nm", [None, "2:4"])
def test_the_line_search_against_a_dense_grid(nm):
    for seed in range(5):
        case = problem(p=16, nm=nm, seed=seed)
        fisher, w = case.objective, case.weight * case.pattern.mask(case.weight.abs())
        g = fisher.gradient(w)
        _, found = chita.line_search(fisher, case.pattern, w, g)
        points = (w - t * g for t in torch.logspace(-4, 1, 2000))
        steps = [fisher.value(z * case.pattern.mask(z.abs())) for z in points]
        grid, start = float(min(steps)), float(fisher.value(w))
        assert found <= start
        assert start - found >= 0.8 * (start - grid), (seed, start, found, grid)


# ---------------------------------------------------------------------------------------------------------- family
def test_woodfisher_against_the_explicit_inverse():
    case = problem(n=9, p=12, sparsity=0.5)
    draft = woodfisher.select(case, ridge=0.1, block=4)
    a, w = case.objective.grads, case.weight
    inverse = torch.block_diag(*[torch.linalg.inv(a[:, b].mT @ a[:, b] / 9 + 0.1 * torch.eye(4)) for b in
                                 (slice(0, 4), slice(4, 8), slice(8, 12))])  # fmt: skip
    score = w.square() / inverse.diagonal()
    mask = score >= score.sort(descending=True).values[5]
    assert torch.equal(draft.mask, mask)
    moved = w - inverse @ torch.where(mask, 0.0, w / inverse.diagonal())
    torch.testing.assert_close(draft.weight, moved * mask)


@pytest.mark.parametrize("nm", [None, "2:4"])
def test_mfac_is_woodfisher_without_blocks(nm):
    case = problem(n=9, p=20, nm=nm)
    a, b = mfac.select(case, ridge=0.1), woodfisher.select(case, ridge=0.1, block=None)
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.weight, b.weight)


@pytest.mark.parametrize("nm", [None, "2:4"])
def test_cbs_is_never_worse_than_its_start_and_often_better(nm):
    better = 0
    for seed in range(10):
        case = problem(n=6, p=24, nm=nm, seed=seed)
        fisher = case.objective
        draft = cbs.select(case, ridge=fisher.ridge)
        start, end = cbs.damage(fisher, case.pattern.mask(case.weight.abs())), cbs.damage(fisher, draft.mask)
        assert end <= start
        assert torch.equal(case.pattern.mask(draft.mask.double()), draft.mask)
        better += end < start
    assert better >= 7


def gram(rows=3, columns=8, samples=40, seed=0) -> Problem:
    torch.manual_seed(seed)
    weight = torch.randn(1, rows, columns).double()
    found = Gram.zeros(weight)
    found.add_inputs(torch.randn(1, samples, columns).double() @ torch.randn(columns, columns).double())
    found.mix = 0.0
    return Problem(weight, Pattern.unstructured(0.5, "row"), found)


def greedy(h, w, steps):
    """OBS on one row by definition: try every removal with everything else refit, take the cheapest."""
    gone, losses = [], []
    target = h @ w
    kept = list(range(len(w)))
    for _ in range(steps):
        options = []
        for i in kept:
            rest = [j for j in kept if j != i]
            new = torch.zeros_like(w)
            if rest:
                new[rest] = torch.linalg.solve(h[rest][:, rest], target[rest])
            options.append((float((new - w) @ h @ (new - w)), i, new))
        loss, i, new = min(options, key=lambda o: o[0])
        gone.append(i)
        losses.append(loss)
        kept.remove(i)
    return gone, losses, new


def test_obc_against_the_greedy_definition():
    case = gram()
    h, _ = case.objective.normal(0.01)
    draft = obc.select(case, ridge=0.01)
    for r in range(3):
        gone, _, new = greedy(h[0], case.weight[0, r], 4)
        assert sorted(gone) == (~draft.mask[0, r]).nonzero().flatten().tolist()
        torch.testing.assert_close(draft.weight[0, r], new, rtol=1e-3, atol=1e-4)


def test_obc_ranks_the_increments_of_all_rows():
    case = gram()._replace(pattern=Pattern.unstructured(0.5, "layer"))
    h, _ = case.objective.normal(0.01)
    draft = obc.select(case, ridge=0.01)
    assert int(draft.mask.sum()) == 12
    steps = []
    for r in range(3):
        gone, losses, _ = greedy(h[0], case.weight[0, r], 8)
        rises = torch.tensor([0.0, *losses]).diff()
        steps += [(float(rises[: k + 1].max()), r, gone[k]) for k in range(8)]
    expected = {(r, i) for _, r, i in sorted(steps)[:12]}
    assert {(r, i) for _, r, i in (~draft.mask).nonzero().tolist()} == expected


def test_obc_follows_nm():
    case = gram()._replace(pattern=Pattern.parse("2:4"))
    draft = obc.select(case)
    assert (draft.mask.view(-1, 4).sum(1) == 2).all()


def test_sparsegpt_is_obs_from_left_to_right_on_one_row():
    case = gram(rows=1)
    draft = sparsegpt.select(case, damp=0.01)
    h, _ = case.objective.normal(0.01)
    w = case.weight[0, 0].clone()
    for c in range(8):
        if not draft.mask[0, 0, c]:
            inverse = torch.linalg.inv(h[0][c:, c:])
            w[c:] -= w[c] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(draft.weight[0, 0], w * draft.mask[0, 0], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- patterns and stages
@pytest.mark.parametrize("kind", ["exponential", "linear", "cubic", "ratio"])
def test_schedules_rise_to_the_goal(kind):
    steps = schedule(kind, 15, 0.98, 0.1)
    assert len(steps) == 15 and steps[-1] == 0.98 and steps == sorted(steps) and 0.09 < steps[0] < 0.31
    assert schedule(kind, 1, 0.7) == [0.7]


def test_the_exponential_schedule_halves_its_steps():
    rises = torch.tensor(schedule("exponential", 6, 0.9, 0.1)).diff()
    torch.testing.assert_close(rises[1:] / rises[:-1], torch.full((4,), 0.5))


def test_a_schedule_may_go_slower_and_stay_at_the_goal():
    steps = schedule("exponential", 20, 0.98, 0.5, halvings=4, dwell=0.25)
    assert len(steps) == 20 and steps[0] == 0.5 and steps[13] < 0.98 and steps[14:] == [0.98] * 6
    gaps = 0.98 - torch.tensor(steps[:14])
    assert (gaps > 0).all() and (gaps.diff() < 0).all()


def test_nm_is_reached_by_its_cheapest_removals():
    pattern = Joined.of(Pattern.parse("2:4"), [(1, 2, 8)], 0.25)
    score = torch.rand(16)
    mask, full = pattern.mask(score), Pattern.parse("2:4").mask(score)
    assert int((~mask).sum()) == 4 and bool((mask | ~full).all())
    assert score[~mask].max() <= score[mask & ~full].min()


# -------------------------------------------------------------------------------------------------------- whole runs
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 5),
    ).eval()  # fmt: skip


def data(n=48, labels=True):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 5, (n,), generator=g)
    return [(x[i : i + 16], y[i : i + 16]) if labels else x[i : i + 16] for i in range(0, n, 16)]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_method_follows_every_pattern(name, pattern):
    assert name in assets.names("recipes")
    model = net()
    more = {"stages": 3} if name == "chita-plus-plus" else {}
    report = hf_prune.prune(model, data(), name, **pattern, **more)
    rows = [r for r in report.layers if r["pattern"]]
    kept, total = sum(r["kept"] for r in rows), sum(r["total"] for r in rows)
    goal = (1 - pattern["sparsity"]) if "sparsity" in pattern else int(pattern["nm"][0]) / 4
    assert goal - 0.01 <= kept / total <= goal + 1e-9
    assert all(torch.isfinite(p).all() for p in model.parameters())
    weights = dict(model.named_parameters())
    zeros = torch.cat([weights[r["name"]][weights[r["name"]] == 0] for r in rows])
    assert len(zeros) == total - kept and not torch.signbit(zeros).any()
    assert all(r["weight_norm_ratio"] < 1.5 for r in rows), [(r["name"], r["weight_norm_ratio"]) for r in rows]


@pytest.mark.parametrize(
    ("mask", "solve"),
    [("chita", "least_squares"), ("chita", "snows"), ("obs", "chita"), ("magnitude", "chita"), ("woodfisher", "chita"),
     ("sparsegpt", "none")],
)  # fmt: skip
def test_any_mask_with_any_solve_in_stages(mask, solve):
    model = net()
    report = hf_prune.prune(model, data(labels=False), {"mask": mask, "solve": solve, "stages": 2, "sparsity": 0.6})
    rows = [r for r in report.layers if r["pattern"]]
    assert abs(sum(r["kept"] for r in rows) / sum(r["total"] for r in rows) - 0.4) < 0.01
    assert len(report.notes) == 2 and ("sampled labels" in report.notes[0]) == (mask != "sparsegpt")


def test_a_chita_mask_stays_the_mask_of_another_solve():
    first, second = net(), net()
    hf_prune.prune(first, data(), {"mask": "chita", "solve": "none", "sparsity": 0.6})
    hf_prune.prune(second, data(), {"mask": "chita", "solve": "least_squares", "sparsity": 0.6})
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        if a.dim() > 1:
            assert torch.equal(a != 0, b != 0)


def test_runs_repeat_to_the_bit():
    made = [net(), net()]
    for model in made:
        hf_prune.prune(model, data(), "chita-plus-plus", stages=3, sparsity=0.7)
    first, second = (list(m.state_dict().values()) for m in made)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mask", ["magnitude", "chita", "wanda"])
@pytest.mark.parametrize("allocation", ["lamp", "erk"])
def test_any_mask_takes_the_budgets_of_an_allocation(mask, allocation):
    model = net()
    report = hf_prune.prune(model, data(), {"mask": mask, "solve": "none", "sparsity": 0.8, "scope": "model",
                                            "allocation": allocation, "stages": 2})  # fmt: skip
    rows = [r for r in report.layers if r["pattern"]]
    assert sum(r["kept"] for r in rows) == int(0.2 * sum(r["total"] for r in rows))
    assert all(r["pattern"] == f"80% (model, {allocation})" for r in rows)


def test_the_mean_of_the_last_stages_starts_anew_with_the_support():
    mean = staged.Mean()
    for w in ([5.0, 0.0, 1.0], [1.0, 2.0, 0.0], [3.0, 4.0, 0.0]):
        mean.add(torch.tensor(w))
    assert mean.count == 2 and mean.value().tolist() == [2.0, 3.0, 0.0]
    keys = {"mask": "chita", "solve": "none", "sparsity": 0.7, "scope": "model", "stages": 6}
    way = {"labels": "true", "dwell": 0.7}
    last, averaged = net(), net()
    hf_prune.prune(last, data(), keys | {"fisher": way})
    report = hf_prune.prune(averaged, data(), keys | {"fisher": way | {"average": 0.5}})
    assert report.stages[-1]["averaged"] == 3
    for a, b in zip(last.parameters(), averaged.parameters(), strict=True):
        assert torch.equal(a != 0, b != 0), "the support is that of the last stage"


def test_the_report_says_how_every_stage_was_made():
    report = hf_prune.prune(net(), data(), "chita-plus-plus", stages=2, sparsity=0.7)
    assert [round(s["sparsity"], 3) for s in report.stages] == [0.1, 0.7]
    for stage in report.stages:
        assert stage["labels"] == "true" and stage["rows"] == 38 and stage["first_order"] is False
        assert stage["ridge"] in (1e-3, 1e-2, 1e-1) and stage["held_out_loss"] == stage["ridges"][f"{stage['ridge']:g}"]
        assert "held-out loss" in stage["batchnorm"]
    report = hf_prune.prune(net(), data(labels=False), {"mask": "cbs", "solve": "none", "sparsity": 0.7})
    assert report.stages[0]["labels"] == "sampled" and report.stages[0]["ridge"] == 1e-4


def test_a_null_direction_moves_no_weight():
    """LayerNorm makes the loss blind to a common shift of the rows before it; the refit must not wander along it."""
    model = net()
    mask = {"method": "chita", "ridge": 1e-8}
    report = hf_prune.prune(model, data(), {"mask": mask, "solve": "none", "sparsity": 0.5})
    assert max(r["weight_norm_ratio"] for r in report.layers) < 3


def test_fresh_images_are_asked_for_at_every_stage():
    asked = []

    def draw(stage):
        asked.append(stage)
        return data()

    hf_prune.prune(net(), draw, "chita-plus-plus", stages=3, sparsity=0.7)
    assert asked == [0, 1, 2]


def test_a_stage_may_be_a_gauss_newton_step_on_the_losses_of_the_rows(monkeypatch):
    """e_i is the loss of row i: at no sparsity the refit is the ridge regression that asks each row for its own."""
    seen = []
    monkeypatch.setattr(staged, "Fisher", lambda *a, **k: seen.append(Fisher(*a, **k)) or seen[-1])
    model = net()
    x, y = torch.cat([b[0] for b in data()]), torch.cat([b[1] for b in data()])
    with torch.no_grad():
        dense = F.cross_entropy(model(x), y)
    keys = {"mask": {"method": "chita", "ridge": 0.1}, "solve": "none", "sparsity": 0.001, "scope": "model",
            "prune_stem": True, "prune_head": True}  # fmt: skip
    report = hf_prune.prune(model, data(), keys | {"fisher": {"labels": "true", "minibatch": 2, "first_order": "loss"}})
    assert report.stages[0]["first_order"] == "loss"
    (fisher,) = seen
    torch.testing.assert_close(fisher.first.mean().float(), dense)
    d = fisher.refit(fisher.weight != 0) - fisher.weight
    a = fisher.grads.double()
    k = a @ a.mT + fisher.n * fisher.ridge * torch.eye(len(a))
    torch.testing.assert_close(d.double(), -a.mT @ torch.linalg.solve(k, fisher.first), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert F.cross_entropy(model(x), y) < dense, "a step down the loss"


def test_a_stage_of_dense_labels_is_a_step_towards_the_dense_outputs(monkeypatch):
    """At the second stage the refit is the ridge regression that asks each row for its distance; without labels."""
    seen = []
    monkeypatch.setattr(staged, "Fisher", lambda *a, **k: seen.append(Fisher(*a, **k)) or seen[-1])
    keys = {"mask": {"method": "chita", "ridge": 0.1}, "solve": "none", "sparsity": 0.6, "scope": "model"}
    gap = {}
    for stages in (1, 6):
        for first in (None, False):
            model = net()
            way = {"labels": "dense", "dwell": 1.0, "first_order": first}
            report = hf_prune.prune(model, data(labels=False), keys | {"stages": stages, "fisher": way})
            gap[stages, first] = far(model)
            assert [s["first_order"] for s in report.stages] == ["loss" if first is None else False] * stages
            assert {s["labels"] for s in report.stages} == {"dense"}
    assert gap[6, None] < 0.7 * gap[1, None], gap
    assert gap[6, False] == pytest.approx(gap[1, None], rel=1e-6), "nothing is asked for, nothing moves"
    fisher = seen[3]  # stage 2 of the first run of 6
    assert float(seen[2].first.abs().max()) < 1e-5 < 0.1 < float(fisher.first.abs().max()), "dense when it begins"
    mask = fisher.weight != 0
    a = fisher.grads[:, mask].double()
    k = a @ a.mT + fisher.n * fisher.ridge * torch.eye(len(a))
    step = (fisher.refit(mask) - fisher.weight)[mask].double()
    torch.testing.assert_close(step, -a.mT @ torch.linalg.solve(k, fisher.first), rtol=1e-4, atol=1e-6)


def test_statistics_stand_still_at_the_goal():
    way = {"labels": "dense", "dwell": 0.5}
    keys = {"mask": "chita", "solve": "none", "sparsity": 0.7, "scope": "model", "stages": 6, "fisher": way}
    model, at = net(), []

    def tell(event):
        if event.get("text", "").startswith("stage"):
            at.append(model[1].running_mean.clone())

    report = loop.prune(model, data(), recipes.load(keys | {"batchnorm": "renew"}), progress=tell)
    assert ["re-estimated" in s["batchnorm"] for s in report.stages] == [True] * 3 + [False] * 3
    assert not torch.equal(at[0], at[1]) and torch.equal(at[3], model[1].running_mean)


def test_the_ridge_is_chosen_on_images_kept_out_of_the_gradients():
    (train, _), (held, _) = staged.hold_out([torch.arange(10.0)[:, None]], [None], 0.2, 0)
    assert sorted(torch.cat(train + held).flatten().tolist()) == list(range(10)) and len(torch.cat(held)) == 2
    report = hf_prune.prune(net(), data(), "chita", sparsity=0.6)
    assert "by held-out loss" in report.notes[0] and "batch" in report.notes[0]


def test_renewed_statistics_undo_a_shift():
    model = net()
    before = [p.clone() for p in (model[1].running_mean, model[1].running_var)]
    images = [b[0] for b in data(480)]
    from hf_prune import batchnorm

    assert batchnorm.renew(model, images) == 2
    y = model[0](torch.cat(images))
    torch.testing.assert_close(model[1].running_mean, y.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model[1].running_var, y.var((0, 2, 3)), rtol=2e-2, atol=1e-3)
    assert not torch.equal(before[0], model[1].running_mean) and not model[1].training and model[1].momentum == 0.1


def folded(model):
    """The same function with the norms' scale in the weights and their shift alone in the norms."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for product, norm in ((model[0], model[1]), (model[3], model[4])):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            product.weight.mul_(scale.view(-1, *[1] * (product.weight.dim() - 1)))
            norm.bias.sub_(scale * norm.running_mean)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
    return model


def test_norms_said_in_other_statistics_compute_the_same():
    from hf_prune import batchnorm

    model = net().eval()
    images = [b[0] for b in data(480)]
    for each in (model, folded(model)):
        expected = each(images[0])
        assert batchnorm.anchor(each, images) == 2
        torch.testing.assert_close(each(images[0]), expected, rtol=1e-4, atol=1e-4)
        y = each[0](torch.cat(images))
        torch.testing.assert_close(each[1].running_mean, y.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        batchnorm.renew(each, images)  # nothing was pruned: nothing is there to mend
        torch.testing.assert_close(each(images[0]), expected, rtol=5e-2, atol=5e-2)
    model[1] = nn.BatchNorm2d(8, affine=False)
    with pytest.raises(ValueError, match="1 has no scale and shift"):
        batchnorm.anchor(model, images)


def test_matched_statistics_do_not_care_where_the_scale_is():
    from hf_prune import batchnorm

    keys = {"mask": "magnitude", "solve": "none", "sparsity": 0.6, "scope": "row", "prune_stem": True}
    x = data(480)[0][0]
    outputs = {}

    def trained():
        model = net()
        batchnorm.renew(model, [b[0] for b in data(480)])  # as if from training
        return model

    for how in ("renew", "match"):
        for kind, model in (("plain", trained()), ("folded", folded(trained()))):
            hf_prune.prune(model, data(480), keys | {"batchnorm": how})
            outputs[how, kind] = model.eval()(x)
    torch.testing.assert_close(outputs["match", "plain"], outputs["match", "folded"], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outputs["renew", "plain"], outputs["renew", "folded"], rtol=0.1, atol=0.1)
    dense = trained()(x)
    assert (outputs["match", "folded"] - dense).norm() < (outputs["renew", "folded"] - dense).norm()


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"fisher": {"label": "true"}}, "fisher has no option 'label'"),
        ({"fisher": {"labels": "real"}}, "choose one of auto, true, sampled, projected, dense"),
        ({"schedule": "steep"}, "choose one of exponential, linear, cubic, ratio"),
        ({"batchnorm": "no"}, "choose one of keep, renew, match, auto"),
        ({"stages": 0}, "expected a whole number of at least 1"),
        ({"mask": {"method": "chita", "support": "best"}}, "choose one of magnitude, iht, cost, splice"),
        ({"mask": "chita", "refine": "snows"}, "refine works on layer-wise solves"),
        ({"mask": "obd", "solve": "none", "fisher": {"first_order": True, "labels": "sampled"}}, "needs labelled"),
        ({"fisher": {"first_order": True, "labels": "dense"}}, "with labels dense use loss or false"),
    ],
)
def test_mistakes_are_explained(keys, part):
    with pytest.raises(ValueError, match=part.replace("'", ".")):
        hf_prune.prune(net(), data(), {"sparsity": 0.5, **keys})


def far(model):
    """Distance to the dense outputs, over their norm."""
    x = torch.cat(data(labels=False))
    with torch.no_grad():
        dense = net()(x)
        return float((model(x) - dense).norm() / dense.norm())


def one_rank(rank, size, port, folder, recipe):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    for name, keys in recipe.items():
        model = net()
        hf_prune.prune(model, data()[rank::size], keys)
        torch.save(model.state_dict(), f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


RANKED = {
    name: {"mask": name, "solve": "none", "sparsity": 0.6, "scope": "model", "fisher": {"labels": "true"}}
    for name in ("chita", "obd", "woodfisher", "mfac", "cbs")
} | {
    f"chita, {support}": {"mask": {"method": "chita", "support": support, "ridge": 0.1}, "solve": "none",
                          "sparsity": 0.6, "batchnorm": "renew", "fisher": {"labels": "true"}}
    for support in ("iht", "cost")
}  # fmt: skip

DENSE = {"mask": {"method": "chita", "ridge": 0.1}, "solve": "none", "sparsity": 0.6, "scope": "model", "stages": 4,
         "batchnorm": "renew", "fisher": {"labels": "dense", "dwell": 0.7}}  # fmt: skip


def test_two_ranks_give_the_same_model_as_one(tmp_path):
    """Uneven shares of the images, two batches and one: the rows of A meet in another order, and nothing else."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (2, port, str(tmp_path), RANKED | {"dense": DENSE}), nprocs=2)
    ranked, alone, magnitude = net(), net(), net()  # the directions are drawn: others on two ranks, and no worse
    first, second = (torch.load(tmp_path / f"dense-{r}.pt") for r in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first), "dense: the ranks hold different models"
    ranked.load_state_dict(first)
    hf_prune.prune(alone, data(), DENSE)
    hf_prune.prune(magnitude, data(), DENSE | {"mask": "magnitude", "stages": 1})
    assert far(ranked) < 1.2 * far(alone) < 0.7 * far(magnitude), (far(ranked), far(alone), far(magnitude))
    for name, keys in RANKED.items():
        first, second = (torch.load(tmp_path / f"{name}-{r}.pt") for r in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first), f"{name}: the ranks hold different models"
        model = net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        hf_prune.prune(model, data(), keys)
        for key, w in model.state_dict().items():
            assert torch.equal(w != 0, first[key] != 0), f"{name}, {key}: the masks differ"
            torch.testing.assert_close(w, first[key], rtol=1e-3, atol=1e-5, msg=f"{name}, {key}")
        assert any(not torch.equal(w, before[key]) for key, w in model.state_dict().items())


def test_rows_are_shared_as_evenly_as_the_images_allow(monkeypatch):
    options = staged.Options(rows=20, minibatch=2)
    for counts, taken in (([100, 100], [10, 10]), ([8, 100, 100], [4, 8, 8]), ([100], [20])):
        monkeypatch.setattr(staged.ranks, "gather", lambda value, counts=counts: counts)
        assert staged.shares([torch.zeros(4, 1)], options) == taken
    monkeypatch.setattr(staged.ranks, "gather", lambda value: [8, 8])
    with pytest.raises(ValueError, match="20 rows of 2 images need at least 40 images, found 8 . 8"):
        staged.shares([torch.zeros(4, 1)], options)


def test_the_draft_is_zero_off_the_mask():
    draft = chita.select(problem(), ridge=0.1)
    assert isinstance(draft, Draft) and bool((draft.weight[~draft.mask] == 0).all())


@pytest.mark.parametrize(
    "keys",
    [
        {"recipe": "chita-plus-plus", "fisher": {"average": 0.7, "dwell": 0.5}, "batchnorm": "renew"},
        {"recipe": "chita", "fisher": {"labels": "dense", "average": 0.5, "dwell": 0.5}, "batchnorm": "renew"},
        {"recipe": {"mask": "obs", "solve": "least_squares"}, "batchnorm": "auto"},
        {"recipe": "chita", "permute": "none"},
    ],
    ids=["averaged", "dense", "layer-wise", "ridges"],
)
def test_a_run_in_stages_that_stops_goes_on_to_the_same_bits(keys, tmp_path):
    recipe, keys = keys.pop("recipe"), {"stages": 4, "sparsity": 0.7, **keys}
    whole = net()
    chosen = recipes.load(recipe, **keys)
    reference = loop.prune(whole, data(), chosen)
    for stopped in (2, 4, 5):  # before that stage; 5: after all of them

        def tell(event, stopped=stopped):
            last = stopped == 5 and event["event"] == "layer"
            if last or event.get("text", "").startswith(f"stage {stopped} of 4"):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loop.prune(net(), data(), chosen, progress=tell, checkpoint=tmp_path / str(stopped))
        assert len(list((tmp_path / str(stopped)).glob("*.safetensors"))) == 1, "only the last stage is kept"
        model, seen = net(), []
        note = lambda e, s=seen: s.append(e.get("text", ""))  # noqa: E731
        report = loop.prune(model, data(), chosen, progress=note, checkpoint=tmp_path / str(stopped))
        assert sum(text.startswith("stage") for text in seen) == 5 - stopped
        for name, t in whole.state_dict().items():
            assert torch.equal(t, model.state_dict()[name]), f"stopped before stage {stopped}: {name}"
        assert len(report.notes) == len(reference.notes) and [s["sparsity"] for s in report.stages] == [
            s["sparsity"] for s in reference.stages
        ]
