"""Products of a pruned activation and a dense weight: y = x' W^T and dx = dy' W.

Here the sparse operand is the activation: tokens are its rows, and two of each four neighbouring features of a token
are kept. The weight is nn.Linear's own, read as it lies. Each runs the sparse GEMM where the library has one for the
device and dtype, with zeros around operands of odd sizes (padding.py), and otherwise a dense product over the unpacked
operand: the same function up to rounding, noted once.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import FORWARD_OF_INPUT, GRAD_INPUT_OF_OUTPUT, SparseOperand, as_rows
from .._common import call_without_grad, check_packed_operand, check_same_device, check_weight, define_op
from ..arguments import names_wrong_types
from . import launch
from .dense import dense

_REMEDY = "a function of sparse24.functional"


def _check_operands(packed: Tensor, E: Tensor, name: str, features: str, weight: Tensor, k: int) -> None:
    """The rules on a pruned activation of `k` features and a weight that has as many along one side."""
    if packed.dim() != 2:
        raise Sparse24Error(f"{name} must be 2-D, (tokens, {features}/2), got shape {tuple(packed.shape)}")
    tokens = packed.shape[0]
    check_packed_operand(packed, E, name, (tokens, k // 2), tokens, k)
    if packed.device != weight.device:
        check_same_device(packed, name, weight=weight)
    if packed.dtype != weight.dtype:
        raise Sparse24DtypeError(
            f"{name} and weight must have the same dtype, got {packed.dtype} and {weight.dtype}; cast the weight"
        )


# ---- forward --------------------------------------------------------------------------------------------------------


def check_sparse_mm_input(packed_x: Tensor, E_x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_weight(weight, "weight")
    out_features, in_features = weight.shape
    _check_operands(packed_x, E_x, "packed_x", "in_features", weight, in_features)
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != weight.dtype):
        raise Sparse24Error(
            f"bias must have shape ({out_features},) and weight's dtype {weight.dtype}, got {tuple(bias.shape)} and "
            f"{bias.dtype}"
        )
    if bias is not None and bias.device != weight.device:
        check_same_device(weight, "weight", bias=bias)


def _sparse_mm_input(packed_x, E_x, weight, bias):
    check_sparse_mm_input(packed_x, E_x, weight, bias)
    return compute_sparse_mm_input(packed_x, E_x, weight, bias)


def compute_sparse_mm_input(packed_x: Tensor, E_x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of operands that have been checked."""
    tokens, (out_features, in_features) = packed_x.shape[0], weight.shape
    y = packed_x.new_empty(tokens, out_features)
    if y.numel() == 0:
        return y
    if bias is not None:
        y.copy_(bias)  # the kernel adds to it in fp32: rounded once, as a bias of its own would be
    if in_features == 0:
        return y if bias is not None else y.zero_()
    rows, x = as_rows(weight), SparseOperand(packed_x, E_x)
    problem = launch.problem_of(FORWARD_OF_INPUT, (tokens, out_features, in_features), rows, y)
    if launch.run(problem, x, rows, y, accumulate=bias is not None):
        return y
    return linear(dense(x, tokens, in_features, weight.dtype), weight, bias)


def fake_sparse_mm_input(packed_x, E_x, weight, bias):
    check_sparse_mm_input(packed_x, E_x, weight, bias)
    return packed_x.new_empty(packed_x.shape[0], weight.shape[0])


_op_sparse_mm_input = define_op(
    "sparse_mm_input",
    "(Tensor packed_x, Tensor E_x, Tensor weight, Tensor? bias) -> Tensor",
    _sparse_mm_input,
    fake_sparse_mm_input,
)


@names_wrong_types
def sparse_mm_input(packed_x: Tensor, E_x: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, where x (tokens, in_features) is 2:4 sparse along in_features and W is dense.

    packed_x, E_x  kept values (tokens, in_features/2) and their metadata, of `metadata_bytes`(tokens, in_features)
    weight         (out_features, in_features) in packed_x's dtype, as nn.Linear has it; any strides, read as it lies
                   where rows are side by side
    bias           (out_features,) in the weight's dtype, or None
    returns        (tokens, out_features), row-major, in the weight's dtype; sums are fp32

    Any number of tokens; features in multiples of 4. bf16 and fp16, on the CPU float32 and float64 too.

    Raises, before anything is launched, Sparse24Error when weight, packed_x, E_x or bias do not fit one another in
    shape, size or device; Sparse24DtypeError when packed_x has another dtype than the weight.
    """
    return call_without_grad("sparse_mm_input", _REMEDY, _op_sparse_mm_input, (packed_x, E_x, weight, bias))


# ---- input gradient -------------------------------------------------------------------------------------------------


def check_grad_input_output(packed_dy: Tensor, E_dy: Tensor, weight: Tensor) -> None:
    check_weight(weight, "weight")
    _check_operands(packed_dy, E_dy, "packed_dy", "out_features", weight, weight.shape[0])


def _sparse_mm_grad_input_output(packed_dy, E_dy, weight):
    check_grad_input_output(packed_dy, E_dy, weight)
    return compute_grad_input_output(packed_dy, E_dy, weight)


def compute_grad_input_output(packed_dy: Tensor, E_dy: Tensor, weight: Tensor) -> Tensor:
    """Of operands that have been checked."""
    tokens, (out_features, in_features) = packed_dy.shape[0], weight.shape
    dx = packed_dy.new_empty(tokens, in_features)
    if dx.numel() == 0:
        return dx
    if out_features == 0:
        return dx.zero_()
    rows, dy = as_rows(weight), SparseOperand(packed_dy, E_dy)
    problem = launch.problem_of(GRAD_INPUT_OF_OUTPUT, (tokens, in_features, out_features), rows, dx)
    if launch.run(problem, dy, rows, dx):
        return dx
    return dense(dy, tokens, out_features, weight.dtype) @ weight


def fake_grad_input_output(packed_dy, E_dy, weight):
    check_grad_input_output(packed_dy, E_dy, weight)
    return packed_dy.new_empty(packed_dy.shape[0], weight.shape[1])


_op_sparse_mm_grad_input_output = define_op(
    "sparse_mm_grad_input_output",
    "(Tensor packed_dy, Tensor E_dy, Tensor weight) -> Tensor",
    _sparse_mm_grad_input_output,
    fake_grad_input_output,
)


@names_wrong_types
def sparse_mm_grad_input_output(packed_dy: Tensor, E_dy: Tensor, weight: Tensor) -> Tensor:
    """dx = dy W, where dy (tokens, out_features) is 2:4 sparse along out_features and W is dense.

    packed_dy, E_dy  kept values (tokens, out_features/2) and their metadata, of `metadata_bytes`(tokens, out_features)
    weight           (out_features, in_features), as in `sparse_mm_input`
    returns          (tokens, in_features), row-major, in the weight's dtype; sums are fp32

    The rest, errors too, as in `sparse_mm_input`.
    """
    args = (packed_dy, E_dy, weight)
    return call_without_grad("sparse_mm_grad_input_output", _REMEDY, _op_sparse_mm_grad_input_output, args)
