"""What `Recipe.state_dict` saves, its checks and its loading: plain numbers, strings and tensors, nothing pickled."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..errors import Sparse24Error
from ..layers import DENSE, SPARSE, SparseLayer, packing, state_of
from ..layers.parallel import tensor_parallel
from . import noise
from .decay import MaskedDecay, check_decay, is_decay
from .methods import FrozenSecondMoment
from .search import MaskSearch
from .steps import Steps

VERSION = 1
#: settings that older states lack, with the only value that they had then
OLDER_SETTINGS = {"decay_in": "step"}
#: keys of older states -> their names now
OLDER_KEYS = {"last_refresh": "last_search", "refreshes": "searches"}
KEYS = {
    "version": int,
    "step": int,
    "phase": str,
    "settings": dict,
    "decay": float,
    "last_search": int,
    "masks_frozen": bool,
    "masks": dict,
    "monitor": dict,
    "scales": list,
    "frozen_moment": list,
    "rng": dict,
}


Layers = dict[str, SparseLayer]


def check_layers(layers: Layers) -> None:
    """`densify` ends a recipe: its masks are gone."""
    dense = [name for name, layer in layers.items() if not isinstance(layer, SparseLayer)]
    if dense:
        raise Sparse24Error(
            f"layers of this recipe are dense again ({', '.join(dense[:4])}); sparsify the model, make a new "
            "recipe and load a state that was saved before"
        )


def settings_of(steps: Steps, search: MaskSearch, decay: MaskedDecay) -> dict:
    """What a state must agree with to be taken up."""
    return {
        "method": steps.method.name,
        "total_steps": steps.phases.total_steps,
        "sparse_from": steps.phases.sparse_from,
        "sparse_until": steps.phases.sparse_until,
        "mask_interval": search.interval,
        "decay_schedule": decay.schedule,
        "decay_in": decay.decay_in,
    }


def save(layers: Layers, steps: Steps, search: MaskSearch, decay: MaskedDecay) -> dict:
    """See `Recipe.state_dict`; `layers` are all layers of the recipe, frozen ones too."""
    check_layers(layers)
    steps.finish_begun(compare=True)
    scales = {name: s for name, layer in layers.items() if (s := state_of(layer).soft_scale) is not None}
    frozen = {name: state_of(layer).phase for name, layer in layers.items() if name not in steps.layers}
    return {
        "version": VERSION,
        "step": steps.taken,
        "phase": steps.phase,
        "settings": settings_of(steps, search, decay),
        "decay": decay.value,
        "masks": {name: tensor_parallel.whole_mask(layer).clone() for name, layer in layers.items()},
        "scales": [scale.clone() for scale in scales.values()],
        "frozen_moment": [t.clone() for t in steps.frozen_moment.frozen] if steps.frozen_moment else [],
        "rng": rng_state(next(iter(layers.values())).weight.device),
        **search.state_dict(),
        **({"frozen_corrections": list(steps.frozen_moment.corrections)} if steps.frozen_moment else {}),
        **({"casts": steps.scales.state_dict()} if steps.scales.layers else {}),
        **({"pruned": steps.noise.state_dict()} if steps.noise is not None else {}),
        **({"frozen_layers": frozen} if frozen else {}),
        **({"scaled_layers": list(scales)} if len(scales) < len(layers) else {}),
    }


def load(
    state: dict,
    layers: Layers,
    steps: Steps,
    search: MaskSearch,
    decay: MaskedDecay,
    *,
    override: bool,
    rng: bool,
) -> None:
    """See `Recipe.load_state_dict`."""
    check_layers(layers)
    state = upgraded(state)
    shapes = [weight.shape for weight in steps.weights()]
    masks = {name: tensor_parallel.whole_mask(layer) for name, layer in layers.items()}
    masks = check_state(state, settings_of(steps, search, decay), masks, override, shapes)
    planned = steps.phase_at(state["step"])
    if state["phase"] != planned and not override:
        raise Sparse24Error(
            f"the state was saved in the {state['phase']} phase, but step {state['step']} of this recipe is "
            f"{planned}; make the recipe with the same settings, or pass override=True to follow this recipe"
        )
    casts = state.get("casts", {})
    steps.scales.check_state(casts)
    if override:
        state = state | search.fitting_history(state)
    search.check_state(state, [masks[name] for name in search.layers])
    hardens = _is_soft(state) and not steps.method.soft  # masks of S-STE are not transposable: search others
    for name, layer in layers.items():
        if not (hardens and name in steps.layers):
            layer.take_mask(masks[name])
        layer.keep_mask()
    for name, scale in scales_of(state).items():
        if steps.method.soft or name not in steps.layers:
            layers[name].set_soft_scale(scale)
    decay.value = check_decay(state["decay"])
    search.load_state_dict(state)
    # From a dense state back to the sparse phase: search, since the saved masks are of weights long gone.
    steps.go_to(state["step"], search=hardens or planned != state["phase"])
    if steps.noise is not None:
        steps.noise.load_state_dict(state.get("pruned", {}), state["step"])
    if steps.frozen_moment is not None and state["frozen_moment"]:
        frozen, corrections = state["frozen_moment"], state.get("frozen_corrections")
        steps.frozen_moment = FrozenSecondMoment(steps.optimizer, steps.weights(), frozen, corrections)
    if steps.scales.load_state_dict(casts):
        steps.repack()
    packing.pack([layer for name, layer in layers.items() if name not in steps.layers], search=False)
    decay.write(steps.current_decay)
    if rng:
        restore_rng(state["rng"], next(iter(layers.values())).weight.device)


def phases_of(state: dict) -> dict[str, str]:
    """name -> phase of each layer of a state: frozen ones have kept theirs."""
    return dict.fromkeys(state["masks"], state["phase"]) | state.get("frozen_layers", {})


def scales_of(state: dict) -> dict[str, Tensor]:
    """name -> S-STE's scale, of each layer of a state that has one: layers frozen from the start may have none."""
    names = state.get("scaled_layers", state["masks"])
    return dict(zip(names, state["scales"], strict=True)) if state["scales"] else {}


