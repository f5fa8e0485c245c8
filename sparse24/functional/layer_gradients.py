"""From what the backward of a whole feed-forward layer makes to what autograd takes: 16-bit and 8-bit layers alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import accumulation
from .operands import both
from .weight_gradient import as_laid_out, lies_by_columns


class Origin(NamedTuple):
    """What backward knows of a weight for its gradient: the parameter itself, see `leaf_of`, and how it lies."""

    dtype: torch.dtype
    leaf: Tensor | None
    columns: bool


def origin_of(weight: Tensor) -> Origin:
    return Origin(weight.dtype, accumulation.leaf_of(weight), lies_by_columns(weight))


def targets(down: Origin, ups: list[Origin], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the up product's weights and of the down weight that products of `dtype` may add to, if any."""
    return accumulation.stacked_target([up.leaf for up in ups], dtype), accumulation.target(down.leaf, dtype)


def parts_of(d_up: Tensor | None, ups: list[Origin]) -> list[Tensor | None]:
    """The gradient of each of the parameters that are stacked in the up product."""
    if d_up is None:
        return [None] * len(ups)
    if len(ups) == 1:
        return [_as_weight(d_up, ups[0])]
    return [_as_weight(part, of) for part, of in zip(d_up.chunk(len(ups)), ups, strict=True)]


def _as_weight(dw: Tensor, of: Origin) -> Tensor:
    dw = dw if dw.dtype == of.dtype else dw.to(of.dtype)
    return as_laid_out(dw, True) if of.columns else dw


def as_autograd_takes(ctx, made: tuple[Tensor, ...], needs: tuple[bool, bool, bool], into: tuple) -> tuple:
    """(dx, db_up, db_down, d_down, d_up, d_up of a second weight), None for what is not needed or was added `into`.

    made   dx, d_up, d_down, db_up and db_down, as ops of a whole backward give them
    needs  whether x and the biases get gradients
    """
    (dx, d_up, d_down, db_up, db_down), (need_x, need_bias_up, need_bias_down) = made, needs
    into_up, into_down = into
    d_biases = [db_up if need_bias_up else None, db_down if need_bias_down else None]
    if torch.compiler.is_compiling():  # else autograd casts them to the dtypes of the biases, in less time
        d_biases = [None if db is None else db.to(dtype) for db, dtype in zip(d_biases, ctx.bias_dtypes, strict=True)]
    d_ups = parts_of(None if into_up is not None else d_up, ctx.ups)
    d_down = None if into_down is not None else _as_weight(d_down, ctx.down)
    return dx if need_x else None, *d_biases, d_down, *both(d_ups)
