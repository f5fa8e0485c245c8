"""What a sparse layer does about weights that others have written: copies, arrivals, writes without the recipe.

Each way has a file: `copies` for averages and loaded weights, `owners` for the recipe, `unseen` for `.data`.
"""

from __future__ import annotations

import torch

from .. import packing
from ..state import PACKED, mask_of, state_of
from . import copies, merges, unseen


class WatchedWeight:
    """The part of `SparseLayer` that looks after its weight. Packing is the layer's own, by `_repack`."""

    def fingerprint(self) -> str | None:
        """Phase and mask as a short text; None where there is no mask to read (meta and fake tensors).

        It waits for the device, once for each mask.
        """
        return copies.fingerprint_of(self)

    def accept_weights(self) -> None:
        """The weights are to run under the present masks, wherever they come from."""
        if state_of(self).watch is not None:
            state_of(self).watch.arrival = None

    def look(self, *, forward: bool = True) -> None:
        """Follow the layer that this one is a copy of; before a forward pass also warn of weights of other masks."""
        if state_of(self).watch is not None:
            copies.look(self, forward=forward)

    def look_in_forward(self) -> None:
        """`look`, before a forward pass. A compiled one reads the watch, so that it is compiled anew when there is
        something to look at, and looks outside of its graph.
        """
        if state_of(self).watch is None:
            return
        if not torch.compiler.is_compiling():
            copies.look(self)
        elif torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break(msg=copies.WHY_UNCOMPILED)
            torch.compiler.disable(copies.look)(self)
        else:
            copies.refuse_unknown(self)

    def follows(self) -> bool:
        """Whether the layer is a copy of another, whose masks and phase it takes when its weights are written."""
        return state_of(self).watch is not None and copies.is_copy(self)

    def weight_has_changed(self) -> bool:
        """Whether the weight shows that it was written since it was packed; `.data` writes do not show."""
        state = state_of(self)
        weight = self._parameters.get("weight")
        return weight is not None and state.stamp is not None and state.stamp != packing.stamp(weight)

    def weight_is_computed(self) -> bool:
        """Whether the weight is no Parameter of the layer: parametrized, pruned or normalised."""
        return self._parameters.get("weight") is None

    def shares_memory(self) -> bool:
        """Whether the packed weight lies in memory that other processes may write."""
        return state_of(self).stamp == packing.SHARED

    def pack_written(self) -> None:
        """Pack a weight that somebody has written: in place under its mask, at another address as one that arrives."""
        if merges.keep_function(self):
            return
        stamp = state_of(self).stamp
        arrived = stamp is not None and not self.shares_memory() and stamp[0] != self.weight.data_ptr()
        if arrived:
            self._take_weights()
        else:
            copies.note_written(self)
            self._repack()
            self.look(forward=False)

    def is_packed(self) -> bool:
        """Whether the packed values are those of the weight, under the layer's own mask. Waits for the device."""
        if state_of(self).shards is not None:
            return True  # each gather packs
        packed, weight = self._buffers[PACKED], packing.full_weight(self)
        if state_of(self).precision is None:
            fresh = packing.pack_substitute(self, weight, packed.dtype)[PACKED]
        else:
            fresh = packing.pack_as(self, weight, packing.mask_bits(mask_of(self)))[0]
        return torch.equal(fresh.view(torch.uint8), packed.view(torch.uint8))

    def train(self, mode: bool = True):
        if mode != self.training or not mode:  # trainers call train() in each step
            unseen.look_again(self)
            unseen.look_if_compiled(self)
        return super().train(mode)
