"""The shape of the package: the room of every file, and that imports point EDGE -> MODEL -> TENSORS, never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "hf_prune"

# A new file of hf_prune is entered here; methods/ is the one folder where a new file needs no entry.
TENSORS = {"pattern", "spectrum", "packing", "objective", "linalg", "fisher", "joined", "phases", "regroup", "backends"}
MODEL = {
    "sites",
    "gradients",
    "staged",
    "distill",
    "batchnorm",
    "walk",
    "junction",
    "recall",
    "streams",
    "microbatch",
    "offload",
    "memory",
    "collect",
    "ranks",
    "loop",
    "window",
    "resume",
    "importance",
    "allocation",
    "limit",
    "curvature",
    "linearised",
    "masks",
    "networks",
    "axes",
    "operators",
    "channels",
    "permute",
    "cost",
    "stopwatch",
    "similarity",
    "semi_structured",
}
EDGE = {
    "__init__",
    "__main__",
    "recipe",
    "plan",
    "models",
    "source",
    "calibration",
    "evaluation",
    "intervals",
    "labels",
    "metrics",
    "checkpoint",
    "compress",
    "quantizer",
    "verify",
    "inspect",
    "eval",
    "compare",
    "page",
    "pictures",
    "report",
    "card",
    "hub",
    "cli",
    "demo",
    "assets",
    "schema",
    "limit_command",
    "limit_page",
    "train",
    "training",
    "training_recipe",
    "training_data",
    "training_card",
    "forecast",
    "bench",
}
HUGGING_FACE = {"transformers", "timm", "datasets", "evaluate", "accelerate", "huggingface_hub"}
# Third parties. EDGE may use what pyproject.toml lists.
ALLOWED = {"TENSORS": {"torch"}, "MODEL": {"torch", "numpy", "safetensors"}}
RANK = {"TENSORS": 0, "MODEL": 1, "EDGE": 2}


def room(module: str) -> str:
    """The room of a module named relative to the package: "pattern", "methods.obs", "__init__"."""
    head = module.partition(".")[0]
    if head in TENSORS or head == "methods":
        return "TENSORS"
    if head in MODEL:
        return "MODEL"
    if head in EDGE:
        return "EDGE"
    raise AssertionError(
        f"hf_prune/{module.replace('.', '/')}.py belongs to no room. Enter it in tests/test_architecture.py: TENSORS "
        f"(torch only), MODEL (+ nn.Module) or EDGE (+ Hugging Face; then also in pyproject.toml, per-file-ignores)."
    )


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) or "__init__" if parts[-1] == "__init__" else ".".join(parts)


# data/ holds what ships beside the code: the demo model and the script that trained it. Nothing imports it.
SOURCES = {module_name(f): f for f in sorted(PACKAGE.rglob("*.py")) if "data" not in f.relative_to(PACKAGE).parts}


def imports(module: str, source: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions included."""
    package = ["hf_prune", *module.split(".")[:-1]]
    if module in ("__init__", "methods"):  # a package: its own relative imports start at itself
        package = ["hf_prune"] if module == "__init__" else ["hf_prune", module]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            # `from hf_prune import pattern` means the module, `from hf_prune import Report` the package's face
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def target(dotted: str) -> str | None:
    """The module of hf_prune that an absolute dotted name lies in; None for a third party."""
    first, *rest = dotted.split(".")
    if first != "hf_prune":
        return None
    for end in range(len(rest), 0, -1):
        if ".".join(rest[:end]) in SOURCES:
            return ".".join(rest[:end])
    return "__init__"


def faults(module: str, source: str) -> list[str]:
    """Every import of one file that breaks the rules, as readable lines."""
    here, found = room(module), []
    for line, dotted in imports(module, source):
        goal, third = target(dotted), dotted.partition(".")[0]
        where = f"hf_prune/{module.replace('.', '/')}.py:{line}"
        if goal is not None:
            if goal.partition(".")[0] == "data":
                found.append(f"{where} imports the data folder; read it through hf_prune/assets.py")
            elif RANK[room(goal)] > RANK[here]:
                found.append(f"{where} is in {here} and imports {dotted}, which is in {room(goal)}")
        elif here in ALLOWED and third not in sys.stdlib_module_names and third not in ALLOWED[here]:
            if (module, third) != ("ranks", "accelerate"):  # the one file of MODEL that may know about ranks
                found.append(f"{where} is in {here} and imports {third}; only {sorted(ALLOWED[here])} may be used")
    return found


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module: str) -> None:
    assert faults(module, SOURCES[module].read_text()) == []


def test_no_file_named_utils() -> None:
    names = {part for module in SOURCES for part in module.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}, "name a file after what it does"


def test_rooms_are_flat() -> None:
    folders = {f.parent.relative_to(PACKAGE).as_posix() for f in SOURCES.values()}
    assert folders <= {".", "methods"}, "one flat folder, and methods/ with one file per paper"


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("pattern", "from hf_prune import loop", "MODEL"),
        ("pattern", "from . import loop", "MODEL"),
        ("pattern", "from .loop import Report", "MODEL"),
        ("methods.obs", "from ..recipe import load", "EDGE"),
        ("methods.obs", "def f():\n    import hf_prune.recipe", "EDGE"),
        ("loop", "from hf_prune import cli", "EDGE"),
        ("loop", "import hf_prune", "EDGE"),
        ("loop", "def f():\n    from accelerate import PartialState", "accelerate"),
        ("objective", "import numpy as np", "numpy"),
    ],
)
def test_the_rule_catches(module: str, source: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("loop", "recipe", "cli", "pattern"):
        monkeypatch.setitem(SOURCES, name, PACKAGE / f"{name}.py")
    assert [line for line in faults(module, source) if fault in line], "this import should have been refused"


def test_ruff_lets_exactly_the_edge_import_hugging_face(repo_root: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11; the list itself is the same on 3.10
    lint = tomllib.loads((repo_root / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert set(lint["flake8-tidy-imports"]["banned-api"]) == HUGGING_FACE
    (edge,) = [key for key in lint["per-file-ignores"] if key.startswith("hf_prune/{")]
    assert set(edge.partition("{")[2].partition("}")[0].split(",")) == EDGE - {"__init__"}


def test_lower_rooms_load_without_hugging_face() -> None:
    modules = [f"hf_prune.{m}" for m in SOURCES if room(m) != "EDGE" and m != "methods"]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
    code += f"print(sorted(set(sys.modules) & {HUGGING_FACE}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"
