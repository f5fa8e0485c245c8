"""densify: a model's layers dense again, with their dense weights or with the masked ones that it computed with."""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import Sparse24Error, Sparse24Warning
from ..layers import SPARSE, SparseLayer, packing
from ..layers.fused import sparse_activation
from ..layers.fused.feedforward import FusedFeedForward, own_class, unfuse_block
from ..layers.parallel import sharding
from ..layers.state import SOFT, mask_of, state_of
from ..layers.watch.owners import end_recipes
from ..options import checked_options
from .candidates import weight_owners
from .classes import dense_class
from .names import plain_name, sparse_layers, unwrap
from .surroundings import after_conversion, note_in_configs


@checked_options()
def densify(model: nn.Module, *, masked: bool = False) -> list[str]:
    """Give every sparse layer its dense class back, with the same parameter objects; returns the layers' names.

    Blocks that pruned their activation (`operand="activation"`) no longer do, and their names are returned too.

    masked  also write zeros where the masks prune, so that the model goes on computing what it computed: before
            merging adapters, quantisation, or an export that knows no 2:4 products. In the dense phase, whose function
            is the dense one, weights stay. The pruned weights are lost: save the model first, if they matter. No weight
            stands for pruned activations, and a warning says so

    A recipe of the model ends: its hooks come off the optimizer, which trains the dense layers from then on. Raises
    Sparse24Error, changing nothing, for a layer that somebody has wrapped or parametrized since it became sparse, and
    with masked=True for a weight that another module has too, which would change with it.
    """
    layers = sparse_layers(model)
    classes = {name: dense_class(name, layer) for name, layer in layers.items()}
    blocks = [module for module in model.modules() if isinstance(module, FusedFeedForward)]
    pruned = sparse_activation.activation_blocks(model)
    for block in blocks:
        own_class(block)
    for block in pruned.values():
        sparse_activation.own_class(block)
    if masked:
        _mask_weights(model, {name: layer for name, layer in layers.items() if state_of(layer).phase == SPARSE})
    for block in blocks:
        unfuse_block(block)
    end_recipes(layers.values())
    for name, layer in layers.items():
        layer._drop_sparse()
        layer.__class__ = classes[name]
    for block in pruned.values():
        sparse_activation.restore(block)
    if masked and pruned:
        warnings.warn(
            f"{len(pruned)} blocks, such as {next(iter(pruned)) or 'the model'}, no longer prune their activation, "
            "which masked weights cannot stand for: the model does not go on computing what it computed",
            Sparse24Warning,
            stacklevel=3,
        )
    after_conversion(model)
    note_in_configs(model)
    return [*layers, *map(plain_name, pruned)]


@torch.no_grad()
def _mask_weights(model: nn.Module, layers: dict[str, SparseLayer]) -> None:
    """Write what each layer multiplies with into its weight; changes nothing where one of them cannot be written."""
    sharding.reshard(sharding.sharded_modules(model))
    _check_weights(model, layers)
    made: dict[int, Tensor] = {}
    for layer in layers.values():
        weight = layer.weight
        if id(weight) in made or weight.is_meta:
            continue
        made[id(weight)] = effective = effective_weight(layer)
        if not packing.is_dtensor(weight):
            weight.data.copy_(effective)
        elif packing.is_dtensor(part := layer.own_part(weight)):
            first, last = sharding.local_rows(part)
            part.to_local().copy_(effective[first:last])
        else:
            part.copy_(effective)


def effective_weight(layer: SparseLayer) -> Tensor:
    """What a sparse layer multiplies with, in the shape of its weight, gathered where FSDP2 has sharded it.

    A float32 weight that is packed in 16 bits keeps its float32 values.
    """
    soft = layer._buffers[SOFT]
    if soft is None:
        kept = ops.unpack_mask(packing.mask_bits(mask_of(layer)))
        soft = torch.where(kept, packing.full_weight(layer), 0)
    return layer.as_kernel_sees(soft)


def _check_weights(model: nn.Module, layers: dict[str, SparseLayer]) -> None:
    owners = weight_owners(unwrap(model))
    sharing = defaultdict(list)
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise Sparse24Error(
                f"the weight of {name} is computed (pruned, or normalised), and cannot be written; remove that first"
            )
        sharing[id(layer.weight)].append((name, layer))
    for same in sharing.values():
        name, first = same[0]
        masks = all(torch.equal(mask_of(layer), mask_of(first)) for _, layer in same)
        if not masks or any(not isinstance(owner, SparseLayer) for owner in owners[id(first.weight)]):
            raise Sparse24Error(
                f"the weight of {name} is shared with another module, which would be masked too; densify(model) "
                "without masked=True keeps it, export(masked=True) writes a masked copy"
            )
