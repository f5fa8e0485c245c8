"""Gated activation, forward and backward, against the copy bandwidth of the same run, eager PyTorch and torch.compile.

Bytes an output element of h: forward 6 (gate, up, h in bf16); backward 10 (d_h, gate, up, d_gate, d_up), and with MVUE
packing of both halves 2.25 more.

    python -m bench.bench_activation [--csv FOLDER] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.common import Table, arguments, copy_bandwidth, header, time_cold
from sparse24 import ops

SHAPES = [("llama-7B", 8192, 11008), ("llama-8B", 16384, 14336), ("gpt2-124M", 16384, 3072)]


def column_major(t):
    return t.t().contiguous().t()


def swiglu(gu):
    gate, up = gu.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def forward_calls(gu) -> dict:
    """(implementation, layout in/out) -> call, for a row-major gu."""
    column = column_major(gu)
    compiled = torch.compile(swiglu, dynamic=False)
    return {
        ("ours", "row/row"): lambda: ops.gated_activation(gu, "silu"),
        ("ours", "column/row"): lambda: ops.gated_activation(column, "silu"),
        ("ours", "row/column"): lambda: ops.gated_activation(gu, "silu", column_major=True),
        ("ours", "column/column"): lambda: ops.gated_activation(column, "silu", column_major=True),
        ("eager", "row/row"): lambda: swiglu(gu),
        ("torch.compile", "row/row"): lambda: compiled(gu),
    }


def backward_calls(dh, gu) -> dict:
    """(op, bytes an element of h) -> call."""
    seed = torch.tensor([1, 2], device="cuda")
    return {
        ("backward", 10.0): lambda: ops.gated_activation_backward(dh, gu, "silu"),
        ("backward + h", 12.0): lambda: ops.gated_activation_backward(dh, gu, "silu", recompute_h=True),
        ("backward + mvue", 12.25): lambda: ops.gated_activation_backward_mvue(dh, gu, "silu", seed),
        ("backward + mvue + h", 14.25): lambda: ops.gated_activation_backward_mvue(
            dh, gu, "silu", seed, recompute_h=True
        ),
    }


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    table = Table("activation", ["op", "shape", "layout in/out", "time_us", "TB/s", "share of copy"])
    for name, tokens, d_ff in SHAPES:
        gu = torch.randn(tokens, 2 * d_ff, device="cuda", dtype=torch.bfloat16)
        dh = torch.randn(tokens, d_ff, device="cuda", dtype=torch.bfloat16)
        for (op, layout), time_us in time_cold(forward_calls(gu), rounds=10).items():
            rate = 6 * dh.numel() / time_us / 1e6
            table.add(f"forward {op}", name, layout, time_us, rate, rate / copy)
        for (op, traffic), time_us in time_cold(backward_calls(dh, gu), rounds=10).items():
            rate = traffic * dh.numel() / time_us / 1e6
            table.add(op, name, "row/row", time_us, rate, rate / copy)
    if args.csv:
        print("wrote", table.write(args.csv))
    if args.png:
        print("wrote", table.plot(args.png, "op", "share of copy", "share of copy bandwidth", 0.9))


if __name__ == "__main__":
    main()
