"""Which channels are one: small models whose answer is known, and every set of channels of them really permuted."""

import pytest
import torch
import torch.nn.functional as F
from nets import Lambda
from torch import nn

from hf_prune import channels, permute


def conv(i, o, k=1, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def heads(x, h):
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


def attention(m, x):
    q, k, v = heads(m.q(x), 2), heads(m.k(x), 2), heads(m.v(x), 2)
    return x + m.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def fused(m, x):
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    y = ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v
    return x + m.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def excite(m, x):
    x = F.silu(m.norm(m.expand(x)))
    x = F.hardswish(m.deep(x))
    gate = m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))
    return m.project(x * gate.sigmoid())


def mixer(m, x):
    return x + m.fc2(F.gelu(m.fc1(x.transpose(1, 2)))).transpose(1, 2)


TOKENS, IMAGE = (2, 5, 12), (2, 4, 6, 6)
# name: (model, shape of its input, {member: (size of a set of channels that it is in, entries along)})
CASES = {
    "mlp": (
        lambda: Lambda(
            lambda m, x: x + m.fc2(F.gelu(m.fc1(m.norm(x)))),
            norm=nn.LayerNorm(12),
            fc1=nn.Linear(12, 16),
            fc2=nn.Linear(16, 12),
        ),
        TOKENS,
        {"fc1.bias": (16, [])},
    ),
    "attention": (
        lambda: Lambda(attention, **{n: nn.Linear(12, 12) for n in "qkvo"}),
        TOKENS,
        {"v.bias": (6, [2]), "q.bias": (6, [2])},
    ),
    "fused qkv": (
        lambda: Lambda(fused, qkv=nn.Linear(12, 36), o=nn.Linear(12, 12)),
        TOKENS,
        {"qkv.bias": (6, [2])},
    ),
    "nn.MultiheadAttention": (
        lambda: Lambda(lambda m, x: x + m.a(x, x, x)[0], a=nn.MultiheadAttention(12, 2, batch_first=True)),
        TOKENS,
        {"a.in_proj_bias": (6, [2])},
    ),
    "glu": (
        lambda: Lambda(
            lambda m, x: m.out(F.silu(m.w(x).chunk(2, -1)[0]) * m.w(x).chunk(2, -1)[1]),
            w=nn.Linear(12, 32),
            out=nn.Linear(16, 12),
        ),
        TOKENS,
        {"w.bias": (16, [])},
    ),
    "convolutions": (
        lambda: Lambda(
            lambda m, x: m.b(F.max_pool2d(F.relu(m.norm(m.a(x))), 2)),
            a=conv(4, 8, 3, bias=False),
            norm=nn.BatchNorm2d(8),
            b=conv(8, 4, 3),
        ),
        IMAGE,
        {"norm.running_var": (8, [])},
    ),
    "depthwise and squeeze-excite": (
        lambda: Lambda(
            excite,
            expand=conv(4, 8),
            norm=nn.BatchNorm2d(8),
            deep=conv(8, 8, 3, groups=8),
            down=conv(8, 2),
            up=conv(2, 8),
            project=conv(8, 4),
        ),
        IMAGE,
        {"deep.bias": (8, []), "up.bias": (8, []), "down.bias": (2, [])},
    ),
    "grouped": (
        lambda: Lambda(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(4, 8), b=conv(8, 8, 3, groups=2), c=conv(8, 4)
        ),
        IMAGE,
        {"a.bias": (4, [2]), "b.bias": (4, [2])},
    ),
    "group norm": (
        lambda: Lambda(
            lambda m, x: m.b(F.relu(m.norm(m.a(x)))), a=conv(4, 8), norm=nn.GroupNorm(2, 8), b=conv(8, 4)
        ),
        IMAGE,
        {"a.bias": (4, [2])},
    ),
    "token mixing": (
        lambda: Lambda(mixer, fc1=nn.Linear(5, 8), fc2=nn.Linear(8, 5)),
        TOKENS,
        {"fc1.bias": (8, [])},
    ),
    "residual stream": (
        lambda: Lambda(
            lambda m, x: m.head(m.norm(m.b(F.relu(m.a(m.stem(x)))) + m.stem(x)).mean(1)),
            stem=nn.Linear(12, 8),
            a=nn.Linear(8, 16),
            b=nn.Linear(16, 8),
            norm=nn.LayerNorm(8),
            head=nn.Linear(8, 3),
        ),
        TOKENS,
        {"stem.bias": (8, []), "a.bias": (16, [])},
    ),
    "flattened map": (
        lambda: Lambda(lambda m, x: m.b(F.relu(m.a(x)).flatten(1)), a=conv(4, 8), b=nn.Linear(8 * 36, 3)),
        IMAGE,
        {"a.bias": (8, [])},
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_channels_are_found_and_any_order_of_them_gives_the_same_outputs(kind):
    make, shape, expected = CASES[kind]
    model = make().double().eval()
    for b in model.buffers():
        if b.is_floating_point():
            b.copy_(torch.rand_like(b) + 0.5)
    x = torch.randn(shape, dtype=torch.float64)
    found = channels.find(model, x)
    for name, (size, along) in expected.items():
        sets = [c for c in found if any(m.name == name for m in c.members)]
        assert (size, along) in [(c.size, [a.size for a in c.along]) for c in sets], (name, kind)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = model(x).detach()
    for c in found:
        sizes = [a.size for a in c.along]
        count = torch.Size(sizes).numel()
        order = torch.stack([torch.randperm(c.size) for _ in range(count)]).view(*sizes, c.size)
        held = {m.name: tensors[m.name].detach().clone() for m in c.members}
        permute.apply(tensors, c, order)
        assert torch.allclose(model(x), before, atol=1e-12, rtol=1e-12), [m.name for m in c.members]
        moved = any(not torch.equal(t, tensors[n]) for n, t in held.items())
        assert moved or bool((order == torch.arange(c.size)).all())


REFUSED = {
    "the output": lambda: Lambda(lambda m, x: m.fc(x), fc=nn.Linear(12, 8)),
    "joined end to end": lambda: Lambda(
        lambda m, x: m.b(torch.cat([m.a(x), x], -1)), a=nn.Linear(12, 8), b=nn.Linear(20, 4)
    ),
    "rolled": lambda: Lambda(lambda m, x: m.b(m.a(x).roll(1, -1)), a=nn.Linear(12, 8), b=nn.Linear(8, 4)),
    "an unknown operator": lambda: Lambda(
        lambda m, x: m.b(m.a(x).sort(-1).values), a=nn.Linear(12, 8), b=nn.Linear(8, 4)
    ),
    "read by index": lambda: Lambda(
        lambda m, x: m.b(m.a(x)[..., torch.arange(7, -1, -1)]), a=nn.Linear(12, 8), b=nn.Linear(8, 4)
    ),
    "a position of its own": lambda: Lambda(
        lambda m, x: m.b(m.a(x) * torch.arange(8.0).double()), a=nn.Linear(12, 8), b=nn.Linear(8, 4)
    ),
    "summed up from one end": lambda: Lambda(
        lambda m, x: m.b(m.a(x).cumsum(-1)), a=nn.Linear(12, 8), b=nn.Linear(8, 4)
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_depends_on_the_order_is_refused(kind):
    model = REFUSED[kind]().double()
    found = channels.find(model, torch.randn(2, 5, 12, dtype=torch.float64))
    assert not [c for c in found if c.size == 8]


def test_heads_that_are_mixed_share_one_order():
    """A sum over heads, or a softmax over them, compares the same channel of all: no order of its own per head."""
    for mix in (lambda x: x.sum(2), lambda x: x.softmax(2).flatten(2)[..., :12].unflatten(-1, (2, 6)).sum(2)):
        model = Lambda(
            lambda m, x, mix=mix: m.b(mix(m.a(x).unflatten(-1, (2, 6)))), a=nn.Linear(12, 12), b=nn.Linear(6, 4)
        ).double()
        found = channels.find(model, torch.randn(2, 5, 12, dtype=torch.float64))
        (c,) = [c for c in found if any(m.name == "b.weight" for m in c.members)]
        assert (c.size, c.along) == (6, [])
