"""What the profiler says of each kernel: DRAM bytes against the ideal, instructions an element, which pipe is busy.

Nsight Compute (`ncu`) replays each kernel a few times with empty caches and reads the hardware counters. Its times are
longer than those of the other benchmarks (every run starts cold); its counts are what this is for.

    python -m bench.profile [--csv FOLDER] [--append] [--only WORDS]

Columns: time; DRAM bytes read and written over the bytes that must move; warp instructions x 32 / elements; and, in
percent of what the unit could do while the kernel ran: DRAM, issue slots, and the pipes for integer and logic (alu),
floating point (fma), shared and global accesses (lsu), and matrices (tensor). `stall` has the commonest reasons for a
warp to wait, with their shares of all waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.common import arguments, open_table
from bench.counters import READ, TIME_NS, WRITTEN, counted, counters
from sparse24 import ops

INSTRUCTIONS = "smsp__inst_executed.sum"
#: column -> metrics, the first of which that this GPU knows is taken
SHARES = {
    "dram %": ["gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"],
    "issue %": ["smsp__issue_active.avg.pct_of_peak_sustained_active"],
    "alu %": ["sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active"],
    "fma %": [
        "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    ],
    "lsu %": ["sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active"],
    "tensor %": [
        "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active",
    ],
    "shared %": ["l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed"],
    "L2 hit %": ["lts__t_sector_hit_rate.pct"],
    "occupancy %": ["sm__warps_active.avg.pct_of_peak_sustained_active"],
}
STALLS = [
    f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in (
        "long_scoreboard short_scoreboard barrier math_pipe_throttle lg_throttle mio_throttle wait dispatch_stall "
        "not_selected no_instruction membar sleeping drain gmma branch_resolving imc_miss tex_throttle"
    ).split()
]


@dataclass
class Case:
    op: str
    shape: str
    ideal_bytes: float
    elements: float
    run: Callable


BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def cases() -> Iterator[Case]:
    """Each with its inputs made just before, so that they need not all fit at once."""
    seed = torch.tensor([1, 2], device="cuda")
    for rows, cols in ((3072, 768), (14336, 4096)):
        yield from weight_cases(rows, cols)
    for tokens, features in ((8192, 11008), (16384, 14336)):
        yield from gradient_cases(tokens, features, seed)
        yield from activation_cases(tokens, features, seed)
    for name, m, n, k in (
        ("gpt2-124M up", 3072, 16384, 768),
        ("gpt2-774M up", 5120, 16384, 1280),
        ("llama-7B up", 11008, 8192, 4096),
    ):
        yield from product_cases(name, m, n, k, seed)


def weight_cases(rows: int, cols: int) -> Iterator[Case]:
    n, shape = rows * cols, f"{rows}x{cols}"
    w, grad = torch.randn(rows, cols, **BF16), torch.randn(rows, cols, **BF16)
    mask = ops.transposable_mask(w)
    yield Case("transposable_mask", shape, 2.125 * n, n, lambda: ops.transposable_mask(w))
    yield Case("prune_compress", shape, 4.375 * n, n, lambda: ops.prune_compress(w))
    yield Case("compress", shape, 4.375 * n, n, lambda: ops.compress(w, mask))
    yield Case("masked_decay_", shape, 6.125 * n, n, lambda: ops.masked_decay_(grad, w, mask, 1e-5))


def gradient_cases(tokens: int, features: int, seed: torch.Tensor) -> Iterator[Case]:
    n, shape = tokens * features, f"{tokens}x{features}"
    dy = torch.randn(tokens, features, **BF16)
    column = dy.t().contiguous().t()
    yield Case("mvue_compress row", shape, 3.125 * n, n, lambda: ops.mvue_compress(dy, seed))
    yield Case("mvue_compress column", shape, 3.125 * n, n, lambda: ops.mvue_compress(column, seed))


def activation_cases(tokens: int, d_ff: int, seed: torch.Tensor) -> Iterator[Case]:
    n, shape = tokens * d_ff, f"{tokens}x{d_ff}"
    gate_up, dh = torch.randn(tokens, 2 * d_ff, **BF16), torch.randn(tokens, d_ff, **BF16)
    column = gate_up.t().contiguous().t()
    op = "gated_activation"

    def forward(source: torch.Tensor, column_major: bool) -> Callable:
        return lambda: ops.gated_activation(source, "silu", column_major=column_major)

    for name, source in (("row", gate_up), ("column", column)):
        yield Case(f"{op} {name}/row", shape, 6 * n, n, forward(source, False))
        yield Case(f"{op} {name}/column", shape, 6 * n, n, forward(source, True))
    yield Case(f"{op}_backward", shape, 10 * n, n, lambda: ops.gated_activation_backward(dh, gate_up, "silu"))
    yield Case(
        f"{op}_backward_mvue",
        shape,
        12.25 * n,
        n,
        lambda: ops.gated_activation_backward_mvue(dh, gate_up, "silu", seed),
    )


def product_cases(name: str, m: int, n: int, k: int, seed: torch.Tensor) -> Iterator[Case]:
    """A weight [m, k] on n tokens. Elements are floating-point operations, counted as dense."""
    w, x, dy = torch.randn(m, k, **BF16), torch.randn(n, k, **BF16), torch.randn(n, m, **BF16)
    _, packed, E, packed_t, E_t = ops.prune_compress(w)
    packed_dy, E_dy = ops.mvue_compress(dy, seed)
    flops, weight, x_bytes, y_bytes = 2.0 * m * n * k, 1.125 * m * k, 2 * n * k, 2 * n * m
    traffic = weight + x_bytes + y_bytes
    yield Case("sparse_mm", name, traffic, flops, lambda: ops.sparse_mm(x, packed, E, m))
    yield Case("sparse_mm_grad_input", name, traffic, flops, lambda: ops.sparse_mm_grad_input(dy, packed_t, E_t, k))
    traffic = 1.125 * n * m + x_bytes + 2 * m * k
    yield Case("sparse_mm_grad_weight", name, traffic, flops, lambda: ops.sparse_mm_grad_weight(packed_dy, E_dy, x, m))


def wanted(only: str) -> Iterator[Case]:
    """The cases whose op has one of the words of `only`; all, if it is empty."""
    words = only.split(",")
    return (case for case in cases() if any(word in case.op for word in words))


def child(only: str) -> None:
    for case in wanted(only):
        case.run()  # allocates, and loads the kernel
        counted(case.run)


def combine(kernels: list[dict[str, float]]) -> dict:
    """One record of several kernels: counts are added, percentages are those of the longest."""
    longest = max(kernels, key=lambda kernel: kernel[TIME_NS])
    record = {name: sum(kernel[name] for kernel in kernels) for name in (TIME_NS, READ, WRITTEN, INSTRUCTIONS)}
    for column, names in SHARES.items():
        record[column] = next((longest[name] for name in names if not math.isnan(longest[name])), math.nan)
    stalls = {name.split("stalled_")[1].split("_per")[0]: longest[name] for name in STALLS}
    stalls = {reason: value for reason, value in stalls.items() if not math.isnan(value)}
    total = sum(stalls.values())
    top = sorted(stalls, key=stalls.get, reverse=True)[:2] if total else []
    record["stall"] = " ".join(f"{reason} {100 * stalls[reason] / total:.0f}%" for reason in top)
    return record


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words of the ops to profile, with commas between")
    parser.add_argument("--child", action="store_true", help="what ncu runs")
    args = parser.parse_args()
    if args.child:
        return child(args.only)
    columns = ["op", "shape", "time_us", "bytes over ideal", "read over ideal bytes", "instructions an element"]
    table = open_table(args, "profile", [*columns, *SHARES, "stall"], key=2)
    metrics = [TIME_NS, READ, WRITTEN, INSTRUCTIONS, *(name for names in SHARES.values() for name in names), *STALLS]
    described = [(case.op, case.shape, case.ideal_bytes, case.elements) for case in wanted(args.only)]
    groups = counters("bench.profile", metrics, ["--only", args.only])
    for (op, shape, ideal, elements), kernels in zip(described, groups, strict=True):
        record = combine(kernels)
        table.add(
            op,
            shape,
            record[TIME_NS] / 1e3,
            (record[READ] + record[WRITTEN]) / ideal,
            record[READ] / ideal,
            32 * record[INSTRUCTIONS] / elements,
            *(record[column] for column in SHARES),
            record["stall"],
        )


if __name__ == "__main__":
    main()
