"""A feed-forward layer of the caller's own with 2:4 activations, beside a compiled dense one.

`python -m sparse24 bench --operand activation`: squared ReLU, no gate, no biases, in 16 bits. Nothing happens between
steps, so a step is its micro-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..convert import cost_model
from ..errors import Sparse24Error
from . import arms, command, suite
from .models import ModelShape
from .timing import Table, header, time_hot

COLUMNS = ["weights", "layer", "tokens", "dense_us", "sparse_us", "speedup", "estimated"]


class Times(NamedTuple):
    """Microseconds of a micro-batch: of the first in a step, and of one whose gradients are added to these."""

    dense: float
    sparse: float
    dense_sum: float
    sparse_sum: float

    def speedup(self, micro_batches: int = 1) -> float:
        """Of a step."""
        more = micro_batches - 1
        return (self.dense + more * self.dense_sum) / (self.sparse + more * self.sparse_sum)


def measure(shape: ModelShape, master: torch.dtype, *, rounds: int, warm: float) -> Times:
    """Both layers in one loop on a hot chip."""
    suite.fresh()
    settings = dict(master=master, operand="activation")
    dense = arms.feed_forward_arm(shape, sparse=False, compiled=True, **settings)
    sparse = arms.feed_forward_arm(shape, sparse=True, compiled=False, **settings)
    calls = {
        "dense": dense.micro_batch, "sparse": sparse.micro_batch, "dense sum": dense.accumulate,
        "sparse sum": sparse.accumulate,
    }  # fmt: skip
    for call in calls.values():
        call()
    times = time_hot(calls, rounds=rounds, warm_seconds=warm, calls=2)
    return Times(*(times[name] for name in calls))


def estimate(shape: ModelShape, master: torch.dtype, micro_batches: int = 1) -> float:
    """The speed-up that `sparsify` expects."""
    training = cost_model.Training(shape.tokens, micro_batches, master.itemsize)
    rates = suite.rates_here()
    return cost_model.feed_forward_of_activations(shape.d_model, shape.d_ff, training, rates).speedup


def own_layer(
    tokens: int,
    d_model: int,
    d_ff: int,
    gated: bool | None,
    master: str,
    micro_batches: int,
    csv: Path | None,
    report: Path | None = None,
) -> None:
    """Measure one layer, and its break-even token count by halving and doubling the tokens."""
    if gated:
        raise Sparse24Error(
            "--operand activation times a squared ReLU without a gate, which is what can be pruned; leave out --gated"
        )
    command.check_sizes(tokens, d_model, d_ff, micro_batches)
    command.check_gpu()
    print(header())
    followed = command.open_report(report)
    name, dtype = f"{d_model} x {d_ff} relu2", suite.MASTERS[master]
    shape = suite.ffn_shape(name, tokens, d_model, d_ff, kind="relu2")
    for line in describe(measure(shape, dtype, rounds=10, warm=2.0), shape, master, micro_batches):
        print(line)
    table = Table("own_activations", COLUMNS, folder=csv)
    if followed:
        followed.follow(table)
    for count in command.counts_around(tokens):
        part = suite.ffn_shape(name, count, d_model, d_ff, kind="relu2")
        times = measure(part, dtype, rounds=5, warm=0.3)
        table.add(master, name, count, times.dense, times.sparse, times.speedup(), estimate(part, dtype))
    points = [(row[2], row[5]) for row in table.rows]
    print(f"break-even: {command.break_even_text(points, suite.break_even(points))}")
    if csv:
        print("wrote", csv / f"{table.name}.csv")
    if report:
        print("wrote", report)


def describe(times: Times, shape: ModelShape, master: str, micro_batches: int) -> list[str]:
    """The measured layer in words."""
    lines = [
        f"feed-forward layer {shape.name}, {shape.tokens} tokens a call, {master}",
        f"  dense, torch.compile     {times.dense:9.0f} us a micro-batch",
        f"  2:4 activations          {times.sparse:9.0f} us a micro-batch",
        f"speed-up of a step: {times.speedup():.2f}x",
    ]
    if micro_batches > 1:
        lines.append(f"speed-up of a step of {micro_batches} micro-batches: {times.speedup(micro_batches):.2f}x")
    expected = estimate(shape, suite.MASTERS[master], micro_batches)
    converts = "would convert it" if expected >= suite.rates_here().margin else "would leave it dense"
    call = f"sparsify(operand='activation', tokens={shape.tokens}, micro_batches={micro_batches})"
    lines.append(f"{call} expects {expected:.2f}x: it {converts}")
    return lines
