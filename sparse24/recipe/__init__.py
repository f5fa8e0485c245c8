"""Around the optimizer's step: hooks and their order, decay, masks, phases, methods, state, flip rates, the tuner."""

from .fingerprint import fingerprint_of, fingerprint_of_state, same_function
from .probe import MaskProbe
from .recipe import Recipe
from .take_masks import follow, load_masks
from .tune import TuneResult, tune_decay

__all__ = [
    "MaskProbe",
    "Recipe",
    "TuneResult",
    "fingerprint_of",
    "fingerprint_of_state",
    "follow",
    "load_masks",
    "same_function",
    "tune_decay",
]
