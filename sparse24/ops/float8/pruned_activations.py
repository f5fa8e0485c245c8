"""8-bit products of a pruned activation: with a weight along features, with another dense matrix along tokens.

Everything lies along k, so y = h' W^T and dx = du' W are one product here: of W, or of its transpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Sparse24Error
from ...formats import (
    DTYPE_CODE,
    E4M3,
    FORMATS,
    FORWARD_OF_INPUT,
    GRAD_WEIGHT_OF_INPUT,
    WEIGHT_DTYPES,
    GemmProblem,
    SparseOperand,
    names,
)
from .. import flops
from .._common import check_same_device, define_op
from ..arguments import check_no_self_overlap, check_writable, names_wrong_types
from .operands import check_packed
from .products import check_bias, check_dense, check_out_dtype, is_written, launch
from .weights import unpack_dense

#: a sparse operand: packed, E and scale
Pruned = tuple[Tensor, Tensor, Tensor]

# ---- along features -------------------------------------------------------------------------------------------------


def _check_input(x: Pruned, w8: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    packed, E, scale = x
    check_dense(w8, w_scale, "w8")
    if packed.dim() != 2:
        raise Sparse24Error(f"packed_x must be 2-D, (tokens, features/2), got shape {tuple(packed.shape)}")
    check_packed(packed, E, scale, "packed_x", packed.shape[0], w8.shape[1])
    check_out_dtype(out_dtype, packed)
    check_bias(bias, w8.shape[0])
    if packed.device != w8.device or (bias is not None and bias.device != w8.device):
        check_same_device(packed, "packed_x", w8=w8, bias=bias)


def _sparse_mm_input(packed_x, E_x, x_scale, w8, w_scale, bias, out_dtype) -> Tensor:
    x = packed_x, E_x, x_scale
    _check_input(x, w8, w_scale, bias, out_dtype)
    tokens, (out_features, k) = packed_x.shape[0], w8.shape
    y = w8.new_empty(tokens, out_features, dtype=FORMATS[E4M3].wide_dtype if w8.is_cuda else out_dtype)
    if y.numel() == 0:
        return y.to(out_dtype)
    if bias is not None:
        y.copy_(bias)  # the kernel adds to it in fp32
    problem = GemmProblem(FORWARD_OF_INPUT, tokens, out_features, k, DTYPE_CODE[E4M3], DTYPE_CODE.get(y.dtype, -1))
    lhs = SparseOperand(packed_x, E_x, scale=x_scale)
    if not launch(problem, lhs, w8, w_scale, y, accumulate=bias is not None):
        product = unpack_dense(*x, tokens, k, torch.float32) @ (w8.float() * w_scale).T
        y.copy_(product if bias is None else product + bias)
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _fake_sparse_mm_input(packed_x, E_x, x_scale, w8, w_scale, bias, out_dtype) -> Tensor:
    _check_input((packed_x, E_x, x_scale), w8, w_scale, bias, out_dtype)
    return w8.new_empty((packed_x.shape[0], w8.shape[0]), dtype=out_dtype)


_op_sparse_mm_input = define_op(
    "sparse_mm_input_float8",
    "(Tensor packed_x, Tensor E_x, Tensor x_scale, Tensor w8, Tensor w_scale, Tensor? bias, ScalarType out_dtype) "
    "-> Tensor",
    _sparse_mm_input,
    _fake_sparse_mm_input,
)


@names_wrong_types
def sparse_mm_input_float8(
    packed_x: Tensor, E_x: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, *,
    bias: Tensor | None = None, out_dtype: torch.dtype = FORMATS[E4M3].wide_dtype,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias of 8-bit x and W, where x (tokens, k) is 2:4 sparse along k: (tokens, out_features).

    packed_x, E_x, x_scale  from `activation_compress_float8`, or from its backward with the metadata of forward
    w8, w_scale    (out_features, k) from `quantize`: W itself in forward, for dx its transpose
    out_dtype      of y; the GPU's kernels write bfloat16, other dtypes are cast from it

    Raises Sparse24Error where an operand does not have the size that the others declare, Sparse24DtypeError for an
    operand or a scale of another kind.
    """
    return _op_sparse_mm_input(packed_x, E_x, x_scale, w8, w_scale, bias, out_dtype)


# ---- along tokens ---------------------------------------------------------------------------------------------------


def _check_grad_weight(x: Pruned, dy8_t: Tensor, dy_scale: Tensor, out: Tensor) -> None:
    packed, E, scale = x
    check_dense(dy8_t, dy_scale, "dy8_t")
    if out.dim() != 2 or out.shape[0] != dy8_t.shape[0] or not is_written(out.dtype, out.device):
        raise Sparse24Error(
            f"out must be {names(WEIGHT_DTYPES)} of shape ({dy8_t.shape[0]}, features of x), got {out.dtype} of "
            f"shape {tuple(out.shape)}"
        )
    check_packed(packed, E, scale, "packed_x", out.shape[1], dy8_t.shape[1])
    if packed.device != dy8_t.device or out.device != dy8_t.device:
        check_same_device(dy8_t, "dy8_t", packed_x=packed, out=out)
    check_no_self_overlap(out, "out")
    check_writable(("out", out))


def _grad_weight(packed_x, E_x, x_scale, dy8_t, dy_scale, out, accumulate) -> None:
    x = packed_x, E_x, x_scale
    _check_grad_weight(x, dy8_t, dy_scale, out)
    (n, m), k = out.shape, dy8_t.shape[1]
    if out.numel() == 0:
        return
    lies_in_rows = out.is_contiguous() and out.stride(0) >= m  # a single row may have any stride
    written = lies_in_rows and out.dtype in (FORMATS[E4M3].wide_dtype, torch.float32)
    into = out if written else out.new_empty((n, m), dtype=torch.float32)
    problem = GemmProblem(GRAD_WEIGHT_OF_INPUT, m, n, k, DTYPE_CODE[E4M3], DTYPE_CODE[into.dtype])
    lhs = SparseOperand(packed_x, E_x, scale=x_scale)
    if launch(problem, lhs, dy8_t, dy_scale, into, accumulate=accumulate and written):
        if not written:
            out.add_(into) if accumulate else out.copy_(into)
        return
    product = (dy8_t.float() * dy_scale) @ unpack_dense(*x, m, k, torch.float32).T
    out.add_(product) if accumulate else out.copy_(product)


_op_grad_weight = define_op(
    "grad_weight_of_input_float8_",
    "(Tensor packed_x, Tensor E_x, Tensor x_scale, Tensor dy8_t, Tensor dy_scale, Tensor(a!) out, bool accumulate) "
    "-> ()",
    _grad_weight,
    lambda packed_x, E_x, x_scale, dy8_t, dy_scale, out, _: _check_grad_weight(
        (packed_x, E_x, x_scale), dy8_t, dy_scale, out
    ),
)
flops.register_pruned_activations_float8()


@names_wrong_types
def grad_weight_of_input_float8_(
    packed_x: Tensor, E_x: Tensor, x_scale: Tensor, dy8_t: Tensor, dy_scale: Tensor, out: Tensor,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """out (n, m) = or += the weight gradient dy^T MVUE(x) of 8-bit operands; sums are promoted to fp32.

    packed_x (m, padded/2), E_x, x_scale  along tokens, from `activation_compress_float8`
    dy8_t (n, padded), dy_scale           from `quantize`

    Raises as `sparse_mm_input_float8`, and for an out that cannot be written in place.
    """
    _op_grad_weight(packed_x, E_x, x_scale, dy8_t, dy_scale, out, accumulate)
