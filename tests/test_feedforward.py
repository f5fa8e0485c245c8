"""Fused blocks: the function of their layers one by one, in fewer kernels, whatever happens to the module."""

import copy
import pickle

import pytest
import torch
from rounding import MANY_SUMS, ROUNDED_TO_16
from tiny_models import MLP, VOCAB, Gated, Plain, from_config, gpt2, llama, tokens
from torch import nn

import sparse24
from sparse24 import Recipe, SparseGatedMLP, ops
from sparse24.layers.fused.activations import ACTIVATIONS, activation_kind
from sparse24.layers.fused.feedforward import FusedFeedForward, fuse


def pair(make, **settings):
    """The same block with and without fusion, under one root."""
    blocks = []
    for fused in (True, False):
        root = nn.ModuleDict({"mlp": make()})
        report = sparse24.sparsify(root, fuse=fused, **settings)
        assert report.fused == ({"mlp": ""} if fused else {})
        assert isinstance(root["mlp"], FusedFeedForward) == fused
        blocks.append(root["mlp"])
    return blocks


MAKERS = {
    "gated": (Gated, 32),
    "gated with bias": (lambda: Gated(bias=True), 32),
    "gated gelu": (lambda: Gated(nn.GELU()), 32),
    "plain": (Plain, 16),
    "plain without bias": (lambda: Plain(bias=False), 16),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_fused_block_computes_what_its_layers_do(name, autocast):
    make, width = MAKERS[name]
    blocks, results = pair(make, mvue=False), []
    x, dy = torch.randn(3, 5, width), torch.randn(3, 5, width)
    for block in blocks:
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(inputs)
        y.backward(dy.to(y.dtype))
        results.append([y.detach().float(), inputs.grad, *(p.grad for p in block.parameters())])
    tolerance = ROUNDED_TO_16 if autocast else MANY_SUMS
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, **tolerance)


def test_gradient_with_noise_is_unbiased():
    block, exact = pair(Gated)
    exact.gate_proj.mvue = exact.up_proj.mvue = exact.down_proj.mvue = False
    x, dy, draws = torch.randn(16, 32), torch.randn(16, 32), 800
    mean = torch.zeros(64, 32)
    square = torch.zeros(64, 32)
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(block(x), block.up_proj.weight, dy)
        mean += gradient / draws
        square += gradient.square() / draws
    (expected,) = torch.autograd.grad(exact(x), exact.up_proj.weight, dy)
    error = ((square - mean.square()).clamp_min(1e-12) / draws).sqrt()
    assert ((mean - expected).abs() / error).max() < 5.5


def test_packed_form_of_gate_and_up_is_that_of_both_stacked():
    block, _ = pair(Gated)
    stacked = torch.cat([block.gate_proj.weight, block.up_proj.weight])
    mask = torch.cat([block.gate_proj.mask, block.up_proj.mask]).view(torch.uint16)
    for name, expected in zip(("packed", "E", "packed_t", "E_t"), ops.compress(stacked.detach(), mask), strict=True):
        assert torch.equal(getattr(block, name), expected), name
    assert block.gate_proj.packed.data_ptr() == block.packed.data_ptr()  # halves, not copies


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.load_state_dict({n: torch.randn_like(t) for n, t in b.state_dict().items()}),
        lambda b: b.load_state_dict({n: torch.randn_like(t) for n, t in b.state_dict().items()}, assign=True),
        lambda b: setattr(b.up_proj, "weight", nn.Parameter(torch.randn(64, 32))),
        lambda b: b.double().float(),
        lambda b: b.to("cpu"),
        lambda b: b.gate_proj.reset_parameters(),
        lambda b: [p.data.mul_(2) for p in b.parameters()] and sparse24.refresh(b),
        lambda b: copy.deepcopy(b),
        lambda b: pickle.loads(pickle.dumps(b)),
    ],
    ids=["load", "assign", "parameter", "dtype", "move", "reset", "refresh", "deepcopy", "pickle"],
)
@pytest.mark.fault(56, 57)
def test_whatever_changes_a_weight_changes_the_fused_form(change):
    """The block's own buffer follows loads, moves, copies and new parameters."""
    block, _ = pair(Gated)
    changed = change(block)
    changed = changed if isinstance(changed, FusedFeedForward) else block
    assert sparse24.verify(changed), str(sparse24.verify(changed))
    x = torch.randn(4, 32)
    torch.testing.assert_close(changed(x), Gated.forward(changed, x), **MANY_SUMS)
    if changed is not block:
        before = block.packed.clone()
        changed.gate_proj.reset_parameters()
        assert torch.equal(block.packed, before) and type(changed) is type(block)


def test_addresses_stay_when_nothing_changes():
    block, _ = pair(Gated)
    addresses = [b.data_ptr() for b in block.buffers()]
    block.to("cpu").float()
    sparse24.refresh(block)
    assert addresses == [b.data_ptr() for b in block.buffers()]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_training_with_and_without_fusion_agrees(make):
    losses = []
    for fused in (True, False):
        model = make(width=64)
        report = sparse24.sparsify(model, fuse=fused)
        assert list(report.fused.values()) == ([""] * 2 if fused else [])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        Recipe(model, optimizer, total_steps=12, mask_interval=4, mvue=False)
        losses.append([])
        for _ in range(12):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        assert sparse24.verify(model)
    torch.testing.assert_close(*losses, **MANY_SUMS)


