"""The main job, `python -m sparse24 pretrain`: a GPT-2 or Llama on real text, with dense or 2:4 sparse FFNs."""

from .job import pretrain
from .settings import PRESETS, Settings
from .train import Stopped, TrainingDiverged

__all__ = ["PRESETS", "Settings", "Stopped", "TrainingDiverged", "pretrain"]
