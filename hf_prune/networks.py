"""Image classifiers for small images, built by name: the networks that the papers on sparse training are judged on.

`build("resnet18", (3, 32, 32), 10)` gives a fresh network; `load(folder)` one that `hf-prune train` wrote.
All end in pooling to a fixed size, so any image size will do; weights are float32.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = "training.json"  # of a folder that `hf-prune train` wrote; its key "network" holds what `build` needs
WEIGHTS = "model.safetensors"
Shape = tuple[int, int, int]  # (channels, height, width)


def fully_connected(image: Shape, classes: int, widths: Sequence[int]) -> nn.Module:
    sizes = [image[0] * image[1] * image[2], *widths]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def lenet5(image: Shape, classes: int) -> nn.Module:
    """LeCun et al. 1998 with ReLU and max pooling: two convolutions, three linear layers."""
    return nn.Sequential(
        nn.Conv2d(image[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AdaptiveMaxPool2d(5), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def alexnet(image: Shape, classes: int) -> nn.Module:
    """Krizhevsky 2012 with the strides of the first layer made for images of 32 to 64 pixels."""
    return nn.Sequential(
        nn.Conv2d(image[0], 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Dropout(), nn.Linear(1024, 4096), nn.ReLU(),
        nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes),
    )  # fmt: skip


def vgg16(image: Shape, classes: int) -> nn.Module:
    """Simonyan and Zisserman 2014: thirteen convolutions, here with batch norm and one linear layer, as is usual."""
    layers: list[nn.Module] = []
    channels = image[0]
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


class Residual(nn.Module):
    """Two 3x3 convolutions (expansion 1), or 1x1, 3x3, 1x1 (expansion 4), and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        out = width * expansion
        shapes = [(inputs, width, 3, stride), (width, out, 3, 1)]
        if expansion > 1:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y if i == 0 else F.relu(y)))
        return F.relu(y + self.shortcut(x))


def resnet(image: Shape, classes: int, widths: Sequence[int], counts: Sequence[int], expansion: int) -> nn.Module:
    """He et al. 2016 with the stem for small images: one 3x3 convolution, no pooling."""
    layers: list[nn.Module] = [nn.Conv2d(image[0], widths[0], 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    channels = widths[0]
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        for i in range(count):
            layers.append(Residual(channels, width, 2 if stage and i == 0 else 1, expansion))
            channels = width * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# We could not check which widths the paper on LOMP gives to FC5 and FC12: do so before comparing with its figures.
FC5 = (1000, 600, 300, 100)
FC12 = (1000, 900, 800, 750, 700, 650, 600, 500, 400, 200, 100)

NETWORKS: dict[str, Callable[[Shape, int], nn.Module]] = {
    "mlpnet": lambda image, classes: fully_connected(image, classes, (40, 20)),
    "lenet300": lambda image, classes: fully_connected(image, classes, (300, 100)),
    "fc5": lambda image, classes: fully_connected(image, classes, FC5),
    "fc12": lambda image, classes: fully_connected(image, classes, FC12),
    "lenet5": lenet5,
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet20": lambda image, classes: resnet(image, classes, (16, 32, 64), (3, 3, 3), 1),
    "resnet18": lambda image, classes: resnet(image, classes, (64, 128, 256, 512), (2, 2, 2, 2), 1),
    "resnet50": lambda image, classes: resnet(image, classes, (64, 128, 256, 512), (3, 4, 6, 3), 4),
}


def build(name: str, image: Shape, classes: int, seed: int = 0) -> nn.Module:
    """A fresh network for images (channels, height, width); the global generator is left as it was.

    Convolutions and linear layers start from He's normal distribution (fan-in), biases from zero. Raises ValueError
    for an unknown name, and for images that the network's poolings shrink to nothing.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"network {name}: there is no such network; known: {', '.join(NETWORKS)}.{hint}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name](image, classes)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, *image))
    except RuntimeError as error:
        raise ValueError(
            f"network {name}: images of {image[1]}x{image[2]} pixels are too small for it; resize them with "
            f"--image-size, or take a fully connected network (mlpnet, lenet300, fc5, fc12)."
        ) from error
    return network.train()


def load(folder: str | Path) -> nn.Module:
    """The network of a folder that `hf-prune train` wrote, in eval mode.

    Its input is (images, channels, height, width): pixels in 0..1, minus the `mean` and over the `std` that
    training.json names. Raises ValueError for a folder that holds no such network.
    """
    from safetensors.torch import load_file

    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG}: it is not a folder that hf-prune train wrote.")
    told = json.loads(path.read_text(encoding="utf-8"))["network"]
    channels, height, width = told["image"]
    network = build(told["name"], (channels, height, width), told["classes"])
    network.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return network.eval()
