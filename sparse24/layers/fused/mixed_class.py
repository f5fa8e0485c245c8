"""Classes that are made at run time: a mixin of ours, left of the class of a user's block."""

from __future__ import annotations

from types import FunctionType

from torch import nn

from ...errors import Sparse24Error


def mixed_class(mixin: type, own: type, prefix: str) -> type:
    """A class of `own`'s name with `prefix`. Calling it makes another block of the user's class, which nobody has
    converted, for some classes make more of their kind by type(self)(...).
    """

    def new(cls, *args, **kwargs):
        return own(*args, **kwargs)

    added = {"__module__": own.__module__, "__new__": new}
    if (name := own.forward.__code__.co_varnames[1]) != "x":
        added["forward"] = _forward_of(mixin, name)
    return type(f"{prefix}{own.__name__}", (mixin, own), added)


def _forward_of(mixin: type, name: str) -> FunctionType:
    """The mixin's forward(self, x) with `name` in place of x: callers may pass the input by the user's name for it."""

    def forward(self, x):
        return mixin.forward(self, x)

    code = forward.__code__.replace(co_varnames=("self", name))
    return FunctionType(code, forward.__globals__, "forward", None, forward.__closure__)


def class_behind(mixin: type, cls: type) -> type:
    """Of a class that has the mixin among its bases, near or far, the one that it is without."""
    return cls.__mro__[cls.__mro__.index(mixin) + 1]


def own_class_of(mixin: type, block: nn.Module) -> type:
    """The class of `block` before `mixed_class`. Raises Sparse24Error where somebody has put another over ours."""
    first, *own = type(block).__bases__
    if first is not mixin:
        raise Sparse24Error(
            f"{type(block).__name__} was wrapped after sparsify (by fully_shard, perhaps); densify before wrapping"
        )
    return own[0]
