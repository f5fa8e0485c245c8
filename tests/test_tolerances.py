"""No tolerance is picked by hand: one that is written down has its derivation beside it, in a comment.

Exact comparisons need none, torch's own defaults belong to a dtype, and what is held to PyTorch's error has
`assert_as_accurate`. rounding.py has those that many tests share.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TOLERANCES = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol"}
COMPARISONS = {"approx", "assert_close", "allclose", "isclose", "dict"}


def picked(source: str) -> list[int]:
    """Lines of tolerances that are numbers, where neither their statement nor the line above it has a comment."""
    lines, found = source.splitlines(), []
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.stmt) or hasattr(statement, "body"):
            continue
        unequal = [node.operand for node in ast.walk(statement) if isinstance(node, ast.UnaryOp)]  # not close: far
        for call in ast.walk(statement):
            if not isinstance(call, ast.Call) or call in unequal or _name(call.func) not in COMPARISONS:
                continue
            numbers = [
                keyword.value for keyword in call.keywords if keyword.arg in TOLERANCES and _is_number(keyword.value)
            ]
            around = lines[max(0, statement.lineno - 2) : statement.end_lineno]
            if numbers and not any("#" in line for line in around):
                found.append(numbers[0].lineno)
    return found


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _is_number(value: ast.expr) -> bool:
    """A number other than 0, or a sum and product of numbers: what is computed from eps or a count is derived."""
    if isinstance(value, ast.IfExp):
        return _is_number(value.body) or _is_number(value.orelse)
    return isinstance(value, ast.Constant) and isinstance(value.value, (int, float)) and value.value != 0


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_tolerance_says_where_it_comes_from(path):
    assert picked(path.read_text()) == [], f"{path.name}: derive these tolerances in a comment, or compare exactly"


def test_picked_tolerances_are_found():
    assert picked("assert a == approx(b, rel=0.1)") == [1]
    assert picked("close = dict(rtol=1e-5)\nassert_close(a, b, rtol=0, atol=1e-5 if low else 1e-6)") == [1, 2]
    assert picked("# half a step\nassert a == approx(b, abs=0.5)\nassert_close(a, b, rtol=0, atol=0)") == []
    assert picked("assert a == approx(b, rel=2 * eps)") == [] and picked("assert_close(a, b, **AFTER_STEPS)") == []
