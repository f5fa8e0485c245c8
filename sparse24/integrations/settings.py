"""Splitting the keyword arguments of a callback: which go to `sparsify` and which to `Recipe`."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from ..convert import sparsify
from ..convert.to_sparse_activations import ACTIVATION
from ..errors import Sparse24Error
from ..options import fitted
from ..recipe import Recipe


def split_settings(settings: dict[str, Any], whose: str = "Sparse24Callback") -> tuple[dict[str, Any], dict[str, Any]]:
    """(those of `sparsify`, those of `Recipe`); what both take, such as mvue, goes to both.

    Raises Sparse24Error, with the closest name, for one that neither takes: at once, not when training begins; and for
    operand="activation", which has no recipe.
    """
    if settings.get("operand") == ACTIVATION:
        raise Sparse24Error(
            f"{whose} is there for the recipe of 2:4 weights, and pruned activations have none; call "
            f"sparse24.sparsify(model, operand='activation') before training, and leave out {whose}"
        )
    known = [_keywords(function) - {"self", "model", "optimizer", "total_steps"} for function in (sparsify, Recipe)]
    for name in settings:
        if not any(name in names for names in known):
            close = difflib.get_close_matches(name, sorted(set.union(*known)), n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(set.union(*known)))}"
            raise Sparse24Error(f"{whose} takes no setting {name!r}; {hint}")
    return tuple(
        fitted(function, {name: value for name, value in settings.items() if name in names})
        for function, names in zip((sparsify, Recipe), known, strict=True)
    )


def check_decay_in(recipe_settings: dict[str, Any], clips: str | None, scales: str | None) -> None:
    """Raise Sparse24Error for decay_in="backward" where the trainer clips or scales gradients after backward.

    clips, scales  how to switch that off, as the trainer has it; None where it is off
    """
    if recipe_settings.get("decay_in", "step") == "step":
        return
    for what, remedy in (("clips", clips), ("scales", scales)):
        if remedy is not None:
            raise Sparse24Error(
                f"the trainer {what} gradients after backward, and with decay_in='backward' the decay is in them; set "
                f"{remedy}, or leave decay_in='step'"
            )


def _keywords(function) -> set[str]:
    return set(inspect.signature(function).parameters)