def _is_soft(state: dict) -> bool:
    return state["settings"].get("method") == "s-ste"


def upgraded(state: dict) -> dict:
    """`state` with its keys renamed, where an older version has written it."""
    if not isinstance(state, dict):
        return state
    return {OLDER_KEYS.get(key, key): upgraded(value) if key == "blocks" else value for key, value in state.items()}


def check_state(
    state: dict, settings: dict, masks: dict[str, Tensor], override: bool, shapes: list[torch.Size] | None
) -> dict[str, Tensor]:
    """The masks of `state`, on the devices of `masks`, once all of `state` is known to fit; else Sparse24Error.

    shapes  of the weights, each once; None: nothing is trained, so the optimizer's part is not checked
    """
    if not isinstance(state, dict):
        raise Sparse24Error(f"a recipe state is a dict, got {type(state).__name__}")
    missing = sorted(KEYS.keys() - state.keys())
    if missing:
        raise Sparse24Error(f"the recipe state lacks {', '.join(missing)}: it is truncated, or not of sparse24")
    version = state["version"]
    if type(version) is not int or version != VERSION:
        raise Sparse24Error(f"the recipe state has version {version!r}, this sparse24 reads {VERSION}")
    for key, kind in KEYS.items():
        if type(state[key]) is not kind:
            raise Sparse24Error(f"{key!r} of the recipe state must be {kind.__name__}, got {type(state[key]).__name__}")
    if state["phase"] not in (SPARSE, DENSE) or state["step"] < 0 or not 0 <= state["last_search"] <= state["step"]:
        raise Sparse24Error(
            f"the recipe state is corrupt: phase {state['phase']!r}, step {state['step']}, "
            f"last_search {state['last_search']}"
        )
    if not is_decay(state["decay"]):
        raise Sparse24Error(f"the recipe state is corrupt: decay {state['decay']}")
    _check_kinds(state["settings"], "settings", (int, float, str, bool))
    saved = OLDER_SETTINGS | state["settings"]
    differing = [
        f"{key} was {saved.get(key)!r}, is {value!r}" for key, value in settings.items() if saved.get(key) != value
    ]
    if differing and not override:
        raise Sparse24Error(
            f"the recipe state was saved with other settings: {'; '.join(differing)}; make the recipe with the same "
            "settings, or pass override=True to go on with this one's"
        )
    _check_monitor(state["monitor"])
    _check_blocks(state.get("blocks", {"searches": 0, "counts": []}))
    noise.check_state(state.get("pruned", {}))
    _check_frozen(state.get("frozen_layers", {}), state["masks"])
    scaled = state.get("scaled_layers", list(masks))
    if not isinstance(scaled, list) or not all(type(name) is str and name in masks for name in scaled):
        raise Sparse24Error("the recipe state is corrupt: 'scaled_layers' does not name layers of it")
    _check_tensors(state["scales"], "scales", [torch.Size([])] * len(scaled))
    if shapes is not None:
        _check_tensors(state["frozen_moment"], "frozen_moment", shapes)
        _check_corrections(state.get("frozen_corrections", []), len(shapes))
    _check_rng(state["rng"])
    return _check_masks(state["masks"], masks, soft=_is_soft(state))


