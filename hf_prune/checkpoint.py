"""The output folder: written whole or not at all.

Everything goes into a hidden sibling first (`.NAME.partial-HOST-PID-XXXX`), is flushed to the disk, and is renamed at
the end, so a killed run never leaves a folder that looks finished. An older folder is swapped out by two renames
(`.NAME.replaced-...` in between) and put back if the second one fails or the process dies between them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import compress, schema
from . import source as sources

if TYPE_CHECKING:
    from .models import Loaded

REPORT = "hf_prune.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
SLACK = 16 * 2**20  # bytes for config, processor, card and report beside the weights


def refuse_existing(
    folder: str | Path, *, overwrite: bool = False, source: str | Path | None = None, mark: str = REPORT
) -> None:
    """Raise ValueError when the output must not go to `folder`; called before any work.

    overwrite replaces a folder that hf_prune wrote, or an empty one, and nothing else: `--output-dir ~` must not be
    able to delete a home. source: the model's own folder, which is never written to. mark: the file by which such a
    folder is known.
    """
    target = _real(folder)
    if source is not None and Path(source).is_dir() and target == _real(source):
        raise ValueError(f"--output-dir {folder} is the model's own folder; choose another one.")
    if source is not None and Path(source).is_dir() and target in _real(source).parents:
        raise ValueError(f"--output-dir {folder} holds the model that is to be pruned; choose another one.")
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"--output-dir {folder} is a file; choose another name.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--output-dir {folder} exists already: choose another one, or replace it with --overwrite.")
    if not (target / mark).is_file():
        raise ValueError(
            f"--overwrite: {folder} was not written by hf-prune (it holds no {mark}); "
            f"remove it yourself if it can go."
        )


def unfinished(folder: str | Path) -> Path:
    """Where a run that is to end in `folder` keeps its finished blocks (resume.py) until it has ended."""
    target = _real(folder)
    return target.parent / f".{target.name}.unfinished"


def refuse_unfinished(folder: str | Path, *, resume: bool, overwrite: bool) -> None:
    """Settle what a stopped run left: `resume` goes on with it, `overwrite` drops it, otherwise ValueError.

    Hours of work are never dropped because a flag was forgotten. Raises ValueError too for `resume` with no such run.
    """
    place = unfinished(folder)
    blocks = len(list(place.glob("*.safetensors"))) if place.is_dir() else 0
    if resume and not place.is_dir():
        raise ValueError(f"--resume: there is no stopped run to go on with ({place} does not exist); leave it out.")
    if blocks and not resume and not overwrite:
        raise ValueError(
            f"an earlier run for --output-dir {folder} was stopped after {blocks} blocks: go on with --resume, or drop "
            f"its work with --overwrite."
        )
    if place.is_dir() and not resume:
        shutil.rmtree(place)


def refuse_full_disk(folder: str | Path, needed: int) -> None:
    """Raise ValueError when the disk under `folder` has less than `needed` bytes (plus a little) free."""
    place = _real(folder).parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + SLACK:
        raise ValueError(
            f"--output-dir {folder}: the run needs {size(needed + SLACK)}, but only {size(free)} are free in {place}. "
            f"Make room or choose another disk."
        )


def refuse_unwritable(folder: str | Path) -> None:
    """Raise ValueError when nothing can be created beside `folder`; its missing parents are created."""
    parent = _real(folder).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        probe = parent / f".{_real(folder).name}.partial-{_mine()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ValueError(f"--output-dir {folder}: cannot create it ({error.strerror or error}).") from error


def write(
    folder: str | Path, loaded: Loaded, report: Mapping[str, Any], card: str, *, recipe: str, overwrite: bool = False
) -> Path:
    """Write model, processor, hf_prune.json, recipe.yaml and README.md; the folder appears complete, or not at all.

    `report["compressed"]` asks for the compressed weights too, or alone; `sha256` of every tensor is added to it here.
    loaded: holds the pruned module. report: as hf_prune/schema.py says. card, recipe: texts of README.md, recipe.yaml.
    Returns the folder. Raises ValueError as `refuse_existing`, and AssertionError for a report that breaks the schema.
    """
    wrong = schema.problems(report)
    assert not wrong, "the report breaks its own schema: " + " ".join(wrong)
    refuse_existing(folder, overwrite=overwrite)
    with new_folder(folder) as partial:
        loaded.save(partial)
        dense = sources.weight_files(str(folder), partial)
        report = {**report, "sha256": {name: compress.digest(tensor) for name, tensor in compress.read_dense(dense)}}
        if wanted := report.get("compressed"):
            n, m = (int(part) for part in report["pattern"].split(":"))
            compress.add(partial, n, m, only=wanted["only"])
        (partial / REPORT).write_text(to_json(report), encoding="utf-8")
        (partial / RECIPE).write_text(recipe, encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
    return Path(folder)


def update(folder: str | Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Replace hf_prune.json of a finished folder, and its card with it; returns what the user should know.

    old: what hf_prune.json holds. A card that is not the one `old` renders to was written in by somebody, and stays.
    Raises ValueError where the folder cannot be written to, and AssertionError for a report that breaks the schema.
    """
    from . import card

    wrong = schema.problems(new)
    assert not wrong, "the report breaks its own schema: " + " ".join(wrong)
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    title = re.search(r"^# (`+) ?(.+?) ?\1$", text or "", re.MULTILINE)
    name = title[2] if title else _real(folder).name
    files = {Path(folder) / REPORT: to_json(new)}
    notes = []
    # a report that was composed by another version renders to other words
    if text is None or text == card.render(old, name=name):
        files[path] = card.render(json.loads(to_json(new)), name=name)
    else:
        notes.append(f"{path} was changed by hand or by another version and is left as it is; to have it written anew, "
                     f"delete it and give the command again.")  # fmt: skip
    try:
        for target, content in files.items():
            put(target, content)
    except OSError as error:
        raise ValueError(f"{folder} could not be written to: {error.strerror or error}.") from error
    return notes


