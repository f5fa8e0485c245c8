"""Generation calls a 2:4 model with a handful of tokens, one after the other."""

import copy

import pytest
import torch
from rounding import ROUNDED_TO_16
from tiny_models import gpt2, llama

import sparse24
from sparse24 import ops
from sparse24.layers.packing import mask_bits


def masked_dense(model):
    """A dense copy whose feed-forward weights are masked as those of the 2:4 model are."""
    other = copy.deepcopy(model)
    masks = [layer.mask for layer in sparse24.convert.sparse_layers(other).values()]
    for name, mask in zip(sparse24.densify(other), masks, strict=True):
        layer = other.get_submodule(name)
        kept = ops.unpack_mask(mask_bits(mask))
        with torch.no_grad():
            layer.weight.mul_(kept if kept.shape == layer.weight.shape else kept.t())
    return other


@pytest.mark.parametrize("make", [gpt2, llama])
def test_generation_gives_the_ids_of_the_masked_dense_model(make, device):
    """Prompts of several tokens, then one token a call with a cache."""
    torch.manual_seed(0)
    model = make(width=64).to(device).eval()
    sparse24.sparsify(model, backend="sparse", dtype=torch.float32 if device == "cpu" else None)
    dense = masked_dense(model)
    prompt = torch.randint(3, 60, (2, 5), device=device)
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"), torch.no_grad():
        ours, theirs = model.generate(prompt, **settings), dense.generate(prompt, **settings)
        assert ours.shape == theirs.shape == (2, 13)
        if device == "cpu":  # in 16 bits two ids may be as likely as makes no difference
            assert torch.equal(ours, theirs)
        single = prompt[:1, :1]
        torch.testing.assert_close(model(single).logits, dense(single).logits, **ROUNDED_TO_16)
