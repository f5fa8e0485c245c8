"""MaskProbe: the flip rate that a dense model would have, for comparison.

Masks are searched at the recipe's interval and compared, and never applied: the model trains as if nobody looked. Its
flip rate is what the sparse run's is measured against; see `sparse24.tune_decay`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..convert import SparsifyReport, candidates, patterns, unwrap
from ..errors import Sparse24Error
from ..layers import packing
from ..layers.modules import SparseLayer
from . import monitor


class MaskProbe:
    """Watches the masks that the FFN weights of a dense model would get.

    model          dense; it is left as it is: no class, buffer or hook of it changes
    optimizer      its optimizer: the probe then looks after each step by itself. None: call `after_step` yourself
    mask_interval  optimizer steps between two searches
    include, exclude  which layers, as in `sparse24.sparsify`

    `monitor` has the flip rates, for CSV, TensorBoard and pictures. Raises Sparse24Error when no layer is found whose
    weight could be 2:4.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        mask_interval: int = 40,
        include: str | Sequence[str] = "auto",
        exclude: str | Sequence[str] = (),
    ):
        if not isinstance(mask_interval, int) or mask_interval < 1:
            raise Sparse24Error(f"mask_interval must be an integer, 1 or more, got {mask_interval!r}")
        found = candidates(unwrap(model), include, patterns(exclude, "exclude"), SparsifyReport())
        self.layers = {name: layer for name, layer in found.items() if _fits(layer)}
        if not self.layers:
            raise Sparse24Error(
                f"no dense layer of {type(model).__name__} could be 2:4; a probe wants a dense model, and name layers "
                'yourself, as in include=("*mlp*",), if their structure is not known'
            )
        self.mask_interval = mask_interval
        self.step = self.last_refresh = 0
        self.monitor = monitor.FlipMonitor(self.layers, (layer.weight.numel() for layer in self.layers.values()))
        self.masks = self._search()
        self._gaps: tuple[int, dict[str, float]] | None = None
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._post_hook)

    def after_step(self, step: int | None = None) -> None:
        """After optimizer step number `step` (default: one more): every `mask_interval` steps search and count."""
        self.step = self.step + 1 if step is None else step
        if self.step % self.mask_interval == 0:
            masks = self._search()
            flips = ops.foreach_mask_flips(list(self.masks.values()), list(masks.values()))
            self.monitor.push(flips, self.step, self.step - self.last_refresh, None)
            self.masks, self.last_refresh = masks, self.step

    def metrics(self) -> dict[str, float]:
        """flip_rate, flip_rate_per_step, mask_age and gap_q10, gap_q50, gap_q90, as `Recipe.metrics` has them."""
        if self._gaps is None or self._gaps[0] != self.last_refresh:
            self._gaps = (self.last_refresh, monitor.gap_quantiles(list(self._weights().values())))
        return {
            "flip_rate": self.monitor.rate(),
            "flip_rate_per_step": self.monitor.rate_per_step(),
            "mask_age": float(self.step - self.last_refresh),
            **self._gaps[1],
        }

    def detach(self) -> None:
        """Take the hook off the optimizer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state_dict(self) -> dict:
        """Step, masks and flip history: plain numbers, strings and tensors."""
        masks = {name: packing.mask_bytes(mask).clone() for name, mask in self.masks.items()}
        return {
            "step": self.step,
            "last_refresh": self.last_refresh,
            "masks": masks,
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state. Raises Sparse24Error, changing nothing, for a state of another model."""
        expected = {name: packing.mask_bytes(mask).shape for name, mask in self.masks.items()}
        if {name: mask.shape for name, mask in state["masks"].items()} != expected:
            raise Sparse24Error("the state of the probe is of another model: its masks have other names or shapes")
        self.monitor.check_state(state["monitor"])
        self.monitor.load_state_dict(state["monitor"])
        self.step, self.last_refresh, self._gaps = state["step"], state["last_refresh"], None
        for name, mask in state["masks"].items():
            self.masks[name] = packing.mask_bits(mask.to(self.masks[name].device, copy=True))

    def _post_hook(self, optimizer, args, kwargs) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a fused optimizer that has skipped the step
        if found_inf is None or float(found_inf) == 0:
            self.after_step()

    @torch.no_grad()
    def _weights(self) -> dict[str, Tensor]:
        weights = {name: layer.weight.detach() for name, layer in self.layers.items()}
        return {name: w.full_tensor() if packing.is_dtensor(w) else w for name, w in weights.items()}

    def _search(self) -> dict[str, Tensor]:
        return {name: ops.transposable_mask(weight) for name, weight in self._weights().items()}


def _fits(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    if isinstance(layer, SparseLayer) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    return weight.is_floating_point() and all(extent and extent % 4 == 0 for extent in weight.shape)
