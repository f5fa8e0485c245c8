"""One file that says how fast this library is on a GPU: the device, what was built, and every table of a run.

It is JSON, written again after each row, so that an interrupted run has reported what it measured. Nothing in it names
the machine or its user. `python -m bench.add_report FILE NAME` turns it into a folder of bench/results.
"""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from .. import _library
from ..convert import rates_on
from ..errors import Sparse24Error
from ..files import write_text_atomically
from .timing import Table, copy_bandwidth, header

FORMAT = 1


class Report:
    """What `bench --report` writes: the tables that it follows, as far as they have been measured."""

    def __init__(self, path: Path):
        self.path, self.tables = path, []
        self.head: dict = {"format": FORMAT, "header": header(), "build": build(), "device": device()}
        self.write()  # before anything is measured, so that a path that cannot be written is an error at once

    def follow(self, *tables: Table) -> None:
        for table in tables:
            table.report = self
        self.tables += tables

    def write(self) -> None:
        rows = {t.name: {"columns": t.columns, "rows": [in_json(row) for row in t.rows]} for t in self.tables if t.rows}
        try:
            write_text_atomically(self.path, json.dumps({**self.head, "tables": rows}, indent=1) + "\n")
        except OSError as error:
            raise Sparse24Error(f"--report cannot write {self.path} ({error}); name another file") from None


def in_json(row: list) -> list:
    """What was not measured is NaN in a table; JSON has null."""
    return [None if isinstance(cell, float) and math.isnan(cell) else cell for cell in row]


def build() -> dict:
    """Versions, and for which GPUs the library was compiled."""
    info = _library.device_info(-1) if _library.binding() is not None else {}
    return {
        "kernels": info.get("cuda_archs", ""),
        "products": info.get("gemm_archs", ""),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def device() -> dict:
    """The current GPU as its driver describes it, the bandwidth of a copy, and the rates that estimates use."""
    index = torch.cuda.current_device()
    info, rates = _library.device_info(index), rates_on(torch.device("cuda", index))
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{info['capability_major']}.{info['capability_minor']}",
        "multiprocessors": info["multiprocessors"],
        "memory_bytes": properties.total_memory,
        "memory_bandwidth": info["memory_bandwidth"],
        "copy_tb_s": round(copy_bandwidth(), 3),
        "rates": asdict(rates),
    }
