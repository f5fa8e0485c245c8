"""A check across processes: all ranks must train the same function, so they must have the same masks."""

from __future__ import annotations

import torch

from ..errors import Sparse24Error
from ..layers import SparseLayer, mask_of
from ..layers.checks import is_distributed
from ..layers.parallel import tensor_parallel
from ..layers.watch.copies import checksum

LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def check_ranks(layers: dict[str, SparseLayer]) -> None:
    """Raises Sparse24Error, naming the layers, unless all ranks have the same masks.

    Of a tensor-parallel layer, the ranks that have the same part of it are compared.
    """
    if not layers or not is_distributed():
        return
    places = [tensor_parallel.place(layer) for layer in layers.values()]
    sums = torch.stack([checksum(mask_of(layer)) for layer in layers.values()])
    size = (len(places), max(parts for _, parts in places))
    low, high = (sums.new_full(size, neutral) for neutral in (MOST, LEAST))
    mine = torch.tensor([part for part, _ in places], device=sums.device).unsqueeze(1)
    for bound in (low, high):
        bound.scatter_(1, mine, sums.unsqueeze(1))
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    same = ((low == high) | (low > high)).all(1).tolist()  # low > high: a part that no layer has
    if differing := [name for name, agrees in zip(layers, same, strict=True) if not agrees]:
        raise Sparse24Error(
            f"ranks hold different masks in {', '.join(differing[:8])}: their weights differ; were all ranks given "
            "the same weights before the recipe was made?"
        )
