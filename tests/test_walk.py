"""Blocks found from structure, and activations that travel from one to the next to the bit."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_prune import sites, walk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import architectures  # noqa: E402

CASES = {c.name: c for c in architectures.cases()}
# name -> (form of the walk, units with at least two weights)
SEEN = {
    "ViTForImageClassification": ("chain", 3),
    "ImageGPTForImageClassification": ("lean", 2),  # carries a key-value cache
    "SiglipForImageClassification": ("lean", 4),  # attention pooling at the end
    "SwinForImageClassification": ("lean", 4),
    "ResNetForImageClassification": ("chain", 5),
    "test_vit": ("chain", 6),
    "test_convnext2": ("chain", 4),
    "convit_tiny": ("lean", 3),
    "densenet121": ("splice", 6),
    "hiera_tiny_224": ("chain", 4),
    "mixer": ("chain", 2),
    "coat_tiny": ("splice", 5),  # blocks call depthwise convolutions that they were handed
}
TWICE = {"coat_tiny": 3}  # weights of modules that two blocks were handed


def walked(model, batch):
    found = sites.find(model, batch)
    wanted = [s for s in found.sites if s.parameter not in found.stem | found.head]
    units, lost = walk.units(model, found, wanted, batch)
    return walk.Walk(model, units, batch), lost


def recorded(model, units, batch):
    """Inputs of every unit in an ordinary forward, as clones."""
    inputs = {}

    def note(i):
        def hook(module, args, kwargs):
            inputs[i] = walk._clone((args, kwargs))

        return hook

    with walk._hooks(*(u.module.register_forward_pre_hook(note(i), with_kwargs=True) for i, u in enumerate(units))):
        with torch.no_grad(), sites.quiet(model):
            sites.feed(model, batch)
    return inputs


@pytest.mark.parametrize("name", SEEN)
def test_replay_is_bitwise_what_the_model_computes(name):
    """On a batch of another size than the one the walk was checked on, and again after every block has changed."""
    case = CASES[name]
    model = case.build()
    way, lost = walked(model, case.batch(2, 0))
    assert len(lost) == TWICE.get(name, 0) and all("runs 2 times" in reason for reason in lost.values())
    assert (way.mode, sum(len(u.sites) > 1 for u in way.units)) == SEEN[name]
    batch = case.batch(3, 1)
    for _ in range(2):
        truth = recorded(model, way.units, batch)
        (entry,) = way.enter([batch])
        for i in range(len(way.units)):
            assert walk._same(entry["call"], truth[i]), way.units[i].name
            entry = way.advance(i, entry)
        with torch.no_grad():
            for u in way.units:
                for s in u.sites:
                    model.get_parameter(s.parameter).mul_(0.9)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "SwinForImageClassification", "densenet121"])
def test_a_window_over_several_units_is_the_models_own_output_and_differentiable(name):
    case = CASES[name]
    model = case.build()
    batch = case.batch(2, 0)
    way, _ = walked(model, batch)
    truth = {}

    def note(i):
        def hook(module, args, out):
            truth[i] = walk._clone(out)

        return hook

    with walk._hooks(*(u.module.register_forward_hook(note(i)) for i, u in enumerate(way.units))), torch.no_grad():
        sites.feed(model, batch)
    (entry,) = way.enter([batch])
    entry = way.advance(0, entry)
    last = min(3, len(way.units) - 1)
    parameter = model.get_parameter(way.units[1].sites[0].parameter)
    with sites.quiet(model):
        with torch.no_grad():
            assert walk._same(way.through(1, last, entry), truth[last])
        parameter.requires_grad_(True)
        out = sites._tensors(way.through(1, last, entry))[0]
        (grad,) = torch.autograd.grad(out.square().sum(), parameter)
    assert torch.isfinite(grad).all() and grad.any()


def test_activations_are_the_models_own_hidden_states_with_class_token_and_position():
    """A known fault elsewhere: calibration on patch embeddings alone, without class token and position embedding."""
    case = CASES["ViTForImageClassification"]
    model, batch = case.build(), case.batch(2, 0)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    way, _ = walked(model, batch)
    (entry,) = way.enter([batch])
    seen = []
    for i in range(len(way.units)):
        seen.append(sites._tensors(entry["call"])[0])
        entry = way.advance(i, entry)
    assert seen[0].shape == (2, 1 + 16, 32), "a class token and 16 patches"
    assert all(torch.equal(a, b) for a, b in zip(seen, states, strict=False)) and len(seen) == 3


def test_blocks_are_named_in_execution_order_and_loose_layers_are_units():
    case = CASES["SwinForImageClassification"]
    model, batch = case.build(), case.batch(2, 0)
    way, _ = walked(model, batch)
    names = [u.name for u in way.units]
    assert [n.rpartition("layers.")[2] for n in names] == [
        "0.blocks.0", "0.blocks.1", "0.downsample.reduction", "1.blocks.0", "1.blocks.1",
    ]  # fmt: skip


def test_query_key_and_value_are_one_stage():
    case = CASES["ViTForImageClassification"]
    way, _ = walked(case.build(), case.batch(2, 0))
    stages = [[s.parameter.rpartition(".attention.")[2] or s.parameter for s in stage] for stage in way.units[0].stages]
    assert [len(s) for s in stages] == [3, 1, 1, 1]
    assert {n.split(".")[0] for n in stages[0]} == {"q_proj", "k_proj", "v_proj"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


def test_a_module_that_runs_twice_is_not_replayed_and_says_so():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.again = Block()
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            for b in self.blocks:
                x = b(x)
            return self.head(self.again(self.again(x)))

    model = Twice()
    way, lost = walked(model, torch.randn(2, 8))
    assert [u.name for u in way.units] == ["blocks.0", "blocks.1"]
    assert lost == {f"again.{n}.weight": f"its module again.{n} runs 2 times per forward" for n in "ab"}


def test_a_parameter_of_the_model_itself_is_not_replayed_and_says_so():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            x = nn.functional.linear(x, self.w)
            for b in self.blocks:
                x = b(x)
            return x

    way, lost = walked(Bare(), torch.randn(2, 8))
    assert lost == {"w": "its module (the model itself) is never called as a module"}


def test_a_weight_of_a_module_around_blocks_stays_dense_and_says_so():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            x = nn.functional.linear(x, self.w)
            for b in self.blocks:
                x = b(x)
            return x

    model = nn.Sequential(nn.Linear(8, 8), Around(), nn.Linear(8, 3))
    way, lost = walked(model, torch.randn(2, 8))
    assert lost == {"1.w": "its module 1 holds whole blocks"}
    assert [u.name for u in way.units] == ["0", "1.blocks.0", "1.blocks.1"]


def test_a_block_that_depends_on_more_than_its_arguments_runs_with_its_whole_prefix():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block(), Block()])
            self.state = None

        def forward(self, x):
            self.state = x.mean()
            for b in self.blocks:
                x = b(x) * self.state
            return x

    class Reads(Block):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) + self.owner[0].state

    model = Memory()
    for i in range(3):
        model.blocks[i] = Reads()
        model.blocks[i].owner = [model]
    x = torch.randn(4, 8)
    way, _ = walked(model, torch.randn(2, 8))
    assert way.mode in ("prefix", "lean", "splice")
    (entry,) = way.enter([x])
    truth = {}
    with walk._hooks(model.blocks[2].register_forward_hook(lambda m, a, o: truth.update(out=o))), torch.no_grad():
        model(x)
        for i in range(2):
            entry = way.advance(i, entry)
        assert torch.equal(way.call(2, entry), truth["out"])


def test_writing_in_place_does_not_reach_the_cache():
    """GhostNet's in-place ReLU overwrites a block's own input."""

    class Rough(Block):
        def forward(self, x):
            return x.relu_() + self.b(self.a(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList([Rough(), Rough()])

        def forward(self, x):
            x = self.first(x)
            for b in self.blocks:
                x = b(x)
            return x

    model, x = Model(), torch.randn(3, 8)
    way, _ = walked(model, x)
    (entry,) = way.enter([x])
    entry = way.advance(0, entry) if way.units[0].name == "first" else entry
    before = walk._clone(entry["call"])
    i = [u.name for u in way.units].index("blocks.0")
    with torch.no_grad():
        once, again = way.call(i, entry), way.call(i, entry)
    assert torch.equal(once, again) and walk._same(before, entry["call"])


def test_a_tensor_handed_over_twice_stays_one_tensor():
    """`key is value` chooses another path in nn.MultiheadAttention, and with it other products."""
    k = torch.randn(2, 3)
    cloned = walk._clone({"key": k, "value": k, "query": torch.zeros(1)})
    assert cloned["key"] is cloned["value"] and cloned["key"] is not k


def test_a_failed_replay_leaves_the_model_as_it_was():
    case = CASES["ViTForImageClassification"]
    model, batch = case.build(), case.batch(2, 0)
    way, _ = walked(model, batch)
    with pytest.raises(RuntimeError):
        stubs = {way.units[0].name: lambda: torch.zeros(2, 17, 32)}
        way._reach({"pixel_values": torch.zeros(2, 3, 7, 7)}, 1, stubs)
    assert all("forward" not in vars(m) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Table(nn.Module):
    """What positions add, whatever they are: no weight here can be pruned."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.values.expand_as(x)


