"""Where a layer's output joins the residual stream: found through scales, norms and moves, not through gates."""

import pytest
import torch
from torch import nn

from hf_prune import junction, sites


class Residual(nn.Module):
    """x + L(layer(x)) for a map L given as a function of the module and the layer's output."""

    def __init__(self, layer, after, **parts):
        super().__init__()
        self.layer, self.after = layer, after
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return x + self.after(self, self.layer(x))


def look(model, x):
    model = model.double().eval()
    (site,) = [s for s in sites.find(model, x).sites if s.parameter.startswith("layer")]
    with sites.quiet(model):
        return junction.find(lambda: model(x), model.layer, site)


TOKENS = torch.randn(2, 6, 8, dtype=torch.float64)
IMAGE = torch.randn(2, 8, 4, 4, dtype=torch.float64)


def test_a_plain_residual_has_scale_one():
    index, scale = look(Residual(nn.Linear(8, 8), lambda m, y: y), TOKENS)
    assert index == 0 and torch.allclose(scale, torch.ones(8, dtype=torch.float64))


def test_layer_scale_is_measured():
    gamma = torch.rand(8, dtype=torch.float64) + 0.1
    _, scale = look(Residual(nn.Linear(8, 8), lambda m, y: y * gamma), TOKENS)
    assert torch.allclose(scale, gamma, rtol=1e-8)


def test_batch_norm_is_measured_channel_by_channel():
    norm = nn.BatchNorm2d(8).double()
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(-2, 2)
    _, scale = look(Residual(nn.Conv2d(8, 8, 3, padding=1), lambda m, y: m.norm(y), norm=norm), IMAGE)
    assert torch.allclose(scale, (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().detach(), rtol=1e-6)


def test_a_permutation_of_positions_as_in_shifted_windows():
    def windows(m, y):
        y = y.view(2, 4, 4, 8).roll((1, 2), (1, 2))
        return y.reshape(2, 16, 8)

    _, scale = look(Residual(nn.Linear(8, 8), windows), torch.randn(2, 16, 8, dtype=torch.float64))
    assert torch.allclose(scale, torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("after", [
    lambda m, y: y * torch.sigmoid(y),  # gated by itself
    lambda m, y: y.relu(),
    lambda m, y: y @ torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8),  # channels mixed
    lambda m, y: y * torch.rand(2, 6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
], ids=["gate", "relu", "mixing", "position"])  # fmt: skip
def test_no_junction_where_the_way_is_not_a_scaled_permutation(after):
    assert look(Residual(nn.Linear(8, 8), after), TOKENS) is None


def test_no_junction_without_an_addition_and_none_before_the_layer():
    model = Residual(nn.Linear(8, 8), lambda m, y: y)
    model.forward = lambda x: model.layer(x + x.flip(0)).relu()
    assert look(model, TOKENS) is None


def test_the_hook_is_gone_afterwards():
    model = Residual(nn.Linear(8, 8), lambda m, y: y)
    look(model, TOKENS)
    assert not model.layer._forward_hooks
