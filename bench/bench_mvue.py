"""MVUE packing of output gradients and masked decay, against the copy bandwidth of the same run.

Bytes an element: MVUE reads 2 and writes 1.125; masked decay reads 2 + 2 + 0.125 and writes 2 (bf16), or twice that.

    python -m bench.bench_mvue [--csv FOLDER] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.common import GRADIENTS, WEIGHTS, Table, arguments, copy_bandwidth, header, time_cold
from sparse24 import ops


def mvue_calls(tokens: int, features: int) -> dict:
    seed = torch.tensor([1, 2], device="cuda")
    dy = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    column = dy.t().contiguous().t()
    return {"row": lambda: ops.mvue_compress(dy, seed), "column": lambda: ops.mvue_compress(column, seed)}


def decay_call(rows: int, cols: int, dtype: torch.dtype) -> dict:
    w = torch.randn(rows, cols, device="cuda", dtype=dtype)
    grad, mask = torch.randn_like(w), ops.transposable_mask(w)
    return {str(dtype)[6:]: lambda: ops.masked_decay_(grad, w, mask, 1e-4)}


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    table = Table("mvue", ["op", "shape", "layout", "time_us", "TB/s", "share of copy"])
    for name, tokens, features in GRADIENTS:
        for layout, time_us in time_cold(mvue_calls(tokens, features)).items():
            rate = 3.125 * tokens * features / time_us / 1e6
            table.add("mvue_compress", name, layout, time_us, rate, rate / copy)
    for name, rows, cols in WEIGHTS:
        for dtype in (torch.bfloat16, torch.float32):
            for label, time_us in time_cold(decay_call(rows, cols, dtype)).items():
                rate = (3 * dtype.itemsize + 0.125) * rows * cols / time_us / 1e6
                table.add("masked_decay_", name, label, time_us, rate, rate / copy)
    if args.csv:
        print("wrote", table.write(args.csv))
    if args.png:
        print("wrote", table.plot(args.png, "shape", "share of copy", "share of copy bandwidth", 0.85))


if __name__ == "__main__":
    main()
