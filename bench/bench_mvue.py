"""MVUE packing of output gradients and masked decay, against the copy bandwidth of the same run.

Bytes an element: MVUE reads 2 and writes 1.125; masked decay reads 2 + 2 + 0.125 and writes 2 (bf16), or twice that.

    python -m bench.bench_mvue [--csv FOLDER] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.common import GRADIENTS, WEIGHTS, Table, arguments, copy_bandwidth, header, time_cold
from sparse24 import ops


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    table = Table("mvue", ["op", "shape", "layout", "time_us", "TB/s", "share of copy"])
    seed = torch.tensor([1, 2], device="cuda")
    for name, tokens, features in GRADIENTS:
        dy = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
        column = dy.t().contiguous().t()
        times = time_cold({"row": lambda: ops.mvue_compress(dy, seed), "column": lambda: ops.mvue_compress(column, seed)})
        for layout, time_us in times.items():
            rate = 3.125 * dy.numel() / time_us / 1e6
            table.add("mvue_compress", name, layout, time_us, rate, rate / copy)
    for name, rows, cols in WEIGHTS:
        for dtype in (torch.bfloat16, torch.float32):
            w = torch.randn(rows, cols, device="cuda", dtype=dtype)
            grad, mask = torch.randn_like(w), ops.transposable_mask(w)
            time_us = time_cold({"": lambda: ops.masked_decay_(grad, w, mask, 1e-4)})[""]
            rate = (3 * dtype.itemsize + 0.125) * w.numel() / time_us / 1e6
            table.add("masked_decay_", name, str(dtype)[6:], time_us, rate, rate / copy)
    if args.csv:
        print("wrote", table.write(args.csv))
    if args.png:
        print("wrote", table.plot(args.png, "shape", "share of copy", "share of copy bandwidth", 0.85))


if __name__ == "__main__":
    main()
