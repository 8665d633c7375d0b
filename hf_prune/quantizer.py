"""`import hf_prune.quantizer`: from now on transformers' from_pretrained reads compressed folders (compress.py).

A folder without dense weights says `quant_method: hf_prune` in its config.json. Without this import transformers skips
that line with a warning, looks for model.safetensors, and stops because there is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import compress, packing
from .compress import FIELDS, FORMAT, KEY, VALUES

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
except ImportError as missing:
    raise ImportError(
        f"hf_prune.quantizer needs transformers 5, found {transformers.__version__}; hf_prune.load(folder) reads the "
        f"same files with any version."
    ) from missing


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed folder."""

    def __init__(self, pattern: str = "2:4", format: int = FORMAT, **unknown: Any) -> None:
        if unknown.pop("quant_method", KEY) != KEY or unknown or format != FORMAT:
            raise ValueError(f"this quantization_config is of a newer hf_prune (format {format!r}): install that one.")
        self.quant_method = KEY
        self.pattern, self.format = pattern, format
        self.dequantize = True  # the module holds ordinary dense weights, and is saved as such

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": KEY, "pattern": self.pattern, "format": self.format}


class PackedQuantizer(HfQuantizer):
    """Unpacks while loading; what comes out is an ordinary dense model, without any trace of this class."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("hf_prune reads compressed weights here; to prune a model, use the command hf-prune.")

    def update_attn_implementation(self, config: Any) -> Any:
        """The one hook that sees the config before transformers looks for weights: name the file to read."""
        n, m = (int(part) for part in self.quantization_config.pattern.split(":"))
        packing.check(n, m)
        config.transformers_weights = compress.file_name(n, m)
        self.config = config
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Unpack everything once and compare it with its hashes, before any of it reaches the model."""
        files = kwargs.get("checkpoint_files") or []
        if len(files) != 1 or compress.sources.COMPRESSED.fullmatch(Path(files[0]).name) is None:
            raise ValueError(f"config.json states compressed weights of hf_prune, but transformers found {files}.")
        with torch.device("cpu"):  # transformers builds the empty model under the meta device
            for _ in compress.read(files[0]):
                pass
        return model

    def get_weight_conversions(self) -> list[Any]:
        n, m = (int(part) for part in self.quantization_config.pattern.split(":"))
        return [WeightConverter([f"{VALUES}$", f"{FIELDS}$"], "", [Unpack(self, n, m)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for config in (model.config, self.config):
            if hasattr(config, "transformers_weights"):
                del config.transformers_weights
        # what is left is how save_pretrained goes back to the names on disk; it must not try to pack
        used = getattr(model, "_weight_conversions", None)  # transformers 5.24 drops them of dense models
        if used is not None:
            model._weight_conversions = [c for c in used if not any(isinstance(o, Unpack) for o in _operations(c))]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Unpack(ConversionOps):
    """(NAME_nm_values, NAME_nm_fields) -> NAME, in the dtype of the module's parameter."""

    def __init__(self, hf_quantizer: PackedQuantizer, n: int, m: int) -> None:
        self.hf_quantizer = hf_quantizer  # transformers leaves the dtype of what such an operation reads alone
        self.n, self.m = n, m

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any) -> Any:
        parts = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        (values,) = (tensor for key, tensor in parts.items() if VALUES in key)
        (fields,) = (tensor for key, tensor in parts.items() if FIELDS in key)
        dense = packing.unpack(values.cpu(), fields.cpu(), self.n, self.m)
        wanted = model.get_parameter_or_buffer(full_layer_name)
        if dense.shape != wanted.shape:
            raise ValueError(
                f"{full_layer_name}: unpacked to {tuple(dense.shape)}, the model has {tuple(wanted.shape)}."
            )
        return {full_layer_name: dense.to(device=values.device, dtype=wanted.dtype)}


def _operations(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", None) or []


def register() -> None:
    """Make the format known to transformers; a second call does nothing."""
    if KEY not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(KEY)(PackedConfig)
    if KEY not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(KEY)(PackedQuantizer)


register()
