"""Products of odd sizes, made to fit the sparse GEMM: zeros beside the operands, a scratch output, a slice of it.

The kernels read and write rows of whole 16-byte units; values that are packed along rows must fill such units too, so
in_features come in 16s for the forward product, as do the features of a pruned activation, and the rows of an operand
packed along columns in 8s. 8-bit operands
are all packed along k, which comes in 32s. Token counts are free. E never changes: it is written in whole blocks as it
is, 64 or 128 along k, and whatever it says of a padded place, the value there is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...formats import (
    DEFAULT_DTYPE,
    FORMATS,
    FORWARD,
    FORWARD_OF_INPUT,
    GRAD_INPUT_OF_OUTPUT,
    GRAD_WEIGHT,
    GRAD_WEIGHT_OF_INPUT,
    M_BY_N,
    OF_ACTIVATIONS,
    Format,
    GemmProblem,
    SparseOperand,
    round_up,
)

_UNIT_BYTES = 16


class Extents(NamedTuple):
    """A product as the kernels take it; rhs_ld and out_ld are elements from one row to the next."""

    m: int
    n: int
    k: int
    rhs_ld: int
    out_ld: int


def padded_extents(
    pass_code: int, m: int, n: int, k: int, out_bytes: int, operands: Format = FORMATS[DEFAULT_DTYPE]
) -> Extents:
    """The least product that the kernels take and that contains this one; `out_bytes` of an element of the output."""
    out_unit, unit = _UNIT_BYTES // out_bytes, operands.per_vector
    if pass_code in (FORWARD, FORWARD_OF_INPUT) or not operands.mn_major:
        k = round_up(k, 2 * unit)  # both operands lie along k; the kernel cuts rows of out off
        return Extents(m, n, k, k, round_up(n if pass_code in M_BY_N else m, out_unit))
    if pass_code == GRAD_INPUT_OF_OUTPUT:
        return Extents(m, n, round_up(k, 2 * unit), round_up(n, unit), round_up(n, out_unit))
    m = round_up(m, unit)
    if pass_code == GRAD_WEIGHT:
        return Extents(m, n, k, round_up(n, unit), round_up(n, out_unit))
    if pass_code == GRAD_WEIGHT_OF_INPUT:  # rows of the gradient have m elements
        return Extents(m, n, k, round_up(n, unit), m)
    return Extents(m, n, k, round_up(k, unit), m)


@dataclass(frozen=True)
class PaddedProduct:
    """What to launch, and where its result belongs: `wanted` is `out` itself where nothing had to be padded there."""

    extents: Extents
    lhs: SparseOperand
    rhs: Tensor
    out: Tensor
    accumulate: bool
    wanted: Tensor
    adds: bool  # to what `wanted` holds

    def finish(self) -> None:
        """Bring the result to where it is wanted. Sums to be added to it are fp32, so they are rounded once, here."""
        if self.out is self.wanted:
            return
        result = self.out[: self.wanted.shape[0], : self.wanted.shape[1]]
        if self.adds:
            self.wanted.add_(result)
        else:
            self.wanted.copy_(result)


def pad(problem: GemmProblem, lhs: SparseOperand, rhs: Tensor, out: Tensor, accumulate: bool) -> PaddedProduct:
    """A product whose sizes, strides or addresses do not fit, as one that does; what fits already is not copied."""
    pass_code, m, n, k, *_ = problem
    to = padded_extents(pass_code, m, n, k, out.element_size(), lhs.format)
    packed_width = to.k // 2 if lhs.k_major else to.m
    # Beside an operand along k, rhs is read up to the padded k; else up to the last real one.
    rhs_rows, rhs_columns = rhs.shape
    if pass_code == GRAD_INPUT_OF_OUTPUT:  # whose rhs has rows of n
        rhs_rows = to.k
    elif lhs.k_major:
        rhs_columns = to.k
    wanted, adds = out, accumulate
    if to.m != m or out.stride(0) * out.element_size() % _UNIT_BYTES or not _is_aligned(out):
        if pass_code in OF_ACTIVATIONS:  # which have no fp32 output everywhere: the kernel adds to a copy
            out, adds = _widened(out, to.out_ld, to.out_ld) if accumulate else out.new_empty((m, to.out_ld)), False
        else:
            dtype = torch.float32 if accumulate else out.dtype
            to = padded_extents(pass_code, m, n, k, dtype.itemsize, lhs.format)
            out = out.new_empty((to.m if pass_code == GRAD_WEIGHT else n, to.out_ld), dtype=dtype)
    values = _widened(lhs.values, packed_width, packed_width)
    return PaddedProduct(
        extents=to,
        lhs=lhs._replace(values=values, E=lhs.E if _is_aligned(lhs.E) else lhs.E.clone()),
        rhs=_widened(rhs, rhs_columns, to.rhs_ld, rhs_rows),
        out=out,
        accumulate=accumulate and (out is wanted or not adds),
        wanted=wanted,
        adds=adds,
    )


def _widened(t: Tensor, columns: int, width: int, rows: int | None = None) -> Tensor:
    """`t` itself where it has as many columns and rows, aligned, else a copy of `width`, with zeros past its own."""
    own, rows = t.shape[0], rows or t.shape[0]
    if t.shape[1] >= columns and own >= rows and t.stride(0) * t.element_size() % _UNIT_BYTES == 0 and _is_aligned(t):
        return t
    plain = t.view(torch.uint8) if t.element_size() == 1 else t  # not every torch fills 8-bit floats
    wide = plain.new_empty((rows, width))
    wide[:own, : t.shape[1]].copy_(plain)
    wide[:own, t.shape[1] :].zero_()
    wide[own:].zero_()
    return wide.view(t.dtype)


def _is_aligned(t: Tensor) -> bool:
    return t.data_ptr() % _UNIT_BYTES == 0
