"""Layers whose weights were frozen when the recipe was made, and are trained later: gradual unfreezing."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Sparse24Error
from ..layers import SparseLayer
from ..layers.watch.optimizer_steps import parameters_of
from .phases import Phases
from .steps import Steps


class Unfrozen:
    """Takes layers into a recipe once their weights are trained.

    layers  all layers of the recipe by name, in the model's order, which flip histories and states have too
    trained names of those that are trained from the start
    begin   sets a layer up for the training
    plan    the phases of a recipe that trains something
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer],
        trained: dict[str, SparseLayer],
        begin: Callable[[SparseLayer], None],
        plan: Phases,
    ):
        self._order, self._begin, self._plan = list(layers), begin, plan
        self._waiting = {name: layer for name, layer in layers.items() if name not in trained}

    def take_in(self, steps: Steps) -> None:
        """Before a step: layers that it trains for the first time decay, are searched and change phase like the others.

        They keep their masks until the next search. Raises Sparse24Error where the method cannot take them.
        """
        new = {name: layer for name, layer in self._waiting.items() if layer.weight.requires_grad}
        if not new:
            return
        held = parameters_of(steps.optimizer)
        new = {name: layer for name, layer in new.items() if id(layer.weight) in held}
        if new and steps.frozen_moment is not None:
            raise Sparse24Error(
                f"the weights of {', '.join(list(new)[:4])} ({len(new)} sparse layers) were frozen until now, and "
                "method='step' has no second moment of them to keep; requires_grad_() them in its dense phase, or "
                "freeze them again"
            )
        for name, layer in new.items():
            del self._waiting[name]
            self._add(steps, name, layer)

    def _add(self, steps: Steps, name: str, layer: SparseLayer) -> None:
        if not steps.layers:
            steps.phases = self._plan
        layers = {**steps.layers, name: layer}
        steps.layers.clear()  # in place: search and decay have the same dict
        steps.layers.update((one, layers[one]) for one in self._order if one in layers)
        if steps.search.layers is steps.layers:
            steps.search.add_layer(name)
        if steps.noise is not None and name not in steps.scales.layers:
            steps.noise.add_layer(name, layer)
        self._begin(layer)
        layer.keep_mask()
        layer.enter(steps.entered)
