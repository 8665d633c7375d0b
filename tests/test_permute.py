"""Reordering channels: the dense model computes the same, the mask keeps more, and nothing else changes."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_prune
from hf_prune import permute, recipe
from hf_prune.loop import choose


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(1))


def net(spread=1.0):
    """A network whose hidden units differ in size, as those of trained networks do."""
    model = Net().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.fc2.weight.mul_(torch.rand(32).pow(3 * spread) * 3)
            block.o.weight.mul_(torch.rand(16).pow(3 * spread) * 3)
    return model


def batches(count=4):
    return [torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def wanted(model, nm="2:4"):
    chosen = choose(model, batches(1)[0][:2], recipe.load("magnitude", nm=nm))
    return [s for u in chosen.units for s in u.sites], chosen.patterns


@pytest.mark.parametrize("score", ["magnitude", "activation", "obs"])
@pytest.mark.parametrize("nm", ["2:4", "1:4"])
def test_same_outputs_and_more_kept(score, nm):
    model = net().double()
    data = [b.double() for b in batches()]
    before = model(data[0]).detach()
    old = copy.deepcopy(model)
    where = choose(model, data[0][:2], recipe.load("magnitude", nm=nm))
    every = [s for u in where.units for s in u.sites]
    found = permute.permute(model, data, every, where.patterns, score, data[0][:2])
    assert torch.allclose(model(data[0]), before, atol=1e-12)
    readers = sorted(name for g in found for name, _ in g.readers)
    assert readers == sorted(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("o", "fc2"))
    for g in found:
        assert g.reason is None and g.kept[1] > g.kept[0]
        ((name, _),) = g.readers
        if score == "magnitude":  # what is said of the score is so
            share = []
            for m in (old, model):
                w = m.get_parameter(name).detach().abs()
                n, size = map(int, nm.split(":"))
                share.append(float(w.view(-1, size).topk(n, dim=1).values.sum() / w.sum()))
            assert g.kept == pytest.approx(tuple(share), rel=1e-9)
    # rows moved as a whole: the same rows, in another order, and inside their heads
    for i in range(2):
        a, b = old.blocks[i].fc1.weight, model.blocks[i].fc1.weight
        assert not torch.equal(a, b) and torch.equal(a.sort(0).values, b.sort(0).values)
        for head in (slice(0, 8), slice(8, 16)):
            a, b = old.blocks[i].v.weight[head], model.blocks[i].v.weight[head]
            assert torch.equal(a.sort(0).values, b.sort(0).values)
        assert torch.equal(old.blocks[i].q.weight, model.blocks[i].q.weight)


def test_a_recipe_reorders_and_reports():
    model = net()
    plain, moved = copy.deepcopy(model), copy.deepcopy(model)
    a = hf_prune.prune(plain, batches(), "magnitude", nm="2:4", permute="none")
    b = hf_prune.prune(moved, batches(), "magnitude", nm="2:4", permute="magnitude")
    assert a.permutation is None and b.permutation["score"] == "magnitude"
    assert "4 sets of channels were reordered: the mask keeps" in b.notes[0]
    assert [g["channels"] for g in b.permutation["groups"]] == [8, 32, 8, 32]
    assert all(g["kept_after"] > g["kept_before"] and g["reason"] is None for g in b.permutation["groups"])
    kept = [float(sum(p.abs().sum() for p in m.state_dict().values() if p.dim() == 2)) for m in (plain, moved)]
    assert kept[1] > kept[0]


def test_unstructured_patterns_say_that_order_does_not_matter():
    report = hf_prune.prune(net(), batches(), "magnitude", sparsity=0.5, permute="obs")
    assert report.permutation is None and "only N:M patterns" in report.notes[0]


def test_what_does_not_give_the_same_outputs_is_put_back(monkeypatch):
    """A set of channels that lacks one of its members, as a wrong rule for an operator would make it."""
    find = permute.channels.find

    def wrong(model, batch):
        found = find(model, batch)
        for c in found:
            c.members = [m for m in c.members if m.name != "blocks.0.fc1.bias"]
        return found

    monkeypatch.setattr(permute.channels, "find", wrong)
    model = net()
    old = copy.deepcopy(model.state_dict())
    every, patterns = wanted(model)
    found = permute.permute(model, batches(), every, patterns, "magnitude", batches()[0])
    lost = [g for g in found if g.reason]
    assert [g.readers[0][0] for g in lost] == ["blocks.0.fc2.weight"] and "moved by" in lost[0].reason
    for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
        assert torch.equal(model.state_dict()[f"blocks.0.{name}"], old[f"blocks.0.{name}"])
    assert "fc2.weight: the order of its channels stays, since" in permute.said(found)[1]
    assert permute.told(found, "magnitude")["groups"][1]["kept_after"] == lost[0].kept[0]


def test_the_residual_stream_keeps_its_order():
    model = net()
    every, patterns = wanted(model)
    small = batches(1)[0][:2]
    sizes = {len(g.readers): g.channels.size for g in permute.groups(model, small, every, patterns)}
    assert sizes[8] == 16, "four readers of the stream in each block: found"
    before = model.stem.weight.detach().clone()
    permute.permute(model, batches(), every, patterns, "magnitude", batches()[0])
    assert torch.equal(model.stem.weight, before)


def test_images_for_the_scores_are_drawn_by_content():
    """The same ones however the images are cut into batches, and no more than asked for."""
    images = torch.cat(batches())
    whole = [list(permute.some(parts, 5)) for parts in (images.split(4), images.split(7), list(images.split(1))[::-1])]
    drawn = [sorted(float(image.sum()) for batch in part for image in batch) for part in whole]
    assert drawn[0] == drawn[1] == drawn[2] and len(drawn[0]) == 5
    assert sum(len(batch) for batch in permute.some(batches(), 100)) == 16, "where there are fewer, all of them"


def test_a_run_is_repeated_on_the_dense_model_from_what_was_recorded():
    model, dense = net(), net()
    dense.load_state_dict(model.state_dict())
    every, patterns = wanted(model)
    small = batches(1)[0][:2]
    found = permute.permute(model, batches(), every, patterns, "activation", small)
    told = json.loads(json.dumps(permute.told(found, "activation")))
    moved = {name for name, t in dense.state_dict().items() if not torch.equal(t, model.state_dict()[name])}
    assert moved and permute.again(dense, small, told)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in dense.state_dict().items())
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    for group in told["groups"][1:]:
        del group["order"]
    assert not permute.again(dense, small, told), "early files hold no orders"
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items()), "and nothing was moved"
