"""What a layer of precision "fp8" or "fp8-hybrid" has beside others: scales, and the plans of its products.

Three tensors of a layer are cast: its input, its weight, and its output's gradient. Each has a scale, by which this
step casts, and an amax, which the passes of this step raise. `update_scales` makes the next scales of them, once a
step. Before the first update nothing is known, and scales are made from the tensors themselves, by one more read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import Sparse24Error
from ..formats import FORMATS, names
from ..functional.float8 import Cast, FeedForwardPlan, Float8Weight, LinearPlan, float8_feed_forward, float8_linear
from ..ops.float8 import E4M3, scale_of
from .state import HOLDER, METADATA, METADATA_T, PACKED, PACKED_T, state_of

PRECISIONS = ("fp8-hybrid", "fp8")

SLOTS = ("x", "w", "dy")
#: of a gradient that was 0 so far, as those are behind a weight that begins at 0. Small: what comes first is clipped
#: for a step, where a large scale would round it to 0, or blow it up at random
FIRST_SCALE = 2.0**-24
SCALE_BUFFERS = {slot: f"{HOLDER}_{slot}_scale" for slot in SLOTS}
AMAX_BUFFERS = {slot: f"{HOLDER}_{slot}_amax" for slot in SLOTS}
CAST_BUFFERS = (*SCALE_BUFFERS.values(), *AMAX_BUFFERS.values())
#: int64 [3]: values that the casts of this step have clipped, flushed to zero, and seen; None where nobody asks.
#: Forward and backward have one each: compilers take no buffer that both of them write
COUNTS_BUFFERS = {slot: f"{HOLDER}_{slot}_counts" for slot in ("x", "dy")}
ALL_BUFFERS = (*CAST_BUFFERS, *COUNTS_BUFFERS.values())


def check_precision(precision: str | None) -> None:
    if precision is not None and precision not in PRECISIONS:
        raise Sparse24Error(f"precision must be None, {' or '.join(map(repr, PRECISIONS))}, got {precision!r}")


def check_settings(precision: str, lean: bool, compute_dtype: torch.dtype | None) -> None:
    """The rules on what goes with 8-bit products."""
    check_precision(precision)
    if lean:
        raise Sparse24Error(
            f"lean=True packs the second direction anew from 16 bits; with precision={precision!r} leave it out: "
            "8-bit packed forms are smaller (1.25 bytes a weight)"
        )
    if compute_dtype not in (None, wide := FORMATS[E4M3].wide_dtype):
        raise Sparse24Error(
            f"precision={precision!r} packs {names((E4M3,))} and computes the rest in {names((wide,))}, got dtype="
            f"{compute_dtype}; leave it out"
        )


def add_casts(layer: nn.Module, device: torch.device) -> None:
    """Scales of 1 and amaxes of 0; they count from the first `update_scales` on."""
    for slot in SLOTS:
        layer._buffers[SCALE_BUFFERS[slot]] = torch.ones(1, dtype=torch.float32, device=device)
        layer._buffers[AMAX_BUFFERS[slot]] = torch.zeros(1, dtype=torch.float32, device=device)


def has_float8(layer: nn.Module) -> bool:
    return state_of(layer).precision is not None


def weight_cast(layer: nn.Module) -> Cast:
    return Cast(layer._buffers[SCALE_BUFFERS["w"]], layer._buffers[AMAX_BUFFERS["w"]])


def _cast(layer: nn.Module, slot: str) -> Cast:
    # Evaluation casts as training does, and leaves the training's amaxes alone.
    buffers, notes = layer._buffers, torch.is_grad_enabled()
    amax, counts = (buffers[AMAX_BUFFERS[slot]], buffers[COUNTS_BUFFERS[slot]]) if notes else (None, None)
    return Cast(buffers[SCALE_BUFFERS[slot]], amax, counts, not state_of(layer).scales_known)


def _weight(buffers: dict[str, Tensor], scale: Tensor) -> Float8Weight:
    E, packed_t = buffers[METADATA], buffers[PACKED_T]
    if E.dim() != 1:  # a layer in a fused block that runs by itself: both lie in pieces, among those of the block
        E, packed_t = E.reshape(-1), packed_t.contiguous()
    return Float8Weight(buffers[PACKED], E, packed_t, buffers[METADATA_T], scale)


def _prunes(layer: nn.Module) -> tuple[bool, bool]:
    """(all three products in 8 bits, output gradients pruned)."""
    state = state_of(layer)
    return state.precision == "fp8" and bool(state.mvue), bool(state.mvue)


def linear_forward(
    layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, forms: dict[str, Tensor]
) -> Tensor:
    """y = x W^T + bias; `forms` are the layer's buffers, or those of a weight in place of its own."""
    packed = _weight(forms, forms[SCALE_BUFFERS["w"]])
    plan = LinearPlan(packed, _cast(layer, "x"), _cast(layer, "dy"), *_prunes(layer), state_of(layer).rank)
    return float8_linear(x, weight, bias, plan)


