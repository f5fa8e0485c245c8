"""Mask search, flips and gaps, against the copy bandwidth of the same run and other ways to a mask.

Peers    the 90-pattern search in Triton (bench/peers/triton_mask.py), which yields a mask only, and PyTorch's greedy
         tile kernel, which packs both ways but is not exact. `prune_compress` searches and packs both ways in one pass.
Bytes    an element: the weight (2 or 4) and 0.125 of mask; packing adds 2 x 1.125; flips read 0.25; gaps write 0.25.
Checked  before timing: every exact search keeps the same magnitude.

    python -m bench.bench_mask [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bench.common import WEIGHTS, Table, arguments, copy_bandwidth, header, open_table, time_cold
from sparse24 import ops

#: (name, layers, shapes of the weights of a layer) of models whose flips are counted in one call
MODELS = [
    ("gpt2-124M all", 12, ((3072, 768), (768, 3072))),
    ("llama-8B, 8 layers", 8, ((28672, 4096), (4096, 14336))),
]
GREEDY, TRITON, TRITON_FP32 = "greedy tiles (torch)", "90 patterns (Triton)", "90 patterns (Triton, fp32)"


def triton_searches(dtype: torch.dtype) -> dict[str, Callable]:
    """In the weight's own dtype, which is tensor cores for 16 bits, and in fp32."""
    try:
        from bench.peers.triton_mask import TritonMaskSearch
    except ImportError as error:
        print(f"no Triton peer: {error}")
        return {}
    searches = {TRITON: TritonMaskSearch(dtype)}
    if dtype != torch.float32:
        searches[TRITON_FP32] = TritonMaskSearch(torch.float32)
    return searches


def kept_magnitude(w: torch.Tensor, mask: torch.Tensor) -> float:
    return (w.double().abs() * ops.unpack_mask(mask)).sum().item()


def search_candidates(w: torch.Tensor) -> dict[str, Callable]:
    mask, *buffers = ops.prune_compress(w, torch.bfloat16)
    lists = [[w], [mask], *([buffer] for buffer in buffers)]
    candidates = {
        "transposable_mask": lambda: ops.transposable_mask(w),
        "prune_compress": lambda: ops.prune_compress_(*lists),
    }
    for name, search in triton_searches(w.dtype).items():
        ours, theirs = kept_magnitude(w, mask), kept_magnitude(w, search(w))
        assert math.isclose(ours, theirs, rel_tol=1e-6), f"kept magnitudes differ: {ours} and {theirs}, {name}"
        candidates[name] = lambda search=search: search(w)
    if w.dtype == torch.bfloat16:
        candidates[GREEDY] = lambda: torch._sparse_semi_structured_tile(w, "", True)
    return candidates


def bytes_an_element(op: str, itemsize: int) -> float:
    return itemsize + {"prune_compress": 2.375, GREEDY: 2.25, "mask_gap": 0.25}.get(op, 0.125)


def bench_search(table: Table, copy: float) -> None:
    for name, rows, cols in WEIGHTS:
        for dtype in (torch.bfloat16, torch.float32):
            w = torch.randn(rows, cols, device="cuda", dtype=dtype)
            times = time_cold(search_candidates(w))
            for op, time_us in times.items():
                rate = bytes_an_element(op, dtype.itemsize) * rows * cols / time_us / 1e6
                over = [times.get(peer, math.nan) / time_us for peer in (TRITON, GREEDY)]
                table.add(op, name, str(dtype)[6:], time_us, rate, rate / copy, *over)


def bench_monitoring(table: Table, copy: float) -> None:
    """What the flip-rate monitor costs: flips of all layers in one call, gaps of one."""
    for name, rows, cols in WEIGHTS:
        w = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
        time_us = time_cold({"mask_gap": lambda w=w: ops.mask_gap(w)}, rounds=5)["mask_gap"]
        rate = bytes_an_element("mask_gap", 2) * rows * cols / time_us / 1e6
        table.add("mask_gap", name, "bfloat16", time_us, rate, rate / copy, math.nan, math.nan)
    for name, layers, shapes in MODELS:
        weights = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for _ in range(layers) for s in shapes]
        masks = [[ops.transposable_mask(sign * w + 0.5) for w in weights] for sign in (1, -1)]
        time_us = time_cold({"flips": lambda masks=masks: ops.foreach_mask_flips(*masks)})["flips"]
        rate = 2 * sum(mask.numel() * 2 for mask in masks[0]) / time_us / 1e6
        table.add("mask_flips", name, "", time_us, rate, rate / copy, math.nan, math.nan)


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    columns = ["op", "weight", "dtype", "time_us", "TB/s", "share of copy", "over Triton", "over greedy"]
    table = open_table(args, "mask", columns, key=3)
    bench_search(table, copy)
    bench_monitoring(table, copy)
    if args.png:
        print("wrote", table.plot(args.png, "op", "share of copy", "share of copy bandwidth", 0.85))


if __name__ == "__main__":
    main()
