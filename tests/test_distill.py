"""The last pass over the whole network: what moves, what stands still, and that it is kept only where it helps."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from nets import Block
from torch import nn

from hf_prune import distill, loop, recipe
from hf_prune.distill import Lesson, Options, hold_out, trained, vary
from hf_prune.loop import Recipe, prune

PLAIN = Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None)
TAUGHT = Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None, distill={"epochs": 6, "lr": 0.02, "images": 8})


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), Block(), Block(), nn.Linear(8, 5))


class Small(nn.Module):
    """A convolutional net with batch norm, between a stem and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                                  nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU())  # fmt: skip
        self.head = nn.Linear(64, 7)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.body(self.stem(x)), 2).flatten(1))


def small():
    torch.manual_seed(1)
    model = Small().eval()
    model.head.weight.data *= 20  # answers that depend on the image
    return model


def photos(n=6, size=4, start=0):
    return [torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(start + k)) for k in range(n)]


def selection(model, batches, chosen):
    return loop.choose(model, batches[0][:2], chosen)


def divergence(model, dense, batches):
    with torch.no_grad():
        each = [F.kl_div(model(x).log_softmax(-1), dense(x).log_softmax(-1), log_target=True, reduction="sum")
                for x in batches]  # fmt: skip
    return float(sum(each)) / sum(map(len, batches))


def test_only_kept_weights_and_the_biases_and_scales_of_pruned_blocks_move():
    dense = small()
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = photos()
    report = prune(model, batches, TAUGHT)
    prune(plain, hold_out(batches, 0.1)[0], PLAIN)
    assert report.distillation["kept"] > 0
    before, after = plain.state_dict(), model.state_dict()
    pruned = {r["name"] for r in report.layers if r["pattern"]}
    assert pruned == {"body.0.weight", "body.3.weight"}
    for name in pruned:
        assert torch.equal(before[name] == 0, after[name] == 0), "the mask stands still"
        assert not torch.signbit(after[name][after[name] == 0]).any()
        assert (before[name] != after[name])[before[name] != 0].float().mean() > 0.9
    for name in ("body.0.bias", "body.1.weight", "body.1.bias", "body.3.bias"):
        assert not torch.equal(before[name], after[name]), name
    same = set(before) - pruned - {n for n in before if n.startswith("body.") and n.endswith((".weight", ".bias"))}
    assert {"stem.weight", "stem.bias", "head.weight", "head.bias", "body.1.running_mean"} <= same
    for name in same:
        assert torch.equal(before[name], after[name]), name
    assert not any(p.grad is not None for p in model.parameters()) and all(p.requires_grad for p in model.parameters())


def test_unseen_images_gain_and_the_report_says_what_was_measured():
    dense = small()
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = photos(20)
    report = prune(model, batches, TAUGHT)
    used, kept_out = hold_out(batches, 0.1)
    prune(plain, used, PLAIN)
    told = report.distillation
    assert told["before"] == pytest.approx(divergence(plain, dense, kept_out), rel=1e-4)
    assert told["after"] == pytest.approx(divergence(model, dense, kept_out), rel=1e-4) == min(told["history"])
    assert told["held_out"] == 8 and len(told["history"]) == 7
    fresh = photos(20, start=1000)
    assert divergence(model, dense, fresh) < 0.8 * divergence(plain, dense, fresh)
    row = next(r for r in report.layers if r["name"] == "body.0.weight")
    ratio = model.body[0].weight.norm() / dense.body[0].weight.norm()
    assert row["weight_norm_ratio"] == pytest.approx(ratio.item(), rel=1e-5)
    assert row["kept"] == int((model.body[0].weight != 0).sum())
    assert "distillation: the loss on 8 images kept out fell" in report.notes[-1]


def test_steps_that_only_harm_are_taken_back_to_the_bit():
    batches = photos()
    model, plain = small(), small()
    wild = Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None, distill={"epochs": 2, "lr": 30.0, "images": 8})
    report = prune(model, batches, wild)
    prune(plain, hold_out(batches, 0.1)[0], PLAIN)
    assert report.distillation["kept"] == 0
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert "did not lower" in report.notes[-1]


