"""FLOPs of the products, for `torch.utils.flop_counter.FlopCounterMode`.

A 2:4 product of a dense [m, k] x [k, n] counts what it multiplies, m * n * k: half of the 2 * m * n * k of the dense
product, which is what papers call dense-equivalent. Packing, masks and activations count nothing, as in torch.
"""

from __future__ import annotations

from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

_OPS = torch.ops.sparse24
# Its place among the arguments of feed_forward_backward and feed_forward_float8_backward, behind the shapes.
_NEED_X, _NEED_X_FLOAT8 = 8, 4


def _times_rows(x_shape, packed_shape, *_, **__) -> int:
    """x [..., in] by packed [out, in/2]."""
    return prod(x_shape) * packed_shape[0]


def _float8(x_shape, _, packed_shape, *__, **___) -> int:
    """x8 [..., k] by packed [m, k/2], of forward and of the input gradient."""
    return prod(x_shape) * packed_shape[0]


def _grad_input(dy_shape, packed_t_shape, *_, **__) -> int:
    """dy [..., out] by packed_t [out/2, in]."""
    return prod(dy_shape) * packed_t_shape[1]


def _grad_weight(packed_shape, _, other_shape, *__, **___) -> int:
    """packed [padded/2, features], pruned along tokens, by the other operand [tokens, features]."""
    return prod(other_shape) * packed_shape[1]


def _of_activation(packed_shape, _, weight_shape, *__, **___) -> int:
    """packed [tokens, k/2], pruned along features, by a dense weight that has k features along one side."""
    return packed_shape[0] * prod(weight_shape)


def _of_activation_float8(packed_shape, _, __, weight_shape, *___, **____) -> int:
    """The same in 8 bits: a scale comes before the weight."""
    return packed_shape[0] * prod(weight_shape)


def _feed_forward(x_shape, packed_up_shape, _, packed_down_shape, *__, **___) -> int:
    """Both products: down's packed is [out, d_ff/2]."""
    tokens, d_ff = prod(x_shape[:-1]), 2 * packed_down_shape[1]
    return prod(x_shape) * packed_up_shape[0] + tokens * d_ff * packed_down_shape[0]


def _feed_forward_backward(dy_shape, gate_up_shape, x_shape, h_shape, *rest, **named) -> int:
    """Two weight gradients, the gradient of h, and that of x where it is wanted."""
    (tokens, d_model), d_ff_up, d_ff = dy_shape, gate_up_shape[1], h_shape[1]
    need_x = rest[_NEED_X] if len(rest) > _NEED_X else named["need_x"]
    return 2 * tokens * d_model * d_ff + (1 + need_x) * prod(x_shape) * d_ff_up


def _feed_forward_float8(x_shape, up_shapes, down_shapes, *_, **__) -> int:
    """As `_feed_forward`; a weight's shapes are those of packed, E and scale."""
    return _feed_forward(x_shape, *up_shapes[:2], down_shapes[0])


def _feed_forward_float8_backward(dy_shape, gate_up_shape, x_shapes, h_shapes, up_shapes, down_shapes, *rest, **named):
    """As `_feed_forward_backward`; x and h are [tokens, features], or transposed, their tokens padded."""
    need_x = rest[_NEED_X_FLOAT8] if len(rest) > _NEED_X_FLOAT8 else named["need_x"]
    of_weights = prod(x_shapes[0]) * gate_up_shape[1] + prod(h_shapes[0]) * dy_shape[1]
    return of_weights + _float8(dy_shape, (), down_shapes[0]) + need_x * _float8(gate_up_shape, (), up_shapes[0])


def _float8_grad_weight(packed_shape, _, __, x_t_shape, *___, **____) -> int:
    """packed [features, padded/2] by x8_t [in, padded]."""
    return prod(x_t_shape) * packed_shape[0]


def register() -> None:
    """Make the formulas known; once, when the ops are."""
    register_flop_formula([_OPS.sparse_mm, _OPS.sparse_mm_activation])(_times_rows)
    register_flop_formula(_OPS.sparse_mm_grad_input)(_grad_input)
    register_flop_formula(
        [
            _OPS.sparse_mm_grad_weight,
            _OPS.sparse_mm_grad_weight_,
            _OPS.sparse_mm_grad_weight_input,
            _OPS.sparse_mm_grad_weight_input_,
        ]
    )(_grad_weight)
    register_flop_formula([_OPS.sparse_mm_input, _OPS.sparse_mm_grad_input_output])(_of_activation)


def register_float8() -> None:
    """The same for 8-bit products, which are defined where they are asked for."""
    register_flop_formula(_OPS.sparse_mm_float8)(_float8)
    register_flop_formula(_OPS.grad_weight_float8_)(_float8_grad_weight)


def register_pruned_activations_float8() -> None:
    """The same for 8-bit products of pruned activations."""
    register_flop_formula(_OPS.sparse_mm_input_float8)(_of_activation_float8)
    register_flop_formula(_OPS.grad_weight_of_input_float8_)(_float8_grad_weight)


def register_feed_forward_float8() -> None:
    """The same for those of 8 bits."""
    register_flop_formula(_OPS.feed_forward_float8)(_feed_forward_float8)
    register_flop_formula(_OPS.feed_forward_float8_backward)(_feed_forward_float8_backward)


def register_feed_forward() -> None:
    """The same for the ops of whole layers."""
    register_flop_formula(_OPS.feed_forward)(_feed_forward)
    register_flop_formula(_OPS.feed_forward_backward)(_feed_forward_backward)
