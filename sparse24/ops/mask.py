"""Transposable masks: search, unpack, compare."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24Error
from ..formats import BLOCK, DTYPE_CODE, as_major, mask_as_uint16
from ._common import check_mask, check_same_device, check_weight, define_op, matrix, pointer, where
from .arguments import check_has_values, names_wrong_types


def pack_item(
    w: Tensor, mask: Tensor, dtype: torch.dtype | None = None, out: tuple[Tensor, ...] | None = None,
    scale: Tensor | None = None, amax: Tensor | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """One weight as the binding's multi-tensor calls take it; `out` = (packed, E, packed_t, E_t) in `dtype`, or None.

    `dtype` cannot be read off `out`: one of its directions may be an empty tensor, of any dtype.
    """
    pointers = [t.data_ptr() for t in out] if out else [0, 0, 0, 0]
    return (
        w.data_ptr(), DTYPE_CODE[w.dtype], *w.shape, *w.stride(), mask.data_ptr(), DTYPE_CODE[dtype or w.dtype],
        *pointers, pointer(scale), pointer(amax),
    )  # fmt: skip


def empty_mask(rows: int, cols: int, device) -> Tensor:
    return torch.empty((rows // BLOCK, cols // BLOCK), dtype=torch.uint16, device=device)


def _transposable_mask(w: Tensor) -> Tensor:
    check_weight(w)
    library, *place = where(w)
    if library is None:
        return reference.transposable_mask(w)
    w = as_major(w)
    mask = empty_mask(*w.shape, w.device)
    library.search_mask([pack_item(w, mask)], *place)
    return mask


def _transposable_mask_fake(w: Tensor) -> Tensor:
    check_weight(w)
    return empty_mask(*w.shape, w.device)


_op_transposable_mask = define_op(
    "transposable_mask", "(Tensor w) -> Tensor", _transposable_mask, _transposable_mask_fake
)


@names_wrong_types
def transposable_mask(w: Tensor) -> Tensor:
    """The transposable 2:4 mask that keeps the most magnitude of `w`: two in every row and column of each 4x4 block.

    w        (rows, cols) fp32, bf16 or fp16, row- or column-major (other strides are copied); multiples of 4
    returns  (rows/4, cols/4) uint16, bit 4*i + j set: element (i, j) of the block is kept

    Exact over all 90 patterns, ranked in fp32; ties go by a fixed order, the same on CPU and GPU. Inf and NaN are kept
    and so stay visible. Raises Sparse24Error for a shape or dtype that does not fit.
    Source: arXiv 2404.01847 (transposable masks); the search itself is described in csrc/mask/block_search.h.
    """
    return _op_transposable_mask(w.detach())


def _unpack_mask(mask: Tensor) -> Tensor:
    _check_mask_alone(mask)
    library, *place = where(mask)
    if library is None:
        return reference.unpack_mask(mask)
    rows, cols = mask.shape[0] * BLOCK, mask.shape[1] * BLOCK
    mask = mask.contiguous()
    bits = torch.empty((rows, cols), dtype=torch.bool, device=mask.device)
    library.unpack_mask(mask.data_ptr(), bits.data_ptr(), rows, cols, *place)
    return bits


def _unpack_mask_fake(mask: Tensor) -> Tensor:
    _check_mask_alone(mask)
    return torch.empty((mask.shape[0] * BLOCK, mask.shape[1] * BLOCK), dtype=torch.bool, device=mask.device)


def _check_mask_alone(mask: Tensor) -> None:
    if mask.dim() != 2:
        raise Sparse24Error(f"mask must be 2-D, one value per 4x4 block, got shape {tuple(mask.shape)}")
    check_mask(mask, mask.shape[0] * BLOCK, mask.shape[1] * BLOCK)


_op_unpack_mask = define_op("unpack_mask", "(Tensor mask) -> Tensor", _unpack_mask, _unpack_mask_fake)


@names_wrong_types
def unpack_mask(mask: Tensor) -> Tensor:
    """mask (rows/4, cols/4) uint16 -> bool (rows, cols), true where an element is kept.

    Raises Sparse24Error for a mask that is not 2-D and contiguous, Sparse24DtypeError for one of another dtype.
    """
    return _op_unpack_mask(mask_as_uint16(mask))


@names_wrong_types
def is_transposable(mask: Tensor) -> bool:
    """Does every block of `mask` keep two in each row and column? Reads the answer back from the device.

    Raises as `unpack_mask`: for what is no mask at all, and not for one that is not transposable. Sparse24Error for a
    meta tensor, which has no values.
    """
    mask = mask_as_uint16(mask)
    _check_mask_alone(mask)
    check_has_values(mask, "mask", "is_transposable")
    if mask.numel() == 0:
        return True
    library, *place = where(mask)
    if library is None:
        bits = reference.to_blocks(reference.unpack_mask(mask).int())
        return bool(((bits.sum(-1) == 2).all() & (bits.sum(-2) == 2).all()).item())
    bad = torch.zeros((), dtype=torch.int64, device=mask.device)
    library.count_bad_blocks(mask.data_ptr(), mask.numel(), bad.data_ptr(), *place)
    return bad.item() == 0


def _foreach_mask_flips(masks_a: list[Tensor], masks_b: list[Tensor]) -> Tensor:
    _check_mask_pairs(masks_a, masks_b)
    library, *place = where(masks_a[0])
    if library is None:
        return torch.stack([reference.mask_flips(a, b) for a, b in zip(masks_a, masks_b, strict=True)])
    flips = torch.zeros(len(masks_a), dtype=torch.int64, device=masks_a[0].device)
    items = [
        (a.data_ptr(), b.data_ptr(), a.numel(), flips.data_ptr() + 8 * i)
        for i, (a, b) in enumerate(zip(masks_a, masks_b, strict=True))
    ]
    library.mask_flips(items, *place)
    return flips


def _foreach_mask_flips_fake(masks_a: list[Tensor], masks_b: list[Tensor]) -> Tensor:
    _check_mask_pairs(masks_a, masks_b)
    return torch.empty(len(masks_a), dtype=torch.int64, device=masks_a[0].device)


def _check_mask_pairs(masks_a: list[Tensor], masks_b: list[Tensor]) -> None:
    if not masks_a or len(masks_a) != len(masks_b):
        raise Sparse24Error(f"mask lists must be non-empty and equally long, got {len(masks_a)} and {len(masks_b)}")
    for a, b in zip(masks_a, masks_b, strict=True):
        _check_mask_alone(a)
        check_mask(b, a.shape[0] * BLOCK, a.shape[1] * BLOCK, "mask_b")
        check_same_device(masks_a[0], "mask_a", mask_a=a, mask_b=b)


_op_foreach_mask_flips = define_op(
    "foreach_mask_flips",
    "(Tensor[] masks_a, Tensor[] masks_b) -> Tensor",
    _foreach_mask_flips,
    _foreach_mask_flips_fake,
)


@names_wrong_types
def foreach_mask_flips(masks_a: list[Tensor], masks_b: list[Tensor]) -> Tensor:
    """int64 [n]: for each pair of masks, how many elements one keeps and the other does not. One launch for all.

    Raises Sparse24Error for lists that are empty or of two lengths, and for masks that are not 2-D and contiguous, of
    one shape in each pair, and all on one device; Sparse24DtypeError for masks of another dtype than uint16.
    """
    if not masks_a:  # without a tensor torch finds no implementation that could refuse it
        _check_mask_pairs(masks_a, masks_b)
    return _op_foreach_mask_flips([mask_as_uint16(a) for a in masks_a], [mask_as_uint16(b) for b in masks_b])


@names_wrong_types
def mask_flips(mask_a: Tensor, mask_b: Tensor) -> Tensor:
    """Number of elements that one mask keeps and the other does not: int64 scalar tensor, no synchronisation.

    Divided by the number of elements (16 a block) it is the flip rate r_t of arXiv 2404.01847. Raises as
    `foreach_mask_flips`.
    """
    return foreach_mask_flips([mask_a], [mask_b]).squeeze(0)


def _mask_gap(w: Tensor) -> Tensor:
    check_weight(w)
    library, *place = where(w)
    if library is None:
        return reference.mask_gap(w)
    w = as_major(w)
    gap = torch.empty((w.shape[0] // BLOCK, w.shape[1] // BLOCK), dtype=torch.float32, device=w.device)
    library.mask_gap(matrix(w), gap.data_ptr(), *place)
    return gap


def _mask_gap_fake(w: Tensor) -> Tensor:
    check_weight(w)
    return w.new_empty((w.shape[0] // BLOCK, w.shape[1] // BLOCK), dtype=torch.float32)


_op_mask_gap = define_op("mask_gap", "(Tensor w) -> Tensor", _mask_gap, _mask_gap_fake)


@names_wrong_types
def mask_gap(w: Tensor) -> Tensor:
    """Kept magnitude of the best pattern minus that of the second best: fp32 (rows/4, cols/4), for statistics.

    Blocks with a small gap are those whose mask oscillates (arXiv 2404.01847, section on flip rates). Raises
    Sparse24Error for a shape that does not fit, Sparse24DtypeError for a dtype, as `transposable_mask`.
    """
    return _op_mask_gap(w.detach())
