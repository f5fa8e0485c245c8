"""Products of 8-bit operands: forward and input gradient are one, the weight gradient another."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ... import _library
from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import (
    DTYPE_CODE,
    FORMATS,
    FORWARD,
    GRAD_WEIGHT,
    REFERENCE_DTYPES,
    WEIGHT_DTYPES,
    GemmProblem,
    SparseOperand,
    as_rows,
    names,
)
from .. import flops
from .._common import check_same_device, define_op, where
from ..arguments import check_no_self_overlap, check_writable, names_wrong_types
from ..gemm import padding
from .operands import E4M3, check_packed, check_scale
from .weights import unpack_dense

#: sums of 8-bit products: the tensor cores keep some 14 bits of them; "promoted" adds every 256 k in fp32
ACCUMULATIONS = {"auto": 0, "fast": 1, "promoted": 2}
#: a sparse operand: packed, E and scale
Weight = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=4096)
def _plan(problem: GemmProblem, accumulation: int, index: int) -> tuple[int, int]:
    """(config, bytes of workspace) of a product."""
    library = _library.binding()
    config = library.sparse_gemm_configs(problem, _library.CUDA, index, accumulation)[0]
    return config, library.sparse_gemm_workspace_bytes(problem, config, _library.CUDA, index, accumulation)


@lru_cache(maxsize=4096)
def _unsupported(problem: GemmProblem, rhs_ld: int, out_ld: int, accumulation: int, index: int) -> str:
    return _library.binding().sparse_gemm_unsupported(problem, rhs_ld, out_ld, _library.CUDA, index, accumulation)


@lru_cache(maxsize=64)
def why_unavailable(index: int) -> str:
    """Why the tensor cores of CUDA device `index` take no 8-bit products; "" if they do."""
    problem = GemmProblem(FORWARD, 256, 256, 256, DTYPE_CODE[E4M3], DTYPE_CODE[FORMATS[E4M3].wide_dtype])
    return _library.binding().sparse_gemm_unsupported(problem, 256, 256, _library.CUDA, index, 0)


def launch(
    problem: GemmProblem, lhs: SparseOperand, rhs: Tensor, rhs_scale: Tensor, out: Tensor, *,
    bias: Tensor | None = None, accumulate: bool = False, accumulation: int = 0,
) -> bool:  # fmt: skip
    """The product on the GPU's tensor cores; False, and nothing done, where they do not take it."""
    library, backend, index, stream = where(out)
    if backend != _library.CUDA or problem.k == 0:  # a sum of nothing, and perhaps a bias
        return False
    rhs = as_rows(rhs)  # a single row may have any stride
    rhs_ld, out_ld, rhs_pointer, out_pointer = rhs.stride(0), out.stride(0), rhs.data_ptr(), out.data_ptr()
    packed_pointer, E_pointer = lhs.values.data_ptr(), lhs.E.data_ptr()
    terms = dict(bias=bias, accumulate=accumulate, accumulation=accumulation)
    if (rhs_pointer | out_pointer | packed_pointer | E_pointer) % 16 or _unsupported(
        problem, rhs_ld, out_ld, accumulation, index
    ):
        return _launch_padded(problem, lhs, rhs, rhs_scale, out, index, **terms)
    config, scratch_bytes = _plan(problem, accumulation, index)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=out.device) if scratch_bytes else None
    library.sparse_gemm(
        problem,
        (packed_pointer, E_pointer, lhs.scale.data_ptr()),
        (rhs_pointer, rhs_ld, rhs_scale.data_ptr()),
        (out_pointer, out_ld),
        (0 if bias is None else bias.data_ptr(), accumulate, None, None),
        (config, 0 if scratch is None else scratch.data_ptr()),
        backend,
        index,
        stream,
        accumulation,
    )
    return True


def _launch_padded(problem, lhs, rhs, rhs_scale, out, index, *, bias, accumulate, accumulation) -> bool:
    """The product by padded operands; False, and said once, where the GPU does not take those either."""
    to = padding.padded_extents(*problem[:4], out.element_size(), lhs.format)
    padded = problem._replace(m=to.m, n=to.n, k=to.k)
    if why := _unsupported(padded, to.rhs_ld, to.out_ld, accumulation, index):
        _library.warn_once(f"an 8-bit product multiplies densely over the unpacked operand: {why}")
        return False
    p = padding.pad(problem, lhs, rhs, out, accumulate)
    problem = padded._replace(out_dtype=DTYPE_CODE[p.out.dtype])
    terms = dict(bias=bias, accumulate=p.accumulate, accumulation=accumulation)
    if not launch(problem, p.lhs, p.rhs, rhs_scale, p.out, **terms):
        return False
    p.finish()
    return True


