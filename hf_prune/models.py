"""One face for a vision model of transformers or timm: load it, feed it images, save it as it came.

In memory the module is float32 and in eval mode; on disk it keeps the dtype, names and files of its checkpoint, so that
`from_pretrained` or `timm.create_model("local-dir:...")` reads the result without knowing of hf_prune.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import source as sources
from .source import Source

if TYPE_CHECKING:
    from PIL.Image import Image

Batch = Tensor | dict[str, Tensor]

# Buffers that a module computes for itself, or that inference never reads; all else must come from the checkpoint.
COMPUTED = ("position_ids", "relative_position_index", "relative_coords_table", "num_batches_tracked")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass
class Loaded:
    """A model with what belongs to it. `module` may be pruned in place; `save` writes it."""

    module: nn.Module
    library: str  # "transformers" | "timm"
    source: str  # as the user typed it
    revision: str | None  # commit on the Hub; None for a local folder
    dtype: torch.dtype  # of the weights on disk, and of what `save` writes
    processor: Callable[[Sequence[Image]], Tensor]  # n RGB images -> (n, 3, h, w) float32, as the model expects
    labels: list[str] | None  # class names by index; None for a bare backbone or where the checkpoint states none
    num_classes: int | None  # None for a bare backbone
    license: str | None
    notes: list[str]  # what the user should know about how this was loaded
    origin: Source = field(repr=False)
    stored_dtypes: dict[str, torch.dtype] = field(repr=False)  # name on disk -> dtype there, for float tensors

    @property
    def has_logits(self) -> bool:
        return self.num_classes is not None

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def batch(self, pixel_values: Tensor) -> Batch:
        """pixel_values (n, 3, h, w) -> what the module takes, on its device."""
        pixel_values = pixel_values.to(self.device)
        return pixel_values if self.library == "timm" else {"pixel_values": pixel_values}

    def outputs(self, batch: Batch, module: nn.Module | None = None) -> Tensor:
        """Logits (n, classes); for a bare backbone (n, features): its pooled output, or the mean over positions.

        module: another module of the same architecture to run instead, for instance the pruned copy.
        """
        module = self.module if module is None else module
        found = module(**batch) if isinstance(batch, dict) else module(batch)
        if self.has_logits:
            return found if isinstance(found, Tensor) else found.logits
        if isinstance(found, Tensor):
            return _flat(found)
        pooled = getattr(found, "pooler_output", None)
        return _flat(found.last_hidden_state if pooled is None else pooled)

    def checkpoint_names(self) -> dict[str, str]:
        """Name of every tensor in memory -> its name on disk. The two differ for restructured transformers models."""
        state = self.module.state_dict()
        names = {name: name for name in state}
        if self.library == "timm":
            return names
        try:
            from transformers.core_model_loading import revert_weight_conversion
        except ImportError:  # transformers 4 has one set of names
            return names
        # A renamed tensor keeps its storage. One that is split or merged on the way to disk has no single name there,
        # and keeps the name it has in memory.
        on_disk = revert_weight_conversion(self.module, dict(state))
        places = {tensor.data_ptr(): disk for disk, tensor in on_disk.items()}
        return {name: places.get(tensor.data_ptr(), name) for name, tensor in state.items()}

    def save(self, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
        """Write safetensors, config and processor files into `folder`, in the dtype of the checkpoint.

        Zeros are written as +0.0. The module in memory is not touched. timm reads a single file, so timm models are
        not sharded. Raises ValueError naming a weight that is not finite in the dtype it is stored in.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (_save_timm if self.library == "timm" else _save_transformers)(self, folder, max_shard_size)

    def stored_state(self) -> dict[str, Tensor]:
        """The state dict as `save` writes it: names of memory, dtypes of the checkpoint, ties kept."""
        disk_names = self.checkpoint_names()
        done: dict[tuple[Any, ...], Tensor] = {}
        stored = {}
        for name, tensor in self.module.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
            if place not in done:
                dtype = self.stored_dtypes.get(disk_names[name], self.dtype)
                done[place] = _for_disk(name, tensor, dtype)
            stored[name] = done[place]
        return stored


