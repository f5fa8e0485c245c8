"""Products of a pruned activation and a dense weight, against dense cuBLAS and the same product of a 2:4 weight.

Of a feed-forward layer's d_ff: y = h' W_down^T, and dx = du' W_up, where h and the gradient of what is before the
activation are 2:4 along d_ff. TFLOP/s count the dense product; candidates are interleaved on a GPU that never idles.

    python -m bench.bench_gemm_activations [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.bench_gemm import time_busy
from bench.common import LAYERS, arguments, header, open_table
from sparse24 import ops

COLUMNS = ["layer", "pass", "m", "n", "k", "dense TFLOP/s", "sparse TFLOP/s", "over dense", "over a 2:4 weight"]


def candidates(tokens: int, d_model: int, d_ff: int):
    """(pass, the calls to time) for both products."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    h = torch.randn(tokens, d_ff, **bf16)
    down, up = (torch.randn(*shape, **bf16) * d_ff**-0.5 for shape in ((d_model, d_ff), (d_ff, d_model)))
    rows = ops.prune_compress(h)[1:3]
    packed_down, packed_up = ops.prune_compress(down)[1:3], ops.prune_compress(up)[3:]
    out = h.new_empty(tokens, d_model)
    yield (
        "y down",
        {
            "dense": lambda: torch.mm(h, down.T, out=out),
            "sparse": lambda: ops.sparse_mm_input(*rows, down),
            "weight": lambda: ops.sparse_mm(h, *packed_down, d_model),
        },
    )
    yield (
        "dx up",
        {
            "dense": lambda: torch.mm(h, up, out=out),
            "sparse": lambda: ops.sparse_mm_grad_input_output(*rows, up),
            "weight": lambda: ops.sparse_mm_grad_input(h, *packed_up, d_model),
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
            rates = tflop / us["dense"], tflop / us["sparse"]
            ratios = us["dense"] / us["sparse"], us["weight"] / us["sparse"]
            table.add(name, pass_, tokens, d_model, d_ff, *rates, *ratios)
    if args.png:
        print("wrote", table.plot(args.png, ("layer", "pass"), "over dense", "speed over dense cuBLAS", 1.0))


if __name__ == "__main__":
    main()