class Glued(nn.Module):
    """Layers with other modules in between, as in a MobileNet; a table that is added to what every layer makes."""

    def __init__(self, table):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(6))
        self.table = Table() if table else None
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        extra = self.table(x) if self.table is not None else 0
        x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(norm(x).relu()) + extra
        return self.head(x)


@pytest.mark.parametrize("table", [False, True], ids=["nothing looks back", "something looks back"])
def test_replay_runs_what_lies_between_two_units_and_no_more(table):
    model, batch = Glued(table).eval(), torch.randn(2, 8)
    way, _ = walked(model, batch)
    assert way.mode == "lean" and len(way.units) == 7
    entries = way.enter([torch.randn(5, 8)])  # of another form than the batch on which replay was checked
    x, calls = entries[0]["batch"], []
    inputs = {}
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: calls.append(n)) for n, m in model.named_modules() if n]
    see = [u.module.register_forward_pre_hook(lambda m, a, n=u.name: inputs.setdefault(n, a[0])) for u in way.units]
    with torch.no_grad():
        model(x)
    for h in see:
        h.remove()
    calls.clear()
    way._specify(x)
    calls.clear()
    for i in range(len(way.units) - 1):
        entries = [way.advance(i, e) for e in entries]
        assert torch.equal(entries[0]["call"][0][0], inputs[way.units[i + 1].name])
    ran = sum(n.startswith("norms") for n in calls)
    stubbed = sum(n.startswith("norms") for link in way.links for n in link["stubs"])
    for h in hooks:
        h.remove()
    assert ran - stubbed == (sum(range(7)) if table else 6)  # a stub is called too


