"""Adapters that are merged into the weight of a sparse layer: the sum of both has no zeros where the mask has them.

A merge writes weight + product, and pruned by the mask that would be another function. So the merge is taken back,
layer and adapter are asked what they compute together, and the layer gets that as its weight. From there on it computes
dense, as it would in the dense phase.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn

from ... import ops
from ...errors import Sparse24Warning
from .. import packing
from ..state import DENSE, PACKED, SOFT, SPARSE, mask_of, state_of


def note_adapter(layer: nn.Module, adapter: nn.Module) -> None:
    """`adapter` has been put around `layer`, perhaps, and may be merged into it later."""
    if callable(getattr(adapter, "merge", None)) and any(child is layer for child in adapter.modules()):
        state_of(layer).adapter = weakref.ref(adapter)


def keep_function(layer: nn.Module, adapter: nn.Module | None = None, name: str = "") -> bool:
    """Let a layer whose weight was written compute what it did together with its merged adapter.

    adapter  PEFT's layer around it, by default the one that was put there last

    Returns False, changing nothing, where there is no merged adapter that can be undone.
    """
    state = state_of(layer)
    if adapter is None:
        adapter = None if state.adapter is None else state.adapter()
    if state.phase != SPARSE or not getattr(adapter, "merged", False):
        return False
    merged, undo, merge = (getattr(adapter, attribute, None) for attribute in ("merged_adapters", "unmerge", "merge"))
    if not merged or not callable(undo) or not callable(merge):
        return False
    merged = list(merged)
    undo()
    _take_back(layer)
    weight = _computed_by(adapter, layer)
    merge(adapter_names=merged)
    layer.weight.data.copy_(layer.as_kernel_sees(weight))
    layer.enter(DENSE)
    layer.note_packed()
    warnings.warn(
        f"an adapter was merged into the sparse layer{f' {name!r}' if name else ''}, and its product is not 2:4: the "
        "layer computes what both computed, with zeros where its own weight was pruned, and is dense from here on. For "
        "a 2:4 model train the merged weights under a new Recipe; sparse24.densify(model, masked=True) before the "
        "merge makes all layers dense",
        Sparse24Warning,
        stacklevel=5,
    )
    return True


def _take_back(layer: nn.Module) -> None:
    """Taking a merge back has rounded the weight; give it the values that were packed, or pack what there is."""
    packed = layer._buffers[PACKED]
    if layer._buffers[SOFT] is not None or packed.dtype != layer.weight.dtype:
        layer._repack()
        return
    kept = ops.unpack_mask(packing.mask_bits(mask_of(layer)))
    values = ops.decompress(packed.contiguous(), layer.flat_E(), *kept.shape)
    weight = torch.where(kept, values, packing.full_weight(layer))
    layer.weight.data.copy_(layer.as_kernel_sees(weight))
    layer.note_packed()


@torch.no_grad()
def _computed_by(adapter: nn.Module, layer: nn.Module) -> Tensor:
    """The matrix [out_features, in_features] that an adapter and its layer multiply with, whatever the adapter does."""
    width = layer.kernel_weight().shape[1]
    x = torch.zeros(width + 1, width, dtype=layer.weight.dtype, device=layer.weight.device)
    x[:width].fill_diagonal_(1)
    training = adapter.training
    y = adapter.eval().forward(x)  # not by its hooks
    adapter.train(training)
    return (y[:width] - y[width:]).t()
