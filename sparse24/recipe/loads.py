"""An optimizer that is taken back to a state of before while its recipe goes on, as after a search for a rate."""

from __future__ import annotations

import warnings

import torch

from ..errors import Sparse24Warning
from .steps import Steps


class LoadWatch:
    """Warns at the next step if the optimizer's state went back by some steps and the recipe's did not.

    What an optimizer counts shows it, so one that counts nothing (SGD) goes back unseen.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: Steps):
        self._steps = steps
        self._went_back_at: int | None = None  # steps of the recipe by then
        self.handle = optimizer.register_load_state_dict_pre_hook(self._look)

    def _look(self, optimizer: torch.optim.Optimizer, state_dict: dict) -> None:
        steps = self._steps
        now, then = _steps_in(optimizer.state), _steps_in(state_dict.get("state", {}))
        if steps.taken and not steps.was_set and now is not None and then is not None and then < now:
            self._went_back_at = steps.taken

    def before_step(self) -> None:
        """Warn, once for each time, unless the recipe was loaded too."""
        at, self._went_back_at = self._went_back_at, None
        if at is None or self._steps.was_set:
            return
        warnings.warn(
            f"the optimizer was taken back to an earlier state after step {at} of this recipe, which was not: it goes "
            "on at that step, with its masks, phase and decay. Where weights and optimizer are put back, as after a "
            "search for a learning rate, put back the recipe too: recipe.load_state_dict(state), with its "
            "state_dict() of then",
            Sparse24Warning,
            stacklevel=2,
        )


def _steps_in(state: dict) -> float | None:
    """What an optimizer's state says of the steps taken; None where it says nothing. May wait for the device."""
    for kept in state.values():
        if isinstance(kept, dict) and isinstance(kept.get("step"), (int, float, torch.Tensor)):
            return float(kept["step"])
    return None
