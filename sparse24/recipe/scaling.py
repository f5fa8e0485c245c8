"""The scales of 8-bit layers over a training: a step behind, the same on all ranks, in checkpoints and in metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Sparse24Error
from ..layers import SparseLayer, float8, packing


class CastScales:
    """What a recipe does for those of its layers that multiply in 8 bits; nothing where there are none.

    layers  all layers of the recipe by name, frozen ones too: their inputs and gradients are cast
    counts  let casts count what they clip and flush to zero, for the metrics
    """

    def __init__(self, layers: dict[str, SparseLayer], counts: bool = False):
        self.layers = {name: layer for name, layer in layers.items() if float8.has_float8(layer)}
        self._advanced_to: int | None = None
        self._of_step: dict[str, list[Tensor]] = {}  # of the last step, for the metrics
        float8.count_casts(self.layers.values(), counts)

    def begin(self) -> None:
        """Of layers that enter the 2:4 function, before they are packed: nothing is known of their tensors."""
        float8.forget_scales(self.layers.values())
        for layer in self.layers.values():
            packing.set_weight_scale(layer)
        self._advanced_to = None
        self._pack_frozen()

    def advance(self, step: int | None = None) -> None:
        """After optimizer step number `step`, before packing; a second time for a step that was interrupted does
        nothing. Recorded in a CUDA graph, without a number, it runs in each replay.
        """
        if self.layers and (step is None or step != self._advanced_to):
            clipped = float8.update_scales(self.layers.values(), _all_reduce_max)
            self._keep("clipped", clipped)
            self._keep("counts", float8.take_counts(self.layers.values()))
            self._advanced_to = step
            self._pack_frozen()

    def _pack_frozen(self) -> None:
        """A frozen weight may have its scale from one that is trained: gate from up. Nobody else packs it."""
        halves = [layer for layer in self.layers.values() if not layer.weight.requires_grad]
        packing.pack([layer for layer in halves if float8.scale_partner(layer) is not None], search=False)

    def _keep(self, name: str, values: list[Tensor]) -> None:
        """At one address, for graphs."""
        kept = self._of_step.get(name)
        if kept is None or [t.shape for t in kept] != [t.shape for t in values]:
            self._of_step[name] = values
        elif values:
            torch._foreach_copy_(kept, values)

    def metrics(self) -> dict[str, float]:
        """Of the last step. casts_clipped: part of the casts of which some value was beyond the scale. With counts also
        values_clipped and values_flushed: parts of the values that were cast, beyond the scale and rounded to zero.
        """
        if "clipped" not in self._of_step:
            return {}
        clipped = [t.float().sum().item() for t in self._of_step["clipped"]]
        found = {"casts_clipped": sum(clipped) / sum(t.numel() for t in self._of_step["clipped"])}
        if counts := self._of_step["counts"]:
            clipped, flushed, seen = (sum(parts) for parts in zip(*(t.tolist() for t in counts), strict=True))
            found |= {"values_clipped": clipped / max(seen, 1), "values_flushed": flushed / max(seen, 1)}
        return found

    def leave(self) -> None:
        """The recipe ends: nobody asks for counts."""
        float8.count_casts(self.layers.values(), False)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Scales and largest magnitudes of each layer, by its name."""
        return {name: float8.scale_state(layer) for name, layer in self.layers.items()}

    def check_state(self, state: dict) -> None:
        """Raises Sparse24Error for what `state_dict` cannot have returned. Layers that it lacks were 16-bit ones."""
        if not isinstance(state, dict) or not all(float8.is_scale_state(values) for values in state.values()):
            raise Sparse24Error("the recipe state is corrupt: its scales of 8-bit layers are not such")

    def load_state_dict(self, state: dict[str, Tensor]) -> bool:
        """Take a checked state up; True: layers are to be packed anew. What it has of 16-bit layers is left out."""
        known = [name for name in self.layers if name in state]
        for name in known:
            float8.load_scale_state(self.layers[name], state[name])
        return bool(known)


def _all_reduce_max(largest: Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
