"""The images of a training run: a whole dataset in memory as bytes, in three parts, and batches of it by seed.

Small images only: a hundred thousand of 64x64 pixels are 1.2 GB. They lie on the device that trains, where cropping,
flipping and scaling cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .training_recipe import Training

DIGITS = "digits"  # scikit-learn's handwritten digits, bundled with it: a dataset that needs no file and no network
LIMIT = 8 * 2**30  # bytes of pixels beyond which the data is not held in memory


@dataclass
class Part:
    """pixels: (images, channels, height, width), bytes. labels: (images,), int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Part:
        return Part(self.pixels.to(device), self.labels.to(device))


@dataclass
class Data:
    """train fits the weights, validation chooses λ, test is looked at and never used."""

    train: Part
    validation: Part
    test: Part
    names: list[str]  # of the classes
    mean: list[float]  # per channel, of the training images, pixels in 0..1
    std: list[float]
    where: dict[str, Any] = field(default_factory=dict)  # dataset and split, as training.json says it
    notes: list[str] = field(default_factory=list)
    _scale: tuple[Tensor, Tensor] | None = None  # mean and std on the device, as last used

    @property
    def image(self) -> tuple[int, int, int]:
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> Data:
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return Data(**parts, names=self.names, mean=self.mean, std=self.std, where=self.where, notes=self.notes)

    def scaled(self, pixels: Tensor) -> Tensor:
        """Bytes -> what the network sees, float32: (pixel / 255 - mean) / std."""
        if self._scale is None or self._scale[0].device != pixels.device:
            tensors = [torch.tensor(v, device=pixels.device).view(-1, 1, 1) * 255 for v in (self.mean, self.std)]
            self._scale = (tensors[0], tensors[1])
        return (pixels.float() - self._scale[0]) / self._scale[1]


def load(chosen: Training, token: str | None = None) -> Data:
    """Open, decode and divide the data of a run.

    Raises ValueError where there are no labels, images of several sizes and no `image_size`, a test part with other
    classes, or more pixels than memory is meant for.
    """
    train, test = _sets(chosen, token)
    size = chosen.image_size
    pixels, labels = _decode(train, size)
    shown, truth = _decode(test, size or _sides(pixels))
    names = train.label_names or [str(i) for i in range(int(labels.max()) + 1)]
    if test.label_names is not None and train.label_names is not None and test.label_names != train.label_names:
        raise ValueError(
            f"the classes of the test images ({_few(test.label_names)}) are not those of the training images "
            f"({_few(train.label_names)}); give an --eval-dataset with the same classes."
        )
    if int(truth.max()) >= len(names):
        raise ValueError(f"the test images hold class {int(truth.max())}, the training images only {len(names)}.")
    grey = all(_grey(part) for part in (pixels, shown))
    if grey:
        pixels, shown = pixels[:, :1], shown[:, :1]
    held = max(1, round(chosen.validation * len(pixels)))
    if len(pixels) - held < 2:
        raise ValueError(f"--dataset {chosen.dataset} gave {len(pixels)} images: too few to train and to validate on.")
    # Not the seed of the run: runs of different seeds are to differ in their training, not in what judges them.
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
    kept, fit = order[:held], order[held:]
    part = Part(pixels[fit].contiguous(), labels[fit])
    scaled = part.pixels.transpose(0, 1).reshape(part.pixels.shape[1], -1)
    std, mean = zip(*(torch.std_mean(channel.double() / 255) for channel in scaled), strict=True)
    where = {"dataset": train.dataset, "split": train.split, "eval_dataset": test.dataset, "eval_split": test.split}
    return Data(
        part,
        Part(pixels[kept].contiguous(), labels[kept]),
        Part(shown.contiguous(), truth),
        names=names,
        mean=[round(float(m), 6) for m in mean],
        std=[round(max(float(s), 1e-3), 6) for s in std],
        where=where,
        notes=[*train.notes, *test.notes],
    )


