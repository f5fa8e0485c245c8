"""What 2:4 training holds over dense training, in exact bytes, and the lean setting that holds less."""

import copy
import pickle

import pytest
import torch
from tiny_models import Gated, Plain, gpt2, tokens
from torch import nn

import sparse24
from sparse24 import Recipe, functional, ops
from sparse24.errors import Sparse24Error
from sparse24.layers.fused.feedforward import FusedFeedForward, ffn_layers

MAKERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(256, 512)), 256, ("*",)),
    "gated": (lambda: nn.ModuleDict({"mlp": Gated(width=256, hidden=512)}), 256, "auto"),
    "plain": (lambda: nn.ModuleDict({"mlp": Plain()}), 16, "auto"),
}


def make(name, **settings):
    build, width, include = MAKERS[name]
    torch.manual_seed(0)
    root = build().to(settings.pop("dtype", torch.float32))
    sparse24.sparsify(root, include, **settings)
    return root, root["mlp"] if isinstance(root, nn.ModuleDict) else root, width


def held_bytes(model):
    """Bytes of all buffers, each storage once."""
    storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in model.buffers() if b.numel()}
    return sum(storages.values())


def weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, sparse24.SparseLinear))


@pytest.mark.parametrize(
    "name, lean, per_weight",
    [
        # values in 2 bytes, half of them; metadata of a byte for eight weights: in both directions, and the mask
        ("linear", False, 2 * (1 + 1 / 8) + 1 / 8),
        ("linear", True, 1 + 1 / 8 + 1 / 8),
        ("gated", False, 2 * (1 + 1 / 8) + 1 / 8),  # gate and up have theirs in the block's
        ("gated", True, 1 + 1 / 8 + 1 / 8),
    ],
)
def test_a_layer_holds_these_bytes_beside_its_dense_weight(name, lean, per_weight):
    root, _, _ = make(name, lean=lean, dtype=torch.bfloat16)
    assert held_bytes(root) == per_weight * weights(root)


@pytest.mark.parametrize("mvue", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_lean_layers_compute_the_same_bits(name, mvue):
    results = []
    for lean in (False, True):
        root, module, width = make(name, lean=lean, mvue=mvue)
        torch.manual_seed(1)
        x = torch.randn(8, width, requires_grad=True)
        y = module(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
        assert sparse24.verify(root), str(sparse24.verify(root))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name, width, hidden, halves", [("gated", 256, 512, 2), ("plain", 16, 32, 1)])
def test_activations_kept_for_backward(name, width, hidden, halves, lean):
    """The input, the up product, and h unless the layer is lean; nothing else that grows with the tokens."""
    _, module, _ = make(name, lean=lean)
    kept, tokens = {}, 24
    x = torch.randn(tokens, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        module(x)
    of_tokens = [t.numel() for t in kept.values() if t.dim() == 2 and t.shape[0] == tokens]
    assert sum(of_tokens) == tokens * (width + halves * hidden + (0 if lean else hidden))


def test_lean_blocks_run_fused_and_survive_copies():
    root, module, width = make("gated", lean=True)
    assert isinstance(module, FusedFeedForward) and module.packed is not None and not module.packed_t.numel()
    x = torch.randn(4, width)
    for other in (copy.deepcopy(root), pickle.loads(pickle.dumps(root)), root.double().float()):
        assert torch.equal(other["mlp"](x), module(x)) and sparse24.verify(other)
        assert all(not layer.packed_t.numel() for layer in ffn_layers(other["mlp"]))


def test_training_lean_and_not_is_the_same_bit_for_bit():
    losses = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = gpt2()
        sparse24.sparsify(model, lean=lean)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        recipe = Recipe(model, optimizer, 8, mask_interval=2)
        for step in range(8):
            ids = tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        assert recipe.step == 8
    assert losses[0] == losses[1]


def test_packing_in_one_direction_is_that_half_of_packing_in_both():
    torch.manual_seed(0)
    parts = [torch.randn(64, 96), torch.randn(128, 96)]
    masks = [ops.transposable_mask(w) for w in parts]
    whole = ops.compress(torch.cat(parts), torch.cat([m.view(torch.uint8) for m in masks]).view(torch.uint16))
    for ours, expected in zip(ops.compress_transposed(parts, masks), whole[2:], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "shapes, words",
    [
        ([], "non-empty and equally long, got 0 and 1"),
        ([(8, 8), (8, 8)], "non-empty and equally long, got 2 and 1"),
        ([(1, 8, 8)], "w must be 2-D"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_their_masks_are_not_packed_in_one_direction(shapes, words):
    with pytest.raises(Sparse24Error, match=words):
        ops.compress_transposed([torch.randn(shape) for shape in shapes], [ops.transposable_mask(torch.randn(8, 8))])


@pytest.mark.parametrize("shapes", [[(48, 64), (48, 64)], [(64, 32), (64, 64)]], ids=str)
def test_weights_whose_metadata_cannot_be_stacked_are_refused(shapes):
    """E is written in blocks of 64 x 64: of two weights of 48 rows it has the size of one of 96, and another order."""
    parts = [torch.randn(shape) for shape in shapes]
    with pytest.raises(Sparse24Error, match="equal columns and rows in multiples of 64.*got shapes"):
        ops.compress_transposed(parts, [ops.transposable_mask(w) for w in parts])


def test_lean_functions_ask_for_the_masks():
    w = torch.randn(64, 64, requires_grad=True)
    _, packed, E, packed_t, E_t = ops.prune_compress(w.detach())
    with pytest.raises(Sparse24Error, match="needs the mask of each of 1 weights, got 0"):
        functional.sparse_linear(torch.randn(4, 64), w, packed, E, packed_t.new_empty(0), E_t.new_empty(0))
