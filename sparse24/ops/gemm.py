"""The three products of a 2:4 linear layer: forward, input gradient, weight gradient.

Each runs the sparse GEMM where the library has one for the device, dtype and alignment, and otherwise a dense product
over the decompressed operand: the same function up to rounding, noted once.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import _library
from ..errors import Sparse24DtypeError, Sparse24Error
from ..layout import DTYPE_CODE, HALF_DTYPES, as_rows, padded_tokens
from ._common import call_without_grad, check_packed_operand, check_same_device, define_op, where

FORWARD, GRAD_INPUT, GRAD_WEIGHT = 0, 1, 2
_PASS_NAME = ("sparse_mm", "sparse_mm_grad_input", "sparse_mm_grad_weight")
_NO_POINTER = 0


# ---- which path -----------------------------------------------------------------------------------------------------


@cache
def _unsupported(pass_code: int, m: int, n: int, k: int, dtype, out_dtype, rhs_ld: int, out_ld: int, index: int) -> str:
    """Why the GPU's sparse GEMM cannot take a product ("" if it can); token counts never matter to the answer."""
    if dtype not in HALF_DTYPES:
        return f"dtype {dtype} (sparse tensor cores take bfloat16 and float16)"
    return _library.binding().sparse_gemm_unsupported(
        pass_code, m, n, k, DTYPE_CODE[dtype], DTYPE_CODE[out_dtype], rhs_ld, out_ld, _library.CUDA, index
    )


def _sparse_kernel_runs(pass_code: int, backend: int, m: int, n: int, k: int, rhs: Tensor, out: Tensor) -> bool:
    if backend != _library.CUDA:
        return False
    why_not = _unsupported(pass_code, m, n, k, rhs.dtype, out.dtype, rhs.stride(0), out.stride(0), rhs.device.index)
    if why_not:
        _library.warn_once(f"{_PASS_NAME[pass_code]} multiplies densely over the decompressed operand: {why_not}")
    return not why_not and rhs.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0


@lru_cache(maxsize=4096)
def _workspace_bytes(pass_code: int, m: int, n: int, k: int, dtype: int, out_dtype: int, accumulate: bool, index: int):
    return _library.binding().sparse_gemm_workspace_bytes(
        pass_code, m, n, k, dtype, out_dtype, accumulate, _library.CUDA, index
    )


def _run_sparse_gemm(library, place, pass_code, m, n, k, packed, E, rhs, out, bias=None, accumulate=False) -> None:
    dtype, out_dtype = DTYPE_CODE[rhs.dtype], DTYPE_CODE[out.dtype]
    scratch_bytes = _workspace_bytes(pass_code, m, n, k, dtype, out_dtype, accumulate, rhs.device.index)
    # From the caching allocator: freed on this stream right after the launch, and reused only behind it.
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=rhs.device) if scratch_bytes else None
    library.sparse_gemm(
        pass_code, m, n, k, dtype, out_dtype, packed.data_ptr(), E.data_ptr(), rhs.data_ptr(), rhs.stride(0),
        out.data_ptr(), out.stride(0), _NO_POINTER if bias is None else bias.data_ptr(), accumulate,
        _NO_POINTER if scratch is None else scratch.data_ptr(), *place,
    )  # fmt: skip