def test_the_loss_of_a_batch_is_the_sum_over_its_images_and_zero_for_the_teacher_itself():
    dense = small().double()
    model = copy.deepcopy(dense)
    batches = [x.double() for x in photos()]
    chosen = selection(dense, batches, PLAIN)
    with torch.no_grad():
        model.body[0].weight.mul_(0.7)
    lesson = Lesson(model, dense, chosen.units, batches)
    whole = lesson.loss(batches[0])
    apart = sum(lesson.loss(x[None]) for x in batches[0])
    torch.testing.assert_close(whole, apart)
    assert Lesson(dense, dense, chosen.units, batches).loss(batches[0]).item() == pytest.approx(0, abs=1e-12)
    # by hand: relative distances of the blocks' outputs and of the logits, and the divergence of the answers
    z, zd, outs = model(batches[0]), dense(batches[0]), []
    for unit in chosen.units:
        pair = []
        for m in (model, dense):
            seen = {}
            watched = dict(m.named_modules())[unit.name]
            handle = watched.register_forward_hook(lambda _, a, o, seen=seen: seen.update(o=o.detach()))
            energy = 0.0
            for x in batches:
                m(x)
                energy += float(seen["o"].square().sum())
            m(batches[0])
            handle.remove()
            pair.append((seen["o"], energy / sum(map(len, batches))))
        outs.append((pair[0][0] - pair[1][0]).square().sum() / pair[1][1])
    energy = sum(float(dense(x).detach().square().sum()) for x in batches) / sum(map(len, batches))
    p, q = z.log_softmax(-1), zd.log_softmax(-1)
    expected = sum(outs) / len(outs) + (z - zd).square().sum() / energy + 0.1 * (q.exp() * (q - p)).sum()
    torch.testing.assert_close(whole, expected)


class Counts(nn.Module):
    def forward(self, x):
        return (x > 0).sum(-1)


class Counting(nn.Module):
    """One of its modules returns whole numbers, which nothing can be asked of."""

    def __init__(self):
        super().__init__()
        self.counts, self.body, self.head = Counts(), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x)) * self.counts(x)[:, None]


