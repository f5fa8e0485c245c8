"""The search for masks: when it is due, what it changes, and how much has flipped since the search before.

Two kinds of layers can be searched: sparse ones, whose masks are applied and packed, and `WatchedLayer`s around dense
modules, whose masks nobody multiplies with. `MaskProbe` watches a dense model, `method="dense"` sparse layers in their
dense phase; both look by this one class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .. import ops
from ..layers import SparseLayer, mask_of, packing
from ..layers.parallel import sharding, tensor_parallel
from . import monitor
from .block_flips import BlockFlips


class WatchedLayer:
    """A dense module with one 2-D weight, and the mask that this weight would get: what a search asks of a layer."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.mask: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def kernel_weight(self) -> Tensor:
        return self.weight.detach()

    def as_kernel_sees(self, tensor: Tensor) -> Tensor:
        return tensor

    def take_mask(self, mask: Tensor) -> None:
        self.mask = packing.mask_bytes(mask).clone()


class MaskSearch:
    """Searches the masks of `layers` every `interval` optimizer steps and counts the flips.

    layers   name -> layer, trained ones only
    applied  True: the layers multiply with their masks, so that a search packs them. False: masks are only watched
    sharded  modules of FSDP2 around them, which must reshard before their weights are read
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer | WatchedLayer],
        interval: int,
        *,
        applied: bool,
        sharded: list[nn.Module] = (),
        track_blocks: bool = False,
    ):
        self.layers, self.interval = layers, interval
        self.applied, self.sharded = applied, list(sharded)
        self.frozen = False  # search no more
        self.last = 0  # optimizer steps taken at the last search
        sizes = (layer.weight.numel() for layer in layers.values())
        self.monitor = monitor.FlipMonitor(layers, sizes)
        self.block_flips = BlockFlips() if track_blocks else None
        self._before: list[Tensor] = []  # masks of the search before, in buffers that stay
        self._before_step = 0  # the search that `_before` is of: the optimizer steps taken then
        self._gaps: dict[str, float] | None = None  # read once a search

    def add_layer(self, name: str) -> None:
        """`name` was put into `layers`: it has no flips so far."""
        index = list(self.layers).index(name)
        self.monitor.add_layer(index, name, self.layers[name].weight.numel())
        if self.block_flips is not None:
            blocks = [layer.weight.numel() // 16 for layer in self.layers.values()]
            self.block_flips.add_layer(sum(blocks[:index]), blocks[index])

    @property
    def masks(self) -> list[Tensor]:
        return [mask_of(m) if isinstance(m, SparseLayer) else m.mask for m in self.layers.values()]

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0 and not self.frozen

    def begin(self, step: int) -> None:
        """The first search, or one that begins a phase: there is nothing to compare its masks with."""
        self._search()
        self.last, self._gaps = step, None

    def again(self, step: int, progress: float | None) -> None:
        """Search, pack, and count the flips since the masks before.

        progress  part of the sparse steps done, for the monitor; None: never worry
        """
        if self._before_step != step:  # else this search was interrupted, and some masks are new already
            self._remember()
            self._before_step = step
        self._search()
        if step != self.last:
            self._count(step, progress)
        self.last, self._gaps = step, None

    def _search(self) -> None:
        layers = self.layers.values()
        if self.applied:
            packing.pack(layers, search=True)
            return
        for layer, mask in zip(layers, packing.search_masks(layers), strict=True):
            layer.take_mask(mask)

    def _remember(self) -> None:
        masks = self.masks
        if [mask.device for mask in self._before] != [mask.device for mask in masks]:
            self._before = [mask.clone() for mask in masks]
        elif masks:
            torch._foreach_copy_(self._before, masks)

    def _count(self, step: int, progress: float | None) -> None:
        masks = self.masks
        if not masks:
            return
        flips = ops.foreach_mask_flips([*map(packing.mask_bits, self._before)], [*map(packing.mask_bits, masks)])
        layers = list(self.layers.values())
        self.monitor.push(tensor_parallel.sum_over_parts(layers, flips), step, step - self.last, progress)
        if self.block_flips is not None:
            self.block_flips.add(*(tensor_parallel.whole_masks(layers, both) for both in (self._before, masks)))

    # -- gaps between the best and the second-best pattern ------------------------------------------------------------

    def gap_quantiles(self) -> dict[str, float]:
        """gap_q10, gap_q50, gap_q90 of the weights at the last search; nothing where no mask is searched."""
        if not self.layers:
            return {}
        if self._gaps is None:
            self._gaps = self.gaps_by(monitor.gap_quantiles)
        return self._gaps

    def gaps_by(self, statistic: Callable):
        """`statistic(weights, elements=)` of `monitor`, over one weight at a time."""
        return statistic(self._weights(), elements=sum(layer.weight.numel() for layer in self.layers.values()))

    def plot_blocks(self, path) -> None:
        """See `Recipe.plot_flips_against_gap`."""
        gaps = [ops.mask_gap(weight) for weight in self._weights()]
        (self.block_flips or BlockFlips()).plot(gaps, path)

    def _weights(self) -> Iterator[Tensor]:
        """One at a time: FSDP2 gathers each, and all of them would be the memory that sharding saves."""
        sharding.reshard(self.sharded)
        return (packing.whole_weight(layer) for layer in self.layers.values())

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Flip history, and counts of blocks where there are any; whoever owns the layers saves masks."""
        blocks = {"blocks": self.block_flips.state_dict()} if self.block_flips else {}
        return {"last_search": self.last, "masks_frozen": self.frozen, "monitor": self.monitor.state_dict(), **blocks}

    def fitting_history(self, state: dict) -> dict:
        """What to read in place of a flip history that is of other layers than these; {} where it fits."""
        if state["monitor"]["flips"].shape[-1:] == (len(self.layers),):
            return {}
        return {
            "monitor": monitor.FlipMonitor(self.layers, [0] * len(self.layers)).state_dict(),
            "blocks": BlockFlips().state_dict(),
        }

    def check_state(self, state: dict, masks: list[Tensor]) -> None:
        """Raises Sparse24Error for a state of other layers than these, whose masks `masks` are."""
        self.monitor.check_state(state["monitor"])
        if self.block_flips is not None and "blocks" in state:
            self.block_flips.check_state(state["blocks"], masks)

    def load_state_dict(self, state: dict) -> None:
        """Take up a checked state; the layers have their masks already."""
        self.last, self.frozen = state["last_search"], state["masks_frozen"]
        self.monitor.load_state_dict(state["monitor"])
        if self.block_flips is not None and "blocks" in state:
            whole = tensor_parallel.whole_masks(list(self.layers.values()), self.masks)
            self.block_flips.load_state_dict(state["blocks"], whole)
        self._before_step, self._gaps = self.last, None
        self._remember()
