"""Gated activation, forward and backward, in every mix of layouts, against the copy bandwidth of the same run.

Beside ours: eager PyTorch; torch.compile with static and with dynamic shapes; Liger's SwiGLU where it is installed
(of row-major operands); for the fused backward, torch.compile's dense backward followed by our `mvue_compress`.

Bytes an element of h: forward 6 (gate, up, h in bf16); backward 10 (d_h, gate, up, d_gate, d_up), 2 more with h, 2.25
more with MVUE packing of both halves. Layouts: r is row-major, c is column-major (tokens contiguous). With `--ncu` the
profiler counts the DRAM bytes of our kernels too; what still waits in L2 when a kernel ends is not counted.

    python -m bench.bench_activation [--csv FOLDER] [--append] [--png FOLDER] [--ncu]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import Table, arguments, copy_bandwidth, header, open_table, save_picture, time_cold
from bench.counters import READ, WRITTEN, counted, counters
from sparse24 import ops

SHAPES = [("llama-7B", 8192, 11008), ("llama-8B", 16384, 14336), ("gpt2-124M", 16384, 3072)]
COLUMNS = ["op", "shape", "layouts", "time_us", "TB/s", "share of copy", "DRAM bytes over ideal"]
MIXES = [(False, False), (True, False), (False, True), (True, True)]
FORWARD, BACKWARD, WITH_H, MVUE = 6.0, 10.0, 2.0, 2.25


def laid_out(t: torch.Tensor, column: bool) -> torch.Tensor:
    return t.t().contiguous().t() if column else t.contiguous()


def letter(column: bool) -> str:
    return "c" if column else "r"


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def swiglu_laid_out(column_in: bool, column_out: bool) -> Callable:
    """What a PyTorch user would write to get h in that layout."""
    if column_in == column_out:
        return swiglu
    if column_out:
        return lambda gate_up: swiglu(gate_up).t().contiguous().t()
    return lambda gate_up: swiglu(gate_up).contiguous()


def swiglu_backward(dh, gate_up, d_gate_up) -> None:
    """Writes d_gate_up in place, so that a compiler needs no concatenation."""
    (gate, up), (d_gate, d_up) = gate_up.float().chunk(2, -1), d_gate_up.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    d_up.copy_(dh * gate * sigmoid)
    d_gate.copy_(dh * up * sigmoid * (1 + gate * (1 - sigmoid)))


def liger_forward(gate_up: torch.Tensor) -> dict[str, Callable]:
    """Liger's SwiGLU: over two contiguous halves and, in newer versions, over gate_up as one; nothing without Liger."""
    try:
        from liger_kernel.ops import swiglu as liger
    except ImportError as error:
        print(f"# Liger is left out: {error}")
        return {}
    gate, up = (half.contiguous() for half in gate_up.chunk(2, -1))
    calls: dict[str, Callable] = {"Liger, halves apart": lambda: liger.LigerSiLUMulFunction.apply(gate, up)}
    if hasattr(liger, "LigerFusedGateUpSiLUMulFunction"):
        calls["Liger, halves as one"] = lambda: liger.LigerFusedGateUpSiLUMulFunction.apply(gate_up)
    return calls


def ours_forward(gate_ups, column_in: bool, column_out: bool) -> Callable:
    return lambda: ops.gated_activation(gate_ups[column_in], "silu", column_major=column_out)


def forward_calls(gate_ups: dict[bool, torch.Tensor]) -> dict[tuple, Callable]:
    """(implementation, layouts) -> call."""
    calls: dict[tuple, Callable] = {}
    for column_in, column_out in MIXES:
        gate_up, plain = gate_ups[column_in], swiglu_laid_out(column_in, column_out)
        static, dynamic = torch.compile(plain, dynamic=False), torch.compile(plain, dynamic=True)
        where = f"{letter(column_in)}/{letter(column_out)}"
        calls["ours", where] = ours_forward(gate_ups, column_in, column_out)
        calls["eager", where] = lambda gate_up=gate_up, run=plain: run(gate_up)
        calls["torch.compile static", where] = lambda gate_up=gate_up, run=static: run(gate_up)
        calls["torch.compile dynamic", where] = lambda gate_up=gate_up, run=dynamic: run(gate_up)
    calls |= {(name, "r/r"): call for name, call in liger_forward(gate_ups[False]).items()}
    return calls


def ours_backward(dhs, gate_ups, mix: tuple[bool, bool, bool], with_h: bool) -> Callable:
    dh, gate_up = dhs[mix[0]], gate_ups[mix[1]]
    return lambda: ops.gated_activation_backward(dh, gate_up, "silu", recompute_h=with_h, column_major=mix[2])


#: layouts of dh, gate_up, and the results
BACKWARD_MIXES = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]


def backward_name(mix: tuple[bool, bool, bool]) -> str:
    return "/".join(map(letter, mix))


