"""Per-image gradients against one backward per image, for every kind of layer; what is said where there are none."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_prune import gradients, sites
from hf_prune.gradients import Rows


class Tokens(nn.Module):
    """Attention with the sequence first, a weight used twice, an in-place activation, an unused branch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=False)
        self.up, self.twice = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = self.embed(x).flatten(2).permute(2, 0, 1)  # (tokens, images, channels)
        n = self.norm(t)
        t = t + self.attend(n, n, n, need_weights=False)[0]
        t = F.relu_(self.up(t))
        return self.head(self.twice(F.gelu(self.twice(t))).mean(0))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1, groups=8),
        nn.Hardswish(inplace=True), nn.Conv2d(8, 12, 1), nn.SiLU(inplace=True),
        nn.Conv2d(12, 6, 3, dilation=2, padding=2, groups=2),
        nn.Flatten(2), nn.Conv1d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 14, 5),
    )  # fmt: skip


def slides() -> nn.Module:
    """Kernels, strides, paddings and dilations that differ between height and width."""
    return nn.Sequential(
        nn.Conv2d(3, 5, (3, 1), (2, 1), (1, 0)), nn.ReLU(), nn.Conv2d(5, 7, (2, 3), (1, 3), (0, 2), dilation=(1, 2)),
        nn.GELU(), nn.Conv2d(7, 4, 3, padding=2, dilation=2), nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


MODELS = {"convolutions": convolutions, "tokens": Tokens, "slides": slides}


def one_by_one(model, found, x, y):
    named = dict(model.named_parameters())
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append(torch.cat([s.read(named[s.parameter].grad).flatten() for s in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("minibatch", [1, 3])
def test_equal_to_one_backward_per_image(name, minibatch):
    model = MODELS[name]().eval().double()
    x, y = torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (12,))
    found = sites.find(model, x[:2]).sites
    losses, rows = torch.zeros(12 // minibatch), Rows(minibatch=minibatch)
    a, kind = gradients.per_row(model, found, [x[:8], x[8:]], [y[:8], y[8:]], rows, seed=0, losses=losses)
    with torch.no_grad():
        each = F.cross_entropy(model(x), y, reduction="none").float()
    torch.testing.assert_close(losses, each.view(-1, minibatch).mean(1))
    expected = one_by_one(model, found, x, y).view(12 // minibatch, minibatch, -1).mean(1)
    assert kind == "true" and a.shape == expected.shape
    torch.testing.assert_close(a.double(), expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is not None and p.requires_grad for n, p in model.named_parameters() if "weight" in n)


def test_few_columns_at_a_time_change_nothing(monkeypatch):
    model, x, y = slides().eval(), torch.randn(10, 3, 8, 8), torch.randint(0, 5, (10,))
    found = sites.find(model, x[:2]).sites
    whole, _ = gradients.per_row(model, found, [x], [y], Rows(minibatch=2), seed=0)
    monkeypatch.setattr(gradients, "COLUMNS", 1)
    small, _ = gradients.per_row(model, found, [x], [y], Rows(minibatch=2), seed=0)
    torch.testing.assert_close(small, whole)


def test_bfloat16_gives_nearly_the_same_gradients_and_leaves_the_model_alone():
    model, x, y = convolutions().eval(), torch.randn(10, 3, 8, 8), torch.randint(0, 5, (10,))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = sites.find(model, x[:2]).sites
    exact, _ = gradients.per_row(model, found, [x], [y], Rows(), seed=0)
    low, _ = gradients.per_row(model, found, [x], [y], Rows(dtype="bfloat16"), seed=0)
    assert low.dtype == torch.float32 and 1e-5 < float((low - exact).norm() / exact.norm()) < 0.05
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="fisher.dtype half: choose one of float32, bfloat16"):
        Rows(dtype="half")


def test_chunks_and_spilling_change_nothing():
    model, x, y = convolutions().eval(), torch.randn(10, 3, 8, 8), torch.randint(0, 5, (10,))
    found = sites.find(model, x[:2]).sites
    whole, _ = gradients.per_row(model, found, [x], [y], Rows(), seed=0)
    small, _ = gradients.per_row(model, found, [x], [y], Rows(memory=1e-6, spill=1e-9), seed=0)
    torch.testing.assert_close(small, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sampled", "projected"])
def test_gradients_without_labels_have_the_second_moment_of_the_gauss_newton_matrix(kind):
    z = torch.randn(1, 4).double()
    p = z.softmax(-1)[0]
    draws = gradients.cotangent(z.expand(60000, 4), kind, None, torch.Generator().manual_seed(0))
    expected = p.diag() - p[:, None] * p
    torch.testing.assert_close(draws.mT @ draws / len(draws), expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("minibatch", [1, 3])
@pytest.mark.parametrize("logits", [True, False])
def test_rows_of_dense_labels_against_one_backward_each(minibatch, logits):
    """a_i is the gradient of the outputs along a random direction, e_i their distance to the dense ones along it."""
    model = convolutions().eval().double()
    model = model if logits else nn.Sequential(*list(model)[:-2])
    x = torch.randn(12, 3, 8, 8, dtype=torch.float64)
    found = sites.find(model, x[:2]).sites
    named = dict(model.named_parameters())
    with torch.no_grad():
        dense = model(x) + torch.randn(model(x).shape, dtype=torch.float64)
    directions = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3)).double() / dense[0].numel() ** 0.5
    rows, asks = [], []
    for i in range(12):
        model.zero_grad()
        distance = (directions[i] * (model(x[i : i + 1])[0] - dense[i])).sum()
        distance.backward()
        rows.append(torch.cat([s.read(named[s.parameter].grad).flatten() for s in found]))
        asks.append(distance.detach())
    options, losses = Rows(minibatch=minibatch, labels="dense"), torch.zeros(12 // minibatch, dtype=torch.float64)
    labels = [dense[:8], dense[8:]]
    a, kind = gradients.per_row(model, found, [x[:8], x[8:]], labels, options, seed=3, losses=losses)
    assert kind == "dense"
    torch.testing.assert_close(a.double(), torch.stack(rows).view(len(a), minibatch, -1).mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses, torch.stack(asks).view(len(a), minibatch).mean(1), rtol=1e-4, atol=1e-6)


def test_the_distance_to_the_dense_outputs_is_the_same_in_every_direction():
    z = torch.randn(1, 4).double()
    draws = gradients.cotangent(z.expand(60000, 4), "dense", z, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mT @ draws / len(draws), torch.eye(4).double() / 4, rtol=0.05, atol=0.01)


def test_labels_default_to_what_the_data_allows():
    model, x = convolutions().eval(), torch.randn(4, 3, 8, 8)
    found = sites.find(model, x[:2]).sites
    assert gradients.per_row(model, found, [x], [None], Rows(), seed=0)[1] == "sampled"
    body = nn.Sequential(*list(model)[:-2])  # no logits: (images, channels, positions)
    assert gradients.per_row(body, sites.find(body, x[:2]).sites, [x], [None], Rows(), seed=0)[1] == "projected"
    with pytest.raises(ValueError, match="carry no label"):
        gradients.per_row(model, found, [x], [None], Rows(labels="true"), seed=0)


def test_too_few_images_are_counted():
    model, x = convolutions().eval(), torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match="at least 32 images, found 4"):
        gradients.per_row(model, sites.find(model, x[:2]).sites, [x], [None], Rows(rows=2, minibatch=16), seed=0)


def test_a_weight_that_sees_no_image_is_named():
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.head = nn.Linear(4, 6), nn.Linear(12, 3)
            self.register_buffer("grid", torch.randn(5, 4))

        def forward(self, x):
            return self.head(x.flatten(1) + self.position(self.grid).mean(0).repeat(2))

    model, x = Table().eval(), torch.randn(4, 3, 4)
    with pytest.raises(ValueError, match="position.weight: its inputs belong to no single image"):
        gradients.per_row(model, sites.find(model, x[:2]).sites, [x], [None], Rows(), seed=0)


def test_gradients_are_let_go_without_the_collector():
    """A is the largest thing there is: nothing may wait with it until Python looks for cycles."""
    model, x = convolutions().eval(), torch.randn(4, 3, 8, 8)
    found = sites.find(model, x[:2]).sites
    gc.collect()
    gc.disable()
    try:
        gradients.per_row(model, found, [x], [None], Rows(labels="projected"), seed=0)
        left = [o for o in gc.get_objects() if type(o) is gradients.Watch]
    finally:
        gc.enable()
    assert not left