def _dense(packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """The decompressed operand as a dense product takes it (on the CPU, fp32 values may meet 16-bit activations)."""
    dense = torch.ops.sparse24.decompress.default(packed, E, rows, cols, transposed)
    return dense if dense.dtype == dtype else dense.to(dtype)


def _matmul(lhs: Tensor, rhs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """lhs @ rhs with an fp32 result where asked for; plain torch otherwise."""
    if out_dtype == lhs.dtype:
        return lhs @ rhs
    return (lhs.to(out_dtype) @ rhs.to(out_dtype)).to(out_dtype)


def _output_dtype(t: Tensor, out_dtype: torch.dtype | None, name: str = "x") -> torch.dtype:
    if out_dtype is None or out_dtype == t.dtype or out_dtype == torch.float32:
        return out_dtype or t.dtype
    raise Sparse24DtypeError(f"out_dtype must be {name}'s dtype or torch.float32, got {out_dtype} for {t.dtype}")


def _check_values_fit(packed: Tensor, packed_name: str, t: Tensor, name: str) -> None:
    if packed.device != t.device:
        check_same_device(t, name, **{packed_name: packed})
    if packed.dtype == t.dtype:
        return
    # On the CPU an fp32 master may serve 16-bit activations: decompression casts, as autocast does for dense layers.
    on_cpu = t.device.type == "cpu" and packed.dtype in (torch.float32, torch.float64) and t.is_floating_point()
    if not on_cpu:
        raise Sparse24DtypeError(
            f"{name} and {packed_name} must have the same dtype, got {t.dtype} and {packed.dtype}; "
            f"cast {name}, run under autocast, or pack with dtype={t.dtype}"
        )


# ---- forward --------------------------------------------------------------------------------------------------------


def _check_sparse_mm(x, packed, E, out_features, bias, out_dtype) -> tuple[int, torch.dtype]:
    if x.dim() == 0:
        raise Sparse24Error("x must have at least one dimension, got a scalar")
    in_features = x.shape[-1]
    check_packed_operand(packed, E, "packed", (out_features, in_features // 2), out_features, in_features)
    _check_values_fit(packed, "packed", x, "x")
    if bias is not None:
        check_same_device(x, "x", bias=bias)
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise Sparse24Error(
            f"bias must have shape ({out_features},) and x's dtype {x.dtype}, got {tuple(bias.shape)} and {bias.dtype}"
        )
    return in_features, _output_dtype(x, out_dtype)


def _sparse_mm(x, packed, E, out_features, bias, out_dtype):
    in_features, out_dtype = _check_sparse_mm(x, packed, E, out_features, bias, out_dtype)
    y = torch.empty((*x.shape[:-1], out_features), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    y_rows = y if y.dim() == 2 else y.view(-1, out_features)
    library, *place = where(x)
    if library is not None and _sparse_kernel_runs(FORWARD, place[0], out_features, 64, in_features, rows, y_rows):
        bias = bias if bias is None else bias.contiguous()
        _run_sparse_gemm(
            library, place, FORWARD, out_features, rows.shape[0], in_features, packed, E, rows, y_rows, bias
        )
        return y
    w = _dense(packed, E, out_features, in_features, False, x.dtype)
    if out_dtype == x.dtype:
        return y.copy_(torch.nn.functional.linear(rows, w, bias).view(y.shape))
    product = _matmul(rows, w.T, out_dtype)
    return y.copy_((product if bias is None else product + bias).view(y.shape))


def _sparse_mm_fake(x, packed, E, out_features, bias, out_dtype):
    _, out_dtype = _check_sparse_mm(x, packed, E, out_features, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


_op_sparse_mm = define_op(
    "sparse_mm",
    "(Tensor x, Tensor packed, Tensor E, int out_features, Tensor? bias, ScalarType? out_dtype) -> Tensor",
    _sparse_mm,
    _sparse_mm_fake,
)


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

    Raises Sparse24Error when packed or E do not have the size that the shapes declare, before anything is launched.
    """
    args = (x, packed, E, out_features, bias, out_dtype)
    return call_without_grad("sparse_mm", "functional.sparse_linear", _op_sparse_mm, args)


# ---- input gradient -------------------------------------------------------------------------------------------------


def _check_grad_input(dy, packed_t, E_t, in_features, out_dtype) -> tuple[int, torch.dtype]:
    if dy.dim() == 0:
        raise Sparse24Error("dy must have at least one dimension, got a scalar")
    out_features = dy.shape[-1]
    check_packed_operand(packed_t, E_t, "packed_t", (out_features // 2, in_features), in_features, out_features)
    _check_values_fit(packed_t, "packed_t", dy, "dy")
    return out_features, _output_dtype(dy, out_dtype, "dy")


def _sparse_mm_grad_input(dy, packed_t, E_t, in_features, out_dtype):
    out_features, out_dtype = _check_grad_input(dy, packed_t, E_t, in_features, out_dtype)
    dx = torch.empty((*dy.shape[:-1], in_features), dtype=out_dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    rows, dx_rows = as_rows(dy), dx if dx.dim() == 2 else dx.view(-1, in_features)
    library, *place = where(dy)
    if library is not None and _sparse_kernel_runs(GRAD_INPUT, place[0], in_features, 64, out_features, rows, dx_rows):
        _run_sparse_gemm(
            library, place, GRAD_INPUT, in_features, rows.shape[0], out_features, packed_t, E_t, rows, dx_rows
        )
        return dx
    w = _dense(packed_t, E_t, out_features, in_features, True, dy.dtype)
    return dx.copy_(_matmul(rows, w, out_dtype).view(dx.shape))


def _sparse_mm_grad_input_fake(dy, packed_t, E_t, in_features, out_dtype):
    _, out_dtype = _check_grad_input(dy, packed_t, E_t, in_features, out_dtype)
    return dy.new_empty((*dy.shape[:-1], in_features), dtype=out_dtype)


_op_sparse_mm_grad_input = define_op(
    "sparse_mm_grad_input",
    "(Tensor dy, Tensor packed_t, Tensor E_t, int in_features, ScalarType? out_dtype) -> Tensor",
    _sparse_mm_grad_input,
    _sparse_mm_grad_input_fake,
)


def sparse_mm_grad_input(
    dy: Tensor, packed_t: Tensor, E_t: Tensor, in_features: int, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """dx = dy W, where W (out_features, in_features) is 2:4 sparse along out_features.

    dy             (..., out_features), any strides (a broadcast gradient too)
    packed_t, E_t  from `compress`: values (out_features/2, in_features) and metadata
    out_dtype      dy's dtype (default) or float32
    returns        (..., in_features), row-major
    """
    args = (dy, packed_t, E_t, in_features, out_dtype)
    return call_without_grad("sparse_mm_grad_input", "functional.sparse_linear", _op_sparse_mm_grad_input, args)


# ---- weight gradient ------------------------------------------------------------------------------------------------


def _check_grad_weight(packed_dy, E_dy, x, out_features, out_dtype) -> tuple[int, int, torch.dtype]:
    if x.dim() != 2:
        raise Sparse24Error(f"x must be 2-D, (tokens, in_features), got shape {tuple(x.shape)}; flatten it first")
    tokens, in_features = x.shape
    padded = padded_tokens(tokens)
    check_packed_operand(packed_dy, E_dy, "packed_dy", (padded // 2, out_features), out_features, padded)
    if packed_dy.device != x.device:
        check_same_device(x, "x", packed_dy=packed_dy)
    if packed_dy.dtype != x.dtype:
        raise Sparse24DtypeError(f"x and packed_dy must have the same dtype, got {x.dtype} and {packed_dy.dtype}")
    return tokens, in_features, _output_dtype(x, out_dtype)


def _grad_weight_into(packed_dy, E_dy, x, out_features, out, accumulate) -> None:
    tokens, in_features = x.shape
    if out.numel() == 0:
        return
    if tokens == 0:
        if not accumulate:
            out.zero_()
        return
    rows = as_rows(x)
    library, *place = where(x)
    if library is not None and _sparse_kernel_runs(GRAD_WEIGHT, place[0], out_features, in_features, 64, rows, out):
        _run_sparse_gemm(
            library, place, GRAD_WEIGHT, out_features, in_features, tokens, packed_dy, E_dy, rows, out,
            accumulate=accumulate,
        )  # fmt: skip
        return
    dy = _dense(packed_dy, E_dy, padded_tokens(tokens), out_features, True, x.dtype)[:tokens]
    if accumulate:
        out.add_(_matmul(dy.T, rows, torch.float32 if x.dtype in HALF_DTYPES else x.dtype))  # one rounding, at the end
    else:
        out.copy_(_matmul(dy.T, rows, out.dtype))


def _sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype):
    _, in_features, out_dtype = _check_grad_weight(packed_dy, E_dy, x, out_features, out_dtype)
    dw = x.new_empty((out_features, in_features), dtype=out_dtype)
    _grad_weight_into(packed_dy, E_dy, x, out_features, dw, False)
    return dw


def _sparse_mm_grad_weight_fake(packed_dy, E_dy, x, out_features, out_dtype):
    _, in_features, out_dtype = _check_grad_weight(packed_dy, E_dy, x, out_features, out_dtype)
    return x.new_empty((out_features, in_features), dtype=out_dtype)


def _check_grad_weight_out(packed_dy, E_dy, x, out_features, out) -> None:
    _, in_features, _ = _check_grad_weight(packed_dy, E_dy, x, out_features, out.dtype)
    check_same_device(x, "x", out=out)
    if tuple(out.shape) != (out_features, in_features) or not out.is_contiguous():
        raise Sparse24Error(
            f"out must be contiguous of shape {(out_features, in_features)}, "
            f"got {tuple(out.shape)} with strides {out.stride()}"
        )


def _sparse_mm_grad_weight_(packed_dy, E_dy, x, out_features, out, accumulate) -> None:
    _check_grad_weight_out(packed_dy, E_dy, x, out_features, out)
    _grad_weight_into(packed_dy, E_dy, x, out_features, out, accumulate)


def _sparse_mm_grad_weight_fake_(packed_dy, E_dy, x, out_features, out, accumulate) -> None:
    _check_grad_weight_out(packed_dy, E_dy, x, out_features, out)


_op_sparse_mm_grad_weight = define_op(
    "sparse_mm_grad_weight",
    "(Tensor packed_dy, Tensor E_dy, Tensor x, int out_features, ScalarType? out_dtype) -> Tensor",
    _sparse_mm_grad_weight,
    _sparse_mm_grad_weight_fake,
)
_op_sparse_mm_grad_weight_ = define_op(
    "sparse_mm_grad_weight_",
    "(Tensor packed_dy, Tensor E_dy, Tensor x, int out_features, Tensor(a!) out, bool accumulate) -> ()",
    _sparse_mm_grad_weight_,
    _sparse_mm_grad_weight_fake_,
)


def sparse_mm_grad_weight(
    packed_dy: Tensor,
    E_dy: Tensor,
    x: Tensor,
    out_features: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dW = dy^T x, where dy is 2:4 sparse along tokens.

    packed_dy, E_dy  from `mvue_compress` of dy (tokens, out_features)
    x                (tokens, in_features), the layer's input, in packed_dy's dtype
    out              contiguous (out_features, in_features) to write to: x's dtype or float32; default a new tensor
    accumulate       add to `out` instead of overwriting it: gradient accumulation without another pass
    out_dtype        of a new tensor: x's dtype (default) or float32
    """
    if accumulate and out is None:
        raise Sparse24Error("accumulate=True needs out=, the gradient to add to")
    if out is None:
        args = (packed_dy, E_dy, x, out_features, out_dtype)
        return call_without_grad("sparse_mm_grad_weight", "functional.sparse_linear", _op_sparse_mm_grad_weight, args)
    if out_dtype is not None and out_dtype != out.dtype:
        raise Sparse24DtypeError(f"out_dtype {out_dtype} contradicts out, which is {out.dtype}; pass one of them")
    with torch.no_grad():
        _op_sparse_mm_grad_weight_(packed_dy, E_dy, x, out_features, out, accumulate)
    torch.autograd.graph.increment_version(out)
    return out
