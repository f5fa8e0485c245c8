"""What `python -m sparse24 bench` runs: the suite, or one feed-forward layer of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .._library import is_available
from ..errors import Sparse24Error

OPERANDS = ("weight", "activation")
PARTS = ("ffn", "tokens", "block", "step")
LEAST_TOKENS = 256


def check_gpu() -> None:
    """Raises Sparse24Error, with the reason, where no sparse product can run."""
    if not torch.cuda.is_available():
        raise Sparse24Error(
            "the benchmark needs an NVIDIA GPU that runs 2:4 products, and torch finds no GPU here; "
            "`python -m sparse24 env` says more"
        )
    if not (found := is_available("cuda")):
        raise Sparse24Error(f"the benchmark needs 2:4 products on the GPU: {found.reason}")


def check_sizes(tokens: int, d_model: int, d_ff: int, micro_batches: int) -> None:
    """Sizes that a feed-forward layer can have; Sparse24Error names the option otherwise."""
    for name, value, unit in (
        ("tokens", tokens, 1), ("d-model", d_model, 16), ("d-ff", d_ff, 16), ("micro-batches", micro_batches, 1)
    ):  # fmt: skip
        if value < 1 or value % unit:
            multiple = f", a multiple of {unit}" if unit > 1 else ""
            raise Sparse24Error(f"--{name} must be positive{multiple}, got {value}")


def check_operand(operand: str, *, of_own_layer: bool) -> None:
    """Raises Sparse24Error for an unknown operand, and for one that the suite does not time."""
    if operand not in OPERANDS:
        raise Sparse24Error(f"--operand must be {' or '.join(OPERANDS)}, got {operand!r}")
    if operand != OPERANDS[0] and not of_own_layer:
        raise Sparse24Error(f"--operand {operand} is of a layer of your own: give --d-model and --d-ff too")


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
    """Measure one layer, and its break-even token count by halving and doubling the tokens.

    gated  None: it is
    """
    gated = gated is not False
    check_sizes(tokens, d_model, d_ff, micro_batches)
    check_gpu()
    from . import suite
    from .timing import Table, header

    print(header())
    followed = open_report(report)
    shape = suite.ffn_shape(f"{d_model} x {d_ff}", tokens, d_model, d_ff, gated)
    dtype = suite.MASTERS[master]
    run = suite.FeedForwardTimes(shape, dtype, rounds=10, warm=2.0)
    for line in describe(run, shape, master, micro_batches):
        print(line)
    table = Table("own", suite.TOKENS_COLUMNS, folder=csv)
    if followed:
        followed.follow(table)
    suite.tokens_sweep(table, [(shape.name, d_model, d_ff, gated)], counts_around(tokens), [master])
    for label, column in (("with MVUE", "speedup"), ("with mvue=False", "speedup mvue=False")):
        points = [(row[2], row[table.columns.index(column)]) for row in table.rows]
        print(f"break-even {label}: {break_even_text(points, suite.break_even(points))}")
    if csv:
        print("wrote", csv / "own.csv")
    if report:
        print("wrote", report)


def counts_around(tokens: int) -> list[int]:
    """Numbers of tokens among which the break-even one is sought."""
    return [int(tokens * 2**power) for power in range(-3, 2) if tokens * 2**power >= LEAST_TOKENS]


def master_label(master: str) -> str:
    """What tables call the weights that `--master` names. Raises Sparse24Error for another name."""
    labels = {"bf16": "bf16", "fp32": "fp32 master"}
    if master not in labels:
        raise Sparse24Error(f"--master must be bf16 or fp32, got {master!r}")
    return labels[master]


def open_report(path: Path | None):
    """A report at `path`, begun; None where none is wanted."""
    if path is None:
        return None
    from .report import Report

    return Report(path)


def describe(run, shape, master: str, micro_batches: int) -> list[str]:
    """The measured layer in words."""
    from .suite import MASTERS, estimate, rates_here

    times = run.times
    lines = [
        f"feed-forward layer {shape.name}{' gated' if shape.gated else ''}, {shape.tokens} tokens a call, {master}",
        f"  dense, torch.compile     {times['dense']:9.0f} us a micro-batch",
        f"  2:4                      {times['sparse']:9.0f} us a micro-batch",
        f"  2:4, mvue=False          {times['no mvue']:9.0f} us a micro-batch",
        f"  re-packing, once a step  {times['repack']:9.0f} us",
        f"  masked decay             {times['decay']:9.0f} us",
        f"  mask search / 40         {(run.between - times['repack'] - times['decay']):9.0f} us",
    ]
    lines.append(f"speed-up of a step: {run.speedup():.2f}x, {run.speedup('no mvue'):.2f}x with mvue=False")
    if micro_batches > 1:
        lines.append(
            f"speed-up of a step of {micro_batches} micro-batches: {run.speedup(micro_batches=micro_batches):.2f}x"
        )
    expected = estimate(shape, MASTERS[master], micro_batches=micro_batches)
    converts = "would convert it" if expected >= rates_here().margin else "would leave it dense"
    lines.append(
        f"sparsify(tokens={shape.tokens}, micro_batches={micro_batches}) expects {expected:.2f}x: it {converts}"
    )
    return lines


def break_even_text(points: list[tuple[int, float]], found: float | None) -> str:
    low, high = min(points)[0], max(points)[0]
    if found is None:
        return f"none up to {high} tokens a call"
    return f"about {found:.0f} tokens a call" if found > low else f"at or below {low} tokens a call"


def token_sizes(quick: bool) -> list[tuple[str, int, int, bool]]:
    from . import suite

    if quick:
        return [("4096 x 11008", 4096, 11008, True)]
    return [(s.name, s.d_model, s.d_ff, s.gated) for s in suite.LAYERS]


def unless_out_of_memory(part: str, measure: Callable[[], object]) -> None:
    """Run a part of the suite; one that does not fit the GPU's memory is reported, and the others go on."""
    try:
        measure()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"# {part}: too little GPU memory for the rest of this part, which is left out", flush=True)


