"""Activations pruned to 2:4 along features, forward and backward, and packed along features and along tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import activation, bias_gradient
from .mvue import mvue_compress
from .packing import pack_rows


def kept_activations(u: Tensor) -> Tensor:
    """Bool like u (tokens, d_ff): of each group of four features the two largest of max(u, 0).

    Equal ones: the lower index first. NaN of either sign is larger than all else.
    """
    groups = u.unflatten(-1, (u.shape[-1] // 4, 4))
    groups = groups if u.dtype == torch.float64 else groups.float()
    values = torch.where(groups > 0, groups, torch.where(groups.isnan(), torch.nan, 0.0)).unbind(-1)
    kept = []  # by comparisons, which all tracers and exporters know; they do not all know a stable sort
    for i, own in enumerate(values):
        ahead = [_is_ahead(other, own, of_equals=j < i) for j, other in enumerate(values) if j != i]
        kept.append(torch.stack(ahead).sum(0) < 2)
    return torch.stack(kept, -1).flatten(-2)


def _is_ahead(other: Tensor, own: Tensor, of_equals: bool) -> Tensor:
    """Whether `other` is the larger one, or `of_equals` says that it is preferred where both are equal."""
    larger = (other > own) | (other.isnan() & ~own.isnan())
    return larger | (other == own) | (other.isnan() & own.isnan()) if of_equals else larger


def _packed_along_tokens(pruned: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    if seed is None:
        return pruned.new_empty(0), pruned.new_empty(0, dtype=torch.uint8)
    return mvue_compress(pruned, seed)


def rounded_activation(u: Tensor, kind: str) -> Tensor:
    """h = act(u) in u's dtype."""
    return (activation(u, kind) + 0.0).to(u.dtype)  # torch's max(-0, 0) may be -0, which this sum is not


def pruned_activation_gradient(dh: Tensor, u: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """du = dh act'(u) in u's dtype, 0 at all but `kept_activations`; and those."""
    wide = u if u.dtype == torch.float64 else u.float()
    slope = (wide > 0).to(wide.dtype) if kind == "relu" else 2 * (activation(u, "relu") + 0.0)
    kept = kept_activations(u)
    return torch.where(kept, (dh.to(wide.dtype) * slope).to(u.dtype), 0), kept


def activation_compress(u: Tensor, kind: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed and E of h = act(u) with `kept_activations` alone; with a seed packed_t and E_t: `mvue_compress` of it."""
    h, kept = rounded_activation(u, kind), kept_activations(u)
    return *pack_rows(h, kept, u.dtype), *_packed_along_tokens(torch.where(kept, h, 0), seed)


def activation_backward_compress(
    dh: Tensor, u: Tensor, kind: str, seed: Tensor | None = None, bias_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed, packed_t, E_t and the sums over tokens of du = dh act'(u), which is 0 where u was not kept."""
    du, kept = pruned_activation_gradient(dh, u, kind)
    packed, _ = pack_rows(du, kept, u.dtype)
    db = bias_gradient(du) if bias_grad else du.new_empty(0, dtype=torch.promote_types(du.dtype, torch.float32))
    return packed, *_packed_along_tokens(du, seed), db
