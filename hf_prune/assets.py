"""Files that ship with the package: recipes, the card template, the demo model.

`recipes/` and `model_cards/` live at the top of the repository, where people look for them, and inside the package in
a wheel (pyproject.toml, force-include). Both layouts are found here and nowhere else.
"""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# "data" holds folders, e.g. data/demo
_SUFFIX = {"recipes": ".yaml", "recipes/train": ".yaml", "model_cards": ".md", "data": ""}


def _folder(kind: str) -> Path:
    if kind not in _SUFFIX:
        raise ValueError(f"assets: there is no kind {kind!r}; known: {', '.join(_SUFFIX)}.")
    tree = _PACKAGE.parent
    # A wheel's parent is site-packages, where a folder called "recipes" would be somebody else's.
    candidates = [_PACKAGE / kind] + ([tree / kind] if (tree / "pyproject.toml").is_file() else [])
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"hf_prune is installed without its {kind}/ folder (looked in {', '.join(map(str, candidates))}). "
        f"Install it again: pip install --force-reinstall hf-prune"
    )


def names(kind: str) -> list[str]:
    """Names of the shipped files of one kind, sorted, without their suffix, e.g. `names("recipes")`."""
    folder, suffix = _folder(kind), _SUFFIX[kind]
    if not suffix:
        return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))
    return sorted(p.stem for p in folder.glob(f"*{suffix}"))


def path(kind: str, name: str) -> Path:
    """Where one shipped file (or, for "data", folder) lies; `name` with or without its suffix.

    Raises ValueError for a name that does not ship, with the nearest one that does.
    """
    folder, suffix = _folder(kind), _SUFFIX[kind]
    stem = name.removesuffix(suffix)
    known = names(kind)
    if stem not in known:
        near = difflib.get_close_matches(stem, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{kind}: {name!r} does not ship with hf_prune; known: {', '.join(known)}.{hint}")
    return folder / f"{stem}{suffix}"