def test_blocks_that_return_no_real_numbers_take_no_part():
    torch.manual_seed(0)
    dense = Counting()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.body.weight.mul_(0.5)
    batches = [torch.randn(4, 12, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    named = [SimpleNamespace(name=name) for name in ("counts", "body")]
    both, one = (Lesson(model, dense, units, batches).loss(batches[0]) for units in (named, named[1:]))
    torch.testing.assert_close(both, one)
    assert one > 0


def test_the_scale_of_a_layer_does_not_matter():
    """Rescaling one layer against the next is exact for a linear pair; the trained function is then the same one."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(8, 8)
            self.body = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.body(self.stem(x)))

    torch.manual_seed(0)
    one = Pair().double()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.body[0].weight.mul_(30)
        other.body[1].weight.div_(30)
    batches = [torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    chosen = Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None, only=("body.0",),
                    distill={"epochs": 3, "images": 8})  # fmt: skip
    for model in (one, other):
        assert prune(model, batches, chosen).distillation["kept"] == 3
    # Adam's own epsilon is all that tells them apart
    torch.testing.assert_close(one(batches[0]), other(batches[0]), rtol=1e-4, atol=1e-5)


def test_a_fused_weight_moves_only_in_the_rows_that_are_pruned():
    dense = small()
    chosen = selection(dense, photos(), PLAIN)
    (site, *_) = [s for u in chosen.units for s in u.sites]
    with torch.no_grad():
        w = site.read(dense.get_parameter(site.parameter))
        site.write(dense.get_parameter(site.parameter), w * chosen.patterns[site.name].mask(w.abs()))
    scales = trained(dense, [site], chosen.units)
    moved = site.read(scales[site.parameter])
    w = site.read(dense.get_parameter(site.parameter))
    assert torch.equal(moved != 0, w != 0)
    rows = (w.square().sum(-1) / (w != 0).sum(-1)).sqrt()
    torch.testing.assert_close(moved.amax(-1), rows)


def test_images_are_varied_within_what_they_show():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(64, 3, 16, 16, generator=g)
    made = vary(x, g)
    assert made.shape == x.shape and not torch.equal(made, x)
    assert made.min() >= x.min() - 1e-5 and made.max() <= x.max() + 1e-5
    ramp = torch.arange(16.0).expand(64, 1, 16, 16)
    slopes = vary(ramp, g).diff(dim=-1)[:, 0, 8, 3:-3].mean(-1)  # flipped ones fall, crops rise more slowly
    assert (slopes < -0.1).any() and (slopes > 0.1).any() and (slopes.abs() <= 1.001).all()
    pair = {"pixel_values": x, "pixel_mask": torch.ones(64, 16, 16)}
    assert vary(pair, g) is pair
    tokens = torch.randn(4, 6, 12)
    assert vary(tokens, g) is tokens
    one = vary({"pixel_values": x}, torch.Generator().manual_seed(3))["pixel_values"]
    assert torch.equal(one, vary({"pixel_values": x}, torch.Generator().manual_seed(3))["pixel_values"])


def test_whole_batches_are_kept_out():
    batches = list(range(20))
    assert hold_out(batches, 0.1) == (batches[:18], [18, 19])
    assert hold_out(batches[:3], 0.1) == ([0, 1], [2])
    with pytest.raises(ValueError, match="smaller --batch-size"):
        hold_out(batches[:1], 0.1)


def test_a_killed_run_goes_on_after_its_last_epoch(tmp_path):
    class Killed(Exception):
        pass

    def tell(event):
        if event["event"] == "distill" and event["done"] == 3:
            raise Killed

    batches = photos()
    whole, model = small(), small()
    expected = prune(whole, batches, TAUGHT).distillation
    with pytest.raises(Killed):
        prune(model, batches, TAUGHT, progress=tell, checkpoint=tmp_path)
    model, seen = small(), []
    report = prune(model, batches, TAUGHT, progress=seen.append, checkpoint=tmp_path)
    assert [e["done"] for e in seen if e["event"] == "distill"] == [3, 4, 5, 6]
    assert report.distillation == expected
    for (name, a), b in zip(model.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_without_logits_is_taught_by_its_representation():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

    batches = [torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    report = prune(Backbone(), batches, TAUGHT)
    assert 0 < report.distillation["after"] < report.distillation["before"]


def test_it_follows_a_run_in_stages_too():
    model = small()
    report = prune(model, photos(20), Recipe(sparsity=0.6, mask={"method": "magnitude"}, solve=None, stages=2,
                                             distill={"epochs": 6, "lr": 0.02, "images": 8}))  # fmt: skip
    assert len(report.stages) == 2 and report.distillation["kept"] > 0
    zeros = sum(r["total"] - r["kept"] for r in report.layers if r["pattern"])
    assert zeros == sum(int((w == 0).sum()) for w in (model.body[0].weight, model.body[3].weight))


@pytest.mark.skipif(not distill.bfloat16_units(torch.device("cpu")), reason="no bfloat16 units here")
def test_bfloat16_gradients_are_those_of_float32_but_for_their_rounding(monkeypatch):
    dense = small()
    model, batches = copy.deepcopy(dense), photos(start=7)
    chosen = selection(dense, batches, PLAIN)
    with torch.no_grad():
        for w in (model.body[0].weight, model.body[3].weight):
            w[w.abs() < w.abs().median()] = 0
    found = []
    for units in (True, False):
        monkeypatch.setattr(distill, "bfloat16_units", lambda device, units=units: units)
        lesson = Lesson(model, dense, chosen.units, batches)
        assert lesson.half == units
        with distill.learning([model.body[0].weight, model.body[1].bias]):
            assert lesson.learn(batches[0]) == 4
            found.append([model.body[0].weight.grad, model.body[1].bias.grad])
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32 and 0 < (a - b).norm() < 0.05 * b.norm()


class Particular(nn.Module):
    """Writes what a layer made into a buffer of its own type, as some model code does."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        kept = torch.zeros(len(x), 16)
        kept[torch.arange(len(x))] = self.body(x)
        return self.head(kept)


def test_a_model_in_float64_is_trained_in_float64(monkeypatch):
    monkeypatch.setattr(distill, "bfloat16_units", lambda device: True)
    report = prune(small().double(), [x.double() for x in photos()], TAUGHT)
    assert report.distillation["precision"] == "float64"


@pytest.mark.parametrize("strange", ["types", "numbers"])
def test_a_model_that_does_not_stand_bfloat16_is_trained_in_float32(monkeypatch, strange):
    torch.manual_seed(3)
    model = Particular().eval() if strange == "types" else nn.Sequential(nn.Linear(12, 8), Block(), nn.Linear(8, 5))
    if strange == "numbers":  # two large terms that cancel
        with torch.no_grad():
            model[2].bias.fill_(0)
            model[0].bias.fill_(1000)
            model[2].weight.copy_(torch.linspace(-1, 1, 8).repeat(5, 1))
    monkeypatch.setattr(distill, "bfloat16_units", lambda device: True)
    batches = [torch.randn(8, 12, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    report = prune(model, batches, Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None,
                                          distill={"epochs": 6, "lr": 0.01, "images": 8}))  # fmt: skip
    assert report.distillation["precision"] == "float32"
    assert all(math.isfinite(h) for h in report.distillation["history"]) and len(report.distillation["history"]) == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [({"epoch": 3}, "distill has no option 'epoch'"), ({"epochs": -1}, "at least 0"), ({"lr": 0.0}, "lr above 0"),
     ({"held_out": 1.0}, "between 0 and 1"), ({"epochs": 2.5}, "whole number")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        recipe.load("snows", nm="2:4", distill=given)


def test_no_epochs_no_distillation():
    report = prune(small(), photos(), PLAIN)
    assert report.distillation is None and not Options().epochs
    assert math.isclose(distill.rate(0, 100), 1 / 8, rel_tol=1e-3) and distill.rate(99, 100) < 1e-3


def test_the_plan_counts_its_time_and_its_memory():
    from hf_prune import cost, memory
    from hf_prune.stopwatch import DISTILLING

    model, batches = small(), photos()
    taught, plain = (recipe.load("snows", nm="2:4", samples=24, batch_size=4, distill={"epochs": e}) for e in (6, 0))
    stages = cost.seconds(model, batches[0][:2], taught, 24)
    assert stages[DISTILLING].cpu > 0 and DISTILLING not in cost.seconds(model, batches[0][:2], plain, 24)
    needs = memory.needs(model, selection(model, batches, taught), taught)
    without = memory.needs(model, selection(model, batches, plain), plain)
    assert needs.copies == 7 * needs.weights and without.copies == 0
    # what one image's graph holds: at least every activation that a backward pass reads
    assert needs.learning > 4 * 8 * 8 * (3 + 8 + 16 + 16) and without.learning == 0
    assert needs.working(8) >= 8 * needs.learning
    told = {}
    prune(model, batches, taught, progress=lambda e: told.update({e["event"]: e}))
    assert told["distill"]["done"] == 6


def test_it_keeps_within_a_memory_budget(tmp_path):
    """Images wait on disk and fewer are computed at once; the same weights move."""
    model = small()
    from hf_prune import memory

    budget = memory.resident() + 64 * 2**20
    report = prune(model, photos(20), TAUGHT, host_memory=budget, spill=tmp_path)
    assert report.distillation["kept"] > 0
    assert (model.body[0].weight == 0).float().mean() == 0.5