def _check_frozen(frozen: dict, masks: dict) -> None:
    known = isinstance(frozen, dict) and frozen.keys() <= masks.keys()
    if not known or any(phase not in (SPARSE, DENSE) for phase in frozen.values()):
        raise Sparse24Error("the recipe state is corrupt: its frozen layers are not layers with a phase")


def _check_kinds(items: dict, name: str, kinds: tuple[type, ...]) -> None:
    for key, value in items.items():
        if type(key) is not str or type(value) not in kinds:
            raise Sparse24Error(f"the recipe state is corrupt: {name} has {key!r} of type {type(value).__name__}")


def _check_monitor(monitor: dict) -> None:
    """Check types; `FlipMonitor.check_state` checks sizes."""
    for key in ("steps", "intervals", "flips", "reported"):
        if key not in monitor:
            raise Sparse24Error(f"the recipe state is corrupt: its flip history lacks {key!r}")
    for key, dim in (("steps", 1), ("intervals", 1), ("flips", 2)):
        history = monitor[key]
        if not isinstance(history, Tensor) or history.dtype != torch.int64 or history.dim() != dim:
            raise Sparse24Error(f"the recipe state is corrupt: {key!r} of its flip history is not int64 of {dim} axes")
    if not isinstance(monitor["reported"], list) or any(type(entry) is not str for entry in monitor["reported"]):
        raise Sparse24Error("the recipe state is corrupt: 'reported' of its flip history is not a list of names")


def _check_blocks(blocks: dict) -> None:
    counts = blocks.get("counts") if isinstance(blocks, dict) else None
    if (
        not isinstance(counts, list)
        or type(blocks.get("searches")) is not int
        or len(counts) > 1
        or not all(isinstance(count, Tensor) and count.dim() == 1 and not count.is_floating_point() for count in counts)
    ):
        raise Sparse24Error("the recipe state is corrupt: its flips per block are not whole numbers")


def _check_tensors(tensors: list, name: str, shapes: list[torch.Size]) -> None:
    """One floating tensor of each shape, in order; or none at all, of a method that has none."""
    if tensors and not (
        len(tensors) == len(shapes)
        and all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors)
        and all(t.shape == shape for t, shape in zip(tensors, shapes, strict=True))
    ):
        raise Sparse24Error(f"the recipe state is corrupt: {name!r} does not hold what these layers need")


def _check_corrections(corrections: list, count: int) -> None:
    """One for each weight, or none, of an older state: parts of 1 that a second moment is divided by."""
    plain = isinstance(corrections, list) and len(corrections) in (0, count)
    if not plain or not all(type(value) is float and 0 < value <= 1 for value in corrections):
        raise Sparse24Error("the recipe state is corrupt: 'frozen_corrections' does not hold what these layers need")


def _check_rng(rng: dict) -> None:
    """A scratch generator refuses a CPU state that is none; of a GPU's state only the type is checked."""
    for device, state in rng.items():
        if device not in ("cpu", "cuda") or not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise Sparse24Error(f"the recipe state is corrupt: no generator state for {device!r}")
    try:
        if "cpu" in rng:
            torch.Generator().set_state(rng["cpu"].cpu())
    except (RuntimeError, TypeError) as error:
        raise Sparse24Error(f"the recipe state is corrupt: {error}") from error


def _check_masks(saved: dict, masks: dict[str, Tensor], soft: bool) -> dict[str, Tensor]:
    lacking, extra = sorted(masks.keys() - saved.keys()), sorted(saved.keys() - masks.keys())
    if lacking or extra:
        raise Sparse24Error(
            f"the recipe state is of another model: it lacks masks of {lacking[:4]} and has masks of {extra[:4]}"
        )
    moved = {}
    for name, mask in masks.items():
        other = saved[name]
        if not isinstance(other, Tensor) or other.dtype != torch.uint8 or other.shape != mask.shape:
            what = f"{other.dtype} {tuple(other.shape)}" if isinstance(other, Tensor) else type(other).__name__
            raise Sparse24Error(f"the saved mask of {name} must be uint8 {tuple(mask.shape)}, got {what}")
        moved[name] = other.to(mask.device).contiguous()
        if not soft and not ops.is_transposable(moved[name]):
            raise Sparse24Error(
                f"the saved mask of {name} is corrupt: a block does not keep two of each row and column"
            )
    return moved


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that MVUE draws its seeds from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Take up `state`; where it has none for this kind of device, the device's generator stays as it is."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
