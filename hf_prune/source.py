"""From what the user typed to a folder on disk: a local folder, a Hub id, or a timm name; and whose library reads it.

Everything is loaded from a folder afterwards, so a model from the Hub and the same files in a folder take one path.
A local folder never causes a network call. Only safetensors weights are fetched or read.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What compress.py writes beside or instead of the dense weights; no other library looks for such a name.
COMPRESSED = re.compile(r"model\.sparse(\d\d|\d+of\d+)\.safetensors", re.ASCII)
# What a model folder needs besides its weights; README.md is read for the licence.
SMALL_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", INDEX, "README.md")
OWN_FILES = ("hf_prune.json", "recipe.yaml")  # of a model that hf-prune wrote


@dataclass(frozen=True)
class Source:
    """A model's folder. `revision` is the commit on the Hub, None for a local folder."""

    name: str  # as the user typed it
    folder: Path
    library: str  # "transformers" | "timm"
    config: dict[str, Any]  # config.json as it stands on disk
    weights: tuple[Path, ...]  # the safetensors files
    local: bool
    revision: str | None = None
    license: str | None = None
    notes: list[str] = field(default_factory=list)


def resolve(name: str, *, revision: str | None = None, token: str | None = None, remote_code: bool = False) -> Source:
    """Find the folder behind `name`, fetching it from the Hub if it is no local folder.

    name: a folder, a Hub id ("google/vit-base-patch16-224", "timm/resnet50.a1_in1k") or a timm name ("timm:resnet50",
    "resnet50.a1_in1k"). remote_code: fetch the repository's Python files too.
    Raises ValueError in one sentence when it cannot be found, reached or read, or holds no safetensors weights.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"--revision {revision}: {name} is a local folder, which has no revisions; leave it out.")
        return _read(name, path, local=True)
    if path.is_file():
        raise ValueError(f"{name} is a file; give the folder that holds it together with its config.json.")
    if _looks_local(name):
        raise ValueError(f"{name}: this folder does not exist.")
    repo = _timm_repo(name)
    folder, commit, notes = _fetch(name, repo, revision, token, remote_code, compressed=False)
    return _read(name, folder, local=False, revision=commit, notes=notes)


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    remote_code: bool = False,
    compressed: bool = False,
    everything: bool = False,
) -> Path:
    """Download a model's files from the Hub; returns the folder that holds them.

    compressed: prefer compressed weights where the repository has them. everything: both kinds of weights.
    Raises ValueError as `resolve`.
    """
    if _looks_local(name):
        raise ValueError(f"{name}: this folder does not exist.")
    return _fetch(name, _timm_repo(name), revision, token, remote_code, compressed=compressed or everything,
                  both=everything)[0]  # fmt: skip


def weight_files(name: str, folder: Path) -> list[Path]:
    """The dense safetensors files of a folder. Raises ValueError where one is missing or lies elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        _need(name, {path.name for path in folder.iterdir()})
    listed = _json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{name}: {INDEX} lists no weights.")
    names = sorted({str(file) for file in listed.values()})
    for file in names:
        # the index came from outside: "../x" or "/x" would read, and later hash and copy, a file of the user's
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII):
            raise ValueError(f"{name}: {INDEX} names {file!r}, which is no safetensors file of this folder.")
        if not (folder / file).is_file():
            raise ValueError(f"{name}: {INDEX} names {file}, which is missing.")
    return [folder / file for file in names]


def library(folder: Path, config: dict[str, Any]) -> str:
    """Whose model a config.json describes: "transformers" or "timm". Raises ValueError where it does not say."""
    if "model_type" in config and config["model_type"] != "timm_wrapper":
        return "transformers"
    if "architecture" in config:
        return "timm"
    raise ValueError(f"{folder / 'config.json'} names neither a model_type (transformers) nor an architecture (timm).")