def test_hooks_adapters_and_the_dense_phase_take_the_blocks_own_forward(monkeypatch):
    block, _ = pair(Plain)
    calls, x = [], torch.randn(4, 16)
    real = sparse24.functional.mlp
    monkeypatch.setattr(sparse24.functional, "mlp", lambda *a, **k: calls.append(1) or real(*a, **k))
    block(x)
    assert len(calls) == 1
    hook = block.fc1.register_forward_hook(lambda module, args, out: None)
    block(x)
    assert len(calls) == 1
    hook.remove()
    block.fc1.phase = block.fc2.phase = "dense"
    assert torch.equal(block(x), Plain.forward(block, x)) and len(calls) == 1
    block.fc1.phase = block.fc2.phase = "sparse"
    inner, block.fc1 = block.fc1, nn.Sequential(block.fc1)
    block(x)
    assert len(calls) == 1
    block.fc1 = inner
    block(x)
    assert len(calls) == 2


def test_the_class_of_a_fused_block_makes_blocks_of_the_users_class():
    """`type(block)(...)` is how programs make a twin of a module: nobody has converted that one."""
    fused, _ = pair(Gated)
    twin = type(fused)(width=32, hidden=64)
    assert type(twin) is Gated
    twin.load_state_dict(fused.state_dict())
    x = torch.randn(3, 32)
    dense = copy.deepcopy(fused)
    sparse24.densify(dense)
    assert torch.equal(twin(x), dense(x))


def test_densify_gives_the_class_back():
    root = nn.ModuleDict({"a": Gated(), "b": Plain()})
    before = {name: sorted(m.__dict__) for name, m in root.named_modules()}
    sparse24.sparsify(root)
    sparse24.densify(root)
    assert type(root["a"]) is Gated and type(root["b"]) is Plain
    assert {name: sorted(m.__dict__) for name, m in root.named_modules()} == before
    assert not list(root.buffers()) and sparse24.sparsify(root).fused == {"a": "", "b": ""}


class Odd(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


def test_blocks_that_do_something_else_are_not_fused_and_the_report_says_why():
    patched = Gated()
    patched.forward = lambda x: x
    root = nn.ModuleDict(
        {
            "odd": Odd(),
            "act": Gated(nn.Tanh()),
            "mlp": MLP(),
            "small": Gated(hidden=32),
            "patched": patched,
            "good": Gated(),
        }
    )
    why = sparse24.sparsify(root).fused
    assert why["good"] == "" and isinstance(root["good"], FusedFeedForward)
    assert "forward of Odd is not one that is known" in why["odd"] and why["mlp"] == ""
    assert "act_fn is not one of silu" in why["act"] and "not a multiple of 64" in why["small"]
    assert "replaced on the instance" in why["patched"]
    assert not any(isinstance(root[name], FusedFeedForward) for name in why if name not in ("good", "mlp"))
    assert fuse(root["good"]) == ""  # twice is once


def test_partly_sparse_blocks_are_not_fused():
    root = nn.ModuleDict({"mlp": Gated()})
    report = sparse24.sparsify(root, exclude=("*up_proj",))
    assert report.fused == {"mlp": "not all of its layers are sparse"}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_told_by_their_values(kind):
    assert activation_kind(ACTIVATIONS[kind]) == kind
    assert activation_kind(nn.Tanh()) is None and activation_kind(None) is None and activation_kind(nn.PReLU()) is None
    assert activation_kind(lambda a, b: a) is None


def test_common_architectures_are_fused():
    small = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=0, eos_token_id=0, hidden_size=32, num_hidden_layers=1)
    small |= dict(intermediate_size=64, num_attention_heads=2)
    for name in ("Llama", "Mistral", "Qwen2", "Gemma2", "GPTNeoX"):
        heads = {} if name == "GPTNeoX" else dict(num_key_value_heads=2, head_dim=16)
        model = from_config((f"{name}Config", f"{name}ForCausalLM"), **small, **heads)
        assert list(sparse24.sparsify(model).fused.values()) == [""], name


def test_verify_finds_a_stale_fused_form():
    block, _ = pair(Gated)
    block.E[0] ^= 0x11
    report = sparse24.verify(block)
    assert not report and "buffer of gate and up" in str(report)


def test_own_gated_block_is_fused_and_survives_pickle():
    block = SparseGatedMLP(16, 64)
    assert isinstance(block, FusedFeedForward) and block.packed is not None
    twin = pickle.loads(pickle.dumps(block))
    x = torch.randn(2, 16)
    assert type(twin) is SparseGatedMLP and torch.equal(twin(x), block(x))
    assert SparseGatedMLP(16, 32).packed is None  # half a block of metadata: layer by layer
    sparse24.densify(block)
    assert type(block) is not SparseGatedMLP and block(x).shape == (2, 16)
