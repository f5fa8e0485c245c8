"""tune_decay: finding the decay factor by short runs inside the warm-up (arXiv 2404.01847).

For each decay train only to a probe step and compare flip rates: mu = flip rate of the sparse run / flip rate of a
dense run whose masks are only watched. A mu between 0.60 and 0.95 has been found to train well: above it masks
oscillate more than a dense run's would, below it they are held too tightly. No decay suits every model,
hence the grid.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import Sparse24Error
from ..files import write_text_atomically
from ..options import checked_options
from .decay import check_decay
from .tune_arms import Arm, ShortRuns, default_loss

GRID = (0.0, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
PREFERRED_MU = 0.8
# An arm whose mu, at a search past half of its steps, is this far outside the target does not come back into it.
HOPELESS_BELOW, HOPELESS_ABOVE = 0.5, 2.0
DENSE_ARM = "dense"


@dataclass
class TuneResult:
    """What `tune_decay` found.

    decay     the one to use; None where no arm was feasible
    table     the arms, the dense one first
    target    bounds of a feasible mu
    settings  of the arms, as the file at `path` has them
    """

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
            is_chosen = arm.decay is not None and arm.decay == self.decay
            mark = " <- chosen" if is_chosen else " feasible" if arm.feasible else ""
            note = f"  ({arm.note})" if arm.note else ""
            lines.append(f"{name:>9}  {arm.flip_rate:9.5f}  {arm.mu:6.3f}  {arm.loss:8.4f}{mark}{note}")
        if self.decay is None:
            low, high = self.target
            lines.append(f"no decay gives mu in [{low}, {high}]: widen the grid, or take a later probe_step")
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
        write_text_atomically(path, json.dumps(asdict(self), indent=1))


@checked_options()
def tune_decay(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[nn.Module], object],
    batches: Iterable | Callable[[], Iterable],
    grid: Sequence[float] = GRID,
    probe_step: int = 1000,
    target: tuple[float, float] = (0.60, 0.95),
    *,
    loss: Callable[[nn.Module, object], Tensor] | None = None,
    split: Callable[[object], Sequence] | None = None,
    make_scaler: Callable[[], torch.amp.GradScaler] | None = None,
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
                    start, and starts over where it is shorter than `probe_step`. What it draws from torch's CPU
                    generator, to shuffle for instance, is the same in all arms
    grid            decays to try, on top of the dense run
    probe_step      optimizer steps of each arm, inside the warm-up of the real run
    target          bounds of a feasible mu
    loss            (model, batch) -> scalar; default: model(**batch).loss or model(*batch) as the loss itself
    split           batch -> its micro-batches, whose gradients are accumulated; default: the batch itself
    make_scaler     returns a new GradScaler for an arm in float16; steps that it skips are taken on further batches
    clip            largest gradient norm, as in the real run
    seed            torch seed of every arm: weights, data order and noise are the same in all
    sparsify_settings, recipe_settings  passed on, such as backend or mvue
    path            a JSON file: arms found in it are not run again, and each finished arm is written to it
    say             called with one line of text an arm

    Arms that will not come back into `target` are given up past half of their steps. Raises Sparse24Error for an empty
    grid, batches that can be read only once, a probe step before the first few searches, and a dense run whose masks
    never change.
    """
    _check_callables(make_model=make_model, make_optimizer=make_optimizer)
    if isinstance(grid, str) or not isinstance(grid, Iterable):
        raise Sparse24Error(f"grid must be a sequence of decays, such as (0.0, 1e-5, 1e-4), got {grid!r}")
    grid = sorted({check_decay(decay) for decay in grid})
    _check_grid(grid, target, probe_step, mask_interval)
    _check_read_again(batches)
    runs = ShortRuns(
        make_model=make_model, make_optimizer=make_optimizer, batches=batches, loss=loss or default_loss,
        split=split or (lambda batch: (batch,)),
        make_scaler=make_scaler or (lambda: torch.amp.GradScaler("cpu", enabled=False)), probe_step=probe_step,
        mask_interval=mask_interval, clip=clip, seed=seed, sparsify_settings=sparsify_settings or {},
        recipe_settings=recipe_settings or {},
    )  # fmt: skip
    settings = {
        "probe_step": probe_step, "mask_interval": mask_interval, "clip": clip, "seed": seed,
        "sparsify": repr(sparsify_settings or {}), "recipe": repr(recipe_settings or {}),
    }  # fmt: skip
    arms = _read(path, settings)

    def run(decay: float | None, hopeless: Callable[[int, float], str]) -> Arm:
        key = DENSE_ARM if decay is None else repr(decay)
        if key not in arms:
            arms[key] = runs.train(decay, hopeless)
            _write(path, settings, arms)
        return arms[key]

    table = _compare_arms(run, grid, target, say or (lambda line: None))
    feasible = [arm for arm in table[1:] if arm.feasible]
    best = min(feasible, key=lambda arm: abs(arm.mu - PREFERRED_MU), default=None)
    return TuneResult(best.decay if best else None, table, tuple(target), settings)


