"""refresh: packing anew the layers whose weights were written by hand."""

from __future__ import annotations

import warnings

from torch import nn

from .. import ops
from ..errors import Sparse24Warning
from ..layers import SparseLayer, mask_of, state_of
from ..layers.parallel import sharding
from ..options import checked_options
from .names import sparse_layers


@checked_options()
def refresh(model: nn.Module, *, search: bool = False) -> int:
    """Re-pack every sparse layer of `model` after its weights were written by hand (EMA, `.data`, surgery).

    search  also find the masks anew from the weights' magnitudes; by default the masks stay, and a copy of another
            model (`copy.deepcopy`, `AveragedModel`) takes the masks and phase that this one has now

    Returns how many layers were packed. A mask that is none any more, because an average over buffers went through it
    (`AveragedModel(use_buffers=True)`), is searched anew, with a warning.
    """
    sharding.reshard(sharding.sharded_modules(model))
    layers = sparse_layers(model)
    for layer in layers.values():
        if search:
            layer.accept_weights()
        layer.look(forward=False)
    broken = [] if search else [name for name, layer in layers.items() if not _has_mask(layer)]
    if broken:
        warnings.warn(
            f"the masks of {', '.join(broken[:4])} ({len(broken)} layers) do not keep two in each row and column of "
            "their blocks: something has written to buffers, an average perhaps; they are searched anew",
            Sparse24Warning,
            stacklevel=3,
        )
    for name, layer in layers.items():
        layer._repack(search=search or name in broken)
    return len(layers)


def _has_mask(layer: SparseLayer) -> bool:
    mask = mask_of(layer)
    by_rows = state_of(layer).soft_scale is not None  # S-STE's masks keep two in each row only
    return mask is None or mask.is_meta or by_rows or ops.is_transposable(mask)
