"""8-bit matrices as the binding takes them, and the rules on scales."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import E4M3, WEIGHT_DTYPES, metadata_bytes, padded_tokens
from ...reference import float8 as reference
from .._common import check_same_device, check_weight_dtype
from ..arguments import check_writable

#: how a pass casts: scale, amax and counts as in `quantize`; a pass that finds the scale itself is given none
Cast = tuple[Tensor | None, Tensor | None, Tensor | None]


def output(x8: Tensor, x8_t: Tensor | None, cast: Cast, values: int) -> tuple[int, ...]:
    """What a pass over `values` values writes in e4m3, as the binding takes it. The pass counts what is clipped and
    flushed; of how many, here.
    """
    scale, amax, counts = cast
    rows = (x8.data_ptr(), x8.stride(0)) if x8.numel() else (0, 0)
    columns = (x8_t.data_ptr(), x8_t.stride(0)) if x8_t is not None and x8_t.numel() else (0, 0)
    if counts is not None:
        counts[2].add_(values)
    noted = 0 if amax is None else amax.data_ptr(), 0 if counts is None else counts.data_ptr()
    return *rows, *columns, 0 if scale is None else scale.data_ptr(), *noted


def takes_one_pass(d_ff: int, *operands: Tensor) -> bool:
    """Can a GPU kernel make all forms of an activation's result from one read? Otherwise it wants memory for the
    16-bit result, which it reads again (csrc/fused/activation_outputs.cuh). The CPU takes anything.
    """
    return d_ff % 64 == 0 and all(
        t.dtype != torch.float32 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
        for t in operands
    )


def empty_float8(like: Tensor, tokens: int, features: int, rows: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    padded = padded_tokens(tokens, E4M3)
    return (
        like.new_empty((tokens, features) if rows else (0,), dtype=E4M3),
        like.new_empty((features, padded) if transposed else (0,), dtype=E4M3),
    )


def check_scale(like: Tensor, name: str, scale: Tensor) -> None:
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise Sparse24DtypeError(f"{name} must be one float32, got {scale.dtype} of shape {tuple(scale.shape)}")
    if scale.device != like.device:
        check_same_device(like, "x", **{name: scale})


def note(x: Tensor, cast: Cast) -> None:
    """What a pass notes of x, by the reference."""
    scale, amax, counts = cast
    if amax is not None:
        torch.maximum(amax, reference.amax(x), out=amax)
    if counts is not None:
        counts += reference.cast_counts(x, scale)


def check_scale_and_notes(like: Tensor, cast: Cast) -> None:
    """What a pass notes must be ours to write, and as large as the pass takes it to be."""
    scale, amax, counts = cast
    check_scale(like, "scale", scale)
    if amax is not None:
        check_scale(like, "amax", amax)
        check_writable(("amax", amax))
    if counts is None:
        return
    check_writable(("counts", counts))
    if counts.dtype != torch.int64 or tuple(counts.shape) != (3,) or not counts.is_contiguous():
        raise Sparse24DtypeError(f"counts must be three int64, got {counts.dtype} of shape {tuple(counts.shape)}")
    check_same_device(like, "x", counts=counts)


def check_packed(packed: Tensor, E: Tensor, scale: Tensor, name: str, m: int, k: int) -> None:
    """An 8-bit sparse operand of m x k against what its use declares."""
    if packed.shape != (m, k // 2) or packed.dtype != E4M3 or not packed.is_contiguous():
        raise Sparse24Error(
            f"{name} must be contiguous e4m3 of shape {(m, k // 2)}, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    size = metadata_bytes(m, k, E4M3)
    if E.shape != (size,) or E.dtype != torch.uint8 or not E.is_contiguous():
        raise Sparse24Error(f"E of {name} must be {size} contiguous uint8, got {E.dtype} of shape {tuple(E.shape)}")
    check_scale(packed, f"scale of {name}", scale)
    if E.device != packed.device:
        check_same_device(packed, name, E=E)


def check_cast(x: Tensor, cast: Cast | None) -> None:
    """A matrix that a pass reads, and how it casts it or what it makes of it; None: by a scale that the pass finds."""
    if x.dim() != 2:
        raise Sparse24Error(f"x must be 2-D, (tokens, features), got shape {tuple(x.shape)}; flatten it first")
    if x.dtype not in WEIGHT_DTYPES:
        check_weight_dtype(x, "x")
    if cast is not None:
        check_scale_and_notes(x, cast)
