"""The results of a run: summary.json, summary.md, samples.txt and the table on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from ..convert.to_sparse_activations import ACTIVATION
from ..errors import Sparse24Error
from ..files import read_json, write_text_atomically
from .equal_time import SPARSE_KINDS, ffn_seconds, layer_time
from .metrics import Row
from .plots import searches
from .settings import ARMS, Settings, arm_settings, kind_of

Result = dict[str, Any]


def arm_result(arm: str, rows: list[Row], settings: Settings, **known: Any) -> Result:
    """Figures of a finished arm from its rows: losses, flip rates, times (medians, warm-up and evaluation left out)."""
    valid = [r for r in rows if r["valid_loss"] is not None]
    if not valid:
        raise Sparse24Error(
            f"metrics.csv lacks the losses of {arm}, which has been trained; start anew with --overwrite"
        )
    flips = [r["flip_rate"] for r in searches(rows)]
    verified = [r["verified"] for r in rows if r["verified"] is not None]
    times = {
        phase: [r["step_ms"] for r in rows if r["step_ms"] is not None and r["phase"] == phase]
        for phase in ("sparse", "dense")
    }
    every = times["sparse"] + times["dense"]
    return known | {
        "arm": arm,
        "lr": settings.lr,
        "on_gpu": settings.device.startswith("cuda"),
        "ffn_seconds": ffn_seconds(rows, settings, kind_of(arm))[-1],
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


def best(results: dict[str, Result]) -> dict[str, Result]:
    """Of each FFN kind the arm with the lowest validation loss: where there are several, another learning rate's."""
    found: dict[str, Result] = {}
    for arm, result in results.items():
        kind = kind_of(arm)
        if kind not in found or result["valid_loss"] < found[kind]["valid_loss"]:
            found[kind] = result
    return found


def compare(results: dict[str, Result]) -> dict[str, float]:
    """Ratios of each kind to the dense one; of the 2:4 one also those of time and of flip rates."""
    kinds = best(results)
    if "dense" not in kinds or len(kinds) < 2:
        return {}
    dense, ratios = kinds["dense"], {}
    for kind, result in kinds.items():
        if kind != "dense":
            name = "" if kind == "sparse" else f"{kind}_"
            ratios[f"{name}valid_loss_ratio"] = result["valid_loss"] / dense["valid_loss"]
            ratios[f"{name}ffn_time_ratio"] = result["ffn_seconds"] / dense["ffn_seconds"]
    sparse = kinds.get("sparse")
    if sparse and dense["step_ms"] and sparse["step_ms_sparse_phase"]:
        ratios["speedup_sparse_phase"] = dense["step_ms"] / sparse["step_ms_sparse_phase"]
        ratios["speedup_whole_run"] = dense["step_ms_of_run"] / sparse["step_ms_of_run"]
    if sparse and dense["flip_rate_peak"] and sparse["flip_rate_peak"] is not None:
        ratios["peak_flip_rate_ratio"] = sparse["flip_rate_peak"] / dense["flip_rate_peak"]
    return ratios


COLUMNS = {
    "FFN": lambda r: r["arm"],
    "width": lambda r: f"{r['ffn_width']}",
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
    "valid. loss": lambda r: f"{r['valid_loss']:.4f}",
    "bits/byte": lambda r: f"{r['valid_bits_per_byte']:.4f}",
    "flips, peak": lambda r: number(r["flip_rate_peak"], ".4f"),
    "flips, last": lambda r: number(r["flip_rate_last"], ".4f"),
    "FFN time (est.)": lambda r: f"{r['ffn_seconds']:.1f} s",
}
# only on a GPU: a CPU has no sparse tensor cores, and its times would say nothing
GPU_COLUMNS = {
    "ms/step 2:4": lambda r: number(r["step_ms_sparse_phase"], ".1f"),
    "ms/step dense": lambda r: number(r["step_ms_dense_phase"], ".1f"),
    "tokens/s": lambda r: number(r["tokens_per_s"], ",.0f"),
    "training": lambda r: f"{r['seconds']:.0f} s",
}


