"""What all benchmarks share: timing, the header of a result, tables as text, CSV and PNG.

Timing   CUDA events around one call each, candidates interleaved (A B C A B C ...), medians. A wait on the GPU before
         each call, as long as the host needs to enqueue it, lets the host run ahead, as it does in training with work
         to come, so that times are those of the GPU. What the host costs is measured by itself (`host_time_us`).
         Memory-bound kernels start with a cold L2: a buffer larger than the cache is written before each call.
         Compute-bound ones run on a hot chip: Hopper is limited by power, and on a cool one a dense GEMM is 20 %
         faster than it ever is in training.
Ratios   are taken within one run only.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..files import write_text_atomically


def header() -> dict[str, str]:
    """Device, versions and commit, for the first lines of every result. GIT_COMMIT names it where git cannot."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "sparse24": __version__,
        "commit": os.environ.get("GIT_COMMIT") or _commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


@functools.cache
def _commit() -> str:
    if not shutil.which("git"):
        return ""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


class ColdL2:
    """Empties the L2 by writing more than it holds."""

    def __init__(self, megabytes: int = 256):
        self.room = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self.room.zero_()


def time_cold(candidates: dict[str, Callable], rounds: int = 20) -> dict[str, float]:
    """Median microseconds of each candidate, interleaved, each after the L2 was emptied."""
    flush = ColdL2()
    return _time(candidates, rounds, flush)


def time_hot(
    candidates: dict[str, Callable], rounds: int = 20, warm_seconds: float = 2.0, calls: int = 1
) -> dict[str, float]:
    """Median microseconds of a call of each candidate, interleaved, on a chip that matrix products have heated up.

    calls  in a row between two events: for calls of many kernels, whose host cost one wait would not hide
    """
    heat(warm_seconds)
    return _time(candidates, rounds, lambda: None, calls)


def heat(seconds: float) -> None:
    """Multiply matrices for so long, to bring the chip to the temperature and the power that training has."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    start = time.time()
    while time.time() - start < seconds:
        for _ in range(10):
            torch.mm(a, a)
        torch.cuda.synchronize()


def _time(candidates: dict[str, Callable], rounds: int, before: Callable, calls: int = 1) -> dict[str, float]:
    waits = {}
    for name, run in candidates.items():
        for _ in range(3):  # compile, allocate, warm caches of descriptors
            run()
        waits[name] = _wait_cycles(host_time_us(run, 3) * calls)
    events: dict[str, list] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            before()
            torch.cuda._sleep(waits[name])  # the host is ahead, and its costs stay outside
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs) / calls
        for name, pairs in events.items()
    }


def _wait_cycles(host_us: float) -> int:
    """Cycles of a wait on the GPU, at some 2 GHz, in which the host can enqueue `host_us` of work and half as much
    again; at most 8 ms, so that the chip stays hot.
    """
    return int(min(max(500_000, 3000 * host_us), 16_000_000))


def host_time_us(call: Callable, calls: int = 5) -> float:
    """Microseconds that the host needs to enqueue a call, the least of a few: the GPU idle at the start of each."""
    best = float("inf")
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * best


def copy_bandwidth() -> float:
    """TB/s, read plus written, of a large device-to-device copy in this run: the ceiling of memory-bound kernels."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    time_us = time_cold({"copy": lambda: target.copy_(source)}, rounds=10)["copy"]
    return 2 * source.numel() / time_us / 1e6


