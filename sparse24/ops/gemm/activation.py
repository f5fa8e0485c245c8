"""Forward products of a feed-forward layer that make its activation too.

The GPU computes it in the epilogue of the product, from what is in registers: a pass that reads the product is saved.
Where it does not take the operands as they are, each op is the two it is made of, and has the same bits.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import Sparse24Error
from ...formats import ACTIVATED_FORWARD, GATED_FORWARD, META_BLOCK, SparseOperand, as_rows
from .._common import call_without_grad, define_op
from ..activations import KINDS, compute_activation
from ..arguments import names_wrong_types
from . import launch
from .products import check_sparse_mm, compute_sparse_mm, empty_rows


def _check_sparse_mm_activation(x, packed, E, out_features, kind, gated, bias) -> int:
    if kind not in KINDS:
        raise Sparse24Error(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return check_sparse_mm(x, packed, E, out_features, bias, None)[0]


def compute_sparse_mm_activation(x, packed, E, out_features, kind, gated, bias):
    in_features = _check_sparse_mm_activation(x, packed, E, out_features, kind, gated, bias)
    width = out_features // 2 if gated else out_features
    if x.is_cuda and x.numel() > 0 and (not gated or width % META_BLOCK == 0):
        y, y_rows = empty_rows(x, out_features, x.dtype)
        h, h_rows = empty_rows(x, width, x.dtype)
        rows = as_rows(x)
        bias = bias if bias is None else bias.contiguous()
        pass_code = GATED_FORWARD if gated else ACTIVATED_FORWARD
        problem = launch.problem_of(pass_code, (out_features, rows.shape[0], in_features), rows, y)
        activation = (h_rows.data_ptr(), width, KINDS[kind])
        if launch.run(problem, SparseOperand(packed, E), rows, y_rows, bias=bias, activation=activation):
            return y, h
        del y, y_rows, h, h_rows  # or they would be held twice
    y = compute_sparse_mm(x, packed, E, out_features, bias, None)
    return y, compute_activation(y, kind, gated)


def fake_sparse_mm_activation(x, packed, E, out_features, kind, gated, bias):
    _check_sparse_mm_activation(x, packed, E, out_features, kind, gated, bias)
    width = out_features // 2 if gated else out_features
    return x.new_empty((*x.shape[:-1], out_features)), x.new_empty((*x.shape[:-1], width))


_op_sparse_mm_activation = define_op(
    "sparse_mm_activation",
    "(Tensor x, Tensor packed, Tensor E, int out_features, str kind, bool gated, Tensor? bias) -> (Tensor, Tensor)",
    compute_sparse_mm_activation,
    fake_sparse_mm_activation,
)


@names_wrong_types
def sparse_mm_activation(
    x: Tensor, packed: Tensor, E: Tensor, out_features: int, kind: str, *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, h): y = x W^T + bias as `sparse_mm` has it, and h = act(y), from one kernel.

    x, packed, E, out_features, bias  as in `sparse_mm`
    kind                              of the activation, as in `activation`
    returns                           two (..., out_features), row-major; h has the bits of `activation`(y)

    Raises as `sparse_mm` does, and Sparse24Error for an unknown kind.
    """
    args = (x, packed, E, out_features, kind, False, bias)
    return call_without_grad("sparse_mm_activation", "functional.mlp", _op_sparse_mm_activation, args)


@names_wrong_types
def sparse_mm_gated_activation(
    x: Tensor, packed: Tensor, E: Tensor, d_ff: int, kind: str = "silu", *, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(gate_up, h): gate_up = x W^T + bias with W = [gate | up] stacked, and h = act(gate) * up, from one kernel.

    x          (..., in_features)
    packed, E  from `compress` of W, (2*d_ff, in_features)
    kind       of the activation, as in `gated_activation`
    bias       (2*d_ff,) in x's dtype, or None
    returns    (..., 2*d_ff) and (..., d_ff), row-major; h has the bits of `gated_activation`(gate_up)

    It is the two ops where d_ff is not a multiple of 64. Raises as `sparse_mm_activation` does.
    """
    args = (x, packed, E, 2 * d_ff, kind, True, bias)
    return call_without_grad("sparse_mm_gated_activation", "functional.gated_mlp", _op_sparse_mm_activation, args)
