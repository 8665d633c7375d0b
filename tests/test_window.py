"""The K-step objective: derivatives against finite differences, explicit Jacobians and torch's own Hessian, in float64;
and K counted as in the paper."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_prune import sites, walk
from hf_prune.collect import Pair
from hf_prune.window import Window

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import architectures  # noqa: E402

D = torch.float64


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(n, t, c))


class Block(nn.Module):
    def __init__(self, width=4, heads=2):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(4, 3)

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return self.head(x.mean(1))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
            for _ in range(3)
        )

    def forward(self, x):
        for b in self.blocks:
            x = b(x)
        return x


def window(
    model, batches, name, steps, *, index=None, mix=0.0, curvature="gauss-newton", relative=True, whole_unit=False
):
    model = model.double().eval()
    for p in model.parameters():
        p.requires_grad_(False)
    found = sites.find(model, batches[0])
    units, _ = walk.units(model, found, found.sites, batches[0])
    way = walk.Walk(model, units, batches[0])
    i, site = next((i, s) for i, u in enumerate(units) for s in u.sites if s.parameter == name)
    entries = way.enter(batches)
    for j in range(i):
        entries = [way.advance(j, e) for e in entries]
    changed = units[i].sites if whole_unit else [site]
    dense = {s.parameter: model.get_parameter(s.parameter).detach().clone() for s in changed}
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for e in entries:
        drifted = dict(e)
        if mix:  # the pruned network's activations differ from the dense one's
            args, kwargs = e["call"]
            drifted["call"] = (
                tuple(a + 0.1 * torch.randn(a.shape, generator=generator, dtype=D) for a in args),
                kwargs,
            )
        pairs.append(Pair(e, drifted))
    w = Window(way, i, changed, pairs, dense, steps, mix, relative, curvature)
    point = w.read() + 0.3 * torch.randn(w.read().shape, generator=generator, dtype=D)
    return w, point


def tokens(n=2):
    return [torch.randn(2, 3, 4, dtype=D) for _ in range(n)]


def images(n=2):
    return [torch.randn(2, 2, 5, 5, dtype=D) for _ in range(n)]


CASES = [
    (Transformer, tokens, "blocks.0.attn.qkv.weight", 0),
    (Transformer, tokens, "blocks.0.attn.qkv.weight", 3),
    (Transformer, tokens, "blocks.0.attn.proj.weight", None),
    (Transformer, tokens, "blocks.0.fc1.weight", 2),
    (Transformer, tokens, "blocks.0.fc2.weight", 2),  # reaches into the second block
    (Convolutional, images, "blocks.0.0.weight", 1),
    (Convolutional, images, "blocks.1.3.weight", 3),
    (Convolutional, images, "blocks.0.0.weight", 4),  # reaches into the second block
]
IDS = [f"{c[2]} K={c[3]}" for c in CASES]


def flat_terms(w, point):
    """(scaled differences to the target, of every batch) as a function of the flat weights."""
    w.write(point)
    parts = []
    for i, pair in enumerate(w.pairs):
        for f, t, s in zip(w._terms(pair.pruned), w.targets[i], w.scale, strict=True):
            parts.append(((f - t) / s**0.5).flatten())
    return torch.cat(parts) / len(w.pairs) ** 0.5


@pytest.mark.parametrize(("model", "data", "name", "steps"), CASES, ids=IDS)
@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_value_and_gradient_against_finite_differences(model, data, name, steps, mix):
    w, point = window(model(), data(), name, steps, mix=mix)
    value, gradient = w.gradient(point)
    with torch.no_grad():
        assert value == pytest.approx(float(flat_terms(w, point).square().sum()), rel=1e-10)
        assert value == pytest.approx(w.value(point), rel=1e-12)
    for _ in range(3):
        v = torch.randn_like(point)
        h = 1e-6
        difference = (w.value(point + h * v) - w.value(point - h * v)) / (2 * h)
        assert float(gradient @ v) == pytest.approx(difference, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("model", "data", "name", "steps"), CASES, ids=IDS)
def test_the_gauss_newton_product_against_an_explicit_jacobian(model, data, name, steps):
    w, point = window(model(), data(), name, steps)
    h = 1e-6
    with torch.no_grad():
        columns = [
            (flat_terms(w, point + h * e) - flat_terms(w, point - h * e)) / (2 * h)
            for e in torch.eye(len(point), dtype=D)
        ]
    jacobian = torch.stack(columns, 1)
    v = torch.randn_like(point)
    assert torch.allclose(w.product(point, v), 2 * jacobian.T @ (jacobian @ v), rtol=1e-5, atol=1e-7)
    assert float(v @ w.product(point, v)) >= 0


@pytest.mark.parametrize(
    ("model", "data", "name", "steps"),
    [CASES[1], CASES[3], CASES[5], CASES[7]],
    ids=["attention", "mlp", "first", "across"],
)
def test_the_hessian_product_against_torchs_hessian(model, data, name, steps):
    w, point = window(model(), data(1), name, steps, curvature="hessian")
    (site,) = w.sites
    parameter = w.named[site.parameter]

    def loss(p):  # of the parameter as it is stored
        with torch.nn.utils.parametrize.cached(), sdpa_kernel(SDPBackend.MATH):
            module = w.walk.model.get_submodule(site.module)
            module._parameters["weight"], kept = p, module._parameters["weight"]
            try:
                w.walk.model.get_parameter = lambda n: (
                    p if n == site.parameter else nn.Module.get_parameter(w.walk.model, n)
                )
                terms = w._terms(w.pairs[0].pruned)
            finally:
                del w.walk.model.get_parameter
                module._parameters["weight"] = kept
            return sum((f - t).square().sum() / s for f, t, s in zip(terms, w.targets[0], w.scale, strict=True))

    w.write(point)
    with torch.enable_grad():
        stored = parameter.detach().clone()
        hessian = torch.autograd.functional.hessian(loss, stored).view(stored.numel(), stored.numel())
    v = torch.randn_like(point)
    direction = torch.zeros_like(stored)
    site.write(direction, v.view(site.shape))
    expected = site.read((hessian @ direction.flatten()).view_as(stored)).flatten()
    assert torch.allclose(w.product(point, v), expected, rtol=1e-8, atol=1e-10)


def test_the_difference_product_is_close_to_gauss_newton():
    w, point = window(Transformer(), tokens(), "blocks.0.attn.qkv.weight", None)
    v = torch.randn_like(point)
    exact = w.product(point, v)
    w.curvature = "difference"
    assert float((w.product(point, v) - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton", "difference"])
@pytest.mark.parametrize(("model", "data", "name", "steps"), [CASES[1], CASES[6]], ids=["attention", "convolution"])
def test_products_by_kept_graphs_are_those_without(model, data, name, steps, curvature):
    """Bit for bit; and other weights, written or changed in place, make graphs anew."""
    torch.manual_seed(0)
    w, point = window(model(), data(), name, steps, curvature=curvature)
    other = point + 0.1 * torch.randn_like(point)
    vs = [torch.randn_like(point) for _ in range(3)]
    room, w.graphs.memory = w.graphs.memory, 0
    apart = [[w.product(at, v) for v in vs] for at in (point, other)]
    assert not w.graphs.kept
    w.graphs.memory = room
    moving = point.clone()
    for at, expected in zip((point, other), apart, strict=True):
        moving.copy_(at)
        for v, e in zip(vs, expected, strict=True):
            assert torch.equal(w.product(moving, v), e)
            assert torch.equal(w.read(), at)
        assert len(w.graphs.kept) == len(w.pairs)
    w.value(point)
    assert not w.graphs.kept
    assert torch.equal(w.product(moving, vs[0]), apart[1][0])
    if curvature != "difference":
        assert not torch.equal(apart[0][0], apart[1][0])


def test_all_weights_of_a_unit_together():
    w, point = window(Transformer(), tokens(), "blocks.0.fc1.weight", None, whole_unit=True)
    assert len(w.sites) == 4 and len(point) == sum(s.numel for s in w.sites)
    _, gradient = w.gradient(point)
    v = torch.randn_like(point)
    difference = (w.value(point + 1e-6 * v) - w.value(point - 1e-6 * v)) / 2e-6
    assert float(gradient @ v) == pytest.approx(difference, rel=1e-5)
    w.write(point)
    assert torch.equal(w.read(), point)


def test_at_the_dense_weights_the_loss_is_zero():
    w, _ = window(Transformer(), tokens(), "blocks.0.attn.qkv.weight", 3)
    dense = torch.cat([s.read(w.dense[s.parameter]).flatten() for s in w.sites])
    value, gradient = w.gradient(dense)
    assert value == 0 and not gradient.any()


SHAPES = {  # of the outputs that count, for two images of 17 tokens
    "q_proj": ["attention", "fc1", "act", "fc2"],
    "k_proj": ["attention", "fc1", "act", "fc2"],
    "v_proj": ["attention", "fc1", "act", "fc2"],
    "o_proj": ["attention", "fc1", "act", "fc2"],
    "fc1": ["fc1", "act", "fc2", "attention"],
    "fc2": ["fc2", "attention", "fc1", "act"],
}


@pytest.mark.parametrize("layer", SHAPES)
def test_k_counts_attention_output_fc1_gelu_and_fc2(layer):
    """As the paper does for a ViT: query, key and value belong to the attention, whose output is its projection's."""
    case = {c.name: c for c in architectures.cases()}["ViTForImageClassification"]
    model, batch = case.build(), case.batch(2, 0)
    names = [n for n, _ in model.named_parameters() if f".{layer}.weight" in n]
    seen = {}
    w, point = window(model, [{"pixel_values": batch["pixel_values"].double()}], names[0], 3)

    def note(kind, index):
        def hook(module, args, out):
            seen[kind, index] = out.detach().clone()

        return hook

    hooks = []
    for i, u in enumerate(w.walk.units):
        for n, m in u.module.named_modules():
            kind = {"o_proj": "attention", "fc1": "fc1", "fc2": "fc2"}.get(n.rpartition(".")[2])
            kind = kind or ("act" if "activation" in n or n.endswith("act_fn") else None)
            if kind:
                hooks.append(m.register_forward_hook(note(kind, i)))
    with walk._hooks(*hooks), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        sites.feed(w.walk.model, {"pixel_values": batch["pixel_values"].double()})
    order, block, terms = [], w.index, w.targets[0]
    for kind in SHAPES[layer]:
        if order and ["attention", "fc1", "act", "fc2"].index(kind) < ["attention", "fc1", "act", "fc2"].index(
            order[-1][0]
        ):
            block += 1
        order.append((kind, block))
    assert len(terms) == 4, "K + 1 operations: the layer's own and three more"
    for (kind, block), term in zip(order, terms, strict=True):
        assert (kind, block) in seen, sorted(seen)
        assert torch.allclose(term, seen[kind, block], atol=1e-12), (kind, block)
    assert w.last == order[-1][1]


