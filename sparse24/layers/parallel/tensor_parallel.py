"""Tensor parallel: what `parallelize_module` leaves of a layer, which is a part of its weight on each rank.

ColwiseParallel cuts out_features, RowwiseParallel in_features. A cut at multiples of four leaves every 4x4 block whole,
so the mask of a part is that part of the whole weight's mask: a rank searches, packs and keeps its own part, and
nothing is sent for that. Forward unpacks the DTensors that the plan's hooks make, multiplies, and hands a DTensor back.

FSDP2 may shard the parts over the other dimensions of the mesh. `own_part` takes the tensor-parallel dimension away:
what is left is a plain tensor, or a DTensor as FSDP2 has it of a weight that is not cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Sparse24Error
from ...formats import BLOCK
from ..packing import is_dtensor, mask_bytes
from ..state import LAYER_BUFFERS, MASK, PACKED_BUFFERS, SOFT, division_of, mask_of, state_of

#: what torch.distributed.tensor.distribute_module sets on a module, last of all
APPLIED = "_distribute_module_applied"


@dataclass(eq=False)
class Cut:
    """How a weight [out_features, in_features] is cut: along `dim`, over the ranks of a one-dimensional `mesh`."""

    mesh: Any
    dim: int

    @property
    def parts(self) -> int:
        return self.mesh.size()

    @property
    def index(self) -> int:
        """Which part this rank has."""
        return self.mesh.get_local_rank()

    @property
    def group(self):
        return self.mesh.get_group()

    def __deepcopy__(self, memo) -> Cut:
        return self  # copies of a model are on the same ranks

    def part_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a plain tensor that is whole, a weight or a mask; shares memory."""
        return whole.chunk(self.parts, self.dim)[self.index]

    def whole_of(self, part: Tensor) -> Tensor:
        """The parts of all ranks as one tensor. Collective."""
        parts = [torch.empty_like(part) for _ in range(self.parts)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, self.dim)


# -- from a plan to a cut -------------------------------------------------------------------------------------------


def why_not_cut(weight: Tensor) -> str | None:
    """Why the parts of a weight that a plan has cut cannot be 2:4, or None."""
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or len(placements) != 1 or type(placements[0]).__name__ != "Shard":
        return (
            f"its weight has placements {tuple(placements)} on a mesh of {mesh.ndim} dimensions; tensor parallel cuts "
            "it along one, by ColwiseParallel or RowwiseParallel, before fully_shard"
        )
    dim, parts = placements[0].dim, mesh.size()
    if weight.shape[dim] % (BLOCK * parts):
        feature = ("out_features", "in_features")[dim]
        return (
            f"{feature}={weight.shape[dim]} over {parts} tensor-parallel ranks cuts through 4x4 blocks; it must be a "
            f"multiple of {BLOCK * parts}"
        )
    return None


def cut_of(layer: nn.Module) -> Cut | None:
    """The cut that a plan has made in a layer's weight; None without a plan.

    Raises Sparse24Error for a cut whose parts cannot be 2:4.
    """
    if APPLIED not in layer.__dict__ or not is_dtensor(weight := layer._parameters.get("weight")):
        return None
    if reason := why_not_cut(weight):
        raise Sparse24Error(
            f"this sparse layer cannot be tensor parallel: {reason}; change the plan, or exclude the layer from "
            "sparsify"
        )
    return Cut(weight.device_mesh, weight.placements[0].dim)


def before_plan(layer: nn.Module) -> None:
    """A plan is about to distribute the layer: packed forms, which would be broadcast for nothing, go first."""
    layer._buffers.update(dict.fromkeys((*PACKED_BUFFERS, SOFT)))
    state_of(layer).packed_weight = None


def after_plan(layer: nn.Module) -> None:
    """A plan has distributed the layer, its buffers too: keep this rank's part of the mask, and pack its weight."""
    buffers, state = layer._buffers, state_of(layer)
    for name, tensor in buffers.items():
        if is_dtensor(tensor):
            buffers[name] = tensor.to_local()
    state.cut = cut_of(layer)
    if state.cut is None:
        return
    if (mask := buffers[MASK]) is not None:
        buffers[MASK] = state.cut.part_of(mask).clone()
    for name in LAYER_BUFFERS:
        if name not in (MASK, *PACKED_BUFFERS, SOFT) and buffers[name] is not None:
            buffers[name] = buffers[name].clone()
    state.generation += 1
    layer._repack()


# -- parts and wholes -----------------------------------------------------------------------------------------------


def own_part(tensor: Tensor, cut: Cut | None) -> Tensor:
    """A DTensor of the weight's shape, such as its gradient, without the tensor-parallel dimension; shares memory.

    A plain tensor, or where FSDP2 shards the part, a DTensor over its dimensions of the mesh. Others as they are.
    """
    if cut is None or not is_dtensor(tensor):
        return tensor
    mesh = tensor.device_mesh
    names = tuple(name for name in mesh.mesh_dim_names or () if name not in (cut.mesh.mesh_dim_names or ()))
    if not names or mesh.ndim == 1:
        return tensor.to_local()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    shape = list(tensor.shape)
    shape[cut.dim] //= cut.parts
    of_fsdp = [tensor.placements[mesh.mesh_dim_names.index(name)] for name in names]
    placements = [Replicate() if placement.is_replicate() else Shard(0) for placement in of_fsdp]
    shape, stride = torch.Size(shape), (shape[1], 1)
    mesh = mesh[names if len(names) > 1 else names[0]]
    return DTensor.from_local(tensor.to_local(), mesh, placements, run_check=False, shape=shape, stride=stride)


