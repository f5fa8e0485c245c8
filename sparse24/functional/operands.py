"""What the autograd functions pass around: packed weights, what backward keeps, inputs, and sources of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import ops
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import as_rows
from ..ops.gemm import DecayTerm

#: which operand of a weight gradient is pruned by MVUE; "": none, the product is dense
OUTPUT, INPUT, DENSE = "output", "input", ""


class PackedWeight(NamedTuple):
    """A weight (out_features, in_features) packed both ways, as `ops.compress` returns it.

    With an empty packed_t, backward packs along out_features itself, from the weight and `masks`: one mask, or one of
    each weight whose rows are stacked here. That is the lean form. A decay needs `masks` too.
    """

    packed: Tensor
    E: Tensor
    packed_t: Tensor
    E_t: Tensor
    masks: tuple[Tensor, ...] = ()


def both(of_weights: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """One for each of the two places that the weights of the up product have."""
    return of_weights[0], of_weights[1] if len(of_weights) == 2 else None


def is_lean(form: PackedWeight) -> bool:
    return form.packed.numel() > 0 and form.packed_t.numel() == 0


def as_constants(form: PackedWeight | tuple) -> PackedWeight:
    """Packed values made from a recording weight: their gradient is the straight-through one, not this path."""
    form = form if isinstance(form, PackedWeight) else PackedWeight(*form)
    if not (form.packed.requires_grad or form.packed_t.requires_grad):
        return form
    return form._replace(packed=form.packed.detach(), packed_t=form.packed_t.detach())


# ---- what backward keeps --------------------------------------------------------------------------------------------


class KeptWeights(NamedTuple):
    """What backward needs of the weights of one product, which are stacked by rows.

    transposed      (packed_t, E_t), or () of a lean form: then it is packed anew from what follows
    weights, masks  of a lean form, and where a decay is added; else ()
    """

    transposed: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]


def kept_weights(form: PackedWeight, weights: tuple[Tensor, ...], decays: bool) -> KeptWeights:
    """Raises Sparse24Error where masks are needed and missing."""
    lean = is_lean(form)
    transposed = () if lean else (form.packed_t, form.E_t)
    if not lean and not decays:
        return KeptWeights(transposed, (), ())
    if len(form.masks) != len(weights):
        why = "packed_t is empty, so backward packs it anew" if lean else "backward adds a decay to pruned weights"
        remedy = "pass masks, or packed_t and E_t from ops.compress" if lean else "pass masks"
        raise Sparse24Error(
            f"{why} and needs the mask of each of {len(weights)} weights, got {len(form.masks)}; {remedy}"
        )
    return KeptWeights(transposed, weights, form.masks)


def transposed_form(kept: KeptWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(packed_t, E_t) of the weights; `dtype` of what a lean form packs."""
    if kept.transposed:
        return kept.transposed[0], kept.transposed[1]
    return ops.compress_transposed(kept.weights, kept.masks, dtype)


def decay_term(kept: KeptWeights, factor: Tensor | None) -> DecayTerm | None:
    return None if factor is None else DecayTerm(factor, kept.weights, kept.masks)


class KeptInput(NamedTuple):
    """The input of a product, for the weight gradient: as it is, or pruned along tokens and packed, or not at all."""

    x: Tensor | None = None
    packed: Tensor | None = None
    E: Tensor | None = None


def kept_input(x: Tensor, seed: Tensor | None) -> KeptInput:
    """x, or with a seed its MVUE form: 1.125 bytes an element in 16 bits, where x has two."""
    return KeptInput(x) if seed is None else KeptInput(None, *ops.mvue_compress(as_rows(x), seed))


def save_for_backward(ctx, tensors: tuple[Tensor | None, ...], *weights: KeptWeights) -> None:
    """Keep some tensors and the weights of some products; `load_for_backward` gives them back in this order."""
    saved, counts = [*tensors], []
    for kept in weights:
        for part in kept:
            saved += part
            counts.append(len(part))
    ctx.save_for_backward(*saved)
    ctx.kept_tensors, ctx.kept_counts = len(tensors), counts