def test_a_window_of_a_convolutional_network_crosses_blocks():
    w, _ = window(Convolutional(), images(), "blocks.0.0.weight", 4)
    assert w.walk.units[w.last].name.startswith("blocks.1")
    assert [t.shape[1] for t in w.targets[0]] == [4, 4, 2, 4, 4], "conv, relu, conv, conv, relu"


def test_a_window_ends_with_the_model():
    w, _ = window(Convolutional(), images(), "blocks.2.0.weight", 10)
    assert [t.shape[1] for t in w.targets[0]] == [4, 4, 2]


def test_relative_terms_are_measured_against_their_target():
    w, _ = window(Transformer(), tokens(), "blocks.0.fc1.weight", 2)
    with torch.no_grad():
        energies = [sum(float(ts[k].square().sum()) for ts in w.targets) / len(w.targets) for k in range(3)]
    assert w.scale == pytest.approx(energies)
    absolute, _ = window(Transformer(), tokens(), "blocks.0.fc1.weight", 2, relative=False)
    assert absolute.scale == pytest.approx([float(t.numel()) for t in absolute.targets[0]])


def test_an_unknown_curvature():
    with pytest.raises(ValueError, match="gauss-newton"):
        window(Transformer(), tokens(), "blocks.0.fc1.weight", 2, curvature="newton")
