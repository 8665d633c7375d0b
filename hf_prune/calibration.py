"""Images from any dataset: a Hub id (streamed), a folder of images, parquet or webdataset tars, or a single such file.

Local data is shuffled as a whole (folders of images come class by class), streamed data through a buffer, both by seed.
Broken images are skipped and counted by reason. Labels are carried along where there are any, and never needed.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # preferred among several Image columns
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "coarse_label")
FILE_KINDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow", ".zip": "imagefolder"}
EVAL_SPLITS = ("validation", "valid", "val", "dev", "test")
SHUFFLE_BUFFER = 1000  # streamed examples held to draw from; they are encoded, about 100 kB each


class ImageSet:
    """An iterable of (RGB image, label or None), the same images in the same order at every pass.

    Images are decoded when they are asked for and not kept. Of the good images of one global order, cut into runs of
    `deal`, rank r yields every world_size-th run from the r-th on, so the ranks together see what one process would see
    alone; with `deal` the size of a batch, in the same batches.
    After a pass: `yielded`, `skipped` and `skip_reasons` (of this rank), and `notes` with what the user should know.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        *,
        dataset: str,
        split: str,
        image_column: str,
        label_column: str | None,
        label_names: list[str] | None,
        available_splits: list[str],
        samples: int | None,
        length: int | None,
        streaming: bool,
        rank: int = 0,
        world_size: int = 1,
        deal: int = 1,
        token: str | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self._rows, self._token, self._length = rows, token, length
        self._class_index = {name: i for i, name in enumerate(label_names or [])}
        self.dataset, self.split, self.available_splits = dataset, split, available_splits
        self.image_column, self.label_column, self.label_names = image_column, label_column, label_names
        self.samples, self.streaming, self.rank, self.world_size = samples, streaming, rank, world_size
        self.deal = deal
        self.yielded = 0
        self.skip_reasons: Counter[str] = Counter()
        self._notes = notes or []
        self._pass_notes: list[str] = []

    @property
    def skipped(self) -> int:
        return sum(self.skip_reasons.values())

    @property
    def notes(self) -> list[str]:
        return [*self._notes, *self._pass_notes]

    @property
    def default_eval_split(self) -> str | None:
        """The split to evaluate on when the user names none: validation, else test; None if only this one is there."""
        return next((s for s in EVAL_SPLITS if s in self.available_splits and s != _base(self.split)), None)

    @property
    def expected(self) -> int | None:
        """How many images a pass of this rank yields if none is broken; None where the dataset does not say."""
        known = [count for count in (self.samples, self._length) if count is not None]
        if not known:
            return None
        rounds, rest = divmod(min(known), self.deal * self.world_size)
        return rounds * self.deal + min(max(0, rest - self.rank * self.deal), self.deal)

    def _mine(self, k: int) -> bool:
        return k // self.deal % self.world_size == self.rank

    def __iter__(self) -> Iterator[tuple[Image.Image, int | None]]:
        """Raises ValueError when the dataset turns out empty, or holds no image that can be decoded."""
        good = broken = seen = self.yielded = 0
        self.skip_reasons, self._pass_notes = Counter(), []
        classes: set[int] = set()
        # With a limit, every rank decodes all images up to it: only so do all agree which ones are broken.
        everything = self.samples is not None and self.world_size > 1
        for position, row in enumerate(self._rows):
            if self.samples is not None and good >= self.samples:
                break
            seen += 1
            mine = self._mine(position)
            if not (mine or everything):
                continue
            try:
                image = decode(_content(row.get(self.image_column), self._token))
            except BrokenImage as reason:
                broken += 1
                if mine:
                    self.skip_reasons[str(reason)] += 1
                continue
            good += 1
            if everything and not self._mine(good - 1):
                continue
            label = self._label(row)
            if label is not None:
                classes.add(label)
            self.yielded += 1
            yield image, label
        if seen == 0:
            raise ValueError(f"--dataset {self.dataset}: split {self.split} is empty.")
        if good == 0 and broken:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.skip_reasons.most_common(3))
            raise ValueError(
                f"--dataset {self.dataset}: none of the {broken} images in column {self.image_column!r} could be "
                f"decoded ({reasons})."
            )
        self._conclude(good, seen, classes, partial=self.world_size > 1 and not everything)

    def _label(self, row: dict[str, Any]) -> int | None:
        value = row.get(self.label_column) if self.label_column else None
        if isinstance(value, str):
            return self._class_index.get(value)
        return None if value is None or value < 0 else int(value)  # -1 marks an unlabelled test image

    def _conclude(self, good: int, seen: int, classes: set[int], *, partial: bool) -> None:
        if self.skipped:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in self.skip_reasons.most_common())
            self._pass_notes.append(f"{self.skipped} images were skipped: {reasons}.")
        if self.samples is not None and good < self.samples and not partial:
            self._pass_notes.append(f"{self.samples} images were asked for; the dataset gave {good}.")
        count = len(self.label_names or [])
        # what a fair draw would hit, halved: far fewer classes than that means the data came sorted by class
        if classes and count and len(classes) < count * (1 - (1 - 1 / count) ** self.yielded) / 2:
            self._pass_notes.append(
                f"the {self.yielded} images show only {len(classes)} of {count} classes: the data is "
                f"sorted by class, or holds no others."
            )


