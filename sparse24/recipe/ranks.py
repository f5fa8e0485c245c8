"""A check for many processes: every rank must train the same function, so all must hold the same masks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import Sparse24Error
from ..layers import packing
from ..layers.modules import SparseLayer


def check_ranks(layers: dict[str, SparseLayer]) -> None:
    """All ranks must hold the same masks. Raises Sparse24Error, naming the layers, where they do not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    sums = torch.stack([checksum(layer.mask) for layer in layers.values()])
    low, high = sums.clone(), sums
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    differing = [name for name, same in zip(layers, (low == high).tolist(), strict=True) if not same]
    if differing:
        raise Sparse24Error(
            f"ranks hold different masks in {', '.join(differing[:8])}: their weights differ; were all ranks given "
            "the same weights before the recipe was made?"
        )


def fingerprint(masks: Iterable[Tensor]) -> str:
    """Of all masks of a model, as text."""
    return f"{sum(int(checksum(mask)) for mask in masks) % 2**64:016x}"


def checksum(mask: Tensor) -> Tensor:
    """64 bits that depend on every byte and its place."""
    bits = packing.mask_bits(mask).to(torch.int64).flatten()
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return ((bits + 1) * (places * -7046029254386353131 ^ (places >> 7))).sum()