def load_for_backward(ctx) -> tuple[tuple[Tensor | None, ...], list[KeptWeights]]:
    saved, start, parts, weights = ctx.saved_tensors, ctx.kept_tensors, [], []
    for count in ctx.kept_counts:
        parts.append(saved[start : start + count])
        start += count
        if len(parts) == 3:
            weights.append(KeptWeights(*parts))
            parts = []
    return saved[: ctx.kept_tensors], weights


# ---- noise ----------------------------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """Which operand of each weight gradient is pruned, and by which noise.

    operands    OUTPUT, INPUT or DENSE, for each product
    seed        int64 (2,) or, of two products, (2, 2); None: backward draws one for outputs, fresh in each call
    input_seed  the same of inputs, which forward packs; None: it packs none
    rank        of this process: mixed into what is drawn
    """

    operands: tuple[str, ...]
    seed: Tensor | None
    input_seed: Tensor | None
    rank: int


def pruned_operand(mvue: bool | str | None, name: str = "mvue") -> str:
    """OUTPUT, INPUT or DENSE, from what users write: True is "output"; False and None are dense."""
    if mvue is True or mvue == OUTPUT:
        return OUTPUT
    if mvue is False or mvue is None:
        return DENSE
    if mvue == INPUT:
        return INPUT
    raise Sparse24Error(f'{name} must be True, "output", "input" or False, got {mvue!r}')


def noise_of(
    x: Tensor, operands: tuple[str, ...], seed: Tensor | None, rank: int, needs: bool, training: bool
) -> Noise:
    """Draws in forward what is needed there: where an input is pruned, and `needs` says that a weight is trained.

    In training also without autograd: the first of two forward passes of reentrant checkpointing must leave torch's
    generator where the second will.
    """
    input_seed, records = None, torch.is_grad_enabled()
    if INPUT in operands and needs and (records or training):
        input_seed = seed
        if seed is None:
            drawn = ops.draw_seeds(x, len(operands), rank)
            input_seed = drawn if len(operands) > 1 else drawn[0]
    return Noise(operands, seed, input_seed if records else None, rank)


# ---- rules on inputs ------------------------------------------------------------------------------------------------


#: whether autocast is on for any device: one quick question, which most passes ask alone. Compilers do not know it
_any_autocast = torch._C._is_any_autocast_enabled


def computed_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` would take `t`: autocast casts floating point, but not float64."""
    if not torch.compiler.is_compiling() and not _any_autocast():
        return t.dtype
    device = t.device.type
    if t.is_meta or not torch.is_autocast_enabled(device):  # the meta device knows no autocast
        return t.dtype
    stays = not t.is_floating_point() or t.dtype == torch.float64
    return t.dtype if stays else torch.get_autocast_dtype(device)


def cast_as_autocast_does(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Inputs and biases as `F.linear` would cast them."""
    if not torch.compiler.is_compiling() and not _any_autocast():
        return tensors
    cast = []
    for t in tensors:
        if t is not None and (dtype := computed_dtype(t)) != t.dtype:
            t = t.to(dtype)
        cast.append(t)
    return tuple(cast)


def check_no_transform(x: Tensor) -> None:
    """vmap, functional gradients and forward mode have no rule here; say so, instead of PyTorch's words to authors."""
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if dual or torch._C._are_functorch_transforms_active():
        raise Sparse24Error(
            "2:4 layers do not work under torch.func transforms (vmap, grad, jvp, ...) nor in forward-mode "
            "differentiation; use backward(), or sparse24.densify(model) for such a computation"
        )


def check_bias(x: Tensor, bias: Tensor | None) -> None:
    if bias is not None and bias.dtype != x.dtype:
        raise Sparse24DtypeError(
            f"x and bias must have the same dtype, got {x.dtype} and {bias.dtype}; cast one, or run under autocast"
        )
