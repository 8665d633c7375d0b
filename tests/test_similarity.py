"""Similarity by depth against the definitions, in float64."""

import copy
import itertools

import pytest
import torch

from hf_prune import similarity


def features(n: int = 6, p: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hsic_by_hand(k: torch.Tensor, ell: torch.Tensor) -> float:
    """The U-statistic over all ordered quadruples of different images (Song et al. 2012, eq. 3)."""
    four = itertools.permutations(range(len(k)), 4)
    return float(torch.stack([k[i, j] * (ell[i, j] + ell[q, r] - 2 * ell[i, q]) for i, j, q, r in four]).mean())


def test_hsic_is_the_u_statistic_over_quadruples() -> None:
    one, other = features(), features(p=3, seed=1)
    expected = hsic_by_hand(one @ one.T, other @ other.T)
    assert float(similarity.hsic(one @ one.T, other @ other.T)) == pytest.approx(expected, rel=1e-10)
    shifted = one + 10.0
    assert float(similarity.hsic(shifted @ shifted.T, other @ other.T)) == pytest.approx(expected, rel=1e-8)


def figures(before: torch.Tensor, after: torch.Tensor) -> dict:
    return similarity._figures(similarity._sums(before, after))


def test_cka_does_not_see_a_rotation_and_sees_unrelated_features() -> None:
    one = features(64, 8)
    turned = one @ torch.linalg.qr(features(8, 8, seed=2))[0] * 3.0
    assert figures(one, turned)["cka"] == pytest.approx(1.0)
    assert abs(figures(one, features(64, 8, seed=3))["cka"]) < 0.2, "debiased: unrelated features score about zero"
    few = figures(one[:3], turned[:3])
    assert few["cka"] is None and few["relative_error"] > 0


def test_error_and_cosine_by_hand() -> None:
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    after = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    found = figures(before, after)
    assert found["relative_error"] == pytest.approx((16 + 1 + 4) / 26)
    assert found["cosine"] == pytest.approx((9 / 15 + 0) / 2)
    assert found["largest"] == pytest.approx((16 + 1) / 26), "of the dense outputs"
    constant = torch.ones(5, 3)
    assert figures(constant, constant)["cka"] is None, "nothing varies, so nothing can be alike"


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


def test_blocks_in_order_and_where_they_depart() -> None:
    dense = torch.nn.Sequential(Block(), Block(), Block(), torch.nn.Linear(8, 3))
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        pruned[1].fc2.weight[:, ::2] = 0.0
    data = [torch.randn(8, 8), torch.randn(5, 8)]
    found = similarity.by_depth(dense, pruned, data)
    assert [row["name"] for row in found] == ["0", "1", "2", "3"]
    assert found[0]["relative_error"] == 0.0 and found[0]["cka"] == pytest.approx(1.0)
    assert all(row["relative_error"] > 0 and row["cka"] < 1 for row in found[1:])
    with torch.no_grad():
        outputs = [[model[:2](x) for x in data] for model in (dense, pruned)]
    error = sum((b - a).square().sum() for a, b in zip(*outputs, strict=True))
    error = error / sum(a.square().sum() for a in outputs[0])
    assert found[1]["relative_error"] == pytest.approx(float(error), rel=1e-5)
    assert not dense[0]._forward_hooks, "no hook is left behind"


def test_channels_in_another_order_leave_what_does_not_see_their_order() -> None:
    dense = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    moved, order = copy.deepcopy(dense), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved[0].weight.copy_(dense[0].weight[order])
        moved[0].bias.copy_(dense[0].bias[order])
        moved[2].weight.copy_(dense[2].weight[:, order])
    first, last = similarity.by_depth(dense, moved, [torch.randn(8, 8)])
    assert first["cka"] == pytest.approx(1.0) and first["relative_error"] > 0.1 and last["relative_error"] < 1e-6
    first, last = similarity.by_depth(dense, moved, [torch.randn(8, 8)], ordered=False)
    assert first["cka"] == pytest.approx(1.0) and first["relative_error"] is first["cosine"] is None
