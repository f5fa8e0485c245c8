"""Packing weights both ways, from a given mask or with the search in the same pass, and unpacking them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import formats, reference
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import (
    BLOCK,
    DTYPE_CODE,
    FORMATS,
    HALF_DTYPES,
    WEIGHT_DTYPES,
    as_major,
    mask_as_uint16,
    metadata_bytes,
    names,
)
from ._common import (
    call_without_grad,
    check_mask,
    check_packed_operand,
    check_same_device,
    check_weight,
    define_op,
    matrix,
    where,
)
from .arguments import check_has_values, names_wrong_types
from .mask import empty_mask, is_transposable, pack_item


def packed_dtype(w: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of packed values: as asked for, else w's own, or one of 16 bits on a GPU.

    Raises Sparse24DtypeError for a dtype that no GEMM reads.
    """
    on_gpu = w.device.type == "cuda"
    if dtype is None:
        return formats.packed_dtype(w.dtype, on_gpu)
    if dtype in HALF_DTYPES or (not on_gpu and dtype in (*WEIGHT_DTYPES, w.dtype)):
        return dtype
    also = names(tuple(other for other in WEIGHT_DTYPES if other not in HALF_DTYPES))
    raise Sparse24DtypeError(
        f"dtype must be {' or '.join(map(str, HALF_DTYPES))} ({also} on the CPU only), got {dtype} for a weight on "
        f"{w.device}"
    )


