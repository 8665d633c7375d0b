"""What a unit's modules returned is used again only where nothing it depends on has changed."""

import copy

import pytest
import torch
from torch import nn

from hf_prune import collect, loop
from hf_prune.junction import Additions
from hf_prune.loop import Recipe, prune
from hf_prune.recall import Recall, held

WIDTH = 8


class Twice(nn.Module):
    """One activation module that is called three times, the first time within another module."""

    def __init__(self, act):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(WIDTH, WIDTH), act)
        self.second, self.third, self.act = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), act

    def forward(self, x):
        return x + self.act(self.third(self.act(self.second(self.first(x)))))


class Stashes(nn.Module):
    """Leaves in an attribute what the unit reads later."""

    def __init__(self):
        super().__init__()
        self.a, self.seen = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x):
        self.seen = x.mean(1, keepdim=True)
        return self.a(x)


class Writes(nn.Module):
    """Changes its argument, and returns something else."""

    def forward(self, x):
        x.mul_(2.0)
        return x.sum(-1, keepdim=True)


class Stashing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.b, self.c = Stashes(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.b(self.inner(x).relu())
        return x + self.c((h + self.inner.seen).relu())


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.act, self.writes, self.keep = nn.ReLU(inplace=True), Writes(), nn.Identity()

    def forward(self, x):
        y = self.keep(self.a(x))
        more = self.writes(y)
        y = self.act(y)
        z = self.b(y + more)
        z += y
        return x + self.c(z)


class Adding(nn.Module):
    """Additions within a module that is recalled, before the one that joins the residual stream."""

    def __init__(self):
        super().__init__()
        self.inner = Twice(nn.GELU())
        self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.b(self.inner(x).relu())
        return x + self.c(x.relu())


class Listed(nn.Module):
    """Modules that hand lists on, and what follows changes them."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return [self.a(x), x]

    def __init__(self):
        super().__init__()
        self.split, self.b, self.c = self.Split(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        parts = self.split(x)
        parts[0] = parts[0].relu()
        parts.append(self.b(parts[0]))
        return x + self.c(sum(parts))


BLOCKS = {
    "an activation called thrice": lambda: Twice(nn.GELU()),
    "the same, in place": lambda: Twice(nn.ReLU(inplace=True)),
    "attributes": Stashing,
    "writes into arguments": Writing,
    "additions within": Adding,
    "lists": Listed,
}


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def pruned(model, monkeypatch, room, recipe=None):
    """The weights after a run, and how often a linear layer of the blocks computed."""
    calls = []
    real = nn.functional.linear
    with monkeypatch.context() as m:
        m.setattr(collect, "KEPT", room)
        m.setattr(nn.functional, "linear", lambda *a: calls.append(1) or real(*a))
        generator = torch.Generator().manual_seed(3)
        batches = [torch.randn(6, 7, 5, generator=generator) for _ in range(4)]
        prune(model, batches, recipe or Recipe(nm="2:4", target={"importance": 0.0}))
    return {n: t.clone() for n, t in model.state_dict().items()}, len(calls)


@pytest.mark.parametrize("block", BLOCKS)
def test_no_bit_of_the_result_depends_on_what_was_recalled(block, monkeypatch):
    torch.manual_seed(0)
    model = Net(BLOCKS[block]).eval()
    results = [pruned(copy.deepcopy(model), monkeypatch, room) for room in (0, 2**20, 5000)]
    (plain, often), (recalled, seldom), (some, between) = results
    for name, value in plain.items():
        assert torch.equal(value, recalled[name]), name
        assert torch.equal(value, some[name]), name
    assert seldom <= between <= often
    assert seldom < often or block == "writes into arguments", "there the first layer's output is written into"
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_second_pass_over_a_block_starts_anew(monkeypatch):
    """`refine` changes all weights of a block after its last stage."""
    torch.manual_seed(0)
    model = Net(lambda: Twice(nn.GELU())).eval()
    refine = {"method": "snows", "cg": 4}
    recipe = Recipe(nm="2:4", target={"importance": 0.0}, refine=refine)
    plain, _ = pruned(copy.deepcopy(model), monkeypatch, 0, recipe)
    recalled, _ = pruned(copy.deepcopy(model), monkeypatch, 2**20, recipe)
    assert all(torch.equal(plain[n], recalled[n]) for n in plain)


def test_what_a_module_returned_is_kept_without_what_it_was_made_of():
    torch.manual_seed(0)
    block, x, calls = Adding().eval(), torch.randn(2, 3, WIDTH), {}
    with torch.no_grad(), Additions() as tape, Recall(block, calls, tape) as recall:
        recall.open = True
        first = block(x)
    assert [m for m, _ in calls] == [block.inner, block.b, block.c], "inner's own modules are not kept beside it"
    assert held(calls) == 3 * x.numel() * 4
    with torch.no_grad(), Additions() as again, Recall(block, calls, again):
        block.inner.third.weight.zero_()  # not read again
        assert torch.equal(block(x), first)
    assert again.count == tape.count == 3, "additions that were not made again are counted all the same"


def test_a_returned_tensor_that_was_written_into_is_made_again():
    block, x, calls = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval(), torch.randn(2, WIDTH), {}
    with torch.no_grad():
        with Recall(block, calls) as recall:
            recall.open = True
            first = block(x)
        right = first.clone()
        first.add_(1)
        with Recall(block, calls):
            assert torch.equal(block(x), right)


def test_nothing_is_kept_where_there_is_a_budget_of_memory(monkeypatch):
    """Rows of importance and streams have it already."""
    torch.manual_seed(0)
    seen = []
    real = collect.Stage.add
    monkeypatch.setattr(collect.Stage, "add", lambda *a, **k: seen.append(k.get("keep", False)) or real(*a, **k))
    for memory, expected in ((None, True), ("8GiB", False)):
        loop.prune(Net(lambda: Twice(nn.GELU())).eval(), [torch.randn(4, 7, 5)], Recipe(nm="2:4"), host_memory=memory)
        assert any(seen[-2:]) == expected  # of the run; before it memory is measured
        seen.clear()
