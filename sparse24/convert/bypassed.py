"""Layers that their model never calls: its forward multiplies with their weights itself, as fused kernels do.

And blocks that prune their activation and whose layers somebody calls one by one, who would compute the dense function.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from torch import nn

from .names import CONTAINERS

#: what may be asked of a weight without multiplying with it
_FACTS = {"dtype", "device", "shape", "size", "dim", "ndim", "requires_grad", "numel", "is_cuda", "is_meta", "itemsize"}
#: of a module: all of its children, without their names
_ALL = {"_modules", "children", "modules", "named_children", "named_modules", "get_submodule", "apply"}
#: functions and methods that give a module's children, as enumerate(self.blocks) and self.blocks.values()
_PASS_ON = {"enumerate", "zip", "list", "tuple", "reversed", "iter", "getattr", "values", "items", "get_submodule"}


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


def why_block_bypassed(model: nn.Module, name: str, down: str) -> str | None:
    """Why an activation that enters the layer `down` of the block `name` may be one that nobody prunes, or None.

    So it is if the forward of a module around the block, or a method used in it, calls that layer, or reads its weight
    and never calls the block. A method that no forward uses may do both, to look at things.
    """
    parts = name.split(".") if name else []
    if not parts:
        return None
    in_container = isinstance(model.get_submodule(".".join(parts[:-1])), CONTAINERS)
    for depth in range(len(parts)):
        names = {parts[-1], *(parts[-2:-1] if in_container and depth < len(parts) - 1 else ())}
        owner = type(model.get_submodule(".".join(parts[:depth])))
        if _passes_by(owner, frozenset(names), down):
            return (
                f"the forward of {owner.__name__} multiplies with its {down} past the block, where nothing would prune "
                "the activation; let it call the block"
            )
    return None


@cache
def _passes_by(cls: type, names: frozenset[str], down: str) -> bool:
    """Whether the forward of `cls` uses the layer `down` of a child that has one of these names."""
    if cls.__module__.startswith("torch.nn."):
        return False
    layer, reads_weight, calls_block = {f"{name}.{down}" for name in names}, False, False
    for tree in _reached_methods(cls):
        meant = _Meaning(tree)
        facts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in _FACTS}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                if layer & meant.of(node.func):
                    return True
                calls_block |= any(names & meant.of(part) for part in (node.func, *node.args))
            elif isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in facts:
                reads_weight |= bool(layer & meant.of(node.value))
    return reads_weight and not calls_block


class _Meaning:
    """Which children the expressions of a function may stand for, by the last name on the way to them, and by the last
    two: "mlp" of `self.mlp`, of `layer.mlp`, of `block` after `block = self.mlp` or in `for block in self.mlp`;
    "down" and "mlp.down" of `self.mlp.down`.
    """

    def __init__(self, tree: ast.AST):
        self._variables: dict[str, set[str]] = {}
        for _ in range(2):  # a variable may stand for another one
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign):
                    self._note(node.targets, node.value)
                elif isinstance(node, ast.For | ast.comprehension):
                    self._note([node.target], node.iter)
                elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
                    self._note([node.target], node.value)

    def _note(self, targets: list[ast.expr], value: ast.expr) -> None:
        meant = self.of(value)
        for node in (node for target in targets for node in ast.walk(target)):
            if isinstance(node, ast.Name):
                self._variables.setdefault(node.id, set()).update(meant)

    def of(self, node: ast.AST) -> set[str]:
        match node:
            case ast.Attribute():
                return {node.attr, *(f"{name}.{node.attr}" for name in self.of(node.value) if "." not in name)}
            case ast.Name():
                return self._variables.get(node.id, set())
            case ast.Constant(value=str()):
                return {node.value}
            case ast.Subscript():
                return self.of(node.value) | self.of(node.slice)
            case ast.Call(func=ast.Name(id=name)) if name in _PASS_ON:
                return set().union(*map(self.of, node.args))
            case ast.Call(func=ast.Attribute(attr=name)) if name in _PASS_ON:
                return self.of(node.func.value).union(*map(self.of, node.args))
        return set()


@cache
def _reached_methods(cls: type) -> tuple[ast.AST, ...]:
    """The sources of `forward` and of all methods of the class that are mentioned there, and so on."""
    reached, left = {}, ["forward"]
    while left:
        name = left.pop()
        method = inspect.getattr_static(cls, name, None)
        function = getattr(method, "fget", None) or getattr(method, "__func__", method)
        if name in reached or not inspect.isroutine(function) or hasattr(nn.Module, name) and name != "forward":
            continue
        reached[name] = tree = _tree(function)
        left += [child for node in ast.walk(tree) if (child := _child(node)) is not None]
    return tuple(reached.values())


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
