"""The products of a 2:4 weight: forward and input gradient. Those that make an activation too: activation.py.

Each runs the sparse GEMM where the library has one for the device and dtype, with zeros around operands of odd sizes
(padding.py), and otherwise a dense product over the unpacked operand: the same function up to rounding, noted
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Sparse24Error
from ...formats import FORWARD, GRAD_INPUT, SparseOperand, as_rows, metadata_bytes
from .._common import call_without_grad, check_packed_operand, check_same_device, define_op, is_packed_operand
from ..arguments import names_wrong_types
from . import launch
from .dense import check_values_fit, dense, matmul, output_dtype


def empty_rows(t: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A new tensor of t's leading dimensions and `width`, and its view as rows."""
    if t.dim() == 2:  # quicker by a microsecond than the general form, as extents one by one are than a tuple of them
        out = t.new_empty(t.shape[0], width, dtype=dtype)
        return out, out
    out = t.new_empty((*t.shape[:-1], width), dtype=dtype)
    return out, out.view(-1, width) if out.numel() else out


# ---- forward --------------------------------------------------------------------------------------------------------


def check_sparse_mm(x, packed, E, out_features, bias, out_dtype) -> tuple[int, torch.dtype]:
    if x.dim() == 0:
        raise Sparse24Error("x must have at least one dimension, got a scalar")
    in_features = x.shape[-1]
    if in_features % 2 or not is_packed_operand(packed, E, (out_features, in_features // 2), out_features, in_features):
        _explain_sparse_mm(x, packed, E, out_features)
    if packed.dtype != x.dtype or packed.device != x.device:
        check_values_fit(packed, "packed", x, "x")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype or bias.device != x.device):
        check_same_device(x, "x", bias=bias)
        raise Sparse24Error(
            f"bias must have shape ({out_features},) and x's dtype {x.dtype}, got {tuple(bias.shape)} and {bias.dtype}"
        )
    return in_features, x.dtype if out_dtype is None else output_dtype(x, out_dtype)


def _explain_sparse_mm(x: Tensor, packed: Tensor, E: Tensor, out_features: int) -> None:
    """Raise for the first rule that packed and E break."""
    in_features = x.shape[-1]
    packed_features = 2 * packed.shape[-1] if packed.dim() == 2 else in_features
    if in_features != packed_features and E.numel() == metadata_bytes(out_features, packed_features):
        raise Sparse24Error(
            f"x must have {packed_features} features in its last dimension, as the packed weight has, "
            f"got shape {tuple(x.shape)}"
        )
    check_packed_operand(packed, E, "packed", (out_features, in_features // 2), out_features, in_features)


def compute_sparse_mm(x, packed, E, out_features, bias, out_dtype):
    in_features, out_dtype = check_sparse_mm(x, packed, E, out_features, bias, out_dtype)
    y, y_rows = empty_rows(x, out_features, out_dtype)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    bias = bias if bias is None else bias.contiguous()
    weight, mnk = SparseOperand(packed, E), (out_features, rows.shape[0], in_features)
    if launch.run(launch.problem_of(FORWARD, mnk, rows, y), weight, rows, y_rows, bias=bias):
        return y
    w = dense(weight, out_features, in_features, x.dtype)
    if out_dtype == x.dtype:
        return y.copy_(torch.nn.functional.linear(rows, w, bias).view(y.shape))
    product = matmul(rows, w.T, out_dtype)
    return y.copy_((product if bias is None else product + bias).view(y.shape))


def fake_sparse_mm(x, packed, E, out_features, bias, out_dtype):
    _, out_dtype = check_sparse_mm(x, packed, E, out_features, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


_op_sparse_mm = define_op(
    "sparse_mm",
    "(Tensor x, Tensor packed, Tensor E, int out_features, Tensor? bias, ScalarType? out_dtype) -> Tensor",
    compute_sparse_mm,
    fake_sparse_mm,
)


@names_wrong_types
def sparse_mm(
    x: Tensor,
    packed: Tensor,
    E: Tensor,
    out_features: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + bias, where W (out_features, in_features) is 2:4 sparse along in_features.

    x          (..., in_features), any strides and any number of tokens
    packed, E  from `compress`: values (out_features, in_features/2) and metadata
    bias       (out_features,) in x's dtype, or None
    out_dtype  x's dtype (default) or float32; sums are fp32 in either case
    returns    (..., out_features), row-major

    Raises, before anything is launched, Sparse24Error when packed, E or bias do not have the size that the shapes
    declare, or bias not x's dtype, or are on another device than x; Sparse24DtypeError for packed values in another
    dtype, and for another out_dtype.
    """
    args = (x, packed, E, out_features, bias, out_dtype)
    return call_without_grad("sparse_mm", "functional.sparse_linear", _op_sparse_mm, args)


# ---- input gradient -------------------------------------------------------------------------------------------------


def check_grad_input(dy, packed_t, E_t, in_features, out_dtype) -> tuple[int, torch.dtype]:
    if dy.dim() == 0:
        raise Sparse24Error("dy must have at least one dimension, got a scalar")
    out_features = dy.shape[-1]
    check_packed_operand(packed_t, E_t, "packed_t", (out_features // 2, in_features), in_features, out_features)
    if packed_t.dtype != dy.dtype or packed_t.device != dy.device:
        check_values_fit(packed_t, "packed_t", dy, "dy")
    return out_features, dy.dtype if out_dtype is None else output_dtype(dy, out_dtype, "dy")


def _sparse_mm_grad_input(dy, packed_t, E_t, in_features, out_dtype):
    _, out_dtype = check_grad_input(dy, packed_t, E_t, in_features, out_dtype)
    return compute_grad_input(dy, packed_t, E_t, in_features, out_dtype)


def compute_grad_input(dy, packed_t, E_t, in_features: int, out_dtype: torch.dtype) -> Tensor:
    """Of operands that have been checked."""
    out_features = dy.shape[-1]
    dx, dx_rows = empty_rows(dy, in_features, out_dtype)
    if dx.numel() == 0:
        return dx
    rows = as_rows(dy)
    weight, mnk = SparseOperand(packed_t, E_t, k_major=False), (in_features, rows.shape[0], out_features)
    if launch.run(launch.problem_of(GRAD_INPUT, mnk, rows, dx), weight, rows, dx_rows):
        return dx
    w = dense(weight, in_features, out_features, dy.dtype)
    return dx.copy_(matmul(rows, w, out_dtype).view(dx.shape))


def fake_grad_input(dy, packed_t, E_t, in_features, out_dtype):
    _, out_dtype = check_grad_input(dy, packed_t, E_t, in_features, out_dtype)
    return dy.new_empty((*dy.shape[:-1], in_features), dtype=out_dtype)


_op_sparse_mm_grad_input = define_op(
    "sparse_mm_grad_input",
    "(Tensor dy, Tensor packed_t, Tensor E_t, int in_features, ScalarType? out_dtype) -> Tensor",
    _sparse_mm_grad_input,
    fake_grad_input,
)


@names_wrong_types
def sparse_mm_grad_input(
    dy: Tensor, packed_t: Tensor, E_t: Tensor, in_features: int, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """dx = dy W, where W (out_features, in_features) is 2:4 sparse along out_features.

    dy             (..., out_features), any strides (a broadcast gradient too)
    packed_t, E_t  from `compress`: values (out_features/2, in_features) and metadata
    out_dtype      dy's dtype (default) or float32
    returns        (..., in_features), row-major

    Raises, before anything is launched, Sparse24Error when packed_t or E_t do not have the size that the shapes
    declare, or are on another device than dy; Sparse24DtypeError for packed values in another dtype, and for another
    out_dtype.
    """
    args = (dy, packed_t, E_t, in_features, out_dtype)
    return call_without_grad("sparse_mm_grad_input", "functional.sparse_linear", _op_sparse_mm_grad_input, args)
