"""What the callbacks of both trainers share: converting once, and reading a saved recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ..convert import Skipped, SparsifyReport, sparse_layers, sparsify
from ..convert.report import ALREADY_SPARSE
from ..errors import Sparse24Error
from ..recipe import Recipe
from ..save import folders

#: what callbacks take as masks=
MASKS = ("load", "search")


def sparsify_once(model: nn.Module, *choice, **settings) -> SparsifyReport:
    """`sparsify`, but a model that has sparse layers already is left as it is: adapters hide its layers' names."""
    layers = sparse_layers(model)
    if layers:
        return SparsifyReport(skipped=[Skipped(name, ALREADY_SPARSE) for name in layers])
    return sparsify(model, *choice, **settings)


def read_state(path: Path) -> dict:
    """The recipe's state in a file. Raises Sparse24Error where there is none that could be read."""
    try:
        state = folders.read_state(path)
    except Sparse24Error as error:
        raise Sparse24Error(
            f"{path} cannot be read ({error}): it is damaged. Restore it from a copy, take an older checkpoint, or "
            'search the masks anew with Sparse24Callback(masks="search")'
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("masks"), dict) or not state["masks"]:
        raise Sparse24Error(
            f"{path} holds no state of a recipe: it has no masks. Restore it from a copy, take an older checkpoint, or "
            'search the masks anew with Sparse24Callback(masks="search")'
        )
    return state


def trains_masks(layers: Iterable) -> bool:
    """Whether a recipe has anything to do: the weights under adapters are frozen, and then so are their masks."""
    return any(layer.weight.requires_grad for layer in layers)


def end(recipe: Recipe | None) -> None:
    if recipe is not None:
        recipe.detach()
