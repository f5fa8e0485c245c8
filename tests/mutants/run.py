"""Small faults in the package, and the tests that should see them: `make mutants`.

    python tests/mutants/run.py [--named] [--each 8] [--seed 0] [--only recipe/monitor.py ...]

A process that has imported torch forks for each mutant; the child reads the changed source in place of the module's and
runs the tests nearest to it, first those that run the changed line. Nothing on the disk is changed. Killed: a test
fails, or tests take longer than a minute and ten times what they took without the fault.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.abc
import importlib.util
import json
import math
import operator
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from equivalent import verdict, why_equivalent  # noqa: E402
from mutate import Mutant, mutants  # noqa: E402
from named import NAMED  # noqa: E402
from nearest import FUNCTIONS, NEAREST  # noqa: E402
from reach import Chosen, Reach, Recording  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
#: plain asserts and no report: a failure is all that is asked for, and rewriting takes longer than most tests
OPTIONS = ["-x", "--assert=plain", "-m", "not gpu and not slow"]
OPTIONS += [f"-pno:{plugin}" for plugin in ("cacheprovider", "terminal", "faulthandler", "unraisableexception")]


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives one module another source."""

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        self.name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, origin=str(self.path)) if name == self.name else None

    def get_filename(self, name):
        return str(self.path)

    def get_data(self, path):
        return self.source.encode()


@functools.cache
def reach_of(file: str) -> Reach:
    """Which tests of a file run which lines of the modules that mutants are made of."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "reach.json"
        sources = [ROOT / "sparse24" / module for module in NEAREST]
        if run([file], math.inf, Recording(sources, to)) != 0:
            raise SystemExit(f"error: {file} fails, or has no test, without any fault")
        return Reach(*json.loads(to.read_text()))


def survives(path: Path, mutant: Mutant, names: list[str]) -> bool:
    """Whether all tests pass: first those that run the changed lines, since most faults are seen there, and at once."""
    reach = functools.reduce(operator.or_, (reach_of(f"tests/{name}.py") for name in names))
    near = reach.of(path, mutant.line, mutant.last_line)
    for chosen in filter(None, (near, reach.seconds)):
        files = sorted({test.split("::")[0] for test in chosen})
        limit = 60 + 10 * sum(chosen.values())
        if run(files, limit, Chosen(chosen), Changed(path, mutant.source())) != 0:
            return False
    return True


def run(files: list[str], limit: float, plugin: object, changed: Changed | None = None) -> int | None:
    """pytest's exit code in a process of its own, with one module changed; None: it took too long."""
    child = os.fork()
    if child == 0:
        os.setsid()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        sys.meta_path[:0] = [changed] if changed else []
        os._exit(pytest.main([*OPTIONS, *files], plugins=[plugin]))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def named_mutants() -> list[tuple[str, Mutant, list[str]]]:
    found = []
    for module, old, new, tests in NAMED:
        source = (ROOT / "sparse24" / module).read_text()
        if source.count(old) != 1:
            raise SystemExit(f"error: {module} has {source.count(old)} times {old!r}; named.py is out of date")
        line = source[: source.index(old)].count("\n") + 1
        what = f"{old.strip()[:60]} -> {new.strip()[:60]}"
        last, changed = line + old.rstrip().count("\n"), source.replace(old, new)
        found.append((module, Mutant(line, last, what, lambda changed=changed: changed), tests))
    return found


def drawn_mutants(each: int, seed: int) -> list[tuple[str, Mutant, list[str]]]:
    found = []
    for module, tests in NEAREST.items():
        of_module = mutants((ROOT / "sparse24" / module).read_text(), FUNCTIONS.get(module, ()))
        picked = random.Random(f"{seed} {module}").sample(of_module, min(each, len(of_module)))
        found += [(module, mutant, tests) for mutant in sorted(picked, key=lambda mutant: mutant[:3])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--named", action="store_true", help="those of named.py alone")
    parser.add_argument("--each", type=int, default=8, help="mutants drawn of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="modules, such as recipe/monitor.py")
    args = parser.parse_args()
    todo = named_mutants() + ([] if args.named else drawn_mutants(args.each, args.seed))
    todo = [one for one in todo if not args.only or one[0] in args.only]
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "pretrain")]
    preload()
    with tempfile.TemporaryDirectory() as sys.pycache_prefix:
        sys.dont_write_bytecode = False  # tests, and what a mutant leaves as it is, are compiled once
        sys.exit(not try_all(todo))


def try_all(todo: list[tuple[str, Mutant, list[str]]]) -> bool:
    """Prints each outcome as it comes, then the share of each module, and tells whether it is enough."""
    alive, dead = Counter(), Counter()
    for module, mutant, names in todo:
        if why := why_equivalent(module, mutant.what):
            print(f"nobody sees {module}:{mutant.line} {mutant.what} ({why})", flush=True)
            continue
        survived = survives(ROOT / "sparse24" / module, mutant, names)
        (alive if survived else dead)[module] += 1
        print(f"{'SURVIVED' if survived else 'killed  '} {module}:{mutant.line} {mutant.what}", flush=True)
    for module in alive | dead:
        print(f"{module}: {dead[module]} of {dead[module] + alive[module]}")
    return verdict(dead.total(), alive.total())


def preload() -> None:
    """All that tests import and that a mutant does not change."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()


if __name__ == "__main__":
    main()
