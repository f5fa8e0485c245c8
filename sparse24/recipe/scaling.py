"""The scales of 8-bit layers during training: one step behind, the same on all ranks, in checkpoints and metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Sparse24Error
from ..layers import SparseLayer, float8, packing
from ..layers.checks import is_distributed


class CastScales:
    """What a recipe does for those of its layers that multiply in 8 bits; nothing where there are none.

    layers  all layers of the recipe by name, frozen ones too: their inputs and gradients are cast
    counts  let casts count what they clip and flush to zero, for the metrics
    """

    def __init__(self, layers: dict[str, SparseLayer], counts: bool = False):
        self.layers = {name: layer for name, layer in layers.items() if float8.has_float8(layer)}
        self._advanced_to: int | None = None
        self._last_step: dict[str, list[Tensor]] = {}  # what metrics() reads
        float8.count_casts(self.layers.values(), counts)

    def begin(self) -> None:
        """Before layers that enter the sparse phase are packed: forget scales, as nothing is known of their tensors."""
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
        """Pack frozen weights that share a scale with a trained one, such as gate with up: nobody else does."""
        halves = [layer for layer in self.layers.values() if not layer.weight.requires_grad]
        packing.pack([layer for layer in halves if float8.scale_partner(layer) is not None], search=False)

    def _keep(self, name: str, values: list[Tensor]) -> None:
        """Keep the values of this step, at one address: CUDA graphs write there in each replay."""
        kept = self._last_step.get(name)
        if kept is None or [t.shape for t in kept] != [t.shape for t in values]:
            self._last_step[name] = values
        elif values:
            torch._foreach_copy_(kept, values)

    def metrics(self) -> dict[str, float]:
        """casts_clipped and, with counts, values_clipped and values_flushed, of the last step: see `Recipe.metrics`."""
        if "clipped" not in self._last_step:
            return {}
        clipped = [t.float().sum().item() for t in self._last_step["clipped"]]
        found = {"casts_clipped": sum(clipped) / sum(t.numel() for t in self._last_step["clipped"])}
        if counts := self._last_step["counts"]:
            clipped, flushed, seen = (sum(parts) for parts in zip(*(t.tolist() for t in counts), strict=True))
            found |= {"values_clipped": clipped / max(seen, 1), "values_flushed": flushed / max(seen, 1)}
        return found

    def leave(self) -> None:
        """The recipe ends, and with it the counting."""
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
        """Take up a checked state; returns whether layers must be packed again. Ignores layers that are not 8-bit."""
        known = [name for name in self.layers if name in state]
        for name in known:
            float8.load_scale_state(self.layers[name], state[name])
        return bool(known)


def _all_reduce_max(largest: Tensor) -> None:
    if is_distributed():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
