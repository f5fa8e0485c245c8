"""The three sparse products against dense cuBLAS and cuSPARSELt, hot and interleaved.

TFLOP/s count the dense product. The ceiling is what the sparse kernel reaches on a product of 16384 x 16384 x 16384 in
the same run. cuSPARSELt is called as a PyTorch user can (`torch._cslt_sparse_mm`, algorithm searched); it needs
K-major operands, so it stands in the forward rows, where no copy is needed, only. It plans anew at each call: its ratio
is taken behind a wait on the GPU that hides this.

    python -m bench.bench_gemm [--csv FOLDER] [--append] [--png FOLDER] [--no-cusparselt]
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.common import LAYERS, Table, arguments, copy_bandwidth, header, heat, open_table, save_picture, time_hot
from sparse24 import ops

CEILING = 16384


def products(tokens: int, d_in: int, d_out: int):
    """(pass, m, n, k, dense call, sparse call, operands for cuSPARSELt or None) of one linear layer."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    x, dy = torch.randn(tokens, d_in, **bf16), torch.randn(tokens, d_out, **bf16)
    w = torch.randn(d_out, d_in, **bf16) * d_in**-0.5
    _, packed, E, packed_t, E_t = ops.prune_compress(w)
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([1, 2], device="cuda"))
    y, dx, dw = (torch.empty(*shape, **bf16) for shape in (dy.shape, x.shape, w.shape))
    yield (
        "fwd", d_out, tokens, d_in,
        lambda: torch.mm(x, w.T, out=y), lambda: ops.sparse_mm(x, packed, E, d_out), (w, x),
    )  # fmt: skip
    yield (
        "dX", d_in, tokens, d_out,
        lambda: torch.mm(dy, w, out=dx), lambda: ops.sparse_mm_grad_input(dy, packed_t, E_t, d_in), None,
    )  # fmt: skip
    yield (
        "dW", d_out, d_in, tokens,
        lambda: torch.mm(dy.T, x, out=dw),
        lambda: ops.sparse_mm_grad_weight(packed_dy, E_dy, x, d_out, out=dw), None,
    )  # fmt: skip


def cusparselt(w, x):
    """cuSPARSELt's product for the forward pass, after its own search; None where the build or the shape has none."""
    try:
        # It takes any 2:4 matrix: keep the first two of four.
        pruned = torch.where(torch.arange(w.shape[1], device=w.device) % 4 < 2, w, 0)
        compressed = torch._cslt_compress(pruned)
        algorithm = torch._cslt_sparse_mm_search(compressed, x.T)
        run = lambda: torch._cslt_sparse_mm(compressed, x.T, alg_id=algorithm)  # noqa: E731
        run()
        return run
    except (RuntimeError, AttributeError) as error:
        print(f"# cuSPARSELt: {str(error).splitlines()[0]}")
        return None


def time_busy(candidates: dict[str, Callable], rounds: int, warm_seconds: float) -> dict[str, float]:
    """Median microseconds of a call of each candidate, interleaved, on a GPU that never idles.

    As training runs them: one after the other on a chip at its limit of power. Short products are called several times
    between two events. For candidates whose host cost is below their time on the GPU.
    """
    calls = {}
    for name, run in candidates.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        calls[name] = max(1, min(8, round(5e-4 / (time.perf_counter() - start))))
    heat(warm_seconds)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(10):
        torch.mm(a, a)  # the host gets ahead
    events: dict[str, list] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls[name]):
                run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs) / calls[name]
        for name, pairs in events.items()
    }


def measured_ceiling() -> float:
    """TFLOP/s of the sparse kernel where nothing but its main loop counts."""
    n = CEILING
    forward = next(iter(products(n, n, n)))
    return 2 * n**3 / time_busy({"sparse": forward[5]}, rounds=5, warm_seconds=1.0)["sparse"] / 1e6


def flops_per_byte(m: int, n: int, k: int) -> float:
    """Dense flops of a product over the bytes that it must move: half of lhs with its metadata, rhs and out."""
    return 2 * m * n * k / (m * k * (1 + 1 / 8) + 2 * n * k + 2 * m * n)


def plot_roofline(table: Table, ceiling: float, bandwidth: float, folder: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    intensity = [flops_per_byte(row["m"], row["n"], row["k"]) for row in rows]
    for kind, marker in (("fwd", "o"), ("dX", "s"), ("dW", "^")):
        chosen = [i for i, row in enumerate(rows) if row["pass"].startswith(kind)]
        axes.plot([intensity[i] for i in chosen], [rows[i]["sparse TFLOP/s"] for i in chosen], marker, label=kind)
    axes.plot(intensity, [row["dense TFLOP/s"] for row in rows], "x", color="grey", label="dense cuBLAS")
    reach = [min(intensity) / 2, ceiling / bandwidth, max(intensity) * 1.2]
    axes.plot(reach, [min(ceiling, bandwidth * x) for x in reach], color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(0, ceiling * 1.15)
    axes.set_xlabel("flops (dense count) per byte of memory traffic, at least")
    axes.set_ylabel("TFLOP/s (dense count)")
    axes.set_title(f"sparse GEMM, {torch.cuda.get_device_name()}, hot")
    axes.legend()
    return save_picture(figure, folder / "gemm_roofline.png")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--no-cusparselt", action="store_true")
    args = parser.parse_args()
    print(header())
    ceiling = measured_ceiling()
    print(f"ceiling: {ceiling:.0f} TFLOP/s ({CEILING} cubed)")
    columns = ["layer", "pass", "m", "n", "k", "dense TFLOP/s", "sparse TFLOP/s", "over dense", "over cuSPARSELt"]
    table = open_table(args, "gemm", [*columns, "of ceiling"], key=2)
    ratios: dict[str, list[float]] = {}
    for name, tokens, d_model, d_ff in LAYERS:
        for side, d_in, d_out in (("up", d_model, d_ff), ("down", d_ff, d_model)):
            for kind, m, n, k, dense, sparse, operands in products(tokens, d_in, d_out):
                times = time_busy({"dense": dense, "sparse": sparse}, rounds=15, warm_seconds=0.3)
                over_theirs = math.nan
                theirs = None if operands is None or args.no_cusparselt else cusparselt(*operands)
                if theirs is not None:
                    both = time_hot({"ours": sparse, "theirs": theirs}, rounds=10, warm_seconds=0.1)
                    over_theirs = both["theirs"] / both["ours"]
                tflop = 2 * m * n * k / 1e6
                rate, ratio = tflop / times["sparse"], times["dense"] / times["sparse"]
                table.add(
                    name, f"{kind}_{side}", m, n, k, tflop / times["dense"], rate, ratio, over_theirs, rate / ceiling
                )
                ratios.setdefault(name.split("-")[0], []).append(ratio)
    for family, values in ratios.items():
        print(f"geometric mean over dense, {family}: {math.exp(sum(map(math.log, values)) / len(values)):.3f}")
    if args.png:
        print("wrote", table.plot(args.png, "layer", "over dense", "speed over dense cuBLAS", 1.0))
        print("wrote", plot_roofline(table, ceiling, copy_bandwidth(), args.png))


if __name__ == "__main__":
    main()