def table(results: dict[str, Result]) -> str:
    """A Markdown table, an arm a line, padded so that it reads well on a screen too."""
    columns = COLUMNS | (GPU_COLUMNS if any(r["on_gpu"] for r in results.values()) else {})
    lines = [list(columns), *([cell(r) for cell in columns.values()] for r in results.values())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def padded(line: list[str]) -> str:
        first, *others = map(str.rjust, line, widths)
        return " | ".join(["| " + first.lstrip().ljust(widths[0]), *others]) + " |"

    rule = "|".join(["|" + "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([padded(lines[0]), rule, *map(padded, lines[1:])])


def words(results: dict[str, Result], s: Settings) -> list[str]:
    """The results in sentences: each kind against the dense one, with its FFN time; on a GPU also the speed."""
    kinds, ratios, time = best(results), compare(results), layer_time(s)
    lines = [
        f"{SENTENCE_NAMES[kind]}: validation loss {against(result, kinds['dense'])} the dense model's, in "
        f"{result['ffn_seconds'] / kinds['dense']['ffn_seconds']:.2f}x its FFN time."
        for kind, result in kinds.items()
        if kind != "dense" and ratios
    ]
    if {"sparse", "narrow"} <= kinds.keys():
        lines.append(f"At the same FFN time 2:4 is {against(kinds['sparse'], kinds['narrow'])} the narrow dense model.")
    of_activations = ""
    if ACTIVATION in kinds:
        of_activations = f", of 2:4 activations {layer_time(arm_settings(s, ACTIVATION)).ratio:.2f}x"
    ratio = f"; a 2:4 step there is {time.ratio:.2f}x as fast as a dense one{of_activations}" if lines else ""
    lines.append(f"FFN time: {time.source}{ratio}.")
    if ratio and s.preset == "demo":
        lines.append(SHORT_RUN)
    peak, last = (kinds.get("sparse", {}).get(f"flip_rate_{name}") for name in ("peak", "last"))
    if peak is not None and last is not None:
        settle = ": they have settled" if last < peak / 2 else ""
        lines.append(
            f"Masks: at most {100 * peak:.1f} % of them changed from one search to the next, {100 * last:.2f} % at the "
            f"last search{settle}."
        )
    if "speedup_whole_run" in ratios and kinds["dense"]["on_gpu"]:
        lines.append(f"Speed on this GPU: {ratios['speedup_sparse_phase']:.2f}x in the 2:4 phase, "
                     f"{ratios['speedup_whole_run']:.2f}x over the whole run.")  # fmt: skip
    elif not s.device.startswith("cuda") and kinds.keys() & set(SPARSE_KINDS):
        lines.append(NO_SPEED)
    return lines


NO_SPEED = (
    "A CPU has no sparse tensor cores, so no speed was measured. Next, on a GPU: `python -m sparse24 bench` measures "
    "it, and `python -m sparse24 pretrain --preset 124m --compare` trains."
)
SHORT_RUN = (
    "A run this short overstates what 2:4 weights cost. Over 160 M tokens on an H200, 2:4 weights 1.25 times as wide "
    "ended level with dense in the same FFN time, and so did 2:4 activations, 4/3 as wide (docs/results/quality.md)."
)
SENTENCE_NAMES = {
    "sparse": "2:4", "half": "Dense, half as wide", "narrow": "Dense, narrowed to the FFN time of 2:4",
    "wide": "2:4, widened to the FFN time of dense", "activation": "2:4 activations, widened to the FFN time of dense",
}  # fmt: skip


def against(result: Result, other: Result) -> str:
    """ "0.52 % above", "0.10 % below" or "level with"."""
    percent = 100 * (result["valid_loss"] / other["valid_loss"] - 1)
    return "level with" if abs(percent) < 0.005 else f"{abs(percent):.2f} % {'above' if percent > 0 else 'below'}"


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_summary(out: Path, settings: Settings, results: dict[str, Result], machine: dict[str, Any]) -> dict[str, Any]:
    """summary.json, summary.md and samples.txt, each replaced as a whole."""
    summary = {"machine": machine, "compare": compare(results), "arms": results, "settings": settings.to_json()}
    write_text_atomically(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    lines = words(results, settings)
    if settings.device.startswith("cuda"):
        lines.append("ms/step: median of each phase; tokens/s: mean over both. Warm-up and evaluation are left out.")
    said = "\n".join(f"- {line}" for line in lines)
    where = ", ".join(f"{k} {v}" for k, v in machine.items())
    write_text_atomically(out / "summary.md", f"# {title(settings)}\n\n{table(results)}\n\n{said}\n\n{where}\n")
    texts = [f"=== {arm}, step {r['steps']} ===\n\n" + "\n\n---\n\n".join(r["samples"]) for arm, r in results.items()]
    write_text_atomically(
        out / "samples.txt",
        "Continuations of validation text; [>] marks where the model goes on.\n\n" + "\n\n".join(texts) + "\n",
    )
    return summary


def title(s: Settings) -> str:
    name = {"gpt2": "GPT-2", "llama": "Llama"}[s.model]
    return f"{name}, {s.layers} layers of width {s.width}, {s.steps} steps of {s.batch} x {s.ctx} tokens"


def finished_results(out: Path) -> dict[str, Result]:
    """Results of arms that an earlier process finished; a summary that cannot be read holds none."""
    try:
        results = read_json(out / "summary.json").get("arms")
    except (OSError, Sparse24Error):
        return {}
    if not isinstance(results, dict):
        return {}
    return {arm: result for arm, result in results.items() if kind_of(arm) in ARMS and is_result(result)}


def is_result(result: Any) -> bool:
    """Whether the table can be made from it."""
    try:
        cells = [cell(result) for cell in (COLUMNS | GPU_COLUMNS).values()]
        return bool(cells) and {"arm", "samples", "steps", "on_gpu", "step_ms", "step_ms_of_run"} <= result.keys()
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
