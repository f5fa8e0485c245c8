"""Masked decay: what pulls pruned weights towards zero, through their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import DTYPE_CODE, is_column_major, is_row_major, mask_as_uint16
from ._common import check_mask, check_same_device, check_weight, define_op, where
from .arguments import check_no_self_overlap, check_no_shared_memory, check_writable, names_wrong_types


def check_decay(decay: float) -> None:
    if not (math.isfinite(decay) and 0 <= decay <= torch.finfo(torch.float32).max):
        raise Sparse24Error(
            f"decay must be a finite number >= 0 that float32 holds, got {decay}; 0 trains without masked decay (STE)"
        )


def _check(grads: list[Tensor], weights: list[Tensor], masks: list[Tensor], decay: float, grad_scale) -> None:
    if not grads or not len(grads) == len(weights) == len(masks):
        raise Sparse24Error(
            "grads, weights and masks must be non-empty lists of one length, got "
            f"{len(grads)}, {len(weights)} and {len(masks)}"
        )
    check_decay(decay)
    for grad, w, mask in zip(grads, weights, masks, strict=True):
        check_weight(w)
        check_weight(grad, "grad")
        check_mask(mask, *w.shape)
        if grad.shape != w.shape:
            raise Sparse24Error(f"grad must have w's shape {tuple(w.shape)}, got {tuple(grad.shape)}")
        check_no_self_overlap(grad, "grad")
        check_same_device(grads[0], "grads[0]", grad=grad, w=w, mask=mask)
    if grad_scale is not None:
        if grad_scale.dtype != torch.float32 or grad_scale.numel() != 1:
            raise Sparse24DtypeError(
                f"grad_scale must be one float32, got {grad_scale.dtype} {tuple(grad_scale.shape)}"
            )
        check_same_device(grads[0], "grads[0]", grad_scale=grad_scale)


def _check_memory(grads, weights, masks, grad_scale) -> None:
    """A gradient may be its own weight, element by element; any other share would be read after it is written."""
    read = [
        (f"weights[{i}]", w)
        for i, (grad, w) in enumerate(zip(grads, weights, strict=True))
        if (grad.data_ptr(), grad.stride(), grad.dtype) != (w.data_ptr(), w.stride(), w.dtype)
    ]
    read += [(f"masks[{i}]", mask) for i, mask in enumerate(masks)]
    if grad_scale is not None:
        read.append(("grad_scale", grad_scale))
    check_no_shared_memory([(f"grads[{i}]", grad) for i, grad in enumerate(grads)], read)


def _is_plain(t: Tensor) -> bool:
    return t.dtype in DTYPE_CODE and (is_row_major(t) or is_column_major(t))


def _foreach_masked_decay_(grads, weights, masks, decay, grad_scale) -> None:
    _check(grads, weights, masks, decay, grad_scale)
    _check_memory(grads, weights, masks, grad_scale)
    library, *place = where(grads[0])
    items = []
    for grad, w, mask in zip(grads, weights, masks, strict=True):
        if library is None or not _is_plain(grad) or not _is_plain(w):
            grad.copy_(reference.masked_decay(grad, w, mask, decay, grad_scale))
            continue
        items.append((
            grad.data_ptr(), DTYPE_CODE[grad.dtype], *grad.shape, *grad.stride(), w.data_ptr(), DTYPE_CODE[w.dtype],
            *w.stride(), mask.data_ptr(), decay, 0 if grad_scale is None else grad_scale.data_ptr(),
        ))  # fmt: skip
    if items:
        library.masked_decay(items, *place)


_op_foreach_masked_decay_ = define_op(
    "foreach_masked_decay_",
    "(Tensor(a!)[] grads, Tensor[] weights, Tensor[] masks, float decay, Tensor? grad_scale) -> ()",
    _foreach_masked_decay_,
    _check,
)


@names_wrong_types
@torch.no_grad()
def foreach_masked_decay_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    decay: float,
    grad_scale: Tensor | None = None,
) -> None:
    """grad += decay * (1 - mask) * w for many tensors in place, in few launches.

    grads, weights  lists of (rows, cols), fp32, bf16 or fp16, each row- or column-major
    masks           list of (rows/4, cols/4) uint16
    decay           >= 0 and finite in float32; not multiplied by any learning rate
    grad_scale      one float32 on the device that multiplies decay: for optimizers that un-scale gradients themselves

    Call it after clipping and before the optimizer's moments see the gradient (arXiv 2404.01847, masked decay).

    Raises Sparse24Error for lists that are empty or of several lengths, a decay out of range and, naming the argument,
    for a shape or device that does not fit, and a gradient that overlaps itself or shares memory with anything else
    than its own weight; Sparse24DtypeError for a dtype, and for a grad_scale that is not one float32. Nothing is
    written then.
    """
    if not grads:  # without a tensor torch finds no implementation that could refuse it
        _check(grads, weights, masks, decay, grad_scale)
    check_writable(*((f"grads[{i}]", grad) for i, grad in enumerate(grads)))
    _op_foreach_masked_decay_(
        list(grads), [w.detach() for w in weights], [mask_as_uint16(mask) for mask in masks], float(decay), grad_scale
    )
    torch.autograd.graph.increment_version(list(grads))


@names_wrong_types
def masked_decay_(grad: Tensor, w: Tensor, mask: Tensor, decay: float, *, grad_scale: Tensor | None = None) -> Tensor:
    """grad += decay * (1 - mask) * w in place; returns grad. Arguments and errors as `foreach_masked_decay_`."""
    foreach_masked_decay_([grad], [w], [mask], decay, grad_scale)
    return grad