@dataclass
class Table:
    """Rows of one benchmark, printed as they come and, with a folder, written as CSV under the header of `header()`.

    key     how many of the first columns say what was measured
    folder  where NAME.csv is written, anew after each row, so that nothing measured is lost
    quiet   print nothing
    report  if given, report.write() is called after each row
    append  keep the rows of an existing CSV of this device, but for those whose key is measured again. Where the
            headers differ (commit, date), the line has both values, the newest first
    """

    name: str
    columns: list[str]
    key: int = 1
    folder: Path | None = None
    append: bool = False
    quiet: bool = False
    rows: list[list] = field(default_factory=list)
    report: Any = None

    def add(self, *cells) -> None:
        self.rows.append(list(cells))
        text = "  ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
        if not self.quiet:
            print(f"{self.name:<12} {text}", flush=True)
        if self.folder:
            self.write(self.folder)
        if self.report is not None:
            self.report.write()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.csv"
        head = header()
        rows = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in self.rows]
        if self.append and path.exists():
            head, rows = self._with_those_of(path, head, rows)
        text = io.StringIO("".join(f"# {key}: {value}\n" for key, value in head.items()))
        text.seek(0, io.SEEK_END)
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows(rows)
        write_text_atomically(path, text.getvalue())  # a run that is killed leaves a whole file
        return path

    def _with_those_of(
        self, path: Path, head: dict[str, str], rows: list[list[str]]
    ) -> tuple[dict[str, str], list[list[str]]]:
        """The new header and rows joined with those of the CSV at `path`."""
        lines = path.read_text().splitlines()
        old_head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
        if old_head.get("device") != head["device"]:
            print(f"# {path} is of another device, {old_head.get('device')}: its rows are not kept")
            return head, rows
        new: dict[tuple[str, ...], list[list[str]]] = {}
        for row in rows:
            new.setdefault(tuple(row[: self.key]), []).append(row)
        measured, merged = set(new), []
        for old in csv.DictReader(line for line in lines if not line.startswith("#")):
            cells = [old.get(column, "") for column in self.columns]
            key = tuple(cells[: self.key])
            merged += new.pop(key, []) if key in measured else [cells]
        merged += [row for others in new.values() for row in others]
        if len(merged) > len(rows):
            for key, old in old_head.items():
                head[key] = ", ".join(dict.fromkeys([head[key], *old.split(", ")])) if key in head else old
        return head, merged

    def plot(
        self, folder: Path, label: str | tuple[str, ...], value: str, unit: str, reference: float | None = None
    ) -> Path:
        """A bar chart of column `value` with the labels of column `label`, or of several."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        folder.mkdir(parents=True, exist_ok=True)
        columns = [self.columns.index(name) for name in ((label,) if isinstance(label, str) else label)]
        labels = [" ".join(str(row[column]) for column in columns) for row in self.rows]
        values = [float(row[self.columns.index(value)]) for row in self.rows]
        figure, axes = plt.subplots(figsize=(9, 0.4 * len(labels) + 1.5))
        axes.barh(range(len(labels)), values, color="#4477aa")
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        if reference is not None:
            axes.axvline(reference, color="black", linewidth=1, linestyle="--")
        axes.set_title(f"{self.name}, {torch.cuda.get_device_name()}")
        return save_picture(figure, folder / f"{self.name}.png")


def save_picture(figure, path: Path) -> Path:
    """Write a figure of pyplot, and close it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def arguments(description: str, *, select: bool = False):
    """The options of every benchmark script: where CSV and PNG go; with `select`, which cases run."""
    import argparse

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--csv", type=Path, default=None, help="folder for the table as CSV")
    parser.add_argument("--append", action="store_true", help="keep the rows of that CSV that are not measured anew")
    parser.add_argument("--png", type=Path, default=None, help="folder for the picture")
    if select:
        parser.add_argument("--quick", action="store_true", help="a few cases only")
        parser.add_argument("--only", default="", help="names of cases, with commas between")
        parser.add_argument(
            "--master", choices=("bf16", "fp32"), default=None, help="dtype of the weights, where it matters"
        )
    return parser


def chosen(args, cases: list, quick: tuple[str, ...]) -> list:
    """The cases, each with a name, that `--only` or `--quick` leaves. Exits for a name that there is not."""
    names = args.only.split(",") if args.only else quick if args.quick else [case.name for case in cases]
    known = {case.name: case for case in cases}
    missing = [name for name in names if name not in known]
    if missing:
        raise SystemExit(f"error: no case {', '.join(missing)}; there are {', '.join(known)}")
    return [known[name] for name in names]


def masters(args) -> tuple[str, ...]:
    """Labels of the dtypes of weights to run with."""
    both = {"bf16": "bf16", "fp32": "fp32 master"}
    return tuple(both.values()) if args.master is None else (both[args.master],)


def open_table(args, name: str, columns: list[str], key: int = 1) -> Table:
    """A table whose rows go, as they come, where the options of the script say."""
    if args.csv:
        print(f"# rows go to {args.csv / name}.csv")
    return Table(name, columns, key, args.csv, args.append)
