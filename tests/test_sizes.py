"""Files and functions of the package stay readable: at most 400 and 60 lines; calls pass at most 8 arguments by place.

Lines of a function are counted without its docstring. What travels together is a NamedTuple or a dataclass; `*group`
counts as one argument, as it is read as one thing.
Calls into the compiled binding, which takes plain numbers alone, may have 12.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sparse24"
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_LINES, FUNCTION_LINES, ARGUMENTS, BINDING_ARGUMENTS = 400, 60, 8, 12
BINDING = ("library", "_binding")  # names under which ops call it


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def is_binding(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute):
        return False
    value = function.value
    return (isinstance(value, ast.Name) and value.id in BINDING) or ast.unparse(value).endswith("_library.binding()")


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines, first = function.end_lineno - function.lineno + 1, function.body[0]
    return lines - (first.end_lineno - first.lineno + 1) if ast.get_docstring(function) is not None else lines


def too_big(source: str) -> list[str]:
    """What is too big in a file, in words."""
    found = []
    if (lines := source.count("\n")) > FILE_LINES:
        found.append(f"{lines} lines in a file")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if (lines := lines_of(node)) > FUNCTION_LINES:
                found.append(f"{lines} lines in {node.name}")
        if isinstance(node, ast.Call):
            most = BINDING_ARGUMENTS if is_binding(node.func) else ARGUMENTS
            if len(node.args) > most:
                found.append(f"{len(node.args)} positional arguments to {ast.unparse(node.func)} in line {node.lineno}")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_too_big(path):
    assert not too_big(path.read_text(encoding="utf-8"))


def test_what_is_too_big_is_found():
    arguments = ", ".join("abcdefghi")
    assert too_big(f"f({arguments})\n") == ["9 positional arguments to f in line 1"]
    assert not too_big(f"library.f({arguments})\n") and too_big(f"library.f({arguments}, 1, 2, 3, 4)\n")
    assert too_big("def f():\n" + "    pass\n" * 60) == ["61 lines in f"]
    assert too_big("pass\n" * 401) == ["401 lines in a file"]


def test_half_of_the_files_are_at_most_150_lines_and_most_functions_20():
    sources = [path.read_text(encoding="utf-8") for path in FILES]
    files = sorted(source.count("\n") for source in sources)
    functions = sorted(
        lines_of(node)
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert files[len(files) // 2] <= 150
    assert functions[int(0.9 * len(functions))] <= 20