def backward_calls(dhs, gate_ups) -> dict[tuple, tuple[float, Callable]]:
    """(op, layouts of dh, gate_up, results) -> (bytes an element of h, call)."""
    calls: dict[tuple, tuple[float, Callable]] = {}
    for with_h, op in ((False, "backward"), (True, "backward + h")):
        traffic = BACKWARD + WITH_H * with_h
        for mix in BACKWARD_MIXES:
            calls[f"{op} ours", backward_name(mix)] = traffic, ours_backward(dhs, gate_ups, mix, with_h)
    dh, gate_up = dhs[False], gate_ups[False]
    seed, d_gate_up = torch.tensor([1, 2], device="cuda"), torch.empty_like(gate_up)
    compiled = torch.compile(swiglu_backward, dynamic=False)

    def apart():
        compiled(dh, gate_up, d_gate_up)
        ops.mvue_compress(d_gate_up, seed)

    calls["backward torch.compile", "r/r/r"] = BACKWARD, lambda: compiled(dh, gate_up, d_gate_up)
    calls["backward + mvue ours", "r/r/r"] = (
        BACKWARD + MVUE,
        lambda: ops.gated_activation_backward_mvue(dh, gate_up, "silu", seed),
    )
    calls["backward + mvue + h ours", "r/r/r"] = (
        BACKWARD + MVUE + WITH_H,
        lambda: ops.gated_activation_backward_mvue(dh, gate_up, "silu", seed, recompute_h=True),
    )
    calls["backward torch.compile, then mvue ours", "r/r/r"] = BACKWARD + MVUE, apart
    return calls


def operands(tokens: int, d_ff: int) -> tuple[dict[bool, torch.Tensor], dict[bool, torch.Tensor]]:
    """dh and gate_up, each row-major (False) and column-major (True)."""
    gate_up = torch.randn(tokens, 2 * d_ff, device="cuda", dtype=torch.bfloat16)
    dh = torch.randn(tokens, d_ff, device="cuda", dtype=torch.bfloat16)
    return {False: dh, True: laid_out(dh, True)}, {False: gate_up, True: laid_out(gate_up, True)}


def counted_cases(tokens: int, d_ff: int) -> list[tuple[str, str, float]]:
    """(op, layouts, ideal bytes) of what `child` counts for a shape, in its order."""
    elements = tokens * d_ff
    cases = [("forward ours", f"{letter(a)}/{letter(b)}", FORWARD * elements) for a, b in MIXES]
    for with_h, op in ((False, "backward ours"), (True, "backward + h ours")):
        cases += [(op, backward_name(mix), (BACKWARD + WITH_H * with_h) * elements) for mix in BACKWARD_MIXES]
    return cases


def child() -> None:
    for _, tokens, d_ff in SHAPES:
        dhs, gate_ups = operands(tokens, d_ff)
        for mix in MIXES:
            counted(ours_forward(gate_ups, *mix))
        for with_h in (False, True):
            for mix in BACKWARD_MIXES:
                counted(ours_backward(dhs, gate_ups, mix, with_h))


def dram_over_ideal() -> dict[tuple[str, str, str], float]:
    """(op, shape, layouts) -> DRAM bytes over those that must move."""
    cases = [(op, name, where, ideal) for name, t, f in SHAPES for op, where, ideal in counted_cases(t, f)]
    kernels = counters("bench.bench_activation", [READ, WRITTEN])
    return {
        (op, name, where): sum(kernel[READ] + kernel[WRITTEN] for kernel in group) / ideal
        for (op, name, where, ideal), group in zip(cases, kernels, strict=True)
    }


def plot(table: Table, folder: Path, copy: float) -> Path:
    """One panel a shape: TB/s of every row of the table, copy as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    panels = {name: [row for row in table.rows if row[1] == name] for name, _, _ in SHAPES}
    figure, axes = plt.subplots(1, len(panels), figsize=(16, 0.24 * len(panels[SHAPES[0][0]]) + 1.4), sharey=True)
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        colors = ["#4477aa" if "ours" in row[0] and "compile" not in row[0] else "#bbbbbb" for row in rows]
        axis.barh(range(len(rows)), [row[4] for row in rows], color=colors)
        axis.axvline(copy, color="black", linewidth=1, linestyle="--")
        axis.set_title(name)
        axis.set_xlabel("TB/s (dashed: copy)")
    labels = [f"{row[0]}  {row[2]}" for row in panels[SHAPES[0][0]]]
    axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"gated activation (SwiGLU, bf16), {torch.cuda.get_device_name()}")
    return save_picture(figure, folder / "activation.png")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--ncu", action="store_true", help="count DRAM bytes too")
    parser.add_argument("--child", action="store_true", help="what ncu runs")
    args = parser.parse_args()
    if args.child:
        return child()
    torch._dynamo.config.recompile_limit = 64  # one entry a shape and layout
    print(header())
    dram = dram_over_ideal() if args.ncu else {}
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    table = open_table(args, "activation", COLUMNS, key=3)
    table.add("copy", "1 GiB", "", 2 * 2**30 / copy / 1e6, copy, 1.0, "")
    for name, tokens, d_ff in SHAPES:
        dhs, gate_ups = operands(tokens, d_ff)
        calls = {(f"forward {op}", where): (FORWARD, call) for (op, where), call in forward_calls(gate_ups).items()}
        calls |= backward_calls(dhs, gate_ups)
        times = time_cold({key: call for key, (_, call) in calls.items()}, rounds=9)
        for (op, where), time_us in times.items():
            rate = calls[op, where][0] * tokens * d_ff / time_us / 1e6
            table.add(op, name, where, time_us, rate, rate / copy, dram.get((op, name, where), ""))
    if args.png:
        print("wrote", plot(table, args.png, copy))


if __name__ == "__main__":
    main()
