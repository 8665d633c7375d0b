"""The README keeps its word: its tree names the files there are, its recipes are those that ship."""

import re
from pathlib import Path

from hf_prune import assets


def test_tree_names_every_file(repo_root: Path) -> None:
    tree = (repo_root / "README.md").read_text().partition("## The tree")[2].split("```")[1]
    package = tree.partition("\nhf_prune/\n")[2]
    named = set(re.findall(r"^  (\w+\.py) {2,}\S", package, re.MULTILINE))
    assert named == {file.name for file in (repo_root / "hf_prune").glob("*.py")}
    for folder in re.findall(r"^([a-z_]+)/", tree, re.MULTILINE):
        assert (repo_root / folder).is_dir(), f"README names {folder}/"


def test_recipes_are_listed(repo_root: Path) -> None:
    section = (repo_root / "README.md").read_text().partition("### Recipes")[2].partition("\n#")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE)) == assets.names("recipes")


def test_links_lead_somewhere(repo_root: Path) -> None:
    for document in (repo_root / "README.md", repo_root / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
