"""Many random cases of the ops: the tests of test_fuzz*.py in rounds, each with a seed of its own.

    python tests/fuzz_rounds.py [--cases 1000000] [--seed N] [--device cpu|cuda] [--processes N]

Without --seed, one is drawn. Each round prints its seed, so a failure can be run again (fuzzing.py). What files hold
is damaged at random too, in a share of one to a hundred (test_fuzz_files.py).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

TESTS = Path(__file__).parent
ROUND = 50_000


def run_round(cases: int, seed: int, device: str) -> str:
    """Raises CalledProcessError, after pytest's report, where a case failed."""
    of_device = "cpu or files" if device == "cpu" else "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-k", f"({of_device}) and not every", *map(str, sorted(TESTS.glob("test_fuzz*.py")))]
    environment = os.environ | {"SPARSE24_FUZZ_SEED": str(seed), "SPARSE24_FUZZ_CASES": str(cases)}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        print(done.stdout, flush=True)
        done.check_returncode()
    return done.stdout


def rounds_of(cases: int, processes: int) -> list[int]:
    """The cases of each round: none is larger than ROUND, and each process has one of its own if it can."""
    size = max(1, min(ROUND, -(-cases // processes)))
    return [min(size, cases - done) for done in range(0, cases, size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, help="rounds at a time; default: 1, and 8 on a GPU")
    args = parser.parse_args()
    processes = args.processes or {"cpu": 1, "cuda": min(8, os.cpu_count() or 1)}[args.device]
    rounds, done, start = rounds_of(args.cases, processes), 0, time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        running = {
            pool.submit(run_round, n, args.seed + i, args.device): (n, args.seed + i) for i, n in enumerate(rounds)
        }
        for finished in as_completed(running):
            cases, seed = running[finished]
            if finished.exception():
                pool.shutdown(wait=False, cancel_futures=True)
                raise SystemExit(f"seed {seed}: a case failed, see above; {done} cases were right before")
            done += cases
            print(
                f"{done} cases on {args.device} ({time.monotonic() - start:.0f} s), seed {seed}: all right", flush=True
            )


if __name__ == "__main__":
    main()
