"""Activations that leave in e4m3."""

from __future__ import annotations

from torch import Tensor

from ...formats import DTYPE_CODE, as_major
from ...reference import float8 as reference
from ...reference import gated_activation
from .._common import define_op, matrix, pointer, where
from ..activations import KINDS, check_input
from ..arguments import names_wrong_types
from .operands import Cast, check_cast, empty_float8, note, output, takes_one_pass


def _activation_quantize(gate_up, kind, gated, scale, keep_h, transposed, amax, counts) -> tuple[Tensor, ...]:
    cast = (scale, amax, counts)
    check_cast(gate_up, cast)
    check_input(gate_up, kind, gated)
    return compute_activation_quantize(gate_up, kind, gated, cast, keep_h, transposed)


def compute_activation_quantize(
    gate_up: Tensor, kind: str, gated: bool, cast: Cast, keep_h: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of operands that have been checked."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // (2 if gated else 1)
    out = empty_float8(gate_up, tokens, width, True, transposed)
    library, *place = where(gate_up)
    if library is None:
        h = gated_activation(gate_up, kind, gated)
        note(h, cast)
        x8 = reference.to_float8(h, cast[0])
        return h if keep_h else h.new_empty(0), x8, reference.transpose_padded(x8) if transposed else out[1]
    gate_up = as_major(gate_up)
    stored = keep_h or not takes_one_pass(width, gate_up)
    h = gate_up.new_empty((tokens, width) if stored else 0)
    to = (pointer(h), DTYPE_CODE[h.dtype], tokens, width, width, 1)
    written = output(*out, cast, tokens * width)
    library.activation_forward(KINDS[kind], gated, matrix(gate_up), to, written, None, *place)
    return h if keep_h or not stored else h.new_empty(0), *out


def _activation_quantize_fake(gate_up, kind, gated, scale, keep_h, transposed, amax, counts):
    check_cast(gate_up, (scale, amax, counts))
    check_input(gate_up, kind, gated)
    shape = (gate_up.shape[0], gate_up.shape[1] // (2 if gated else 1))
    return gate_up.new_empty(shape if keep_h else (0,)), *empty_float8(gate_up, *shape, True, transposed)


_op_activation_quantize = define_op(
    "activation_quantize",
    "(Tensor gate_up, str kind, bool gated, Tensor scale, bool keep_h, bool transposed, Tensor(a!)? amax, "
    "Tensor(b!)? counts) -> (Tensor, Tensor, Tensor)",
    _activation_quantize,
    _activation_quantize_fake,
)


@names_wrong_types
def activation_quantize(
    gate_up: Tensor,
    kind: str,
    scale: Tensor,
    *,
    gated: bool,
    keep_h: bool,
    transposed: bool,
    amax: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """h = act(gate) * up, or act(gate_up), as (h, h8, h8_t) from one read; h is empty without `keep_h`.

    gate_up (tokens, 2*d_ff or d_ff); kinds as `gated_activation`; scale, h8, h8_t, amax and counts as in
    `quantize`, of h. Raises as `quantize`, and for an unknown kind or an odd width of halves.
    """
    return _op_activation_quantize(gate_up, kind, gated, scale, keep_h, transposed, amax, counts)
