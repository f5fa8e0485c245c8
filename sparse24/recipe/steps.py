"""The count of optimizer steps, and what follows each: layers packed, masks searched when due, the right phase."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ..layers import DENSE, SPARSE, SparseLayer, packing
from ..layers.parallel import sharding
from .decay import MaskedDecay, unique_weights
from .methods import FrozenSecondMoment, Method
from .noise import NoiseWatch
from .optimizers import has_skipped, only_makes_state
from .phases import Phases
from .ranks import check_ranks
from .scaling import CastScales
from .search import MaskSearch
from .step_trace import StepTrace
from .surgery import ModelCheck


class Joins(Protocol):
    """What adds layers that are trained from now on, `unfrozen.Unfrozen`."""

    def take_in(self, steps: Steps) -> None: ...


class Steps:
    """How far the training is: steps taken, and the phase of the layers.

    layers       those that are trained
    check_every  every so many steps all ranks compare their masks; 0: never
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer],
        optimizer: torch.optim.Optimizer,
        method: Method,
        phases: Phases,
        search: MaskSearch,
        decay: MaskedDecay,
        scales: CastScales,
        *,
        sharded: list[nn.Module],
        check_every: int = 0,
    ):
        self.layers, self.optimizer, self.method, self.phases = layers, optimizer, method, phases
        self.search, self.decay, self.scales = search, decay, scales
        self.sharded, self.check_every = sharded, check_every
        self.taken = 0
        self.frozen_moment: FrozenSecondMoment | None = None  # of method="step", in its sparse phase
        self.noise: NoiseWatch | None = None  # of mvue="auto"
        self.check: ModelCheck | None = None  # run before a step if the model was changed
        self.unfrozen: Joins | None = None  # where layers were frozen when the recipe was made
        self.entered = ""  # the phase that all layers are in
        self._unfinished: int | None = None  # the step that an interrupt has left half done
        self.begun = False  # the optimizer's step runs, or an interrupt has ended it before `finish`
        self._trace = StepTrace(optimizer)
        self.was_set = False  # the count was loaded or set, and no step was taken since

    @property
    def phase(self) -> str:
        """The phase of the next step."""
        return self.phase_at(self.taken)

    def phase_at(self, step: int) -> str:
        return DENSE if self.method.watches or self.method.gradients_only else self.phases.at(step)

    def progress(self, step: int) -> float:
        """Part of the sparse steps that is done after `step` steps; not clamped."""
        return (step - self.phases.sparse_from) / max(1, self.phases.sparse_steps)

    @property
    def current_decay(self) -> float:
        """The factor that the next step uses."""
        return 0.0 if self.phase == DENSE else self.decay.current(self.progress(self.taken))

    # -- around a step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def before(self) -> None:
        """Before the optimizer's step, once the gradients are final; with a closure after each evaluation."""
        if only_makes_state(self.optimizer):
            return
        if self.check is not None and self.check.is_due():
            self.check.run(self.taken)
        if self.unfrozen is not None:
            self.unfrozen.take_in(self)
        if self.frozen_moment is not None:
            self.frozen_moment.before_step()
        retried, self.begun = self.begun, True  # noted first: what an interrupt in here leaves must be known too
        if not retried:
            self._trace.forget()
        self.decay.add(self.optimizer, self.current_decay, retried=retried)
        self._trace.begin()

    def step_is_over(self) -> None:
        """The optimizer's step has come to its end, with no error and no interrupt."""
        self._trace.end()
        self.decay.step_is_over()

    def after(self) -> None:
        """After the optimizer's step; where an interrupt came between, when that is found."""
        if self.frozen_moment is not None:
            self.frozen_moment.after_step()
        elif self.method.freezes_second_moment:  # what an optimizer keeps shows after its first step
            FrozenSecondMoment.check(self.optimizer, self.weights())
        if has_skipped(self.optimizer) or only_makes_state(self.optimizer):
            for layer in self.layers.values():  # the optimizer may have written to weights, but not changed them
                layer.note_packed()
            self.begun = False
            return
        self.finish(self.taken + 1)

    def finish(self, step: int, *, packed: bool = False) -> None:
        """Everything that follows optimizer step number `step`; the count changes last.

        packed  the values are packed already, by a CUDA graph

        An interrupt in here leaves `_unfinished` set, and whoever saves next finishes the step first. Doing it twice is
        harmless: masks and packed forms depend on the weights alone.
        """
        sharding.reshard(self.sharded)
        self._unfinished = step
        phase = self.phase_at(step)
        if phase != self.entered:
            self.taken = step
            self.enter(phase, search=True)
        elif phase == SPARSE or self.method.watches:
            if phase == SPARSE and not packed:
                self.scales.advance(step)
            if self.search.is_due(step):
                self.search.again(step, None if self.method.watches else self.progress(step))
            elif phase == SPARSE and not packed:
                packing.pack(self.layers.values(), search=False)
            for layer in self.layers.values():
                layer.keep_mask()
        if self.check_every and step % self.check_every == 0:
            check_ranks(self.layers)
        if self.noise is not None and (event := self.noise.after_step(step)) is not None:
            self.search.monitor.note(event)
        self.taken = step
        self.decay.write(self.current_decay)
        self._unfinished, self.begun, self.was_set = None, False, False

    def finish_interrupted(self) -> None:
        if self._unfinished is not None:
            self.finish(self._unfinished)

    def finish_begun(self, *, compare: bool) -> None:
        """Before a state is given out, or the next step, finish the last one, wherever an interrupt has ended it: also
        behind the optimizer and before `finish`, which shows in weights that were moved.

        compare  look too whether weights are those packed, which waits for the device, and asks all ranks
        """
        self.finish_interrupted()
        if self.begun and (self._trace.has_run() or (compare and not self._is_packed())):
            self.after()

    def _is_packed(self) -> bool:
        return self.entered != SPARSE or all(layer.is_packed() for layer in self.layers.values())

    def enter(self, phase: str, *, search: bool) -> None:
        """Set the phase of every layer; entering the sparse one packs, and searches masks if asked to."""
        if phase == SPARSE:
            self.scales.begin()
        if search and (phase == SPARSE or self.method.watches):
            self.search.begin(self.taken)
        elif phase == SPARSE:
            packing.pack(self.layers.values(), search=False)
        self.frozen_moment = None
        if phase == SPARSE and self.method.freezes_second_moment:
            self.frozen_moment = FrozenSecondMoment(self.optimizer, self.weights())
        for layer in self.layers.values():
            layer.enter(phase)
        self.entered = phase

    def weights(self) -> list[torch.Tensor]:
        return [layer.weight for layer in unique_weights(self.layers)]

    def repack(self) -> None:
        """Pack weights that were moved between two steps, under the present masks."""
        if self.entered == SPARSE:
            packing.pack(self.layers.values(), search=False)

    def go_to(self, step: int, *, search: bool) -> None:
        """Continue as if `step` steps had been taken: set the count, and enter the phase that belongs to it."""
        self.taken, self._unfinished, self.begun, self.was_set = step, None, False, True
        self.enter(self.phase, search=search)
