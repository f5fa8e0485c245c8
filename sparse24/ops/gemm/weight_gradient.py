"""The weight gradient dW = dy^T x, in which either operand may be the 2:4 one: dy (the paper), or the layer's input x.

The 2:4 operand is what `mvue_compress` makes: kept values along tokens. With x pruned the kernel computes
dW^T = x'^T dy, whose store is transposed, so that dW is row-major in memory in either case. Sums are fp32; masked decay
is added to them before the one rounding, and so is a gradient that is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import GRAD_WEIGHT, GRAD_WEIGHT_OF_INPUT, HALF_DTYPES, SparseOperand, as_rows, padded_tokens
from .._common import call_without_grad, check_packed_operand, check_same_device, define_op
from ..arguments import check_no_shared_memory, check_writable, names_wrong_types
from . import launch
from .decay import DecayTerm, as_schema_has_it, check_decay_term, decay_after
from .dense import dense, matmul, output_dtype


class _Pruning(NamedTuple):
    """Which operand is pruned, and what messages call the two."""

    pass_code: int
    packed: str
    other: str
    other_features: str


_OUTPUT = _Pruning(GRAD_WEIGHT, "packed_dy", "x", "in_features")
_INPUT = _Pruning(GRAD_WEIGHT_OF_INPUT, "packed_x", "dy", "out_features")


def _check_operands(pruning: _Pruning, packed: Tensor, E: Tensor, other: Tensor, features: int) -> None:
    name = pruning.other
    if other.dim() != 2:
        raise Sparse24Error(
            f"{name} must be 2-D, (tokens, {pruning.other_features}), got shape {tuple(other.shape)}; flatten it first"
        )
    padded = padded_tokens(other.shape[0])
    check_packed_operand(packed, E, pruning.packed, (padded // 2, features), features, padded)
    if packed.device != other.device:
        check_same_device(other, name, **{pruning.packed: packed})
    if packed.dtype != other.dtype:
        raise Sparse24DtypeError(
            f"{name} and {pruning.packed} must have the same dtype, got {other.dtype} and {packed.dtype}"
        )


def _check_out(pruning: _Pruning, other: Tensor, shape: tuple[int, int], out: Tensor) -> None:
    output_dtype(other, out.dtype, pruning.other)
    if out.device != other.device:
        check_same_device(other, pruning.other, out=out)
    if out.shape != shape or not out.is_contiguous():
        raise Sparse24Error(
            f"out must be contiguous of shape {shape}, got {tuple(out.shape)} with strides {out.stride()}"
        )


def _check_memory(
    pruning: _Pruning, operands: tuple[Tensor, Tensor, Tensor], out: Tensor, decay: DecayTerm | None
) -> None:
    packed, E, other = operands
    read = [(pruning.packed, packed), (f"E of {pruning.packed}", E), (pruning.other, other)]
    if decay is not None:
        read += [("decay's weight", w) for w in decay.weights] + [("decay's mask", mask) for mask in decay.masks]
    check_no_shared_memory([("out", out)], read)


def _compute_into(
    pruning: _Pruning, operand: SparseOperand, other: Tensor, out: Tensor, accumulate: bool, decay: DecayTerm | None
) -> None:
    tokens, output_pruned = other.shape[0], pruning is _OUTPUT
    if out.numel() == 0:
        return
    if tokens == 0:
        if not accumulate:
            out.zero_()
    else:
        rows = as_rows(other)
        m, n = out.shape if output_pruned else out.shape[::-1]
        problem = launch.problem_of(pruning.pass_code, (m, n, tokens), rows, out)
        if launch.run(problem, operand, rows, out, accumulate=accumulate, decay=decay):
            return
        values = dense(operand, m, padded_tokens(tokens), other.dtype)[:tokens]
        left, right = (values, rows) if output_pruned else (rows, values)
        if accumulate:  # one rounding, at the end
            out.add_(matmul(left.T, right, torch.float32 if other.dtype in HALF_DTYPES else other.dtype))
        else:
            out.copy_(matmul(left.T, right, out.dtype))
    if decay is not None:
        decay_after(out, decay)


def _term(factor: Tensor | None, weights: list[Tensor], masks: list[Tensor]) -> DecayTerm | None:
    return None if factor is None and not weights and not masks else DecayTerm(factor, weights, masks)


def _shape_of(pruning: _Pruning, packed, E, other, features, decay) -> tuple[int, int]:
    """Of the gradient; checks what it is made of."""
    _check_operands(pruning, packed, E, other, features)
    shape = (features, other.shape[1]) if pruning is _OUTPUT else (other.shape[1], features)
    if decay is not None:
        check_decay_term(other, shape, decay)
    return shape


def _new_gradient(pruning: _Pruning, packed, E, other, features, out_dtype, decay) -> Tensor:
    shape = _shape_of(pruning, packed, E, other, features, decay)
    dw = other.new_empty(shape, dtype=output_dtype(other, out_dtype, pruning.other))
    _compute_into(pruning, SparseOperand(packed, E, k_major=False), other, dw, False, decay)
    return dw


def _write_gradient(pruning: _Pruning, packed, E, other, features, out, accumulate, decay) -> None:
    _check_out(pruning, other, _shape_of(pruning, packed, E, other, features, decay), out)
    _check_memory(pruning, (packed, E, other), out, decay)
    _compute_into(pruning, SparseOperand(packed, E, k_major=False), other, out, accumulate, decay)


def compute_grad_weight(packed_dy, E_dy, x, out_features, out_dtype, into: Tensor | None) -> Tensor | None:
    """dW from operands that have been checked; None where it was added to `into`, which is checked here."""
    operand, in_features = SparseOperand(packed_dy, E_dy, k_major=False), x.shape[1]
    if into is not None:
        _check_out(_OUTPUT, x, (out_features, in_features), into)
        _check_memory(_OUTPUT, (packed_dy, E_dy, x), into, None)
        return _compute_into(_OUTPUT, operand, x, into, True, None)
    dw = x.new_empty(out_features, in_features, dtype=out_dtype)
    _compute_into(_OUTPUT, operand, x, dw, False, None)
    return dw


def _define(pruning: _Pruning, name: str, schema: str) -> tuple:
    """The op that makes a new tensor and the one that writes to `out`; `schema` of the operands they share."""
    term = "Tensor? decay_factor, Tensor[] decay_weights, Tensor[] decay_masks"

    def new(packed, E, other, features, out_dtype, *decay):
        return _new_gradient(pruning, packed, E, other, features, out_dtype, _term(*decay))

    def fake(packed, E, other, features, out_dtype, *decay):
        shape = _shape_of(pruning, packed, E, other, features, _term(*decay))
        return other.new_empty(shape, dtype=output_dtype(other, out_dtype, pruning.other))

    def into_(packed, E, other, features, out, accumulate, *decay):
        _write_gradient(pruning, packed, E, other, features, out, accumulate, _term(*decay))

    def fake_(packed, E, other, features, out, accumulate, *decay):
        _check_out(pruning, other, _shape_of(pruning, packed, E, other, features, _term(*decay)), out)

    return (
        define_op(name, f"({schema}, ScalarType? out_dtype, {term}) -> Tensor", new, fake),
        define_op(f"{name}_", f"({schema}, Tensor(a!) out, bool accumulate, {term}) -> ()", into_, fake_),
    )


_OPS_OUTPUT = _define(_OUTPUT, "sparse_mm_grad_weight", "Tensor packed_dy, Tensor E_dy, Tensor x, int out_features")
_OPS_INPUT = _define(_INPUT, "sparse_mm_grad_weight_input", "Tensor packed_x, Tensor E_x, Tensor dy, int in_features")


def _grad_weight(ops: tuple, name: str, operands: tuple, out, accumulate, out_dtype, decay) -> Tensor:
    if accumulate and out is None:
        raise Sparse24Error("accumulate=True needs out=, the gradient to add to")
    op, op_ = ops
    term = as_schema_has_it(decay)
    if out is None:
        return call_without_grad(name, "functional.sparse_linear", op, (*operands, out_dtype, *term))
    if out_dtype is not None and out_dtype != out.dtype:
        raise Sparse24DtypeError(f"out_dtype {out_dtype} contradicts out, which is {out.dtype}; pass one of them")
    check_writable(("out", out))
    if torch.is_grad_enabled():
        with torch.no_grad():
            op_(*operands, out, accumulate, *term)
    else:  # as backward passes run: the bracket costs as much as a launch
        op_(*operands, out, accumulate, *term)
    torch.autograd.graph.increment_version(out)
    return out


@names_wrong_types
def sparse_mm_grad_weight(
    packed_dy: Tensor,
    E_dy: Tensor,
    x: Tensor,
    out_features: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    decay: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """dW = dy^T x, where dy is 2:4 sparse along tokens.

    packed_dy, E_dy  from `mvue_compress` of dy (tokens, out_features)
    x                (tokens, in_features), the layer's input, in packed_dy's dtype
    out              contiguous (out_features, in_features) to write to: x's dtype or float32; default a new tensor
    accumulate       add to `out` instead of overwriting it: gradient accumulation without another pass
    out_dtype        of a new tensor: x's dtype (default) or float32
    decay            (factor, weights, masks): adds factor * (1 - mask) * weight before the one rounding. One float32
                     on the device; one weight, or two stacked along out_features, and the uint16 mask of each

    The decay is part of the product where weights are in the dtype of dW and row- or column-major alike, the first of
    two with rows in multiples of 64, and nothing is padded; else `foreach_masked_decay_` adds it right after.

    Raises, before anything is launched, Sparse24Error for `accumulate` without `out`, and when packed_dy, E_dy, x, out
    or a part of decay does not fit in shape, size, strides or device, or out shares memory with any of them;
    Sparse24DtypeError for a dtype that does not, and for an out_dtype that is not out's.
    """
    operands = (packed_dy, E_dy, x, out_features)
    return _grad_weight(_OPS_OUTPUT, "sparse_mm_grad_weight", operands, out, accumulate, out_dtype, decay)


@names_wrong_types
def sparse_mm_grad_weight_input(
    packed_x: Tensor,
    E_x: Tensor,
    dy: Tensor,
    in_features: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    decay: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """dW = dy^T x, where x is 2:4 sparse along tokens: packed in forward, and kept in place of x.

    packed_x, E_x  from `mvue_compress` of x (tokens, in_features): 1.125 bytes an element of x in 16 bits, not 2
    dy             (tokens, out_features), the output's gradient, in packed_x's dtype
    returns        (out_features, in_features)

    The rest, errors too, as in `sparse_mm_grad_weight`.
    """
    operands = (packed_x, E_x, dy, in_features)
    return _grad_weight(_OPS_INPUT, "sparse_mm_grad_weight_input", operands, out, accumulate, out_dtype, decay)
