"""Finding prunable weights: every kind of layer, the view (groups, out, in) and back, columns that give the outputs."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from nets import Lambda
from torch import nn

from hf_prune import sites

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import architectures  # noqa: E402


def one(model, x):
    (found,) = sites.find(model, x).sites
    return found


def products(model, x):
    """[(site, raw input, raw output)] of every product in a forward."""
    found = {(s.parameter, s.rows): s for s in sites.find(model, x).sites}
    seen = []
    with torch.no_grad(), sites.Tape(sites.parameters(model), lambda u: seen.append((found[u.parameter, u.rows], u))):
        model(x)
    return [(s, u.x, u.y) for s, u in seen]


def check(model, x):
    """Round trip of the view, and columns @ weight (+ bias) = outputs, for every product of the forward."""
    named = sites.parameters(model)
    used = products(model, x)
    assert used
    for site, raw_in, raw_out in used:
        parameter = named[site.parameter]
        w = site.read(parameter)
        assert w.shape == site.shape and w.dtype == torch.float64
        x_, y_ = site.columns(raw_in), site.outputs(raw_out)
        y = x_ @ w.mT
        bias = None if site.bias is None else named[site.bias].detach().view(site.shape[0], 1, site.shape[1])
        if bias is not None:
            y = y + bias
        else:
            y_, y = y_ - y_.mean(1, keepdim=True), y - y.mean(1, keepdim=True)  # a bias that is not the site's to refit
        assert y.shape == y_.shape
        assert torch.allclose(y, y_, atol=1e-12, rtol=1e-12), site.name
        before = parameter.detach().clone()
        site.write(parameter, w)
        assert torch.equal(parameter, before), "what was read is written back to the same places"
        new = torch.randn_like(w)
        site.write(parameter, new)
        assert torch.equal(site.read(parameter), new)
        with torch.no_grad():
            parameter.copy_(before)
    return [s for s, _, _ in used]


CONVS = {
    "conv1d": (nn.Conv1d(6, 8, 3), (2, 6, 11)),
    "conv1d strided padded": (nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d": (nn.Conv2d(4, 6, 3), (2, 4, 7, 9)),
    "conv2d oblong": (nn.Conv2d(4, 6, (3, 1), padding=(1, 0)), (2, 4, 7, 9)),
    "conv2d uneven steps": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2)), (2, 4, 9, 12)),
    "conv2d dilated strided padded": (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 11, 9)),
    "conv2d same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 7, 7)),
    "conv2d reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 7, 7)),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 5, 6)),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 6)),
    "depthwise widening": (nn.Conv2d(4, 8, 5, stride=2, padding=2, groups=4), (2, 4, 9, 8)),
    "pointwise": (nn.Conv2d(8, 4, 1), (2, 8, 5, 6)),
    "conv3d": (nn.Conv3d(4, 6, (2, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), groups=2), (2, 4, 4, 7, 6)),
}


@pytest.mark.parametrize("kind", CONVS)
def test_convolutions(kind):
    layer, shape = CONVS[kind]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    (site,) = check(layer, x)
    assert site.shape[0] == layer.groups and site.channels == layer.in_channels // layer.groups
    assert site.conv.kernel == layer.kernel_size
    assert site.bias == ("bias" if layer.bias is not None else None)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    model = nn.Linear(6, 8, bias=bias).double()
    (site,) = check(model, torch.randn(shape, dtype=torch.float64))
    assert site.shape == (1, 8, 6) and site.channels == 6 and site.conv is None and not site.transposed
    assert site.bias == ("bias" if bias else None)


def test_nm_groups_of_a_convolution_lie_along_input_channels():
    """The weight of (kernel position, channel) stands at column position * channels + channel."""
    layer = nn.Conv2d(4, 2, 3)
    site = one(layer, torch.randn(1, 4, 5, 5))
    w = site.read(layer.weight)
    assert torch.equal(w[0, 1, 4 * 5 : 4 * 6], layer.weight[1, :, 1, 2])


def test_fused_qkv_is_one_site_whose_rows_are_the_projections():
    def attention(m, x):
        q, k, v = m.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8))

    model = Lambda(attention, qkv=nn.Linear(8, 24), proj=nn.Linear(8, 8)).double()
    names = [s.name for s in check(model, torch.randn(2, 5, 8, dtype=torch.float64))]
    assert names == ["qkv.weight", "proj.weight"]


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_with_itself(batch_first):
    """out_proj is never called as a module; both its weight and in_proj_weight are found all the same."""
    model = Lambda(lambda m, x: m.attn(x, x, x)[0], attn=nn.MultiheadAttention(8, 2, batch_first=batch_first)).double()
    fired = []
    model.attn.out_proj.register_forward_hook(lambda *a: fired.append(a))
    used = check(model, torch.randn(3, 5, 8, dtype=torch.float64))
    assert [s.name for s in used] == ["attn.in_proj_weight", "attn.out_proj.weight"]
    assert not fired, "torch calls the function, not the module: what finds sites must not rest on hooks"
    assert used[1].bias == "attn.out_proj.bias"


def test_multihead_attention_across_two_inputs_is_found_by_rows():
    def cross(m, x):
        memory = x[:, :3] * 2
        return m.attn(x, memory, memory + 1)[0]

    model = Lambda(cross, attn=nn.MultiheadAttention(8, 2, batch_first=True)).double()
    used = check(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert [s.name for s in used] == [
        "attn.in_proj_weight[0:8]", "attn.in_proj_weight[8:16]", "attn.in_proj_weight[16:24]", "attn.out_proj.weight",
    ]  # fmt: skip
    assert [s.shape for s in used] == [(1, 8, 8)] * 4
    assert len({s.source for s in used[:3]}) == 3, "query, key and value read different inputs here"


def test_multihead_attention_with_a_shared_memory_is_found_by_rows():
    model = Lambda(
        lambda m, x: m.attn(x, x[:, :3] * 2, x[:, :3] * 2)[0], attn=nn.MultiheadAttention(8, 2, batch_first=True)
    )
    used = check(model.double(), torch.randn(2, 5, 8, dtype=torch.float64))
    rows = [s.rows for s in used if s.parameter == "attn.in_proj_weight"]
    assert sorted(rows)[0] == (0, 8) and max(rows)[1] == 24


def test_multihead_attention_with_separate_widths():
    def cross(m, x):
        return m.attn(x, x[..., :4], x[..., 4:])[0]

    model = Lambda(cross, attn=nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True)).double()
    names = {s.name for s in check(model, torch.randn(2, 5, 8, dtype=torch.float64))}
    assert names == {"attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight"}


def test_the_fused_encoder_layer_does_not_hide_its_products():
    """In eval mode torch runs a whole encoder layer as one kernel, which the tape has to keep from happening."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double().eval()
    names = [s.name for s in sites.find(layer, torch.randn(2, 5, 8, dtype=torch.float64)).sites]
    assert names == ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert torch.backends.mha.get_fastpath_enabled(), "and is left as it was"


