"""A check for many processes: every rank must train the same function, so all must hold the same masks."""

from __future__ import annotations

import torch

from ..errors import Sparse24Error
from ..layers.copies import checksum
from ..layers.modules import SparseLayer, mask_of


def check_ranks(layers: dict[str, SparseLayer]) -> None:
    """All ranks must hold the same masks. Raises Sparse24Error, naming the layers, where they do not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    sums = torch.stack([checksum(mask_of(layer)) for layer in layers.values()])
    low, high = sums.clone(), sums
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    differing = [name for name, same in zip(layers, (low == high).tolist(), strict=True) if not same]
    if differing:
        raise Sparse24Error(
            f"ranks hold different masks in {', '.join(differing[:8])}: their weights differ; were all ranks given "
            "the same weights before the recipe was made?"
        )
