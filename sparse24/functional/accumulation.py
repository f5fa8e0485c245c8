"""Gradients of later micro-batches, added to `.grad` by the product that makes them.

Autograd sums the gradients of micro-batches in a pass of its own, which reads two tensors and writes one. The sparse
product can add to what is there already, in fp32 and with one rounding, for a read in its epilogue. It may do so only
where autograd would do nothing else with the gradient; where somebody may be watching, autograd has it as ever.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_thread = threading.local()
#: threads that have run backward on the CPU, as far as they may still do so
_threads: set[int] = set()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """In this thread autograd has all gradients within: those of a backward pass whose graph is made have one too."""
    _thread.suspended = True
    try:
        yield
    finally:
        _thread.suspended = False


def leaf_of(weight: Tensor) -> Tensor | None:
    """The parameter itself, for an autograd function to remember; None while a compiler is tracing it."""
    return weight if weight.is_leaf and not torch.compiler.is_compiling() else None


def target(leaf: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`leaf.grad`, if a product with operands of `dtype` may add to it in this backward pass; None if not."""
    if leaf is None or torch.compiler.is_compiling():
        return None
    if not leaf.is_cuda and _threads != {threading.get_ident()} and not _is_only_thread():
        return None
    if (grad := leaf.grad) is None:
        return None  # the first gradient becomes .grad as it is, without a copy
    fits = grad.dtype in (dtype, torch.float32) and grad.is_contiguous() and type(grad) is Tensor
    return grad if fits and not grad.requires_grad and _nobody_watches(leaf) else None


def stacked_target(leaves: list[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """The gradients of several weights as one tensor, if they lie one after the other in memory and each may be added
    to; that is how one product for gate and up leaves them.
    """
    if len(leaves) == 1:
        return target(leaves[0], dtype)
    first, second = leaves
    if first is None or second is None or first.grad is None or second.grad is None:
        return None
    upper, lower = first.grad, second.grad
    adjacent = (
        upper.dtype == lower.dtype
        and upper.untyped_storage().data_ptr() == lower.untyped_storage().data_ptr()
        and lower.data_ptr() == upper.data_ptr() + upper.numel() * upper.element_size()
        and upper.shape[1:] == lower.shape[1:]
    )
    if not adjacent or target(first, dtype) is None or target(second, dtype) is None:
        return None
    rows, cols = upper.shape[0] + lower.shape[0], upper.shape[1]
    return upper.as_strided((rows, cols), (cols, 1))


def _nobody_watches(leaf: Tensor) -> bool:
    """Whether autograd would only add this gradient to `.grad`.

    Not under torch.distributed, whose wrappers hang their reductions on the addition; not with hooks on the parameter;
    not in `torch.autograd.grad` or `backward(inputs=...)` for others; on a CPU not while several threads run backward,
    whose additions autograd locks; and on CUDA only on the default stream or in a capture, since at the end of backward
    autograd waits for streams on which it has added itself.
    """
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks or getattr(_thread, "suspended", False):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    if leaf.device.type == "cuda":
        here = torch.cuda.current_stream(leaf.device)
        if here != torch.cuda.default_stream(leaf.device) and not torch.cuda.is_current_stream_capturing():
            return False
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(leaf).node)
    except RuntimeError:  # torch.autograd.grad
        return False


def _is_only_thread() -> bool:
    """Whether no other thread that has run backward is still there; notes this one."""
    _threads.intersection_update([thread.ident for thread in threading.enumerate()])
    _threads.add(threading.get_ident())
    return len(_threads) == 1
