"""Options of public functions, held against their annotations: a wrong type is named before anything changes.

Only plain kinds are looked at: bool, int, float, str, None and unions of these. Python would take most mistakes among
them for something: `lean="no"` is true, and `tokens=True` is one token. NumPy's numbers become Python's.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import numpy

from .errors import Sparse24Error

_P, _R = ParamSpec("_P"), TypeVar("_R")

_WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string", type(None): "None"}
_rules: dict[Callable, dict[str, str]] = {}


def checked_options(**rules: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: the function refuses options of a wrong type.

    rules  of options that must be more than of a type, as messages have them after "must"

    Raises Sparse24Error with the argument, the rule and the value.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        _rules[function] = rules

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # Python says well what is missing or too much
            bound.arguments.update(fitted(function, bound.arguments))
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def fitted(owner: Callable, values: dict[str, Any], shown: Callable[[str], str] = str) -> dict[str, Any]:
    """`values`, named as options of a function or a class, or as fields of a dataclass, as Python's own types.

    shown  what a message calls an option, such as a flag of the command line
    """
    plain_class = isinstance(owner, type) and not dataclasses.is_dataclass(owner)
    owner = inspect.unwrap(owner.__init__ if plain_class else owner)
    kinds, rules = _kinds(owner), _rules.get(owner, {})
    return {
        name: _fit(value, kinds[name], shown(name), rules.get(name)) if name in kinds else value
        for name, value in values.items()
    }


@functools.cache
def _kinds(owner: Callable) -> dict[str, tuple[type, ...]]:
    """The options that are of plain kinds only, and these."""
    hints = {name: hint for name, hint in typing.get_type_hints(owner).items() if name != "return"}
    unions = (typing.Union, types.UnionType)
    parts = {n: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,) for n, hint in hints.items()}
    return {name: kinds for name, kinds in parts.items() if all(kind in _WORDS for kind in kinds)}


def _fit(value: Any, kinds: tuple[type, ...], name: str, rule: str | None) -> Any:
    if value is None and type(None) in kinds:
        return value
    if isinstance(value, (bool, numpy.bool_)):
        if bool in kinds:
            return bool(value)
    elif isinstance(value, Integral) and int in kinds:
        return int(value)
    elif isinstance(value, Real) and float in kinds:
        return value if type(value) in (int, float) else float(value)
    elif isinstance(value, str) and str in kinds:
        return value
    words = [_WORDS[kind] for kind in kinds]
    rule = rule or f"be {words[0] if len(words) == 1 else ', '.join(words[:-1]) + ' or ' + words[-1]}"
    raise Sparse24Error(f"{name} must {rule}, got {value!r:.60}")
