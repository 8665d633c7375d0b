"""`model.sparse24.safetensors`: a pruned model at about 0.56 of its size, read back to the same bits or not at all.

A safetensors file whose n:m tensors are packed (packing.py): NAME becomes NAME_nm_values and NAME_nm_fields; everything
else is stored as it was. Its metadata key `hf_prune` is JSON: `{"format": 1, "pattern": "2:4", "tensors": {NAME:
{"packed", "dtype", "shape", "sha256"}}}`, one entry per tensor of the dense checkpoint; sha256 is of the dense tensor's
bytes as a safetensors file holds them. Nobody but hf_prune can read it, and its name keeps others from trying: without
`model.safetensors` beside it, from_pretrained and timm stop instead of starting from random weights.

    module = hf_prune.load("folder-or-hub-id")      # transformers and timm
    import hf_prune.quantizer                       # ... from_pretrained reads the folder from now on
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import source as sources

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FORMAT = 1
KEY = "hf_prune"  # of the file's metadata, and quant_method in config.json
VALUES, FIELDS = "_nm_values", "_nm_fields"


def file_name(n: int, m: int) -> str:
    """2:4 -> model.sparse24.safetensors, 4:16 -> model.sparse4of16.safetensors."""
    return f"model.sparse{n}{m}.safetensors" if m < 10 else f"model.sparse{n}of{m}.safetensors"


def find(folder: str | Path) -> Path | None:
    """The compressed file of a folder, None where there is none. Raises ValueError where there are several."""
    found = sorted(p for p in Path(folder).iterdir() if sources.COMPRESSED.fullmatch(p.name))
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} compressed files ({', '.join(p.name for p in found)}); keep one."
        )
    return found[0] if found else None


# --------------------------------------------------------------------------------------------------- writing, reading
def write(weights: Iterable[Path], folder: str | Path, n: int, m: int) -> Path:
    """Write the compressed file for the dense safetensors files `weights` into `folder`; returns its path.

    Tensors that do not follow n:m are stored as they are. Raises ValueError for an n:m that cannot be packed.
    """
    from safetensors.torch import save_file

    from . import packing

    packing.check(n, m)
    stored: dict[str, Tensor] = {}
    tensors = {}
    for name, tensor in read_dense(weights):
        assert not name.endswith((VALUES, FIELDS)), f"{name} is a name of the packed format"
        packed = packing.pack(tensor, n, m)
        tensors[name] = {
            "packed": packed is not None,
            "dtype": _dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "sha256": digest(tensor),
        }
        if packed is None:
            stored[name] = tensor
        else:
            stored[name + VALUES], stored[name + FIELDS] = packed
    header = json.dumps({"format": FORMAT, "pattern": f"{n}:{m}", "tensors": tensors}, ensure_ascii=False)
    path = Path(folder) / file_name(n, m)
    save_file(stored, path, metadata={"format": "pt", KEY: header})
    return path


def read(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of a compressed file, one by one, each compared with its sha256 before it is handed out.

    Raises ValueError when the file is damaged, incomplete, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    from . import packing

    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, (file.metadata() or {}).get(KEY))
            n, m = header["n"], header["m"]
            held = set(file.keys())
            parts = {name: [name + VALUES, name + FIELDS] if entry["packed"] else [name]
                     for name, entry in header["tensors"].items()}  # fmt: skip
            if (stray := held ^ {part for names in parts.values() for part in names}) or len(held) != sum(
                map(len, parts.values())
            ):
                raise ValueError(f"{path} is damaged: its tensors are not those of its list ({sorted(stray)[:3]}).")
            for name, names in parts.items():
                given = [file.get_tensor(part) for part in names]
                try:
                    tensor = packing.unpack(given[0], given[1], n, m) if len(given) == 2 else given[0]
                except ValueError as error:
                    raise ValueError(f"{path} is damaged: {name}: {error}") from error
                entry = header["tensors"][name]
                if list(tensor.shape) != entry["shape"] or _dtype_name(tensor.dtype) != entry["dtype"]:
                    found = f"{_dtype_name(tensor.dtype)} {list(tensor.shape)}"
                    raise ValueError(f"{path} is damaged: {name} is {found}, not {entry['dtype']} {entry['shape']}.")
                if digest(tensor) != entry["sha256"]:
                    raise ValueError(f"{path} is damaged: the content of {name} does not match its sha256.")
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({str(error).splitlines()[0]}).") from error


def pattern(path: str | Path) -> tuple[int, int]:
    """(n, m) of a compressed file, from its header. Raises ValueError as `read`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = _header(Path(path), (file.metadata() or {}).get(KEY))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({str(error).splitlines()[0]}).") from error
    return header["n"], header["m"]


