"""Shapes and orders of the data that ops exchange. Plain integers and torch, no compiled code.

Terms: `mask` has one uint16 per 4x4 block, bit 4*i + j set when element (i, j) is kept. `packed` is the kept half of
the values; `E` their positions in the byte order of the sparse tensor cores (csrc/common/metadata.h has the same
formulas). Every rule on element formats goes through one table, `FORMATS`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import Sparse24Error

BLOCK = 4  # a mask block is 4x4
META_BLOCK = 64  # rows of m in one block of E; along k it is the K tile of a format
PADDING_NIBBLE = 0x4  # positions 0 and 1


class Format(NamedTuple):
    """What packed values of a dtype are, and who multiplies them. csrc/common/format.h is the twin of this table.

    dtype        of an element
    code         of the C++ library (csrc/include/sparse24/types.h); -1: it does not know the dtype
    runs_on      the fastest backend that multiplies it: "cuda" (sparse tensor cores), "cpu" or "reference"
    bytes        of an element
    meta_tile_k  extent along k of a block of E, in elements
    token_step   tokens of a pruned gradient are padded to a multiple of this
    mn_major     may a packed operand lie along m, [k/2, m]? Else [m, k/2] only
    scaled       values are x / scale, one power of two for a tensor
    wide         dtype of products of such values, and of what is computed beside them, unless that is float32;
                 None: `dtype` itself
    """

    dtype: torch.dtype
    code: int
    runs_on: str
    bytes: int
    meta_tile_k: int = 64
    token_step: int = 8
    mn_major: bool = True
    scaled: bool = False
    wide: torch.dtype | None = None

    @property
    def wide_dtype(self) -> torch.dtype:
        return self.wide or self.dtype

    @property
    def wants_loss_scaling(self) -> bool:
        """Are small gradients lost, because its normal numbers end long before float32's?"""
        return torch.finfo(self.dtype).smallest_normal > 2 * torch.finfo(torch.float32).smallest_normal

    @property
    def per_vector(self) -> int:
        """Elements of 16 bytes: rows of whole vectors are moved as they are, others padded."""
        return 16 // self.bytes


#: what the formats with a scale have in common
_EIGHT_BITS = dict(meta_tile_k=128, token_step=32, mn_major=False, scaled=True, wide=torch.bfloat16)
FORMATS = {
    format_.dtype: format_
    for format_ in (
        Format(torch.float64, -1, "reference", 8),
        Format(torch.float32, 0, "cpu", 4),
        Format(torch.bfloat16, 1, "cuda", 2),
        Format(torch.float16, 2, "cuda", 2),
        Format(torch.float8_e4m3fn, 3, "cuda", 1, **_EIGHT_BITS),
        Format(torch.float8_e5m2, 4, "cuda", 1, **_EIGHT_BITS),
    )
}
#: dtype codes of the C++ library
DTYPE_CODE = {dtype: format_.code for dtype, format_ in FORMATS.items() if format_.code >= 0}
#: what the sparse tensor cores multiply as it is, and with a scale beside it
HALF_DTYPES = tuple(dtype for dtype, f in FORMATS.items() if f.runs_on == "cuda" and not f.scaled)
FLOAT8_DTYPES = tuple(dtype for dtype, f in FORMATS.items() if f.scaled)
#: dtypes that a master weight may have, and the result of a 16-bit product; the reference takes float64 as well
WEIGHT_DTYPES = tuple(dtype for dtype, f in FORMATS.items() if f.runs_on != "reference" and not f.scaled)
REFERENCE_DTYPES = tuple(dtype for dtype, f in FORMATS.items() if f.runs_on == "reference")
#: dtype of packed values unless another is asked for: a float32 weight on a GPU is a master weight for autocast
DEFAULT_DTYPE = HALF_DTYPES[0]
#: what 8-bit layers pack
E4M3 = FLOAT8_DTYPES[0]

#: the products of a layer: codes of the binding (csrc/bindings/gemm.cpp). GRAD_WEIGHT_OF_INPUT is the weight gradient
#: where the input was pruned in place of the output gradient; the last two multiply a pruned activation
FORWARD, GRAD_INPUT, GRAD_WEIGHT, ACTIVATED_FORWARD, GATED_FORWARD, GRAD_WEIGHT_OF_INPUT = range(6)
FORWARD_OF_INPUT, GRAD_INPUT_OF_OUTPUT = 6, 7
#: those whose sparse operand is an activation along its features: m counts tokens
OF_ACTIVATIONS = (FORWARD_OF_INPUT, GRAD_INPUT_OF_OUTPUT)
#: those whose result is (m, n), row-major; that of others is (n, m)
M_BY_N = (GRAD_WEIGHT, *OF_ACTIVATIONS)


class GemmProblem(NamedTuple):
    """One sparse product, out(m, n) = lhs(m, k) rhs(k, n), without its tensors: what kernels are chosen by.

    pass_code          which product: FORWARD and so on
    m, n, k            extents; lhs is sparse along k
    format, out_dtype  codes of the operands' and the result's dtype (`DTYPE_CODE`)
    """

    pass_code: int
    m: int
    n: int
    k: int
    format: int
    out_dtype: int


