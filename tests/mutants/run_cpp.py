"""Small faults in the C++ that CPU and GPU share, and the C++ tests that should see them: part of `make mutants`.

    python tests/mutants/run_cpp.py [--named] [--each 8] [--seed 0] [--only common/philox.h ...]

Each mutant is a copy of one file with one operator or number of one line changed. The test programs below and what of
the library includes the file are compiled with it. What the compiler refuses is not counted.
"""

from __future__ import annotations

import argparse
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
    "common/mask_bits.h": ["mask_test", "pack_test"],
    "common/metadata.h": ["common_test", "pack_test", "float8_packing_test"],
    "common/philox.h": ["common_test", "mvue_test"],
    "common/tensor_list.h": ["kernel_parts_test", "common_test"],
    "common/tile.h": ["common_test", "kernel_index_test"],
    "pack/mvue_group.h": ["mvue_test"],
    "pack/pack_group.h": ["kernel_parts_test", "pack_test"],
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
    """Objects of the host library and of the tests, compiled once as they are and, for a mutant, anew where needed."""

    def __init__(self, folder: Path, nearest: dict[str, list[str]]):
        self.folder = folder
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copytree(ROOT / "tests" / "cpp", folder / "cpp")
        self.objects: dict[Path, Path] = {}
        self.alone = {test for tests in nearest.values() for test in tests if self.is_alone(test)}
        self.sources = [*(folder / "csrc" / "api").glob("*.cpp"), *(folder / "csrc" / "cpu").glob("*.cpp")]
        if all(test in self.alone for tests in nearest.values() for test in tests):
            return
        self.objects = {source: self.compile(source, folder / "whole") for source in self.sources}
        if None in self.objects.values():
            raise SystemExit("error: the library does not compile without any fault")

    def is_alone(self, test: str) -> bool:
        """Whether a test program needs headers alone, not the library."""
        own = self.compile(self.folder / "cpp" / f"{test}.cpp", self.folder / "whole")
        return own is not None and link(own, [], self.folder / "whole" / test)

    def compile(self, source: Path, to: Path) -> Path | None:
        to.mkdir(exist_ok=True)
        out = to / f"{source.parent.name}_{source.stem}.o"
        includes = [f"-I{self.folder / 'csrc'}", f"-I{self.folder / 'csrc' / 'include'}", f"-I{self.folder / 'cpp'}"]
        command = ["g++", *FLAGS, *includes, "-MMD", "-c", str(source), "-o", str(out)]
        return out if subprocess.run(command, capture_output=True).returncode == 0 else None

    def includes(self, source: Path, header: Path) -> bool:
        depends = self.objects[source].with_suffix(".d").read_text()
        return source == header or str(header) in depends

    def outcome(self, header: str, text: str, tests: list[str]) -> str:
        path = self.folder / "csrc" / header
        whole = path.read_text()
        path.write_text(text)
        try:
            # Programs that need the header alone tell in seconds; the library is compiled for those that survive them.
            objects: dict[Path, Path | None] = {}
            for test in sorted(tests, key=lambda test: test not in self.alone):
                if test not in self.alone and not objects:
                    objects = self.with_changed(path)
                    if None in objects.values():
                        return "refused"
                result = self.result(test, [] if test in self.alone else [*objects.values()])
                if result != "SURVIVED":
                    return result
            return "SURVIVED"
        finally:
            path.write_text(whole)

    def with_changed(self, path: Path) -> dict[Path, Path | None]:
        """The library's objects, of which those that include the file are compiled anew."""
        changed = self.folder / "changed"
        return {s: self.compile(s, changed) if self.includes(s, path) else self.objects[s] for s in self.sources}

    def result(self, test: str, objects: list) -> str:
        own = self.compile(self.folder / "cpp" / f"{test}.cpp", self.folder / "changed")
        program = self.folder / "changed" / test
        if own is None or not link(own, objects, program):
            return "refused"
        try:
            done = subprocess.run([str(program)], capture_output=True, timeout=300)
        except subprocess.TimeoutExpired:
            return "killed"
        return "killed" if done.returncode else "SURVIVED"


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