def check_dense(x8: Tensor, x_scale: Tensor, name: str) -> None:
    rows_lie_so = x8.dim() == 2 and x8.stride(1) == 1 and (x8.stride(0) >= x8.shape[1] or x8.shape[0] < 2)
    if x8.dtype != E4M3 or not (rows_lie_so or x8.dim() == 2 and 0 in x8.shape):
        raise Sparse24DtypeError(
            f"{name} must be 2-D e4m3 with rows as they lie in memory, as `quantize` makes it, got {x8.dtype} of shape "
            f"{tuple(x8.shape)} with strides {x8.stride()}"
        )
    check_scale(x8, f"scale of {name}", x_scale)


def check_weight(x: Tensor, weight: Weight, out_features: int, k: int, bias: Tensor | None) -> None:
    """The sparse operand of a product with x (tokens, k) or its 8 bits, and the bias."""
    packed, E, scale = weight
    check_packed(packed, E, scale, "packed", out_features, k)
    if packed.device != x.device or (bias is not None and bias.device != x.device):
        check_same_device(x, "x8", packed=packed, bias=bias)
    if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):  # the short way first
        check_bias(bias, out_features)


def check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
        raise Sparse24Error(
            f"bias must be floating of shape {(out_features,)}, got {bias.dtype} of shape {tuple(bias.shape)}"
        )


