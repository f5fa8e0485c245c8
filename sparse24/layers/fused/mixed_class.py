"""Classes that are made at run time: a mixin of ours, left of the class of a user's block."""

from __future__ import annotations

from functools import cache
from types import FunctionType

from torch import nn

from ...errors import Sparse24Error

#: what the namespace of any class has, and of those with a mixin of ours
_OF_ANY_CLASS = {"__dict__", "__weakref__", "__doc__", "_sparse24_own"}


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
    """The class of `block` without what `mixed_class` has added. What fully_shard has put over it stays around it.

    Raises Sparse24Error where somebody else has put a class over ours.
    """
    own = class_without(mixin, type(block))
    if own is None:
        raise Sparse24Error(
            f"{type(block).__name__} was wrapped after sparsify, by a parametrization or another library; take that "
            "off, or densify before wrapping"
        )
    return own


@cache
def class_without(mixin: type, cls: type) -> type | None:
    """The class that `cls` would be without the mixin, or None if an unknown class is around ours."""
    bases = cls.__bases__
    if mixin in bases:
        return bases[bases.index(mixin) + 1]
    if len(bases) != 2 or not bases[0].__module__.startswith("torch.distributed."):
        return None
    wrapper, inner = bases  # of fully_shard: FSDPModule and our class
    own = class_without(mixin, inner)
    if own is None:
        return None
    added = {name: value for name, value in vars(cls).items() if name not in _OF_ANY_CLASS}
    return type(cls.__name__.removesuffix(inner.__name__) + own.__name__, (wrapper, own), added)