def images(
    dataset: str,
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    streaming: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    rank: int = 0,
    world_size: int = 1,
    deal: int = 1,
) -> ImageSet:
    """Open a dataset and choose its split, image column and label column.

    dataset: Hub id, folder or file. samples: how many good images to yield over all ranks; None for all. streaming: by
    default Hub data is streamed and local data is not. deal: images that stay together on a rank. Raises ValueError
    when the dataset is not found or cannot be reached, has no such split, no image column, or no rows.
    """
    import datasets

    if samples is not None and samples < 1:
        raise ValueError(f"--samples {samples}: at least one image is needed.")
    notes: list[str] = []
    if trust_remote_code:
        notes.append("--trust-remote-code has no effect on datasets: they no longer run code.")
    builder, local = _builder(dataset, config, token, revision)
    available = _splits(builder, dataset)
    chosen = split or ("train" if "train" in available else available[0])
    if _base(chosen) not in available:
        raise ValueError(f"--dataset {dataset} has no split {chosen!r}; it has {', '.join(available)}.")
    stream = not local if streaming is None else streaming
    with _quiet_bars():
        found = _open(builder, chosen, dataset, stream)
    found = _with_features(found, dataset, chosen)
    if stream:
        # Before anything else: datasets decodes remote streams ahead in threads, where a broken image ends the stream.
        found = found.decode(False)
    features = dict(found.features)
    image_column = _image_column(features, image_column, dataset)
    label_column, label_names = _label_column(features, label_column, image_column, dataset)
    columns = [image_column] + ([label_column] if label_column else [])
    if label_column and label_names is None and _is_text(features[label_column]):
        if stream:
            raise ValueError(
                f"--label-column {label_column} holds text, whose classes are not known while streaming; name a column "
                f"of class numbers, or download the dataset first."
            )
        label_names = sorted(value for value in found.unique(label_column) if value is not None)
    found = found.select_columns(columns).cast_column(image_column, datasets.Image(decode=False))
    rows: Iterable[dict[str, Any]]
    if stream:
        rows, length = found.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), None
        if local:
            notes.append(
                "streamed local data is mixed through a buffer only; without streaming it is shuffled as a whole."
            )
    else:
        length = found.num_rows
        if length == 0:
            raise ValueError(f"--dataset {dataset}: split {chosen} is empty.")
        rows = _Shuffled(found, seed)
    return ImageSet(
        rows,
        dataset=dataset,
        split=chosen,
        image_column=image_column,
        label_column=label_column,
        label_names=label_names,
        available_splits=available,
        samples=samples,
        length=length,
        streaming=stream,
        rank=rank,
        world_size=world_size,
        deal=deal,
        token=token,
        notes=notes,
    )


def batches(
    image_set: Iterable[tuple[Image.Image, Any]], loaded: Any, batch_size: int, classes: Any = None
) -> Iterator[Any]:
    """Batches as `hf_prune.prune` takes them: up to `batch_size` images through the model's own preprocessing.

    classes: the model's class of each of the dataset's; with them a batch is (input, labels (images,)).
    """
    import torch

    for group in groups(image_set, batch_size):
        batch = loaded.batch(loaded.processor([image for image, _ in group]))
        yield batch if classes is None else (batch, torch.tensor([classes[label] for _, label in group]))


def groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of `size` items, the last one shorter."""
    if size < 1:
        raise ValueError(f"--batch-size {size}: at least one image is needed.")
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class BrokenImage(Exception):
    """An image that cannot be used; the message is the reason, in words that many images can share."""


def decode(content: bytes) -> Image.Image:
    """Encoded image -> RGB image.

    As `datasets` does: the EXIF orientation is applied, of an animation the first frame is taken, transparency is
    dropped. 16-bit grey is scaled to 8 bits, which PIL's own conversion would clip to white. Raises BrokenImage.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # damaged EXIF: the pixels are what counts
            image: Image.Image = Image.open(io.BytesIO(content))
            image.load()
            if image.getexif().get(0x0112) is not None:  # orientation
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise BrokenImage(f"pixels of mode {image.mode}, whose range is unknown")
            return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BrokenImage(f"more than {Image.MAX_IMAGE_PIXELS} pixels (decompression bomb)") from error
    except UnidentifiedImageError as error:
        raise BrokenImage("not an image") from error
    except (BrokenImage, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes; nothing but them runs here
        raise BrokenImage("damaged or truncated") from error


def _content(value: Any, token: str | None) -> bytes:
    """The encoded bytes of one cell of an Image column: {"bytes", "path"}."""
    if value is None:
        raise BrokenImage("no image in this row")
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    path = value.get("path")
    if not path:
        raise BrokenImage("no image in this row")
    if "://" not in path:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise BrokenImage("file missing or not readable") from error
    # A streamed folder of images, or one inside an archive. A network failure is no broken image: it stops the run.
    from datasets import DownloadConfig
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb", download_config=DownloadConfig(token=token)) as file:
        return bytes(file.read())


class _Shuffled:
    """The rows of an in-memory-mapped dataset in an order drawn once from `seed`."""

    def __init__(self, rows: Any, seed: int) -> None:
        self.rows = rows
        self.order = np.random.default_rng(seed).permutation(rows.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in self.order:
            yield self.rows[int(index)]


# --- finding the dataset, its split and its columns


def _builder(dataset: str, config: str | None, token: str | None, revision: str | None) -> tuple[Any, bool]:
    """(datasets' builder, whether the data is local)."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    path = Path(dataset).expanduser()
    local = path.exists()
    if local and revision is not None:
        raise ValueError(f"--dataset {dataset} is local and has no revision {revision}.")
    options: dict[str, Any] = {"name": config, "token": token, "revision": revision}
    try:
        if path.is_file():
            kind = FILE_KINDS.get(path.suffix.lower())
            if kind is None:
                raise ValueError(
                    f"--dataset {dataset}: give a folder of images, or a file of one of these kinds: "
                    f"{', '.join(FILE_KINDS)}."
                )
            split = "train"  # what datasets calls the one split of a file
            with _no_counting():
                return datasets.load_dataset_builder(kind, data_files={split: [str(path)]}), True
        if not local and re.match(r"[./~\\]|[A-Za-z]:\\", dataset):
            raise ValueError(f"--dataset {dataset}: there is no such file or folder.")
        with _no_counting() if local else contextlib.nullcontext():
            return datasets.load_dataset_builder(str(path) if local else dataset, **options), local
    except DatasetNotFoundError as error:
        gated = " is gated: accept its terms on its page, then log in (hf auth login) or pass --token."
        missing = (
            " was not found: there is no such folder and no such dataset on the Hub (or it is private: pass --token)."
        )
        where = f"--dataset {dataset}" + (f" at revision {revision}" if revision else "")
        raise ValueError(where + (gated if "gated" in str(error) else missing)) from error
    except ConnectionError as error:
        raise ValueError(
            f"--dataset {dataset}: there is no such folder, and the Hub could not be reached ({_short(error)})."
        ) from error
    except FileNotFoundError as error:  # EmptyDatasetError and DataFilesNotFoundError too
        why = "holds no data files" if local else "was not found"
        raise ValueError(f"--dataset {dataset} {why} ({_short(error)}).") from error
    except ValueError as error:
        text = str(error)
        if text.startswith("--dataset"):
            raise
        several = re.search(r"Config name is missing.*?\[(.*?)\]", text, re.S)
        if several:
            choice = several[1].replace("'", "")
            raise ValueError(
                f"--dataset {dataset} has several configurations; choose one with --config: {choice}."
            ) from error
        raise ValueError(f"--dataset {dataset}: {_short(error)}") from error
    except (DatasetsError, OSError, RuntimeError) as error:
        raise ValueError(f"--dataset {dataset} could not be opened: {_short(error)}") from error


def _splits(builder: Any, dataset: str) -> list[str]:
    if builder.info.splits:
        return [str(name) for name in builder.info.splits]
    if getattr(builder.config, "data_files", None):
        return [str(name) for name in builder.config.data_files]
    raise ValueError(f"--dataset {dataset}: its splits cannot be told.")


def _open(builder: Any, split: str, dataset: str, stream: bool) -> Any:
    from datasets.exceptions import DatasetsError

    try:
        if stream:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except (DatasetsError, OSError, ValueError, NotImplementedError) as error:
        if _empty(error):
            raise ValueError(f"--dataset {dataset}: split {split} is empty.") from error
        cause = error.__cause__ or error
        raise ValueError(f"--dataset {dataset}, split {split}: it could not be read: {_short(cause)}") from error


def _empty(error: BaseException) -> bool:
    return "corresponds to no data" in str(error) or "contains no data" in str(error)


def _with_features(found: Any, dataset: str, split: str) -> Any:
    """The dataset with its features known: a stream may not state them before its first rows are read."""
    if found.features is None:
        found = found._resolve_features()
    if found.features is None:
        raise ValueError(f"--dataset {dataset}: split {split} is empty.")
    return found


def _image_column(features: dict[str, Any], wanted: str | None, dataset: str) -> str:
    import datasets

    have = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"--image-column {wanted}: {dataset} has no such column; it has {have}.")
        kind = features[wanted]
        if isinstance(kind, datasets.Image) or _is_text(kind) or _is_bytes(kind):
            return wanted
        raise ValueError(f"--image-column {wanted} holds {_kind(kind)}, not images; {dataset} has {have}.")
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        raise ValueError(
            f"--dataset {dataset} has no image column; it has {have}. If one of them holds encoded images or paths, "
            f"name it with --image-column."
        )
    return next((name for name in IMAGE_COLUMNS if name in found), found[0])


def _label_column(
    features: dict[str, Any], wanted: str | None, image_column: str, dataset: str
) -> tuple[str | None, list[str] | None]:
    """(label column, class names): the first ClassLabel, else integers under a usual name, else nothing."""
    import datasets

    if wanted is not None and wanted not in features:
        raise ValueError(f"--label-column {wanted}: {dataset} has no such column; it has {', '.join(features)}.")
    if wanted is None:
        named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        plain = [name for name in LABEL_COLUMNS if name in features and _is_whole(features[name])]
        wanted = next(iter(named + plain), None)
    if wanted is None:
        return None, None
    kind = features[wanted]
    if isinstance(kind, datasets.ClassLabel):
        return wanted, list(kind.names) if kind.names else None
    if wanted == image_column or not (_is_whole(kind) or _is_text(kind)):
        raise ValueError(f"--label-column {wanted} holds {_kind(kind)}; class numbers or class names are needed.")
    return wanted, None


def _is_whole(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_bytes(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary") or (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    )


def _kind(feature: Any) -> str:
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind


def _base(split: str) -> str:
    """train[:10%] -> train"""
    return split.partition("[")[0]


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:300] + "...").rstrip(".")


@contextlib.contextmanager
def _no_counting() -> Iterator[None]:
    """datasets reports every opened dataset to a download counter, local files too; local data needs no network."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


class _quiet_bars:
    """No progress bars of datasets while a local dataset is indexed: the command draws its own."""

    def __enter__(self) -> None:
        import datasets

        self.were_off = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        if not self.were_off:
            datasets.enable_progress_bars()
