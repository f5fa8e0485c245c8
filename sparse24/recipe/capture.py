"""Whole training steps in a CUDA graph: what may be captured, and what a replay adds that a graph cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import Sparse24Error
from ..formats import DEFAULT_DTYPE
from ..layers import SPARSE, packing
from .decay import MaskedDecay
from .steps import Steps


class Capture:
    """The step that the user's CUDA graph holds: its phase and its decay."""

    def __init__(self, steps: Steps, decay: MaskedDecay):
        self.steps, self.decay = steps, decay
        self._allowed = False
        self._held: tuple[str, str] | None = None  # phase and decay of the captured step

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """See `Recipe.capturing`."""
        method = self.steps.method
        if self.decay.on == "weight" or method.freezes_second_moment:
            raise Sparse24Error(
                f"a step of method={method.name!r} cannot be captured in a CUDA graph; capture forward and "
                "backward only"
            )
        if self.decay.value and self.decay.on and self.decay.schedule != "constant" and self.decay.decay_in == "step":
            raise Sparse24Error(
                f"decay_schedule={self.decay.schedule!r} changes the decay at each step, and a captured step keeps the "
                "one that it was captured with; use decay_schedule='constant' or decay_in='backward', or capture "
                "forward and backward only"
            )
        self.steps.finish_interrupted()
        _make_cublas_handles({layer.weight.device for layer in self.steps.layers.values()})
        self._allowed, self._held = True, None
        try:
            yield
        finally:
            self._allowed = False

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a captured step changes anything: is it meant to be captured, and can it be?"""
        if not self._allowed:
            raise Sparse24Error(
                "optimizer.step() is being captured in a CUDA graph, whose replays the recipe could not count; capture "
                "under `with recipe.capturing():` and call recipe.replay(graph), or leave optimizer.step() outside"
            )
        if getattr(optimizer, "found_inf", None) is not None:
            raise Sparse24Error("a step under GradScaler cannot be captured in a CUDA graph; use bfloat16")

    def record(self) -> None:
        """After the optimizer's step inside a capture: what each replay is to do."""
        if self.steps.phase == SPARSE:
            self.steps.scales.advance()
            packing.pack(self.steps.layers.values(), search=False)
        self._held = self._next()

    def replay(self, graph) -> None:
        """See `Recipe.replay`."""
        if self._held is None:
            raise Sparse24Error("no step has been captured; capture one under `with recipe.capturing():`")
        self.steps.finish_interrupted()
        now = self._next()
        if self._held != now:
            (phase, decay), (phase_now, decay_now) = self._held, now
            raise Sparse24Error(
                f"the graph holds a step of the {phase} phase with {decay}, the next step is {phase_now} with "
                f"{decay_now}; capture it anew"
            )
        graph.replay()
        self.steps.finish(self.steps.taken + 1, packed=True)

    def forget(self) -> None:
        self._held = None

    def _next(self) -> tuple[str, str]:
        """Phase and decay as a graph holds them. A decay in backward is read from memory, so its value may change."""
        if self.decay.decay_in == "step":
            return self.steps.phase, f"decay {self.steps.current_decay:g}"
        return self.steps.phase, "a decay in backward" if self.decay.is_read() else "no decay in backward"


def _make_cublas_handles(devices: set[torch.device]) -> None:
    """A dense product forward and backward on each GPU. cuBLAS makes a handle at a thread's first product, and may not
    while a step is captured: autograd's thread has had none if all of the steps so far were sparse.
    """
    for device in devices:
        if device.type == "cuda" and not is_capturing():
            x = torch.zeros(16, 16, device=device, dtype=DEFAULT_DTYPE, requires_grad=True)
            with torch.enable_grad():
                torch.autograd.grad((x @ x).sum(), x)


def is_capturing() -> bool:
    """Whether work on the current CUDA stream is being captured in a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
