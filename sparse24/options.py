"""Types of arguments, held against annotations: a wrong one is named, with the rule and the value.

`checked_options` looks before a public function begins, at options of plain kinds: bool, int, float, str, None and
unions of these. Python would take most mistakes among them for something: `lean="no"` is true, and `tokens=True` is one
token. NumPy's numbers become Python's. Ops look only after a call has failed (`ops/arguments.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy
import torch

from .errors import Sparse24Error

_P, _R = ParamSpec("_P"), TypeVar("_R")

_PLAIN = {bool: "True or False", int: "an integer", float: "a number", str: "a string", type(None): "None"}
_WORDS = _PLAIN | {torch.Tensor: "a tensor", torch.dtype: "a torch.dtype"}
_UNIONS = (typing.Union, types.UnionType)


class Rule(NamedTuple):
    """What an option must be beside of its type.

    words  as messages have them after "must"
    holds  whether a value of the right type keeps the rule; None is not asked
    """

    words: str
    holds: Callable[[Any], bool] = lambda value: True


_rules: dict[Callable, dict[str, Rule]] = {}


def at_least(least: int) -> Rule:
    return Rule(f"be an integer, {least} or more", lambda value: value >= least)


def one_of(choices: Collection[str]) -> Rule:
    return Rule(f"be one of {', '.join(choices)}", lambda value: value in choices)


def checked_options(**rules: Rule) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: the function refuses options of a wrong type, and those that break their rule.

    Raises Sparse24Error with the argument, the rule and the value.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        _rules[inspect.unwrap(function)] = rules

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
    hints, rules = _plain_hints(owner), _rules.get(owner, {})
    return {
        name: _fit(value, hints[name], shown(name), rules.get(name)) if name in hints else value
        for name, value in values.items()
    }


@functools.cache
def _plain_hints(owner: Callable) -> dict[str, Any]:
    """The options that are of plain kinds only, and their annotations."""
    hints = typing.get_type_hints(owner)
    return {n: hint for n, hint in hints.items() if n != "return" and all(kind in _PLAIN for kind in _parts(hint))}


def _fit(value: Any, hint: Any, name: str, rule: Rule | None) -> Any:
    if not fits(value, hint) or (rule is not None and value is not None and not rule.holds(value)):
        raise Sparse24Error(f"{name} must {rule.words if rule else f'be {words(hint)}'}, got {value!r:.60}")
    if isinstance(value, numpy.generic):
        return value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, (int, float)) else value


def _parts(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)


def fits(value: object, hint: Any) -> bool:
    """Whether a value is what an annotation says: numbers, text, tensors, dtypes, and lists and tuples of them."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return any(fits(value, part) for part in parts)
    if origin is tuple and Ellipsis not in parts:
        return isinstance(value, (tuple, list)) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin in (list, tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(fits(item, parts[0]) for item in value)
    is_bool = isinstance(value, (bool, numpy.bool_))
    if hint is bool:
        return is_bool
    if hint is int:
        return isinstance(value, (Integral, torch.SymInt)) and not is_bool
    if hint is float:
        return isinstance(value, (Real, torch.SymFloat, torch.SymInt)) and not is_bool
    return not isinstance(hint, type) or isinstance(value, hint)


def words(hint: Any) -> str:
    """An annotation as a message has it after "must be"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        *others, last = map(words, parts)
        return f"{', '.join(others)} or {last}"
    if origin is tuple and Ellipsis not in parts:
        return f"a tuple of ({', '.join(map(words, parts))})"
    if origin in (list, tuple, Sequence):
        return f"a list of which each is {words(parts[0])}"
    return _WORDS.get(hint, str(hint))
