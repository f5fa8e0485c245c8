"""sparse24: feed-forward layers of transformers, trained with 2:4 sparsity.

    import sparse24

    report = sparse24.sparsify(model)                                   # FFN layers become 2:4 layers, in place
    recipe = sparse24.Recipe(model, optimizer, total_steps=10_000)      # masks, decay and phases, by optimizer hooks

Importing it needs no GPU and touches none. Layers: `modules`; differentiable functions: `functional`; ops: `ops`;
the same in plain PyTorch: `reference`.
"""

import sys as _sys

from . import errors, functional, integrations, ops, reference
from ._library import Availability, is_available
from ._version import __version__
from .convert import densify, refresh, sparsify, structure
from .errors import Sparse24BuildError, Sparse24DtypeError, Sparse24Error, Sparse24Warning
from .layers import modules
from .layers.gated_mlp import SparseGatedMLP
from .layers.modules import SparseLinear
from .recipe import Recipe, follow, load_masks
from .recipe.probe import MaskProbe
from .recipe.tune import tune_decay
from .save.checkpoints import load_checkpoint, save_checkpoint
from .save.exporting import export, load_compressed
from .save.semi_structured import to_semi_structured
from .save.verification import verify

__all__ = [
    "Availability",
    "MaskProbe",
    "Recipe",
    "Sparse24BuildError",
    "Sparse24DtypeError",
    "Sparse24Error",
    "Sparse24Warning",
    "SparseConv1D",
    "SparseGatedMLP",
    "SparseLinear",
    "__version__",
    "densify",
    "errors",
    "export",
    "follow",
    "functional",
    "integrations",
    "is_available",
    "load_checkpoint",
    "load_compressed",
    "load_masks",
    "modules",
    "ops",
    "reference",
    "refresh",
    "save_checkpoint",
    "sparsify",
    "structure",
    "to_semi_structured",
    "tune_decay",
    "verify",
]

# Where these lay before the package had folders: `from sparse24.modules import SparseLayer` is in people's code.
_sys.modules |= {f"{__name__}.modules": modules, f"{__name__}.structure": structure}


def __getattr__(name: str):
    # transformers' Conv1D is its base class, and sparse24 does not need transformers.
    if name == "SparseConv1D":
        from .layers.conv1d import SparseConv1D

        return SparseConv1D
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