def _check_callables(**functions) -> None:
    for name, function in functions.items():
        if not callable(function) or isinstance(function, nn.Module):
            raise Sparse24Error(
                f"{name} must be a function, since each arm wants a new model and optimizer, got "
                f"{type(function).__name__}; give lambda: ..., or a function that makes one"
            )


def _check_grid(grid: list[float], target: tuple[float, float], probe_step: int, mask_interval: int) -> None:
    low, high = target
    if not grid:
        raise Sparse24Error("grid must hold at least one decay")
    if not 0 <= low < high:
        raise Sparse24Error(f"target must be two rising bounds of mu, got {target!r}")
    if probe_step < 2 * mask_interval:
        raise Sparse24Error(
            f"probe_step must be at least two searches (2 x mask_interval = {2 * mask_interval}), got {probe_step}"
        )


def _check_read_again(batches) -> None:
    if not callable(batches) and iter(batches) is batches:
        raise Sparse24Error(
            "batches is an iterator, which only the first arm could read; give a list, a DataLoader, or a function "
            "that returns a new iterator"
        )


def _compare_arms(run: Callable, grid: list[float], target: tuple[float, float], say: Callable) -> list[Arm]:
    """The dense arm and one for each decay, with their mu; `run(decay, hopeless)` trains one, or finds it on disk."""
    low, high = target
    dense = run(None, lambda step, rate: "")
    if dense.flip_rate == 0:
        raise Sparse24Error(
            "the masks of the dense run never change up to probe_step: choose a later one, or check the optimizer"
        )
    dense.mu = 1.0
    say(f"dense: flip rate {dense.flip_rate:.5f}")
    table = [dense]

    def hopeless(step: int, rate: float) -> str:
        """Why an arm with this flip rate at this step is to be given up, or "". In warm-up rates rise: compare with the
        dense run at the same step.
        """
        dense_rate = dense.rate_at(step)
        if rate < HOPELESS_BELOW * low * dense_rate:
            return "masks are held too tightly"
        return "masks move too much" if rate > HOPELESS_ABOVE * high * dense_rate else ""

    for decay in grid:
        arm = run(decay, hopeless)
        arm.mu = arm.flip_rate / (dense.rate_at(arm.steps) or dense.flip_rate)
        arm.feasible = not arm.note and low <= arm.mu <= high
        table.append(arm)
        verdict = " feasible" if arm.feasible else f" {arm.note}" if arm.note else ""
        say(f"decay {decay:.1e}: mu {arm.mu:.3f}{verdict}")
    return table


def _read(path, settings: dict) -> dict[str, Arm]:
    if path is None or not Path(path).exists():
        return {}
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        if saved["settings"] != settings:
            raise Sparse24Error(f"{path} holds arms of other settings ({saved['settings']}); choose another path")
        arms = {key: Arm(**arm) for key, arm in saved["arms"].items()}
        for arm in arms.values():
            arm.history = [tuple(point) for point in arm.history]  # JSON has lists only
        return arms
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise Sparse24Error(f"{path} is not a file of tune_decay ({error}); move it away") from error


def _write(path, settings: dict, arms: dict[str, Arm]) -> None:
    if path is not None:
        text = json.dumps({"settings": settings, "arms": {key: asdict(arm) for key, arm in arms.items()}}, indent=1)
        write_text_atomically(path, text)
