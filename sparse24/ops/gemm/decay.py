"""Masked decay as part of a weight gradient: the rules on it, and how it reaches the kernel or follows the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import META_BLOCK, is_column_major, is_row_major, mask_as_uint16
from .._common import check_mask, check_same_device, check_weight


class DecayTerm(NamedTuple):
    """factor * (1 - mask) * weight, to be added to the gradient of the weights, which are stacked by rows.

    factor   one float32 on the device
    weights  one (out_features, in_features), or two whose rows make up out_features
    masks    uint16 (rows/4, in_features/4) of each
    """

    factor: Tensor | None
    weights: Sequence[Tensor]
    masks: Sequence[Tensor]


def as_schema_has_it(decay: DecayTerm | None) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The three arguments that stand for a decay in the schemas of ops; none of it: (None, [], [])."""
    if decay is None:
        return None, [], []
    factor, weights, masks = decay
    return factor, [w.detach() for w in weights], [mask_as_uint16(mask) for mask in masks]


def check_decay_term(like: Tensor, shape: tuple[int, int], decay: DecayTerm) -> None:
    """The rules on the decay of a gradient of `shape` on `like`'s device."""
    factor, weights, masks = decay
    if factor is None:
        if weights or masks:
            raise Sparse24Error("decay needs its factor, one float32 tensor, beside weights and masks")
        return
    if factor.dtype != torch.float32 or factor.numel() != 1:
        raise Sparse24DtypeError(f"decay's factor must be one float32, got {factor.dtype} {tuple(factor.shape)}")
    if not 1 <= len(weights) <= 2 or len(masks) != len(weights):
        raise Sparse24Error(
            f"decay needs one weight, or two stacked along out_features, and the mask of each; got {len(weights)} "
            f"weights and {len(masks)} masks"
        )
    for w, mask in zip(weights, masks, strict=True):
        check_weight(w, "decay's weight")
        check_mask(mask, *w.shape, "decay's mask")
        check_same_device(like, "x", **{"decay's factor": factor, "decay's weight": w, "decay's mask": mask})
    stacked = (sum(w.shape[0] for w in weights), weights[0].shape[1])
    if stacked != shape or weights[-1].shape[1] != stacked[1]:
        raise Sparse24Error(
            f"decay's weights must make up {shape}, the shape of the gradient, got "
            f"{' and '.join(str(tuple(w.shape)) for w in weights)}"
        )


def decay_fields(out: Tensor, decay: DecayTerm) -> tuple | None:
    """What the kernel takes of masked decay in its epilogue; None where it is to follow in a pass of its own."""
    factor, weights, masks = decay
    w, rows = weights[0], weights[0].shape[0]
    second = len(weights) - 1  # the only weight again where there is one
    fits = (
        all(t.dtype == out.dtype and t.stride() == w.stride() for t in weights)
        and (second == 0 or rows % META_BLOCK == 0)
        and ((is_row_major(w) and w.stride(0) % 2 == 0) or is_column_major(w))
        and all(t.data_ptr() % (2 * t.element_size()) == 0 for t in weights)
    )
    if not fits:
        return None
    pointers = [t.data_ptr() for t in (w, weights[second], masks[0], masks[second])]
    return factor.data_ptr(), *pointers[:2], *w.stride(), *pointers[2:], rows


def decay_after(out: Tensor, decay: DecayTerm) -> None:
    """Masked decay in a pass of its own, right after the product."""
    parts = list(out.split([w.shape[0] for w in decay.weights]))
    torch.ops.sparse24.foreach_masked_decay_.default(parts, decay.weights, decay.masks, 1.0, decay.factor)