def run_suite(parts: tuple[str, ...], quick: bool, csv: Path | None, report: Path | None = None) -> None:
    """The parts of the suite that are asked for, all by default.

    report  one file for all of it, which also says where the time of a layer goes
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise Sparse24Error(f"no benchmark {', '.join(unknown)}; there are {', '.join(PARTS)}")
    check_gpu()
    from . import suite
    from .models import SHAPES
    from .timing import Table, header

    print(header())
    parts, labels = parts or PARTS, ("bf16",) if quick else tuple(suite.MASTERS)
    columns = {
        "ffn": suite.FFN_COLUMNS, "tokens": suite.TOKENS_COLUMNS, "block": suite.BLOCK_COLUMNS,
        "step": suite.STEP_COLUMNS,
    }  # fmt: skip
    tables = {name: Table(name, columns[name], folder=csv) for name in columns}
    costs = None
    if followed := open_report(report):
        costs = Table("ffn_costs", suite.COST_COLUMNS, quiet=True)
        followed.follow(*tables.values(), costs)
    measure = {
        "ffn": lambda: suite.feed_forwards(tables["ffn"], suite.LAYERS[:3:2] if quick else suite.LAYERS, labels, costs),
        "tokens": lambda: suite.tokens_sweep(
            tables["tokens"], token_sizes(quick), (1024, 2048, 4096, 8192, 16384), labels[:1]
        ),
        "block": lambda: suite.blocks(tables["block"], suite.BLOCKS[2:3] if quick else suite.BLOCKS, labels),
        "step": lambda: [
            suite.training_step(tables["step"], shape, "bf16")
            for shape in ([SHAPES["llama-7B x2"]] if quick else SHAPES.values())
        ],
    }
    for part in PARTS:
        if part in parts:
            unless_out_of_memory(part, measure[part])
    if csv:
        for table in tables.values():
            if table.rows:
                print("wrote", csv / f"{table.name}.csv")
    if report:
        print("wrote", report)
