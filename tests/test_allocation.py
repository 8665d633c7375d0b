"""How the layers of a model share its zeros, by what removing a weight does to the output."""

import pytest
import torch
from torch import nn

from hf_prune import allocation, sites
from hf_prune.importance import importance
from hf_prune.loop import Recipe, prune
from hf_prune.pattern import Pattern


class Two(nn.Module):
    """Two linear blocks; the second one's output is scaled, so that its weights matter that much more or less."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.scale * self.b(x)], -1))


def budgets(scale: float, sparsity: float = 0.5) -> tuple[int, int]:
    torch.manual_seed(0)
    model = Two(scale).double()
    images = [torch.randn(40, 16, dtype=torch.float64) for _ in range(2)]
    found = [s for s in sites.find(model, images[0][:2]).sites if s.parameter[0] in "ab"]
    pattern = Pattern.unstructured(sparsity, "model", "influence")
    measured = importance(model, found, images, 0.9, probes=8)
    given = allocation.influence(model, found, images, {s.name: pattern for s in found}, measured)
    return tuple(given[s.name].budget for s in found)


def test_the_budget_is_spent_whole_and_goes_where_the_output_feels_it():
    even, more, less = budgets(1.0), budgets(3.0), budgets(0.3)
    assert sum(even) == sum(more) == sum(less) == 256
    assert more[1] > even[1] > less[1]


def test_no_layer_loses_more_than_the_most():
    assert budgets(1e-4)[1] == round(0.05 * 256)


def test_the_threshold_is_on_the_rise_of_the_output_error():
    """With an orthonormal input and no ridge the score is w² times the exact ||J||² of its row."""
    torch.manual_seed(1)
    model = Two(2.0).double()
    x = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64))[0] * 8
    found = [s for s in sites.find(model, x[:2]).sites if s.parameter[0] in "ab"]
    measured = importance(model, found, [x], 0.0, probes=400)
    exact = torch.cat([model.head.weight[:, :16].square().sum(0), 4 * model.head.weight[:, 16:].square().sum(0)])
    rows = torch.cat([measured.rows[s.name] for s in found])
    assert (rows / exact.detach()).sub(1).abs().max() < 0.15  # Hutchinson's estimate from 64 x 400 directions
    pattern = Pattern.unstructured(0.5, "model", "influence")
    given = allocation.influence(model, found, [x], {s.name: pattern for s in found}, measured, ridge=0.0)
    score = torch.cat([model.a.weight, model.b.weight]).detach().square() * rows[:, None]
    kept = score >= score.flatten().topk(256).values[-1]
    assert [given[s.name].budget for s in found] == [int(kept[:16].sum()), int(kept[16:].sum())]


def test_it_needs_what_it_measures():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    recipe = Recipe(sparsity=0.5, scope="model", allocation="influence", mask={"method": "magnitude"}, solve=None)
    with pytest.raises(ValueError, match="--allocation influence: needs"):
        prune(model, [torch.randn(8, 16)], recipe)
