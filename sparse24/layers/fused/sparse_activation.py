"""Plain feed-forward blocks with dense weights whose activation is pruned to 2:4, in forward and in backward.

`sparsify(operand="activation")` gives a block of the form down(act(up(x))), whose activation is a (squared) ReLU, a
class whose forward is `functional.sparse_activation_mlp`. There is no other state: parameters, buffers and layers stay,
so optimizers, checkpoints and copies know nothing of it, and a step has nothing to add.

Pruning h changes the function, if by little, so it must not come and go. Where the layers are not the plain ones any
more (hooks, adapters, another library's), or a call is of a kind that kernels do not take, they run one by one and h is
pruned between them, then in 16 bits whatever the block's precision is. Where the activation is no longer the one that
was found, the block's own forward runs, with a warning.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ... import functional
from ...errors import Sparse24Error, Sparse24Warning
from ...formats import BLOCK, HALF_DTYPES
from ...functional.operands import computed_dtype
from ...functional.sparse_activation import kept_activations
from ...ops.activation_packing import PRUNED_KINDS
from ..checks import distributed_rank, is_exporting
from ..forward import on_values
from ..state import HOLDER, is_ours
from .forward_source import form_kind, read_forward
from .mixed_class import class_behind, mixed_class, own_class_of
from .replaced import Child, any_global_hook, child_is_unchanged, is_bare, remember


class Found(NamedTuple):
    """What a block was found to compute, as its copies and pickles are told.

    layers      names of (up, down)
    kind        the activation, one of PRUNED_KINDS
    transposed  the weights are [in, out], those of transformers' Conv1D
    precision   of the products, as it was asked for: None or "fp8"
    """

    layers: tuple[str, str]
    kind: str
    transposed: bool
    precision: str | None = None


@dataclass(eq=False)
class ActivationState:
    """What a block was found to compute, and by what.

    found       layers, activation, layout
    tail        names of children called on the result, such as a dropout
    children    the activation's modules and functions
    forward     of the block's own class; None in a copy of a block that had changed
    activation  (block, u) -> act(u), by the block's own children
    has_warned  that the block runs dense
    """

    found: Found
    tail: tuple[str, ...] = ()
    children: tuple[Child, ...] = ()
    forward: Any = None
    activation: Any = None
    has_warned: bool = False


class SparseActivation:
    """What such a block adds to its class. A mixin, left of the class; see `prune_activations`."""

    _sparse24_own: type  # of a class: the one that it is without this mixin

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._sparse24_own = class_behind(SparseActivation, cls)

    def __reduce_ex__(self, protocol):
        # The class is made at run time: copies and pickles name its parts instead, and look at their own parts anew.
        # Of layers they are told the names: adapters and parametrizations may stand in their places by now.
        state = self.__dict__[HOLDER]
        told = state.found, not _has_its_activation(self, state)
        return _empty, (own_class(self),), self.__dict__ | {HOLDER: told}

    def __setstate__(self, state):
        found, had_changed = state[HOLDER]
        super().__setstate__(state)
        if had_changed:  # and runs dense, with a warning: so does the copy, whatever its activation is now
            self.__dict__[HOLDER] = ActivationState(found)
            return
        own = own_class(self)
        looked = look_at(self, own, found)
        if isinstance(looked, ActivationState) and looked.found.kind != found.kind:
            looked = f"its activation is {looked.found.kind} here, and was {found.kind}"
        if isinstance(looked, str):
            raise Sparse24Error(
                f"this copy of a {own.__name__} cannot prune its activation as the original does: {looked}. Load the "
                "state_dict into a model of this code, and call sparsify(operand='activation') on that"
            )
        self.__dict__[HOLDER] = looked

    def _replicate_for_data_parallel(self):
        raise Sparse24Error(
            f"torch.nn.DataParallel makes replicas of {type(self)._sparse24_own.__name__} that would not prune its "
            "activation; use DistributedDataParallel"
        )

    def __prepare_scriptable__(self):
        raise Sparse24Error(
            f"{type(self)._sparse24_own.__name__}, whose activation is pruned, cannot be compiled by torch.jit.script; "
            "torch.jit.trace and torch.export.export keep the pruned function, and after sparse24.densify(model) "
            "torch.jit.script compiles the dense one"
        )

    def forward(self, x: Tensor) -> Tensor:
        state, modules = self.__dict__[HOLDER], self._modules
        _check_input(x)
        if isinstance(x, Tensor) and x.is_nested:
            return on_values(self.forward, x)
        layers, kind, transposed, precision = state.found
        up, down = (modules.get(name) for name in layers)
        if up is None or down is None or not _has_its_activation(self, state):
            _warn_of_dense(self, state)
            return super().forward(x)
        if state.has_warned and not torch.compiler.is_compiling():
            state.has_warned = False  # it is what it was again, and another change gets its own warning
        if _kernels_take(up, down, x, transposed):
            weights, biases = ([layer._parameters[name] for layer in (up, down)] for name in ("weight", "bias"))
            if transposed:
                weights = [weight.t() for weight in weights]
            rank = distributed_rank()  # not that of sparsify, before which there may have been no process group
            settings = dict(rank=rank, training=self.training, precision=precision)
            y = functional.sparse_activation_mlp(x, *weights, kind, bias_up=biases[0], bias_down=biases[1], **settings)
        else:
            u = up(x)
            kept = kept_activations(u)  # first: the activation may work in place
            y = down(torch.where(kept, state.activation(self, u), 0))
        for name in state.tail:
            y = modules[name](y)
        return y


# -- how it runs ----------------------------------------------------------------------------------------------------


def _has_its_activation(block: nn.Module, state: ActivationState) -> bool:
    if type(block)._sparse24_own.forward is not state.forward:
        return False
    for child in state.children:
        if not child_is_unchanged(block, child):
            return False
    for name in state.tail:
        if block._modules.get(name) is None:
            return False
    return True


def _warn_of_dense(block: nn.Module, state: ActivationState) -> None:
    name = type(block)._sparse24_own.__name__
    if torch.compiler.is_compiling():
        _say_that_it_is_dense(name)
    elif not state.has_warned:
        state.has_warned = True
        _say_that_it_is_dense(name)


def _say_that_it_is_dense(name: str) -> None:
    warnings.warn(
        f"{name} is not what sparsify(operand='activation') found (its layers, its activation, or hooks of that were "
        "changed), so it runs dense from here on; call sparse24.densify(model), then sparsify again",
        Sparse24Warning,
        stacklevel=5,
    )


# Compilers call it while they trace, where they would leave a warning out: what torch.compiler.assume_constant_result
# does, which imports torch._dynamo, and that takes seconds.
_say_that_it_is_dense._dynamo_marked_constant = True


def _check_input(x: object) -> None:
    """Refuse what neither kernels nor plain ops between the layers take. Raises Sparse24Error with the way out."""
    if type(x) is Tensor:
        return
    if isinstance(x, torch.fx.Proxy):
        raise Sparse24Error(
            "a block whose activation is pruned cannot be traced by torch.fx.symbolic_trace; "
            "torch.export.export(model) keeps the pruned function"
        )


def _is_plain(layer: nn.Module, transposed: bool) -> bool:
    cls = type(layer)
    return (_is_conv1d(cls) if transposed else cls is nn.Linear) and is_bare(layer)


def _is_conv1d(cls: type) -> bool:
    """Whether it is transformers' Conv1D itself, found out without importing transformers. Its weight is transposed."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def _kernels_take(up: nn.Module, down: nn.Module, x: Tensor, transposed: bool) -> bool:
    """Whether the whole block runs as one function of plain tensors; else its layers run one by one."""
    if any_global_hook() or type(x) is not Tensor or x.is_nested or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling():
        if is_exporting():
            return False
    elif torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    dtype = computed_dtype(x)
    if x.is_cuda and dtype not in HALF_DTYPES:
        return False
    for layer in (up, down):
        if not _is_plain(layer, transposed):
            return False
        for name in ("weight", "bias"):
            own = layer._parameters.get(name)
            if own is None:
                if name == "weight":
                    return False
            elif type(own) not in (nn.Parameter, Tensor) or own.device != x.device or computed_dtype(own) != dtype:
                return False
    return True


