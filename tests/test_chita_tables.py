"""The tables of docs/chita.md say what the result files say."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def script():
    spec = importlib.util.spec_from_file_location("chita_tables", ROOT / "benchmarks" / "chita_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["chita_tables"] = module
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_the_script_writes():
    tables = script()
    assert tables.docs() == tables.DOCS.read_text(encoding="utf-8"), "run `python benchmarks/chita_tables.py docs`"


def test_a_cell_is_the_mean_over_seeds_and_published_rows_stand_above():
    tables = script()
    run = {"method": "CHITA", "column": 0.9, "cpu_seconds": 2.0, "gradient_seconds": 1.0, "solve_seconds": 0.5,
           "peak_host_bytes": 2**30}  # fmt: skip
    runs = [{**run, "seed": 0, "top1": 92.0}, {**run, "seed": 1, "top1": 93.0}]
    lines = tables.table({"network": "mlpnet", "runs": runs}).split("\n")
    assert lines[0].startswith("| method | seeds | .5 | .6 |")
    assert "*92.46*" in next(line for line in lines if line.startswith("| *CHITA, published"))
    cells = " | ".join(["", "", "", "", "92.50 ± 0.71", "", ""])
    assert lines[-1] == f"| CHITA | 2 | {cells} | 2.0 | 1.0 | 0.5 | 1024 |"
