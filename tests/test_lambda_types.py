"""A lambda asks for the type of its own parameters alone, never for those of a lambda around it.

GCC 12 takes `decltype(in)` for `float&` where `in` is a parameter of the lambda around, captured by reference. For
nvcc it is `float`, so the host launches kernels that were never compiled. The outer lambda names the type, `using In =
decltype(in);`. `cmake/check_library.sh` looks for such kernels in a built library.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
TOKEN = re.compile(
    r"\[[^\[\]\n]*\]\s*\((?P<parameters>[^()]*)\)\s*(?:mutable\s*)?(?:->[^{;]+)?\{"
    r"|(?P<open>\{)|(?P<close>\})|decltype\((?P<name>\w+)\)"
)


def types_of_outer_parameters(text: str) -> list[tuple[int, str]]:
    """(line, name) of each decltype of a parameter of a lambda around the one that asks."""
    text = COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    depth, lambdas, found = 0, [], []
    for token in TOKEN.finditer(text):
        if token["parameters"] is not None:
            depth += 1
            lambdas.append((depth, set(re.findall(r"\bauto\s*&*\s*(\w+)", token["parameters"]))))
        elif token["open"]:
            depth += 1
        elif token["close"]:
            if lambdas and lambdas[-1][0] == depth:
                lambdas.pop()
            depth -= 1
        elif token["name"] in set().union(*(names for _, names in lambdas[:-1])) - (
            lambdas[-1][1] if lambdas else set()
        ):
            found.append((text[: token.start()].count("\n") + 1, token["name"]))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lambdas_ask_for_the_types_of_their_own_parameters(path):
    found = types_of_outer_parameters(path.read_text())
    assert not found, "\n".join(f"{path}:{line}: name the type of {name} in its own lambda" for line, name in found)


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        ("run<decltype(in), decltype(out)>();", ["in"]),
        ("run<In, decltype(out)>();", []),
        ("loop([&](int i) { run<decltype(out)>(); });", ["out"]),
        ("loop([&](auto in) { run<decltype(in)>(); });", []),
        ("if constexpr (true) { run<decltype(in)>(); }", ["in"]),
    ],
)
def test_the_test_sees_what_it_forbids(inner, found):
    text = "void f() { with([&](auto in) { using In = decltype(in); with2([&](auto out) { " + inner + " }); }); }"
    assert [name for _, name in types_of_outer_parameters(text)] == found