# -- which blocks ---------------------------------------------------------------------------------------------------


def prune_activations(block: nn.Module, precision: str | None = None) -> None:
    """Give `block` the forward that prunes its activation; `precision` as in `Found`.

    Raises Sparse24Error where `why_not` has a reason.
    """
    state = look_at(block, type(block))
    if isinstance(state, str):
        raise Sparse24Error(f"{type(block).__name__} cannot prune its activation: {state}")
    state.found = state.found._replace(precision=precision)
    block.__class__ = _mixed_class(type(block))
    block.__dict__[HOLDER] = state


def precision_of(block: SparseActivation) -> str | None:
    """Of the products of a block whose activation is pruned."""
    return block.__dict__[HOLDER].found.precision


def why_not(block: nn.Module) -> str:
    """Why the activation of `block` cannot be pruned, or ""."""
    found = look_at(block, type(block))
    return found if isinstance(found, str) else ""


def look_at(block: nn.Module, own: type, told: Found | None = None) -> ActivationState | str:
    """What a block whose own class is `own` computes, if its activation can be pruned; else why not.

    told  what the original was found to be, of a copy
    """
    if "forward" in block.__dict__:
        return "its forward is replaced on the instance"
    holders = (block.__dict__, block._buffers, block._parameters, block._modules)
    if not isinstance(block, SparseActivation) and (clash := [n for each in holders for n in each if is_ours(n)]):
        return f"its attribute {clash[0]!r} has a name that we need; rename it, or call sparse24.densify first"
    form = read_forward(block, own, () if told is None else told.layers)
    if form is None:
        return f"the forward of {own.__name__} is not one that is known"
    if len(form.layers) != 2:
        return "it is gated, and only plain blocks, down(act(up(x))), can be pruned"
    if any(inspect.ismethod(getattr(block, name, None)) for name in form.uses):
        return f"its activation {form.source} is a method of {own.__name__}, which may depend on anything"
    kind = form_kind(block, form)
    if kind not in PRUNED_KINDS:
        return (
            f"its activation {form.source} is {kind or 'not known'}, and only {' and '.join(PRUNED_KINDS)} make zeros"
        )
    if told is None:
        down = block._modules[form.layers[1]]
        transposed = _is_conv1d(type(down))
        d_ff = down._parameters["weight"].shape[0 if transposed else 1]
        if d_ff % BLOCK:
            return f"it has {d_ff} hidden features, not a multiple of {BLOCK}"
        told = Found(form.layers, kind, transposed)
    children = tuple(remember(block, name) for name in form.uses)
    found = told._replace(layers=form.layers, kind=kind)
    return ActivationState(found, form.tail, children, own.forward, form.activation)


def activation_blocks(model: nn.Module) -> dict[str, SparseActivation]:
    """The blocks of `model` whose activation is pruned, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseActivation)}


def runs_dense(block: SparseActivation) -> bool:
    """Whether its layers or its activation are not those that were found, so that nothing is pruned."""
    state = block.__dict__[HOLDER]
    has_layers = all(block._modules.get(name) is not None for name in state.found.layers)
    return not (has_layers and _has_its_activation(block, state))


def restore(block: SparseActivation) -> None:
    """Give a block its own class back."""
    own = own_class(block)
    block.__dict__.pop(HOLDER, None)
    block.__class__ = own


def own_class(block: SparseActivation) -> type:
    """The class of the module before its activation was pruned."""
    return own_class_of(SparseActivation, block)


@cache
def _mixed_class(own: type) -> type:
    return mixed_class(SparseActivation, own, "SparseActivation")


def _empty(own: type) -> SparseActivation:
    return object.__new__(_mixed_class(own))
