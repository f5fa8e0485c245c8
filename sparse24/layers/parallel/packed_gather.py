"""Which weights FSDP2 gathers packed (see `row_shards`), and which it must gather whole, with the reason."""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...errors import Sparse24DtypeError, Sparse24Error, Sparse24Warning
from ...formats import FORMATS, HALF_DTYPES
from ...ops.float8 import E4M3
from .. import packing
from ..checks import DTYPES
from ..packing import is_dtensor
from ..state import MASK, SPARSE, mask_of, state_of
from .row_shards import RowShards, let_go
from .shard_metadata import STEP


class Gathered(NamedTuple):
    """How FSDP2 gathers one weight: its FSDPParam, the FSDPParamGroup, and the FSDPModule that has the group."""

    param: Any
    group: Any
    module: nn.Module


def divide_rows(layers: dict[str, nn.Module], sharded: list[nn.Module], refusal: str = "") -> None:
    """Let each rank keep the mask of its own rows only, and FSDP2 gather packed forms of them, where it can.

    sharded  from `sharding.sharded_modules`, with their shards
    refusal  why none of the layers can be, for what the caller knows of the training; "": it knows of no reason

    Warns with the reason of layers whose weight is gathered whole. Raises Sparse24Error for CPU offload, and
    Sparse24DtypeError for a mixed precision in which nothing is packed.
    """
    found = _gathered_by(sharded)
    _warn_of_unsharded({name: layer for name, layer in layers.items() if layer not in found}, sharded)
    here = {name: found[layer] for name, layer in layers.items() if layer in found}
    for name, how in here.items():
        _check_policies(name, how)
    reasons = {name: refusal or why_whole(layers[name], how) for name, how in here.items()}
    _agree_in_blocks({layers[name]: name for name in here}, {name: how.group for name, how in here.items()}, reasons)
    by_group = defaultdict(list)
    for name, how in here.items():
        if reasons[name]:
            _undivide(layers[name])
        elif reasons[name] is None and state_of(layers[name]).shards is None:
            by_group[id(how.group)].append((layers[name], how))
    recomputed = _recomputed(sharded)
    for group in by_group.values():
        _divide(group)
        for layer, _ in group:
            state_of(layer).shards.recomputes = layer in recomputed
    if first_of := {reason: name for name, reason in reversed(reasons.items()) if reason}:
        warnings.warn(
            "FSDP2 gathers these sparse weights dense, and each rank keeps packed forms of all of them (2.4 bytes a "
            "weight): " + "; ".join(f"{name}, because {reason}" for reason, name in first_of.items()),
            Sparse24Warning,
            stacklevel=4,
        )


def why_whole(layer: nn.Module, how: Gathered) -> str | None:
    """Why a weight is not gathered packed; None if it is; "" where there is nothing to gather."""
    weight, state = how.param.sharded_param, state_of(layer)
    parts = _shard_mesh(weight).size() if is_dtensor(weight) and _shard_mesh(weight) is not None else 1
    if parts == 1:
        return ""
    if state.cut is not None:
        return "its parts are tensor parallel"
    if state.lean:
        return "lean=True keeps no transposed form; without it FSDP2 gathers one where it is needed"
    if layer.as_kernel_sees(weight) is not weight:
        return "it is stored transposed (Conv1D), and shards cut its columns"
    if type(how.param.sharded_param._local_tensor) is not Tensor or how.param._module_info.shared_modules:
        return "it is shared with another module, or gathered in a way of its own"
    if how.group._use_post_forward_mesh:
        return "reshard_after_forward is a number; use True or False"
    if weight.shape[0] % (STEP * parts):
        return (
            f"{weight.shape[0]} rows over {parts} ranks are no multiple of {STEP} for each; choose a multiple of "
            f"{STEP * parts}, or a mesh of fewer shards"
        )
    if (
        state.precision is not None
        and layer in packing.blocks
        and weight.shape[0] % (tile := FORMATS[E4M3].meta_tile_k)
    ):
        return f"gate and up of 8-bit blocks have {weight.shape[0]} rows each, no multiple of {tile}"
    return None


def _gathered_by(sharded: list[nn.Module]) -> dict[nn.Module, Gathered]:
    """By sparse layer."""
    found = {}
    for module in sharded:
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # of newer torch; one group at most before
        for group in [state._fsdp_param_group] if groups is None else groups:
            for param in [] if group is None else group.fsdp_params:
                if param._module_info.param_name == "weight":
                    found[param._module_info.module] = Gathered(param, group, module)
    return found


