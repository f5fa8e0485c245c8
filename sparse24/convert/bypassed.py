"""Layers that their model never calls: its forward multiplies with their weights itself, as fused kernels do."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

#: what may be asked of a weight without multiplying with it
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "requires_grad", "numel", "is_cuda", "is_meta", "itemsize"}
#: of a module: all of its children, without their names
_ALL = {"_modules", "children", "modules", "named_children", "named_modules", "get_submodule", "apply"}


def why_bypassed(model: nn.Module, name: str) -> str | None:
    """Why the layer `name` of `model` would stay dense whatever it is made, or None.

    A class whose forward reads the layer's weight and which does nothing with the layer itself, anywhere, cannot see a
    mask. A class without source is taken to call its layers.
    """
    path, _, child = name.rpartition(".")
    parent = type(model.get_submodule(path))
    if child not in _weights_read(parent) or _used(parent) & {child, *_ALL}:
        return None
    return (
        f"the forward of {parent.__name__} multiplies with its weight and does not call it, so it would not see the "
        f"mask; let it call self.{child}(x)"
    )


@cache
def _weights_read(cls: type) -> frozenset[str]:
    """Names of children whose weights the forward of a class reads."""
    attributes = [node for node in ast.walk(_tree(cls.forward)) if isinstance(node, ast.Attribute)]
    facts = {id(node.value) for node in attributes if node.attr in _FACTS}
    weights = [node for node in attributes if node.attr == "weight" and id(node) not in facts]
    return frozenset(filter(None, (_child(node.value) for node in weights)))


@cache
def _used(cls: type) -> frozenset[str]:
    """Names of children that a class uses as a whole in any of its methods: calls, passes on, puts into a list. Of
    attributes and strings of other meanings too: these excuse a layer.
    """
    used: set[str] = set()
    for one in cls.__mro__:
        if one in (nn.Module, object):
            continue
        tree = _tree(one)
        parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {child for node in ast.walk(tree) if (child := _child(node)) is not None and id(node) not in parts}
        used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str}
    return frozenset(used)


def _child(node: ast.AST) -> str | None:
    """The name in `self.name`, where it is read."""
    is_read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    return node.attr if is_read and isinstance(node.value, ast.Name) and node.value.id == "self" else None


def _tree(source_of) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(source_of)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return ast.Module([], [])
