"""What FSDP2 asks of the recipe: a rank's optimizer holds only a shard of each weight.

`fully_shard` cuts a weight along its first dimension as torch.chunk does. Where shards are alike and cut no block, a
rank packs its own rows and FSDP2 gathers packed forms, see `packed_gather`. Else every rank has packed forms of the
whole weight, made from the gathered weight (see `packing.full_weight`); the decay works on the local shard with its
part of the mask.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import Sparse24Error
from ..checks import check_module
from ..packing import is_dtensor, mask_bits
from ..state import mask_of


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that `fully_shard` has been called on.

    Raises Sparse24Error for what is no module, and for FSDP1, whose flat parameters have no rows and columns any more.
    """
    check_module(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has sharded anything without it
    if fsdp is None:
        return []
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise Sparse24Error(
            "FullyShardedDataParallel (FSDP1) flattens weights, and a 2:4 mask needs their rows and columns; shard the "
            "model by torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(modules: list[nn.Module]) -> None:
    """Give modules of `sharded_modules` their shards back, for whoever is about to read the master weights.

    After a forward without a backward the outermost module keeps gathered parameters, in the dtype of its policy, which
    the optimizer's steps do not reach.
    """
    for module in modules:
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: itself, unless it is a DTensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """[first, last) of the rows of a sharded tensor that this rank holds.

    Raises Sparse24Error for a placement other than replicated or sharded along rows.
    """
    first, last = 0, tensor.shape[0]
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0) or type(placement).__name__ != "Shard":
            raise Sparse24Error(
                f"a sparse weight with placement {placement} is not supported; shard it along dimension 0 (fully_shard)"
            )
        size = -(-(last - first) // mesh.size(dim))  # as torch.chunk: the last ranks may hold less, or nothing
        start = min(first + mesh.get_coordinate()[dim] * size, last)
        first, last = start, min(start + size, last)
    return first, last


def decay_shard(layer, target: Tensor, factor: float, scale: Tensor | None) -> None:
    """target += factor * (1 - mask) * weight on this rank's shard; `target` is the gradient, or scratch of its shape.

    A shard that begins or ends inside a 4x4 block is right too, only slower: its part of the mask is unpacked.
    """
    weight, target = layer.own_part(layer.weight), layer.own_part(target)
    first, last = local_rows(weight)
    if first == last:
        return
    shard, target = local(weight.detach()), local(target)
    bits = mask_bits(mask_of(layer))
    transposed = layer.as_kernel_sees(weight) is not weight
    if first % 4 == 0 and last % 4 == 0:
        bits = bits[:, first // 4 : last // 4] if transposed else bits[first // 4 : last // 4]
        views = (target.t(), shard.t()) if transposed else (target, shard)
        ops.foreach_masked_decay_([views[0]], [views[1]], [bits.contiguous()], factor, scale)
        return
    kept = ops.unpack_mask(bits)
    kept = (kept.t() if transposed else kept)[first:last]
    term = torch.where(kept, 0, shard.float() * factor)
    target.add_(term if scale is None else term * scale)
