"""Weights that accelerate offloaded are pruned where they are, to the same bits, and stay offloaded."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from nets import Block
from torch import nn

from hf_prune.loop import Recipe, plan, prune

RECIPE = Recipe(nm="2:4", target={"metric": 0.5})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 5)

    def forward(self, image):
        x = self.norm(self.stem(image)).flatten(2).mT
        for b in self.blocks:
            x = b(x)
        return self.head(x.mean(1))


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().eval().to(dtype)


def images():
    return [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(2)]


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_an_offloaded_model_is_pruned_to_the_same_bits_and_stays_offloaded(how, tmp_path):
    expected, model = build(), build()
    dense = model(images()[0])
    report = prune(expected, images(), RECIPE)
    if how == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    found = prune(model, images(), RECIPE)
    assert all(p.is_meta for p in model.parameters()), "as it was"
    with torch.no_grad():
        out = model(images()[0])
    assert torch.equal(out, expected(images()[0])) and not torch.equal(out, dense)
    assert [r["kept"] for r in found.layers] == [r["kept"] for r in report.layers]


def test_a_checkpoint_on_disk_is_not_written_to_but_the_edits_are_kept(tmp_path):
    """What device_map="disk" makes of safetensors files."""
    from accelerate.hooks import add_hook_to_module, attach_align_device_hook
    from accelerate.utils import OffloadedWeightsLoader
    from safetensors.torch import save_file

    expected, model = build(), build()
    prune(expected, images(), RECIPE)
    file = tmp_path / "model.safetensors"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, file)
    before = file.read_bytes()
    index = {k: {"safetensors_file": str(file), "weight_name": k, "dtype": "float32"} for k in state
             if not k.endswith("num_batches_tracked")}  # fmt: skip
    weights = OffloadedWeightsLoader(state_dict={"norm.num_batches_tracked": state["norm.num_batches_tracked"]},
                                     index=index)  # fmt: skip
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    assert add_hook_to_module and all(p.is_meta for p in model.parameters())
    prune(model, images(), RECIPE)
    with torch.no_grad():
        assert torch.equal(model(images()[0]), expected(images()[0]))
    assert file.read_bytes() == before


def test_the_plan_of_an_offloaded_model():
    model = cpu_offload(build(), execution_device=torch.device("cpu"))
    assert sum(r.pattern is not None for r in plan(model, images()[0][:2], RECIPE).rows) == 4


def test_a_failure_leaves_it_offloaded(tmp_path):
    model = cpu_offload(build(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="not finite"):
        prune(model, [torch.full((4, 3, 16, 16), float("nan"))], RECIPE)
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert model(images()[0]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_weights_are_solved_in_single_and_stay_what_they_are(dtype):
    model, single = build(dtype), build(dtype).float()
    given = [b.to(dtype) for b in images()]
    report = prune(model, given, RECIPE)
    prune(single, [b.float() for b in given], RECIPE)
    for row in report.layers:
        if row["pattern"]:
            w = model.get_parameter(row["name"])
            assert w.dtype == dtype and ((w != 0).reshape(-1, 4).sum(1) <= 2).all() and w.isfinite().all()
    a, b = model(given[0]).float(), single(given[0].float())
    assert float((a - b).norm() / b.norm()) < 0.1
