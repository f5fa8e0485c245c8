"""Tests stand by themselves: what several share is in files without `test_` in their name."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def test_no_test_imports_another():
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path.name}: {name}" for name in modules if name.startswith("test_")]
    assert found == []
