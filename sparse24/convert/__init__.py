"""Which layers become 2:4, decided once: structure of models, candidates, cost model, report; and the way back."""

from .candidates import find_candidates, patterns
from .choice import choose_function, rates_on
from .names import plain_name, sparse_layers, unwrap
from .repack import refresh
from .report import Skipped, SparsifyReport
from .surroundings import after_conversion
from .to_dense import densify, effective_weight
from .to_sparse import sparsify

__all__ = [
    "Skipped",
    "SparsifyReport",
    "after_conversion",
    "choose_function",
    "densify",
    "effective_weight",
    "find_candidates",
    "patterns",
    "plain_name",
    "rates_on",
    "refresh",
    "sparse_layers",
    "sparsify",
    "unwrap",
]
