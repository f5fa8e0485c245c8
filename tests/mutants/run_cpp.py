"""Small faults in the C++ that CPU and GPU share, and the C++ tests that should see them: part of `make mutants`.

    python tests/mutants/run_cpp.py [--named] [--each 8] [--seed 0] [--only common/philox.h ...]

Each mutant is a copy of one file with one operator or number of one line changed. The test programs below and what of
the library includes the file are compiled with it. What the compiler refuses is not counted.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from equivalent import verdict, why_equivalent  # noqa: E402
from named_cpp import NAMED  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DNDEBUG", '-DSPARSE24_VERSION="0"']
NEAREST = {
    "common/bits.h": ["mvue_test", "common_test"],
    "common/convert.h": ["common_test", "pack_test"],
    "common/float8.h": ["float8_test", "float8_packing_test"],
    "common/mask_bits.h": ["kernel_parts_test", "common_test", "mask_test", "pack_test"],
    "common/metadata.h": ["common_test", "pack_test", "float8_packing_test"],
    "common/philox.h": ["common_test", "mvue_test"],
    "common/tensor_list.h": ["kernel_parts_test"],
    "common/tile.h": ["kernel_parts_test", "kernel_index_test"],
    "pack/mvue_group.h": ["mvue_test"],
    "pack/pack_group.h": ["kernel_parts_test", "pack_test"],
    "pack/two_of_four.h": ["two_of_four_test"],
    "activation/functions.h": ["activation_test"],
    "mask/block_search.h": ["mask_test"],
    "gemm/stream_k.h": ["stream_k_test"],
    "cpu/parallel.cpp": ["pack_test"],
}
SWAPS = [
    (r"(?<![<>=!-])<=", "<"), (r"(?<![<>=-])<(?![<=])(?= )", "<="), (r"(?<![<>=-])>=", ">"), (r"(?<= )>(?= )", ">="),
    (r"==", "!="), (r"!=", "=="), (r"&&", "||"), (r"\|\|", "&&"), (r"(?<= )\+(?= )", "-"), (r"(?<= )-(?= )", "+"),
    (r"(?<= )\*(?= )", "+"), (r"(?<= )/(?= )", "*"), (r"(?<= )<<(?= )", ">>"), (r"(?<= )>>(?= )", "<<"),
    (r"(?<= )&(?= )", "|"), (r"(?<= )\|(?= )", "&"), (r"(?<= )\^(?= )", "&"),
]  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])(0x[0-9A-Fa-f]+|\d+)(u?)(?![\w.])")

NO_COMPUTATION = re.compile(r"\s*(template|static_assert|SP24_CHECK|using|namespace|case .*: return \")")


def code_lines(text: str):
    """(number, line without comment) of lines that every host compiler sees and that compute something."""
    on_gpu = []
    for i, line in enumerate(text.splitlines()):
        if line.lstrip().startswith("#"):
            if re.match(r"\s*#\s*if", line):
                on_gpu.append("CUDA" in line)
            elif re.match(r"\s*#\s*else", line):
                on_gpu[-1] = False
            elif re.match(r"\s*#\s*endif", line):
                on_gpu.pop()
            continue
        code = re.sub(r"//.*", "", line)
        if not any(on_gpu) and not NO_COMPUTATION.match(code):
            yield i, code


def mutants(text: str) -> list[tuple[int, str, str]]:
    """(line, words, text with the fault)"""
    lines, found = text.splitlines(), []

    def add(i, code, match, new):
        changed = [*lines]
        changed[i] = code[: match.start()] + new + code[match.end() :]
        found.append((i + 1, f"{code.strip()[:50]} -> {changed[i].strip()[:60]}", "\n".join(changed) + "\n"))

    for i, code in code_lines(text):
        for pattern, new in SWAPS:
            for match in re.finditer(pattern, code):
                add(i, code, match, new)
        for match in NUMBER.finditer(code):
            digits, suffix = match.groups()
            value = int(digits, 0) + 1
            add(i, code, match, (hex(value) if digits.startswith("0x") else str(value)) + suffix)
    return found


class Build:
    """Two trees of the sources, as they are and with the fault of the moment.

    The library is compiled when the first mutant needs it: programs that need headers alone see most. For a mutant,
    what includes its file is compiled anew.
    """

    def __init__(self, folder: Path, nearest: dict[str, list[str]]):
        self.whole, self.changed = folder / "whole", folder / "changed"
        for tree in (self.whole, self.changed):
            shutil.copytree(ROOT / "csrc", tree / "csrc")
            shutil.copytree(ROOT / "tests" / "cpp", tree / "cpp")
        self.alone = {test for test in set().union(*nearest.values()) if self.is_alone(test)}

    @functools.cached_property
    def objects(self) -> dict[str, Path]:
        """Of the library without faults, by source file."""
        sources = [path for part in ("api", "cpu") for path in (self.whole / "csrc" / part).glob("*.cpp")]
        names = [str(path.relative_to(self.whole)) for path in sources]
        found = {name: compiled(self.whole, name) for name in names}
        if None in found.values():
            raise SystemExit("error: the library does not compile without any fault")
        return found

    def is_alone(self, test: str) -> bool:
        """Whether a test program needs headers alone, not the library."""
        own = compiled(self.whole, f"cpp/{test}.cpp")
        return own is not None and link(own, [], self.whole / test)

    def outcome(self, header: str, text: str, tests: list[str]) -> str:
        path = self.changed / "csrc" / header
        path.write_text(text)
        try:
            objects: dict[str, Path | None] = {}
            for test in sorted(tests, key=lambda test: test not in self.alone):
                if test not in self.alone and not objects:
                    objects = self.with_changed(header)
                    if None in objects.values():
                        return "refused"
                result = self.result(test, [] if test in self.alone else [*objects.values()])
                if result != "SURVIVED":
                    return result
            return "SURVIVED"
        finally:
            shutil.copy(self.whole / "csrc" / header, path)

    def with_changed(self, header: str) -> dict[str, Path | None]:
        """The library's objects, of which those that include the file are compiled anew."""

        def includes(source: str) -> bool:
            return f"/csrc/{header}" in self.objects[source].with_suffix(".d").read_text()

        return {s: compiled(self.changed, s) if includes(s) else self.objects[s] for s in self.objects}

    def result(self, test: str, objects: list) -> str:
        own = compiled(self.changed, f"cpp/{test}.cpp")
        program = self.changed / test
        if own is None or not link(own, objects, program):
            return "refused"
        try:
            done = subprocess.run([str(program)], capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return "killed"
        return "killed" if done.returncode else "SURVIVED"


def compiled(tree: Path, source: str) -> Path | None:
    """The object of a source file in a tree; None where the compiler refuses it."""
    out = tree / (source.replace("/", "_") + ".o")
    includes = [f"-I{tree / part}" for part in ("csrc", "csrc/include", "cpp")]
    command = ["g++", *FLAGS, *includes, "-MMD", "-c", str(tree / source), "-o", str(out)]
    return out if subprocess.run(command, capture_output=True).returncode == 0 else None


def link(own: Path, objects: list, program: Path) -> bool:
    command = ["g++", str(own), *map(str, objects), "-lpthread", "-o", str(program)]
    return subprocess.run(command, capture_output=True).returncode == 0


def named() -> list[tuple[str, tuple]]:
    found = []
    for header, old, new in NAMED:
        text = (ROOT / "csrc" / header).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"error: {header} has {text.count(old)} times {old!r}; named_cpp.py is out of date")
        found.append((header, (text[: text.index(old)].count("\n") + 1, f"{old} -> {new}", text.replace(old, new))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--named", action="store_true")
    parser.add_argument("--each", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+")
    args = parser.parse_args()
    todo = named()
    for header in () if args.named else NEAREST:
        of_file = mutants((ROOT / "csrc" / header).read_text())
        picked = random.Random(f"{args.seed} {header}").sample(of_file, min(args.each, len(of_file)))
        todo += [(header, mutant) for mutant in sorted(picked)]
    todo = [one for one in todo if not args.only or one[0] in args.only]
    counts = {"killed": 0, "SURVIVED": 0, "refused": 0}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        build = Build(Path(folder), {header: NEAREST[header] for header, _ in todo})
        for header, (line, what, text) in todo:
            if why := why_equivalent(header, what):
                print(f"nobody sees csrc/{header}:{line} {what} ({why})", flush=True)
                continue
            outcome = build.outcome(header, text, NEAREST[header])
            counts[outcome] += 1
            print(f"{outcome:8} csrc/{header}:{line} {what}", flush=True)
    print(f"{counts['refused']} refused by the compiler")
    sys.exit(not verdict(counts["killed"], counts["SURVIVED"]))


if __name__ == "__main__":
    main()
