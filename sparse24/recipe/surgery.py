"""Changes to a model under its recipe: layers that were replaced, weights that were cast."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import nn

from ..convert import sparse_layers, unwrap
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import SparseLayer
from ..layers.watch.optimizer_steps import parameters_of
from ..layers.watch.owners import owner_of


def _no_model() -> None:
    return None


class ModelCheck:
    """After a change, checks before the next optimizer step that the recipe's layers are still the model's.

    due  a layer has reported a change: modules were replaced or converted, or weights cast

    torch tells nobody of a module that is deleted, as by `del model[i]` or `pop`. So the ways from the model to its
    sparse layers are remembered, and walked before each step.
    """

    def __init__(self, model: nn.Module, layers: dict[str, SparseLayer], optimizer: torch.optim.Optimizer):
        self._model = weakref.ref(unwrap(model))
        self.layers, self.optimizer = layers, optimizer
        self.due = False
        self._ways = _ways_to(layers, self._model())

    def __getstate__(self) -> dict:
        """For copies of a detached recipe, which looks at no model any more."""
        return self.__dict__ | {"_model": _no_model, "_ways": []}

    def is_due(self) -> bool:
        if not self.due:
            for parent, name, child in self._ways:
                holder = parent()
                if holder is None or holder._modules.get(name) is not child():
                    return True
        return self.due

    def run(self, step: int) -> None:
        """Raises Sparse24Error, each time, for layers that are gone and for trained ones without a recipe.

        step  optimizer steps taken
        """
        model = self._model()
        if model is not None:
            self._check_layers(model, step)
        self._ways = _ways_to(self.layers, model)
        self.due = False
        self._warn_of_old_dtypes()

    def _check_layers(self, model: nn.Module, step: int) -> None:
        there = set(map(id, model.modules()))
        gone = [name for name, layer in self.layers.items() if id(layer) not in there]
        held = parameters_of(self.optimizer)
        new = [
            name
            for name, layer in sparse_layers(model).items()
            if owner_of(layer) is None and id(layer._parameters.get("weight")) in held
        ]
        if not gone and not new:
            return
        lost = f"{', '.join(gone[:4])} ({len(gone)} layers of this recipe) are no longer in the model" if gone else ""
        added = f"{', '.join(new[:4])} ({len(new)} sparse layers) are trained without it" if new else ""
        raise Sparse24Error(
            f"the model was changed under its recipe: {' and '.join(filter(None, (lost, added)))}. Call "
            "recipe.detach(), and make a new Recipe(model, optimizer, ...) with the same settings, then "
            f"recipe.start_at({step}); the optimizer must hold the weights that were put in. A trainer's callback "
            "wants such changes before its training begins"
        )

    def _warn_of_old_dtypes(self) -> None:
        """Many optimizers refuse a state of another dtype in words that do not name the cause: warn before they do."""
        for name, layer in self.layers.items():
            weight = layer._parameters.get("weight")
            state = {} if weight is None else self.optimizer.state.get(weight, {})
            odd = [key for key, t in state.items() if _is_of_another_dtype(t, weight)]
            if odd:
                warnings.warn(
                    f"the weights, such as that of {name}, were cast to {weight.dtype} after steps in "
                    f"{state[odd[0]].dtype}, and the optimizer's {', '.join(odd)} were not: many optimizers refuse "
                    "that. optimizer.load_state_dict(optimizer.state_dict()) casts its state too",
                    Sparse24Warning,
                    stacklevel=2,
                )
                return


def _ways_to(layers: dict[str, SparseLayer], model: nn.Module | None) -> list[tuple[weakref.ref, str, weakref.ref]]:
    """(parent, name, child) wherever a layer lies in a child of a module of `model`, or is one."""
    if model is None:
        return []
    wanted = set(map(id, layers.values()))
    leads: dict[int, bool] = {}
    for module in reversed(list(model.modules())):  # children before their parents
        below = any(leads.get(id(child), False) for child in module._modules.values())
        leads[id(module)] = below or id(module) in wanted
    return [
        (weakref.ref(parent), name, weakref.ref(child))
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and leads[id(child)]
    ]


def _is_of_another_dtype(value, weight: torch.Tensor) -> bool:
    if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
        return False
    return value.is_floating_point() and value.dtype != weight.dtype
