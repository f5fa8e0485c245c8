"""Mask search and packing against the copy bandwidth of the same run and PyTorch's greedy tile kernel.

Bytes an element: the weight (2 or 4), packed and packed_t with metadata (1.125 each), the mask (0.125).

    python -m bench.bench_packing [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import torch

from bench.common import WEIGHTS, arguments, copy_bandwidth, header, open_table, time_cold
from sparse24 import ops


def greedy_tile_kernel(w):
    """PyTorch's own: greedy, both orientations, 16-bit, sizes in multiples of 32."""
    return lambda: torch._sparse_semi_structured_tile(w, "", True)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    columns = ["op", "weight", "dtype", "time_us", "TB/s", "share of copy", "over greedy"]
    table = open_table(args, "packing", columns, key=3)
    for name, rows, cols in WEIGHTS:
        for dtype in (torch.bfloat16, torch.float32):
            w = torch.randn(rows, cols, device="cuda", dtype=dtype)
            mask, *buffers = ops.prune_compress(w, torch.bfloat16)
            lists = [[w], [mask], *([buffer] for buffer in buffers)]
            candidates = {
                "prune_compress": lambda lists=lists: ops.prune_compress_(*lists),
                "compress": lambda lists=lists: ops.compress_(*lists),
                "transposable_mask": lambda w=w: ops.transposable_mask(w),
            }
            if dtype == torch.bfloat16:
                candidates["greedy (torch)"] = greedy_tile_kernel(w)
            times = time_cold(candidates)
            greedy = times.get("greedy (torch)", float("nan"))
            size = dtype.itemsize
            traffic = {"prune_compress": size + 2.375, "compress": size + 2.375, "transposable_mask": size + 0.125}
            traffic["greedy (torch)"] = size + 2.25
            for op, time_us in times.items():
                rate = traffic[op] * rows * cols / time_us / 1e6
                table.add(op, name, str(dtype)[6:], time_us, rate, rate / copy, greedy / time_us)

    # All FFN weights of a small model in one call, as the recipe packs them.
    weights = [
        torch.randn(s, device="cuda", dtype=torch.bfloat16) for _ in range(12) for s in ((3072, 768), (768, 3072))
    ]
    packed = [ops.prune_compress(w) for w in weights]
    lists = [weights, *map(list, zip(*packed, strict=True))]
    times = time_cold(
        {"prune_compress": lambda: ops.prune_compress_(*lists), "compress": lambda: ops.compress_(*lists)}
    )
    for op, time_us in times.items():
        rate = 4.375 * sum(w.numel() for w in weights) / time_us / 1e6
        table.add(f"{op} x24", "gpt2-124M all", "bfloat16", time_us, rate, rate / copy, float("nan"))
    if args.png:
        print("wrote", table.plot(args.png, "op", "share of copy", "share of copy bandwidth", 0.85))


if __name__ == "__main__":
    main()
