"""The loop on small networks: what is written, what never rises, and what happens when things go wrong."""

import copy
import functools
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from nets import Block
from torch import nn

from hf_prune import collect, loop, sites, streams
from hf_prune import importance as weighing
from hf_prune.importance import importance
from hf_prune.linalg import exact_matmul
from hf_prune.loop import Recipe, plan, prune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import architectures  # noqa: E402

DEFAULT = Recipe(nm="2:4")
KSTEP = Recipe(nm="2:4", mask={"method": "magnitude"}, solve={"method": "snows", "k": 2, "cg": 4}, target={"mix": 0.0})
REFINED = Recipe(nm="2:4", refine={"method": "snows", "cg": 4})
RECIPES = {"least squares": DEFAULT, "K-step": KSTEP, "refined": REFINED}


class Plain(nn.Module):
    """A module no library knows: stem, two residual blocks, head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 5)

    def forward(self, image):
        x = self.stem(image).flatten(2).mT
        for b in self.blocks:
            x = b(x)
        return self.head(x.mean(1))


def vit():
    return next(c for c in architectures.cases() if c.name == "ViTForImageClassification")


def images(n=3, size=4, pixels=16):
    return [torch.randn(size, 3, pixels, pixels, generator=torch.Generator().manual_seed(k)) for k in range(n)]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_planned_weight_of_a_transformer_changes_and_follows_the_pattern(recipe):
    """Query, key, value and projection among them: code published with the paper leaves those as they were."""
    case = vit()
    model, batches = case.build(), [case.batch(4, s) for s in range(2)]
    before = state(model)
    planned = {r.name for r in plan(model, case.batch(2, 0), recipe).rows if r.pattern}
    assert len(planned) == 18, "query, key, value, projection and two of the MLP, in three blocks"
    report = prune(model, batches, recipe)
    done = {r["name"]: r for r in report.layers if r["pattern"]}
    assert set(done) == planned
    for name, entry in done.items():
        w = model.get_parameter(name)
        kept = (w != 0).reshape(-1, 4).sum(1)
        assert (kept <= 2).all() and entry["kept"] == int(kept.sum()), name
        assert torch.isfinite(w).all() and not torch.signbit(w[w == 0]).any()
        survivors = w != 0
        moved = (w[survivors] - before[name][survivors]).abs() > 1e-6
        assert moved.float().mean() > 0.5, f"{name}: its kept weights were not refit"
    for name, tensor in model.state_dict().items():
        if name not in planned and not name.endswith("bias"):
            assert torch.equal(tensor, before[name]), f"{name} is not the loop's to change"


def test_a_plain_module_is_pruned_and_dense_weights_have_reasons():
    model = Plain()
    report = prune(model, images(), DEFAULT)
    reasons = {r["name"]: r["dense_reason"] for r in report.layers}
    assert reasons["stem.weight"].startswith("stem") and reasons["head.weight"].startswith("classifier")
    assert [n for n, why in reasons.items() if why is None] == [
        f"blocks.{i}.{n}.weight" for i in range(2) for n in "ab"
    ]  # fmt: skip
    assert report.calibration["samples"] == 12
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training and all(p.requires_grad for p in model.parameters()), "modes are restored"


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layers_error_never_rises(mix, bias):
    recipe = Recipe(nm="2:4", mask={"method": "magnitude"}, solve={"method": "least_squares", "ridge": 1e-6},
                    target={"mix": mix, "bias": bias})  # fmt: skip
    for entry in prune(Plain(), images(), recipe).layers:
        if entry["pattern"]:
            assert entry["error_after"] <= entry["error_before"] * (1 + 1e-5), entry["name"]


def test_newton_steps_never_raise_the_loss_they_are_judged_by():
    for entry in prune(Plain(), images(1), KSTEP).layers:  # one batch: step and judge are the same images
        if entry["pattern"]:
            assert entry["error_after"] <= entry["error_before"] * (1 + 1e-6), entry["name"]
    for entry in prune(Plain(), images(), REFINED).layers:
        if entry["pattern"]:
            assert entry["refined"]["loss_after"] <= entry["refined"]["loss_before"]


def test_refitting_brings_the_output_closer_than_magnitude_alone():
    truth, fresh = Plain(), images(1, 16)[0]
    errors = {}
    for name, recipe in {**RECIPES, "magnitude": Recipe(nm="2:4", mask={"method": "magnitude"}, solve=None)}.items():
        model = copy.deepcopy(truth)
        prune(model, [i + 0 for i in images(8, 16)], recipe)
        with torch.no_grad():
            errors[name] = float((model.eval()(fresh) - truth.eval()(fresh)).square().mean())
    assert all(errors[name] < 0.7 * errors["magnitude"] for name in RECIPES), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_run_gives_the_same_bits(dtype):
    first, second = Plain().to(dtype), None
    second = copy.deepcopy(first)
    for m in (first, second):
        prune(m, [i.to(dtype) for i in images()], DEFAULT)
    assert all(torch.equal(a, b) for a, b in zip(state(first).values(), state(second).values(), strict=True))


def test_tuples_mappings_and_generators_of_batches_are_the_same_run():
    class Named(Plain):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    models = [Named() for _ in range(3)]
    for m in models[1:]:
        m.load_state_dict(models[0].state_dict())
    prune(models[0], images(), DEFAULT)
    prune(models[1], ((i, torch.zeros(len(i))) for i in images()), DEFAULT)
    prune(models[2], [{"pixel_values": i} for i in images()], DEFAULT)
    for m in models[1:]:
        assert all(
            torch.equal(a, b) for a, b in zip(m.state_dict().values(), models[0].state_dict().values(), strict=True)
        )


def test_the_callers_images_are_left_alone():
    given = images()
    kept = [i.clone() for i in given]
    prune(Plain(), given, DEFAULT)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


# ---------------------------------------------------------------------------------------------------------- stopping


class Stopped(Exception):
    pass


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_run_stopped_between_blocks_resumes_to_the_same_bits(recipe, tmp_path):
    whole, broken = Plain(), None
    original = state(whole)
    broken = copy.deepcopy(whole)
    expected = prune(whole, images(), recipe)

    def stop(event):
        if event["event"] == "layer" and event["block"] == "blocks.1":
            raise Stopped

    with pytest.raises(Stopped):
        prune(broken, images(), recipe, progress=stop, checkpoint=tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1, "the finished block, and only that"
    again = Plain()
    again.load_state_dict(original)
    seen = []
    report = prune(again, images(), recipe, progress=lambda e: seen.append(e), checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(state(again).values(), state(whole).values(), strict=True))
    timeless = [{k: v for k, v in r.items() if k != "seconds"} for r in report.layers]
    assert timeless == [{k: v for k, v in r.items() if k != "seconds"} for r in expected.layers]
    assert len([e for e in seen if e["event"] == "layer"]) == 4, "restored layers are told too"


def test_resuming_another_run_is_refused_with_the_difference(tmp_path):
    model = Plain()
    original = state(model)
    prune(model, images(), DEFAULT, checkpoint=tmp_path)
    model.load_state_dict(original)
    with pytest.raises(ValueError, match=r"another run: recipe.nm was 2:4, is 1:4\."):
        prune(model, images(), Recipe(nm="1:4"), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"another run: images was 12 images, sha256 .*, is 8 images"):
        prune(model, images(2), DEFAULT, checkpoint=tmp_path)
    with torch.no_grad():
        model.head.bias.add_(1)
    with pytest.raises(ValueError, match=r"another run: weights was \w+"):
        prune(model, images(), DEFAULT, checkpoint=tmp_path)


def test_a_saved_block_that_was_damaged_is_named(tmp_path):
    model = Plain()
    original = state(model)
    prune(model, images(), DEFAULT, checkpoint=tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:50])
    model.load_state_dict(original)
    with pytest.raises(ValueError, match=f"{file.name}: this saved block cannot be read"):
        prune(model, images(), DEFAULT, checkpoint=tmp_path)


# --------------------------------------------------------------------------------------------------------- bad input


def test_weights_that_are_not_numbers():
    model = Plain()
    with torch.no_grad():
        model.blocks[1].a.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.1.a.weight: holds NaN or infinite values"):
        prune(model, images(), DEFAULT)


def test_images_that_are_not_numbers():
    bad = images()
    bad[1][0, 0, 0, 0] = torch.nan
    model = Plain()
    with pytest.raises(ValueError, match=r"blocks.0.a.weight: .*not finite"):
        prune(model, bad, DEFAULT)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_constant_images_are_pruned_without_a_failure(recipe):
    model = Plain()
    truth = copy.deepcopy(model).eval()
    blank = [torch.full((4, 3, 16, 16), 0.3)]
    prune(model, blank, recipe)
    for name in ("blocks.0.a.weight", "blocks.1.b.weight"):
        w = model.get_parameter(name)
        assert torch.isfinite(w).all() and ((w != 0).reshape(-1, 4).sum(1) <= 2).all()
    with torch.no_grad():
        assert torch.isfinite(model.eval()(blank[0])).all() and torch.isfinite(truth(blank[0])).all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_one_image_is_enough_to_run(recipe):
    model = Plain()
    prune(model, images(1, 1), recipe)
    for i in range(2):
        assert ((model.blocks[i].a.weight != 0).reshape(-1, 4).sum(1) <= 2).all()
        assert torch.isfinite(model.blocks[i].b.weight).all()


def test_no_images_at_all():
    with pytest.raises(ValueError, match="at least one image"):
        prune(Plain(), [], DEFAULT)


def test_a_pattern_that_fits_no_weight():
    with pytest.raises(
        ValueError, match=r"no weight of this model can follow 2:3: .*2:3 needs input channels divisible by 3"
    ):
        prune(Plain(), images(), Recipe(nm="2:3"))


@pytest.mark.parametrize("given", [{}, {"nm": "2:4", "sparsity": 0.5}])
def test_neither_or_both_patterns(given):
    with pytest.raises(ValueError, match="either --nm N:M or --sparsity S"):
        plan(Plain(), images()[0], Recipe(**given))


def test_skip_and_only_choose_weights_and_give_reasons():
    rows = {r.name: r for r in plan(Plain(), images()[0], Recipe(nm="2:4", skip=("blocks.0",))).rows}
    assert rows["blocks.0.a.weight"].reason == "in --skip" and rows["blocks.1.a.weight"].pattern == "2:4"
    rows = {r.name: r for r in plan(Plain(), images()[0], Recipe(nm="2:4", only=("blocks.*.b.weight",))).rows}
    assert rows["blocks.0.a.weight"].reason == "not in --only" and rows["blocks.0.b.weight"].pattern == "2:4"


def test_a_weight_tied_over_two_blocks_is_pruned_once():
    model = Plain()
    model.blocks[1].a.weight = model.blocks[0].a.weight
    report = prune(model, images(), DEFAULT)
    names = [r["name"] for r in report.layers if r["pattern"]]
    assert names == ["blocks.0.a.weight", "blocks.0.b.weight", "blocks.1.b.weight"]
    assert model.blocks[1].a.weight is model.blocks[0].a.weight
    assert ((model.blocks[1].a.weight != 0).reshape(-1, 4).sum(1) <= 2).all()


def test_the_dense_stream_behind_a_tied_weight_is_the_dense_models():
    """It was pruned two blocks earlier; the dense stream must go through what it was before."""
    model = Plain()
    model.blocks.append(Block())
    model.blocks[2].a.weight = model.blocks[0].a.weight
    batch = images(1)[0]
    with torch.no_grad(), exact_matmul():
        x = model.blocks[1](model.blocks[0](model.stem(batch).flatten(2).mT))
        expected = model.blocks[2].a(model.blocks[2].norm(x)).relu()
    seen = []

    def grams(walk, i, sites_, pairs, *rest):
        if walk.units[i].name == "blocks.2.b":
            seen.append(pairs[0].dense["call"][0][0])
        return real(walk, i, sites_, pairs, *rest)

    real = loop.grams
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "grams", grams)
        prune(model, [batch], DEFAULT)
    assert torch.equal(seen[0], expected)


# ------------------------------------------------------------------------------------------------------------- ranks


def one_rank(rank, size, port, folder, recipe):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = Plain()
    share = images(3)[rank::size]
    prune(model, share, recipe)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", [DEFAULT, KSTEP], ids=["least squares", "K-step"])
def test_two_ranks_give_the_same_model_as_one(recipe, tmp_path):
    """Uneven shares: two batches and one.  Both ranks end with the same bits, and with what one process makes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (2, port, str(tmp_path), recipe), nprocs=2)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in ranks[0]), "both ranks hold the same model"
    torch.manual_seed(0)
    model = Plain()
    dense = state(model)
    if recipe is KSTEP:  # minibatches differ with the ranks' shares: the loss is the same, the steps are not
        return
    prune(model, images(3), recipe)
    for name, w in model.state_dict().items():
        assert torch.equal(w != 0, ranks[0][name] != 0), f"{name}: the masks differ"
        assert torch.allclose(w, ranks[0][name], rtol=1e-3, atol=1e-4), name
    assert any(not torch.equal(w, dense[name]) for name, w in model.state_dict().items())


