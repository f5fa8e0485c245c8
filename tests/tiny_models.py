"""Tiny real models for the tests, and one step of training."""

import torch
from torch import nn

VOCAB = 64


def hugging_face():
    """transformers, imported late: the processes of the distributed tests do without it."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def gpt2(layers=2, width=32, **settings):
    transformers = hugging_face()
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=width, n_head=2, vocab_size=VOCAB, n_positions=32, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def llama(layers=2, width=32, **settings):
    transformers = hugging_face()
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        vocab_size=VOCAB, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def from_config(name, **settings):
    """A randomly initialised model of any transformers architecture, by the names of its config and class."""
    transformers, (config_name, class_name) = hugging_face(), name
    torch.manual_seed(0)
    return getattr(transformers, class_name)(getattr(transformers, config_name)(**settings))


def tokens(batch=2, length=16, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def train_step(model, optimizer, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


class MLP(nn.Module):
    """The smallest FFN that `sparsify` recognises."""

    def __init__(self, width=16, hidden=32, bias=True, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias, dtype=dtype)
        self.fc2 = nn.Linear(hidden, width, bias, dtype=dtype)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class ActivatedMLP(nn.Module):
    """An FFN with a module for its activation, always of the same weights."""

    def __init__(self, width=32, hidden=64):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.act = nn.Linear(width, hidden), nn.GELU()
        self.down_proj = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)))


class Gated(nn.Module):
    """A gated block as Llama writes it."""

    def __init__(self, act_fn=None, bias=False, width=32, hidden=64):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias)
        self.act_fn = act_fn or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """A plain block as CLIP and ViT write it, with a dropout at the end as GPT-2 has it."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32, bias), nn.GELU("tanh"), nn.Linear(32, 16, bias)
        self.dropout = nn.Dropout(0.0)

    def forward(self, hidden):
        hidden = self.fc1(hidden)
        hidden = self.act(hidden)
        hidden = self.fc2(hidden)
        hidden = self.dropout(hidden)
        return hidden


class Adapter(nn.Module):
    """Stands in the place of a layer, and calls it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)