def _looks_local(name: str) -> bool:
    """A Hub id is `name` or `owner/name`; whatever else looks like a path is one."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith("/")


def _timm_repo(name: str) -> str:
    """The Hub repository of a timm name, or `name` itself if it is a Hub id already."""
    bare = name.removeprefix("timm:").removeprefix("hf-hub:")
    if "/" in bare:
        return bare
    if not name.startswith("timm:") and not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?", bare):
        return bare
    import timm

    architecture = bare.partition(".")[0]
    if not timm.is_model(architecture):
        if not name.startswith("timm:"):
            return bare  # an old Hub id without an owner
        raise ValueError(f"{name}: timm has no model named {architecture}{_nearest(architecture, timm.list_models())}.")
    if "." in bare and bare not in timm.list_pretrained():
        known = timm.list_pretrained(f"{architecture}.*")
        raise ValueError(f"{name}: timm has no weights of that name{_nearest(bare, known) or '; it has none at all'}.")
    found = timm.get_pretrained_cfg(bare, allow_unregistered=False)
    if found is None or not found.hf_hub_id:
        raise ValueError(f"{name}: timm publishes no pretrained weights for this architecture.")
    return str(found.hf_hub_id) if not str(found.hf_hub_id).endswith("/") else f"timm/{bare}"


def _nearest(word: str, words: list[str]) -> str:
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.5) or words[:3]
    return f"; the nearest are {', '.join(near)}" if near else ""


def _fetch(
    name: str,
    repo: str,
    revision: str | None,
    token: str | None,
    remote_code: bool,
    *,
    compressed: bool,
    both: bool = False,
) -> tuple[Path, str, list[str]]:
    """Download the files of a Hub repository; returns its folder in the cache, the commit, and notes."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{name} at revision {revision}" if revision else name
    try:
        info = HfApi(token=token).model_info(repo, revision=revision, timeout=15)
        files = {file.rfilename for file in info.siblings or []}
        packed = [file for file in files if COMPRESSED.fullmatch(file)] if compressed else []
        if not packed:
            _need(name, files)
        wanted = [file for file in (*SMALL_FILES, *OWN_FILES) if file in files]
        wanted += packed
        if both or not packed:
            wanted += [file for file in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", file)]
        wanted += [file for file in files if file.endswith(".py")] if remote_code else []
        # by the user's revision, not by info.sha: so the cache learns which commit the name stood for
        folder = Path(snapshot_download(repo, revision=revision, token=token, allow_patterns=wanted))
        return folder, folder.name, []
    except HFValidationError as error:
        raise ValueError(f"{name} is neither a local folder nor a possible Hub id (owner/name).") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} is gated: accept its terms on https://huggingface.co/{repo}, then log in (hf auth login) or pass "
            f"--token."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} was not found: there is no such local folder and no such model on the Hub (or it is private: pass "
            f"--token)."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name} exists on the Hub, but has no revision {revision}.") from error
    except HfHubHTTPError as error:
        raise ValueError(f"{where}: the Hub answered with an error: {_line(error)}") from error
    except (OSError, HTTPError) as error:  # offline, no route, time-out
        known = [*SMALL_FILES, *OWN_FILES, "model*.safetensors", *(["*.py"] if remote_code else [])]
        try:
            cached = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=known))
        except (LocalEntryNotFoundError, ValueError):
            raise ValueError(
                f"{where}: there is no such local folder, and the Hub could not be reached ({_line(error)})."
            ) from error
        commit = cached.name
        return cached, commit, [f"the Hub could not be reached: using the cached copy of {name} at commit {commit}."]


def _need(name: str, files: set[str]) -> None:
    """Raise ValueError unless these files can make a model."""
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise ValueError(f"{name} holds an adapter, not a model: merge it into its base model first.")
        raise ValueError(f"{name} holds no config.json: it is not a transformers or timm model.")
    if WEIGHTS in files or INDEX in files:
        return
    pickles = sorted(f for f in files if f.endswith((".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".npz")))
    if pickles:
        raise ValueError(
            f"{name} holds no {WEIGHTS}, only {pickles[0]}, a format that can run code when it is read; convert it to "
            f"safetensors first (save_pretrained in transformers, timm.models.save_for_hf in timm)."
        )
    others = sorted(f for f in files if f.endswith(".safetensors"))
    if any(COMPRESSED.fullmatch(f) for f in others):
        raise ValueError(
            f"{name} holds compressed weights only, which hf_prune.load reads; to prune or publish it anew, write it "
            f"dense first: hf-prune convert {name} FOLDER"
        )
    raise ValueError(f"{name} holds no {WEIGHTS}" + (f", only {', '.join(others[:3])}." if others else "."))


def _read(
    name: str, folder: Path, *, local: bool, revision: str | None = None, notes: list[str] | None = None
) -> Source:
    _need(name, {path.name for path in folder.iterdir()})
    config = _json(folder / "config.json")
    whose = library(folder, config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        if str((config["quantization_config"].get("sparsity_config") or {}).get("format")).endswith("-bitmask"):
            raise ValueError(
                f"{name} is stored in a format of compressed-tensors that its later versions cannot read; write it "
                f"dense first: hf-prune convert {name} FOLDER"
            )
        raise ValueError(f"{name} is quantized ({method}): prune the original model and quantize the result.")
    weights = weight_files(name, folder)
    if whose == "timm" and len(weights) > 1:
        raise ValueError(f"{name} is a timm model in {len(weights)} files; timm reads a single {WEIGHTS}.")
    return Source(
        name=name,
        folder=folder,
        library=whose,
        config=config,
        weights=tuple(weights),
        local=local,
        revision=revision,
        license=_license(folder, config),
        notes=notes or [],
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return found


def _license(folder: Path, config: dict[str, Any]) -> str | None:
    """The licence that the card states, else what timm's config states, else None."""
    import yaml

    card = folder / "README.md"
    if card.is_file():
        head = re.match(r"\ufeff?---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.S)
        try:
            data = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError:  # a card that nobody can read states no licence
            data = None
        stated = data.get("license") if isinstance(data, dict) else None
        stated = stated[0] if isinstance(stated, list) and stated else stated
        if isinstance(stated, str) and stated:
            return stated
    stated = (config.get("pretrained_cfg") or {}).get("license")
    return stated if isinstance(stated, str) and stated else None


def _line(error: BaseException) -> str:
    """The first line of an error, for one-sentence messages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