def read_dense(weights: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of some safetensors files, one by one. Raises ValueError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    for path in weights:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file ({str(error).splitlines()[0]}).") from error


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, as safetensors stores them: row by row, little end first."""
    import torch

    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _header(path: Path, text: str | None) -> dict[str, Any]:
    """The checked content of the metadata key, with n and m as numbers."""
    from . import packing

    if text is None:
        raise ValueError(f"{path} was not written by hf_prune: its metadata has no key {KEY!r}.")
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is no mapping")
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r} is not {FORMAT}; a newer hf_prune may read it")
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", str(header.get("pattern")), re.ASCII)
        if found is None:
            raise ValueError(f"the pattern {header.get('pattern')!r} is not N:M")
        header["n"], header["m"] = int(found[1]), int(found[2])
        packing.check(header["n"], header["m"])
        if not isinstance(header.get("tensors"), dict):
            raise ValueError("it lists no tensors")
        for name, entry in header["tensors"].items():
            if not isinstance(entry, dict) or {"packed", "dtype", "shape", "sha256"} - set(entry):
                raise ValueError(f"the entry of {name!r} is incomplete")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the list of tensors in its metadata is unusable: {error}.") from error
    return header


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------ a model
def load(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model of a folder or Hub id that hf-prune wrote, compressed or not, in eval mode.

    Every tensor is compared with the sha256 that was taken when it was written. Of two files the compressed one is
    read. dtype: of the module, by default as stored. Raises ValueError, in one sentence, for whatever is missing,
    damaged or left over: a module that is returned holds exactly the stored weights.
    """
    import torch

    folder = fetch(str(name), revision=revision, token=token, remote_code=trust_remote_code)
    config = sources._json(folder / "config.json")
    if kind := old_format(config):
        raise ValueError(
            f"{name} is stored as {kind} of compressed-tensors; write it dense first: hf-prune convert {name} FOLDER"
        )
    file = find(folder)
    if file is not None:
        state = dict(read(file))
    else:
        weights = sources.weight_files(str(name), folder)
        state = dict(read_dense(weights))
        _compare(str(name), state, folder)
    is_timm = sources.library(folder, config) == "timm"
    module = (_timm if is_timm else _transformers)(str(name), folder, state, trust_remote_code)
    if dtype is not None:
        if not dtype.is_floating_point:
            raise ValueError(f"dtype {dtype}: choose a float dtype.")
        module.to(dtype)
    return module.to(torch.device(device)).eval()


def fetch(name: str, *, revision: str | None = None, token: str | None = None, remote_code: bool = False) -> Path:
    """The folder of a pruned model; of a Hub repository the compressed weights where it has them, else the dense."""
    if Path(name).expanduser().is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision}: {name} is a local folder, which has no revisions; leave it out.")
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} holds no config.json: it is not a model folder.")
        return folder
    return sources.fetch(name, revision=revision, token=token, remote_code=remote_code, compressed=True)


def _compare(name: str, state: Mapping[str, Tensor], folder: Path) -> None:
    """Compare dense tensors with the sha256 list of hf_prune.json, where the folder has one."""
    from . import checkpoint

    if not (folder / checkpoint.REPORT).is_file():
        return
    listed = checkpoint.read(folder).get("sha256")
    if not listed:
        return
    if set(listed) != set(state):
        missing, stray = sorted(set(listed) - set(state)), sorted(set(state) - set(listed))
        raise ValueError(f"{name}: the weights are not those of {checkpoint.REPORT}: missing {missing[:3]}, unknown "
                         f"{stray[:3]}.")  # fmt: skip
    for key, tensor in state.items():
        if digest(tensor) != listed[key]:
            raise ValueError(f"{name}: the content of {key} does not match its sha256 in {checkpoint.REPORT}.")


