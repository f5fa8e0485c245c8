"""Shapes and orders of the data that ops exchange. Plain integers and torch, no compiled code.

Terms: `mask` has one uint16 per 4x4 block, bit 4*i + j set when element (i, j) is kept. `packed` is the kept half of
the values; `E` their positions in the byte order of the sparse tensor cores (csrc/common/metadata.h has the same
formulas).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .errors import Sparse24Error

BLOCK = 4  # a mask block is 4x4
META_BLOCK = 64  # E is written in blocks of 64 (m) x 64 (k) elements, 512 bytes each
PADDING_NIBBLE = 0x4  # positions 0 and 1

#: dtype codes of the C++ library (csrc/include/sparse24/types.h)
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HALF_DTYPES = (torch.bfloat16, torch.float16)

#: the three products, and forward with an activation, plain or gated: `GemmPass` of the C++ library
#: (csrc/include/sparse24/gemm.h)
FORWARD, GRAD_INPUT, GRAD_WEIGHT, ACTIVATED_FORWARD, GATED_FORWARD = 0, 1, 2, 3, 4


def round_up(value: int, step: int) -> int:
    return (value + step - 1) // step * step


def metadata_bytes(m: int, k: int) -> int:
    """Bytes of E for a sparse operand of m rows and k dense columns: both padded to 64, one bit an element."""
    return round_up(m, META_BLOCK) * round_up(k, META_BLOCK) // 8


def padded_tokens(tokens: int) -> int:
    """Rows of a gradient after padding for MVUE: a multiple of 8, one byte of metadata."""
    return round_up(tokens, 8)


def is_row_major(t: Tensor) -> bool:
    return t.dim() == 2 and (t.stride(1) == 1 or t.shape[1] <= 1) and t.stride(0) >= t.shape[1]


def is_column_major(t: Tensor) -> bool:
    return t.dim() == 2 and (t.stride(0) == 1 or t.shape[0] <= 1) and t.stride(1) >= t.shape[0]


def as_major(t: Tensor) -> Tensor:
    """`t` itself where it is row- or column-major, else a row-major copy (sliced, expanded, overlapping views)."""
    return t if is_row_major(t) or is_column_major(t) else t.contiguous()


def as_rows(t: Tensor) -> Tensor:
    """[..., n] as a row-major [-1, n] that GEMMs can read: unit column stride, 16-byte aligned rows where possible."""
    rows = t if t.dim() == 2 else t.unsqueeze(0) if t.dim() < 2 else t.flatten(0, -2)  # also where the last is 0
    if rows.shape[0] == 1 and rows.stride(0) != rows.shape[1]:  # a single row may have any stride to the next
        rows = rows.as_strided(rows.shape, (rows.shape[1], rows.stride(1)))
    if rows.is_contiguous() or (is_row_major(rows) and rows.stride(0) * rows.element_size() % 16 == 0):
        return rows
    return rows.contiguous()


def mask_as_uint16(mask: Tensor) -> Tensor:
    """A mask as ops take it, from either form: uint16 [rows/4, cols/4], or its uint8 view [rows/4, cols/2].

    Raises Sparse24Error for bytes that are not whole uint16 in rows.
    """
    if mask.dtype != torch.uint8:
        return mask
    if mask.dim() != 2 or mask.shape[1] % 2 or not mask.is_contiguous() or mask.storage_offset() % 2:
        raise Sparse24Error(
            f"a mask of bytes must be contiguous, begin at an even byte and have shape (rows/4, cols/2), got shape "
            f"{tuple(mask.shape)}, strides {mask.stride()}, offset {mask.storage_offset()}"
        )
    if mask.numel() == 0:  # whose strides may be any
        return mask.new_empty((mask.shape[0], mask.shape[1] // 2), dtype=torch.uint16)
    return mask.view(torch.uint16)


@lru_cache(maxsize=64)
def metadata_order(m: int, k: int) -> Tensor:
    """int64 [m64, k64 // 8]: offset in E of the byte for elements (row, 8*col .. 8*col + 7); extents padded to 64."""
    rows = torch.arange(round_up(m, META_BLOCK)).unsqueeze(1)
    cols = torch.arange(0, round_up(k, META_BLOCK), 8).unsqueeze(0)
    return (
        (cols // 64) * 8 * rows.shape[0]
        + (rows // 64) * 512
        + (rows % 64 // 16) * 128
        + (cols // 16 % 2) * 64
        + (rows % 8) * 8
        + (cols // 32 % 2) * 4
        + (rows // 8 % 2) * 2
        + (cols % 16) // 8
    )
