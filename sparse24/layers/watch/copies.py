"""Under whose masks and phase a sparse layer runs, when its weights come from elsewhere.

Masks and phase belong to training and are no parameters, so weights can arrive without them. Two cases are watched:

Copies. An average over a model's weights (EMA, SWA) must run under the masks and the phase that this model has *now*;
a snapshot must keep those that it was taken with. What tells them apart is whether somebody has written the copy's
weights since: a written copy takes the present masks and phase of the layer that it was copied from, an untouched one
stays as it is.

Arrivals. A state_dict carries a fingerprint of phase and mask for each layer, in the metadata that modules have for
their versions. Where weights were saved under another phase or other masks than the layer has, the next forward pass
warns. Loading itself does not, because masks may be loaded after weights.

Both cost a forward pass one test for None, and compiled code a guard; where there is something to look at, its graph
breaks there.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import Sparse24Error, Sparse24Warning
from .. import float8, packing
from ..forward import has_substituted_weight
from ..parallel.tensor_parallel import whole_mask
from ..state import DENSE, HOLDER, MASK, SPARSE, division_of, mask_of, state_of
from .trained_copies import watch_optimizers

#: the key of a layer's fingerprint in the metadata of a state_dict
METADATA_KEY = "sparse24"

#: what torch.compile says under fullgraph=True, and torch.export
WHY_UNCOMPILED = (
    "this sparse layer is a copy of another, whose masks and phase it may have to take, or has weights that were saved "
    "under other masks. Run it once eagerly or without fullgraph=True; sparse24.follow(copy, like=model, once=True) "
    "gives a copy the present masks, and it follows nobody from then on"
)


@dataclass
class Last:
    """What a layer had when it went."""

    phase: str
    mask: Tensor
    soft_scale: Tensor | None
    moment: tuple[int, int]


class Origin:
    """The layer that another was copied from. Copies share it as it is; pickles, for other processes, forget it.

    last  once the layer is gone: what it had then, for copies that have not run since
    """

    def __init__(self, layer=None):
        self._layer = self.last = None
        if layer is not None:
            this, state, buffers = weakref.ref(self), state_of(layer), layer._buffers
            self._layer = weakref.ref(layer, lambda _: this() and this()._keep_last(state, buffers.get(MASK)))

    def __call__(self):
        layer = None if self._layer is None else self._layer()
        return layer if layer is not None and HOLDER in layer.__dict__ else None  # dense again: nobody to follow

    def _keep_last(self, state, mask: Tensor | None) -> None:
        if mask is not None:
            self.last = Last(state.phase, mask, state.soft_scale, (state.generation, state.packs))

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Origin, ()


@dataclass
class Arrival:
    """Weights that a state_dict has brought, saved by a layer with another fingerprint."""

    name: str  # of the layer in the state_dict
    saved: str
    call: object  # the same for all layers of one load_state_dict


@dataclass
class Watch:
    """What a layer has to look at before its next forward pass."""

    origin: Origin | None = None
    seen: tuple[int, int] = (0, 0)  # the origin's generation and packs when the copy looked last
    is_average: bool | None = None  # whether the copy's weights are written; None: not known yet
    arrival: Arrival | None = None


def origin_for_copies(layer) -> Origin:
    """What a copy of `layer` follows: the layer itself, but for a copy of a copy the one that is trained."""
    return Origin(layer) if _followed(layer) is None else state_of(layer).watch.origin


def watch_origin(layer) -> None:
    """Called for a new copy, once it is packed."""
    state = state_of(layer)
    origin, state.copied_from = state.copied_from, None
    followed = None if origin is None else origin()
    if followed is None:
        state.watch = None
    elif _shares_weight(layer, followed):
        state.watch = Watch(origin, _moment(followed), is_average=True)
    else:
        state.watch = Watch(origin, _moment(followed))
        watch_optimizers(layer)


def look(layer, *, forward: bool = True) -> None:
    """Look at what the layer's watch names, before a forward pass or when somebody says that weights were written."""
    watch = state_of(layer).watch
    if watch.origin is not None:
        _look_at_origin(layer, forward)
    if forward and watch.arrival is not None:
        _warn_of_arrival(layer, watch)
    if watch.origin is None and watch.arrival is None:
        state_of(layer).watch = None