def is_written(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products write `dtype`: float64 on the CPU only, where no kernel runs."""
    return dtype in WEIGHT_DTYPES or (dtype in REFERENCE_DTYPES and device.type == "cpu")


def check_out_dtype(out_dtype: torch.dtype, like: Tensor) -> None:
    if out_dtype not in WEIGHT_DTYPES and not is_written(out_dtype, like.device):  # the short way first
        raise Sparse24DtypeError(f"out_dtype must be {names(WEIGHT_DTYPES)}, got {out_dtype}")


def _check_sparse_mm(x8, x_scale, weight, out_features, bias, out_dtype) -> None:
    check_dense(x8, x_scale, "x8")
    check_weight(x8, weight, out_features, x8.shape[1], bias)
    check_out_dtype(out_dtype, x8)


def check_grad_weight(dy: Weight, x8_t: Tensor, x_scale: Tensor, out: Tensor) -> None:
    packed, E, scale = dy
    check_dense(x8_t, x_scale, "x8_t")
    if (
        out.dim() != 2
        or out.shape[1] != x8_t.shape[0]
        or (out.dtype not in WEIGHT_DTYPES and not is_written(out.dtype, out.device))
    ):
        raise Sparse24Error(
            f"out must be {names(WEIGHT_DTYPES)} of shape (features of dy, {x8_t.shape[0]}), got {out.dtype} of "
            f"shape {tuple(out.shape)}"
        )
    check_packed(packed, E, scale, "packed_dy", out.shape[0], x8_t.shape[1])
    if packed.device != x8_t.device or out.device != x8_t.device:
        check_same_device(x8_t, "x8_t", packed_dy=packed, out=out)
    check_no_self_overlap(out, "out")
    check_writable(("out", out))


def _sparse_mm_float8(x8, x_scale, packed, E, scale, out_features, bias, out_dtype, accumulation) -> Tensor:
    weight = (packed, E, scale)
    _check_sparse_mm(x8, x_scale, weight, out_features, bias, out_dtype)
    return compute_sparse_mm_float8(x8, x_scale, weight, bias, out_dtype, accumulation)


def compute_sparse_mm_float8(
    x8: Tensor, x_scale: Tensor, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype, accumulation: int = 0
) -> Tensor:
    """Of operands that have been checked."""
    (tokens, k), out_features = x8.shape, weight[0].shape[0]
    y = x8.new_empty(tokens, out_features, dtype=FORMATS[E4M3].wide_dtype if x8.is_cuda else out_dtype)
    if y.numel() == 0:
        return y.to(out_dtype)
    problem = GemmProblem(FORWARD, out_features, tokens, k, DTYPE_CODE[E4M3], DTYPE_CODE.get(y.dtype, -1))
    bias = None if bias is None else bias.to(y.dtype).contiguous()
    packed, E, scale = weight
    lhs = SparseOperand(packed, E, scale=scale)
    if not launch(problem, lhs, x8, x_scale, y, bias=bias, accumulation=accumulation):
        w = unpack_dense(*weight, out_features, k, torch.float32)
        product = (x8.float() * x_scale) @ w.T
        y.copy_(product if bias is None else product + bias)
    return y if y.dtype == out_dtype else y.to(out_dtype)


def _sparse_mm_float8_fake(x8, x_scale, packed, E, scale, out_features, bias, out_dtype, accumulation) -> Tensor:
    _check_sparse_mm(x8, x_scale, (packed, E, scale), out_features, bias, out_dtype)
    return x8.new_empty((x8.shape[0], out_features), dtype=out_dtype)


_op_sparse_mm_float8 = define_op(
    "sparse_mm_float8",
    "(Tensor x8, Tensor x_scale, Tensor packed, Tensor E, Tensor scale, int out_features, Tensor? bias, "
    "ScalarType out_dtype, int accumulation) -> Tensor",
    _sparse_mm_float8,
    _sparse_mm_float8_fake,
)


@names_wrong_types
def sparse_mm_float8(
    x8: Tensor, x_scale: Tensor, packed: Tensor, E: Tensor, scale: Tensor, out_features: int, *,
    bias: Tensor | None = None, out_dtype: torch.dtype = FORMATS[E4M3].wide_dtype, accumulation: str = "auto",
) -> Tensor:  # fmt: skip
    """y = x W^T + bias for 8-bit x and W, W 2:4 sparse: forward, and with (packed_t, E_t) the input gradient.

    x8 (tokens, k), x_scale    from `quantize`            packed (out_features, k/2), E, scale   from `pack_float8_`
    out_dtype     of y; the GPU's kernels write bfloat16, other dtypes are cast from it
    accumulation  "fast", "promoted" (sums of 256 k are added in fp32: for sums of one sign), or "auto"

    Raises Sparse24Error where an operand does not have the size that the others declare, and for an unknown
    accumulation; Sparse24DtypeError for an operand or a scale of another kind.
    """
    if accumulation not in ACCUMULATIONS:
        raise Sparse24Error(f"accumulation must be one of {', '.join(ACCUMULATIONS)}, got {accumulation!r}")
    weight = (packed, E, scale)
    return _op_sparse_mm_float8(x8, x_scale, *weight, out_features, bias, out_dtype, ACCUMULATIONS[accumulation])


def _grad_weight_float8(packed, E, scale, x8_t, x_scale, out, accumulate) -> None:
    check_grad_weight((packed, E, scale), x8_t, x_scale, out)
    compute_grad_weight_float8((packed, E, scale), x8_t, x_scale, out, accumulate)


def compute_grad_weight_float8(dy: Weight, x8_t: Tensor, x_scale: Tensor, out: Tensor, accumulate: bool) -> None:
    """Of operands that have been checked; dy is pruned."""
    (m, n), k = out.shape, x8_t.shape[1]
    if out.numel() == 0:
        return
    lies_in_rows = out.is_contiguous() and out.stride(0) >= n  # a single row may have any stride
    written = lies_in_rows and out.dtype in (FORMATS[E4M3].wide_dtype, torch.float32)
    into = out if written else out.new_empty((m, n), dtype=torch.float32)
    problem = GemmProblem(GRAD_WEIGHT, m, n, k, DTYPE_CODE[E4M3], DTYPE_CODE[into.dtype])
    packed, E, scale = dy
    lhs = SparseOperand(packed, E, scale=scale)
    if launch(problem, lhs, x8_t, x_scale, into, accumulate=accumulate and written):
        if not written:
            out.add_(into) if accumulate else out.copy_(into)
        return
    product = unpack_dense(*dy, m, k, torch.float32) @ (x8_t.float() * x_scale).T
    out.add_(product) if accumulate else out.copy_(product)


_op_grad_weight_float8_ = define_op(
    "grad_weight_float8_",
    "(Tensor packed, Tensor E, Tensor scale, Tensor x8_t, Tensor x_scale, Tensor(a!) out, bool accumulate) -> ()",
    _grad_weight_float8,
    lambda packed, E, scale, x8_t, x_scale, out, _: check_grad_weight((packed, E, scale), x8_t, x_scale, out),
)
flops.register_float8()


@names_wrong_types
def grad_weight_float8_(
    packed: Tensor, E: Tensor, scale: Tensor, x8_t: Tensor, x_scale: Tensor, out: Tensor, accumulate: bool = False
) -> None:
    """out (m, n) = or += the weight gradient MVUE(dy)^T x of 8-bit operands; sums are promoted to fp32.

    packed (m, padded/2), E, scale  from `mvue_quantize`      x8_t (n, padded), x_scale  from `quantize`

    Raises as `sparse_mm_float8`, and for an out that cannot be written in place.
    """
    _op_grad_weight_float8_(packed, E, scale, x8_t, x_scale, out, accumulate)
