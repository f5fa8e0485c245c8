"""Dense products of 8-bit operands, by torch: cuBLAS on a GPU, a product of widened operands elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _library
from ...errors import Sparse24Error
from ...formats import E4M3, FORMATS
from .._common import check_same_device
from ..arguments import names_wrong_types
from .products import check_bias, check_dense, check_out_dtype

_UNIT = 16  # extents that cuBLAS takes are multiples of it


@names_wrong_types
def dense_mm_float8(
    x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, *,
    bias: Tensor | None = None, out_dtype: torch.dtype = FORMATS[E4M3].wide_dtype,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias of x8 (tokens, k) and w8 (out_features, k), from `quantize`: (tokens, out_features).

    On a GPU that has no such product, and for extents that are no multiples of 16, the operands are widened first, to
    16 bits on a GPU. Raises Sparse24Error for sizes that do not fit and for two devices, Sparse24DtypeError for an
    operand or a scale of another kind.
    """
    check_dense(x8, x_scale, "x8")
    check_dense(w8, w_scale, "w8")
    _check_sizes(x8, w8, bias)
    check_out_dtype(out_dtype, x8)
    wide = FORMATS[E4M3].wide_dtype
    if x8.is_cuda and _cublas_takes(x8, w8):
        bias = None if bias is None else bias.to(wide)
        scales = x_scale.view(()), w_scale.view(())
        y = torch._scaled_mm(x8, w8.t(), *scales, bias=bias, out_dtype=wide, use_fast_accum=True)
        return y if out_dtype == wide else y.to(out_dtype)
    dtype = wide if x8.is_cuda else torch.float32
    x, w = ((t.to(torch.float32) * scale).to(dtype) for t, scale in ((x8, x_scale), (w8, w_scale)))
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(dtype))
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _check_sizes(x8: Tensor, w8: Tensor, bias: Tensor | None) -> None:
    if x8.shape[1] != w8.shape[1]:
        raise Sparse24Error(f"x8 and w8 must have one k, got shapes {tuple(x8.shape)} and {tuple(w8.shape)}")
    check_bias(bias, w8.shape[0])
    if w8.device != x8.device or (bias is not None and bias.device != x8.device):
        check_same_device(x8, "x8", w8=w8, bias=bias)


def _cublas_takes(x8: Tensor, w8: Tensor) -> bool:
    """Whether cuBLAS multiplies these; where it does not, that is said once."""
    fit = x8.shape[0] > 0 and not any(t.shape[1] % _UNIT or t.stride(0) % _UNIT for t in (x8, w8))
    fit = fit and w8.shape[0] % _UNIT == 0 and x8.shape[1] > 0
    capable = torch.cuda.get_device_capability(x8.device) >= (8, 9)
    if not (fit and capable) and not torch.compiler.is_compiling():
        why = f"extents {tuple(x8.shape)} and {tuple(w8.shape)}" if capable else "this GPU has no 8-bit tensor cores"
        _library.warn_once(f"an 8-bit dense product runs in 16 bits: {why}")
    return fit and capable
