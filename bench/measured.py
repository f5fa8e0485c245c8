"""Results of the benchmarks as they are read again: rows of bench/results, and cells of tables made of them."""

from __future__ import annotations

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def read(name: str, device: str = "") -> list[dict[str, str]]:
    """The rows of a result of a device, bf16 weights first, numbers still as text."""
    path = RESULTS / device / f"{name}.csv"
    if not path.exists():
        where = Path("bench", "results", device)
        raise SystemExit(f"error: there is no {where / path.name}; measure it: python -m bench.bench_* --csv {where}")
    with path.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return sorted(rows, key=lambda row: row.get("weights", ""))


def ratio(text: str) -> str:
    return "-" if text in ("", "nan") else f"{float(text):.2f}x"


def percent(text: str) -> str:
    return "-" if text in ("", "nan") else f"{100 * float(text):.0f} %"


def milliseconds(text: str) -> str:
    return f"{float(text) / 1e3:.2f}"


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table without the columns that no row has a value of; the first `left` are words."""
    header, *rows = zip(
        *(column for column in zip(header, *rows, strict=True) if set(column[1:]) != {"-"}), strict=True
    )
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * left + "---:|" * (len(header) - left)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
