"""Activations within a budget: what spills comes back as it was, and fewer images at once change no mask."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_prune import collect, microbatch, streams
from hf_prune.loop import Recipe, prune
from hf_prune.streams import NotSaved, Spilled, Store, load

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import architectures  # noqa: E402

DEFAULT = Recipe(nm="2:4")


def images(n=4, size=4):
    return [torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(n)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, scale):
        return x + self.b(self.a(self.norm(x)).relu()) * scale


class Plain(nn.Module):
    """Its blocks also take a tensor that belongs to no image."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, image):
        x = self.stem(image).flatten(2).mT
        for b in self.blocks:
            x = b(x, self.scale * 1)
        return self.head(x.mean(1))


def build():
    torch.manual_seed(0)
    return Plain()


@pytest.mark.parametrize("text, count", [("4GiB", 2**32), ("512m", 2**29), ("1.5K", 1536), (77, 77), ("9", 9)])
def test_amounts(text, count):
    assert streams.size(text) == count


@pytest.mark.parametrize("text", ["", "4 apples", "-1", "0", True, 0])
def test_amounts_that_are_none(text):
    with pytest.raises(ValueError, match="expected an amount of memory such as 4GiB"):
        streams.size(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_what_spills_comes_back_to_the_bit(dtype, tmp_path):
    store = Store(budget=0, folder=tmp_path)
    given = [(torch.randn(3, 5, k) * 9).to(dtype) for k in (1, 7, 4000)]
    kept = store.keep({"a": given[0], "b": [given[1], given[1]], "c": given[2], "d": "text"})
    assert all(isinstance(t, Spilled) for t in (kept["a"], *kept["b"], kept["c"])) and kept["b"][0] is kept["b"][1]
    assert torch.equal(load(kept["a"]), given[0]) and torch.equal(load(kept["c"]), given[2])
    assert torch.equal(load(kept["b"][1]), given[1]) and kept["d"] == "text" and store.resident == 0
    assert list(tmp_path.iterdir()) == [], "the file has no name: a killed process leaves nothing"


def test_the_budget_is_given_back_and_room_in_the_file_is_used_again(tmp_path):
    store = Store(budget=2 * 4000, folder=tmp_path)
    first = [store.keep(torch.zeros(1000)) for _ in range(3)]
    assert [isinstance(t, Spilled) for t in first] == [False, False, True] and store.resident == 8000
    first.pop(0)
    assert store.resident == 4000
    for _ in range(50):
        held = [store.keep(torch.zeros(1000)) for _ in range(3)]
    del held, first
    gc.collect()
    assert store.resident == 0 and store.end <= 8 * streams.PAGE


def test_a_disk_that_is_full_is_one_sentence(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streams.os, "pwrite", full)
    with pytest.raises(NotSaved, match="could not be written to .*No space left.*--host-memory"):
        Store(budget=0, folder=tmp_path).keep(torch.zeros(9))


# "lean" glue between stages (Swin), "splice" (DenseNet), "prefix" and "chain" forms of the walk
@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification", "densenet121"])
def test_a_run_that_spills_everything_ends_in_the_same_bits(name, tmp_path, monkeypatch):
    case = next(c for c in architectures.cases() if c.name == name)
    torch.manual_seed(0)
    one = case.build()
    torch.manual_seed(0)
    two = case.build()
    given = [case.batch(2, s) for s in range(2)]
    target = {"metric": 0.5} if name.startswith("ViT") else {}  # output metrics wait in the store too
    recipe = Recipe(nm="2:4", skip=("*.layer3.*", "*block3*", "*block4*"), target=target)
    prune(one, given, recipe)
    stores = []

    def limits(*_):
        return type("L", (), {"streams": 0, "images": None, "notes": []})

    from hf_prune import loop

    monkeypatch.setattr(loop.memory, "limits", limits)
    real = Store.__init__
    monkeypatch.setattr(Store, "__init__", lambda self, *a, **k: (real(self, *a, **k), stores.append(self))[0])
    prune(two, given, recipe, host_memory="1GiB", spill=tmp_path)
    assert stores[0].end > 0, "something was spilled"
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def failing(function, when):
    """`function`, out of memory at the calls where `when` says so."""
    calls = [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if when(calls[0], *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return function(*args, **kwargs)

    return call


def most(limit):
    """Out of memory with more than `limit` images."""

    def when(n, stage, pair, *rest):
        return len(load(pair.pruned["call"][0][0])) > limit

    return when


@pytest.mark.parametrize("place", ["statistics", "advance", "window"])
def test_out_of_memory_halves_the_images_and_goes_on(place, monkeypatch):
    recipe = Recipe(nm="2:4", refine={"method": "snows", "cg": 3}) if place == "window" else DEFAULT
    whole, tight = build(), build()
    prune(whole, images(), recipe)
    said = []
    if place == "statistics":
        monkeypatch.setattr(collect.Stage, "add", failing(collect.Stage.add, most(1)))
    elif place == "advance":
        from hf_prune.walk import Walk

        monkeypatch.setattr(
            Walk, "advance", failing(Walk.advance, lambda n, w, i, e, *out: len(load(e["call"][0][0])) > 2 and n > 1)
        )
    else:
        from hf_prune.window import Window

        monkeypatch.setattr(Window, "gradient", failing(Window.gradient, lambda n, *a: n == 2))
    report = prune(tight, images(), recipe, progress=lambda e: said.append(e))
    warned = [e["text"] for e in said if e["event"] == "warn"]
    assert warned and all("memory ran out in blocks." in w for w in warned)
    assert warned[-1].endswith({"statistics": "1 image at once", "advance": "2 images at once",
                                "window": "2 images at once"}[place])  # fmt: skip
    assert len([r for r in report.layers if r["pattern"]]) == 4
    for name, w in whole.state_dict().items():
        other = tight.state_dict()[name]
        assert torch.equal(w != 0, other != 0), name
        if place == "window":  # products by differences of gradients, of other batches: near, and no more
            assert float((w - other).norm()) <= 0.03 * float(w.norm()), name
        else:
            assert torch.allclose(w, other, rtol=1e-3, atol=1e-4), name


def test_out_of_memory_on_a_single_image_is_one_sentence(monkeypatch):
    monkeypatch.setattr(collect.Stage, "add", failing(collect.Stage.add, lambda *a: True))
    with pytest.raises(ValueError, match="blocks.0: memory ran out on a single image"):
        prune(build(), images(), DEFAULT)


def test_another_runtime_error_is_no_lack_of_memory(monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(collect.Stage, "add", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        prune(build(), images(), DEFAULT)


def test_where_the_images_lie_is_found_and_shared_tensors_stay_whole():
    from hf_prune import loop
    from hf_prune.walk import Walk

    model = build()
    chosen = loop.choose(model, images()[0][:2], DEFAULT)
    way = Walk(model, chosen.units, chosen.small)
    where = microbatch.axes(way, 1, chosen.small)
    assert where[0] == [(0, 1), None]
    entry = way.enter(images(1))[0] | {"positions": torch.randn(4, 5, 3)}
    pair = collect.Pair(entry, entry, {("k", None): torch.arange(4 * 16.0)})
    a, b = microbatch.halve(way, 0, pair, chosen.small)
    assert torch.equal(torch.cat([a.pruned["call"][0][0], b.pruned["call"][0][0]]), entry["call"][0][0])
    assert torch.equal(torch.cat([a.pruned["positions"], b.pruned["positions"]]), entry["positions"])
    assert a.dense is a.pruned and a.weights.get(("k", None)).tolist() == list(range(32))


def test_generators_are_read_one_batch_at_a_time_and_labels_split_off():
    live = [0, 0]

    def given():
        for k in range(4):
            live[0] += 1
            yield torch.full((4, 2), float(k)), torch.arange(4)

    batches, labels = streams.take(Store(budget=0), given(), micro=3)
    assert [len(b) for b in batches] == [3, 1] * 4 and labels[1].tolist() == [3] and len(batches) == 8
    assert torch.equal(batches[2], torch.ones(3, 2)) and [len(b) for b in batches[6:]] == [3, 1]


def test_output_metrics_are_on_disk_until_their_block_and_gone_after_it(monkeypatch, tmp_path):
    from hf_prune import loop

    recipe = Recipe(nm="2:4", target={"metric": 0.5})
    monkeypatch.setattr(loop.memory, "limits", lambda *_: type("L", (), {"streams": 0, "images": None, "notes": []}))
    seen, left = [], []
    real = loop.Block.layers

    def layers(self, group, tensors):
        seen.append(self.metrics)
        left.append(sorted(n for m in self.metrics.values() for n in m.rows))
        assert all(isinstance(m.moment, Spilled) for m in self.metrics.values())
        return real(self, group, tensors)

    monkeypatch.setattr(loop.Block, "layers", layers)
    prune(build(), images(), recipe, host_memory="1GiB", spill=tmp_path)
    assert left[0] == ["blocks.0.a.weight", "blocks.0.b.weight", "blocks.1.a.weight", "blocks.1.b.weight"]
    assert left[-1] == ["blocks.1.a.weight", "blocks.1.b.weight"] and not seen[-1]
