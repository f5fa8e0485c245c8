"""The short runs that `tune_decay` compares: one model, one optimizer, one decay, up to the probe step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..convert import sparse_layers, sparsify
from ..errors import Sparse24Error
from .recipe import Recipe

# The flip rate at the probe step is the mean over this many searches before it: one search is noisy.
WINDOW = 3
# GradScaler finds its scale in a few dozen steps; more skipped ones than this mean gradients that are never finite.
MOST_SKIPPED = 100


@dataclass
class Arm:
    """One short run.

    decay      None: the dense run
    flip_rate  per search, the mean over the last few before the probe step
    mu         flip_rate over that of the dense run at the same steps
    loss       at the last step
    steps      taken; fewer than asked for when the arm was given up, and `note` says why
    history    (step, flip rate) of each search
    """

    decay: float | None
    flip_rate: float
    mu: float
    loss: float
    steps: int
    feasible: bool = False
    note: str = ""
    history: list[tuple[int, float]] = field(default_factory=list)

    def rate_at(self, step: int) -> float:
        """Mean flip rate of the last searches up to `step`; 0 before the first."""
        return _last_rate([(at, rate) for at, rate in self.history if at <= step])


@dataclass
class ShortRuns:
    """How arms are trained; the fields are the arguments of `tune_decay`."""

    make_model: Callable
    make_optimizer: Callable
    batches: Iterable | Callable
    loss: Callable
    split: Callable
    make_scaler: Callable
    probe_step: int
    mask_interval: int
    clip: float | None
    seed: int
    sparsify_settings: dict
    recipe_settings: dict

    def train(self, decay: float | None, hopeless: Callable[[int, float], str]) -> Arm:
        """Train one arm to the probe step, or until its loss is not finite or it is `hopeless`."""
        torch.manual_seed(self.seed)
        model = self.make_model()
        if not sparse_layers(model):
            sparsify(model, **self.sparsify_settings)
        made = self.make_optimizer(model)
        optimizer, scheduler = made if isinstance(made, tuple) else (made, None)
        recipe = self._recipe(model, optimizer, decay)
        scaler = self.make_scaler()
        torch.manual_seed(self.seed + 1)
        loss, note, skipped = math.nan, "", 0
        for batch in _with_own_generator(_over_and_over(self.batches), self.seed + 2):
            before = recipe.step
            on_device = self._step(model, optimizer, scaler, batch)
            if scheduler is not None:
                scheduler.step()
            if recipe.step == before:  # the scaler has skipped the step
                skipped += 1
                if skipped > MOST_SKIPPED:
                    break
                continue
            if recipe.step % self.mask_interval == 0 or recipe.step == self.probe_step:
                loss = on_device.item()  # waits for the device, so not in each step
                note = self._why_stop(recipe, loss, hopeless)
            if note or recipe.step == self.probe_step:
                break
        if recipe.step < self.probe_step and not note:
            raise Sparse24Error(
                f"the optimizer counted {recipe.step} of {self.probe_step} steps: batches are empty, or loss scaling "
                "skips every step"
            )
        recipe.detach()
        history = recipe.monitor.history()
        return Arm(decay, _last_rate(history), math.nan, loss, recipe.step, note=note, history=history)

    def _recipe(self, model: nn.Module, optimizer, decay: float | None) -> Recipe:
        method = {"method": "dense", "decay_in": "step"} if decay is None else {"decay": decay}
        return Recipe(
            model,
            optimizer,
            self.probe_step,
            mask_interval=self.mask_interval,
            dense_fraction=0.0,
            **{**self.recipe_settings, **method},
        )

    def _why_stop(self, recipe: Recipe, loss: float, hopeless: Callable[[int, float], str]) -> str:
        """Why the arm ends before the probe step, or ""."""
        why, history = "", recipe.monitor.history()
        if not math.isfinite(loss):
            why = f"the loss is {loss}"
        elif 2 * recipe.step >= self.probe_step > recipe.step and len(history) >= WINDOW:
            why = hopeless(recipe.step, _last_rate(history))
        return f"stopped at step {recipe.step}: {why}" if why else ""

    def _step(self, model: nn.Module, optimizer, scaler: torch.amp.GradScaler, batch) -> Tensor:
        """One optimizer step on a batch; its mean loss, on the device."""
        parts, total = list(self.split(batch)), 0.0
        for part in parts:
            loss = self.loss(model, part) / len(parts)
            scaler.scale(loss).backward()
            total = total + loss.detach()
        if self.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total


def _last_rate(history: Sequence[tuple[int, float]]) -> float:
    """The mean flip rate of the last few of these searches; 0 where there is none."""
    rates = [rate for _, rate in history[-WINDOW:]]
    return sum(rates) / max(1, len(rates))


def _over_and_over(batches: Iterable | Callable[[], Iterable]) -> Iterator:
    while True:
        empty = True
        for batch in batches() if callable(batches) else batches:
            empty = False
            yield batch
        if empty:
            return


def _with_own_generator(source: Iterator, seed: int) -> Iterator:
    """`source` with a torch CPU generator of its own, so that what a model draws does not change the data."""
    own = torch.Generator().manual_seed(seed).get_state()
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(own)
        try:
            batch = next(source)
        except StopIteration:
            return
        finally:
            own = torch.get_rng_state()
            torch.set_rng_state(outside)
        yield batch


def default_loss(model: nn.Module, batch) -> Tensor:
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
