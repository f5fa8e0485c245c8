"""docs/faults.md and the tests agree: each row is held by tests that name it, and the table says by which."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
ROWS = 115

ROW = re.compile(r"^\|\s*(\d+)\s*\|(.*)\|\s*$", re.MULTILINE)
FILE = re.compile(r"`([\w/]+\.(?:py|cpp|cu))`")
WORDS = re.compile(r"\bfaults? ((?:\d+(?:, | and )?)+)")


def table() -> dict[int, list[str]]:
    """Row number -> input, what happens, tests."""
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [(int(number), [cell.strip() for cell in cells.split(" | ")]) for number, cells in ROW.findall(page)]
    numbers = [number for number, _ in rows]
    assert numbers == sorted(set(numbers)) and numbers[-1] <= ROWS, "each row once, in order"
    return dict(rows)


def rows_of_python(path: Path) -> set[int]:
    """Rows in `pytest.mark.fault(...)`, and in docstrings that say 'fault n'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.fault"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
            found |= rows_in_words(text)
    return found


def rows_in_words(text: str) -> set[int]:
    return {int(n) for numbers in WORDS.findall(text) for n in re.findall(r"\d+", numbers)}


@functools.cache
def named() -> dict[int, set[str]]:
    """Row -> files, relative to tests/, with a test that names it."""
    rows = defaultdict(set)
    for path in sorted(TESTS.rglob("*")):
        if path.suffix == ".py" and path != Path(__file__).resolve():
            numbers = rows_of_python(path)
        elif path.suffix in (".cpp", ".cu"):
            numbers = {n for line in re.findall(r"//.*", path.read_text()) for n in rows_in_words(line)}
        else:
            continue
        for number in numbers:
            rows[number].add(path.relative_to(TESTS).as_posix())
    return rows


def test_every_row_has_three_cells_and_says_where_it_is_tested():
    for number, cells in table().items():
        assert len(cells) == 3 and all(cells), f"row {number}: {cells}"
        assert FILE.search(cells[2]), f"row {number}: {cells[2]}"
        assert len(cells[1]) <= 360, f"row {number}: a paragraph belongs on a page, with a link here"


def test_every_row_is_named_by_a_test():
    tested = named()
    assert [number for number in table() if not tested[number]] == []


def test_files_in_the_table_name_the_row():
    tested = named()
    for number, (*_, where) in table().items():
        wrong = [file for file in FILE.findall(where) if file not in tested[number]]
        assert not wrong, f"row {number}: {wrong} have no test that names it"


def test_no_test_names_an_unknown_row():
    unknown = {number: files for number, files in named().items() if number not in range(1, ROWS + 1)}
    assert not unknown


def test_rows_that_want_two_gpus_say_so():
    """`multigpu` tests are skipped on most machines."""
    multigpu = set()
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            marks = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
            if any(mark.endswith("mark.multigpu") for mark in marks):
                multigpu |= {int(n) for mark in marks if "mark.fault" in mark for n in re.findall(r"\d+", mark)}
    assert multigpu == {number for number, (*_, where) in table().items() if re.search(r"with two\b", where)}
