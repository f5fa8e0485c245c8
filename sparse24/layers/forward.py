"""The forward pass of a sparse layer: one 2:4 product, or what must stand in for it.

A weight that somebody puts in place of the layer's own for a call, as `torch.func.functional_call` and
parametrizations do, is packed for that call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional, ops
from ..errors import Sparse24DtypeError, Sparse24Error, Sparse24Warning
from ..functional.operands import cast_as_autocast_does, computed_dtype
from ..functional.soft import soft_linear
from . import float8, packing
from .checks import is_exporting
from .parallel import tensor_parallel
from .state import DECAY, MASK, METADATA, METADATA_T, PACKED, PACKED_T, SOFT, SPARSE, state_of
from .watch import unseen
from .watch.owners import weights_moved

#: for those who would trace or convert a sparse layer
OTHER_WAYS = (
    ": export the model by torch.export, or give it masked dense weights by sparse24.densify(model, masked=True), "
    "which computes the same"
)


class _MaskedWeight(torch.autograd.Function):
    """weight * mask forward, the gradient straight through to every entry of the weight, with its decay if any."""

    @staticmethod
    def forward(ctx, weight: Tensor, bits: Tensor, decay: Tensor | None) -> Tensor:
        ctx.decays = decay is not None
        if ctx.decays:
            ctx.save_for_backward(weight, bits, decay)
        return torch.where(ops.unpack_mask(bits), weight, 0)

    @staticmethod
    def backward(ctx, d_weight: Tensor):
        if ctx.decays:
            weight, bits, decay = ctx.saved_tensors
            d_weight = ops.masked_decay_(d_weight.clone(), weight, bits, 1.0, grad_scale=decay)
        return d_weight, None, None


class _SoftWeight(torch.autograd.Function):
    """The soft-thresholded weight forward (S-STE), the gradient straight through."""

    @staticmethod
    def forward(ctx, weight: Tensor, soft: Tensor) -> Tensor:
        return soft.to(weight.dtype, copy=True)

    @staticmethod
    def backward(ctx, d_weight: Tensor):
        return d_weight, None


def check_weight_is_packed(layer: nn.Module) -> None:
    """Eager only: pack a weight that was written since it was packed, and say that nobody has called the recipe.

    Not a safety net: fused optimizers, `.data` writes and graph replay do not show in versions. `unseen` finds `.data`
    writes, in some passes.
    """
    weight, state = layer._parameters.get("weight"), state_of(layer)
    if state.shards is not None and not packing.is_dtensor(weight):
        state.shards.ensure_forward()
    elif weight is state.packed_weight:
        if state.stamp is not None and state.stamp != packing.stamp(weight):
            weights_moved(layer)
        elif unseen.needs_look(state, weight) and (state.stamp is not None or weight.is_inference()):
            unseen.look(layer, weight)  # inference tensors have no version, and so no stamp
    elif weight is not None and packing.is_dtensor(weight):
        raise Sparse24Error(
            f"the weight of this sparse layer is a DTensor with placements {tuple(weight.placements)} in forward; "
            "call the module that fully_shard was called on, which gathers it, or distribute the layer by "
            "parallelize_module with ColwiseParallel or RowwiseParallel"
        )
    state.passed = state.packs


def has_substituted_weight(layer: nn.Module) -> bool:
    """Whether `weight` is another tensor than the one that was packed, and so the packed forms are not of it.

    Told by identity alone, since compilers trace that and it costs no time. `torch.export` substitutes nothing: it
    puts tracers in place of the weight and of its packed forms.
    """
    packed = state_of(layer).packed_weight
    if packed is None or layer._parameters.get("weight") is packed:
        return False
    return torch.compiler.is_dynamo_compiling() or not is_exporting()


def check_input(x: Tensor) -> None:
    """Refuse what 2:4 products cannot take: tracers of other compilers, tensors of other libraries, other objects.

    Raises Sparse24Error with the way out.
    """
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            raise Sparse24Error(f"2:4 layers cannot be traced by torch.jit.trace, nor exported through it{OTHER_WAYS}")
        if type(x) is not Tensor:
            if isinstance(x, torch.fx.Proxy):
                raise Sparse24Error(f"2:4 layers cannot be traced by torch.fx.symbolic_trace{OTHER_WAYS}")
            if not isinstance(x, Tensor):
                raise Sparse24DtypeError(f"the input of a sparse layer must be a tensor, got {type(x).__name__}")
    elif is_exporting() and torch.onnx.is_in_onnx_export():
        raise Sparse24Error(f"ONNX has no 2:4 products{OTHER_WAYS}")
    if type(x) is not Tensor and packing.is_dtensor(x):
        raise Sparse24Error(
            "the input of a sparse layer is a DTensor, and its weight is not; pass its local part (x.to_local()), or "
            "put the layer into the tensor-parallel plan"
        )


def dense_forward(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in_features] -> [..., out_features] by all of `weight` [out_features, in_features].

    Where the layer prunes the gradient of a dense weight, errors are those of `sparse_forward`.
    """
    state = state_of(layer)
    if not (state.dense_mvue and state.mvue and weight.requires_grad):
        return F.linear(x, weight, bias)
    if state.cut is not None:
        return tensor_parallel.forward(_dense_product, layer, x, weight, bias)
    return _dense_product(layer, x, weight, bias)


