"""What a weight gradient's product does beside multiplying: add to an existing gradient, or masked decay.

`accumulate` adds to what is in `out`, as the second micro-batch of a step does; `decay` adds masked decay of the
weight, as `Recipe(decay_in="backward")` asks for. Either would otherwise be a pass of its own behind the product:
`add_` and `masked_decay_`. Of the up projection of each layer. Hot chip, candidates interleaved.

    python -m bench.bench_grad_weight [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.common import arguments, header, open_table, time_hot
from sparse24 import ops
from sparse24.benchmark.suite import LAYERS

COLUMNS = ["shape", "dW", "product_us", "accumulate_us", "add pass_us", "decay_us", "decay pass_us", "both_us"]
COLUMNS += ["accumulate over product", "decay over product"]


def candidates(tokens: int, d_model: int, rows: int, dtype: torch.dtype):
    """The calls to time, by the names of the table's columns."""
    x = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16)
    packed_dy, E_dy = ops.mvue_compress(
        torch.randn(tokens, rows, device="cuda", dtype=torch.bfloat16), torch.tensor([1, 2], device="cuda")
    )
    w = torch.randn(rows, d_model, device="cuda", dtype=dtype)
    mask = ops.transposable_mask(w)
    factor = torch.tensor([1e-5], device="cuda")
    dw, more = torch.zeros_like(w), torch.zeros_like(w)
    decay = (factor, [w], [mask])

    def product(**settings):
        return lambda: ops.sparse_mm_grad_weight(packed_dy, E_dy, x, rows, out=dw, **settings)

    return {
        "product": product(),
        "accumulate": product(accumulate=True),
        "add pass": lambda: dw.add_(more),
        "decay": product(decay=decay),
        "decay pass": lambda: ops.foreach_masked_decay_([dw], [w], [mask], 1e-5),
        "both": product(accumulate=True, decay=decay),
    }


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    table = open_table(args, "grad_weight", COLUMNS, key=2)
    for layer in LAYERS:
        rows = layer.d_ff * (2 if layer.gated else 1)
        for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            time_us = time_hot(
                candidates(layer.tokens, layer.d_model, rows, dtype), rounds=15, warm_seconds=0.5, calls=3
            )
            ratios = (time_us[name] / time_us["product"] for name in ("accumulate", "decay"))
            table.add(layer.name, label, *time_us.values(), *ratios)
    if args.png:
        print("wrote", table.plot(args.png, ("shape", "dW"), "accumulate over product", "accumulating product", 1.0))


if __name__ == "__main__":
    main()
