"""The gradients of a weight and a bias: by sparse products over what is packed, or dense ones.

Sums are fp32; a fp32 master weight gets them unrounded. Where a gradient is there already, the product may add to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..formats import HALF_DTYPES
from ..ops.gemm import DecayTerm
from .operands import KeptInput

#: whether this torch has mm and addmm with a wider result than operands
_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.addmm, "dtype_out")


class GradTarget(NamedTuple):
    """Where a weight gradient goes.

    dtype  of the weight, and so of a new gradient
    into   a gradient to add to, in place of a new one
    decay  masked decay of the weights, added as well
    """

    dtype: torch.dtype
    into: Tensor | None = None
    decay: DecayTerm | None = None


def weight_gradient(
    dy: Tensor, kept: KeptInput, target: GradTarget, seed: Tensor | None, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, db) from dy (tokens, out) and the input: dW (out, in), or None where it was added to what is there.

    seed        prune dy by it; None: the product is dense, unless the input is packed
    bias_dtype  None: no gradient of a bias
    """
    if kept.packed is not None:
        dw = _packed_gradient(ops.sparse_mm_grad_weight_input, (kept.packed, kept.E, dy, kept.packed.shape[1]), target)
    elif seed is None:
        dw = dense_weight_gradient(dy, kept.x, *target)
    else:  # packing dy reads all of it, and adds up its columns on the way
        packed_dy, E_dy, *sums = ops.mvue_compress(dy, seed, bias_grad=bias_dtype is not None)
        dw = packed_output_gradient((packed_dy, E_dy), kept.x, target)
        return dw, sums[0].to(bias_dtype) if sums else None
    return dw, None if bias_dtype is None else bias_gradient(dy, bias_dtype)


def packed_output_gradient(packed_dy: tuple[Tensor, Tensor], x: Tensor, target: GradTarget) -> Tensor | None:
    """dW = MVUE(dy^T) x, of (packed, E)."""
    return _packed_gradient(ops.sparse_mm_grad_weight, (*packed_dy, x, packed_dy[0].shape[1]), target)


def _packed_gradient(product, operands: tuple, target: GradTarget) -> Tensor | None:
    if target.into is not None:
        product(*operands, out=target.into, accumulate=True, decay=target.decay)
        return None
    wide = torch.float32 if target.dtype == torch.float32 else operands[2].dtype
    dw = product(*operands, out_dtype=wide, decay=target.decay)
    return dw if wide == target.dtype else dw.to(target.dtype)


def dense_weight_gradient(
    dy: Tensor, x: Tensor, dtype: torch.dtype, into: Tensor | None = None, decay: DecayTerm | None = None
) -> Tensor | None:
    """dW = dy^T x, and then its decay."""
    dw = _dense_product(dy, x, dtype, into)
    if decay is not None:
        _add_decay(into if dw is None else dw, decay)
    return dw


def _add_decay(dw: Tensor, decay: DecayTerm) -> None:
    """dw += factor * (1 - mask) * weight in place, for weights stacked along its rows."""
    factor, weights, masks = decay
    parts = dw.split([w.shape[0] for w in weights]) if len(weights) > 1 else [dw]
    ops.foreach_masked_decay_(parts, weights, masks, 1.0, factor)


def _dense_product(dy, x, dtype, into) -> Tensor | None:
    """dy^T x; on a GPU a fp32 one comes out of the product as it is, without a 16-bit one in between."""
    if into is not None and into.dtype == x.dtype:
        torch.addmm(into, dy.T, x, out=into)  # not addmm_: torch's FLOP counter has no formula for it
        return None
    if dtype == torch.float32 and _has_wide_products(x):
        if into is None:
            return torch.mm(dy.T, x, out_dtype=torch.float32)
        torch.addmm(into, dy.T, x, out_dtype=torch.float32, out=into)
        return None
    dw = (dy.T @ x).to(dtype)
    if into is None:
        return dw
    into.add_(dw)
    return None


def _has_wide_products(x: Tensor) -> bool:
    """Whether torch multiplies 16-bit operands like `x` to a fp32 result: on a GPU, eagerly."""
    return (
        x.is_cuda and _WIDE_PRODUCTS and x.dtype in HALF_DTYPES and x.numel() > 0 and not torch.compiler.is_compiling()
    )


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of columns, in fp32 and rounded once. A product with ones reads dy up to twice as fast as torch's sum."""
    if _has_wide_products(dy):
        return torch.mm(dy.new_ones(1, dy.shape[0]), dy, out_dtype=torch.float32)[0].to(dtype)
    return dy.sum(0, dtype=torch.float32 if dtype == torch.float32 else None).to(dtype)


def as_laid_out(dw: Tensor | None, columns: bool) -> Tensor | None:
    """dW, row-major, in its weight's layout: as a column-major weight (a Conv1D's) has it, autograd keeps it as it is,
    where it would else copy it element by element.
    """
    return ops.column_major_copy(dw) if columns and dw is not None else dw


def lies_by_columns(weight: Tensor) -> bool:
    strides = weight.stride()
    return strides[0] == 1 and strides[1] > 1