def _sets(chosen: Training, token: str | None) -> tuple[Any, Any]:
    """(training, test) as calibration.ImageSet, test without overlap."""
    from .calibration import images

    if chosen.dataset == DIGITS:
        from .demo import digits, image_set

        found = digits()
        fit = (found.train + found.calibration)[: chosen.samples]
        return image_set(fit, "train", labelled=True), image_set(found.test, "test", labelled=True)
    columns: dict[str, Any] = {"image_column": chosen.image_column, "label_column": chosen.label_column}
    train = images(
        chosen.dataset, config=chosen.config, split=chosen.split, samples=chosen.samples, seed=0, streaming=False,
        token=token, **columns,
    )  # fmt: skip
    same = chosen.eval_dataset is None
    split = chosen.eval_split
    if same and split is None:
        split = next((s for s in ("test", "validation", "valid", "val") if s in train.available_splits), None)
        if split is None or split == train.split:
            raise ValueError(
                f"--dataset {chosen.dataset} has no second split to test on (it has "
                f"{', '.join(train.available_splits)}): name the test images with --eval-dataset or --eval-split."
            )
    test = images(
        chosen.eval_dataset or chosen.dataset, config=chosen.config if same else None, split=split, seed=0,
        streaming=False, token=token, **(columns if same else {}),
    )  # fmt: skip
    for each in (train, test):
        if each.label_column is None:
            raise ValueError(
                f"--dataset {each.dataset}: training needs labels, and no column of class numbers was found; name it "
                f"with --label-column."
            )
    return train, test


def _decode(images: Iterable[Any], size: int | tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """(pixels (n, 3, h, w), labels (n,)); an image without a label is left out. size: side, or (height, width)."""
    from PIL import Image

    pixels: list[np.ndarray] = []
    labels: list[int] = []
    held = 0
    for image, label in images:
        if label is None:
            continue
        if size is not None:
            wanted = (size, size) if isinstance(size, int) else (size[1], size[0])
            if image.size != wanted:
                image = image.resize(wanted, Image.Resampling.BILINEAR)
        array = np.asarray(image.convert("RGB"))
        if pixels and array.shape != pixels[0].shape:
            first = pixels[0].shape
            raise ValueError(
                f"the images have several sizes ({first[0]}x{first[1]}, {array.shape[0]}x{array.shape[1]}, ...): "
                f"choose one with --image-size."
            )
        held += array.nbytes
        if held > LIMIT:
            raise ValueError(
                f"the images are more than {LIMIT >> 30} GB as pixels, and hf-prune train holds them in memory: make "
                f"them smaller with --image-size, or take fewer with --samples."
            )
        pixels.append(array)
        labels.append(label)
    if not labels:
        raise ValueError("none of the images has a label.")
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def _sides(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[2], pixels.shape[3]


def _grey(pixels: Tensor) -> bool:
    return bool((pixels[:, :1] == pixels).all())


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... {len(names)} in all" if len(names) > 3 else "")


# ----------------------------------------------------------------------------------------------------------- batches
def steps(count: int, batch_size: int) -> int:
    """Steps per epoch; the images that do not fill the last batch wait for the next epoch's order."""
    return max(1, count // batch_size)


def batches(
    data: Data, batch_size: int, augment: str, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (images, labels), the same for the same seed and epoch; ranks share each batch out evenly."""
    part = data.train
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    order = torch.randperm(len(part), generator=generator)
    size = part.pixels.shape[-1]
    reach = size // 8  # 4 pixels of 32, as is usual
    where = torch.randint(0, 2 * reach + 1, (len(part), 2), generator=generator)
    flip = torch.rand(len(part), generator=generator) < 0.5
    for step in range(steps(len(part), batch_size)):
        which = order[step * batch_size : (step + 1) * batch_size][rank::world]
        pixels = part.pixels[which.to(part.pixels.device)]
        if augment != "none":
            pixels = _crop(pixels, where[which], reach)
        if augment == "crop-flip":
            turned = flip[which].to(pixels.device).view(-1, 1, 1, 1)
            pixels = torch.where(turned, pixels.flip(-1), pixels)
        yield data.scaled(pixels), part.labels[which.to(part.labels.device)]


def _crop(pixels: Tensor, corner: Tensor, reach: int) -> Tensor:
    """Each image shifted by up to `reach` pixels; black moves in."""
    n, _, height, width = pixels.shape
    padded = F.pad(pixels, (reach,) * 4)
    corner = corner.to(pixels.device)
    rows = corner[:, :1] + torch.arange(height, device=pixels.device)  # (n, height)
    columns = corner[:, 1:] + torch.arange(width, device=pixels.device)
    image = torch.arange(n, device=pixels.device)
    return padded.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
