"""Which steps are sparse and which dense, and the rule on counts of steps."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from ..errors import Sparse24Error
from ..layers.modules import DENSE, SPARSE

PLACES = ("auto", "start", "end", "none")
TOTAL_STEPS_RULE = "be the number of optimizer steps of the whole run, an integer of 1 or more"
DENSE_FRACTION_RULE = "be the part of the steps that is dense, a number from 0 to 1"


@dataclass(frozen=True)
class Phases:
    """Steps [sparse_from, sparse_until) of [0, total_steps) are sparse; a step counts once it has been taken."""

    total_steps: int
    sparse_from: int
    sparse_until: int

    @classmethod
    def plan(cls, total_steps: int, dense_fraction: float, dense_at: str) -> Phases:
        """Lay a dense phase of round(total_steps * dense_fraction) steps at the start, the end, or nowhere.

        Raises Sparse24Error for a number of steps below 1 or a fraction outside [0, 1].
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, Integral) or total_steps < 1:
            raise Sparse24Error(f"total_steps must {TOTAL_STEPS_RULE}, got {total_steps!r}")
        if not isinstance(dense_fraction, (int, float)) or not 0 <= dense_fraction <= 1:  # NaN fails too
            raise Sparse24Error(f"dense_fraction must {DENSE_FRACTION_RULE}, got {dense_fraction!r}")
        if dense_at not in PLACES[1:]:
            raise Sparse24Error(f"dense_at must be one of {', '.join(PLACES)}, got {dense_at!r}")
        total_steps = int(total_steps)
        dense = round(total_steps * dense_fraction)
        if dense_at == "start":
            return cls(total_steps, dense, total_steps)
        if dense_at == "end":
            # Steps past total_steps, if somebody takes them, belong to the last phase.
            return cls(total_steps, 0, total_steps - dense)
        return cls(total_steps, 0, total_steps)

    def at(self, step: int) -> str:
        """The phase that the next step belongs to, once `step` steps have been taken."""
        if step < self.sparse_from:
            return DENSE
        ends = self.sparse_until < self.total_steps or self.sparse_until == self.sparse_from
        return DENSE if ends and step >= self.sparse_until else SPARSE

    @property
    def sparse_steps(self) -> int:
        return self.sparse_until - self.sparse_from


def positive(name: str, value: int, least: int = 1) -> int:
    """`value` as an int. Raises Sparse24Error, with the argument's name, for anything but an integer >= `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise Sparse24Error(f"{name} must be an integer, {least} or more, got {value!r}")
    return int(value)
