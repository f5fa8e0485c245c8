"""What the order of a walk costs: a gated activation over a column-major input, in DRAM bytes an element of h.

A product may leave gate_up column-major (tokens contiguous) while the next reads h by rows. Three walks of it:

rows      a program takes 1024 features of one token, programs go along rows: each read is 2 B of a 32 B sector, and
          the other tokens of that sector are asked for one row later
columns   a program takes 1024 tokens of one feature, programs go along columns: reads are whole, but each write is
          2 B of a sector
tiles     the library's kernel: tiles whose both sides are whole sectors, in the order of csrc/common/raster.h

Ideal: 4 B read and 2 B written, of DRAM and of L2. What the naive walks lose, they lose in L2: it catches nearly all
second uses of a sector, but serves a whole sector for each 2 B. Nsight Compute (`ncu`) counts, from an empty L2; bytes
that still wait in L2 when a kernel ends are not counted.

    python -m bench.l2_walks [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl

from bench.common import Table, arguments, open_table, save_picture
from bench.counters import READ, TIME_NS, WRITTEN, counted, counters
from sparse24 import ops

METRICS = [TIME_NS, READ, WRITTEN, "lts__t_sectors.sum", "lts__t_sector_hit_rate.pct"]
SHAPES = [("llama-7B", 8192, 11008), ("llama-8B", 16384, 14336)]
WALKS = ["rows", "columns", "tiles"]
COLUMNS = ["walk", "shape", "time_us", "TB/s", "read B/element", "written B/element", "bytes over ideal"]
COLUMNS += ["L2 B/element", "L2 hit %"]


@triton.jit
def walk_kernel(gate_up, h, tokens, d_ff, by_rows: tl.constexpr, block: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    length = d_ff if by_rows else tokens
    blocks = tl.cdiv(length, block)
    line, along = program // blocks, program % blocks * block + tl.arange(0, block)
    token = line if by_rows else along
    feature = along if by_rows else line
    inside = along < length
    gate = tl.load(gate_up + token + feature * tokens, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token + (feature + d_ff) * tokens, mask=inside).to(tl.float32)
    tl.store(h + token * d_ff + feature, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=inside)


def walk(gate_up: torch.Tensor, h: torch.Tensor, by_rows: bool) -> None:
    tokens, d_ff = h.shape
    lines, length = (tokens, d_ff) if by_rows else (d_ff, tokens)
    walk_kernel[(lines * triton.cdiv(length, 1024),)](gate_up, h, tokens, d_ff, by_rows=by_rows, block=1024)


def child() -> None:
    """Counts each walk once; its result must be the library's, up to rounding."""
    for _, tokens, d_ff in SHAPES:
        gate_up = torch.randn(2 * d_ff, tokens, device="cuda", dtype=torch.bfloat16).t()
        h = torch.empty(tokens, d_ff, device="cuda", dtype=torch.bfloat16)
        expected = ops.gated_activation(gate_up, "silu")
        for by_rows in (True, False):
            walk(gate_up, h, by_rows)
            torch.testing.assert_close(h, expected)
        counted(lambda gate_up=gate_up, h=h: walk(gate_up, h, by_rows=True))
        counted(lambda gate_up=gate_up, h=h: walk(gate_up, h, by_rows=False))
        counted(lambda gate_up=gate_up: ops.gated_activation(gate_up, "silu"))


def plot(table: Table, folder: Path) -> Path:
    """Two panels: DRAM bytes an element of each walk, read and written; bytes that L2 served."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, (dram, l2) = plt.subplots(1, 2, figsize=(13, 0.5 * len(table.rows) + 1.6), sharey=True)
    column = {name: [row[i] for row in table.rows] for i, name in enumerate(COLUMNS)}
    places = range(len(table.rows))
    read, written = column["read B/element"], column["written B/element"]
    dram.barh(places, read, color="#4477aa", label="read")
    dram.barh(places, written, left=read, color="#ee6677", label="written")
    l2.barh(places, column["L2 B/element"], color="#228833", label="sectors of 32 B")
    for place, rate in zip(places, column["TB/s"], strict=True):
        dram.text(read[place] + written[place], place, f" {rate:.2f} TB/s", va="center")
    for axes, what in ((dram, "DRAM"), (l2, "L2")):
        axes.axvline(6, color="black", linewidth=1, linestyle="--", label="ideal, 6 B")
        axes.set_xlabel(f"{what} bytes an element of h")
        axes.legend(loc="lower right")
    dram.set_xlim(right=1.3 * max(r + w for r, w in zip(read, written, strict=True)))
    dram.set_yticks(places, [f"{row[1]}, {row[0]}" for row in table.rows])
    dram.invert_yaxis()
    figure.suptitle(f"SwiGLU from column-major to row-major, by the order of the walk, {torch.cuda.get_device_name()}")
    return save_picture(figure, folder / "l2-walks.png")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help="what ncu runs")
    args = parser.parse_args()
    if args.child:
        return child()
    table = open_table(args, "l2_walks", COLUMNS, key=2)
    cases = [(order, name, tokens * d_ff) for name, tokens, d_ff in SHAPES for order in WALKS]
    for (order, name, elements), (record,) in zip(cases, counters("bench.l2_walks", METRICS), strict=True):
        time_ns, read, written, sectors, hit_rate = (record[key] for key in METRICS)
        table.add(
            order,
            name,
            time_ns / 1e3,
            6 * elements / time_ns / 1e3,
            read / elements,
            written / elements,
            (read + written) / (6 * elements),
            32 * sectors / elements,
            hit_rate,
        )
    if args.png:
        print("wrote", plot(table, args.png))


if __name__ == "__main__":
    main()
