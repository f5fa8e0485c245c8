"""What all ops share: registration, the rules on inputs, and where work runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _library
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import BLOCK, DTYPE_CODE, REFERENCE_DTYPES, WEIGHT_DTYPES, metadata_bytes, names


def define_op(name: str, signature: str, implementation: Callable, fake: Callable, tags=()) -> Callable:
    """Register `sparse24::name` for CPU and CUDA tensors and for tracing; returns the op's fast handle."""
    qualified = f"sparse24::{name}"
    torch.library.define(qualified, signature, tags=tags)
    torch.library.impl(qualified, ("cpu", "cuda"), implementation)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.sparse24, name).default


def matrix(t: Tensor) -> tuple[int, ...]:
    """A 2-D tensor as the binding takes matrices."""
    return t.data_ptr(), DTYPE_CODE[t.dtype], *t.shape, *t.stride()


def pointer(t: Tensor | None) -> int:
    """A tensor's address; 0 for None and for an empty one."""
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def where(t: Tensor) -> tuple[object, int, int, int]:
    """(binding, backend code, device index, stream) for work on `t`; the binding is None for the reference path."""
    # A device makes its name anew for each who asks, which takes as long as all of the rest here.
    code = _library.backend_code("cuda" if t.is_cuda else t.device.type)
    if code is None or (t.dtype not in DTYPE_CODE and t.is_floating_point()):
        return None, -1, -1, 0
    library = _library.binding()
    if code == _library.CUDA:
        index = t.get_device()
        if not _library.runs_on(index):
            return None, -1, -1, 0
        return library, code, index, torch._C._cuda_getCurrentRawStream(index)
    library.set_cpu_threads(torch.get_num_threads())
    return library, code, 0, 0


class _NotDifferentiable(torch.autograd.Function):
    """Passes outputs through and raises when backward arrives, instead of training silently without a gradient."""

    @staticmethod
    def forward(ctx, op: str, remedy: str, outputs: tuple, *inputs):
        ctx.message = f"ops.{op} is not differentiable; use {remedy}, which is"
        fresh = tuple(out.view_as(out) for out in outputs)
        ctx.mark_non_differentiable(*(out for out in fresh if not out.is_floating_point()))
        return fresh

    @staticmethod
    def backward(ctx, *grads):
        raise Sparse24Error(ctx.message)


def call_without_grad(op: str, remedy: str, function: Callable, args: tuple):
    """Call `function(*args)`; where autograd is recording, its floating outputs raise in backward, naming `remedy`."""
    if not torch.is_grad_enabled():
        return function(*args)
    watched = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    if not watched:
        return function(*args)
    with torch.no_grad():
        result = function(*args)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    if not any(out.is_floating_point() for out in outputs):
        return result
    outputs = _NotDifferentiable.apply(op, remedy, outputs, *watched)
    return outputs[0] if isinstance(result, Tensor) else outputs


def check_weight(w: Tensor, name: str = "w") -> None:
    """A weight that can be masked: 2-D, floating, both extents multiples of 4."""
    if w.dim() != 2:
        raise Sparse24Error(f"{name} must be 2-D, got shape {tuple(w.shape)}")
    check_weight_dtype(w, name)
    for axis, extent in (("rows", w.shape[0]), ("columns", w.shape[1])):
        if extent % BLOCK:
            raise Sparse24Error(
                f"{name} must have {axis} in multiples of {BLOCK}, got {extent} in shape {tuple(w.shape)}; "
                "keep such a layer dense (sparsify skips it)"
            )


def check_weight_dtype(w: Tensor, name: str) -> None:
    if w.dtype in WEIGHT_DTYPES:
        return
    slow = w.dtype in REFERENCE_DTYPES
    if slow and w.device.type == "cpu":
        return
    also = f" ({names((w.dtype,))} runs on the CPU only, by the reference)" if slow else ""
    raise Sparse24DtypeError(f"{name} must be {names(WEIGHT_DTYPES)}, got {w.dtype}{also}; cast it first")


def check_mask(mask: Tensor, rows: int, cols: int, name: str = "mask") -> None:
    """uint16 [rows/4, cols/4], contiguous (or its uint8 view, which ops take too)."""
    if mask.dtype != torch.uint16:
        raise Sparse24DtypeError(f"{name} must be uint16, one value per 4x4 block, got {mask.dtype}")
    expected = (rows // BLOCK, cols // BLOCK)
    if tuple(mask.shape) != expected:
        raise Sparse24Error(
            f"{name} must have shape {expected} for a weight of {rows} x {cols}, got {tuple(mask.shape)}"
        )
    if not mask.is_contiguous():
        raise Sparse24Error(f"{name} must be contiguous, got strides {mask.stride()}; call .contiguous()")


def check_same_device(first: Tensor, first_name: str, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise Sparse24Error(f"{name} is on {other.device} but {first_name} is on {first.device}; move one of them")


def check_packed_operand(packed: Tensor, E: Tensor, name: str, shape: tuple[int, int], m: int, k: int) -> None:
    """Values and metadata of a sparse operand against the extents that its use declares."""
    if not is_packed_operand(packed, E, shape, m, k):
        _explain_packed_operand(packed, E, name, shape, m, k)


def is_packed_operand(packed: Tensor, E: Tensor, shape: tuple[int, int], m: int, k: int) -> bool:
    """Whether an operand keeps all of the rules. Every product asks, so this is the short way for what is right."""
    return (
        packed.shape == shape
        and packed.dtype in WEIGHT_DTYPES
        and packed.is_contiguous()
        and E.shape == (metadata_bytes(m, k),)
        and E.dtype == torch.uint8
        and E.is_contiguous()
        and E.device == packed.device
    )


def _explain_packed_operand(packed: Tensor, E: Tensor, name: str, shape: tuple[int, int], m: int, k: int) -> None:
    """Raise for the first rule that the operand breaks; float64 values on the CPU break none."""
    if packed.dim() != 2 or tuple(packed.shape) != shape:
        raise Sparse24Error(f"{name} must have shape {shape}, got {tuple(packed.shape)}")
    if not packed.is_contiguous():
        raise Sparse24Error(f"{name} must be contiguous, got strides {packed.stride()}")
    check_weight_dtype(packed, name)
    expected = metadata_bytes(m, k)
    if E.dtype != torch.uint8 or E.dim() != 1 or E.numel() != expected or not E.is_contiguous():
        raise Sparse24Error(
            f"E of {name} must be a contiguous 1-D uint8 tensor of {expected} bytes (m={m}, k={k}), "
            f"got {E.dtype} of shape {tuple(E.shape)}"
        )
    check_same_device(packed, name, E=E)
