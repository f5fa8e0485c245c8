"""tune_decay: finding the decay factor by short probes inside the warm-up (arXiv 2404.01847).

For each decay train only to a probe step and compare flip rates: mu = flip rate of the sparse run / flip rate of a
dense run whose masks are only watched. A mu between 0.60 and 0.95 has been found to train well: above it masks
oscillate more than a dense run's would, below it they are held too tightly. No decay suits every model, hence the
probe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn

from .convert import sparse_layers, sparsify
from .errors import Sparse24Error
from .files import write_atomically
from .phases import check_decay
from .recipe import Recipe

GRID = (0.0, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PREFERRED_MU = 0.8
# The flip rate at the probe step is the mean over this many refreshes before it: one refresh is noisy.
WINDOW = 3
# An arm whose rate is this far below the lower bound, halfway, does not come back: larger decays only lower it further.
HOPELESS = 0.5
DENSE_ARM = "dense"


@dataclass
class Arm:
    """One probe: decay (None: the dense run), flip rate per refresh near the probe step, mu, the last loss, the
    steps taken.
    """

    decay: float | None
    flip_rate: float
    mu: float
    loss: float
    steps: int
    feasible: bool = False
    note: str = ""


@dataclass
class TuneResult:
    """decay (None when no arm was feasible), and the arms in `table`, the dense one first."""

    decay: float | None
    table: list[Arm]
    target: tuple[float, float]
    settings: dict = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.decay is not None

    def __str__(self) -> str:
        lines = [f"{'decay':>9}  {'flip rate':>9}  {'mu':>6}  {'loss':>8}"]
        for arm in self.table:
            name = DENSE_ARM if arm.decay is None else f"{arm.decay:.1e}"
            mark = (
                " <- chosen"
                if arm.decay == self.decay and arm.decay is not None
                else " feasible"
                if arm.feasible
                else ""
            )
            note = f"  ({arm.note})" if arm.note else ""
            lines.append(f"{name:>9}  {arm.flip_rate:9.5f}  {arm.mu:6.3f}  {arm.loss:8.4f}{mark}{note}")
        if self.decay is None:
            low, high = self.target
            lines.append(f"no decay gives mu in [{low}, {high}]: widen the grid, or probe later in the warm-up")
        return "\n".join(lines)

    def plot(self, path) -> None:
        """mu against decay with the feasible band, as a picture."""
        from matplotlib.figure import Figure

        arms = [arm for arm in self.table if arm.decay is not None]
        axes = (figure := Figure(figsize=(6, 4))).add_subplot()
        axes.axhspan(*self.target, color="tab:green", alpha=0.15, label="feasible")
        axes.plot([arm.decay for arm in arms], [arm.mu for arm in arms], "o-")
        if self.decay is not None:
            axes.axvline(self.decay, color="tab:green", linestyle="--", label=f"chosen: {self.decay:.1e}")
        smallest = min((arm.decay for arm in arms if arm.decay > 0), default=1e-6)
        axes.set_xscale("symlog", linthresh=smallest)
        axes.set(xlabel="decay", ylabel="mu = flip rate / dense flip rate")
        axes.legend()
        figure.savefig(path, dpi=120, bbox_inches="tight")

    def save(self, path) -> None:
        """All of it as JSON, whole or not at all."""
        write_atomically(path, lambda p: p.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8"))


def tune_decay(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], object],
    batches: Iterable | Callable[[], Iterable],
    grid: Sequence[float] = GRID,
    probe_step: int = 1000,
    target: tuple[float, float] = (0.60, 0.95),
    *,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
    mask_interval: int = 40,
    clip: float | None = None,
    seed: int = 0,
    sparsify_settings: dict | None = None,
    recipe_settings: dict | None = None,
    path=None,
    say: Callable[[str], None] | None = None,
) -> TuneResult:
    """Choose the decay factor: the one whose mu lies nearest 0.8 inside `target`.

    make_model      returns a new dense model on its device; called once an arm, under the same torch seed
    make_optimizer  model -> optimizer, or (optimizer, scheduler); give the schedule of the real run, warm-up included
    batches         an iterable that can be read again, or a function that returns one: each arm reads it from the
                    start, and starts over where it is shorter than `probe_step`
    grid            decays to try, on top of the dense run
    probe_step      optimizer steps of each arm, inside the warm-up of the real run
    target          bounds of a feasible mu
    loss            (model, batch) -> scalar; default: model(**batch).loss or model(*batch) as the loss itself
    clip            largest gradient norm, as in the real run
    seed            torch seed of every arm: weights, data order and noise are the same in all
    sparsify_settings, recipe_settings  passed on, such as backend or mvue
    path            a JSON file: arms found in it are not run again, and each finished arm is written to it
    say             called with one line of text an arm

    Arms that will not come back into `target` are stopped halfway. Raises Sparse24Error for an empty grid, a probe step
    before the first few refreshes, and a dense run whose masks never change.
    """
    grid = sorted({check_decay(decay) for decay in grid})
    low, high = target
    if not grid:
        raise Sparse24Error("grid must hold at least one decay")
    if not 0 <= low < high:
        raise Sparse24Error(f"target must be two rising bounds of mu, got {target!r}")
    if probe_step < 2 * mask_interval:
        raise Sparse24Error(
            f"probe_step must be at least two refreshes (2 x mask_interval = {2 * mask_interval}), got {probe_step}"
        )
    say = say or (lambda line: None)
    probe = _Probe(
        make_model, make_optimizer, batches, loss or _default_loss, probe_step, mask_interval, clip, seed,
        sparsify_settings or {}, recipe_settings or {},
    )  # fmt: skip
    settings = {"probe_step": probe_step, "mask_interval": mask_interval, "clip": clip, "seed": seed}
    arms = _read(path, settings)

    def run(decay: float | None, floor: float) -> Arm:
        key = DENSE_ARM if decay is None else repr(decay)
        if key not in arms:
            arms[key] = probe.run(decay, floor)
            _write(path, settings, arms)
        return arms[key]

    dense = run(None, 0.0)
    if dense.flip_rate == 0:
        raise Sparse24Error(
            "the masks of the dense run never change up to probe_step: probe later, or check the optimizer"
        )
    dense.mu = 1.0
    say(f"dense: flip rate {dense.flip_rate:.5f}")
    table = [dense]
    for decay in grid:
        arm = run(decay, HOPELESS * low * dense.flip_rate)
        arm.mu = arm.flip_rate / dense.flip_rate
        arm.feasible = not arm.note and low <= arm.mu <= high
        table.append(arm)
        verdict = " feasible" if arm.feasible else f" {arm.note}" if arm.note else ""
        say(f"decay {decay:.1e}: mu {arm.mu:.3f}{verdict}")
    feasible = [arm for arm in table[1:] if arm.feasible]
    best = min(feasible, key=lambda arm: abs(arm.mu - PREFERRED_MU), default=None)
    return TuneResult(best.decay if best else None, table, (low, high), settings)


@dataclass
class _Probe:
    make_model: Callable
    make_optimizer: Callable
    batches: Iterable | Callable
    loss: Callable
    probe_step: int
    mask_interval: int
    clip: float | None
    seed: int
    sparsify_settings: dict
    recipe_settings: dict

    def run(self, decay: float | None, floor: float) -> Arm:
        """Train one arm to the probe step; `floor`: the flip rate below which it is given up halfway."""
        torch.manual_seed(self.seed)
        model = self.make_model()
        if not sparse_layers(model):
            sparsify(model, **self.sparsify_settings)
        made = self.make_optimizer(model)
        optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
        method = {"method": "dense"} if decay is None else {"decay": decay}
        recipe = Recipe(
            model,
            optimizer,
            self.probe_step,
            mask_interval=self.mask_interval,
            dense_fraction=0.0,
            **{**self.recipe_settings, **method},
        )
        torch.manual_seed(self.seed + 1)
        source = self.batches() if callable(self.batches) else self.batches
        value, note = math.nan, ""
        for step, batch in zip(range(1, self.probe_step + 1), _again(source), strict=False):
            loss = self.loss(model, batch)
            loss.backward()
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if scheduler is not None:
                scheduler.step()
            if step % self.mask_interval == 0 or step == self.probe_step:
                value = loss.item()
                if not math.isfinite(value):
                    note = f"stopped at step {step}: the loss is {value}"
                elif 2 * step >= self.probe_step and len(recipe.monitor.history()) >= WINDOW:
                    if step < self.probe_step and _recent(recipe) < floor:
                        note = f"stopped at step {step}: masks are held too tightly"
                if note:
                    break
        if recipe.step < self.probe_step and not note:
            raise Sparse24Error(f"batches are empty, or the optimizer counted {recipe.step} of {self.probe_step} steps")
        recipe.detach()
        return Arm(decay, _recent(recipe), math.nan, value, recipe.step, note=note)


def _recent(recipe: Recipe) -> float:
    rates = [rate for _, rate in recipe.monitor.history()[-WINDOW:]]
    return sum(rates) / max(1, len(rates))


def _again(source: Iterable):
    """`source` over and over; an iterator that cannot start again is remembered batch by batch."""
    return cycle(source) if iter(source) is source else _restart(source)


def _restart(source: Iterable):
    while True:
        empty = True
        for batch in source:
            empty = False
            yield batch
        if empty:
            return


def _default_loss(model: nn.Module, batch) -> Tensor:
    if isinstance(batch, dict):
        out = model(**batch)
    elif isinstance(batch, (tuple, list)):
        out = model(*batch)
    else:
        out = model(batch)
    loss = out if isinstance(out, Tensor) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise Sparse24Error("the model does not return a scalar loss; give tune_decay loss=lambda model, batch: ...")
    return loss


def _read(path, settings: dict) -> dict[str, Arm]:
    if path is None or not Path(path).exists():
        return {}
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if saved["settings"] != settings:
            raise Sparse24Error(f"{path} holds arms of other settings ({saved['settings']}); choose another path")
        return {key: Arm(**arm) for key, arm in saved["arms"].items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Sparse24Error(f"{path} is not a file of tune_decay ({error}); move it away") from error


def _write(path, settings: dict, arms: dict[str, Arm]) -> None:
    if path is not None:
        text = json.dumps({"settings": settings, "arms": {key: asdict(arm) for key, arm in arms.items()}}, indent=1)
        write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))
