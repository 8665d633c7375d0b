"""Wrote the folders beside it, with compressed-tensors 0.13.0, transformers 4.57.6 and torch 2.13.0:

    pip install torch transformers==4.57.6 compressed-tensors==0.13.0 accelerate && python make.py

Later versions of compressed-tensors neither write nor read these formats.
"""

import copy
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from transformers import ViTConfig, ViTForImageClassification  # noqa: TID251

here = Path(__file__).parent
torch.manual_seed(0)
config = ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                   num_attention_heads=2, num_labels=5)  # fmt: skip
model = ViTForImageClassification(config).to(torch.bfloat16).eval()
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name != "classifier":
        groups = module.weight.data.view(-1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.float().abs().topk(2, 1).indices, True)
        module.weight.data = torch.where(keep, groups, torch.zeros_like(groups)).view_as(module.weight)
model.save_pretrained(here / "dense")
for kind, form in (("sparse-24-bitmask", Sparse24BitMaskConfig), ("sparse-bitmask", BitmaskConfig)):
    sparsity = form(format=kind, global_sparsity=0.5, sparsity_structure="2:4", targets=["Linear"],
                    ignore=["classifier"])  # fmt: skip
    compressor = ModelCompressor(sparsity_config=sparsity)
    state = compressor.compress(copy.deepcopy(model))
    model.save_pretrained(here / kind, state_dict=state)
    compressor.update_config(here / kind)
