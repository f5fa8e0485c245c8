"""What a run measures, step by step: metrics.csv for both arms, TensorBoard events for each."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

# `step` counts finished optimizer steps: the loss of row k was computed before update k, the validation loss after it.
FIELDS = (
    "arm", "step", "phase", "loss", "bits_per_byte", "grad_norm", "lr", "step_ms", "tokens_per_s",
    "flip_rate", "flip_rate_per_step", "mask_age", "decay", "valid_loss", "valid_bits_per_byte", "verified",
)  # fmt: skip

Row = dict[str, Any]


def read_rows(path: Path, arm: str | None = None) -> list[Row]:
    """Rows of metrics.csv, numbers as floats and absent values as None; of one arm, or of all."""
    if not path.exists():
        return []
    with path.open(newline="") as f:
        rows = [{k: parse(k, v) for k, v in row.items() if k in FIELDS} for row in csv.DictReader(f)]
    # the last line of a killed run may have been cut short
    whole = [r for r in rows if r.get("step") is not None and r.get("verified", "") != ""]
    return [r for r in whole if arm is None or r["arm"] == arm]


def parse(name: str, text: str | None) -> Any:
    if name in ("arm", "phase"):
        return text
    if text is None:  # a missing column
        return ""
    try:
        return None if text == "" else int(text) if name == "step" else float(text)
    except ValueError:
        return None


class MetricsLog:
    """Appends the rows of one arm. Opening drops its rows after `start_step`: a resumed run writes them again."""

    def __init__(self, out: Path, arm: str, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.arm = out / "metrics.csv", arm
        kept = [r for r in read_rows(self.path) if r["arm"] != arm or (start_step and r["step"] <= start_step)]
        temporary = self.path.with_suffix(".csv.writing")
        with temporary.open("w", newline="") as f:
            writer = csv.DictWriter(f, FIELDS)
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, self.path)
        self.file = self.path.open("a", newline="")
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


def board_name(name: str) -> str:
    if name.startswith("valid_"):
        return f"validation/{name.removeprefix('valid_')}"
    if name in ("loss", "bits_per_byte", "grad_norm", "lr"):
        return f"training/{name}"
    return f"speed/{name}" if name in ("step_ms", "tokens_per_s") else f"recipe/{name}"
