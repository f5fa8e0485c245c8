"""Small faults in the package, and the tests that should see them: `make mutants`.

    python tests/mutants/run.py [--named] [--each 8] [--seed 0] [--only recipe/monitor.py ...]

A process that has imported torch forks for each mutant; the child reads the changed source in place of the module's and
runs the tests nearest to it. Nothing on the disk is changed. Killed: a test fails, or it takes longer than ten times
what it took without the fault.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from equivalent import verdict, why_equivalent  # noqa: E402
from mutate import Mutant, mutants  # noqa: E402
from named import NAMED  # noqa: E402
from nearest import FUNCTIONS, NEAREST  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_SECONDS = 400


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


def survives(path: Path, source: str, tests: list[str], limit: float) -> bool:
    """Whether all tests pass with this source of the module."""
    child = os.fork()
    if child == 0:
        os.setsid()
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1), os.dup2(sink, 2)
        sys.meta_path.insert(0, Changed(path, source))
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not slow", *tests]))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == 5:
                raise SystemExit(f"error: no tests in {tests}")
            return code == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def timed_baseline(path: Path, tests: list[str]) -> float:
    start = time.monotonic()
    if not survives(path, path.read_text(), tests, LIMIT_SECONDS):
        raise SystemExit(f"error: {' '.join(tests)} fail without any fault")
    return time.monotonic() - start


def named_mutants() -> list[tuple[str, Mutant, list[str]]]:
    found = []
    for module, old, new, tests in NAMED:
        source = (ROOT / "sparse24" / module).read_text()
        if source.count(old) != 1:
            raise SystemExit(f"error: {module} has {source.count(old)} times {old!r}; named.py is out of date")
        line = source[: source.index(old)].count("\n") + 1
        found.append(
            (module, Mutant(line, f"{old.strip()[:60]} -> {new.strip()[:60]}", source.replace(old, new)), tests)
        )
    return found


def drawn_mutants(each: int, seed: int) -> list[tuple[str, Mutant, list[str]]]:
    found = []
    for module, tests in NEAREST.items():
        of_module = mutants((ROOT / "sparse24" / module).read_text(), FUNCTIONS.get(module, ()))
        picked = random.Random(f"{seed} {module}").sample(of_module, min(each, len(of_module)))
        found += [(module, mutant, tests) for mutant in sorted(picked)]
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
    baselines: dict[tuple, float] = {}
    survived, killed = 0, 0
    for module, mutant, names in todo:
        if why := why_equivalent(module, mutant.what):
            print(f"nobody sees {module}:{mutant.line} {mutant.what} ({why})", flush=True)
            continue
        path, tests = ROOT / "sparse24" / module, [f"tests/{name}.py" for name in names]
        key = tuple(tests)
        if key not in baselines:
            baselines[key] = timed_baseline(path, tests)
        alive = survives(path, mutant.source, tests, 30 + 10 * baselines[key])
        print(f"{'SURVIVED' if alive else 'killed  '} {module}:{mutant.line} {mutant.what}", flush=True)
        survived, killed = survived + alive, killed + (not alive)
    sys.exit(not verdict(killed, survived))


def preload() -> None:
    """All that tests import and that a mutant does not change."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
