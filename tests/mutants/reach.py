"""Which tests run which lines of a module, and a plugin of pytest that runs chosen tests, quickest first."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest


class Reach(NamedTuple):
    """Of each test, the seconds that it took and the lines of the module that it ran."""

    seconds: dict[str, float]
    lines: dict[str, set[int]]

    def of(self, first: int, last: int) -> dict[str, float]:
        """The tests that run one of these lines, with their seconds."""
        wanted = set(range(first, last + 1))
        return {test: s for test, s in self.seconds.items() if wanted & self.lines[test]}


def read_reach(path: Path) -> Reach:
    seconds, lines = json.loads(path.read_text())
    return Reach(seconds, {test: set(numbers) for test, numbers in lines.items()})


class Recording:
    """A plugin that traces one file while each test runs and, at the end, writes what `read_reach` reads.

    What a test's child processes run is not seen.
    """

    def __init__(self, module: Path, to: Path):
        self.module, self.to = str(module), to
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, set[int]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        ran = self.lines[item.nodeid] = set()

        def of_line(frame, event, arg):
            ran.add(frame.f_lineno)
            return of_line

        start = time.monotonic()
        sys.settrace(lambda frame, *_: of_line if frame.f_code.co_filename == self.module else None)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.monotonic() - start

    def pytest_sessionfinish(self):
        self.to.write_text(json.dumps([self.seconds, {test: sorted(ran) for test, ran in self.lines.items()}]))


class Chosen:
    """A plugin that runs these tests alone, quickest first."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items):
        kept = [item for item in items if item.nodeid in self.seconds]
        items[:] = sorted(kept, key=lambda item: self.seconds[item.nodeid])
