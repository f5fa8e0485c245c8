"""Products of a pruned activation and a dense weight, against dense cuBLAS and the same product of a 2:4 weight.

Of a feed-forward layer's d_ff: y = h' W_down^T, and dx = du' W_up, where h and the gradient of what is before the
activation are 2:4 along d_ff; in bf16, and in e4m3 beside `torch._scaled_mm`. TFLOP/s count the dense product;
candidates are interleaved on a GPU that never idles.

    python -m bench.bench_gemm_activations [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.bench_gemm import time_busy
from bench.common import LAYERS, arguments, header, open_table
from sparse24 import ops
from sparse24.ops import float8

COLUMNS = ["layer", "pass", "m", "n", "k", "dense TFLOP/s", "sparse TFLOP/s", "over dense", "over a 2:4 weight"]
COLUMNS += ["dense e4m3 TFLOP/s", "sparse e4m3 TFLOP/s", "e4m3 over dense e4m3", "e4m3 over dense"]


def candidates(tokens: int, d_model: int, d_ff: int):
    """(pass, the calls to time) for both products."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    h = torch.randn(tokens, d_ff, **bf16)
    down, up = (torch.randn(*shape, **bf16) * d_ff**-0.5 for shape in ((d_model, d_ff), (d_ff, d_model)))
    rows = ops.prune_compress(h)[1:3]
    packed_down, packed_up = ops.prune_compress(down)[1:3], ops.prune_compress(up)[3:]
    out = h.new_empty(tokens, d_model)
    h8, _, scale = float8.quantize_current(h)
    pruned = float8.activation_compress_float8(h, "relu")
    rows8 = *pruned[:2], pruned[4]
    down8, _, down_scale = float8.quantize_current(down)
    _, up8_t, up_scale = float8.quantize_current(up, rows=False, transposed=True)
    yield (
        "y down",
        {
            "dense": lambda: torch.mm(h, down.T, out=out),
            "sparse": lambda: ops.sparse_mm_input(*rows, down),
            "weight": lambda: ops.sparse_mm(h, *packed_down, d_model),
            "dense e4m3": lambda: float8.dense_mm_float8(h8, scale, down8, down_scale),
            "sparse e4m3": lambda: float8.sparse_mm_input_float8(*rows8, down8, down_scale),
        },
    )
    yield (
        "dx up",
        {
            "dense": lambda: torch.mm(h, up, out=out),
            "sparse": lambda: ops.sparse_mm_grad_input_output(*rows, up),
            "weight": lambda: ops.sparse_mm_grad_input(h, *packed_up, d_model),
            "dense e4m3": lambda: float8.dense_mm_float8(h8, scale, up8_t, up_scale),
            "sparse e4m3": lambda: float8.sparse_mm_input_float8(*rows8, up8_t, up_scale),
        },
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    table = open_table(args, "gemm_activations", COLUMNS, key=2)
    for name, tokens, d_model, d_ff in LAYERS:
        for pass_, calls in candidates(tokens, d_model, d_ff):
            us = time_busy(calls, rounds=15, warm_seconds=0.3)
            tflop = 2 * tokens * d_model * d_ff / 1e6
            row = []
            for bits, others in (("", ("dense", "weight")), (" e4m3", ("dense e4m3", "dense"))):
                row += [tflop / us[f"dense{bits}"], tflop / us[f"sparse{bits}"]]
                row += [us[other] / us[f"sparse{bits}"] for other in others]
            table.add(name, pass_, tokens, d_model, d_ff, *row)
    if args.png:
        print("wrote", table.plot(args.png, ("layer", "pass"), "over dense", "speed over dense cuBLAS", 1.0))


if __name__ == "__main__":
    main()
