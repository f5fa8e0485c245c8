"""From a recipe's settings to its parts: phases, search, decay and the count of steps."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..layers import SparseLayer, distributed_rank
from ..layers.watch.unseen import look_again, look_until_packed
from .decay import MaskedDecay, orthogonalizes
from .methods import METHODS, FrozenSecondMoment, Method, check_mvue
from .noise import NoiseWatch
from .phases import Phases
from .presets import Preset
from .scaling import CastScales
from .search import MaskSearch
from .steps import Steps
from .unfrozen import Unfrozen


def assemble(
    layers: dict[str, SparseLayer],
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    settings: Preset,
    scales: CastScales,
    sharded: list[nn.Module],
    *,
    decay_in: str,
    micro_batches: int,
    track_blocks: bool,
    check_every: int,
) -> Steps:
    """The steps of a recipe, with its search and decay; nothing of the layers, those that are trained, changes yet."""
    method = METHODS[settings.method]
    check_mvue(settings.mvue, method)
    if method.freezes_second_moment:
        FrozenSecondMoment.check(optimizer, [layer.weight for layer in layers.values()])
    beside_the_update = orthogonalizes(optimizer) and method.decay_on is not None
    decay = MaskedDecay(
        layers,
        method,
        settings.decay,
        on="weight" if beside_the_update else method.decay_on,
        schedule=settings.decay_schedule,
        decay_in=decay_in,
        micro_batches=micro_batches,
    )
    search = MaskSearch(
        {} if method.gradients_only else layers,
        settings.mask_interval,
        applied=not method.watches,
        sharded=sharded,
        track_blocks=track_blocks,
    )
    return Steps(
        layers,
        optimizer,
        method,
        _phases(total_steps, settings, method, frozen=not layers),
        search,
        decay,
        scales,
        sharded=sharded,
        check_every=check_every,
    )


def reads_whole_weights(method: str, decay_in: str) -> str:
    """What of the settings makes a rank of FSDP2 read whole weights, so that packed rows are not enough; "" if none."""
    if decay_in == "backward":
        return "decay_in='backward' reads whole weights"
    return "method='s-ste' multiplies with soft-thresholded weights" if METHODS[method].soft else ""


def begin(steps: Steps, settings: Preset, layers: dict[str, SparseLayer]) -> None:
    """Set the trained ones of `layers` up for this training, and search their masks."""
    mvue = True if settings.mvue in ("output", "auto") else settings.mvue
    rank, method = distributed_rank(), steps.method
    # A recipe that is over is copied and pickled by trainers, so no function of this scope.
    begin_one = partial(SparseLayer.train_as, mvue=mvue, rank=rank, soft=method.soft, dense_mvue=method.gradients_only)
    for layer in steps.layers.values():
        begin_one(layer)
    if len(steps.layers) < len(layers):
        plan = _phases(steps.phases.total_steps, settings, method, frozen=False)
        steps.unfrozen = Unfrozen(layers, steps.layers, begin_one, plan)
    if settings.mvue == "auto":
        of_16_bits = {name: layer for name, layer in steps.layers.items() if name not in steps.scales.layers}
        steps.noise = NoiseWatch(of_16_bits, steps.search.interval)
    steps.go_to(0, search=True)
    for layer in steps.layers.values():
        look_again(layer)  # weights may be initialised anew before the first pass
        look_until_packed(layer)


def _phases(total_steps: int, settings: Preset, method: Method, *, frozen: bool) -> Phases:
    place = method.dense_at if settings.dense_at == "auto" else settings.dense_at
    plan = Phases.plan(total_steps, settings.dense_fraction, place)
    # What adapters are trained over is what they will run over.
    return Phases.plan(total_steps, 0.0, "none") if frozen else plan
