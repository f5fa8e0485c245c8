"""The three sparse products against dense cuBLAS and cuSPARSELt, hot and interleaved.

TFLOP/s count the dense product. cuSPARSELt is called as a PyTorch user can (`torch._cslt_sparse_mm`, algorithm
searched); it needs K-major operands, so it stands in the forward rows, where no copy is needed, only.

    python -m bench.bench_gemm [--csv FOLDER] [--png FOLDER] [--no-cusparselt]
"""

from __future__ import annotations

import math

import torch

from bench.common import LAYERS, Table, arguments, header, time_hot
from sparse24 import ops


def passes(tokens: int, d_in: int, d_out: int):
    """(pass, m, n, k, dense call, sparse call) of one linear layer."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    x, dy = torch.randn(tokens, d_in, **bf16), torch.randn(tokens, d_out, **bf16)
    w = torch.randn(d_out, d_in, **bf16) * d_in**-0.5
    _, packed, E, packed_t, E_t = ops.prune_compress(w)
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([1, 2], device="cuda"))
    y, dx = torch.empty(tokens, d_out, **bf16), torch.empty(tokens, d_in, **bf16)
    dw = torch.empty(d_out, d_in, **bf16)
    yield (
        "fwd",
        d_out,
        tokens,
        d_in,
        lambda: torch.mm(x, w.T, out=y),
        lambda: ops.sparse_mm(x, packed, E, d_out),
        (w, x),
    )
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


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--no-cusparselt", action="store_true")
    args = parser.parse_args()
    print(header())
    table = Table(
        "gemm", ["layer", "pass", "m", "n", "k", "dense TFLOP/s", "sparse TFLOP/s", "over dense", "over cuSPARSELt"]
    )
    ratios: dict[str, list[float]] = {}
    for name, tokens, d_model, d_ff in LAYERS:
        for side, d_in, d_out in (("up", d_model, d_ff), ("down", d_ff, d_model)):
            for pass_name, m, n, k, dense, sparse, operands in passes(tokens, d_in, d_out):
                candidates = {"dense": dense, "sparse": sparse}
                if operands is not None and not args.no_cusparselt:
                    theirs = cusparselt(*operands)
                    if theirs is not None:
                        candidates["cusparselt"] = theirs
                times = time_hot(candidates, rounds=15, warm_seconds=0.3)
                tflop = 2 * m * n * k / 1e6
                ratio = times["dense"] / times["sparse"]
                over_cslt = times["cusparselt"] / times["sparse"] if "cusparselt" in times else math.nan
                table.add(
                    name,
                    f"{pass_name}_{side}",
                    m,
                    n,
                    k,
                    tflop / times["dense"],
                    tflop / times["sparse"],
                    ratio,
                    over_cslt,
                )
                ratios.setdefault(name.split("-")[0], []).append(ratio)
    for family, values in ratios.items():
        print(f"geometric mean over dense, {family}: {math.exp(sum(map(math.log, values)) / len(values)):.3f}")
    if args.csv:
        print("wrote", table.write(args.csv))
    if args.png:
        print("wrote", table.plot(args.png, "layer", "over dense", "speed over dense cuBLAS", 1.0))


if __name__ == "__main__":
    main()
