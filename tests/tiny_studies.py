"""The quality study at a size for seconds: models, batches, and text that can be learned."""

import torch
from torch import Tensor

from bench.quality import training
from bench.quality.arms import Size
from bench.quality.text import CONTEXT

VOCABULARY = 64
SIZES = {"10m": Size(64, 1), "60m": Size(64, 2), "350m": Size(128, 1)}


def shrink(monkeypatch) -> None:
    for name, value in dict(SIZES=SIZES, BATCH=4, VALID_BATCHES=1, VOCABULARY=VOCABULARY).items():
        monkeypatch.setattr(training, name, value)


def counting_rows(rows: int = 480) -> Tensor:
    """Each row counts on from a number of its own."""
    torch.manual_seed(0)
    first = torch.randint(0, VOCABULARY, (rows, 1))
    return ((first + torch.arange(CONTEXT + 1)) % VOCABULARY).to(torch.int16)
