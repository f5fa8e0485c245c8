"""Which blocks flip: flips of each 4x4 block against the gap between its best and its second-best pattern.

The picture of arXiv 2404.01847 on mask oscillation: blocks with a small gap flip at the least change of a weight.
Masked decay drives the pruned weights of such a block down, widens its gap and so empties that corner of the picture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import Sparse24Error
from ..layers.packing import mask_bits


class BlockFlips:
    """Counts, per 4x4 block of all layers, how many of its 16 elements have flipped since the counting began.

    counts     int32 [blocks], layer after layer; None before the first search
    searches  how many have been counted
    """

    def __init__(self):
        self.counts: Tensor | None = None
        self.searches = 0

    def add(self, before: list[Tensor], after: list[Tensor]) -> None:
        """One search: uint8 masks of the modules before and after it."""
        flips = _ones(_all_bits(before) ^ _all_bits(after))
        self.counts = flips if self.counts is None else self.counts.add_(flips)
        self.searches += 1

    def add_layer(self, start: int, blocks: int) -> None:
        """Counts for the blocks of one more layer, which begin at `start`."""
        if self.counts is not None:
            self.counts = torch.cat([self.counts[:start], self.counts.new_zeros(blocks), self.counts[start:]])

    def state_dict(self) -> dict:
        """Plain numbers and tensors."""
        return {"searches": self.searches, "counts": [] if self.counts is None else [self.counts.clone()]}

    def check_state(self, state: dict, masks: list[Tensor]) -> None:
        """Raises Sparse24Error when saved counts are not of layers with these uint8 `masks`."""
        counts = state["counts"]
        if counts and counts[0].numel() != sum(mask.numel() // 2 for mask in masks):
            raise Sparse24Error("the counts of flips per block in the state are of other layers")

    def load_state_dict(self, state: dict, masks: list[Tensor]) -> None:
        """Take up saved counts; raises as `check_state`."""
        self.check_state(state, masks)
        counts = state["counts"]
        self.searches = state["searches"]
        self.counts = counts[0].to(masks[0].device, copy=True) if counts else None

    def plot(self, gaps: list[Tensor], path) -> None:
        """A two-dimensional histogram, logarithmic in the number of blocks; gaps fp32 [rows/4, cols/4] a layer."""
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        if self.counts is None:
            raise Sparse24Error("no search has been counted yet; make the recipe with track_blocks=True and train")
        flips = self.counts.float().cpu()
        gap = torch.cat([g.flatten() for g in gaps]).float().cpu()
        axes = (figure := Figure(figsize=(6, 4))).add_subplot()
        most = int(flips.max())
        step = 2 * (1 + most // 80)  # flips of a block come in pairs
        rows = torch.arange(-1, most + step, step).numpy()
        *_, image = axes.hist2d(gap.numpy(), flips.numpy(), bins=(60, rows), norm=LogNorm(vmin=1))
        axes.set(xlabel="gap between best and second-best pattern", ylabel="flips of a block")
        axes.set_title(f"4x4 blocks, {self.searches} mask searches", loc="left", fontsize=10)
        figure.colorbar(image, label="blocks")
        figure.savefig(path, dpi=120, bbox_inches="tight")


def _all_bits(masks: list[Tensor]) -> Tensor:
    return mask_bits(torch.cat([mask.flatten() for mask in masks])).int()


def _ones(bits: Tensor) -> Tensor:
    """Number of set bits among the low 16 of each int32."""
    for shift, pattern in ((1, 0x5555), (2, 0x3333), (4, 0x0F0F), (8, 0x00FF)):
        bits = (bits & pattern) + ((bits >> shift) & pattern)
    return bits