def test_transformers_conv1d_is_stored_transposed():
    from transformers.pytorch_utils import Conv1D

    model = Lambda(lambda m, x: m.c(x), c=Conv1D(12, 8)).double()  # 8 in, 12 out
    (site,) = check(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert site.transposed and site.shape == (1, 12, 8) and site.bias == "c.bias"


def test_a_square_conv1d_and_a_square_linear_are_told_apart():
    from transformers.pytorch_utils import Conv1D

    model = Lambda(lambda m, x: m.b(m.a(x)), a=Conv1D(8, 8), b=nn.Linear(8, 8)).double()
    used = check(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert [s.transposed for s in used] == [True, False]


def test_a_plain_product_with_a_parameter():
    """What no module type would tell: x @ W.T, einsum and F.linear in a module of one's own."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

        def forward(self, x):
            x = F.linear(x, self.a).relu() @ self.b
            return torch.einsum("bnc,oc->bno", x.relu(), self.c)

    used = check(Own().double(), torch.randn(2, 5, 8, dtype=torch.float64))
    assert [(s.name, s.transposed) for s in used] == [("a", False), ("b", True), ("c", False)]


def test_tied_weights_are_one_site_with_its_uses_counted():
    model = Lambda(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 8), b=nn.Linear(8, 8)).double()
    model.b.weight = model.a.weight
    found = sites.find(model, torch.randn(3, 8, dtype=torch.float64))
    (site,) = found.sites
    assert site.parameter == "a.weight" and site.uses == 2


def test_the_bias_of_one_use_is_not_refit_for_a_weight_tied_with_another():
    """Its other use adds another bias: a refit for the sum over both uses would be wrong for each."""
    model = Lambda(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model.b.weight = model.a.weight
    assert one(model, torch.randn(3, 8)).bias is None


def test_a_weight_used_twice_counts_its_uses():
    model = Lambda(lambda m, x: m.a(m.a(x).relu()), a=nn.Linear(8, 8)).double()
    used = check(model, torch.randn(3, 8, dtype=torch.float64))
    assert len(used) == 2 and used[0] is used[1] and used[0].uses == 2 and used[0].bias == "a.bias"


def test_a_weight_standardised_convolution_stays_dense_with_a_reason():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias)

    model = Lambda(lambda m, x: m.b(m.a(x)), a=Standardised(4, 4, 3), b=nn.Conv2d(4, 4, 1))
    found = sites.find(model, torch.randn(1, 4, 5, 5))
    assert [s.name for s in found.sites] == ["b.weight"]
    assert found.dense == {"a.weight": "no matrix product or convolution reads it unchanged"}


def test_a_transposed_convolution_and_an_embedding_stay_dense():
    model = Lambda(
        lambda m, x: m.lin(m.up(x).mean((2, 3)) + m.table(torch.zeros(1, dtype=torch.long))),
        up=nn.ConvTranspose2d(4, 8, 2, stride=2), lin=nn.Linear(8, 3), table=nn.Embedding(4, 8),
    )  # fmt: skip
    found = sites.find(model, torch.randn(1, 4, 5, 5))
    assert [s.name for s in found.sites] == ["lin.weight"]
    assert set(found.dense) == {"up.weight", "table.weight"}


def test_stem_head_sources_and_batch_norms():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    found = sites.find(model, torch.randn(2, 3, 9, 9))
    assert found.stem == {"0.weight"} and found.head == {"7.weight"}
    assert [s.norm for s in found.sites] == ["1.running_mean", "4.running_mean", None]
    assert [s.source for s in found.sites] == [0, 1, 2]


def test_a_batch_norm_behind_something_else_is_not_the_layers_own():
    """Its running mean cannot make good for a bias that an activation, in place or not, has come after."""
    for between in (nn.ReLU(inplace=True), nn.ReLU(), nn.Upsample(scale_factor=2)):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), between, nn.BatchNorm2d(8))
        assert one(model, torch.randn(2, 3, 9, 9)).norm is None, between


def test_batch_norms_are_not_mistaken_when_memory_is_used_again():
    """DenseNet normalises concatenations, which are freed, and whose place another layer's output then takes."""
    case = next(c for c in architectures.cases() if c.name == "densenet121")
    model = case.build()
    for site in sites.find(model, case.batch(2, 0)).sites:
        if site.norm is not None:
            assert model.get_buffer(site.norm).numel() == site.shape[0] * site.shape[1], site.name


def test_layers_that_read_the_same_tensor_share_a_source():
    layers = {n: nn.Linear(8, 8) for n in "qkvo"}
    model = Lambda(lambda m, x: m.o(m.q(x) + m.k(x) + m.v(x)), **layers)
    assert [s.source for s in sites.find(model, torch.randn(3, 8)).sites] == [0, 0, 0, 1]


def test_a_tensor_changed_in_place_is_another_source():
    model = Lambda(lambda m, x: m.b(m.a(x.mul_(2)) + 0 * x.add_(1)[:, :8] + x), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    assert len({s.source for s in sites.find(model, torch.randn(3, 8)).sites}) == 2


def test_zeros_are_written_as_positive_zero_and_low_precision_is_read_in_float32():
    layer = nn.Linear(4, 2).bfloat16()
    site = one(layer.float(), torch.randn(1, 4))
    layer = layer.bfloat16()
    w = site.read(layer.weight)
    assert w.dtype == torch.float32
    site.write(layer.weight, torch.where(w > 0, w, -torch.zeros_like(w)))
    assert not torch.signbit(layer.weight).any() and layer.weight.dtype == torch.bfloat16


def test_a_model_without_products_says_so():
    with pytest.raises(ValueError, match="nothing to prune"):
        sites.find(Lambda(lambda m, x: m.p(x), p=nn.LayerNorm(3)), torch.randn(2, 3))


def test_quiet_restores_training_mode_and_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    model[2].eval()
    model[0].bias.requires_grad_(False)
    with pytest.raises(RuntimeError), sites.quiet(model):
        assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
        raise RuntimeError
    assert [m.training for m in model] == [True, True, False] and model.training
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_mappings_and_pairs_of_image_and_label_are_fed():
    class Named(nn.Linear):
        def forward(self, pixel_values):
            return super().forward(pixel_values)

    model, x = Named(3, 2), torch.randn(1, 3)
    assert torch.equal(sites.feed(model, {"pixel_values": x}), sites.feed(model, (x, 7)))


def test_offloaded_weights_are_refused_with_what_to_do():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"0.weight: is offloaded, as are 4 of 4 weights; load the model without"):
        sites.find(model, torch.randn(1, 4))