def put(target: Path, content: str) -> None:
    """Write a text file so that whoever reads it meanwhile sees the old one or the new one, whole."""
    partial = target.with_name(f".{target.name}.partial-{_mine()}")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, target)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A hidden folder to fill, which takes the place of `folder` when the block ends well and vanishes otherwise."""
    target = _real(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean(target)
    partial = target.parent / f".{target.name}.partial-{_mine()}"
    partial.mkdir()
    try:
        yield partial
        probe = partial / ".mode"
        probe.touch()
        ordinary = probe.stat().st_mode
        probe.unlink()
        for file in partial.rglob("*"):  # safetensors writes files that only their owner can read
            if file.is_file():
                file.chmod(ordinary)
        _flush(partial)
        _swap(partial, target)
    except BaseException:  # a KeyboardInterrupt too must not leave half a model behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(folder: str | Path) -> dict[str, Any]:
    """hf_prune.json of an output folder, checked.

    Raises ValueError when the folder was not written by hf_prune, the file is damaged, or a newer hf_prune wrote it.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise ValueError(f"{folder} holds no {REPORT}: it is not a folder that hf-prune wrote.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    wrong = schema.problems(report)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{path}: {wrong[0]}{more}")
    return report


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """The resolved recipe of an output folder, as `hf_prune.recipe.resolve` takes it."""
    return dict(read(folder)["recipe"])


def clean(folder: str | Path) -> list[Path]:
    """Remove what a killed run left beside `folder`, and put a replaced folder back if the new one never arrived.

    Leftovers of a process that still runs, or of another host, are not touched. Returns what was removed or restored.
    """
    target = _real(folder)
    done: list[Path] = []
    if not target.parent.is_dir():
        return done
    form = re.compile(re.escape(f".{target.name}.") + r"(partial|replaced)-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
    for place in sorted(target.parent.iterdir()):
        found = form.fullmatch(place.name)
        if not found or found["host"] != _host() or _alive(int(found["pid"])):
            continue
        if found[1] == "replaced" and not target.exists():
            os.rename(place, target)
        else:
            shutil.rmtree(place, ignore_errors=True)
        done.append(place)
    return done


def to_json(report: Mapping[str, Any]) -> str:
    """Strict JSON: a figure that is not finite is null, because NaN is no JSON and other readers refuse the file."""
    return json.dumps(_finite(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def weight_bytes(folder: str | Path) -> int:
    """Bytes of the weights in an output folder: of the dense files, or of the packed one where it is alone."""
    dense, packed = _files(folder)
    return sum(dense) if dense else sum(packed)


def packed_bytes(folder: str | Path) -> int | None:
    """Bytes of the packed file that stands beside the dense ones, if one does."""
    dense, packed = _files(folder)
    return sum(packed) if dense and packed else None


def _files(folder: str | Path) -> tuple[list[int], list[int]]:
    found: tuple[list[int], list[int]] = ([], [])
    for path in Path(folder).glob("*.safetensors"):
        found[sources.COMPRESSED.fullmatch(path.name) is not None].append(path.stat().st_size)
    return found


def size(count: float) -> str:
    """Bytes as people read them: 22.9 MB (decimal, as disks and the Hub count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def _swap(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`; what stood there before is kept until the new folder has arrived."""
    old: Path | None = None
    if target.exists():
        old = target.parent / f".{target.name}.replaced-{_mine()}"
        os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    _flush_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """fsync every file and folder below: after a power cut the name must not point to data that never arrived."""
    for place, _, files in os.walk(folder):
        for file in files:
            with open(Path(place) / file, "rb") as handle:
                os.fsync(handle.fileno())
        _flush_folder(Path(place))


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # folders cannot be opened elsewhere, and need not be
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse it for folders
            os.fsync(handle)
    finally:
        os.close(handle)


def _real(folder: str | Path) -> Path:
    return Path(os.path.realpath(Path(folder).expanduser()))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"


def _mine() -> str:
    return f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _alive(pid: int) -> bool:
    if os.name != "posix":  # signal 0 is not a question there; a leftover is then left for its owner to remove
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists and is somebody else's
        return True
    return True