def follow_now(layer) -> None:
    """Before somebody reads a copy's masks or phase, to save or copy them: be what the next forward pass would be."""
    watch = state_of(layer).watch
    if watch is not None and watch.origin is not None:
        _look_at_origin(layer, forward=True)


def refuse_unknown(layer) -> None:
    """In an export, which cannot look: a copy that has not run since the layer that it may follow moved on."""
    watch = state_of(layer).watch
    origin = None if watch.origin is None else watch.origin()
    if origin is not None and watch.is_average is not False and _moment(origin) != watch.seen:
        raise Sparse24Error(WHY_UNCOMPILED)


def note_written(layer) -> None:
    """Weights have been put into a layer: a copy then runs under the masks of the layer that it follows."""
    if _followed(layer) is not None:
        watch = state_of(layer).watch
        watch.is_average, watch.seen = True, (-1, -1)


def settle(layer, like=None) -> None:
    """Masks have been given to a layer by hand: a copy of `like` follows it when weights are written again, and any
    other follows nobody any more.
    """
    followed = _followed(layer)
    if followed is None:
        return
    watch = state_of(layer).watch
    if followed is like:
        watch.seen, watch.is_average = _moment(followed), None
    else:
        watch.origin = None
        if watch.arrival is None:
            state_of(layer).watch = None


def is_copy(layer) -> bool:
    """Whether the layer that this one was copied from is still there to be followed."""
    return _followed(layer) is not None


def _followed(layer):
    """The layer that this one is a copy of, as far as it is still there."""
    watch = state_of(layer).watch
    return None if watch is None or watch.origin is None else watch.origin()


def _shares_weight(layer, origin) -> bool:
    """Whether a copy is a shallow one (`copy.copy`): what trains the layer that it was copied from trains it too."""
    return origin is not None and layer._parameters.get("weight") is origin._parameters.get("weight")


def _moment(origin) -> tuple[int, int]:
    return state_of(origin).generation, state_of(origin).packs


def _look_at_origin(layer, forward: bool) -> None:
    # In 8 bits gate and up have one scale, and packing one packs the other: both decide before either does.
    together = [one for one in (layer, float8.scale_partner(layer)) if one is not None]
    with _own_weights(together):
        for one, last in [(one, _state_to_take(one, forward)) for one in together]:
            if last is not None:
                one.take_state(last.phase, last.mask, last.soft_scale)


def _state_to_take(layer, forward: bool) -> Last | None:
    """What the layer is to run under from here on, as the layer that it follows has moved on; None: as it is."""
    watch = state_of(layer).watch
    if watch is None or watch.origin is None:
        return None
    origin = watch.origin()
    last = watch.origin.last if origin is None else _last_of(origin)
    if last is None:
        watch.origin = None
        return None
    if has_substituted_weight(layer):
        return None  # computed from others, and packed for each call
    written = layer.weight_has_changed()
    if written and forward and layer.weight.grad is not None and not _shares_weight(layer, origin):
        watch.origin = None  # trained by itself: a model of its own from here on. Averages have no gradients
        return None
    moved = last.moment != watch.seen or written
    if moved:
        searched = last.moment[0] != watch.seen[0]
        if not written and not watch.is_average and (searched or watch.is_average is None):
            # Writes through `.data` show in no version: compare what is packed with the weight, once a mask search.
            watch.is_average = not layer.is_packed()
        watch.is_average = watch.is_average or written
        watch.seen = last.moment
    if origin is None:
        watch.origin = None
    return last if moved and watch.is_average else None


@contextlib.contextmanager
def _own_weights(layers: list) -> Iterator[None]:
    """Layers have their own weights in place of those that are lent to them for a call: what an average runs under is
    decided by whether its own were written.
    """
    lent = [layer for layer in layers if has_substituted_weight(layer) and not layer.weight_is_computed()]
    lent = [(layer._parameters, layer._parameters["weight"], state_of(layer).packed_weight) for layer in lent]
    for parameters, _, own in lent:
        parameters["weight"] = own
    try:
        yield
    finally:
        for parameters, weight, _ in lent:
            parameters["weight"] = weight


def _last_of(origin) -> Last:
    state = state_of(origin)
    return Last(state.phase, mask_of(origin), state.soft_scale, _moment(origin))


def _take_state_of(layer, origin) -> None:
    last = _last_of(origin)
    layer.take_state(last.phase, last.mask, last.soft_scale)