def block_forward(block: nn.Module, kind: str, layers: list[nn.Module], x: Tensor) -> Tensor:
    """A whole feed-forward layer: h is cast as the down layer's x, the gradient of gate_up as gate's dy."""
    *ups, down = layers
    gated = len(ups) == 2
    forms = (block if gated else ups[0])._buffers
    packed = (_weight(forms, weight_cast(ups[0]).scale), _weight(down._buffers, weight_cast(down).scale))
    casts = (_cast(ups[0], "x"), _cast(down, "x"), _cast(down, "dy"), _cast(ups[0], "dy"))
    plan = FeedForwardPlan(*packed, *casts, kind, gated, *_prunes(down), state_of(down).rank)
    bias_up, bias_down = ups[0]._parameters["bias"], down._parameters["bias"]
    if bias_up is not None and gated:
        bias_up = torch.cat([up._parameters["bias"] for up in ups])
    weights = tuple(up.as_kernel_sees(up._parameters["weight"]) for up in ups)
    down_weight = down.as_kernel_sees(down._parameters["weight"])
    return float8_feed_forward(x, weights, down_weight, plan, bias_up=bias_up, bias_down=bias_down)


@torch.no_grad()
def update_scales(layers: Iterable[nn.Module], all_reduce_max: Callable[[Tensor], None] | None = None) -> list[Tensor]:
    """The next step's scales from this step's amaxes, in place, for all layers at once; nothing waits for the device.

    all_reduce_max  called with the fp32 tensor of all amaxes, to make it that of all ranks

    Call it after an optimizer step, before packing. A tensor that was not cast keeps its scale: 1 for the input of a
    layer that has not run yet. Gradients that were 0 from the start get FIRST_SCALE. Returns, for each device, whether
    each cast was clipped: its amax was beyond its scale. Bool, one for each scale (nothing was, by a scale that was not
    known before).
    """
    casts: dict[tuple[torch.device, bool], dict[int, tuple[Tensor, Tensor, bool]]] = {}
    for layer in filter(has_float8, layers):
        for slot in SLOTS:  # gate and up of a fused block share those of their weight
            scale, amax = layer._buffers[SCALE_BUFFERS[slot]], layer._buffers[AMAX_BUFFERS[slot]]
            known = slot == "w" or state_of(layer).scales_known
            casts.setdefault((scale.device, known), {})[id(scale)] = (scale, amax, slot == "dy")
        state_of(layer).scales_known = True
    return [
        _update(*map(list, zip(*of.values(), strict=True)), known, all_reduce_max) for (_, known), of in casts.items()
    ]


def _update(
    scales: list[Tensor], amaxes: list[Tensor], of_gradients: list[bool], known: bool, all_reduce_max
) -> Tensor:
    before, largest = torch.cat(scales), torch.cat(amaxes)
    if all_reduce_max is not None:
        all_reduce_max(largest)
    unseen = before
    if not known:
        pairs = zip(scales, of_gradients, strict=True)
        unseen = torch.cat([torch.full_like(scale, FIRST_SCALE) if first else scale for scale, first in pairs])
    new = torch.where(largest > 0, scale_of(largest), unseen)
    torch._foreach_copy_(scales, list(new.split(1)))
    torch._foreach_zero_(amaxes)
    return (largest > torch.finfo(E4M3).max * before) & known


