"""Makes of a report that an owner of a GPU sent what bench/results has of a device: a folder of CSVs.

    python -m sparse24 bench --report a100.json        # the owner, on that GPU
    python -m bench.add_report a100.json a100          # here: bench/results/a100/ffn.csv, tokens.csv, ...

Marks such as `<!-- table: ffn a100 -->` in docs/when-it-pays.md are then filled by `python -m bench.tables`.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from sparse24.benchmark.report import FORMAT

from .measured import RESULTS


def read(path: Path) -> dict:
    """A report, whole; SystemExit where the file is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path} is no report of `sparse24 bench --report`: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        found = report.get("format") if isinstance(report, dict) else type(report).__name__
        raise SystemExit(f"error: {path} must be a report of format {FORMAT}, got {found}")
    return report


def text(cell) -> str:
    """A cell as the benchmarks write it."""
    return "nan" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def add(report: dict, folder: Path) -> list[Path]:
    """Writes each table of the report as CSV into a folder, under what the report says of its origin."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in report["tables"].items():
        path = folder / f"{Path(name).name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            for key, value in {**report["header"], "copy TB/s": report["device"]["copy_tb_s"]}.items():
                file.write(f"# {key}: {value}\n")
            writer = csv.writer(file)
            writer.writerow(table["columns"])
            writer.writerows([text(cell) for cell in row] for row in table["rows"])
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("name", help="of the device's folder in bench/results, such as a100")
    args = parser.parse_args()
    for path in add(read(args.report), RESULTS / args.name):
        print("wrote", path)


if __name__ == "__main__":
    main()
