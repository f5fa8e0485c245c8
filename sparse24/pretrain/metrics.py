"""What a run measures, step by step: metrics.csv for both arms, TensorBoard events for each."""

from __future__ import annotations

import contextlib
import csv
import threading
from pathlib import Path
from typing import Any

from ..files import write_atomically

# `step` counts finished optimizer steps: the loss of row k was computed before update k, the validation loss after it.
FIELDS = (
    "arm", "step", "phase", "loss", "bits_per_byte", "grad_norm", "lr", "step_ms", "tokens_per_s",
    "flip_rate", "flip_rate_per_step", "mask_age", "decay", "valid_loss", "valid_bits_per_byte", "verified",
)  # fmt: skip

Row = dict[str, Any]


def read_rows(path: Path, arm: str | None = None) -> list[Row]:
    """Rows of metrics.csv, numbers as floats and absent values as None; of one arm, or of all.

    Lines that are not as they were written are left out: the last one of a killed run, cut short or full of zeros.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as f:
        rows = [whole_row(row) for row in csv.DictReader(filter(is_whole_line, f))]
    return [row for row in rows if row is not None and arm in (None, row["arm"])]


def is_whole_line(line: str) -> bool:
    return line.endswith("\n") and "\0" not in line


def whole_row(texts: dict[str, str | None]) -> Row | None:
    """The row with its numbers, or None where a field is missing or no number."""
    if set(texts) != set(FIELDS) or None in texts.values() or texts["arm"] == "":
        return None
    try:
        row = {name: parse(name, text) for name, text in texts.items()}
    except ValueError:
        return None
    return row if row["step"] is not None else None


def parse(name: str, text: str) -> Any:
    if name in ("arm", "phase"):
        return text
    return None if text == "" else int(text) if name == "step" else float(text)


class MetricsLog:
    """Appends the rows of one arm. Opening drops its rows after `start_step`: a resumed run writes them again."""

    def __init__(self, out: Path, arm: str, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.arm = out / "metrics.csv", arm
        kept = [r for r in read_rows(self.path) if r["arm"] != arm or (start_step and r["step"] <= start_step)]
        write_atomically(self.path, lambda path: write_rows(path, kept))
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, FIELDS)
        self.board = SummaryWriter(str(out / "tensorboard" / arm), purge_step=start_step + 1 if start_step else None)

    def write(self, rows: list[Row], extra: dict[str, float] | None = None) -> None:
        """Append rows (without `arm`); `extra` goes to TensorBoard only, at the last row's step."""
        for row in rows:
            self.csv.writerow({"arm": self.arm, **row})
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(board_name(name), value, row["step"])
        for name, value in (extra or {}).items():
            self.board.add_scalar(f"recipe/{name}", value, rows[-1]["step"])
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


@contextlib.contextmanager
def board_errors_without_traceback():
    """Let TensorBoard's writer thread print no traceback for an OSError: our thread raises the same error."""
    before = threading.excepthook

    def hook(args) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def write_rows(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def board_name(name: str) -> str:
    if name.startswith("valid_"):
        return f"validation/{name.removeprefix('valid_')}"
    if name in ("loss", "bits_per_byte", "grad_norm", "lr"):
        return f"training/{name}"
    return f"speed/{name}" if name in ("step_ms", "tokens_per_s") else f"recipe/{name}"