def test_sites_are_verified_against_the_plan():
    """The loop reads back nothing: what `find` says is what is written."""
    found = sites.find(Plain().eval(), images()[0])
    assert [s.name for s in found.sites] == [
        "stem.weight", *(f"blocks.{i}.{n}.weight" for i in range(2) for n in "ab"), "head.weight",
    ]  # fmt: skip


class Mixer(nn.Module):
    """A residual block with three layers that read one input: as three modules, or as one with their rows joined."""

    def __init__(self, fused):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(12, 8)
        self.parts = nn.ModuleList(nn.Linear(8, out) for out in ([24] if fused else [12, 8, 4]))

    def forward(self, x):
        y = self.norm(x)
        joined = torch.cat([p(y) for p in self.parts], -1)
        return x + self.out(joined[..., :12].tanh() * joined[..., 12:].sigmoid())


class Mixed(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks, self.head = nn.ModuleList([Mixer(fused), Mixer(fused)]), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks:
            x = b(x)
        return self.head(x[:, 0])


def test_a_fused_layer_and_its_parts_get_the_same_weights():
    torch.manual_seed(0)
    split, fused = Mixed(False).double(), Mixed(True).double()
    for s, f in zip(split.blocks, fused.blocks, strict=True):
        f.norm.load_state_dict(s.norm.state_dict())
        f.out.load_state_dict(s.out.state_dict())
        f.parts[0].weight.data = torch.cat([p.weight.data for p in s.parts])
        f.parts[0].bias.data = torch.cat([p.bias.data for p in s.parts])
    fused.stem.load_state_dict(split.stem.state_dict())
    fused.head.load_state_dict(split.head.state_dict())
    batches = [torch.randn(8, 5, 6, dtype=torch.float64) for _ in range(2)]
    recipe = Recipe(nm="2:4", target={"metric": 0.7}, solve={"method": "least_squares", "tolerance": 1e-12})
    alone = copy.deepcopy(split)
    prune(split, batches, recipe)
    prune(fused, batches, recipe)
    prune(alone, batches, Recipe(nm="2:4", solve=recipe.solve))
    for s, f, a in zip(split.blocks, fused.blocks, alone.blocks, strict=True):
        for kind in ("weight", "bias"):
            joined = torch.cat([getattr(p, kind).data for p in s.parts])
            torch.testing.assert_close(joined, getattr(f.parts[0], kind).data, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(s.out.weight, f.out.weight, rtol=1e-6, atol=1e-8)
        assert not torch.allclose(s.out.weight, a.out.weight, rtol=1e-3)  # the metric matters


class TokensFirst(Mixed):
    """The same network on (tokens, images, channels)."""

    def forward(self, x):
        x = self.stem(x.transpose(0, 1))
        for b in self.blocks:
            x = b(x)
        return self.head(x[0])


def test_images_behind_the_first_dimension_are_not_weighed_in_a_wrong_order():
    torch.manual_seed(0)
    inside = TokensFirst(False).double()
    batches = [torch.randn(16, 8, 6, dtype=torch.float64)]  # 8 tokens: as many as images are differentiated together
    weights, metrics = importance(inside, sites.find(inside, batches[0][:2]).sites, batches, 0.9, 0.5)
    assert [len(w) for w in weights[0].values()] == [16], "the head alone reads an image per row"
    assert [list(m.rows) for m in metrics.values()] == [["head.weight"]]
    first = Mixed(False).double()
    found = sites.find(first, batches[0][:2]).sites
    whole, _ = importance(first, found, batches, 0.9, 0.5, micro=16)
    parts, _ = importance(first, found, batches, 0.9, 0.5, micro=3)
    assert {len(w) for w in whole[0].values()} == {16, 16 * 8}
    for key, w in whole[0].items():
        torch.testing.assert_close(w, parts[0][key])


@pytest.mark.parametrize("share", [1.0, 0.9])
def test_a_position_weighs_what_the_jacobian_says_beside_the_others_of_its_image(monkeypatch, share):
    torch.manual_seed(0)
    model = Mixed(False).double()
    x = torch.randn(6, 5, 6, dtype=torch.float64)
    outputs = model(x).shape[1]

    def unit(t, part, seed):  # every output in its turn, so that the estimate becomes exact
        made = torch.zeros_like(t)
        made[:, seed // 7919] = 1
        return made

    monkeypatch.setattr(weighing, "_directions", unit)
    (weights,), _ = importance(model, sites.find(model, x[:2]).sites, [x], share, probes=outputs)
    layer = model.blocks[0].out
    key = next((s.source, s.conv) for s in sites.find(model, x[:2]).sites if s.name == "blocks.0.out.weight")
    brute = torch.zeros(6, 5, dtype=torch.float64)
    for image in range(6):

        def after(y, image=image):
            handle = layer.register_forward_hook(lambda *_: y)
            try:
                return model(x[image : image + 1])[0]
            finally:
                handle.remove()

        seen = []
        handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.detach()))
        model(x[image : image + 1])
        handle.remove()
        jacobian = torch.autograd.functional.jacobian(after, seen[0])  # (outputs, 1, tokens, channels)
        brute[image] = jacobian.square().sum((0, 1, 3))
    expected = (1 - share) + share * brute / brute.mean(1, keepdim=True)
    torch.testing.assert_close(weights[key].view(6, 5), expected)


def test_an_image_without_influence_weighs_its_positions_alike():
    given = torch.tensor([1.0, 3.0, 0.0, 0.0])
    assert weighing.within_images(given, 2).tolist() == [0.5, 1.5, 1.0, 1.0]
    assert weighing.within_images(given, 3).tolist() == [1.0, 3.0, 0.0, 0.0], "positions that belong to no image"


class Bare(nn.Module):
    """Convolutions and norms side by side, in no block: a unit is a convolution alone, its norm lies behind it."""

    def __init__(self):
        super().__init__()
        for k in range(4):
            conv = nn.Conv2d(16, 16, 1, bias=False) if k else nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"norm{k}", nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        for k in range(4):
            x = torch.relu(self.get_submodule(f"norm{k}")(self.get_submodule(f"conv{k}")(x)))
        return self.head(x.mean((2, 3)))


def test_refinement_knows_what_a_norm_behind_the_unit_adds():
    torch.manual_seed(0)
    dense, x = Bare(), torch.randn(64, 3, 6, 6)
    dense.train()(x + 1)
    dense.eval()
    errors = {}
    for name, refine in (("layers", None), ("refined", {"method": "snows", "cg": 8})):
        model = copy.deepcopy(dense)
        report = prune(model, list(x.split(8)), Recipe(nm="1:4", refine=refine, target={"mix": 0.8}))
        with torch.no_grad():
            errors[name] = float((model(x) - dense(x)).square().sum())
        assert all(not torch.equal(model.get_buffer(f"norm{k}.running_mean"), dense.get_buffer(f"norm{k}.running_mean"))
                   for k in (1, 2, 3))  # fmt: skip
    refined = [r["refined"] for r in report.layers if r.get("refined")]
    assert len(refined) == 3
    assert all(r["loss_before"] < 0.4 for r in refined), "an offset that the norm takes back is no error"
    assert errors["refined"] < 1.05 * errors["layers"]


# ------------------------------------------------------------------------------------------ caution with few samples


def cautious(model, batches, monkeypatch, **target):
    """(what each layer was solved with, the report) of a run."""
    seen = []
    real = loop.call

    def spy(kind, role, problem, *rest):
        seen.append((kind, problem.objective.mix, problem.objective.caution, problem.objective.per_sample()))
        return real(kind, role, problem, *rest)

    monkeypatch.setattr(loop, "call", spy)
    report = prune(model, batches, Recipe(nm="2:4", target={"importance": 0.0, **target}))
    return seen, [e for e in report.layers if e["pattern"]]


def test_targets_and_ridges_answer_to_the_inputs_per_sample_so_far(monkeypatch):
    torch.manual_seed(0)
    model = Plain().eval()
    samples = 3 * 4 * 16  # images, and positions of each
    seen, layers = cautious(model, images(), monkeypatch, mix=0.8, caution=2.0)
    fitted = [8 / samples, 24 / samples, 32 / samples, 48 / samples]  # widths 8 and 16, two blocks
    for entry, c in zip(layers, fitted, strict=True):
        assert entry["caution"] == pytest.approx(1 + 2 * c)
    for (_, mix, caution, _), c in zip(seen, [c for c in fitted for _ in range(2)], strict=True):
        assert (mix, caution) == pytest.approx((0.8 / (1 + 2 * c), 1 + 2 * c))


def test_layers_that_read_one_input_count_once(monkeypatch):
    """A fused query, key and value layer and three of its own are treated alike."""
    case = vit()
    model = case.build()
    seen, layers = cautious(model, [case.batch(2, 0)], monkeypatch, caution=1.0)
    c = 0.0
    for first in range(0, len(layers), 6):  # q, k, v, projection, two of the MLP
        each = [e["caution"] - 1 for e in layers[first : first + 6]]
        assert each[0] == each[1] == each[2] > c
        c = each[0]
        assert each[3] > c and each[4] > each[3]
        c = each[5]


def test_samples_that_few_weights_outweigh_count_as_few():
    """Kish's effective size: with all weight on one of a hundred, one sample."""
    gram = collect.Gram.zeros(torch.zeros(1, 3, 5))
    weight = torch.zeros(100)
    weight[7] = 2.0
    gram.add_inputs(torch.randn(1, 100, 5), weight)
    assert gram.per_sample() == 5.0


def test_a_caution_below_none_is_refused():
    with pytest.raises(ValueError, match="target.caution -1: is 0 or more"):
        prune(Plain(), images(), Recipe(nm="2:4", target={"caution": -1.0}))


# ------------------------------------------------------------------------------------------- what a block costs to run


@pytest.mark.parametrize(("room", "fit"), [(0, 0), (10_000, 1)])
def test_keeping_the_dense_activations_of_a_block_changes_no_bit(room, fit, monkeypatch):
    """With room for every batch, for one of them, and for none."""
    torch.manual_seed(0)
    models = [Plain().eval()]
    models.append(copy.deepcopy(models[0]))
    kept = []

    def ahead(walk, i, sites_, pairs, *rest, room=2**30):
        collect.look_ahead(walk, i, sites_, pairs, *rest, room)
        kept.append(sum(p.ahead is not None for p in pairs))

    recipe = Recipe(nm="2:4", target={"metric": 0.5})
    monkeypatch.setattr(loop, "look_ahead", ahead)
    prune(models[0], images(), recipe)
    assert kept == [3, 3]
    monkeypatch.setattr(loop, "look_ahead", functools.partial(ahead, room=room))
    prune(models[1], images(), recipe)
    assert kept[2:] == [fit] * 2, "a batch of these holds 8 kB"
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_layers_of_a_block_may_share_one_forward(monkeypatch):
    """group `block`: the second layer's inputs are those behind the dense first layer; by layer, the pruned one's."""
    torch.manual_seed(0)
    dense = Plain().eval()
    block, found = dense.blocks[0], {}
    batch = images(1)[0]
    with torch.no_grad():
        hidden = block.a(block.norm(dense.stem(batch).flatten(2).mT)).relu().reshape(-1, 16)
    for group in ("block", "layer"):
        grams = []

        def spy(*args, grams=grams):
            grams.append(collect.grams(*args))
            return grams[-1]

        monkeypatch.setattr(loop, "grams", spy)
        recipe = Recipe(nm="1:4", mask={"method": "sparsegpt"}, solve=None,
                        target={"mix": 0.0, "importance": 0.0, "residual": False, "group": group})  # fmt: skip
        prune(copy.deepcopy(dense), [batch], recipe)
        found[group] = [len(g) for g in grams[:2]], next(g for gs in grams for g in gs if g.xx.shape[-1] == 16)
    assert found["block"][0] == [2, 2] and found["layer"][0] == [1, 1]
    assert torch.allclose(found["block"][1].xx[0].float(), hidden.mT @ hidden, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found["layer"][1].xx[0].float(), hidden.mT @ hidden, rtol=1e-2)
    with pytest.raises(ValueError, match="target.group both: choose layer or block"):
        prune(dense, [batch], Recipe(nm="2:4", target={"group": "both"}))


def test_the_metric_counts_the_strongest_quarter_of_each_image():
    """Against a sum over images one by one; what is left out of the moment is what weighs least."""
    generator = torch.Generator().manual_seed(0)
    rows = {"a": torch.randn(3 * 16, 4, generator=generator), "b": torch.randn(3 * 16, 2, generator=generator)}
    parts = {name: (r, r.square().sum(1)) for name, r in rows.items()}
    moments = {}
    strong = weighing.strongest(parts, 3)
    weighing.add(moments, "input", weighing._places(parts), [strong[:5], strong[5:]], streams.Store())
    joined = torch.cat(list(rows.values()), 1).double()
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for image in joined.split(16):
        for row in sorted(image, key=lambda r: -float(r.square().sum()))[:4]:
            expected += torch.outer(row, row)
    assert torch.allclose(moments["input"].moment.double(), expected, rtol=1e-5, atol=1e-5)
    assert moments["input"].rows == {"a": slice(0, 4), "b": slice(4, 6)}
