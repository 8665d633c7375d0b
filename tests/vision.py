"""Tiny vision checkpoints and image folders, built on the spot, for the tests of the Hugging Face edge."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

SIZE = 16  # pixels


def photo(seed: int, size: tuple[int, int] = (SIZE, SIZE), mode: str = "RGB") -> Image.Image:
    """A random image; the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def hf_config(family: str, classes: int = 5, channels: int = 3):
    from transformers import CONFIG_MAPPING

    sizes: dict[str, dict[str, object]] = {
        "vit": {
            "image_size": SIZE,
            "patch_size": 8,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "mobilenet_v1": {"image_size": SIZE, "depth_multiplier": 0.1, "min_depth": 4},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "swin": {
            "image_size": SIZE,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 2,
        },
    }
    return CONFIG_MAPPING[family](**sizes[family], num_channels=channels, num_labels=classes)


def shake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every tensor, running statistics included, values that no initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + (0.5 if "var" in name else -0.1))
    return module


def write_processor(folder: Path, channels: int = 3) -> None:
    config = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels, "image_processor_type": "ViTImageProcessor", "resample": 2,
        "rescale_factor": 1 / 255, "size": {"height": SIZE, "width": SIZE},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def hf_folder(folder: Path, family: str = "vit", *, dtype=torch.float32, head: bool = True, **options: int) -> Path:
    """A transformers checkpoint; head=False: the bare backbone."""
    from transformers import AutoModel, AutoModelForImageClassification

    auto = AutoModelForImageClassification if head else AutoModel
    module = shake(auto.from_config(hf_config(family, **options)))
    module.to(dtype).save_pretrained(folder)
    write_processor(folder, options.get("channels", 3))
    return folder


def timm_folder(folder: Path, architecture: str = "test_vit", classes: int = 5, **config: object) -> Path:
    """A timm checkpoint as `timm.models.save_for_hf` lays it out."""
    import timm

    module = shake(timm.create_model(architecture, num_classes=classes))
    folder.mkdir(parents=True, exist_ok=True)
    write_timm(folder, architecture, module.state_dict(), module.pretrained_cfg, classes, **config)
    return folder


def write_timm(folder: Path, architecture: str, state: dict, pretrained: dict, classes: int, **config: object) -> None:
    drop = ("url", "file", "hf_hub_id", "source", "architecture", "state_dict")
    kept = {key: value for key, value in pretrained.items() if key not in drop and value is not None}
    content = {"architecture": architecture, "num_classes": classes, "pretrained_cfg": kept | {"num_classes": classes}}
    (folder / "config.json").write_text(json.dumps(content | config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def real_timm_vit(folder: Path, data: Path) -> Path:
    """The timm folder that belongs to the bare safetensors file among the real models."""
    import timm

    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    folder.mkdir(parents=True, exist_ok=True)
    pretrained = timm.get_pretrained_cfg(name).to_dict()
    write_timm(folder, "vit_tiny_patch16_224", load_file(data / f"{name}.safetensors"), pretrained, 1000)
    return folder


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def edit_weights(folder: Path, change) -> Path:
    """change: takes the state dict and edits it."""
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})
    return folder


def image_folder(folder: Path, classes: dict[str, int], split: str | None = None) -> Path:
    """folder/[split/]class/number.png; the image's seed is its number over all classes."""
    number = 0
    for name, count in classes.items():
        place = folder / split / name if split else folder / name
        place.mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            (place / f"{number:03d}.png").write_bytes(encoded(photo(number)))
            number += 1
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to