# -- fingerprints -----------------------------------------------------------------------------------------------------


def checksum(mask: Tensor) -> Tensor:
    """64 bits that depend on every byte and its place."""
    bits = packing.mask_bits(mask).to(torch.int64).flatten()
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return ((bits + 1) * (places * -7046029254386353131 ^ (places >> 7))).sum()


def fingerprint(phase: str, masks: list[Tensor], scales: list[Tensor] = ()) -> str:
    """The phase, "-" and 16 hexadecimal digits over masks and S-STE's scales, in their order."""
    parts = torch.stack([checksum(mask) for mask in masks]).tolist() if masks else []
    parts += [float(scale) for scale in scales]
    return f"{phase}-{hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()}"


def fingerprint_of(layer) -> str | None:
    """Of one layer, kept until its mask, scale or phase changes; None where there is nothing to read."""
    state, mask = state_of(layer), mask_of(layer)
    if state.fingerprint is None or state.fingerprint[0] != state.generation:
        if mask is None or mask.is_meta or type(mask) is not Tensor:
            return None
        scales = [] if state.soft_scale is None else [state.soft_scale]
        state.fingerprint = (state.generation, fingerprint(state.phase, [mask], scales))
    return state.fingerprint[1]


def fingerprint_of_layers(layers: Iterable) -> str:
    """Of all layers of a model. Layers in different phases count as sparse. Collective under tensor parallel."""
    layers = list(layers)
    states = [state_of(layer) for layer in layers]
    phase = DENSE if all(state.phase == DENSE for state in states) else SPARSE
    scales = [state.soft_scale for state in states if state.soft_scale is not None]
    return fingerprint(phase, [whole_mask(layer) for layer in layers], scales)


def same_function(one: str, other: str) -> bool:
    """Whether two fingerprints stand for one function of the weights. In the dense phase masks do not matter."""
    dense = one.startswith("dense-") and other.startswith("dense-")
    return one == other or dense


# -- arrivals ---------------------------------------------------------------------------------------------------------


_arrived: weakref.WeakSet = weakref.WeakSet()


def note_arrival(layer, name: str, saved: str | None, call: object) -> None:
    """After a load_state_dict into `layer`; saved: the fingerprint in the metadata, None where there is none."""
    state = state_of(layer)
    if state.watch is not None:
        state.watch.arrival = None
    if not isinstance(saved, str) or division_of(layer) is not None or (mine := layer.fingerprint()) is None:
        return
    origin = _followed(layer)
    if origin is not None and saved in (mine, origin.fingerprint()):  # weights and masks of one moment: a snapshot
        state.watch.seen, state.watch.is_average = _moment(origin), None
        if saved != mine:
            _take_state_of(layer, origin)
        return
    if saved == mine:
        return
    state.watch = state.watch or Watch()
    state.watch.arrival = Arrival(name, saved, call)
    _arrived.add(layer)


def _warn_of_arrival(layer, watch: Watch) -> None:
    """One warning for all layers of a load, unless the masks that belong to the weights have come meanwhile."""
    arrival, mine = watch.arrival, layer.fingerprint()
    watch.arrival = None
    if mine is None or same_function(mine, arrival.saved):
        return
    names = [arrival.name]
    for other in list(_arrived):
        watch = state_of(other).watch if HOLDER in other.__dict__ else None  # dense again, perhaps
        theirs = None if watch is None else watch.arrival
        if theirs is not None and theirs.call is arrival.call:
            if not same_function(other.fingerprint(), theirs.saved):
                names.append(theirs.name)
            watch.arrival = None
            _arrived.discard(other)
    phase, saved_phase = mine.split("-")[0], arrival.saved.split("-")[0]
    how = "under other masks" if phase == saved_phase else f"in the {saved_phase} phase, and the model is {phase}"
    warnings.warn(
        f"the weights of {', '.join(names[:4])} ({len(names)} sparse layers) were saved {how}: with them the model "
        "computes another function than the one that was saved. Load the recipe's state of that moment by "
        "recipe.load_state_dict(state) or sparse24.load_masks(model, state), take the masks and phase of a model that "
        "has them by sparse24.follow(model, like=other), or search masks for these weights by "
        "sparse24.refresh(model, search=True)",
        Sparse24Warning,
        stacklevel=2,
    )
