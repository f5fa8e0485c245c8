"""What users read of a recipe: where it is, its metrics, and what it writes for TensorBoard and pictures."""

from __future__ import annotations

from collections.abc import Callable

from ..layers import DENSE
from ..layers.watch import copies
from . import monitor
from .block_flips import BlockFlips
from .decay import MaskedDecay
from .phases import Phases
from .search import MaskSearch
from .state import check_layers
from .steps import Steps


class Readings:
    """The part of `Recipe` that changes nothing. A mixin: the fields are those of the recipe."""

    layers: dict
    _steps: Steps
    _search: MaskSearch
    _decay: MaskedDecay

    @property
    def step(self) -> int:
        """Optimizer steps taken, a number. There is nothing to call: `optimizer.step()` runs the recipe."""
        return self._steps.taken

    @property
    def phases(self) -> Phases:
        """Which steps are sparse and which dense."""
        return self._steps.phases

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; fixed when the recipe is made."""
        return self._steps.phases.total_steps

    @property
    def phase(self) -> str:
        """ "sparse" or "dense": the phase of the next step."""
        return self._steps.phase

    @property
    def current_decay(self) -> float:
        """The decay factor of the next step, after its schedule."""
        return self._steps.current_decay

    @property
    def decay_in(self) -> str:
        return self._decay.decay_in

    @property
    def decay_schedule(self) -> str:
        return self._decay.schedule

    @property
    def micro_batches(self) -> int:
        return self._decay.micro_batches

    @property
    def mask_interval(self) -> int:
        return self._search.interval

    @property
    def last_search(self) -> int:
        """Optimizer steps taken when the masks were searched last."""
        return self._search.last

    @property
    def masks_frozen(self) -> bool:
        return self._search.frozen

    @property
    def monitor(self) -> monitor.FlipMonitor:
        """The flip rates: for CSV, TensorBoard and pictures."""
        return self._search.monitor

    @property
    def block_flips(self) -> BlockFlips | None:
        """The flips of each 4x4 block, of a recipe made with track_blocks=True; else None."""
        return self._search.block_flips

    @property
    def events(self) -> list[dict]:
        """What was noticed: exploding and frozen masks, changes by mvue="auto"; with the names of the layers."""
        return self.monitor.events

    def on_event(self, listener: Callable[[dict], None]) -> None:
        """Call `listener(event)` on each; it may set `recipe.decay`, which nothing else ever changes."""
        self.monitor.listeners.append(listener)

    def metrics(self) -> dict[str, float]:
        """Floats for a log. Reading the flip rate and the gaps waits for the device, so call it when you log.

        flip_rate, flip_rate_per_step  part of the weights whose mask changed at the last search; the same, divided by
                   the steps since the search before
        decay      the factor that the next step uses       phase     0 sparse, 1 dense
        mask_age   steps since the masks were searched      step      optimizer steps taken
        gap_q10, gap_q50, gap_q90  quantiles, over 4x4 blocks, of the magnitude that the best pattern keeps more than
                   the second best
        and of 8-bit layers, in the last step:
        casts_clipped    part of the casts in which a value did not fit the scale, which is that of the step before
        values_clipped, values_flushed  with count_casts: part of the values that did not fit, and that became zero
        """
        check_layers(self.layers)
        return {
            "flip_rate": self.monitor.rate(),
            "flip_rate_per_step": self.monitor.rate_per_step(),
            "decay": float(self.current_decay),
            "phase": float(self.phase == DENSE),
            "mask_age": float(self.step - self.last_search),
            "step": float(self.step),
            **self._search.gap_quantiles(),
            **self._steps.scales.metrics(),
        }

    def fingerprint(self) -> str:
        """Phase and masks as a short text, to store with weights and to compare when they are loaded."""
        check_layers(self.layers)
        return copies.fingerprint_of_layers(self.layers.values())

    def write_tensorboard(self, writer, prefix: str = "sparse24") -> None:
        """All of `metrics()` to a `torch.utils.tensorboard.SummaryWriter`, at the current step; the flip rate of each
        layer, and histograms of these and of the gaps of 4x4 blocks.
        """
        for name, value in self.metrics().items():
            if name != "step":
                writer.add_scalar(f"{prefix}/{name}", value, self.step)
        self.monitor.write_tensorboard(writer, prefix)
        writer.add_histogram(f"{prefix}/gap", self._search.gaps_by(monitor.gap_sample).cpu(), self.step)

    def plot_flips_against_gap(self, path) -> None:
        """A picture of which blocks flip; needs track_blocks=True. Raises Sparse24Error before the first search."""
        self._search.plot_blocks(path)
