"""The flip rate: how much of the masks changes from one search to the next, per layer and over all.

    r = |mask_now - mask_before|_1 / D,   D = number of weights;   per optimizer step: r / steps between the two

Two unrelated masks give 0.5, one 2x2 swap in a layer gives 4/D. In a healthy run the rate rises during warm-up,
peaks, and falls towards 0 with the learning rate. A rate that keeps rising or stays high means too small a decay
(masks oscillate and never settle); one pinned near 0 from the start means too large a decay (masks never searched
for anything better).
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .. import ops
from ..errors import Sparse24Error, Sparse24Warning

# An alarm needs this many searches of a layer, so that one noisy value never raises it.
MIN_SEARCHES = 5
# Explosion: past this part of the sparse phase the rate should have peaked and be falling...
EXPLOSION_PROGRESS = 0.5
# ...and a rate that is both this near to its peak and this high (of 0.5 for unrelated masks) has not.
EXPLOSION_OF_PEAK, EXPLOSION_RATE = 0.9, 0.1
# Frozen: in the first part of the sparse phase, where masks should be on the move, hardly a block in 10,000 changes.
FROZEN_PROGRESS, FROZEN_RATE = 0.4, 1e-4 / 4


class FlipMonitor:
    """Collects flips without stalling the device: counts are copied to the host behind the work that is queued, and
    read there at the next search, or when somebody asks.

    names, sizes  the layers and their numbers of weights
    events        what was noticed: dicts with "kind" ("explosion" or "frozen"), "step", "layers", "message"
    """

    def __init__(self, names: Iterable[str], sizes: Iterable[int]):
        self.names, self.sizes = list(names), list(sizes)
        self.steps: list[int] = []  # optimizer steps taken at each search
        self.intervals: list[int] = []  # optimizer steps since the search before
        self.flips: list[list[int]] = []  # per search, per layer
        self.events: list[dict] = []
        self.listeners: list[Callable[[dict], None]] = []
        self._peaks = [0] * len(self.names)  # most flips of each layer at any search
        self._waiting: tuple | None = None
        self._reported: set[str] = set()

    def add_layer(self, index: int, name: str, size: int) -> None:
        """One more layer from here on, at `index` of the names; it has not flipped so far."""
        self._drain()
        for values, value in ((self.names, name), (self.sizes, size), (self._peaks, 0)):
            values.insert(index, value)
        for flips in self.flips:
            flips.insert(index, 0)

    def push(self, flips: Tensor, step: int, interval: int, progress: float | None) -> None:
        """A search after `step` steps, `interval` after the last; flips int64 [layers], on the device.

        progress  part of the sparse phase done, in [0, 1]: when to worry depends on it. None: never
        """
        self._drain()
        arrived = None
        if flips.is_cuda:
            # Reading `flips` itself would wait for all that is queued behind it.
            host = torch.empty(flips.shape, dtype=flips.dtype, pin_memory=True)
            flips = host.copy_(flips, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._waiting = (flips, arrived, step, interval, progress)

    def _drain(self) -> None:
        if self._waiting is None:
            return
        flips, arrived, step, interval, progress = self._waiting
        self._waiting = None
        if arrived is not None:
            arrived.synchronize()
        self.steps.append(step)
        self.intervals.append(interval)
        self.flips.append(flips.tolist())
        self._peaks = [*map(max, self._peaks, self.flips[-1])]
        if progress is not None:
            self._look(step, progress)

    # -- reading --------------------------------------------------------------------------------------------------

    def rate(self) -> float:
        """Flip rate over all layers at the last search, 0 before the first."""
        self._drain()
        return sum(self.flips[-1]) / sum(self.sizes) if self.flips else 0.0

    def rate_per_step(self) -> float:
        rate = self.rate()
        return rate / self.intervals[-1] if self.intervals else 0.0

    def layer_rates(self, *, per_step: bool = False) -> dict[str, float]:
        """Flip rate of each layer at the last search; `per_step` divides it by the optimizer steps since the one
        before.
        """
        self._drain()
        flips = self.flips[-1] if self.flips else [0] * len(self.names)
        steps = self.intervals[-1] if per_step and self.intervals else 1
        return {name: n / size / steps for name, n, size in zip(self.names, flips, self.sizes, strict=True)}

    def history(self, *, per_step: bool = False) -> list[tuple[int, float]]:
        """(step, flip rate over all layers) of every search; `per_step` as in `layer_rates`."""
        self._drain()
        total = sum(self.sizes)
        steps = self.intervals if per_step else [1] * len(self.intervals)
        return [(step, sum(flips) / total / n) for step, flips, n in zip(self.steps, self.flips, steps, strict=True)]

    def write_csv(self, path) -> None:
        """One row a search: step, interval, flip rate over all, that per step, then the rate of each layer."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "interval", "flip_rate", "flip_rate_per_step", *self.names])
            for (step, rate), interval, flips in zip(self.history(), self.intervals, self.flips, strict=True):
                layers = [n / size for n, size in zip(flips, self.sizes, strict=True)]
                writer.writerow([step, interval, rate, rate / interval, *layers])

    def write_tensorboard(self, writer, prefix: str = "sparse24") -> None:
        """The last search to a `torch.utils.tensorboard.SummaryWriter`, at its step: the rate of each layer as a
        scalar and all of them as a histogram. Nothing before the first search.
        """
        self._drain()
        if not self.steps:
            return
        rates, step = self.layer_rates(), self.steps[-1]
        for name, rate in rates.items():
            writer.add_scalar(f"{prefix}/flip_rate/{name}", rate, step)
        writer.add_histogram(f"{prefix}/flip_rate_of_layers", torch.tensor(list(rates.values())), step)

    def plot(self, path) -> None:
        """The flip rate over the steps, each layer thin and all together bold, as a picture."""
        from matplotlib.figure import Figure

        self._drain()
        axes = (figure := Figure(figsize=(7, 4))).add_subplot()
        for i, size in enumerate(self.sizes):
            axes.plot(self.steps, [flips[i] / size for flips in self.flips], color="tab:blue", alpha=0.2, linewidth=0.8)
        axes.plot(*zip(*self.history(), strict=True) if self.flips else ([], []), color="tab:blue", linewidth=2)
        axes.set(xlabel="optimizer step", ylabel="flip rate per search", title="thin: layers, bold: all")
        axes.set_ylim(bottom=0)
        figure.savefig(path, dpi=120, bbox_inches="tight")

    # -- warnings -------------------------------------------------------------------------------------------------

    def _look(self, step: int, progress: float) -> None:
        if len(self.flips) < MIN_SEARCHES:
            return
        exploding, frozen = [], []
        for i, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            peak = self._peaks[i] / size
            recent = sum(flips[i] for flips in self.flips[-MIN_SEARCHES:]) / (MIN_SEARCHES * size)
            if progress >= EXPLOSION_PROGRESS and recent >= max(EXPLOSION_RATE, EXPLOSION_OF_PEAK * peak):
                exploding.append(name)
            if progress <= FROZEN_PROGRESS and peak < FROZEN_RATE:
                frozen.append(name)
        self._report(
            "explosion", exploding, step, "flip rates stay at their peak: masks do not settle; a larger decay would"
        )
        self._report("frozen", frozen, step, "masks hardly change from the start; a smaller decay would let them move")

    def _report(self, kind: str, layers: list[str], step: int, what: str) -> None:
        if not layers or kind in self._reported:
            return
        self._reported.add(kind)
        shown = ", ".join(layers[:8]) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
        event = {"kind": kind, "step": step, "layers": layers, "message": f"step {step}: {what} ({shown})"}
        warnings.warn(event["message"] + "; see sparse24.tune_decay", Sparse24Warning, stacklevel=2)
        self.note(event)

    def note(self, event: dict) -> None:
        """Keep an event, with the keys kind, step, layers and message, and tell the listeners."""
        self.events.append(event)
        for listener in self.listeners:
            listener(event)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        self._drain()
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "intervals": torch.tensor(self.intervals, dtype=torch.int64),
            "flips": torch.tensor(self.flips, dtype=torch.int64).reshape(len(self.steps), len(self.names)),
            "reported": sorted(self._reported),
        }

    def check_state(self, state: dict) -> None:
        n = len(state["steps"])
        shapes = (state["intervals"].shape, state["flips"].shape)
        if shapes != ((n,), (n, len(self.names))):
            raise Sparse24Error(
                f"the flip history in the state does not fit {len(self.names)} layers; if others were frozen when it "
                "was saved, freeze and unfreeze weights as they were then, and load it after that"
            )

    def load_state_dict(self, state: dict) -> None:
        self._waiting = None
        self.steps, self.intervals = state["steps"].tolist(), state["intervals"].tolist()
        self.flips, self._reported = state["flips"].tolist(), set(state["reported"])
        self._peaks = state["flips"].amax(0).tolist() if self.flips else [0] * len(self.names)


