"""Many random cases of the ops: the tests of test_fuzz*.py in rounds, each with a seed of its own.

    python tests/fuzz_rounds.py [--cases 1000000] [--seed N] [--device cpu|cuda]

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
from pathlib import Path

TESTS = Path(__file__).parent
ROUND = 50_000


def run_round(cases: int, seed: int, device: str) -> str:
    """Raises CalledProcessError, after pytest's report, where a case failed."""
    of_device = "cpu or files" if device == "cpu" else "cuda"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-k",
        f"({of_device}) and not every",
    ]
    environment = os.environ | {"SPARSE24_FUZZ_SEED": str(seed), "SPARSE24_FUZZ_CASES": str(cases)}
    done = subprocess.run([*command, *map(str, sorted(TESTS.glob("test_fuzz*.py")))], env=environment, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    if done.returncode:
        print(done.stdout, flush=True)
        done.check_returncode()
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    done, start = 0, time.monotonic()
    while done < args.cases:
        cases, seed = min(ROUND, args.cases - done), args.seed + done // ROUND
        run_round(cases, seed, args.device)
        done += cases
        print(
            f"{done} cases on {args.device} ({time.monotonic() - start:.0f} s), last seed {seed}: all right", flush=True
        )


if __name__ == "__main__":
    main()
