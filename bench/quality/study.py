"""Trains arms of the study and writes a file each: loss, time, what the masks did.

    python -m bench.quality.study TOKENS --arms "relu2 dense seed=0" "relu2 2:4 wide=1.5 seed=0" --out FOLDER
                                  [--at-once 3] [--captured] [--seconds S] [--fraction F]

10.6 million parameters in blocks (384 wide, 6 layers, d_ff 1536 times the arm's `wide`), 63.7 million (`size=60m`:
768 wide, 9 layers), or 352 million (`size=350m`: 2048 wide, 7 layers, two thirds of them in feed-forward layers);
batches of 32,768 tokens, or of what `tokens=` says; one pass over TOKENS, or over the part that --fraction says:
nothing is seen twice, so capacity counts. AdamW (0.9, 0.95), warm-up, cosine to a tenth, clip 1. All arms see the same
text in the same order. From 0.6 of the steps on the validation loss is taken 16 times, besides that of the end. The
learning rate is 3e-3 at every size and batch where a name has no other.

Results add up over runs: an arm that has a result on this text in --out or in bench/results/quality, under any spelling
of its name, is left out, and one that was interrupted begins anew. Several processes may work on one list (--at-once
starts them). Step times are a measure of speed only where a process has the GPU for itself: "alone" in a result. Arms
with dense FP8 layers (`relu2 dense precision=fp8`) need torchao, which changes how Inductor compiles in its process:
give them one of their own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.quality import training
from bench.quality.arms import Arm, parse
from bench.quality.text import CONTEXT
from sparse24.benchmark.timing import header
from sparse24.errors import Sparse24Error

RESULTS = Path(__file__).parent.parent / "results" / "quality"
#: of GPU memory in use outside of a process; its context takes less, another process that trains takes more
MOST_OUTSIDE_GIB = 4


def load(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, CONTEXT + 1)


def results(folder: Path) -> Iterator[tuple[Path, dict]]:
    """Those in a folder; a file of a killed run, empty or cut off, is none."""
    for path in folder.glob("*.json"):
        try:
            yield path, json.loads(path.read_text())
        except json.JSONDecodeError:
            continue


def known(folders: list[Path], text: str | None) -> set[Arm]:
    """Arms that have a result on this text."""
    runs = [run for folder in folders for _, run in results(folder)]
    return {parse(run["arm"]).plain for run in runs if run.get("text", text) == text}


def refuse_other_texts(arms: list[Arm], out: Path, text: str) -> None:
    """Exits where a result of these arms on another text would be written over."""
    theirs = {f"{arm.slug}.json" for arm in arms}
    for path, run in results(out):
        if path.name in theirs and run.get("text", text) != text:
            raise SystemExit(f"error: {path} was trained on another text, or part of it; choose another --out")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may make `path`; the claim ends with the process, however that ends."""
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work(arms: list[Arm], out: Path, seconds: float, make, text: str | None = None) -> int:
    """Makes the results of `arms` on a text that nobody has or makes; returns how many failed. make(arm) -> dict."""
    begin, longest, failed = time.perf_counter(), 0.0, 0
    for arm in arms:
        if time.perf_counter() - begin + 1.1 * longest > seconds:
            break
        path = out / f"{arm.slug}.json"
        with claimed(path) as mine:
            if not mine or arm.plain in known([out, RESULTS], text):
                continue
            arm_begin = time.perf_counter()
            try:
                result = make(arm)
            except Exception:
                traceback.print_exc()
                failed += 1
                continue
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(result))
            part.replace(path)
            longest = max(longest, time.perf_counter() - arm_begin)
            print(
                {key: value for key, value in result.items() if key not in ("curve", "valid_curve", "made_by")},
                flush=True,
            )
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--arms", nargs="+", required=True, type=parse)
    parser.add_argument("--out", type=Path, required=True, help="folder of results, a JSON file an arm")
    parser.add_argument("--fraction", type=float, default=1.0, help="part of the training rows that each arm sees")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no arm that would end later")
    parser.add_argument("--at-once", type=int, default=1, help="processes on this GPU")
    parser.add_argument("--captured", action="store_true", help="whole training steps as CUDA graphs")
    parser.add_argument("--one-of", type=int, default=1, help=argparse.SUPPRESS)  # processes that --at-once started
    args = parser.parse_args()
    try:
        for arm in args.arms:
            training.check(arm)
    except Sparse24Error as error:
        raise SystemExit(f"error: {error}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    if args.at_once > 1:
        one_of = ["--at-once", "1", "--one-of", str(args.at_once)]
        command = [sys.executable, "-m", "bench.quality.study", *sys.argv[1:], *one_of]
        processes = [subprocess.Popen(command) for _ in range(args.at_once)]
        raise SystemExit(any([process.wait() for process in processes]))
    rows = load(args.tokens / "train.bin")
    batches = int(len(rows) * args.fraction) // training.BATCH
    rows = rows[: batches * training.BATCH]
    text = f"{zlib.crc32(rows):08x}"  # only arms of equal text are to be compared
    refuse_other_texts(args.arms, args.out, text)
    rows = training.on_device(rows)
    valid = {
        path.name.split("_valid")[0]: training.on_device(load(path)[: training.BATCH * training.VALID_BATCHES])
        for path in sorted(args.tokens.glob("*_valid.bin"))
    }

    def make(arm: Arm) -> dict:
        before = training.outside_gib()
        result = training.train(arm, rows, valid, batches, args.captured)
        outside = max(before, training.outside_gib())
        alone = args.one_of == 1 and outside < MOST_OUTSIDE_GIB
        seen = {"text": text, "fraction": args.fraction}
        return result | seen | {"alone": alone, "outside_gib": outside, "made_by": header()}

    if failed := work(args.arms, args.out, args.seconds, make, text):
        raise SystemExit(f"error: {failed} of the arms failed")


if __name__ == "__main__":
    main()