QUANTILES = (0.1, 0.5, 0.9)


def gap_sample(weights: Iterable[Tensor], most: int = 1 << 15, elements: int | None = None) -> Tensor:
    """Gaps between the best and the second-best pattern of 4x4 blocks, about `most` of them; fp32, 1-D.

    weights   2-D, as kernels see them; every so many-th row of blocks is looked at, in each of them
    elements  of all weights together, where `weights` is an iterator, so that they need not be in memory at once
    """
    if elements is None:
        weights = list(weights)
        elements = sum(w.numel() for w in weights)
    stride = max(1, elements // (16 * most))
    gaps = [ops.mask_gap(w.unflatten(0, (-1, 4))[::stride].flatten(0, 1)) for w in weights]
    return torch.cat([gap.flatten() for gap in gaps])


def gap_quantiles(weights: Iterable[Tensor], most: int = 1 << 15, elements: int | None = None) -> dict[str, float]:
    """gap_q10, gap_q50, gap_q90 of `gap_sample`. 2^15 blocks place each to within half a per cent of all blocks."""
    sample = gap_sample(weights, most, elements)
    values = torch.quantile(sample, torch.tensor(QUANTILES, device=sample.device)).tolist()
    return {f"gap_q{round(100 * q)}": value for q, value in zip(QUANTILES, values, strict=True)}
