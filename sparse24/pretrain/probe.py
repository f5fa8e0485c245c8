"""The flip rate of a dense run: masks are searched at the recipe's interval and compared, never applied.

It is the denominator of mu, by which the decay factor is judged: see `sparse24.tune_decay`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..structure import find_feed_forwards


class MaskProbe:
    """Watches the feed-forward weights of a dense model, those that `sparsify` would convert."""

    def __init__(self, model: nn.Module, mask_interval: int):
        self.mask_interval = mask_interval
        layers = [name for found in find_feed_forwards(model) for name in found.layers]
        weights = {name: model.get_submodule(name).weight for name in layers}
        self.weights = {name: weight for name, weight in weights.items() if fits(weight)}
        self.flip_rate: float | None = None  # of the last search; there is none before the second
        self.mask_age = 0
        self.masks = self.search()

    @torch.no_grad()
    def search(self) -> dict[str, torch.Tensor]:
        return {name: ops.transposable_mask(weight.detach()) for name, weight in self.weights.items()}

    def after_step(self, step: int) -> None:
        """Search again and count what changed, every `mask_interval` steps."""
        self.mask_age = step % self.mask_interval
        if self.mask_age or not self.weights:
            return
        masks = self.search()
        flips = sum(int(ops.mask_flips(masks[name], self.masks[name])) for name in masks)
        self.flip_rate = flips / sum(weight.numel() for weight in self.weights.values())
        self.masks = masks

    def metrics(self) -> dict[str, float]:
        if self.flip_rate is None:
            return {}
        return {"flip_rate": self.flip_rate, "flip_rate_per_step": self.flip_rate / self.mask_interval,
                "mask_age": float(self.mask_age)}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        # 16-bit unsigned masks travel as bytes: not every reader knows the dtype
        masks = {name: mask.cpu().view(torch.uint8).clone() for name, mask in self.masks.items()}
        return {"masks": masks, "flip_rate": self.flip_rate, "mask_age": self.mask_age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flip_rate, self.mask_age = state["flip_rate"], state["mask_age"]
        self.masks = {n: m.to(self.weights[n].device).view(torch.uint16) for n, m in state["masks"].items()}


def fits(weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and all(extent % 4 == 0 for extent in weight.shape)
