"""A kernel's file says what it reads and writes, and how long that takes at the memory's bound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
KERNELS = sorted(path for path in CSRC.rglob("*.cu*") if "__global__" in path.read_text())


def opening(text: str) -> str:
    """The comment that a file begins with, as one line."""
    lines = text.split("#", 1)[0].splitlines()
    return " ".join(line.removeprefix("//").strip() for line in lines if line.startswith("//"))


def tells_traffic(text: str) -> bool:
    """Bytes and a time, or the file that has them."""
    traffic = re.search(r"Traffic +(.*)", opening(text))
    own = r"\d [KMG]?B\b.*\d us"
    return traffic is not None and re.search(rf"{own}|times.* are those of \S+\.cuh?", traffic[1]) is not None


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_a_kernel_tells_its_traffic_and_the_time_at_the_bound(path):
    assert tells_traffic(path.read_text())


def test_what_is_not_told_is_found():
    assert not tells_traffic("// a.cu: a kernel.\n//\n// Traffic  2 B an element.\n#include <x>\n// 3 us\n")
    assert tells_traffic("// a.cu: a kernel.\n//\n// Traffic  2 B an element: 1 MB,\n//          3 us.\n#include <x>\n")


def broken_lines(text: str) -> list[str]:
    """Lines of comments that a reflow has left alone: a word or two at the margin, behind a full line that hangs."""
    lines = text.splitlines()
    hanging = re.compile(r"^ *//+ (?: {2,}|\S+(?: \S+)? {2,})\S.{30,}$")
    return [
        line
        for before, line in zip(lines, lines[1:], strict=False)
        if len(before) >= 84 and hanging.match(before) and re.match(r"^ *//+ {1,3}\S+(?: \S+){0,2}$", line)
    ]


@pytest.mark.parametrize("folder", ["csrc", "tests/cpp"])
def test_comments_are_not_broken_by_a_reflow(folder):
    files = [path for path in (CSRC.parent / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    found = [f"{path.name}: {line}" for path in files for line in broken_lines(path.read_text())]
    assert found == []


def test_a_broken_line_is_found():
    full = "//   name      what it means and a good deal more than that, up to the last column of it"
    assert broken_lines(f"{full}\n// so\n//             far\n") == ["// so"]
    assert broken_lines(f"{full}\n//             so far\n") == []
