"""Texts that a trained model writes."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def write_samples(
    model: nn.Module,
    prompts: torch.Tensor,
    tokens: int,
    ctx: int,
    vocab_size: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int = 50,
) -> torch.Tensor:
    """Continue `prompts` (int64 [count, length]) by `tokens` each; returns int64 [count, length + tokens].

    It draws from a generator of its own, so that sampling does not change the rest of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    ids = prompts
    for _ in range(tokens):
        logits = model(input_ids=ids[:, -ctx:]).logits[:, -1, :vocab_size].float().cpu()  # ids beyond are padding
        kept, places = logits.topk(min(top_k, vocab_size), dim=-1)
        drawn = torch.multinomial((kept / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, places.gather(1, drawn).to(ids.device)], dim=1)
    model.train(was_training)
    return ids