def forget_scales(layers: Iterable[nn.Module]) -> None:
    """The next casts look at their tensors first, as those of a new training do. Weights' scales are another matter."""
    for layer in filter(has_float8, layers):
        state_of(layer).scales_known = False
        for slot in ("x", "dy"):
            layer._buffers[AMAX_BUFFERS[slot]].zero_()


def count_casts(layers: Iterable[nn.Module], on: bool) -> None:
    """Let casts count what they clip and flush, from here on, or no more."""
    for layer in filter(has_float8, layers):
        device = layer._buffers[SCALE_BUFFERS["x"]].device
        for name in COUNTS_BUFFERS.values():
            layer._buffers[name] = torch.zeros(3, dtype=torch.int64, device=device) if on else None


def take_counts(layers: Iterable[nn.Module]) -> list[Tensor]:
    """What the layers have counted since this was called last, int64 [3] for each device."""
    counts: dict[torch.device, list[Tensor]] = {}
    for layer in filter(has_float8, layers):
        for name in COUNTS_BUFFERS.values():
            if (count := layer._buffers[name]) is not None:
                counts.setdefault(count.device, []).append(count)
    taken = [torch.stack(parts).sum(0) for parts in counts.values()]
    for parts in counts.values():
        torch._foreach_zero_(parts)
    return taken


def set_weight_scale(
    layers: list[nn.Module], weights: list[Tensor], all_reduce_max: Callable[[Tensor], None] | None = None
) -> None:
    """The one scale of `layers` from their weights themselves, where no step has told it.

    all_reduce_max  called with the largest magnitude, float32 [1], to make it that of all parts of the weights
    """
    scale, amax, *_ = weight_cast(layers[0])
    magnitudes = [w.detach().abs().amax().float().reshape(1).nan_to_num(0, 0, 0) for w in weights]
    largest = torch.cat(magnitudes).amax(0, keepdim=True)
    if all_reduce_max is not None:
        all_reduce_max(largest)
    scale.copy_(scale_of(largest))
    amax.zero_()


def share_weight_scale(gate: nn.Module, up: nn.Module) -> None:
    """Give two layers whose weights are one operand one scale and one amax. Both are to be packed anew."""
    scale = torch.maximum(weight_cast(gate).scale, weight_cast(up).scale)
    weight_cast(gate).scale.copy_(scale)
    for name in (SCALE_BUFFERS["w"], AMAX_BUFFERS["w"]):
        up._buffers[name] = gate._buffers[name]
    state_of(gate).scale_partner, state_of(up).scale_partner = weakref.ref(up), weakref.ref(gate)


def scale_partner(layer: nn.Module) -> nn.Module | None:
    """The layer that has its weight's scale too, and so is packed anew where that changes."""
    known = state_of(layer).scale_partner
    partner = None if known is None else known()
    if partner is None or HOLDER not in partner.__dict__:
        return None
    name = SCALE_BUFFERS["w"]
    return partner if partner._buffers.get(name) is layer._buffers[name] else None


def scale_state(layer: nn.Module) -> Tensor:
    """What of it must survive a checkpoint: scales and amaxes, float32 [6], and whether they are known, [1]."""
    known = torch.tensor([float(state_of(layer).scales_known)])
    return torch.cat([*(layer._buffers[name].cpu() for name in CAST_BUFFERS), known])


def is_scale_state(state: object) -> bool:
    """Whether it is what `scale_state` returns: positive scales, no negative amax, and known or not."""
    count = len(CAST_BUFFERS)
    if not isinstance(state, Tensor) or state.dtype != torch.float32 or tuple(state.shape) != (count + 1,):
        return False
    scales, amaxes = state[: count // 2], state[count // 2 : count]
    return bool(state.isfinite().all() and (scales > 0).all() and (amaxes >= 0).all())


def load_scale_state(layer: nn.Module, state: Tensor) -> None:
    """Take up what `is_scale_state` is true of; the layer is to be packed anew."""
    for name, value in zip(CAST_BUFFERS, state[:-1].tolist(), strict=True):
        layer._buffers[name].fill_(value)
    state_of(layer).scales_known = bool(state[-1])
