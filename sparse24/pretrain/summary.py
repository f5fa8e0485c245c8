"""What a run comes to: summary.json, summary.md, samples.txt and the table on the screen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean, median
from typing import Any

from .metrics import Row
from .plots import searches
from .settings import Settings

Result = dict[str, Any]


def arm_result(arm: str, rows: list[Row], settings: Settings, **known: Any) -> Result:
    """Figures of a finished arm from its rows: losses, flip rates, times (medians, warm-up and evaluation left out)."""
    valid = [r for r in rows if r["valid_loss"] is not None]
    flips = [r["flip_rate"] for r in searches(rows)]
    verified = [r["verified"] for r in rows if r["verified"] is not None]
    times = {
        phase: [r["step_ms"] for r in rows if r["step_ms"] is not None and r["phase"] == phase]
        for phase in ("sparse", "dense")
    }
    every = times["sparse"] + times["dense"]
    return known | {
        "arm": arm,
        "steps": rows[-1]["step"],
        "valid_loss": valid[-1]["valid_loss"],
        "valid_bits_per_byte": valid[-1]["valid_bits_per_byte"],
        "first_valid_loss": valid[0]["valid_loss"],
        "train_loss": mean(r["loss"] for r in rows[-max(1, len(rows) // 20) :] if r["loss"] is not None),
        "flip_rate_peak": max(flips, default=None),
        "flip_rate_last": flips[-1] if flips else None,
        "verified": all(verified) if verified else None,
        "step_ms": median(every) if every else None,
        # Medians of both phases, weighted by their steps: a few stalled steps of a busy machine do not decide.
        "step_ms_of_run": sum(len(t) * median(t) for t in times.values() if t) / len(every) if every else None,
        "step_ms_sparse_phase": median(times["sparse"]) if times["sparse"] else None,
        "step_ms_dense_phase": median(times["dense"]) if times["dense"] else None,
        "tokens_per_s": 1e3 * settings.batch * settings.ctx / mean(every) if every else None,
    }


def compare(results: dict[str, Result]) -> dict[str, float]:
    """Ratios of the sparse arm to the dense one."""
    if not {"dense", "sparse"} <= results.keys():
        return {}
    dense, sparse = results["dense"], results["sparse"]
    ratios = {"valid_loss_ratio": sparse["valid_loss"] / dense["valid_loss"]}
    if dense["step_ms"] and sparse["step_ms_sparse_phase"]:
        ratios["speedup_sparse_phase"] = dense["step_ms"] / sparse["step_ms_sparse_phase"]
        ratios["speedup_whole_run"] = dense["step_ms_of_run"] / sparse["step_ms_of_run"]
    if dense["flip_rate_peak"] and sparse["flip_rate_peak"] is not None:
        ratios["peak_flip_rate_ratio"] = sparse["flip_rate_peak"] / dense["flip_rate_peak"]
    return ratios


COLUMNS = {
    "FFN": lambda r: r["arm"],
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
    "valid. loss": lambda r: f"{r['valid_loss']:.4f}",
    "bits/byte": lambda r: f"{r['valid_bits_per_byte']:.4f}",
    "flips, peak": lambda r: number(r["flip_rate_peak"], ".4f"),
    "last": lambda r: number(r["flip_rate_last"], ".4f"),
    "ms/step 2:4": lambda r: number(r["step_ms_sparse_phase"], ".1f"),
    "ms/step dense": lambda r: number(r["step_ms_dense_phase"], ".1f"),
    "tokens/s": lambda r: number(r["tokens_per_s"], ",.0f"),
    "training": lambda r: f"{r['seconds']:.0f} s",
}


def table(results: dict[str, Result]) -> str:
    """A Markdown table, an arm a line, padded so that it reads well on a screen too."""
    lines = [list(COLUMNS), *([cell(r) for cell in COLUMNS.values()] for r in results.values())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(line: list[str]) -> str:
        first, *others = map(str.rjust, line, widths)
        return " | ".join(["| " + first.lstrip().ljust(widths[0]), *others]) + " |"

    rule = "|".join(["|" + "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([padded(lines[0]), rule, *map(padded, lines[1:])])


def ratios_line(results: dict[str, Result]) -> str:
    """The sparse arm against the dense one, in words; empty when there are not both."""
    ratios = compare(results)
    parts = [f"validation loss {100 * (ratios['valid_loss_ratio'] - 1):+.2f} %"] if ratios else []
    if "speedup_whole_run" in ratios:
        parts.append(f"speed {ratios['speedup_sparse_phase']:.2f}x in the 2:4 phase")
        parts.append(f"{ratios['speedup_whole_run']:.2f}x over the whole run")
    return f"sparse against dense: {', '.join(parts)}" if parts else ""


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_summary(out: Path, settings: Settings, results: dict[str, Result], machine: dict[str, Any]) -> dict[str, Any]:
    """summary.json, summary.md and samples.txt, each replaced as a whole."""
    summary = {"machine": machine, "compare": compare(results), "arms": results, "settings": settings.to_json()}
    replace(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    note = "ms/step: median of each phase, without warm-up and evaluation; tokens/s: mean over both phases, likewise."
    where = ", ".join(f"{k} {v}" for k, v in machine.items())
    replace(
        out / "summary.md", f"# {title(settings)}\n\n{table(results)}\n\n{ratios_line(results)}\n\n{note}\n\n{where}\n"
    )
    texts = [f"=== {arm}, step {r['steps']} ===\n\n" + "\n\n---\n\n".join(r["samples"]) for arm, r in results.items()]
    replace(
        out / "samples.txt",
        "Continuations of validation text; [>] marks where the model goes on.\n\n" + "\n\n".join(texts) + "\n",
    )
    return summary


def title(s: Settings) -> str:
    name = {"gpt2": "GPT-2", "llama": "Llama"}[s.model]
    return f"{name}, {s.layers} layers of width {s.width}, {s.steps} steps of {s.batch} x {s.ctx} tokens"


def replace(path: Path, content: str) -> None:
    """Write under another name, then rename: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def finished_results(out: Path) -> dict[str, Result]:
    """Results of arms that an earlier process finished."""
    try:
        return json.loads((out / "summary.json").read_text())["arms"]
    except (OSError, ValueError, KeyError):
        return {}
