"""Train the model of `hf-prune demo` and write it beside this file: `python hf_prune/data/demo/train.py [FOLDER]`.

Two to three minutes on one CPU core. Deterministic: the same machine and the same versions give the same weights.
The data are scikit-learn's handwritten digits as hf_prune.demo.digits() splits them; only the training part is touched
before the last line prints the accuracy on the held-out part.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_prune.demo import NAMES, Labelled, digits

EPOCHS, BATCH, RATE, DECAY, SMOOTHING = 200, 64, 1e-3, 0.05, 0.1

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags: [vit, digits, demo]
---

# The model of `hf-prune demo`

A vision transformer with {layers} layers of width {width} ({parameters:,} parameters, float32) that reads 8x8 images of
handwritten digits. It exists to be pruned: small enough to ship inside a Python package, deep and narrow enough that
careless pruning destroys it.

* **Data**: the 1797 real scans bundled with scikit-learn (`sklearn.datasets.load_digits`; UCI, Optical Recognition of
  Handwritten Digits, E. Alpaydin and C. Kaynak, CC BY 4.0), {train} for training, {calibration} for calibrating
  the pruning, {test} held out. The split is random by image: the same writers appear in all parts.
* **Held-out accuracy**: {accuracy:.1f} % ({right} of {test}), after the last epoch; the settings of the
  training were chosen on the calibration part.
* **Training**: `train.py` in this folder, {epochs} epochs of AdamW on CPU with random shifts, rotations and scales.
* **Limits**: useful for nothing but demonstrations and tests.

```python
from transformers import pipeline
pipeline("image-classification", "hf_prune/data/demo")(image)
```
"""


def tensors(processor: ViTImageProcessor, images: Labelled) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 8, 8) through the model's own processor, labels (n,)."""
    pixels = processor([image.convert("RGB") for image, _ in images], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([label for _, label in images])


def jitter(pixels: Tensor) -> Tensor:
    """Rotate (±15 degrees), scale (±12 %), shear and shift (±1 pixel) every image at random; the outside is blank."""
    n = len(pixels)
    angle, shear = (torch.rand(2, n) - 0.5) * torch.tensor([[math.pi / 6], [0.3]])
    scale_x, scale_y = 1 + (torch.rand(2, n) - 0.5) * 0.24
    shift = (torch.rand(n, 2) - 0.5) * 0.5  # 2 units are 8 pixels
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([scale_x * cos, scale_x * (shear * cos - sin), scale_y * sin, scale_y * (shear * sin + cos)], 1)
    grid = F.affine_grid(torch.cat([rows.view(n, 2, 2), shift[:, :, None]], 2), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels + 1, grid, align_corners=False) - 1  # -1 is blank after normalisation, 0 outside


def train(model: nn.Module, pixels: Tensor, labels: Tensor) -> None:
    """AdamW, one warm-up and one cosine, label smoothing; prints one line every 20 epochs."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}])
    steps, step = EPOCHS * math.ceil(len(pixels) / BATCH), 0
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(pixels)).split(BATCH):
            warm = min(1.0, (step + 1) / (0.05 * steps))
            for group in optimizer.param_groups:
                group["lr"] = RATE * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(
                model(pixel_values=jitter(pixels[rows])).logits, labels[rows], label_smoothing=SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            total += loss.item() * len(rows)
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1:3d}  loss {total / len(pixels):.4f}", flush=True)
    model.eval()


def main(folder: Path) -> None:
    """Train, measure once, write config, weights, processor and card into `folder`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the order of sums, hence the weights, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=3, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=256, qkv_bias=True, id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
        initializer_range=0.1,  # the default of 0.02 is meant for a width of 768
    )  # fmt: skip
    model = ViTForImageClassification(config)
    ViTImageProcessor(
        do_convert_rgb=True, do_resize=True, size={"height": 8, "width": 8}, resample=2, do_rescale=True,
        do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(folder)  # fmt: skip
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    data = digits()
    train(model, *tensors(processor, data.train))

    pixels, labels = tensors(processor, data.test)
    with torch.no_grad():
        right = int((model(pixel_values=pixels).logits.argmax(1) == labels).sum())
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes files that only their owner can read
    parameters = sum(p.numel() for p in model.parameters())
    card = CARD.format(
        layers=config.num_hidden_layers, width=config.hidden_size, parameters=parameters, epochs=EPOCHS,
        right=right, accuracy=100 * right / len(labels),
        train=len(data.train), calibration=len(data.calibration), test=len(data.test),
    )  # fmt: skip
    (folder / "README.md").write_text(card)
    print(f"held out: {right} of {len(labels)} right; written to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
