"""What a solve by conjugate gradients leaves in the report of its layer."""

import torch

from hf_prune import linalg
from hf_prune.loop import Recipe, prune


def test_residuals_are_those_of_the_system() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    h = x.T @ x + torch.eye(12, dtype=torch.float64)
    b = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 12, generator=generator) < 0.5
    with linalg.residuals() as seen:
        for steps in (7, 3):  # the list is of the last solve
            w = linalg.masked_solve(h, b, mask, tolerance=0.0, steps=steps)
    assert len(seen) == 4 and float(seen[0]) == 1.0
    by_hand = ((b - w @ h) * mask).norm() / (b * mask).norm()
    assert torch.allclose(seen[-1], by_hand, rtol=1e-6)
    before = list(seen)
    linalg.masked_solve(h, b, mask)
    assert seen == before, "nothing is kept once it is closed"


def test_layers_report_their_convergence() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(),
                                torch.nn.Linear(16, 4))  # fmt: skip
    batches = [torch.randn(32, 16)]
    found = prune(model, batches, Recipe(nm="2:4"))
    told = [layer["convergence"] for layer in found.layers if layer["pattern"]]
    assert told and all(each["every"] == 1 and each["residuals"][-1] < each["residuals"][0] for each in told)
    none = prune(model, batches, Recipe(nm="1:4", mask={"method": "magnitude"}, solve=None))
    assert not any("convergence" in layer for layer in none.layers)
