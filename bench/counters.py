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
from collections.abc import Callable, Sequence

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


def counters(module: str, metrics: list[str], arguments: Sequence[str] = ()) -> list[list[dict[str, float]]]:
    """Case by case of `python -m module --child *arguments`: a dict (metric -> value in base units) for each kernel.

    A metric that this GPU or this ncu does not know is NaN, and so is one that a kernel has no value of.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("error: ncu (Nsight Compute) is not on the PATH; it comes with the CUDA toolkit")
    known = _known_metrics(ncu)
    asked = [name for name in metrics if not known or name.split(".")[0] in known]
    command = [ncu, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--print-units", "base", "--metrics", ",".join(asked), sys.executable, "-m", module, "--child"]
    output = subprocess.run([*command, *arguments], capture_output=True, text=True)
    table = [line for line in output.stdout.splitlines() if line.startswith('"')]
    if output.returncode or len(table) < 3:
        raise SystemExit(f"error: ncu gave no table:\n{output.stdout[-2000:]}\n{output.stderr[-2000:]}")
    cases: list[list[dict[str, float]]] = []
    for row in csv.DictReader(io.StringIO("\n".join([table[0], *table[2:]]))):  # the second line has the units
        if "spin" in row["Kernel Name"]:
            cases.append([])
        elif cases:
            cases[-1].append({name: _number(row.get(name)) for name in metrics})
    return cases


def _known_metrics(ncu: str) -> set[str]:
    listing = subprocess.run([ncu, "--query-metrics", "--query-metrics-mode", "base"], capture_output=True, text=True)
    return {line.split()[0] for line in listing.stdout.splitlines() if "__" in line}


def _number(text: str | None) -> float:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return float("nan")
