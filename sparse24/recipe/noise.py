"""Which operand of the weight gradient is pruned, by the noise that pruning it adds: Recipe(mvue="auto").

    kappa = sum a^2 (1/p - 1) / sum a^2        of the operand a, p the probability to be kept: see `relative_variance`

Every so many steps, hooks measure the noise in one forward and backward pass, on a sample of its tokens, and are taken
off again. A layer changes its operand only when the other one is quieter by a margin, and each change is an event.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Sparse24Error
from ..functional.operands import INPUT, OUTPUT
from ..layers import SparseLayer
from ..layers.parallel import sharding

#: a layer changes to the other operand when that has less than this part of the present one's noise
MARGIN = 0.8
#: tokens of a pass that are looked at
SAMPLE = 1024


def relative_variance(a: Tensor) -> Tensor:
    """The variance that unbiased 2:4 pruning along tokens adds to `a`, over its energy: a float32 scalar on its device.

    a  (tokens, features), groups of 4 along tokens, of which the last incomplete one is left out; spec: arXiv
       2404.01847. 0 where two of four are zero, 0.47 for independent normal values; 0 for an `a` that is all zero
    """
    magnitude = a[: a.shape[0] // 4 * 4].float().abs().unflatten(0, (-1, 4))
    total, largest, energy = magnitude.sum(1), magnitude.amax(1), magnitude.square().sum(1)
    # Each is kept with probability 2 |a| / total; or the largest for sure, and one of the others by |a| / rest.
    rest = total - largest
    added = torch.where(largest * 2 <= total, total.square() / 2 - energy, rest.square() - (energy - largest.square()))
    whole = energy.sum()
    return torch.where(whole > 0, added.clamp_min(0).sum() / whole.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


class NoiseWatch:
    """Chooses the pruned operand of each layer.

    layers  name -> layer; all of them begin with the output's gradient
    every   optimizer steps between two looks
    """

    def __init__(self, layers: dict[str, SparseLayer], every: int):
        self.layers, self.every = layers, every
        self.chosen = dict.fromkeys(layers, OUTPUT)
        self._seen: dict[str, dict[str, Tensor]] = {}
        self._hooks: list = []
        self._has_said_unseen = False
        self._set()

    def add_layer(self, name: str, layer: SparseLayer) -> None:
        """One more layer, from the next look on."""
        self.layers[name], self.chosen[name] = layer, OUTPUT

    def after_step(self, step: int) -> dict | None:
        """After optimizer step number `step`: decide by the last pass, or look at the next. An event, or None."""
        event = self._decide(step) if self._hooks else None
        if step % self.every == 0:
            self._arm()
        return event

    def _arm(self) -> None:
        self.leave()
        self._seen = {name: {} for name in self.layers}
        for name, layer in self.layers.items():
            seen = self._seen[name]
            handle = layer.register_forward_hook(lambda module, args, y, seen=seen: _look(seen, args[0], y))
            self._hooks.append(handle)

    def _decide(self, step: int) -> dict | None:
        self.leave()
        if self._seen and not any(self._seen.values()):
            self._seen = {}
            return self._say_unseen(step)
        changed = {}
        for name, seen in self._seen.items():
            if len(seen) < 2:
                continue  # the layer did not run in this pass
            noise = {operand: float(value) for operand, value in seen.items()}
            now = self.chosen[name]
            other = INPUT if now == OUTPUT else OUTPUT
            if noise[other] < MARGIN * noise[now]:
                self.chosen[name] = other
                changed[name] = f"{name} {other} ({noise[other]:.3f}, {now} {noise[now]:.3f})"
        self._seen = {}
        if not changed:
            return None
        self._set()
        message = f"step {step}: the operand of the weight gradient that adds less noise: {', '.join(changed.values())}"
        return {"kind": "mvue", "step": step, "layers": list(changed), "message": message}

    def _say_unseen(self, step: int) -> dict | None:
        """Compiled code runs no hooks that came later: the choices stay as they are, which is said once."""
        if self._has_said_unseen:
            return None
        self._has_said_unseen = True
        message = (
            f"step {step}: no noise was measured, as no layer ran its hooks (compiled code does not); operands stay"
        )
        return {"kind": "mvue", "step": step, "layers": [], "message": message}

    def _set(self) -> None:
        for name, layer in self.layers.items():
            layer.set_mvue(self.chosen[name])

    def leave(self) -> None:
        """Take the hooks off."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, str]:
        """The operand that each layer prunes."""
        return dict(self.chosen)

    def load_state_dict(self, state: dict[str, str], step: int) -> None:
        """Prune as after optimizer step number `step`; layers that the state lacks stay as they are."""
        self.chosen |= {name: operand for name, operand in state.items() if name in self.layers}
        self._set()
        if step and step % self.every == 0:
            self._arm()
        else:
            self.leave()


def check_state(state: dict) -> None:
    """Raises Sparse24Error for what `NoiseWatch.state_dict` cannot have returned."""
    if not isinstance(state, dict) or any(operand not in (OUTPUT, INPUT) for operand in state.values()):
        raise Sparse24Error("the recipe state is corrupt: what its layers prune is neither 'output' nor 'input'")


def _look(seen: dict[str, Tensor], x: Tensor, y: Tensor) -> None:
    """A forward pass: the noise of x now, that of y's gradient in backward; the first pass of a step counts."""
    if seen or not y.requires_grad:
        return
    seen[INPUT] = relative_variance(_sample(x))

    def look_at_gradient(dy: Tensor) -> None:
        seen.setdefault(OUTPUT, relative_variance(_sample(dy)))

    y.register_hook(look_at_gradient)


def _sample(tensor: Tensor) -> Tensor:
    tensor = sharding.local(tensor.detach())  # of a tensor-parallel layer, what this rank multiplies
    return tensor.reshape(-1, tensor.shape[-1])[:SAMPLE]
