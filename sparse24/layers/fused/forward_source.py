"""Reading the source of a block's forward: is it down(act(up(x))) or down(act(gate(x)) * up(x))?

The statements are put into one expression, names replaced by what they stand for. In it the layers are calls of the
block's linear children; what stands around the first product is the activation, an expression that is told by its
values. So `self.act(h)`, `F.relu(h).square()`, `torch.relu(h) ** 2` and `F.silu(h)` are all read alike.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

from torch import Tensor, nn

from .activations import activation_kind

MAX_STATEMENTS = 12
_INPUT, _HIDDEN = "_sparse24_input", "_sparse24_hidden"


class Form(NamedTuple):
    """The parts of a feed-forward block's forward, by the names of its children.

    layers      (up, down) or (gate, up, down)
    uses        children that the activation calls
    tail        children called on the result, a dropout perhaps, innermost first
    source      of the activation
    activation  (block, h) -> act(h)
    """

    layers: tuple[str, ...]
    uses: tuple[str, ...]
    tail: tuple[str, ...]
    source: str
    activation: Callable[[object, Tensor], Tensor]


def read_forward(block: nn.Module, own: type, layers: tuple[str, ...] = ()) -> Form | None:
    """What the forward of `own`, the block's class, computes, or None if it is of another form.

    layers  names of children known to be linear layers, whatever stands there now: an adapter, perhaps
    """
    expression = _expression(own.forward)
    if expression is None:
        return None
    linear = {name for name, child in block._modules.items() if name in layers or _is_linear(child)}
    tail, node = [], expression
    while (name := _called_child(node)) is not None and name not in linear:
        tail.append(name)
        node = node.args[0]
    if name is None:
        return None
    found = _first_product(node.args[0], linear)
    if found is None:
        return None
    ups, activation = found
    uses = _children_used(activation)
    if uses is None or not all(name in block._modules for name in tail):
        return None
    function = ast.Lambda(_arguments("self", _HIDDEN), activation)
    code = compile(ast.fix_missing_locations(ast.Expression(function)), "<activation>", "eval")
    source = (
        uses[0]
        if len(uses) == 1 and _called_child(activation) == uses[0]
        else ast.unparse(activation).replace(_HIDDEN, "h")
    )
    return Form((*ups, name), uses, tuple(reversed(tail)), source, eval(code, own.forward.__globals__))


def form_kind(block: nn.Module, form: Form) -> str | None:
    """Which of our activations the block has between its products; None for another, or one that depends on whether
    the block trains.
    """
    used = {name: getattr(block, name, None) for name in form.uses}
    modules = [m for child in used.values() if isinstance(child, nn.Module) for m in child.modules()]
    if any(True for module in modules for _ in (*module._parameters.values(), *module._buffers.values())):
        return None
    before, kinds = [module.training for module in modules], set()
    # Past the modules' hooks, which are the user's and count calls, perhaps.
    bare = SimpleNamespace(**{name: _without_hooks(child) for name, child in used.items()})
    try:
        for training in (True, False):
            for module in modules:
                module.training = training
            kinds.add(activation_kind(lambda h: form.activation(bare, h)))
    finally:
        for module, training in zip(modules, before, strict=True):
            module.training = training
    return kinds.pop() if len(kinds) == 1 else None


def _without_hooks(child):
    plain = isinstance(child, nn.Module) and type(child).__call__ is nn.Module.__call__
    return child.forward if plain else child


def _is_linear(child: nn.Module | None) -> bool:
    weight = None if child is None else child._parameters.get("weight")
    return weight is not None and weight.dim() == 2


@cache
def _expression(forward) -> ast.expr | None:
    """What `forward(self, x)` returns as one expression of `self` and x, here named `_INPUT`; None if it is no such."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__") or forward.__code__.co_freevars:
        return None
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    spec = function.args
    if len(spec.args) != 2 or spec.vararg or spec.kwarg or spec.kwonlyargs or spec.posonlyargs or spec.defaults:
        return None
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if not 0 < len(body) <= MAX_STATEMENTS:
        return None
    module, x = (argument.arg for argument in spec.args)
    values = {module: ast.Name("self", ast.Load()), x: ast.Name(_INPUT, ast.Load())}
    for node in body[:-1]:
        assigned = _assigned(node)
        if assigned is None or module in assigned:
            return None
        values |= {name: _Substitute(values).visit(value) for name, value in assigned.items()}
    if not isinstance(body[-1], ast.Return) or body[-1].value is None:
        return None
    return _Substitute(values).visit(body[-1].value)


def _assigned(node: ast.stmt) -> dict[str, ast.expr] | None:
    """Name -> value of `a = value` and of `a, b = value, value`; None for another statement."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return None
    targets, values = node.targets, [node.value]
    if isinstance(targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
        targets, values = targets[0].elts, node.value.elts
    if len(targets) != len(values) or not all(isinstance(target, ast.Name) for target in targets):
        return None
    return {target.id: value for target, value in zip(targets, values, strict=True)}


class _Substitute(ast.NodeTransformer):
    """Puts expressions in place of the names that stand for them."""

    def __init__(self, values: dict[str, ast.expr]):
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.values.get(node.id, node))


def _called_child(node: ast.AST) -> str | None:
    """`name` where the node is self.name(one argument)."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords and _self_attribute(node.func):
        return node.func.attr
    return None


def _self_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _layer_of_input(node: ast.AST, linear: set[str]) -> str | None:
    """`name` where the node is self.name(x), one of the linear layers applied to the block's input."""
    name = _called_child(node)
    is_input = name in linear and isinstance(node.args[0], ast.Name) and node.args[0].id == _INPUT
    return name if is_input else None


def _first_product(node: ast.expr, linear: set[str]) -> tuple[tuple[str, ...], ast.expr] | None:
    """((gate, up) or (up,), the activation as an expression of `_HIDDEN`), or None."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for gated, other in ((node.left, node.right), (node.right, node.left)):
            up, found = _layer_of_input(other, linear), _activation(gated, linear)
            if up is not None and found is not None and found[0] != up:
                return (found[0], up), found[1]
    found = _activation(node, linear)
    return None if found is None else ((found[0],), found[1])


def _activation(node: ast.expr, linear: set[str]) -> tuple[str, ast.expr] | None:
    """(up, the expression around self.up(x) with `_HIDDEN` in its place) if that is all that it knows of the input."""
    layers = set()

    class Cut(ast.NodeTransformer):
        def visit_Call(self, call: ast.Call) -> ast.expr:
            if (name := _layer_of_input(call, linear)) is None:
                return self.generic_visit(call)
            layers.add(name)
            return ast.Name(_HIDDEN, ast.Load())

    cut = Cut().visit(copy.deepcopy(node))
    knows_input = any(isinstance(part, ast.Name) and part.id == _INPUT for part in ast.walk(cut))
    return None if len(layers) != 1 or knows_input else (layers.pop(), cut)


def _children_used(activation: ast.expr) -> tuple[str, ...] | None:
    """Names of the children that the activation calls; None if it uses the block in another way."""
    names, calls = {}, 0
    for node in ast.walk(activation):
        if isinstance(node, ast.Call) and _self_attribute(node.func):
            names[node.func.attr] = None
            calls += 1
    mentions = sum(isinstance(node, ast.Name) and node.id == "self" for node in ast.walk(activation))
    return tuple(names) if mentions == calls else None


def _arguments(*names: str) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
