"""Around the optimizer's step: hooks and their order, decay, masks, phases, methods, state, flip rates, the tuner."""

from .probe import MaskProbe
from .recipe import Recipe
from .tune import TuneResult, tune_decay

__all__ = ["MaskProbe", "Recipe", "TuneResult", "tune_decay"]
