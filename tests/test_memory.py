"""What a run will hold: counted exactly, and within the stated share of what is measured."""

import pytest
import torch
from torch import nn

from hf_prune import loop, memory
from hf_prune.loop import Recipe, prune

RECIPE = Recipe(nm="2:4", target={"metric": 0.5}, batch_size=4)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.b(self.a(self.norm(x)).relu())


def network(width=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, width), Block(width), Block(width), nn.Linear(width, 5)).eval()


def images(n, tokens=32):
    return [torch.randn(4, tokens, 12, generator=torch.Generator().manual_seed(k)) for k in range(n)]


def test_live_bytes_are_counted_to_the_byte():
    def work():
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000 alive
        a.add_(1)
        view = b[:10]
        del a  # 4000
        c = torch.cat([b, b])  # 12000 alive
        return c, view

    assert memory.live(work) == 12_000


def test_live_bytes_of_a_backward_hold_what_autograd_saved():
    x = torch.randn(100, 50, requires_grad=True)

    def forward(n):
        y = x
        for _ in range(n):
            y = y.sin()
        return y

    few, many = (memory.live(lambda n=n: forward(n).sum().backward()) for n in (2, 12))
    assert many - few >= 9 * 100 * 50 * 4


def chosen(model, recipe=RECIPE):
    return loop.choose(model, images(1)[0][:2], recipe)


def test_what_is_counted_of_a_model():
    model = network()
    found = memory.needs(model, chosen(model), RECIPE)
    assert found.weights == 4 * sum(p.numel() for p in model.parameters())
    assert found.image == 4 * 32 * 12 and found.streams == 2
    block = next(b for b in found.blocks if b.name == "1")
    assert block.stream == 4 * 32 * 64
    assert block.dense == 4 * (2 * 64 * 256 + 256 + 64)
    xx, xd, w = 64 * 64, 64 * 256, 64 * 256
    assert block.stages[0] == 8 * (xx + 64 + xd + 2 * 256) + 4 * w
    assert found.metric == 4 * (64**2 + 2 * (256**2 + 64**2))
    assert found.peak(400, 4) > found.peak(40, 4) and found.peak(400, 4, host=0) == found.peak(40, 4, host=0)


def test_what_a_solve_needs_grows_with_the_square_of_the_width():
    small, large = network(64), network(128)
    a, b = (memory.needs(m, chosen(m), RECIPE).blocks[-1].solves for m in (small, large))
    assert all(3 < y / x < 5 for x, y in zip(a, b, strict=True))


def test_budgets_cut_batches_and_what_waits():
    model = network()
    found = memory.needs(model, chosen(model), RECIPE)
    roomy = memory.limits(model, chosen(model), RECIPE, found.fixed() + 2**30, None)
    assert roomy.images is None and roomy.streams > 2**29
    tight = memory.limits(model, chosen(model), RECIPE, found.fixed() + 4 * found.working(1) + 2**20, None)
    assert tight.images is None or tight.images < RECIPE.batch_size
    note = memory.limits(model, chosen(model), RECIPE, None, 2**30).notes
    assert note == ["--device-memory has no effect on a CPU, whose memory --host-memory limits."]


def test_a_budget_below_what_is_needed_names_it():
    with pytest.raises(ValueError, match="--host-memory 50 MiB: this model needs at least .* with one image at a time"):
        prune(network(), images(2), RECIPE, host_memory="50MiB")


def test_the_plans_line():
    model = network()
    peak, found = memory.predict(model, chosen(model), RECIPE, 64)
    assert memory.line(peak, found, 64).startswith("Memory: about ") and peak >= memory.resident("VmRSS") * 0.5
