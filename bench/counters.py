"""Hardware counters of single kernels, by Nsight Compute (`ncu`): a module runs itself again as `--child` under it.

The child calls `counted(call)` for each case; `counters(module, metrics)` gives the counters of the kernels that ran
inside, case by case. Each kernel starts with empty caches; clocks are left alone.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

READ, WRITTEN, TIME_NS = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"


def counted(call: Callable) -> None:
    """Runs `call` with the counters on, behind the marker that separates cases (the kernel of `torch.cuda._sleep`)."""
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    torch.cuda._sleep(10)
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def counters(module: str, metrics: list[str]) -> list[list[dict[str, float]]]:
    """For each case of `python -m module --child`: one dict (metric -> value in base units) a kernel, in order."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("error: ncu (Nsight Compute) is not on the PATH; it comes with the CUDA toolkit")
    command = [ncu, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--print-units", "base", "--metrics", ",".join(metrics), sys.executable, "-m", module, "--child"]
    output = subprocess.run(command, capture_output=True, text=True)
    table = [line for line in output.stdout.splitlines() if line.startswith('"')]
    if output.returncode or len(table) < 3:
        raise SystemExit(f"error: ncu gave no table:\n{output.stdout[-2000:]}\n{output.stderr[-2000:]}")
    cases: list[list[dict[str, float]]] = []
    for row in csv.DictReader(io.StringIO("\n".join([table[0], *table[2:]]))):  # the second line has the units
        if "spin" in row["Kernel Name"]:
            cases.append([])
        else:
            cases[-1].append({name: float(row[name].replace(",", "")) for name in metrics})
    return cases