@names_wrong_types
def empty_packed(rows: int, cols: int, dtype: torch.dtype, device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised packed (rows, cols/2), E, packed_t (rows/2, cols), E_t for a (rows, cols) weight.

    Of 8-bit dtypes packed_t is (cols, rows/2), and E and E_t have the order of 8 bits.

    Raises Sparse24Error for extents that are not multiples of 4 from 0 on, Sparse24DtypeError for a wrong Python type.
    """
    if rows < 0 or cols < 0 or rows % BLOCK or cols % BLOCK:
        raise Sparse24Error(f"rows and cols must be multiples of {BLOCK}, 0 or more, got {rows} and {cols}")
    if dtype not in FORMATS:
        raise Sparse24DtypeError(
            f"dtype must be that of packed values, one of {', '.join(map(str, FORMATS))}, got {dtype}"
        )
    return (
        torch.empty((rows, cols // 2), dtype=dtype, device=device),
        torch.empty(metadata_bytes(rows, cols, dtype), dtype=torch.uint8, device=device),
        torch.empty((rows // 2, cols) if FORMATS[dtype].mn_major else (cols, rows // 2), dtype=dtype, device=device),
        torch.empty(metadata_bytes(cols, rows, dtype), dtype=torch.uint8, device=device),
    )


def check_packable(w: Tensor, mask: Tensor) -> None:
    check_weight(w)
    check_mask(mask, *w.shape)
    check_same_device(w, "w", mask=mask)


def _compress(w: Tensor, mask: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_packable(w, mask)
    dtype = packed_dtype(w, dtype)
    library, *place = where(w)
    if library is None or dtype == torch.float64:
        return reference.compress(w, mask, dtype)
    w = as_major(w)
    out = empty_packed(*w.shape, dtype, w.device)
    library.pack_by_mask([pack_item(w, mask, dtype, out)], *place)
    return out


def _compress_fake(w: Tensor, mask: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_packable(w, mask)
    return empty_packed(*w.shape, packed_dtype(w, dtype), w.device)


_op_compress = define_op(
    "compress",
    "(Tensor w, Tensor mask, ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _compress,
    _compress_fake,
)


@names_wrong_types
def compress(
    w: Tensor, mask: Tensor, dtype: torch.dtype | None = None, *, validate: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the masked values of `w`, packed along rows and along columns, from one read.

    w              (rows, cols) fp32, bf16 or fp16, row- or column-major (other strides are copied)
    mask           (rows/4, cols/4) uint16, from `transposable_mask`
    dtype          of the packed values: bf16 or fp16 (fp32 on the CPU only); default w's own, bf16 for fp32 on a GPU
    validate       check first that the mask is transposable (reads one number back from the device)
    packed, E      (rows, cols/2) and its metadata: what `sparse_mm` reads
    packed_t, E_t  (rows/2, cols) and its metadata: what `sparse_mm_grad_input` reads

    Positions come from the mask, never from values: a kept zero keeps its place. Raises Sparse24Error, naming the
    argument, when a shape, dtype or stride does not fit, and for a mask that is not transposable under `validate`.
    """
    mask = mask_as_uint16(mask)
    if validate and not is_transposable(mask):
        raise Sparse24Error(
            "mask must keep two elements in every row and column of each 4x4 block; get one from ops.transposable_mask"
        )
    return call_without_grad("compress", "functional.sparse_linear", _op_compress, (w, mask, dtype))


def _prune_compress(w: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_weight(w)
    dtype = packed_dtype(w, dtype)
    library, *place = where(w)
    if library is None or dtype == torch.float64:
        mask = reference.transposable_mask(w)
        return mask, *reference.compress(w, mask, dtype)
    w = as_major(w)
    mask, out = empty_mask(*w.shape, w.device), empty_packed(*w.shape, dtype, w.device)
    library.search_and_pack([pack_item(w, mask, dtype, out)], *place)
    return mask, *out


def _prune_compress_fake(w: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_weight(w)
    return empty_mask(*w.shape, w.device), *empty_packed(*w.shape, packed_dtype(w, dtype), w.device)


_op_prune_compress = define_op(
    "prune_compress",
    "(Tensor w, ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _prune_compress,
    _prune_compress_fake,
)


@names_wrong_types
def prune_compress(w: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Search the transposable mask and pack both ways in one pass: (mask, packed, E, packed_t, E_t).

    Equal, bit for bit, to `transposable_mask` followed by `compress`; arguments, results and errors as there.
    """
    return call_without_grad("prune_compress", "functional.sparse_linear", _op_prune_compress, (w, dtype))


def _check_decompress(packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool) -> None:
    # Only the packed axis comes in groups of four: an MVUE-packed gradient has any number of columns.
    axis, extent = ("rows", rows) if transposed else ("cols", cols)
    if extent % BLOCK:
        raise Sparse24Error(f"{axis} must be a multiple of {BLOCK}, got {extent}")
    if transposed:
        check_packed_operand(packed, E, "packed_t", (rows // 2, cols), cols, rows)
    else:
        check_packed_operand(packed, E, "packed", (rows, cols // 2), rows, cols)


def _decompress(packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool) -> Tensor:
    _check_decompress(packed, E, rows, cols, transposed)
    library, *place = where(packed)
    if library is None:
        return reference.decompress(packed, E, rows, cols, transposed)
    out = packed.new_empty((rows, cols))
    fields = (packed.data_ptr(), DTYPE_CODE[packed.dtype], E.data_ptr(), 0)
    library.unpack(fields, transposed, matrix(out), *place)
    return out


def _decompress_fake(packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool) -> Tensor:
    _check_decompress(packed, E, rows, cols, transposed)
    return packed.new_empty((rows, cols))


_op_decompress = define_op(
    "decompress",
    "(Tensor packed, Tensor E, SymInt rows, SymInt cols, bool transposed) -> Tensor",
    _decompress,
    _decompress_fake,
)


@names_wrong_types
def decompress(packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool = False) -> Tensor:
    """The dense (rows, cols), row-major, with zeros where nothing was kept: exact, byte for byte.

    packed, E   as `compress` returns them, for a weight of `rows` x `cols`
    transposed  packed is packed_t (rows/2, cols), or an MVUE-packed gradient with rows = its padded tokens

    Raises Sparse24Error when values or metadata do not have the declared size.
    """
    return call_without_grad(
        "decompress", "functional.sparse_linear", _op_decompress, (packed, E, rows, cols, transposed)
    )


@names_wrong_types
def is_valid_metadata(E: Tensor, m: int, k: int) -> bool:
    """Is every pair of positions in E, for m rows and k columns, strictly increasing? Reads one number back.

    For packed forms that come from a file: positions cannot leave their group of four, but an equal pair would make
    nonsense silently. False for another size or dtype; Sparse24Error for a meta tensor, which has no values.
    """
    check_has_values(E, "E", "is_valid_metadata")
    E = E.contiguous()  # kept until the library has read it
    if E.numel() != metadata_bytes(m, k) or E.dtype != torch.uint8:
        return False
    if E.numel() == 0:
        return True
    library, *place = where(E)
    if library is None:
        nibbles = reference.decode_metadata(E, m, k)
        return bool(((nibbles & 3) < (nibbles >> 2)).all().item())
    bad = torch.zeros((), dtype=torch.int64, device=E.device)
    library.count_bad_metadata(E.data_ptr(), m, k, bad.data_ptr(), *place)
    return bad.item() == 0
