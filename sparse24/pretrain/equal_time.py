"""Comparing arms at equal time: the widths that take equal time, and time as an axis beside optimizer steps.

The time of a tiny model says nothing about a large one on a GPU. So time is that of a layer of reference size with the
run's own shape (FFN width over model width, gated or not): the cost model's estimate for an H100, or `--time-ratio` if
the user has measured it. We assume that a step's FFN time is proportional to the FFN's width.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..convert import cost_float8, cost_model
from ..convert.cost_model import H100, Training
from ..convert.to_sparse_activations import ACTIVATION
from .metrics import Row
from .settings import Settings, arm_settings

REFERENCE_WIDTH, REFERENCE_TOKENS, REFERENCE_CALLS = 4096, 8192, 16  # tokens a forward call, calls a step
SPARSE_KINDS = ("sparse", "wide", ACTIVATION)


@dataclass(frozen=True)
class LayerTime:
    """A layer of reference size in training.

    dense_ms  an optimizer step of the dense layer of the run's --ffn-width
    ratio     dense_ms over a step of the 2:4 layer in its sparse phase
    source    in words, for tables and pictures
    """

    dense_ms: float
    ratio: float
    source: str


def layer_time(s: Settings) -> LayerTime:
    hidden = round(REFERENCE_WIDTH * s.ffn_width / s.width / 64) * 64
    training = Training(REFERENCE_TOKENS, REFERENCE_CALLS, master_bytes=4, mvue=bool(s.mvue))
    layer = (REFERENCE_WIDTH, hidden, s.model == "llama")
    # Dense arms stay in 16 bits, so an 8-bit layer, too, is compared with those.
    dense_us = cost_model.feed_forward(*layer, training, H100).dense_us
    model, training = cost_model if s.precision is None else cost_float8, training.of(precision=s.precision)
    if s.operand == ACTIVATION:
        sparse_us, kind = model.feed_forward_of_activations(*layer[:2], training, H100).sparse_us, ", 2:4 activations"
    else:
        sparse_us, kind = model.feed_forward(*layer, training, H100).sparse_us, ", 2:4" if s.precision else ""
    kind += f" in {s.precision}" if s.precision else ""
    size = f"a {REFERENCE_WIDTH} x {hidden} FFN, {REFERENCE_CALLS} x {REFERENCE_TOKENS} tokens a step{kind}"
    source = f"estimate for an H100, {size}"
    if s.time_ratio is not None:
        source = f"{size}, 2:4 at {s.time_ratio:g}x as --time-ratio says"
    return LayerTime(dense_us / 1e3, s.time_ratio or dense_us / sparse_us, source)


def run_ratio(s: Settings) -> float:
    """FFN time of a dense run over that of a 2:4 one of equal width, whose dense phase is as slow as dense."""
    return 1 / ((1 - s.dense_fraction) / layer_time(s).ratio + s.dense_fraction)


def ffn_width(s: Settings, kind: str) -> int:
    """The FFN width of an arm of this kind; a run of "narrow" takes as long as "sparse", one of "wide" or "activation"
    as "dense".
    """
    if kind == "half":
        return s.ffn_width // 2
    if kind not in ("narrow", "wide", ACTIVATION):
        return s.ffn_width
    s = arm_settings(s, kind)
    step = 64 if s.ffn_width >= 2048 else 16
    width = s.ffn_width / run_ratio(s) if kind == "narrow" else s.ffn_width * run_ratio(s)
    return max(step, round(width / step) * step)


def step_ms(s: Settings, kind: str, phase: str) -> float:
    """FFN time of an optimizer step of this arm at the reference size."""
    time = layer_time(arm_settings(s, kind))
    dense = time.dense_ms * ffn_width(s, kind) / s.ffn_width
    return dense / time.ratio if kind in SPARSE_KINDS and phase == "sparse" else dense


def ffn_seconds(rows: list[Row], s: Settings, kind: str) -> list[float]:
    """FFN time at the reference size up to each row of an arm."""
    ms = {phase: step_ms(s, kind, phase) for phase in ("sparse", "dense")}
    return _running_sum(rows, lambda row: ms[row["phase"]])


def training_seconds(rows: list[Row]) -> list[float] | None:
    """Time of the steps up to each row, as measured; steps that were not timed count as the others of their phase."""
    known: dict[str, list[float]] = {}
    for row in rows:
        if row["step_ms"] is not None:
            known.setdefault(row["phase"], []).append(row["step_ms"])
    if not known:
        return None
    typical = {phase: sorted(times)[len(times) // 2] for phase, times in known.items()}
    other = max(typical.values())
    return _running_sum(rows, lambda row: row["step_ms"] or typical.get(row["phase"], other))


def _running_sum(rows: list[Row], ms_of) -> list[float]:
    total, before, sums = 0.0, 0, []
    for row in rows:
        total += ms_of(row) * max(0, row["step"] - before) / 1e3
        before = row["step"]
        sums.append(total)
    return sums
