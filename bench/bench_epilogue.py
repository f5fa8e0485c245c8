"""What the activation in the epilogue of the up product saves: the forward pass of a feed-forward layer both ways.

`separate` is the product, a pass over what it wrote, and the down product; `fused` makes h in the product's epilogue.
Training keeps what the activation read, so that both write it. Hot chip, candidates interleaved.

    python -m bench.bench_epilogue [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.common import arguments, header, open_table, time_hot
from sparse24 import ops
from sparse24.benchmark.suite import LAYERS

COLUMNS = ["shape", "activation", "product_us", "pass_us", "product + pass_us", "fused product_us"]
COLUMNS += ["forward separate_us", "forward fused_us", "forward gain"]


def sparse_weight(rows: int, cols: int):
    """Packed values and metadata of a random weight."""
    w = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * cols**-0.5
    return ops.prune_compress(w)[1:3]


def candidates(tokens: int, d_model: int, d_ff: int, gated: bool, kind: str):
    """The calls to time, by the names of the table's columns."""
    rows = 2 * d_ff if gated else d_ff
    x = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16)
    up, down = sparse_weight(rows, d_model), sparse_weight(d_model, d_ff)
    activation = ops.gated_activation if gated else ops.activation
    made = ops.sparse_mm(x, *up, rows)

    def product():
        return ops.sparse_mm(x, *up, rows)

    def separate():
        y = product()
        return y, activation(y, kind)

    def fused():
        if gated:
            return ops.sparse_mm_gated_activation(x, *up, d_ff, kind)
        return ops.sparse_mm_activation(x, *up, rows, kind)

    return {
        "product": product,
        "pass": lambda: activation(made, kind),
        "product + pass": separate,
        "fused product": fused,
        "forward separate": lambda: ops.sparse_mm(separate()[1], *down, d_model),
        "forward fused": lambda: ops.sparse_mm(fused()[1], *down, d_model),
    }


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    table = open_table(args, "epilogue", COLUMNS, key=2)
    for layer in LAYERS:
        kind = "silu" if layer.gated else "gelu_tanh"
        calls = candidates(layer.tokens, layer.d_model, layer.d_ff, layer.gated, kind)
        time_us = time_hot(calls, rounds=15, warm_seconds=1.0, calls=3)
        gain = time_us["forward separate"] / time_us["forward fused"] - 1
        table.add(layer.name, f"gated {kind}" if layer.gated else kind, *time_us.values(), gain)
    if args.png:
        print("wrote", table.plot(args.png, "shape", "forward gain", "forward pass, gain of the epilogue", 0.0))


if __name__ == "__main__":
    main()
