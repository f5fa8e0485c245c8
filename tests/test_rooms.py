"""The rooms of the Python package: imports point one way, without circles, and no room takes another's private names.

A room is a folder of sparse24/, or one of the files at its top. `ROOMS` lists them from the ground up; each may import
from those before it and from itself, at the top of a file or inside a function alike. docs/design.md has the drawing.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "sparse24"

ROOMS = (
    ("_version", "errors"),
    ("_library", "files", "formats", "options"),
    ("reference",),
    ("ops",),
    ("functional",),
    ("layers",),
    ("convert",),
    ("recipe",),
    ("save",),
    ("benchmark", "integrations", "pretrain"),
    ("testing",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
#: the package's face: it gathers what users import, and stands above all rooms
FACE = ("__init__", "__main__")
FILES = sorted(PACKAGE.rglob("*.py"))


class Import(NamedTuple):
    """`from sparse24.target import name`, told apart from torch's and the standard library's imports."""

    target: str  # dotted, below sparse24
    name: str
    line: int


def dotted(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(file: Path) -> list[Import]:
    ours = file.is_relative_to(PACKAGE)
    package = file.relative_to(PACKAGE).parent.parts if ours else ()
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "sparse24"]
            found += [Import(name.partition(".")[2], "", node.lineno) for name in names]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level and ours:
                base = [*package[: len(package) - node.level + 1], *module]
            elif not node.level and module[:1] == ["sparse24"]:
                base = module[1:]
            else:
                continue
            found += [_resolve(base, alias.name, node.lineno) for alias in node.names]
    return found


def _resolve(base: list[str], name: str, line: int) -> Import:
    """`from base import name`, where `name` may be a module of `base`."""
    inside = PACKAGE.joinpath(*base, name)
    if inside.is_dir() or inside.with_suffix(".py").is_file():
        return Import(".".join([*base, name]), "", line)
    return Import(".".join(base), name, line)


def of_the_rooms(file: Path) -> bool:
    return dotted(file) not in FACE


@pytest.mark.parametrize("file", [*filter(of_the_rooms, FILES)], ids=dotted)
def test_imports_point_down(file):
    here = room_of(dotted(file))
    for target, name, line in imports_of(file):
        room = room_of(target) if target else name
        if room == here or not room:
            continue
        assert FLOOR.get(room, len(ROOMS)) < FLOOR[here], f"{file}:{line}: {here} must not import {room}"


@pytest.mark.parametrize("file", FILES, ids=dotted)
def test_no_room_takes_private_names_of_another(file):
    for target, name, line in imports_of(file):
        if room_of(target) == room_of(dotted(file)) or room_of(target) in ("_version", "_library"):
            continue
        private = [part for part in (*target.split("."), name) if part.startswith("_") and not part.startswith("__")]
        assert not private, f"{file}:{line}: {'.'.join(private)} is private to {room_of(target)}"


def test_no_circles_of_files():
    graph = {dotted(file): {t for t, *_ in imports_of(file) if t} for file in filter(of_the_rooms, FILES)}
    circle = _circle(graph)
    assert not circle, " -> ".join(circle)


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or []; a folder's own __init__ is no step of a circle, for it only gathers."""
    done, path = set(), []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph or PACKAGE.joinpath(*module.split(".")).is_dir():
            return []
        path.append(module)
        found = next((c for target in sorted(graph[module]) if (c := visit(target))), [])
        path.pop()
        done.add(module)
        return found

    return next((c for module in graph if (c := visit(module))), [])


@pytest.mark.parametrize("folder", ["sparse24", "tests", "bench", "examples"])
def test_imports_name_files_that_are_there(folder):
    """Two changes that fit by themselves, one that moves a file and one that imports it, may not fit together."""
    for file in (PACKAGE.parent / folder).rglob("*.py"):
        for target, name, line in imports_of(file):
            path = PACKAGE.joinpath(*target.split("."))
            known = path.with_suffix(".py").is_file() or target in ("_C", "modules", "structure")
            if path.is_dir():
                room = importlib.import_module(f"sparse24.{target}".rstrip("."))
                known = name in ("", "*") or hasattr(room, name)
            assert known, f"{file}:{line}: there is no sparse24.{target} {name}"


@pytest.mark.parametrize("room", [file for file in FILES if file.name == "__init__.py"], ids=dotted)
def test_no_room_shows_a_name_that_hides_a_file_of_it(room):
    files = {path.stem for path in room.parent.iterdir()}
    assert not {name for _, name, _ in imports_of(room)} & files


def test_the_top_is_small_and_every_room_has_a_floor():
    top = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py"}
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert len(top) <= 8, sorted(top)
    assert (top | folders) - set(FACE) == set(FLOOR)


def test_import_paths_of_before_the_folders_lead_to_the_same_modules():
    for old, new in (("modules", "layers.modules"), ("structure", "convert.structure")):
        assert importlib.import_module(f"sparse24.{old}") is importlib.import_module(f"sparse24.{new}")
