"""The table of docs/trust.md: every test that it names exists."""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_the_tests_that_the_table_names_exist():
    rows = [line for line in (ROOT / "docs" / "trust.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    table = rows[next(i for i, row in enumerate(rows) if row.startswith("| fault")) + 2 :]
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row) for row in table]
    assert len(named) >= 10 and all(named), [row for row, found in zip(table, named, strict=True) if not found]
    for path, test in sum(named, []):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{test}"
