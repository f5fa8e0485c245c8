"""What a fused forward stands in for, and whether that is still so.

A fused block computes what its class's forward, its layers and its activation did when it was made. Whatever a user
may change of these afterwards must take effect: another activation or layer, hooks, a forward patched on an object or
on a class. Then the block's own forward runs, as it would without sparse24. This is looked at in each call, so it
reads attributes and compares identities only: about two microseconds a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as any_global_hook

from ..checks import is_exporting

__all__ = ["Child", "Part", "any_global_hook", "child_is_unchanged", "is_bare", "layer_is_plain", "remember"]

_MODULE_KEYS = frozenset(nn.Module().__dict__)
#: what fully_shard writes on every module that it manages, for compilers; it changes nothing of what a call does
_FSDP_MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


class Part(NamedTuple):
    """A module as it was: what its class ran, how many attributes it had, and those that nn.Module does not give."""

    module: nn.Module
    forward: Any
    call: Any
    count: int
    attributes: tuple[tuple[str, Any], ...]


class Child(NamedTuple):
    """A child, such as the activation, that the fused forward does not call."""

    name: str
    value: Any
    parts: tuple[Part, ...]  # the module itself and those in it; none of a plain function


def remember(block: nn.Module, name: str) -> Child:
    """What `getattr(block, name)`, an activation, is now."""
    value = _look_up(block, name)
    modules = value.modules() if isinstance(value, nn.Module) else ()
    return Child(name, value, tuple(_part(module) for module in modules))


def _part(module: nn.Module) -> Part:
    cls, values = type(module), module.__dict__
    own = tuple((name, value) for name, value in values.items() if name not in _MODULE_KEYS)
    return Part(module, cls.forward, cls.__call__, _count(values), own)


def _count(values: dict[str, Any]) -> int:
    """How many attributes a module has, those aside that FSDP2 gives it."""
    managed, original = _FSDP_MARKS
    return len(values) - (managed in values) - (original in values)


def child_is_unchanged(block: nn.Module, child: Child) -> bool:
    """Whether the block still has that child, and nobody has changed what calling it does."""
    if _look_up(block, child.name) is not child.value:
        return False
    for module, forward, call, count, attributes in child.parts:
        values, cls = module.__dict__, type(module)
        if cls.forward is not forward or not is_bare(module):
            return False
        # torch.export puts a __call__ of its own on nn.Module while it traces.
        if cls.__call__ is not call and not is_exporting():
            return False
        # Compilers of torch before 2.13 cannot count attributes; those that are known they compare like us.
        if not torch.compiler.is_compiling() and _count(values) != count:
            return False
        for name, value in attributes:
            if values.get(name) is not value:
                return False
    return True


def layer_is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer runs the forward of one of our classes, and nothing of the user's.

    Not so if it is parametrized, an adapter, or of a subclass with a forward of its own.
    """
    ours = getattr(type(layer), "_sparse24_forward", None)
    return ours is not None and type(layer).forward is ours and is_bare(layer)


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs the forward of its class: no hooks, no patch, no `__call__` of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def _look_up(block: nn.Module, name: str) -> Any:
    """A child module, an attribute, or a function of the class."""
    if name in block._modules:
        return block._modules[name]
    if name in block.__dict__:
        return block.__dict__[name]
    return getattr(type(block), name, None)