class SparseOperand(NamedTuple):
    """A matrix (m, k) that is 2:4 sparse along k: the left-hand side of a sparse product.

    values    what is kept: [m, k/2] where `k_major`, else [k/2, m]
    E         the positions, uint8 of `metadata_bytes(m, k, values.dtype)`
    k_major   how values lie: the forward weight, activations pruned along features and all of 8 bits along k, other
              operands along m
    scale     one float32 by which values are multiplied again, of scaled formats; else None
    """

    values: Tensor
    E: Tensor
    k_major: bool = True
    scale: Tensor | None = None

    @property
    def format(self) -> Format:
        return FORMATS[self.values.dtype]


def round_up(value: int, step: int) -> int:
    return (value + step - 1) // step * step


def names(dtypes: tuple[torch.dtype, ...], last: str = "or") -> str:
    """ "float32, bfloat16 or float16", for messages."""
    *others, final = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} {last} {final}" if others else final


def packed_dtype(dtype: torch.dtype, on_gpu: bool) -> torch.dtype:
    """The dtype of packed values of a weight in `dtype`: the same, but what sparse tensor cores multiply on a GPU."""
    return DEFAULT_DTYPE if on_gpu and dtype not in HALF_DTYPES else dtype


def metadata_bytes(m: int, k: int, dtype: torch.dtype = DEFAULT_DTYPE) -> int:
    """Bytes of E for a sparse operand of m rows and k dense columns: padded to blocks, one bit an element."""
    tile_k = FORMATS[dtype].meta_tile_k  # each product asks: `round_up` would be two calls more
    return -(-m // META_BLOCK) * -(-k // tile_k) * (META_BLOCK * tile_k // 8)


def padded_tokens(tokens: int, dtype: torch.dtype = DEFAULT_DTYPE) -> int:
    """Rows of a gradient after padding for MVUE: whole bytes of metadata, and whole steps of the format."""
    return round_up(tokens, FORMATS[dtype].token_step)


def is_row_major(t: Tensor) -> bool:
    return t.dim() == 2 and (t.stride(1) == 1 or t.shape[1] <= 1) and t.stride(0) >= t.shape[1]


def is_column_major(t: Tensor) -> bool:
    return t.dim() == 2 and (t.stride(0) == 1 or t.shape[0] <= 1) and t.stride(1) >= t.shape[0]


def as_major(t: Tensor) -> Tensor:
    """`t` itself where it is row- or column-major, else a row-major copy (sliced, expanded, overlapping views)."""
    if t.dim() == 2 and t.is_contiguous() and t.shape[0] > 1:
        return t  # as most are
    return t if is_row_major(t) or is_column_major(t) else t.contiguous()


def as_rows(t: Tensor) -> Tensor:
    """[..., n] as a row-major [-1, n] that GEMMs can read: unit column stride, 16-byte aligned rows where possible."""
    if t.dim() == 2 and t.is_contiguous() and t.shape[0] != 1:
        return t  # as most are
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
    if mask.shape[0] == 1:  # one row may have any stride to the next, also an odd one
        mask = mask.as_strided(mask.shape, (mask.shape[1], 1))
    return mask.view(torch.uint16)


@lru_cache(maxsize=64)
def metadata_order(m: int, k: int, dtype: torch.dtype = DEFAULT_DTYPE) -> Tensor:
    """int64 [m64, k_tiles / 8]: offset in E of the byte for elements (row, 8*col .. 8*col + 7); extents padded.

    Blocks of 64 rows and one K tile are contiguous and run along m first, then along k. Inside a block of 16-bit
    values, 512 bytes, here k = 0..31 of rows 0..15 (k = 16..31 and 48..63 lie 64 bytes on, the next 16 rows 128):

               k   0..7  8..15 | 32..39 40..47
        row 0    byte 0     1  |   4      5        rows 0..7 lie 8 bytes apart,
        row 8         2     3  |   6      7        rows 8..15 between them, 2 bytes on
        row 1         8     9  |  12     13

    Inside a block of 8-bit values, 1024 bytes, each row has 16 bytes in the order of k.
    """
    tile_k = FORMATS[dtype].meta_tile_k
    rows = torch.arange(round_up(m, META_BLOCK)).unsqueeze(1)
    cols = torch.arange(0, round_up(k, tile_k), 8).unsqueeze(0)
    block = (cols // tile_k) * (rows.shape[0] // META_BLOCK) + rows // META_BLOCK
    row, col = rows % META_BLOCK, cols % tile_k
    if FORMATS[dtype].bytes == 1:
        inside = row * 16 + col // 8
    else:
        inside = row // 16 * 128 + col // 16 % 2 * 64 + row % 8 * 8 + col // 32 * 4 + row // 8 % 2 * 2 + col % 16 // 8
    return block * (META_BLOCK * tile_k // 8) + inside
