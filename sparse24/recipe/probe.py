"""MaskProbe: the flip rate that a dense model would have, for comparison.

Masks are searched at the recipe's interval and compared, and never applied: the model trains as if nobody looked. Its
flip rate is what the sparse run's is measured against; see `sparse24.tune_decay`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..convert import SparsifyReport, find_candidates, patterns, unwrap
from ..errors import Sparse24Error
from ..layers import SparseLayer
from ..options import at_least, checked_options
from . import monitor
from .optimizers import has_skipped
from .search import MaskSearch, WatchedLayer


class MaskProbe:
    """Watches the masks that the FFN weights of a dense model would get.

    model          dense; it is left as it is: no class, buffer or hook of it changes
    optimizer      its optimizer: the probe then looks after each step by itself. None: call `after_step` yourself
    mask_interval  optimizer steps between two searches
    include, exclude  which layers, as in `sparse24.sparsify`

    `monitor` has the flip rates, for CSV, TensorBoard and pictures. Raises Sparse24Error when no layer is found whose
    weight could be 2:4.
    """

    @checked_options(mask_interval=at_least(1))
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        mask_interval: int = 40,
        include: str | Sequence[str] = "auto",
        exclude: str | Sequence[str] = (),
    ):
        found = find_candidates(unwrap(model), include, patterns(exclude, "exclude"), SparsifyReport())
        self.layers = {name: layer for name, layer in found.items() if _fits(layer)}
        if not self.layers:
            raise Sparse24Error(
                f"no dense layer of {type(model).__name__} could be 2:4; a probe wants a dense model, and name layers "
                'yourself, as in include=("*mlp*",), if their structure is not known'
            )
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise Sparse24Error(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
        watched = {name: WatchedLayer(layer) for name, layer in self.layers.items()}
        self._search = MaskSearch(watched, mask_interval, applied=False)
        self._search.begin(0)
        self.step = 0
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._post_hook)

    @property
    def monitor(self) -> monitor.FlipMonitor:
        return self._search.monitor

    @property
    def mask_interval(self) -> int:
        return self._search.interval

    def after_step(self, step: int | None = None) -> None:
        """After optimizer step number `step` (default: one more): every `mask_interval` steps search and count."""
        self.step = self.step + 1 if step is None else step
        if self._search.is_due(self.step):
            self._search.again(self.step, None)

    def metrics(self) -> dict[str, float]:
        """flip_rate, flip_rate_per_step, mask_age and gap_q10, gap_q50, gap_q90, as `Recipe.metrics` has them."""
        return {
            "flip_rate": self.monitor.rate(),
            "flip_rate_per_step": self.monitor.rate_per_step(),
            "mask_age": float(self.step - self._search.last),
            **self._search.gap_quantiles(),
        }

    def detach(self) -> None:
        """Take the hook off the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict:
        """Step, masks and flip history: plain numbers, strings and tensors."""
        masks = {name: layer.mask.clone() for name, layer in self._search.layers.items()}
        return {"step": self.step, "masks": masks, **self._search.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state. Raises Sparse24Error, changing nothing, for a state of another model."""
        layers = self._search.layers
        if {name: mask.shape for name, mask in state["masks"].items()} != {
            n: la.mask.shape for n, la in layers.items()
        }:
            raise Sparse24Error("the state of the probe is of another model: its masks have other names or shapes")
        self._search.check_state(state, list(state["masks"].values()))
        for name, mask in state["masks"].items():
            layers[name].take_mask(mask.to(layers[name].mask.device))
        self._search.load_state_dict(state)
        self.step = state["step"]

    def _post_hook(self, optimizer, args, kwargs) -> None:
        if not has_skipped(optimizer):
            self.after_step()


def _fits(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if isinstance(layer, SparseLayer) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    return weight.is_floating_point() and all(extent and extent % 4 == 0 for extent in weight.shape)
