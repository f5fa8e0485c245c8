"""Which layers become 2:4, decided once: structure of models, candidates, cost model, report; and the way back."""

from .convert import (
    Skipped,
    SparsifyReport,
    after_conversion,
    candidates,
    choose_function,
    densify,
    patterns,
    plain_name,
    rates_on,
    refresh,
    sparse_layers,
    sparsify,
    unwrap,
)

__all__ = [
    "Skipped",
    "SparsifyReport",
    "after_conversion",
    "candidates",
    "choose_function",
    "densify",
    "patterns",
    "plain_name",
    "rates_on",
    "refresh",
    "sparse_layers",
    "sparsify",
    "unwrap",
]
