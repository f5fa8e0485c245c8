"""The model: a real GPT-2 or Llama made from a Hugging Face config, with nothing downloaded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .equal_time import ffn_width
from .settings import ACTIVATIONS, Settings, kind_of

VOCAB_MULTIPLE = 64  # the head's GEMM is faster with round extents; ids beyond the tokenizer's are never used


def padded_vocab(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def model_config(settings: Settings, arm: str, vocab_size: int, end_of_text: int) -> Any:
    """The transformers config of an arm."""
    quiet_transformers()
    s = settings
    width = ffn_width(s, kind_of(arm))
    shared = dict(
        initializer_range=s.init_std,
        vocab_size=padded_vocab(vocab_size),
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    if s.model == "gpt2":
        from transformers import GPT2Config

        return GPT2Config(
            n_layer=s.layers, n_embd=s.width, n_head=s.heads, n_positions=s.ctx, n_inner=width,
            activation_function=ACTIVATIONS[s.activation or "gelu_tanh"],
            resid_pdrop=s.dropout, embd_pdrop=s.dropout, attn_pdrop=s.dropout, **shared,
        )  # fmt: skip
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=s.layers, hidden_size=s.width, num_attention_heads=s.heads, num_key_value_heads=s.heads,
        max_position_embeddings=s.ctx, intermediate_size=width, hidden_act=ACTIVATIONS[s.activation or "silu"],
        tie_word_embeddings=True, **shared,
    )  # fmt: skip


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Plain causal attention in the form that transformers calls: [batch, heads, tokens, head] in, heads third out.

    Registered in place of "sdpa" because transformers then builds no mask. For "sdpa" it looks for packed sequences in
    each forward, which makes the GPU wait, and under torch.compile builds a mask that rules flash attention out.
    """
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True
    )
    return out.transpose(1, 2).contiguous(), None


def build_model(config: Any, seed: int) -> nn.Module:
    """Random weights of fp32 on the CPU, a function of config and seed alone: the same on every device."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("sparse24_causal", causal_attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sparse24_causal")
    return model.float()


def build_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, none on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    fused = settings.device.startswith("cuda")
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=fused)


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats; inputs and targets int64 [sequences, ctx]."""
    logits = model(input_ids=inputs).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def quiet_transformers() -> None:
    """Silence its advice about pretrained checkpoints, which this run does not use."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
