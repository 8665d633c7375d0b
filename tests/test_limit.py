"""The pruning limit against closed forms and exact spectra."""

import contextlib
import copy
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import hf_prune
from hf_prune import allocation, curvature, limit, limit_page, loop, recipe
from hf_prune import page as report_page
from hf_prune.curvature import measure
from hf_prune.permute import some
from hf_prune.spectrum import Lanczos, Removal, bounds, fixed_point, from_trace, kept, mean_curvature, probe


def runs_of(matrix, probes=4, steps=32, basis=True):
    found = []
    for number in range(probes):
        start = probe(len(matrix), 0, number, matrix.dtype, "cpu")
        run = Lanczos(lambda v: matrix @ v, start, basis=basis)
        for _ in range(steps):
            run.step()
        found.append(run)
    return found


def spectrum_matrix(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return q @ torch.diag(values) @ q.T


def share_of(values, mu):
    return float((values.abs() / (values.abs() + mu)).mean())


# --------------------------------------------------------------------------------------------------------- quadrature
@pytest.mark.parametrize("scale", [3.0, -0.25, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multiple_of_the_identity_is_exact(scale, dtype):
    """H = l I: one step, and the share l / (l + mu) to the last digits."""
    run = Lanczos(lambda v: scale * v, probe(50, 0, 0, dtype, "cpu"), basis=False)
    for _ in range(5):
        run.step()
    assert run.steps == 1 and run.ended
    for mu in (1e-3, 1.0, 40.0):
        assert kept([run.gauss()], mu) == pytest.approx(abs(scale) / (abs(scale) + mu), rel=1e-6)
        if scale > 0:
            assert bounds([run])(mu) == pytest.approx((scale / (scale + mu),) * 2, rel=1e-6)


def test_lanczos_quadrature_is_the_exact_trace_once_the_space_is_exhausted():
    values = torch.linspace(-2, 5, 12, dtype=torch.float64)
    found = runs_of(spectrum_matrix(values), probes=400, steps=12)
    assert kept([r.gauss() for r in found], 0.7) == pytest.approx(share_of(values, 0.7), abs=0.01)
    assert mean_curvature([r.gauss() for r in found]) == pytest.approx(float(values.abs().mean()), rel=0.02)


@pytest.mark.parametrize("basis", [True, False])
@pytest.mark.parametrize("steps", [2, 5, 11, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gauss_and_radau_enclose_the_quadratic_form(basis, steps, dtype):
    """For every single probe, at any number of steps, with and without re-orthogonalisation, rank-deficient or not."""
    values = torch.cat([torch.zeros(40), torch.logspace(-5, 1, 80)]).double()
    matrix = spectrum_matrix(values)
    eigen, vectors = torch.linalg.eigh(matrix)
    for run in runs_of(matrix.to(dtype), probes=3, steps=steps, basis=basis):
        number = len(run.alphas)
        assert number == steps
    for number, run in enumerate(runs_of(matrix.to(dtype), probes=3, steps=steps, basis=basis)):
        weight = (vectors.T @ probe(120, 0, number, torch.float64, "cpu")).square() / 120
        for mu in (1e-4, 1e-2, 1.0):
            exact = float((weight * (eigen.clamp_min(0) / (eigen.clamp_min(0) + mu))).sum())
            low, high = bounds([run])(mu)
            slack = 1e-9 if dtype == torch.float64 else 2e-4
            assert low - slack <= exact <= high + slack
            if steps == 24 and mu == 1.0:
                assert high - low < 1e-3


def test_the_interval_over_probes_holds_the_trace():
    values = torch.logspace(-6, 1, 300, dtype=torch.float64)
    matrix = spectrum_matrix(values)
    interval = bounds(runs_of(matrix, probes=12, steps=20, basis=False))
    for mu in (1e-4, 1e-2, 1.0):
        low, high = interval(mu)
        assert low <= share_of(values, mu) <= high
    assert high - low < 0.1


# -------------------------------------------------------------------------------------------------------- fixed point
def test_removal_is_the_brute_force_distance():
    w = torch.randn(101, dtype=torch.float64)
    removal = Removal(w)
    assert removal(0.0) == 0.0
    for k in (1, 17, 100, 101):
        gone = w.abs().sort().values[:k]
        assert removal(k / 101) == pytest.approx(float(gone.square().sum()))
        assert removal.inverse(removal(k / 101)) == pytest.approx(k / 101)
    between = [removal(s / 1000) for s in range(1001)]
    assert between == sorted(between)


def test_a_large_removal_is_interpolated(monkeypatch):
    w = torch.randn(5000)
    whole = Removal(w)
    monkeypatch.setattr(Removal, "POINTS", 500)
    for s in (0.05, 0.5, 0.93):
        assert Removal(w)(s) == pytest.approx(whole(s), rel=1e-2)


def test_the_fixed_point_solves_the_equation_and_rises_with_eps():
    values, w = torch.logspace(-5, 2, 200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    removal, rule = Removal(w), (values, torch.full((200,), 1 / 200, dtype=torch.float64))
    found = []
    for eps in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        s = fixed_point(lambda mu: kept([rule], mu), removal, eps)
        r2 = 2 * eps / values
        assert s == pytest.approx(float((r2 / (removal(s) + r2)).mean()), abs=1e-9)  # the paper's form
        found.append(s)
        assert fixed_point(from_trace(float(values.mean())), removal, eps) <= s  # the trace form asks for more
    assert found == sorted(found) and found[0] < found[-1]
    with pytest.raises(ValueError, match="--eps 0"):
        fixed_point(lambda mu: 0.5, removal, 0.0)


@pytest.mark.parametrize("c", [1e-3, 7.0, 1e4])
def test_invariances(c):
    """(loss, eps) -> (c loss, c eps) scales H by c; w -> c w scales H by 1 / c²: neither moves the sparsity."""
    values, w = torch.logspace(-5, 2, 200, dtype=torch.float64), torch.randn(200, dtype=torch.float64)
    even = torch.full((200,), 1 / 200, dtype=torch.float64)

    def limit_of(values, w, eps):
        return fixed_point(lambda mu: kept([(values, even)], mu), Removal(w), eps)

    once = limit_of(values, w, 0.05)
    assert limit_of(c * values, w, c * 0.05) == pytest.approx(once, abs=1e-9)
    assert limit_of(values / c**2, c * w, 0.05) == pytest.approx(once, abs=1e-9)


def test_exact_zeros_are_free():
    w = torch.cat([torch.zeros(60), torch.randn(40)])
    stiff = lambda mu: 0.0 if mu == float("inf") else 1.0  # noqa: E731
    assert fixed_point(stiff, Removal(w), 0.01) == pytest.approx(0.6, abs=0.011)


# ------------------------------------------------------------------------------------------------- operators on models
class Mlp(nn.Module):
    def __init__(self, hidden=8, classes=10):
        super().__init__()
        self.a, self.b = nn.Linear(64, hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def digits(count=256):
    """(train batches with labels, held-out batches) of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]
    cut = lambda a, b: list(zip(x[a:b].split(128), y[a:b].split(128), strict=True))  # noqa: E731
    return cut(0, count), cut(1000, 1400)


def trained(model, batches, steps=150, l1=0.0):
    """Adam on all batches at once: a small loss, yet not at its minimum."""
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    best = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y) + l1 * sum(p.abs().sum() for p in model.parameters())
        best.zero_grad()
        loss.backward()
        best.step()
    return model.eval()


ALL = loop.Recipe(prune_head=True, prune_stem=True)


def task_of(model, batches, memory=2.0**30):
    return limit.task_of(model, batches, ALL, memory)


def dense_matrix(task, kind):
    return torch.stack([task.product(v, kind) for v in torch.eye(len(task.weights), dtype=task.weights.dtype)])


def brute_hessian(model, batches):
    """torch.func's Hessian over the weights of an Mlp, by definition and without hf_prune."""
    shapes = [p.shape for p in (model.a.weight, model.b.weight)]
    flat = torch.cat([model.a.weight.detach().flatten(), model.b.weight.detach().flatten()])
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])

    def loss(w):
        a, b = w.split([s.numel() for s in shapes])
        named = {"a.weight": a.view(shapes[0]), "b.weight": b.view(shapes[1])}
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    return torch.func.hessian(loss)(flat).detach(), torch.func.grad(loss)(flat).detach()


def test_products_are_those_of_the_brute_force_hessian():
    batches = [(x.double(), y) for x, y in digits(96)[0]]
    model = trained(Mlp(5).double(), batches, 60)
    task = task_of(model, batches)
    exact, gradient = brute_hessian(model, batches)
    torch.testing.assert_close(dense_matrix(task, "hessian"), exact)
    torch.testing.assert_close(task.gradient(), gradient)
    newton = dense_matrix(task, "gauss-newton")
    jacobian = []
    for x, _ in batches:
        p = model(x).softmax(-1)
        for i in range(len(x)):
            for c in range(10):
                g = torch.autograd.grad(model(x[i : i + 1])[0, c], [model.a.weight, model.b.weight])
                jacobian.append(torch.cat([t.flatten() for t in g]))
    j = torch.stack(jacobian).view(-1, 10, len(task.weights))
    p = torch.cat([model(x).softmax(-1) for x, _ in batches]).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    by_hand = torch.einsum("ncp,ncd,ndq->pq", j, middle, j) / len(p)
    torch.testing.assert_close(newton, by_hand)
    v = torch.randn_like(task.weights)
    assert task.form(v) == pytest.approx(float(v @ by_hand @ v))
    assert all(p.requires_grad for p in model.parameters()), "the model is left as it was"


@pytest.mark.parametrize("memory", [0.0, 1e5, 2.0**30])
def test_kept_graphs_change_nothing(memory):
    batches = digits(192)[0]
    model = trained(Mlp(5), batches, 20)
    v = torch.randn(64 * 5 + 50, generator=torch.Generator().manual_seed(1))
    task, rebuilt = task_of(model, batches, memory=memory), task_of(model, batches, memory=0)
    for kind in ("hessian", "gauss-newton", "hessian"):
        for _ in range(2):
            torch.testing.assert_close(task.product(v, kind), rebuilt.product(v, kind))
    with task.at(torch.zeros_like(task.weights)):
        assert float(model.a.weight.detach().abs().max()) == 0
    torch.testing.assert_close(task.product(v, "hessian"), rebuilt.product(v, "hessian"))


class Mixed(nn.Module):
    """Norms, attention and activations of every kind that linearised.py treats on its own."""

    def __init__(self, scale: bool = True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.norm, self.qkv, self.out = nn.LayerNorm(6, elementwise_affine=scale), nn.Linear(6, 18), nn.Linear(6, 10)
        self.acts = [nn.SiLU(inplace=True), nn.Hardswish(), nn.Tanh(), nn.Softplus(), nn.GELU()]

    def forward(self, x):
        x = self.acts[0](self.bn(self.conv(x))).flatten(2).mT
        for act in self.acts[1:]:
            q, k, v = self.qkv(self.norm(x)).view(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4)
            x = x + act(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(self.norm(x).mean(1).sigmoid())


@pytest.mark.parametrize("scale", [True, False])
def test_products_of_linearised_layers_are_those_of_torch(scale, monkeypatch):
    torch.manual_seed(0)
    model = Mixed(scale).double()
    for p in [*model.norm.parameters(), *model.bn.parameters()]:
        nn.init.normal_(p)
    model.bn.running_mean.normal_()
    batches = [(x.double().view(-1, 1, 8, 8), y) for x, y in digits(6)[0]]
    task = task_of(model, batches)
    ours = dense_matrix(task, "gauss-newton")
    assert float(ours.diagonal().min()) > 0, "every weight moves the outputs"
    monkeypatch.setattr(curvature, "linear", contextlib.nullcontext)
    torch.testing.assert_close(ours, dense_matrix(task_of(model, batches), "gauss-newton"), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def digits_mlp():
    torch.manual_seed(0)
    batches, held = digits()
    return trained(Mlp(), batches), batches, held


@pytest.fixture(scope="module")
def study(digits_mlp):
    model, batches, held = digits_mlp
    options = limit.Options(eps=("auto", 0.01, 0.05, 0.2, 0.5), probes=16)
    return limit.limit(model, batches, held, recipe=ALL, options=options)


def test_the_digits_mlp_is_within_a_hundredth_of_its_exact_spectrum(digits_mlp, study):
    model, batches, _ = digits_mlp
    task = task_of(model, batches)
    removal = Removal(task.weights)
    exact = torch.linalg.eigvalsh(brute_hessian(model, batches)[0].double())
    newton = torch.linalg.eigvalsh(dense_matrix(task, "gauss-newton").double()).clamp_min(0)
    even = torch.full_like(exact, 1 / len(exact))
    for row in study.rows:
        true = fixed_point(lambda mu: kept([(exact, even)], mu), removal, row["value"])
        assert row["spectral"] == pytest.approx(true, abs=0.01), row["eps"]
        true = fixed_point(lambda mu: kept([(newton, even)], mu), removal, row["value"])
        low, high = row["gauss_newton"]
        assert low <= true <= high and high - low <= 0.03, row["eps"]
        assert row["trace"] <= row["spectral"]
    for key in ("measured", "quadratic", "trace", "spectral"):
        order = [row[key] for row in sorted(study.rows, key=lambda row: row["value"])]
        assert order == sorted(order) and order[0] < order[-1], f"{key} rises with eps"


def test_measured_knees_are_knees(digits_mlp, study):
    model, batches, _ = digits_mlp
    task = task_of(model, batches)
    order = task.weights.abs().argsort()
    before = measure(model, task.images)["loss"]

    def rise(sparsity):
        w = task.weights.clone()
        w[order[: round(sparsity * len(w))]] = 0
        with task.at(w):
            return measure(model, task.images)["loss"] - before

    for row in study.rows:
        assert rise(row["measured"]) <= row["value"]
        assert max(rise(row["measured"] + step / 1000) for step in range(1, 4)) > row["value"]


def test_the_study_is_complete_and_honest(study):
    assert study.model["loss"] == "labels" and not study.model["vacuous"]
    assert study.runs["gauss-newton"]["ended_by"] in ("narrow", "probes")
    assert sum(layer["trace_share"] for layer in study.layers) == pytest.approx(1)
    assert sum(layer["share"] for layer in study.layers) == pytest.approx(1)
    for key in ("global_sparsity", "lamp_sparsity"):
        zeros = sum(layer[key] * layer["share"] for layer in study.layers)
        assert zeros == pytest.approx(study.layers[0]["sparsity"], abs=1e-3)
    nm = study.nm
    assert nm["sparsity"] == pytest.approx(0.5) and nm["misfits"] == []
    assert nm["sparsity"] > nm["equivalent_sparsity"] - 0.2 and 0 < nm["energy_removed"] < 1
    assert nm["measured"]["held_out_accuracy"] > 0.3


def test_few_images_make_gauss_newton_vacuous(digits_mlp):
    model, batches, _ = digits_mlp
    few = [(batches[0][0][:8], batches[0][1][:8])]
    found = limit.limit(model, few, recipe=ALL, options=limit.Options(eps=(0.05,), probes=4, steps=12))
    assert found.model["vacuous"] and found.model["rank_cap"] == pytest.approx(72 / (64 * 8 + 80))
    assert found.rows[0]["gauss_newton"][0] >= 1 - found.model["rank_cap"] - 1e-9


def test_without_labels_the_predicted_classes_are_the_targets(digits_mlp):
    model, batches, _ = digits_mlp
    inputs = [x for x, _ in batches]
    found = limit.limit(model, inputs, recipe=ALL, options=limit.Options(eps=(0.05,), probes=2, steps=6))
    assert found.model["loss"] == "predicted classes" and found.dense["accuracy"] == 1.0


def test_the_time_limit_ends_the_work_and_is_said(digits_mlp):
    model, batches, _ = digits_mlp
    found = limit.limit(model, batches, recipe=ALL, options=limit.Options(eps=(0.05,), seconds=0.0))
    assert found.runs["gauss-newton"]["ended_by"] == "time" and found.rows[0]["measured"] > 0
    assert found.rows[0]["gauss_newton"] is None and found.rows[0]["spectral"] is None
    page = limit_page.page(found, "a model")
    assert "\n  - " in page and "Gauss-Newton: not computed, the time limit was reached" in page


def test_a_recipe_is_measured_at_the_estimate(digits_mlp):
    model, batches, held = digits_mlp
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refit = loop.Recipe(name="least squares", mask={"method": "obs"}, solve={"method": "least_squares"})
    found = limit.limit(
        model, batches, held, recipe=ALL, refit=refit, options=limit.Options(eps=(0.2,), probes=4, steps=16)
    )
    row = found.rows[0]
    assert row["refit"]["sparsity"] == round(row["spectral"], 3)
    zeroed = limit.limit(model, batches, recipe=ALL, refit=loop.Recipe(mask={"method": "magnitude"}, solve=None),
                         options=limit.Options(eps=(0.2,), probes=4, steps=16)).rows[0]  # fmt: skip
    assert row["refit"]["rise"] < zeroed["refit"]["rise"], "solving for the kept weights is better than zeroing"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is left as it was"


@pytest.mark.parametrize("bad", [{"eps": (0.0,)}, {"eps": ("never",)}, {"probes": 0}, {"eps": (float("nan"),)}])
def test_options_teach(bad):
    with pytest.raises(ValueError, match="--eps|--probes"):
        limit.Options(**bad)


def test_attention_models_work():
    """transformers' ViT with its default (fused) attention, and a bare one without logits."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                       patch_size=8, num_labels=5)  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(12, 3, 16, 16)
    for model in (ViTForImageClassification(config).eval(), ViTModel(config).eval()):
        batches = [{"pixel_values": part} for part in x.split(4)]
        found = limit.limit(model, batches, options=limit.Options(eps=(0.05,), probes=3, steps=8))
        low, high = found.rows[0]["gauss_newton"]
        assert 0 <= low <= high <= 1
        assert found.model["loss"] == ("representation" if isinstance(model, ViTModel) else "predicted classes")
        assert (found.rows[0]["spectral"] is None) == isinstance(model, ViTModel)


# --------------------------------------------------------------------------------------------------------------- ranks
def one_rank(rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = Mlp(6).eval()
    found = limit.limit(model, noise()[rank::size], noise()[rank::size], recipe=ALL, options=SMALL)
    torch.save({"rows": found.rows, "nm": found.nm, "layers": found.layers}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def noise():
    """Three batches of random images with labels."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(90, 64, generator=generator), torch.randint(0, 10, (90,), generator=generator)
    return list(zip(x.split(30), y.split(30), strict=True))


SMALL = limit.Options(eps=("auto", 0.05), probes=3, steps=8, seconds=600.0)


def test_two_processes_equal_one(tmp_path):
    """Uneven shares: two batches and one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(one_rank, (2, port, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    assert both[0] == both[1]
    torch.manual_seed(0)
    model = Mlp(6).eval()
    alone = limit.limit(model, noise(), noise(), recipe=ALL, options=SMALL)
    for mine, theirs in zip(alone.rows, both[0]["rows"], strict=True):
        for key in ("value", "measured", "quadratic", "trace", "spectral"):
            assert theirs[key] == pytest.approx(mine[key], abs=1e-3), key
        assert theirs["gauss_newton"] == pytest.approx(mine["gauss_newton"], abs=1e-3)
        assert theirs["measured_at"] == pytest.approx(mine["measured_at"], abs=1e-4)
    assert both[0]["nm"]["measured"] == pytest.approx(alone.nm["measured"], abs=1e-4)


def test_traces_are_those_of_the_layers():
    batches = [(x.double(), y) for x, y in digits(128)[0]]
    model = trained(Mlp(5).double(), batches, 60)
    task = task_of(model, batches)
    blocks = task.split(dense_matrix(task, "gauss-newton").diagonal())
    found = sum(task.traces(seed) for seed in range(300)) / 300
    for mine, block in zip(found.tolist(), blocks, strict=True):
        assert mine == pytest.approx(float(block.sum()), rel=0.05)


# ------------------------------------------------------------------------------------------------------------- command
@pytest.fixture(scope="module")
def digit_images(tmp_path_factory):
    """A folder of images with the splits train and test, of the demo's digits."""
    from hf_prune import demo

    folder, data = tmp_path_factory.mktemp("digits"), demo.digits()
    for split, pairs in (("train", data.calibration[:40]), ("test", data.test[:30])):
        for i, (image, label) in enumerate(pairs):
            place = folder / split / demo.NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.png")
    return folder


def command(capsys, *words):
    from hf_prune import cli

    code = cli.main(["limit", *map(str, words)])
    return code, *capsys.readouterr()


QUICK = "--samples 32 --batch-size 32 --probes 2 --steps 2 --device cpu --eps auto 0.2".split()


def test_the_page_of_the_demo_model(digit_images, tmp_path, capsys):
    from hf_prune import assets

    out = tmp_path / "out"
    code, page, said = command(
        capsys, assets.path("data", "demo"), "--dataset", digit_images, *QUICK, "--recipe", "magnitude",
        "--output-dir", out, "--only", "*mlp*",
    )  # fmt: skip
    assert code == 0, said
    assert max(map(len, page.splitlines())) <= 80
    assert page == (out / "limit.txt").read_text()
    told = json.loads((out / "limit.json").read_text())
    short = " ".join(page.split("\n\n")[1].split())
    row = told["rows"][1]
    assert short.startswith("In short, where the mean loss may rise by 0.2: ") and f"{row['measured']:.3f}"[1:] in short
    for word in ("zeroing", "held-out", "quadratic", "trace", "spectral |H|", "Gauss-Newton", "isotropic", "calib."):
        assert f"\n  {word}" in page, f"the column {word} is explained"
    assert "\n  few " in page and all(row["spectral_settled"] is False for row in told["rows"])
    assert "VACUOUS" in page and "an estimate" not in page.split("MEASURED with magnitude")[1].split("Is 2:4")[0]
    for row in told["rows"]:
        assert f"{row['measured']:.3f}"[1:] in page
    worst = max(row["value"] for row in told["rows"])
    assert ("NOT safe" in page) == (told["nm"]["measured"]["held_out_rise"] > worst), "held-out images judge"
    assert told["seed"] == 0 if "seed" in told else told["options"]["seed"] == 0
    assert told["recipe"] == "magnitude" and told["rows"][0]["refit"]["sparsity"] > 0
    assert (out / "limit.png").stat().st_size > 10_000 and "<svg" in (out / "limit.svg").read_text()[:2000]
    (picture,) = report_page.limits([tmp_path, out])
    assert len(picture.rows) == len(told["rows"]) and f"{told['rows'][1]['measured']:.3f}"[1:] in picture.words
    (out / "limit.json").write_text("{}")
    with pytest.raises(ValueError, match="is no study of hf-prune limit"):
        report_page.limits([out])


def test_json_goes_to_stdout_alone(digit_images, capsys):
    from hf_prune import assets

    code, out, _ = command(capsys, assets.path("data", "demo"), "--dataset", digit_images, *QUICK, "--json", "--quiet",
                           "--only", "*layers.0.mlp*", "--eps", "0.1", "--nm", "1:4")  # fmt: skip
    told = json.loads(out)
    assert code == 0 and told["nm"]["pattern"] == "1:4" and [row["eps"] for row in told["rows"]] == ["0.1"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--eps", "0"], "--eps 0"),
        (["--eps", "small"], "--eps small"),
        (["--nm", "4:2"], "--nm 4:2"),
        (["--probes", "0"], "--probes 0"),
        (["--set", "solve.ridge=1"], "--recipe NAME"),
        (["--recipe", "snow"], "recipes that ship"),
        (["--time-limit", "-1"], "--time-limit"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(words, part, capsys):
    code, out, said = command(capsys, "no-such-model", *words)
    assert code == 2 and part in said and out == ""


def test_help_does_not_wait_for_torch():
    code = "import sys, hf_prune.cli as c\ntry: c.main(['limit', '--help'])\nfinally: print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and answer.stdout.strip().splitlines()[-1] == "False"
    assert max(map(len, answer.stdout.splitlines())) <= 80


# ---------------------------------------------------------------------------------------------- a maintained library
def test_products_agree_with_curvlinops(digits_mlp):
    """Optional: pip install curvlinops-for-pytorch."""
    curvlinops = pytest.importorskip("curvlinops", reason="not installed; the brute-force test needs none")
    model, batches, _ = digits_mlp
    task = task_of(model, batches)
    v = torch.randn(len(task.weights), generator=torch.Generator().manual_seed(5))
    weights = [model.a.weight, model.b.weight]
    for kind, theirs in (("hessian", curvlinops.HessianLinearOperator), ("gauss-newton", curvlinops.GGNLinearOperator)):
        operator = theirs(model, nn.CrossEntropyLoss(), weights, batches)
        torch.testing.assert_close(task.product(v, kind), operator @ v, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- allocation
MAGNITUDE = {"mask": "magnitude", "solve": "none", "scope": "model", "sparsity": 0.6, "prune_head": True}


class Linear(nn.Module):
    """Two layers with nothing between them: rescaling one against the other is exact."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 12), nn.Linear(12, 10)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("rule", ["lamp", "trace"])
@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_an_allocation_is_used_only_where_the_measured_loss_falls(rule, scale):
    torch.manual_seed(0)
    batches = digits()[0]
    dense = trained(Linear(), batches, 100)
    dense.a.weight.data *= scale  # |w| of one layer against the other changes, the function does not
    dense.a.bias.data *= scale
    dense.b.weight.data /= scale
    images = limit.targets(dense, batches)
    losses, kept = {}, {}
    for each in ("magnitude", rule):
        model = copy.deepcopy(dense)
        report = hf_prune.prune(model, batches, {**MAGNITUDE, "allocation": each})
        losses[each] = measure(model, images)["loss"]
        kept[each] = sum(entry["kept"] for entry in report.layers if entry["pattern"])
    assert kept[rule] == kept["magnitude"]
    (note,) = report.notes
    if "not used" in note:
        assert losses[rule] == losses["magnitude"]
    else:
        assert losses[rule] < losses["magnitude"]
    if scale == 0.05:
        assert "is used" in note, "magnitude would empty the layer that was scaled down"


def test_ruins_are_not_compared():
    """At 97 % zeros both rules leave less than an answer that ignores the image; fewer zeros tell them apart."""
    torch.manual_seed(0)
    batches = digits()[0]
    dense = trained(Linear(), batches, 100)
    dense.a.weight.data *= 0.05
    dense.a.bias.data *= 0.05
    dense.b.weight.data *= 20 * 10  # sharp answers: what is wrong is wrong by much
    dense.b.bias.data *= 10
    images = limit.targets(dense, list(some(batches, allocation.JUDGES)))

    def rise(rule, sparsity):
        model = copy.deepcopy(dense)
        chosen = loop.choose(model, batches[0][0], recipe.load(MAGNITUDE, allocation=rule, sparsity=sparsity))
        named = dict(model.named_parameters())
        with torch.no_grad():
            for s in (s for u in chosen.units for s in u.sites):
                w = s.read(named[s.parameter])
                s.write(named[s.parameter], w * chosen.patterns[s.name].mask(w.abs()))
        return measure(model, images)["loss"] - measure(dense, images)["loss"]

    report = hf_prune.prune(copy.deepcopy(dense), batches, {**MAGNITUDE, "allocation": "lamp", "sparsity": 0.97})
    tried = next(t for k in range(5) if min(rise(r, t := 0.97 / 2**k) for r in ("magnitude", "lamp")) < math.log(10))
    assert tried < 0.97
    (note,) = report.notes
    said = f"zeroing {100 * tried:.3g} % of the weights by it raises the calibration loss by"
    assert f"{said} {rise('lamp', tried):.4g}," in note
    assert ("is used" in note) == (rise("lamp", tried) < rise("magnitude", tried))


def test_trace_needs_one_layerwise_stage():
    with pytest.raises(ValueError, match="--allocation trace"):
        hf_prune.prune(Linear(), digits()[0], {**MAGNITUDE, "allocation": "trace", "stages": 2})