def load(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load a vision model: a local folder, a Hub id, or a timm name.

    The module comes in float32 and eval mode, on `device`. dtype: what `save` writes, by default what the checkpoint
    holds. Raises ValueError, in one sentence, for whatever is wrong with the name or the checkpoint: not found, not
    reachable, gated, no safetensors, weights missing (they would be random), not finite, quantized, not a vision model.
    """
    chosen = _dtype(dtype) if dtype is not None else None
    _need_torchvision()
    origin = sources.resolve(name, revision=revision, token=token, remote_code=trust_remote_code)
    stored = _stored_dtypes(origin)
    reader = _load_timm if origin.library == "timm" else _load_transformers
    loaded = reader(origin, trust_remote_code=trust_remote_code)
    loaded.stored_dtypes = stored if chosen is None else {}
    loaded.dtype = chosen or _main_dtype(loaded.module, stored)
    _refuse_not_finite(loaded)
    loaded.module.eval().requires_grad_(True)
    loaded.module.to(device)
    return loaded


# --- transformers


def _load_transformers(origin: Source, *, trust_remote_code: bool) -> Loaded:
    import transformers

    options: dict[str, Any] = {"local_files_only": origin.local, "trust_remote_code": trust_remote_code}
    with _quiet(), _one_sentence(origin.name):
        config = transformers.AutoConfig.from_pretrained(origin.folder, **options)
    notes = list(origin.notes)
    options |= {"config": config, "dtype": torch.float32, "use_safetensors": True}
    architectures = config.architectures or []
    custom = getattr(config, "auto_map", None) or {}
    states_head = any("ForImageClassification" in each for each in architectures)
    module = None
    if states_head or "AutoModelForImageClassification" in custom:
        module, missing, unexpected = _from_pretrained(origin, transformers.AutoModelForImageClassification, options)
        _refuse_missing(origin, missing, type(module).__name__)
    elif not architectures and type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        # the config does not say what it is: it is a classifier if the checkpoint holds all of one
        module, missing, unexpected = _from_pretrained(origin, transformers.AutoModelForImageClassification, options)
        module = None if missing else module
    has_head = module is not None
    if module is None:
        module, unexpected, more = _bare(origin, config, options)
        notes += more
    if module.main_input_name != "pixel_values":
        raise ValueError(
            f"{origin.name} is no vision model: {type(module).__name__} takes {module.main_input_name}, not "
            f"pixel_values."
        )
    if unexpected and not has_head:
        notes.append(f"{len(unexpected)} tensors of the checkpoint belong to no part of the backbone and are left out.")
    with _quiet(), _one_sentence(origin.name, "it holds no usable preprocessor_config.json"):
        own = transformers.AutoImageProcessor.from_pretrained(
            origin.folder, backend="pil", local_files_only=origin.local, trust_remote_code=trust_remote_code
        )
    labels = None
    if has_head:
        labels = [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]
    return Loaded(
        module=module,
        library="transformers",
        source=origin.name,
        revision=origin.revision,
        dtype=torch.float32,
        processor=_TransformersProcessor(origin.name, own, getattr(config, "num_channels", 3)),
        labels=labels,
        num_classes=config.num_labels if has_head else None,
        license=origin.license,
        notes=notes,
        origin=origin,
        stored_dtypes={},
    )


def _bare(origin: Source, config: Any, options: dict[str, Any]) -> tuple[Any, list[str], list[str]]:
    """Load a checkpoint without classifier as a backbone: (module, unexpected names, notes)."""
    import transformers

    notes = [f"{origin.name} has no image classifier: it is pruned as a bare backbone, judged by its representation."]
    auto: Any = transformers.AutoModel
    vision = getattr(config, "vision_config", None)
    if vision is not None and type(vision) in transformers.MODEL_MAPPING:
        auto = transformers.MODEL_MAPPING[type(vision)]
        options = {key: value for key, value in options.items() if key != "config"}
        notes.append(f"only its vision tower is used and saved ({auto.__name__}).")
    module, missing, unexpected = _from_pretrained(origin, auto, options)
    accepts_pooling = "add_pooling_layer" in inspect.signature(type(module).__init__).parameters
    if accepts_pooling and missing and all("pooler." in name for name in missing):
        # Checkpoints saved from a classifier or a pretraining head often lack the pooler, which nothing there used.
        module, missing, unexpected = _from_pretrained(origin, auto, options | {"add_pooling_layer": False})
        notes.append("the checkpoint has no pooler: its representation is the mean over positions.")
    _refuse_missing(origin, missing, type(module).__name__)
    return module, unexpected, notes


def _from_pretrained(origin: Source, auto: Any, options: dict[str, Any]) -> tuple[Any, list[str], list[str]]:
    """(module, names missing in the checkpoint, names the module has no place for)."""
    if not hasattr(auto, "_model_mapping"):  # a model class, not an Auto class: it takes no trust_remote_code
        options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    with _quiet(), _one_sentence(origin.name):
        module, info = auto.from_pretrained(origin.folder, output_loading_info=True, **options)
    missing = sorted(name for name in info["missing_keys"] if not name.endswith(COMPUTED))
    return module, missing, sorted(info["unexpected_keys"])


def _refuse_missing(origin: Source, missing: list[str], architecture: str) -> None:
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ValueError(
            f"{origin.name}: the checkpoint lacks {shown}, which {architecture} needs and would start from random "
            f"values; the file is incomplete or in a format that this version of {origin.library} cannot read."
        )


class _TransformersProcessor:
    """Images -> (n, 3, h, w) by the model's own image processor (PIL backend: the same pixels on every machine)."""

    def __init__(self, name: str, own: Any, channels: int) -> None:
        self.name, self.own, self.channels = name, own, channels

    def __call__(self, images: Sequence[Image]) -> Tensor:
        if self.channels == 1:
            images = [image.convert("L") for image in images]
        try:
            pixels = self.own(list(images), return_tensors="pt")["pixel_values"]
        except ValueError as error:  # images of different sizes that the processor does not resize
            raise ValueError(f"{self.name}: its image processor failed: {str(error).splitlines()[0]}") from error
        return pixels.float()


def _save_transformers(loaded: Loaded, folder: Path, max_shard_size: str) -> None:
    module: Any = loaded.module
    before = module.config.dtype
    try:
        with _quiet():
            module.save_pretrained(folder, state_dict=loaded.stored_state(), max_shard_size=max_shard_size)
    finally:
        module.config.dtype = before  # save_pretrained writes the dtype of the module in memory into it
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(loaded.dtype).removeprefix("torch.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "dtype" in value)):
        part["dtype"] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    # as they came, whatever this version of transformers would write
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (loaded.origin.folder / file).is_file():
            shutil.copyfile(loaded.origin.folder / file, folder / file)


# --- timm


def _load_timm(origin: Source, *, trust_remote_code: bool) -> Loaded:
    import timm
    import timm.data

    architecture = origin.config["architecture"]
    if not timm.is_model(architecture):
        raise ValueError(
            f"{origin.name}: timm {timm.__version__} knows no architecture {architecture!r}; a newer timm may."
        )
    with _one_sentence(origin.name):
        module = timm.create_model(f"local-dir:{origin.folder}", pretrained=True)
    # timm drops the classifier without a word when the config contradicts itself about the number of classes
    stated = module.pretrained_cfg.get("num_classes")
    if module.num_classes and stated != module.num_classes:
        raise ValueError(
            f"{origin.name}: config.json states {stated} classes for the weights and {module.num_classes} for the "
            f"model; the classifier would start from random values."
        )
    data = timm.data.resolve_model_data_config(module)
    transform = timm.data.create_transform(**data, is_training=False)
    has_head = bool(module.num_classes)
    notes = list(origin.notes)
    if not has_head:
        notes.append(f"{origin.name} has no classifier: it is pruned as a bare backbone, judged by its representation.")
    if trust_remote_code:
        notes.append("--trust-remote-code has no effect on a timm model.")
    return Loaded(
        module=module.float(),
        library="timm",
        source=origin.name,
        revision=origin.revision,
        dtype=torch.float32,
        processor=_TimmProcessor(transform, data["input_size"][0]),
        labels=_timm_labels(origin, module) if has_head else None,
        num_classes=module.num_classes if has_head else None,
        license=origin.license,
        notes=notes,
        origin=origin,
        stored_dtypes={},
    )


def _timm_labels(origin: Source, module: Any) -> list[str] | None:
    """Class names from the config; for weights that say they are of ImageNet, its synsets ("n01440764 tench, ...")."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = module.pretrained_cfg
    names, described = config.get("label_names"), config.get("label_descriptions") or {}
    if isinstance(names, dict):  # index -> name, as JSON keeps it
        names = [names.get(str(i), names.get(i, f"LABEL_{i}")) for i in range(module.num_classes)]
    if names:
        return [f"{name} {described[name]}" if name in described else str(name) for name in names]
    tags = f"{origin.config['architecture']}.{config.get('tag', '')} {origin.name}"
    subset = infer_imagenet_subset({"num_classes": module.num_classes})
    if subset is None or not any(tag in tags for tag in ("in1k", "in12k", "in21k", "in22k")):
        return None
    info = ImageNetInfo(subset)
    described = info.label_descriptions(as_dict=True)
    return [f"{name} {described[name]}" for name in info.label_names()]


class _TimmProcessor:
    """Images -> (n, channels, h, w) by timm's evaluation transform for this checkpoint."""

    def __init__(self, transform: Any, channels: int) -> None:
        self.transform, self.channels = transform, channels

    def __call__(self, images: Sequence[Image]) -> Tensor:
        mode = "L" if self.channels == 1 else "RGB"
        return torch.stack([self.transform(image.convert(mode)) for image in images]).float()


def _save_timm(loaded: Loaded, folder: Path, max_shard_size: str) -> None:
    from safetensors.torch import save_file

    module: Any = loaded.module
    config = json.loads(json.dumps(loaded.origin.config))  # a deep copy
    if "pretrained_cfg" not in config:  # the oldest form: one flat mapping
        pretrained = {key: value for key, value in config.items() if key not in ("architecture", "num_features")}
        config = {"architecture": config["architecture"], "pretrained_cfg": pretrained}
    pretrained = config["pretrained_cfg"]
    if "labels" in pretrained:
        pretrained["label_names"] = pretrained.pop("labels")
    # Where the dense weights lie, and what was done to them on loading, is not true of these weights: a label offset
    # would cut a class off the saved classifier at each further load.
    for key in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset"):
        pretrained.pop(key, None)
    config["num_classes"] = pretrained["num_classes"] = module.num_classes
    # transformers' TimmWrapper passes num_classes beside model_args and stops when it finds it in both
    (config.get("model_args") or {}).pop("num_classes", None)
    state = {name: tensor.clone() for name, tensor in loaded.stored_state().items()}  # safetensors shares nothing
    save_file(state, folder / sources.WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- both


def _flat(features: Tensor) -> Tensor:
    """(n, f), (n, tokens, f) or (n, f, h, w) -> (n, f): the mean over positions where there are any."""
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 3 else features


def _need_torchvision() -> None:
    """torchvision is compiled against one torch; another one breaks it, timm and half of transformers on import."""
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        raise ValueError(
            f"torchvision does not work with the installed torch {torch.__version__} ({str(error).splitlines()[0]}); "
            f"install the pair that belongs together: pip install --upgrade torch torchvision"
        ) from error


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or found not in SAFETENSORS_DTYPES.values():
        raise ValueError(f"--dtype {dtype}: choose float32, bfloat16, float16 or float64.")
    return found


def _stored_dtypes(origin: Source) -> dict[str, torch.dtype]:
    """dtype of every float tensor on disk, from the headers of the safetensors files."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in origin.weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a readable safetensors file ({str(error).splitlines()[0]}): a broken download, or a "
                f"git-lfs pointer without its content."
            ) from error
        for name, kind in kinds.items():
            if kind.startswith("F8"):
                raise ValueError(f"{origin.name}: {name} is stored as {kind}; prune the unquantized model.")
            if kind in SAFETENSORS_DTYPES:
                found[name] = SAFETENSORS_DTYPES[kind]
    if not found:
        raise ValueError(f"{origin.name}: {origin.weights[0].name} holds no float weights.")
    return found


def _main_dtype(module: nn.Module, stored: dict[str, torch.dtype]) -> torch.dtype:
    """The commonest dtype on disk: what config.json states, and what a tensor without a counterpart there gets."""
    kinds = list(stored.values())
    return max(dict.fromkeys(kinds), key=kinds.count)


def _refuse_not_finite(loaded: Loaded) -> None:
    for name, tensor in loaded.module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{loaded.source}: {name} holds {count} values that are NaN or infinite; the checkpoint is damaged."
            )


def _for_disk(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to("cpu")
    if not tensor.is_floating_point():
        return tensor.contiguous()
    stored = tensor.to(dtype).contiguous() + 0.0  # -0.0 + 0.0 is +0.0; sparse kernels stumble over -0.0
    if not torch.isfinite(stored).all():
        raise ValueError(f"{name} is not finite once stored as {dtype}; choose a wider --dtype.")
    return stored


@contextlib.contextmanager
def _one_sentence(name: str, otherwise: str = "it could not be loaded") -> Iterator[None]:
    """Turn whatever a library raises about a user's checkpoint into one ValueError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, AttributeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ValueError(
                f"{name} runs Python code of its own repository; read it, then pass --trust-remote-code."
            ) from error
        short = text if len(text) <= 400 else text[:400] + "..."
        raise ValueError(f"{name}: {otherwise}: {short}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No load reports and weight bars of transformers: what they would warn of is an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