def test_a_forward_that_was_replaced_on_the_module_itself_is_put_back():
    """As libraries do that hook into modules."""
    model, batch = Glued(False).eval(), torch.randn(2, 8)
    own = {}
    for n, m in model.layers.named_children():
        own[n] = m.forward = functools.partial(type(m).forward, m)
    way, _ = walked(model, batch)
    entries = way.enter([batch])
    for i in range(len(way.units) - 1):
        entries = [way.advance(i, e) for e in entries]
    assert all(model.layers.get_submodule(n).forward is f for n, f in own.items())


@pytest.mark.parametrize(
    ("name", "averaged"),
    [("ResNetForImageClassification", True), ("test_resnet", True), ("swin_tiny_patch4_window7_224", True),
     ("densenet121", True), ("mixer", True), ("ViTForImageClassification", False), ("test_convnext2", False),
     ("mobilenetv3_small_050", False)],
)  # fmt: skip
def test_what_the_classifier_reads_is_followed_back_to_its_positions(name, averaged):
    """Where it is their average; not where a token is read, or something stands between the average and the weight."""
    case = CASES[name]
    model = case.build()
    found = sites.find(model, case.batch(2, 0))
    units, _ = walk.units(model, found, found.sites, case.batch(2, 0))
    way = walk.Walk(model, units, case.batch(2, 0))
    batch = case.batch(3, 1)
    truth = recorded(model, way.units, batch)
    (entry,) = way.enter([batch])
    seen = {}
    for i, unit in enumerate(way.units):
        if entry.get("positions") is not None:
            seen[unit.name] = entry["positions"]
            x = truth[i][0][0]
            assert entry["positions"].dim() == 3 and entry["positions"].shape[1] > 1
            torch.testing.assert_close(entry["positions"].mean(1), x, rtol=1e-4, atol=1e-5)
        entry = way.advance(i, entry)
    assert bool(seen) == averaged, list(seen)
    if averaged:
        assert list(seen) == [way.units[-1].name], "only of the layer that reads it"