def _transformers(name: str, folder: Path, state: dict[str, Tensor], trust_remote_code: bool) -> nn.Module:
    import transformers

    from . import models

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with models._one_sentence(name), models._quiet():
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are unpacked by now
        stated = (config.architectures or [""])[0]
        auto: Any = getattr(transformers, stated, None)
        if not (isinstance(auto, type) and issubclass(auto, transformers.PreTrainedModel)):  # the name is not ours
            has_head = "ForImageClassification" in stated
            auto = transformers.AutoModelForImageClassification if has_head else transformers.AutoModel
        if hasattr(auto, "_model_mapping"):
            auto = auto._model_mapping[type(config)] if type(config) in auto._model_mapping else auto
        found = auto.from_pretrained(None, config=config, state_dict=state, dtype="auto", output_loading_info=True)
    module, info = found
    missing = [key for key in info["missing_keys"] if not key.endswith(models.COMPUTED)]
    if missing or info["unexpected_keys"] or info.get("mismatched_keys"):
        raise ValueError(
            f"{name}: the weights do not fit {type(module).__name__}: missing {sorted(missing)[:3]}, unknown "
            f"{sorted(info['unexpected_keys'])[:3]}; another version of transformers wrote them."
        )
    return module


def _timm(name: str, folder: Path, state: dict[str, Tensor], trust_remote_code: bool) -> nn.Module:
    import timm

    from . import models

    with models._one_sentence(name):
        module = timm.create_model(f"local-dir:{folder}", pretrained=False)
        # assign: the module takes the dtypes of the file, tensor by tensor
        module.load_state_dict(state, strict=True, assign=True)
    return module


# ------------------------------------------------------------------------------------------------- folders, converting
def add(folder: str | Path, n: int, m: int, *, only: bool = False) -> Path:
    """Compress the dense weights of a model folder in place; `only`: and remove them, for a folder of half the size.

    The config of a folder without dense weights names the format, so that `import hf_prune.quantizer` is enough for
    from_pretrained; beside dense weights it must not, because they load everywhere.
    """
    folder = Path(folder)
    weights = sources.weight_files(str(folder), folder)
    path = write(weights, folder, n, m)
    if only:
        for file in [*weights, folder / sources.INDEX]:
            file.unlink(missing_ok=True)
        config = sources._json(folder / "config.json")
        config["quantization_config"] = {"quant_method": KEY, "pattern": f"{n}:{m}", "format": FORMAT}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return path


OLD = ("sparse-24-bitmask", "sparse-bitmask")  # of compressed-tensors up to 0.13, which no later version reads


def old_format(config: Mapping[str, Any]) -> str | None:
    """The sparse format of compressed-tensors that a config.json states, None for any other model.

    Raises ValueError where the weights are quantized as well.
    """
    stated = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(stated, Mapping) or stated.get("quant_method") not in (None, "compressed-tensors", "sparseml"):
        return None
    kind = (stated.get("sparsity_config") or {}).get("format")
    if kind in OLD and stated.get("config_groups"):
        raise ValueError("the weights are quantized as well as sparse; only unquantized ones can be converted.")
    return kind if kind in OLD else None


