"""Models in files and in other forms: exports, checkpoints, PyTorch's semi-structured weights; and their checks."""

from .checkpoints import load_checkpoint, save_checkpoint
from .exporting import export, load_compressed
from .semi_structured import to_semi_structured
from .verification import verify

__all__ = ["export", "load_checkpoint", "load_compressed", "save_checkpoint", "to_semi_structured", "verify"]
