"""Whether the optimizer has moved weights since its step began: after an error or an interrupt nobody else can tell.

Most optimizers raise the version of a weight that they write. Fused ones, those that write through `.data`, and those
of DTensors do not; then what they keep for a parameter tells, such as its count of steps. Where nothing shows, as of a
fused SGD, some values of the weight are kept to compare: a small copy in each step.
"""

from __future__ import annotations

from numbers import Number

import torch
from torch import Tensor

from ..layers.parallel import sharding

#: values of a weight that are kept where nothing else shows a step
VALUES = 4096


class StepTrace:
    """Looks at the first parameter of `optimizer` that has a gradient."""

    WAYS = ("_version", "_state", "_values")

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._way = 0  # which of WAYS shows steps of this optimizer
        self.forget()

    def begin(self) -> None:
        """The optimizer is about to move weights; twice in a step, what was noted first stays."""
        if self._parameter is None:
            parameters = (p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None)
            self._parameter = next(parameters, None)
            self._before = self._marks()

    def end(self) -> None:
        """It has: learn where that shows."""
        if self._way < len(self.WAYS) - 1 and self._parameter is not None and not self.has_run():
            self._way += 1
        self.forget()

    def forget(self) -> None:
        self._parameter = self._before = None

    def has_run(self) -> bool:
        """Whether weights were moved since `begin`. Waits for the device where values are compared."""
        if self._parameter is None:
            return False
        now, before = self._marks(), self._before
        return not torch.equal(now, before) if isinstance(now, Tensor) else now != before

    def _marks(self):
        return None if self._parameter is None else getattr(self, self.WAYS[self._way])()

    def _version(self):
        return _mark(self._parameter)

    def _state(self):
        kept = self._optimizer.state.get(self._parameter, {})
        return {key: _mark(value) for key, value in kept.items() if isinstance(value, (Tensor, Number))}

    @torch.no_grad()
    def _values(self):
        part = sharding.local(self._parameter.detach())
        return part.as_strided((min(VALUES, part.numel()),), (1,), part.storage_offset()).clone()


def _mark(value):
    return (value._version, sharding.local(value)._version) if isinstance(value, Tensor) else value
