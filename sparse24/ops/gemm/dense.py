"""Products where no sparse kernel runs: dense ones over the unpacked operand, the same function up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import Sparse24DtypeError
from ...formats import SparseOperand
from .._common import check_same_device


def dense(operand: SparseOperand, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """The operand as a dense product takes it: [m, k] where values lie along k, else [k, m].

    On the CPU, fp32 values may meet 16-bit activations: they are cast to `dtype`.
    """
    rows, cols = (m, k) if operand.k_major else (k, m)
    values = torch.ops.sparse24.decompress.default(operand.values, operand.E, rows, cols, not operand.k_major)
    return values if values.dtype == dtype else values.to(dtype)


def matmul(lhs: Tensor, rhs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """lhs @ rhs with an fp32 result where asked for; plain torch otherwise."""
    if out_dtype == lhs.dtype:
        return lhs @ rhs
    return (lhs.to(out_dtype) @ rhs.to(out_dtype)).to(out_dtype)


def output_dtype(t: Tensor, out_dtype: torch.dtype | None, name: str = "x") -> torch.dtype:
    """The dtype of a product of `t`: its own, or float32 where asked for. No layer asks for a float32 forward or input
    gradient; it is there for whoever sums products of several calls, as tensor-parallel code does.
    """
    if out_dtype is None or out_dtype == t.dtype or out_dtype == torch.float32:
        return out_dtype or t.dtype
    raise Sparse24DtypeError(f"out_dtype must be {name}'s dtype or torch.float32, got {out_dtype} for {t.dtype}")


def check_values_fit(packed: Tensor, packed_name: str, t: Tensor, name: str) -> None:
    """Packed values of a weight and the dense operand: one device, and one dtype but for fp32 values on the CPU."""
    if packed.device != t.device:
        check_same_device(t, name, **{packed_name: packed})
    if packed.dtype == t.dtype:
        return
    # On the CPU an fp32 master may serve 16-bit activations: unpacking casts, as autocast does for dense layers.
    on_cpu = t.device.type == "cpu" and packed.dtype in (torch.float32, torch.float64) and t.is_floating_point()
    if not on_cpu:
        raise Sparse24DtypeError(
            f"{name} and {packed_name} must have the same dtype, got {t.dtype} and {packed.dtype}; "
            f"cast {name}, run under autocast, or pack with dtype={t.dtype}"
        )