def _dense_product(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    state = state_of(layer)
    check_input(x)
    if x.is_nested:
        return on_values(lambda values: _dense_product(layer, values, weight, bias), x)
    x, bias = _cast(x, weight, bias)
    return functional.dense_linear(x, weight, bias, mvue=state.mvue, rank=state.rank, training=layer.training)


def sparse_forward(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in_features] -> [..., out_features]; `weight` [out_features, in_features] receives the gradient.

    x may be a nested tensor of the jagged layout. Raises Sparse24Error for other nested tensors, tracers and devices
    that differ, Sparse24DtypeError for dtypes that do, as `torch.mm` would.
    """
    if state_of(layer).cut is not None:
        return tensor_parallel.forward(_sparse_product, layer, x, weight, bias)
    if not torch.compiler.is_compiling():
        check_weight_is_packed(layer)
        if state_of(layer).phase != SPARSE:  # an adapter was found merged into it
            return dense_forward(layer, x, weight, bias)
    return _sparse_product(layer, x, weight, bias)


def _sparse_product(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_input(x)
    if x.is_nested:
        return on_values(lambda values: _sparse_product(layer, values, weight, bias), x)
    x, bias = _cast(x, weight, bias)
    state, forms, decay = state_of(layer), layer._buffers, layer._buffers[DECAY]
    if has_substituted_weight(layer):
        functional.check_no_transform(x)
        forms = packing.pack_substitute(layer, weight, packing.packed_dtype(weight, state.compute_dtype))
    if state.precision is not None:
        return float8.linear_forward(layer, x, weight, bias, forms)
    packed, metadata, soft = forms[PACKED], forms[METADATA].reshape(-1), forms[SOFT]
    # Packed float32 values, a CPU's, serve every dtype; 16-bit ones serve their own.
    fits = packed.dtype == x.dtype or packed.dtype in (torch.float32, torch.float64)
    if soft is not None:
        if fits:
            return soft_linear(x, weight, packed, metadata, bias, mvue=state.mvue, rank=state.rank)
        return F.linear(x, _SoftWeight.apply(weight, soft).to(x.dtype), bias)
    if state.shards is not None and not fits:
        raise Sparse24DtypeError(
            f"FSDP2 gathers this layer's weight packed in {packed.dtype}, but it is called in {x.dtype}; use "
            f"MixedPrecisionPolicy(param_dtype={x.dtype}), or sparsify(..., dtype={x.dtype})"
        )
    bits = packing.mask_bits(layer._buffers[MASK]) if state.lean or decay is not None or not fits else None
    if not fits:
        _warn_of_dtype(packed.dtype, x.dtype)
        return F.linear(x, _MaskedWeight.apply(weight, bits, decay).to(x.dtype), bias)
    return functional.sparse_linear(
        x,
        weight,
        packed,
        metadata,
        forms[PACKED_T],
        forms[METADATA_T],
        bias,
        mvue=state.mvue,
        rank=state.rank,
        mask=bits,
        decay=decay,
        training=layer.training,
    )


def on_values(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function of the values of a jagged tensor [batch, length, features], as a jagged tensor of the same lengths."""
    if x.layout != torch.jagged or x._ragged_idx != 1 or x.lengths() is not None:
        raise Sparse24Error(
            "of nested tensors sparse layers take those of layout torch.jagged without holes, ragged in dimension 1; "
            "make such a one by torch.nested.nested_tensor(list, layout=torch.jagged), or pass padded or packed tokens"
        )
    return torch.nested.nested_tensor_from_jagged(function(x.values()), offsets=x.offsets())


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype that `F.linear` would compute in."""
    if x.device != weight.device:
        raise Sparse24Error(
            f"x is on {x.device} and the weight on {weight.device}; move one of them (x.to(weight.device))"
        )
    if computed_dtype(x) != computed_dtype(weight):
        raise Sparse24DtypeError(
            f"mat1 and mat2 must have the same dtype, but x is {x.dtype} and the weight {weight.dtype}; "
            "cast one of them or run under torch.autocast, which casts float32 and 16-bit tensors"
        )
    return cast_as_autocast_does(x, bias)


def _warn_of_dtype(packed: torch.dtype, called: torch.dtype) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"packed for {packed} but called in {called}: dense products over the masked weight, right but not fast; "
            f"run under autocast to {packed}, or sparsify(..., dtype={called})",
            Sparse24Warning,
            stacklevel=5,
        )
