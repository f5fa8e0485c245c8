"""Small faults made in a module's syntax tree, one at a time: what a slip of the hand would look like.

A comparison or an arithmetic operator becomes its neighbour, `and` becomes `or`, a condition its opposite, a number
another, True False; a statement that only calls something goes. Messages, annotations, docstrings, pictures, the lines
that warnings point to and zip's strict stay as they are.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


class Mutant(NamedTuple):
    line: int
    last_line: int
    what: str
    source: Callable[[], str]  # made when it is asked for: of hundreds a few are tried


class _Places(ast.NodeVisitor):
    """Every node that may be changed: nothing below a raise, an annotation, a decorator or an f-string."""

    def __init__(self):
        self.nodes: list[ast.AST] = []

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)) or _is_left_out(node):
            return
        self.nodes.append(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)


def _is_left_out(node: ast.AST) -> bool:
    """A picture, the line that a warning points to, or zip's check of lengths that are equal."""
    return getattr(node, "name", None) == "plot" or getattr(node, "arg", None) in ("stacklevel", "strict")


def _opposite(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Each way in which a node may be wrong: in words, and as the node that takes its place."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        new.ops = [COMPARISONS[type(node.ops[0])]()]
        yield "comparison", new
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield "operator", new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and / or", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not", new.operand
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        new.test = _opposite(new.test)
        yield "condition", new
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
        yield "constant", new
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        new.value = node.value + 1 if isinstance(node.value, int) else node.value * 1.25 or 1.0
        yield "number", new
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call gone", ast.copy_location(ast.Pass(), node)


def mutants(source: str, within: tuple[str, ...] = ()) -> list[Mutant]:
    """All of a module, or of its functions named in `within`."""
    tree, lines = ast.parse(source), source.splitlines()
    places = _Places()
    for node in ast.walk(tree) if within else [tree]:
        if not within or getattr(node, "name", None) in within:
            places.visit(node)
    found = []
    for node in places.nodes:
        for what, new in changes(node):
            last = _changed_part(node).end_lineno
            words = f"{what}: {_text(node)} -> {_text(new)}"
            if isinstance(node, ast.Constant):
                words += f" in {lines[node.lineno - 1].strip()[:80]}"
            found.append(Mutant(node.lineno, last, words, partial(_replaced, tree, node, new)))
    return found


def _changed_part(node: ast.AST) -> ast.AST:
    return node.test if isinstance(node, (ast.If, ast.IfExp, ast.While)) else node


def _text(node: ast.AST) -> str:
    return ast.unparse(_changed_part(node)).splitlines()[0][:80]


def _replaced(tree: ast.AST, old: ast.AST, new: ast.AST) -> str:
    """The source in which `new` stands for `old`."""
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree, memo={id(old): new})))
