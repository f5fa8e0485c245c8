"""Which steps are sparse and which dense."""

from __future__ import annotations

from dataclasses import dataclass

from ..layers import DENSE, SPARSE
from ..options import Rule

PLACES = ("auto", "start", "end", "none")
TOTAL_STEPS = Rule("be the number of optimizer steps of the whole run, an integer of 1 or more", lambda n: n >= 1)
DENSE_FRACTION = Rule("be the part of the steps that is dense, a number from 0 to 1", lambda part: 0 <= part <= 1)


@dataclass(frozen=True)
class Phases:
    """Steps [sparse_from, sparse_until) of [0, total_steps) are sparse; a step counts once it has been taken."""

    total_steps: int
    sparse_from: int
    sparse_until: int

    @classmethod
    def plan(cls, total_steps: int, dense_fraction: float, dense_at: str) -> Phases:
        """Lay a dense phase of round(total_steps * dense_fraction) steps at the "start", the "end", or nowhere."""
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
