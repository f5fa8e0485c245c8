"""MVUE packing of output gradients and masked decay, against the copy bandwidth of the same run.

Peer     MVUE in Triton (bench/peers/triton_mvue.py): the same probabilities; its result is dense, not packed.
Bytes    an element: MVUE reads 2 and writes 1.125, the peer 2 and 2; masked decay reads 2 + 2 + 0.125 and writes 2
         (bf16), or twice that.
Checked  before timing: the peer keeps two of four wherever two are not zero, and so do we.

    python -m bench.bench_mvue [--csv FOLDER] [--append] [--png FOLDER]
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bench.common import GRADIENTS, WEIGHTS, arguments, copy_bandwidth, header, open_table, time_cold
from sparse24 import ops

OURS, TRITON = "mvue_compress", "dense MVUE (Triton)"
BYTES = {OURS: 3.125, TRITON: 4.0}


def triton_mvue() -> Callable | None:
    try:
        from bench.peers.triton_mvue import mvue_dense
    except ImportError as error:
        print(f"no Triton peer: {error}")
        return None
    return mvue_dense


def check_two_are_kept(dy: torch.Tensor, pruned: torch.Tensor, name: str, tolerance: float = 0.0) -> None:
    nonzero, kept = ((x != 0).view(-1, 4, dy.shape[1]).sum(1) for x in (dy, pruned))
    wrong = (kept != nonzero.clamp(max=2)).double().mean().item()
    assert wrong <= tolerance, f"{name} keeps other than two in {wrong:.1e} of the groups"


def mvue_calls(tokens: int, features: int, peer: Callable | None) -> dict:
    seed = torch.tensor([1, 2], device="cuda")
    row = torch.randn(tokens, features, device="cuda", dtype=torch.bfloat16)
    column = row.t().contiguous().t()
    calls = {}
    for layout, dy in (("row", row), ("column", column)):
        calls[OURS, layout] = lambda dy=dy: ops.mvue_compress(dy, seed)
        if peer is not None:
            calls[TRITON, layout] = lambda dy=dy: peer(dy, seed)
    head = row[:1024]
    check_two_are_kept(head, ops.decompress(*ops.mvue_compress(head, seed), 1024, features, transposed=True), OURS)
    if peer is not None:
        check_two_are_kept(head, peer(head, seed), TRITON, 1e-5)  # it takes fp32 sums as they come
    return calls


def decay_call(rows: int, cols: int, dtype: torch.dtype) -> dict:
    w = torch.randn(rows, cols, device="cuda", dtype=dtype)
    grad, mask = torch.randn_like(w), ops.transposable_mask(w)
    return {str(dtype)[6:]: lambda: ops.masked_decay_(grad, w, mask, 1e-4)}


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    copy = copy_bandwidth()
    print(f"copy bandwidth {copy:.2f} TB/s")
    peer = triton_mvue()
    columns = ["op", "shape", "layout", "time_us", "TB/s", "share of copy", "x Triton"]
    table = open_table(args, "mvue", columns, key=3)
    for name, tokens, features in GRADIENTS:
        times = time_cold(mvue_calls(tokens, features, peer))
        for (op, layout), time_us in times.items():
            rate = BYTES[op] * tokens * features / time_us / 1e6
            table.add(op, name, layout, time_us, rate, rate / copy, times.get((TRITON, layout), math.nan) / time_us)
    for name, rows, cols in WEIGHTS:
        for dtype in (torch.bfloat16, torch.float32):
            for label, time_us in time_cold(decay_call(rows, cols, dtype)).items():
                rate = (3 * dtype.itemsize + 0.125) * rows * cols / time_us / 1e6
                table.add("masked_decay_", name, label, time_us, rate, rate / copy, math.nan)
    if args.png:
        print("wrote", table.plot(args.png, "shape", "share of copy", "share of copy bandwidth", 0.85))


if __name__ == "__main__":
    main()
