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
    """Looks at the last parameter of `optimizer` that has a gradient: a step that fails on its way leaves it alone, or
    moves it less than a whole one does.
    """

    WAYS = ("_version", "_state", "_values")

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._way = 0  # which of WAYS shows steps of this optimizer
        self._whole: list | None = None  # what a whole step adds to the marks
        self.forget()

    def begin(self) -> None:
        """The optimizer is about to move weights; twice in a step, what was noted first stays."""
        if self._parameter is None:
            groups = reversed(self._optimizer.param_groups)
            self._parameter = next((p for g in groups for p in reversed(g["params"]) if p.grad is not None), None)
            self._before = self._marks()

    def end(self) -> None:
        """It has: learn where that shows."""
        if self._parameter is not None and self._way < len(self.WAYS) - 1:
            added = self._added()
            self._whole = added or self._whole
            if added is not None and not any(added):
                self._way, self._whole = self._way + 1, None
        self.forget()

    def forget(self) -> None:
        self._parameter = self._before = None

    def has_run(self) -> bool:
        """Whether all of a step has gone by since `begin`: no, until a step or two have shown what that is.

        Waits for the device where values are compared.
        """
        if self._parameter is None:
            return False
        if self._way == len(self.WAYS) - 1:
            return not torch.equal(self._marks(), self._before)
        added, whole = self._added(), self._whole
        if added is None or whole is None or len(added) != len(whole):
            return False
        return any(added) and all(one >= other for one, other in zip(added, whole, strict=True))

    def _added(self) -> list | None:
        """To each mark since `begin`; None where there are others by now, as after an optimizer's first step."""
        now = self._marks()
        return None if len(now) != len(self._before) else [b - a for a, b in zip(self._before, now, strict=True)]

    def _marks(self):
        return None if self._parameter is None else getattr(self, self.WAYS[self._way])()

    def _version(self) -> list:
        return [_mark(self._parameter)]

    def _state(self) -> list:
        kept = self._optimizer.state.get(self._parameter, {}).values()
        return [_mark(value) for value in kept if isinstance(value, (Tensor, Number))]

    @torch.no_grad()
    def _values(self) -> Tensor:
        part = sharding.local(self._parameter.detach())
        return part.as_strided((min(VALUES, part.numel()),), (1,), part.storage_offset()).clone()


def _mark(value):
    return value._version + sharding.local(value)._version if isinstance(value, Tensor) else value
