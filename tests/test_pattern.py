"""Patterns: exact counts, N:M groups, ties, scopes, and the messages of patterns that cannot apply."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.pattern import Pattern, allocate, lamp

QUICK = settings(max_examples=60, deadline=None)


@st.composite
def nm_and_score(draw):
    m = draw(st.integers(2, 8))
    n = draw(st.integers(1, m - 1))
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), m * draw(st.integers(1, 4)))
    levels = draw(st.sampled_from([1, 2, 3, 10_000]))  # few levels: many ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return Pattern(n=n, m=m), torch.randint(0, levels, shape, generator=generator).double()


@QUICK
@given(nm_and_score())
def test_every_group_keeps_exactly_n_of_the_best(case):
    pattern, score = case
    mask = pattern.mask(score)
    groups, scores = mask.reshape(-1, pattern.m), score.reshape(-1, pattern.m)
    assert mask.dtype == torch.bool and mask.shape == score.shape
    assert (groups.sum(1) == pattern.n).all()
    worst_kept = scores.masked_fill(~groups, math.inf).amin(1)
    best_dropped = scores.masked_fill(groups, -math.inf).amax(1)
    assert (worst_kept >= best_dropped).all()
    pattern.verify(torch.where(mask, score + 1, 0 * score))


@QUICK
@given(
    st.floats(0.01, 0.99), st.sampled_from(["row", "layer"]), st.integers(1, 3), st.integers(1, 6), st.integers(2, 40),
    st.sampled_from([1, 2, 10_000]), st.integers(0, 100),
)  # fmt: skip
def test_unstructured_counts_are_exact_also_with_ties(sparsity, scope, groups, rows, columns, levels, seed):
    score = torch.randint(0, levels, (groups, rows, columns), generator=torch.Generator().manual_seed(seed)).double()
    mask = Pattern.unstructured(sparsity, scope).mask(score)
    size = columns if scope == "row" else score.numel()
    expected = max(1, math.floor((1 - sparsity) * size + 1e-9))
    assert (mask.reshape(-1, size).sum(1) == expected).all()


@pytest.mark.parametrize(
    ("sparsity", "size", "kept"), [(0.5, 10, 5), (0.7, 10, 3), (0.9, 10, 1), (0.99, 10, 1), (0.3, 10, 7)]
)
def test_a_share_that_is_a_whole_number_is_not_lost_to_rounding(sparsity, size, kept):
    assert int(Pattern.unstructured(sparsity).mask(torch.arange(size).double()).sum()) == kept


@QUICK
@given(
    st.floats(0.02, 0.98), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=6),
    st.sampled_from([2, 3, 10_000]), st.integers(0, 100),
)  # fmt: skip
def test_scope_model_keeps_exactly_the_models_share_however_many_ties(sparsity, shapes, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randint(1, levels + 1, (1, *shape), generator=generator).double() for shape in shapes]
    total = sum(w.numel() for w in weights)
    keep = max(1, math.floor((1 - sparsity) * total + 1e-9))
    if keep < len(weights):
        with pytest.raises(ValueError, match=f"leaves {keep} weights for {len(weights)} layers"):
            allocate(Pattern.unstructured(sparsity, "model"), weights)
        return
    patterns = allocate(Pattern.unstructured(sparsity, "model"), weights)
    masks = [p.mask(w.abs()) for p, w in zip(patterns, weights, strict=True)]
    assert min(p.budget for p in patterns) >= 1, "no layer is cut off"
    assert sum(p.budget for p in patterns) == sum(int(m.sum()) for m in masks) == keep
    kept = torch.cat([w[m] for w, m in zip(weights, masks, strict=True)])
    dropped = torch.cat([w[~m] for w, m in zip(weights, masks, strict=True)])
    if min(p.budget for p in patterns) > 1:  # no layer was saved from losing everything
        assert kept.min() >= dropped.max(), "one threshold serves the whole model"


def test_lamp_is_its_definition_and_one_threshold_serves_the_model():
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(1, *shape, generator=generator).double() for scale, shape in
               ((1.0, (4, 6)), (0.01, (5, 8)), (3.0, (2, 3)))]  # fmt: skip
    scores = []
    for w in weights:
        flat = w.flatten()
        scores.append(torch.stack([u * u / sum(v * v for v in flat if v * v >= u * u) for u in flat]))
        torch.testing.assert_close(lamp(w).flatten(), scores[-1])
        assert float(scores[-1].max()) == 1.0, "the largest weight of a layer is the last to go"
    keep = math.floor(0.3 * 70 + 1e-9)
    threshold = torch.cat(scores).sort(descending=True).values[keep - 1]
    patterns = allocate(Pattern.unstructured(0.7, "model", "lamp"), weights)
    assert [p.budget for p in patterns] == [int((s >= threshold).sum()) for s in scores]
    plain = allocate(Pattern.unstructured(0.7, "model"), weights)
    assert plain[1].budget == 1 < patterns[1].budget, "scale does not decide"


def test_erk_follows_its_formula_and_caps_at_dense():
    shapes, kernels = [(1, 64, 9 * 32), (1, 10, 64), (32, 1, 9), (1, 128, 64)], [(3, 3), (), (3, 3), (1, 1)]
    weights = [torch.randn(s) for s in shapes]
    sizes = [w.numel() for w in weights]
    raw = [(32 + 64 + 6) / (64 * 32 * 9), (64 + 10) / 640, (1 + 32 + 6) / 288, (64 + 128 + 2) / 8192]
    for sparsity in (0.5, 0.8, 0.95):
        budgets = [p.budget for p in allocate(Pattern.unstructured(sparsity, "model", "erk"), weights, kernels)]
        assert sum(budgets) == math.floor((1 - sparsity) * sum(sizes) + 1e-9)
        free = [i for i, (b, s) in enumerate(zip(budgets, sizes, strict=True)) if b < s]
        shares = [budgets[i] / sizes[i] / raw[i] for i in free]
        assert max(shares) / min(shares) < 1.02, "densities are proportional to the formula"
        assert all(b <= s for b, s in zip(budgets, sizes, strict=True))
    assert len(free) == 4, "at 95 % nothing is capped"


def test_an_allocation_without_a_model_is_refused():
    with pytest.raises(ValueError, match="choose one of magnitude, lamp, erk"):
        Pattern.unstructured(0.5, "model", "even")
    with pytest.raises(ValueError, match="Add --sparsity S and --scope model"):
        Pattern.unstructured(0.5, "layer", "lamp")


def test_nan_and_infinite_scores_are_refused():
    for bad in (math.nan, math.inf):
        score = torch.ones(1, 2, 4)
        score[0, 1, 2] = bad
        with pytest.raises(ValueError, match="score is not finite"):
            Pattern.parse("2:4").mask(score)


def test_verify_names_what_is_wrong():
    pattern = Pattern.parse("2:4")
    pattern.verify(torch.tensor([[[1.0, 0, 2, 0], [0, 0, 0, 3]]]))  # fewer than two is within the pattern
    with pytest.raises(ValueError, match=r"fc1.weight: 1 of 2 groups break the pattern 2:4"):
        pattern.verify(torch.tensor([[[1.0, 1, 2, 0], [0, 0, 0, 3]]]), "fc1.weight")
    with pytest.raises(ValueError, match=r"fc1.weight: holds 1 values that are not finite"):
        pattern.verify(torch.tensor([[[1.0, math.nan, 0, 0]]]), "fc1.weight")


def test_words_and_misfits():
    assert str(Pattern.parse(" 2 : 4 ")) == "2:4"
    assert str(Pattern.unstructured(0.7)) == "70% (layer)"
    assert Pattern.parse("1:4").density == 0.25 and Pattern.unstructured(0.7).density == pytest.approx(0.3)
    assert Pattern.parse("2:4").misfit(16) is None
    assert Pattern.parse("2:4").misfit(197) == "2:4 needs input channels divisible by 4, found 197"
    assert Pattern.unstructured(0.5).misfit(197) is None


@pytest.mark.parametrize("text", ["4", "2:", "a:b", "2-4", "2:4:8", ""])
def test_a_pattern_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="expected N:M"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "0:0"])
def test_n_must_be_less_than_m(text):
    with pytest.raises(ValueError):
        Pattern.parse(text)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_sparsity_lies_between_zero_and_one(sparsity):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Pattern.unstructured(sparsity)


def test_an_unknown_scope():
    with pytest.raises(ValueError, match="row, layer, model"):
        Pattern.unstructured(0.5, "column")