def whole_mask(layer: nn.Module) -> Tensor:
    """The mask of the whole weight, uint8 [rows/4, cols/2]: the layer's own, or gathered from all parts. Collective."""
    cut = division_of(layer)
    return mask_of(layer) if cut is None else cut.whole_of(mask_of(layer))


def whole(layer: nn.Module, part: Tensor) -> Tensor:
    """A plain tensor [out_features, in_features] of this rank's part -> that of the whole layer. Collective."""
    cut = division_of(layer)
    return part if cut is None else cut.whole_of(part)


def whole_masks(layers: list[nn.Module], masks: list[Tensor]) -> list[Tensor]:
    """As `whole_mask`, of other masks of the same layers."""
    cuts = [_cut(layer) for layer in layers]
    return [mask if cut is None else cut.whole_of(mask) for cut, mask in zip(cuts, masks, strict=True)]


def part_of_mask(layer: nn.Module, mask: Tensor) -> Tensor:
    """This rank's part of a mask, uint8, that may be whole; of one that is a part already, itself."""
    cut, mask = division_of(layer), mask_bytes(mask)
    return mask if cut is None or mask.shape == mask_of(layer).shape else cut.part_of(mask)


def sum_over_parts(layers: list[nn.Module], counts: Tensor) -> Tensor:
    """int64 counts, one a layer, of this rank's parts -> those of the whole layers, in place. Collective."""
    groups: dict[int, tuple[Any, list[int]]] = {}
    for i, layer in enumerate(layers):
        if (cut := _cut(layer)) is not None:
            groups.setdefault(id(cut.group), (cut.group, []))[1].append(i)
    for group, places in groups.values():
        chosen = torch.tensor(places, device=counts.device)
        summed = counts[chosen]
        torch.distributed.all_reduce(summed, group=group)
        counts[chosen] = summed
    return counts


def largest_of_parts(layer: nn.Module, largest: Tensor) -> None:
    """The maximum of a value over the ranks that hold parts of a layer, in place. Collective."""
    if (cut := division_of(layer)) is not None and not largest.is_meta:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=cut.group)


def place(layer: nn.Module) -> tuple[int, int]:
    """(which part of the layer this rank has, how many there are)."""
    cut = division_of(layer)
    return (0, 1) if cut is None else (cut.index, cut.parts)


def _cut(layer) -> Cut | None:
    """The cut of a layer, or of what stands in for one."""
    return division_of(layer) if isinstance(layer, nn.Module) else None


# -- forward --------------------------------------------------------------------------------------------------------


def forward(product: Callable, layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """product(layer, x, weight, bias) of this rank's parts, as the DTensor that the plan's output hook expects.

    Cut along out_features: x is replicated, and its gradient a sum over ranks; the result is cut along its last
    dimension. Cut along in_features: the other way round, and the result is a sum over ranks.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    cut = state_of(layer).cut
    columns = cut.dim == 0
    if not torch.compiler.is_compiling():  # compilers do not tell a DTensor's class
        _check_operands(x, weight, cut, Replicate() if columns else Shard(x.dim() - 1))
    x = x.to_local(grad_placements=[Partial()] if columns else None)
    if bias is not None:
        bias = bias.to_local()
        if not columns and cut.index:  # the sum has one bias; its gradient is whole on every rank
            bias = bias - bias.detach()
    y = product(layer, x, weight.to_local(), bias)
    return DTensor.from_local(y, cut.mesh, [Shard(y.dim() - 1) if columns else Partial()], run_check=False)


def _check_operands(x: Tensor, weight: Tensor, cut: Cut, expected) -> None:
    if not is_dtensor(weight) or weight.device_mesh.ndim != 1:
        raise Sparse24Error(
            "the weight of this tensor-parallel layer is sharded by FSDP2 too, and not gathered in forward: call the "
            "module that fully_shard was called on, not the layer inside it"
        )
    if not is_dtensor(x):
        raise Sparse24Error(
            "the input of this tensor-parallel layer is no DTensor: the plan's input hook, which makes it one, did not "
            "run; call the layer itself, and not its forward"
        )
    placement = x.placements[0]
    dim = placement.dim % x.dim() if placement.is_shard() else None
    if (
        len(x.placements) != 1
        or (expected.is_replicate() != placement.is_replicate())
        or (expected.is_shard() and dim != expected.dim)
    ):
        raise Sparse24Error(
            f"the input of this tensor-parallel layer has placements {tuple(x.placements)}, and its weight, cut along "
            f"dimension {cut.dim}, needs ({expected},); set input_layouts of the plan, or add PrepareModuleInput"
        )
