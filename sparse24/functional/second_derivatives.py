"""The backward pass of 2:4 layers has no derivative: whoever asks for one gets an error, and never a zero.

torch's `once_differentiable` does not see to that. Where the output's gradient needs no gradient, as that of a sum, it
gives results without a graph, which count as constants; and its error lies on no path to the inputs, so that
`torch.autograd.grad` for these goes round it. Here the results of a backward pass whose graph is made
(create_graph=True) hang on all that they depend on, by a node that raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import function

from ..errors import Sparse24Error
from . import accumulation


class _SecondDerivative(Sparse24Error, RuntimeError):
    """A RuntimeError too, as that of torch is."""


class _RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise _SecondDerivative(
            "trying to differentiate twice a function that was marked with @once_differentiable: 2:4 layers have no "
            "second derivatives (gradient penalties, Hessians, jvp by double backward); call sparse24.densify(model), "
            "or densify(model, masked=True), for such a computation"
        )


def once_differentiable(backward: Callable) -> Callable:
    """A decorator of a backward pass without a derivative. It costs something only where the graph of a backward pass
    is being made.

    Raises Sparse24Error for a batch of gradients that backward cannot take.
    """
    traced = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *grads):
        try:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            return traced(ctx, *grads) if torch.compiler.is_compiling() else _with_graph(backward, ctx, grads)
        except RuntimeError as error:
            if any(map(_is_batch, grads)):
                raise Sparse24Error(
                    "the backward pass of 2:4 layers takes one gradient at a time, not a batch of them "
                    "(is_grads_batched=True, jacobian(vectorize=True)); call torch.autograd.grad once for each, with "
                    "retain_graph=True, or sparse24.densify(model) for such a computation"
                ) from error
            raise

    return run


def _is_batch(grad: object) -> bool:
    return isinstance(grad, Tensor) and torch._C._functorch.is_legacy_batchedtensor(grad)


class _UnpackedOnce:
    """A ctx whose saved tensors are asked for once: activation checkpointing gives them once only."""

    def __init__(self, ctx):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str):
        return getattr(self._ctx, name)


def _with_graph(backward: Callable, ctx, grads: tuple) -> tuple:
    ctx = _UnpackedOnce(ctx)
    anchors = list(_depends_on(ctx, grads))
    with torch.no_grad(), accumulation.suspended():
        results = backward(ctx, *grads)
    made = [r for r in results if r is not None]
    if not anchors or not made:
        return results
    hung = iter(_RaiseInBackward.apply(len(made), *made, *anchors))
    return tuple(None if r is None else next(hung) for r in results)


def _depends_on(ctx, grads: tuple) -> Iterator[Tensor]:
    """Tensors on whose graphs the results depend: gradients of the outputs, and what the node was made of."""
    yield from (g for g in grads if isinstance(g, Tensor) and g.requires_grad)
    saved = {(t.grad_fn, t.output_nr): t for t in ctx.saved_tensors if t is not None and t.grad_fn is not None}
    for edge in ctx.next_functions:
        if edge in saved:
            yield saved[edge]
        elif edge[0] is not None:
            yield from _leaves(edge[0])


def _leaves(node) -> Iterator[Tensor]:
    """The leaves that a node was computed from: what it gave itself is not kept where it was pruned, say."""
    seen, waiting = {node}, [node]
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        new = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= new
        waiting += new