def read_old(weights: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors of a sparse-24-bitmask or sparse-bitmask checkpoint.

    Layout: X.weight is replaced by X.compressed (the values, row by row), X.bitmask (rows, ceil(cols / 8)) uint8 with
    the first column in the lowest bit, X.shape (2 numbers), and for sparse-bitmask X.row_offsets.
    Raises ValueError for parts that do not fit each other.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_dense(weights):
        stem, _, last = name.rpartition(".")
        if last in ("compressed", "bitmask", "shape", "row_offsets"):
            parts.setdefault(stem, {})[last] = tensor
        else:
            yield name, tensor
    for stem, held in parts.items():
        yield f"{stem}.weight", _from_bitmask(stem, held)


def _from_bitmask(stem: str, held: Mapping[str, Tensor]) -> Tensor:
    import torch

    if missing := {"compressed", "bitmask", "shape"} - set(held):
        raise ValueError(f"{stem}: the checkpoint lacks {', '.join(f'{stem}.{part}' for part in sorted(missing))}.")
    values, bitmask = held["compressed"].reshape(-1), held["bitmask"]
    shape = [int(size) for size in held["shape"].reshape(-1)]
    wanted = [shape[0], -(-shape[1] // 8)] if len(shape) == 2 and min(shape) > 0 else None
    if wanted is None or list(bitmask.shape) != wanted or bitmask.dtype != torch.uint8:
        raise ValueError(f"{stem}: a bitmask of {tuple(bitmask.shape)} does not belong to a weight of {shape}.")
    mask = (bitmask[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().reshape(shape[0], -1)
    if bool(mask[:, shape[1] :].any()) or int(mask.sum()) != values.numel():
        raise ValueError(f"{stem}: {int(mask.sum())} bits are set for {values.numel()} values; the file is damaged.")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[mask[:, : shape[1]]] = values
    return dense


def convert(source: str | Path, output: str | Path, *, revision: str | None = None, token: str | None = None) -> str:
    """Write a dense-stored folder, which loads everywhere, from a compressed one; returns what it was.

    source: a folder or Hub id that holds model.sparse24.safetensors, or an old checkpoint of compressed-tensors.
    Configuration, processor and card are copied, the statement that the weights are compressed is not.
    """
    from safetensors.torch import save_file

    from . import card, checkpoint

    name = str(source)
    folder = fetch(name, revision=revision, token=token)
    config = sources._json(folder / "config.json")
    file = find(folder)
    kind = "hf_prune" if file is not None else old_format(config)
    if kind is None:
        raise ValueError(f"{name} is not compressed: it holds no model.sparse24.safetensors, and its config.json names "
                         f"neither {' nor '.join(OLD)}.")  # fmt: skip
    target = Path(output)
    checkpoint.refuse_existing(target, source=folder)
    checkpoint.refuse_unwritable(target)
    state = dict(read(file) if file is not None else read_old(sources.weight_files(name, folder)))
    with checkpoint.new_folder(target) as partial:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, partial / sources.WEIGHTS,
                  metadata={"format": "pt"})  # fmt: skip
        for key in ("quantization_config", "compression_config"):
            config.pop(key, None)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        for each in ("preprocessor_config.json", "processor_config.json", checkpoint.RECIPE, checkpoint.CARD):
            if (folder / each).is_file():
                shutil.copyfile(folder / each, partial / each)
        if file is not None and (folder / checkpoint.REPORT).is_file():
            report = checkpoint.read(folder) | {"compressed": None}
            (partial / checkpoint.REPORT).write_text(checkpoint.to_json(report), encoding="utf-8")
            (partial / checkpoint.CARD).write_text(card.render(report, name=target.name), encoding="utf-8")
    return kind


def run(words: Sequence[str]) -> int:
    """`hf-prune convert SOURCE OUTPUT`."""
    parser = argparse.ArgumentParser(
        prog="hf-prune convert",
        description="Write a dense-stored folder, which loads everywhere, from a compressed model: "
        "model.sparse24.safetensors of hf-prune, or the sparse-24-bitmask and sparse-bitmask formats of "
        "compressed-tensors, which its later versions cannot read.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hub id")
    parser.add_argument("--token", metavar="TOKEN", help="Hub token; better: hf auth login")
    parser.add_argument("--verbose", action="store_true", help="tracebacks")
    args = parser.parse_args(words)
    kind = convert(args.source, args.output, revision=args.revision, token=args.token)
    print(f"{args.output}/  dense-stored, from {kind}")
    return 0