def _recomputed(sharded: list[nn.Module]) -> set[nn.Module]:
    """What runs forward in backward, where that shows: inside PyTorch's `checkpoint_wrapper`, and in models of
    transformers with `gradient_checkpointing_enable`. In eager mode others are found when they do it.
    """
    wrappers = [
        module
        for root in sharded
        for module in root.modules()
        if type(module).__name__.endswith("CheckpointWrapper") or getattr(module, "gradient_checkpointing", 0) is True
    ]
    return {inner for wrapper in wrappers for inner in wrapper.modules()}


def _warn_of_unsharded(layers: dict[str, nn.Module], sharded: list[nn.Module]) -> None:
    if sharded and (names := [name for name, layer in layers.items() if not is_dtensor(layer.weight)]):
        warnings.warn(
            f"the weights of {', '.join(names[:8])} are not sharded, by ignored_params or because no fully_shard is "
            "around them, and FSDP2 does not average their gradients: ranks will differ unless you average them; "
            "check_ranks_every=N compares the masks",
            Sparse24Warning,
            stacklevel=5,
        )


def _check_policies(name: str, how: Gathered) -> None:
    if how.param.offload_to_cpu:
        raise Sparse24Error(
            f"the weight of {name} is offloaded to the CPU by CPUOffloadPolicy, where its mask would be searched and "
            "packed forms made for a GPU; call fully_shard without offload_policy"
        )
    if (dtype := how.param.mp_policy.param_dtype) is not None and dtype not in DTYPES:
        raise Sparse24DtypeError(
            f"MixedPrecisionPolicy(param_dtype={dtype}) is not a dtype that {name} can be packed in; use "
            f"{' or '.join(map(str, HALF_DTYPES))}"
        )


def _shard_mesh(weight: Tensor):
    """The one dimension of the mesh that shards a weight along rows; None for other placements."""
    mesh, dims = weight.device_mesh, [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    if len(dims) != 1 or type(weight.placements[dims[0]]).__name__ != "Shard" or weight.placements[dims[0]].dim != 0:
        return None
    return mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[dims[0]]]


def _agree_in_blocks(names: dict[nn.Module, str], groups: dict[str, Any], reasons: dict[str, str | None]) -> None:
    """Gate and up of a fused block lie in one buffer: both are gathered packed, by one group, or neither is."""
    together = defaultdict(list)
    for layer, name in names.items():
        if layer in packing.blocks:
            together[packing.blocks[layer][0]].append(name)
    for of_block in together.values():
        if len({id(groups[name]) for name in of_block}) > 1 or len(of_block) == 1:
            reason = "gate and up are gathered apart; call fully_shard on the block that has both"
            reasons.update(dict.fromkeys(of_block, reason))
        elif differing := [reasons[name] for name in of_block if reasons[name] is not None]:
            reasons.update(dict.fromkeys(of_block, differing[0]))


def _divide(group: list[tuple[nn.Module, Gathered]]) -> None:
    """Let the layers that are gathered together have the masks of their own rows, and no packed forms of others'."""
    for layer, how in group:
        mask = mask_of(layer)
        shards = RowShards(layer, _shard_mesh(how.param.sharded_param), *how)
        layer._buffers[MASK] = shards.part_of(mask).clone()
        state_of(layer).shards = shards
        state_of(layer).fingerprint = None
        layer._fit_buffers()
    layers = [layer for layer, _ in group]
    packing.restore_blocks(layers)
    let_go([state_of(layer).shards for layer in layers])
    for layer in layers:
        state_of(layer).shards.switch(state_of(layer).phase == SPARSE)


def _undivide(layer: nn.Module) -> None:
    """Have the mask and the packed forms of the whole weight again. Collective, of a layer that was divided."""
    if (shards := state_of(layer).shards) is None:
        return
    shards.switch(False)
    whole = shards.whole_of(mask_of(layer))
    state_of(layer).shards = state_of(layer).fingerprint = None
    layer._buffers.update(dict.fromkeys(packing.PACKED_BUFFERS))
    layer._buffers[MASK] = whole
    layer._repack()


# -- for whoever looks at packed forms between two passes ------------------------------------------------------------


@contextmanager
def whole_forms(layers: list[nn.Module]):
    """The packed forms that the layers multiply with, in their buffers. Collective where FSDP2 gathers them."""
    with ExitStack() as stack:
        for layer in layers:
            shards = state_of(layer).shards
            if shards is not None and shards.gathers:
                stack.enter_context(shards.gathered())
        yield


def packed_weight(layer: nn.Module) -> Tensor:
    """The weight that a layer's packed forms are of, [out_features, in_features]. Collective under FSDP2."""
    shards = state_of(layer).shards
    return packing.full_weight(layer) if shards is None else shards.whole_of(shards.own_rows())


def packed_mask(layer: nn.Module) -> Tensor:
    """The mask that a layer's packed forms are of, uint8. Collective under FSDP2."""
    shards = state_of(layer).shards
    return mask_of(layer) if shards is None else shards.whole_of(mask_of(layer))
