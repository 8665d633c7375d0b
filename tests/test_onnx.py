"""A pruned model exported to ONNX keeps its zeros and its outputs, as onnxruntime computes them."""

import pytest
import torch
import vision
from torch import nn

import hf_prune

onnx = pytest.importorskip("onnx", reason="the export needs onnx, onnxscript and onnxruntime (the extra dev)")
pytest.importorskip("onnxscript", reason="torch's exporter needs onnxscript")
runtime = pytest.importorskip("onnxruntime", reason="the exported model is run with onnxruntime")


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        out = self.model(pixel_values)
        return out if torch.is_tensor(out) else out.logits


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_zeros_and_outputs_survive_the_export(kind, tmp_path):
    from transformers import AutoModelForImageClassification

    model = vision.shake(AutoModelForImageClassification.from_config(vision.hf_config(kind))).eval()
    images = torch.randn(4, 3, vision.SIZE, vision.SIZE)
    report = hf_prune.prune(model, [{"pixel_values": images}], "magnitude", nm="2:4")
    pruned = {e["name"]: model.get_parameter(e["name"]).detach() for e in report.layers if e["pattern"]}
    assert pruned
    path = tmp_path / "model.onnx"
    with torch.no_grad():
        wanted = Logits(model).eval()(images)
        torch.onnx.export(Logits(model).eval(), (images,), str(path), dynamo=True, verbose=False)
    stored = [torch.tensor(onnx.numpy_helper.to_array(t)) for t in onnx.load(str(path)).graph.initializer]
    for name, weight in pruned.items():
        same = [t for t in stored if sorted(t.shape) == sorted(weight.shape)
                and torch.equal(t.flatten().sort().values, weight.flatten().sort().values)]  # fmt: skip
        # a batch norm may be folded into the convolution before it: its rows are scaled, and zeros stay zeros
        folded = [t for t in stored if t.shape == weight.shape and torch.equal(t == 0, weight == 0)]
        assert same or folded, f"{name}: no initializer of the exported graph holds its zeros"
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-4, rtol=1e-3)
