"""Pruning and packing for CUTLASS' products of sm_80 in one Triton kernel, as published 2:4 training does it.

A dense matrix, row- or column-major, becomes its kept values, laid out as it is, and 16-bit metadata, a word for 16
columns, in the order that CUTLASS' kernels of sm_80 read. What is kept: by a mask of 4x4 blocks, or two of four along a
row by MVUE, by the rule of triton_mvue.py with draws of five rounds of Philox.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = [
    triton.Config({"ROWS": rows, "WORDS": words}, num_warps=4) for rows, words in ((1, 128), (4, 64), (32, 8), (128, 1))
]


@triton.jit
def kept_by_mvue(a0, a1, a2, a3, u):
    """Which two of four are kept, and what the magnitude of a kept one is at least."""
    b0, b1, b2, b3 = tl.abs(a0), tl.abs(a1), tl.abs(a2), tl.abs(a3)
    left, right = b0 + b1, b2 + b3
    base = tl.minimum(0.5 * (left + right), tl.minimum(right + tl.minimum(b0, b1), left + tl.minimum(b2, b3)))
    from_right, from_left = u * base, (1.0 - u) * base
    three, two = b3 > from_right, right > from_right
    zero, one = b0 >= from_left, left >= from_left
    first_is_one, second_is_two = one & ~zero, two & ~three
    return zero, first_is_one | (~two & ~first_is_one), second_is_two | (~one & ~second_is_two), three, base


@triton.jit
def signed(a, base):
    value = tl.maximum(tl.abs(a), base)
    return tl.where(a < 0, -value, value)


@triton.autotune(CONFIGS, key=["COLUMN_MAJOR", "TRANSPOSED", "MVUE"])
@triton.jit
def pack_kernel(
    dense, values, meta, mask, seed, rows, cols, row_stride, col_stride, value_row_stride, value_col_stride,
    mask_row_stride, mask_col_stride, COLUMN_MAJOR: tl.constexpr, TRANSPOSED: tl.constexpr, MVUE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    word = (tl.program_id(1) * WORDS + tl.arange(0, WORDS))[None, :]
    inside = (row < rows) & (word < cols // 16)
    bits = tl.zeros([ROWS, WORDS], dtype=tl.int32)
    if MVUE:  # one call of the generator for 16 columns
        draws = tl.rand4x(tl.load(seed), row * (cols // 16) + word, n_rounds=5)
    for quad in tl.static_range(4):
        group = 4 * word + quad
        at = dense + row.to(tl.int64) * row_stride + 4 * group.to(tl.int64) * col_stride
        a0 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        a1 = tl.load(at + col_stride, mask=inside, other=0.0).to(tl.float32)
        a2 = tl.load(at + 2 * col_stride, mask=inside, other=0.0).to(tl.float32)
        a3 = tl.load(at + 3 * col_stride, mask=inside, other=0.0).to(tl.float32)
        if MVUE:
            k0, k1, k2, k3, base = kept_by_mvue(a0, a1, a2, a3, draws[quad])
            a0, a1, a2, a3 = signed(a0, base), signed(a1, base), signed(a2, base), signed(a3, base)
        else:
            block = tl.load(mask + (row // 4) * mask_row_stride + group * mask_col_stride, mask=inside, other=0)
            block = block.to(tl.int32)
            if TRANSPOSED:  # bit 4 * i + j is element (i, j) of the block as the weight has it
                k0, k1 = (block >> (row % 4)) & 1 != 0, (block >> (4 + row % 4)) & 1 != 0
                k2, k3 = (block >> (8 + row % 4)) & 1 != 0, (block >> (12 + row % 4)) & 1 != 0
            else:
                line = block >> (4 * (row % 4))
                k0, k1, k2, k3 = line & 1 != 0, line & 2 != 0, line & 4 != 0, line & 8 != 0
        a0, a1 = tl.where(k0, a0, 0.0), tl.where(k1, a1, 0.0)
        a2, a3 = tl.where(k2, a2, 0.0), tl.where(k3, a3, 0.0)
        first = tl.where(k0, 0, tl.where(k1, 1, 2))
        second = tl.where(k3 | (first == 2), 3, tl.where(k2, 2, tl.where(first == 0, 1, 3)))
        low = tl.where(first == 0, a0, tl.where(first == 1, a1, a2))
        high = tl.where(second == 3, a3, tl.where(second == 2, a2, a1))
        to = values + row.to(tl.int64) * value_row_stride + 2 * group.to(tl.int64) * value_col_stride
        tl.store(to, low, mask=inside)
        tl.store(to + value_col_stride, high, mask=inside)
        bits |= (first | (second << 2)) << (4 * quad)
    # CUTLASS' order: rows of 32 exchanged, 2x2 blocks of words turned, columns of words in pairs.
    to_row = row // 32 * 32 + (row % 8) * 4 + (row % 32) // 8
    turn = (word % 2) - (to_row % 2)
    to_row, to_word = to_row + turn, word - turn
    tl.store(meta + (to_word // 2) * (2 * rows) + to_row * 2 + to_word % 2, bits.to(tl.int16), mask=inside)


def _pack(dense: Tensor, mask: Tensor | None, seed: Tensor | None, transposed: bool) -> tuple[Tensor, Tensor]:
    rows, cols = dense.shape
    assert rows % 32 == 0 and cols % 64 == 0, f"sizes that CUTLASS' kernels refuse: {rows} x {cols}"
    values, column_major = torch.empty(rows, cols // 2, dtype=torch.float16, device=dense.device), dense.stride(1) != 1
    if column_major:
        values = torch.empty(cols // 2, rows, dtype=torch.float16, device=dense.device).t()
    meta = torch.empty(rows, cols // 16, dtype=torch.int16, device=dense.device)
    mask_strides = mask.stride() if mask is not None else (0, 0)
    pack_kernel[lambda config: (triton.cdiv(rows, config["ROWS"]), triton.cdiv(cols // 16, config["WORDS"]))](
        dense, values, meta, mask, seed, rows, cols, *dense.stride(), *values.stride(), *mask_strides,
        COLUMN_MAJOR=column_major, TRANSPOSED=transposed, MVUE=mask is None,
    )  # fmt: skip
    return values, meta


def pack_by_mask(dense: Tensor, mask: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """dense [rows, cols], mask uint16 [rows/4, cols/4] -> fp16 values [rows, cols/2] and metadata [rows, cols/16].

    transposed  dense is the transposed weight, mask still that of the weight as it is
    """
    mask = mask.view(torch.int16)
    return _pack(dense, mask.t() if transposed else mask, None, transposed)


def pack_by_mvue(dense: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The same, two of four along a row drawn without bias; seed int64 on the same GPU."""
    return _pack(dense, None, seed, False)
