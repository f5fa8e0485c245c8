"""Activations pruned to 2:4 and packed, forward and backward, against the copy bandwidth of the same run.

Beside ours: the parts that other code would take, where we have them: the activation (or its backward) as a pass of its
own, and `mvue_compress` of the result. They leave out the pruning along features, so their sum is a lower bound.

Bytes an element: forward reads 2 and writes 1.125 along features, with a seed 1.125 more along tokens; backward
reads 4, and writes 1 and 1.125. To e4m3 the scale is found first, which reads all operands once more, and half of the
values' bytes are written.

    python -m bench.bench_activation_packing [--csv FOLDER] [--append]
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.common import arguments, copy_bandwidth, header, open_table, time_cold
from sparse24 import ops
from sparse24.ops import float8

SHAPES = [("16384 x 16384", 16384, 16384), ("llama-7B", 8192, 11008)]
COLUMNS = ["op", "shape", "dtype", "kind", "time_us", "GB/s", "share of copy"]
FORWARD, BACKWARD, ALONG_TOKENS = 3.125, 5.0, 1.125
FORWARD_FLOAT8, BACKWARD_FLOAT8 = 2 + 3.25, 4 + 5.125  # both along tokens, too


def calls(u: torch.Tensor, dh: torch.Tensor, kind: str) -> dict[str, tuple[float, Callable]]:
    """op -> (bytes an element, call)."""
    seed = torch.tensor([1, 2], device="cuda")
    return {
        "forward": (FORWARD + ALONG_TOKENS, lambda: ops.activation_compress(u, kind, seed)),
        "forward, along features alone": (FORWARD, lambda: ops.activation_compress(u, kind)),
        "backward": (BACKWARD + ALONG_TOKENS, lambda: ops.activation_backward_compress(dh, u, kind, seed)),
        "backward with db": (
            BACKWARD + ALONG_TOKENS,
            lambda: ops.activation_backward_compress(dh, u, kind, seed, bias_grad=True),
        ),
        "backward, along features alone": (BACKWARD, lambda: ops.activation_backward_compress(dh, u, kind)),
        "forward to e4m3": (FORWARD_FLOAT8, lambda: float8.activation_compress_float8(u, kind, seed)),
        "backward to e4m3": (BACKWARD_FLOAT8, lambda: float8.activation_backward_compress_float8(dh, u, kind, seed)),
        "activation alone": (4.0, lambda: ops.activation(u, kind)),
        "activation_backward alone": (6.0, lambda: ops.activation_backward(dh, u, kind)),
        "mvue_compress alone": (3.125, lambda: ops.mvue_compress(dh, seed)),
    }


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    table = open_table(args, "activation_packing", COLUMNS, key=4)
    for name, tokens, d_ff in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            u, dh = (torch.randn(tokens, d_ff, device="cuda", dtype=dtype) for _ in range(2))
            for kind in ("squared_relu", "relu"):
                named = calls(u, dh, kind)
                for op, time_us in time_cold({op: call for op, (_, call) in named.items()}).items():
                    rate = named[op][0] * tokens * d_ff / time_us / 1e3
                    table.add(op, name, str(dtype)[6:], kind, time_us, rate, rate / copy / 1e3)


if __name__ == "__main__":
    main()
