"""What older stacks make of our files. Slow, and needs to install them: `pytest -m environments`."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tables() -> Any:
    """benchmarks/hub_tables.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("hub_tables", ROOT / "benchmarks" / "hub_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.environments
def test_everything_loads_bit_exactly_or_not_at_all(tmp_path: Path) -> None:
    """HF_PRUNE_OLD_PYTHON: of an environment with transformers 4.57; made with pip where it is not given."""
    script = tables()
    pythons = {"new": sys.executable, "old": os.environ.get("HF_PRUNE_OLD_PYTHON") or script.old_python(tmp_path)}
    rows, wrong = script.loading(tmp_path, pythons)
    ours = [row for row in rows if "compressed-tensors" not in row[0]]
    assert len(ours) == 8 and not [each for each in wrong if "compressed-tensors" not in each]
    columns = [column for column, *_ in script.STACKS]
    for row in ours:
        cells = dict(zip(columns, row[1:], strict=True))
        if "only" not in row[0]:
            assert cells["transformers 5"] == cells["transformers 4.57"] == "bit-exact" or row[0].startswith("timm")
        assert cells["`hf_prune.load`"] == "bit-exact"
