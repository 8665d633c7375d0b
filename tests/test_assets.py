"""Recipes, the card template and the demo model are found from the source tree and from a wheel."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_prune import assets


def test_source_tree(repo_root: Path) -> None:
    assert assets.names("recipes") == sorted(p.stem for p in (repo_root / "recipes").glob("*.yaml"))
    assert "snows" in assets.names("recipes")
    assert assets.path("recipes", "snows") == repo_root / "recipes" / "snows.yaml"
    assert assets.path("recipes", "snows.yaml") == assets.path("recipes", "snows")
    assert assets.path("model_cards", "template").is_file()
    assert (assets.path("data", "demo") / "model.safetensors").is_file()


def test_unknown_names_are_answered() -> None:
    with pytest.raises(ValueError, match=r"'snow' does not ship with hf_prune; known: .*Did you mean 'snows'\?"):
        assets.path("recipes", "snow")
    with pytest.raises(ValueError, match="no kind 'recipe'"):
        assets.names("recipe")


def test_installed_layout(tmp_path: Path, repo_root: Path) -> None:
    """The layout of a wheel: recipes inside the package; a stranger's recipes/ beside it must be left alone."""
    package = tmp_path / "hf_prune"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(repo_root / "hf_prune" / "assets.py", package)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "soup.yaml").touch()

    code = "from hf_prune import assets; print(assets.names('recipes'))"
    run = lambda: subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)  # noqa: E731
    missing = run()
    assert "without its recipes/ folder" in missing.stderr and "pip install" in missing.stderr

    shutil.copytree(repo_root / "recipes", package / "recipes")
    found = run()
    assert found.stdout.strip() == str(assets.names("recipes")), found.stderr


def test_wheel_ships_everything(tmp_path: Path, repo_root: Path) -> None:
    """hatchling's own file list for the wheel, without building in an isolated environment (which needs a network)."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed here")
    builder = wheel.WheelBuilder(str(repo_root))
    shipped = {f.distribution_path for f in builder.recurse_included_files()}
    for name in assets.names("recipes"):
        assert f"hf_prune/recipes/{name}.yaml" in shipped
    assert "hf_prune/model_cards/template.md" in shipped
    for file in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "train.py"):
        assert f"hf_prune/data/demo/{file}" in shipped
