"""Attributes of users' modules that are called what ours are called: kept and restored; a clash changes nothing."""

import copy

import pytest
import torch
from tiny_models import ActivatedMLP as MLP
from torch import nn

import sparse24
from sparse24 import Recipe, ops
from sparse24.layers import SparseLayer, mask_of, state_of
from sparse24.layers.fused.feedforward import FusedFeedForward

pytestmark = pytest.mark.fault(84)

NAMES = ("mask", "packed", "E", "packed_t", "E_t", "soft", "decay_factor", "phase", "mvue", "rank", "lean")
NAMES += ("soft_scale", "mask_is_state", "compute_dtype", "watch", "state", "_stamp", "_ffn", "_halves", "link")


class Gated(nn.Module):
    E = "a constant of the class"

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.act_fn = nn.Linear(width, 64), nn.Linear(width, 64), nn.SiLU()
        self.down_proj = nn.Linear(64, width)

    def link(self):
        return "a method of the class"

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def attribute(module, name):
    setattr(module, name, "mine")


def buffer(module, name):
    module.register_buffer(name, torch.arange(4.0))


def parameter(module, name):
    module.register_parameter(name, nn.Parameter(torch.arange(4.0)))


def child(module, name):
    module.add_module(name, nn.Embedding(4, 2))


KINDS = [attribute, buffer, parameter, child]


def contents(model):
    """Everything that a user can see on the modules."""
    return {
        path: (type(m), {k: v for k, v in vars(m).items() if not isinstance(v, dict)}, *map(dict, inner(m)))
        for path, m in model.named_modules()
    }


def inner(module):
    return module._buffers, module._parameters, module._modules


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["layer", "plain block", "gated block"])
def test_own_names_are_kept_through_training_and_back(where, name, kind):
    if where == "gated block" and (name == "link" and kind is not attribute):
        pytest.skip("a method of that class: torch refuses it")
    if where == "gated block" and name == "E" and kind is not attribute:
        pytest.skip("a constant of that class: torch refuses it")
    model, twin = (nn.Sequential(Gated() if where == "gated block" else MLP()) for _ in range(2))
    owner = model[0].up_proj if where == "layer" else model[0]
    kind(owner, name)
    theirs, keys, before = getattr(owner, name), list(model.state_dict()), contents(model)
    for made in (model, twin):
        sparse24.sparsify(made)
        optimizer = torch.optim.SGD([made[0].up_proj.weight, made[0].down_proj.weight], lr=0.1)
        Recipe(made, optimizer, total_steps=4, mask_interval=1, decay=0.1, mvue=False)
        torch.manual_seed(1)
        for _ in range(3):
            made(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    x = torch.randn(4, 32)
    assert getattr(owner, name) is theirs and list(model.state_dict()) == keys
    assert isinstance(model[0], FusedFeedForward) and torch.equal(model(x), twin(x))
    assert torch.equal(mask_of(model[0].up_proj), mask_of(twin[0].up_proj)) and sparse24.verify(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x)) and list(copied.state_dict()) == keys
    sparse24.densify(model)
    after = contents(model)
    assert getattr(owner, name) is theirs and after.keys() == before.keys()
    for path, (cls, values, *dicts) in before.items():
        assert after[path][0] is cls and after[path][1].keys() == values.keys()
        assert [[*d] for d in after[path][2:]] == [[*d] for d in dicts], path


def test_all_that_is_put_on_modules_has_our_prefix():
    model = nn.ModuleDict({"a": MLP(), "b": Gated()})
    model["c"] = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 1)
    before = {path: set(vars(m)) | set(m._buffers) for path, m in model.named_modules()}
    sparse24.sparsify(model, backend="sparse")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe(model, optimizer, total_steps=4, decay_in="backward")
    model["b"](torch.randn(2, 32)).sum().backward()
    optimizer.step()
    for path, module in model.named_modules():
        added = (set(vars(module)) | set(module._buffers)) - before[path]
        assert all(name.startswith("_sparse24") for name in added - {"_ddp_params_and_buffers_to_ignore"}), added


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["_sparse24", "_sparse24_mask", "enter", "take_mask", "_repack"])
def test_a_clash_on_a_layer_leaves_the_layer_alone_and_says_why(name, kind):
    model = nn.Sequential(MLP(), MLP())
    kind(model[0].up_proj, name)
    before, x = contents(model[0].up_proj), torch.randn(2, 32)
    report = sparse24.sparsify(model)
    assert "0.up_proj" not in report.converted and len(report.converted) == 3
    (skipped,) = [skip for skip in report.skipped if skip.name == "0.up_proj"]
    assert repr(name) in skipped.reason and "rename it" in skipped.reason
    assert contents(model[0].up_proj).keys() == before.keys() and type(model[0].up_proj) is nn.Linear
    model(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["_sparse24", "_sparse24_packed"])
def test_a_clash_on_a_block_leaves_it_unfused(name, kind):
    model = nn.Sequential(Gated())
    kind(model[0], name)
    theirs = getattr(model[0], name)
    report = sparse24.sparsify(model)
    assert repr(name) in report.fused["0"] and type(model[0]) is Gated
    model(torch.randn(2, 32))
    sparse24.densify(model)
    assert getattr(model[0], name) is theirs


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_failure_in_the_fuse_stage_leaves_the_model_as_it_was(at, monkeypatch):
    model = nn.Sequential(Gated(), Gated())
    before, x = contents(model), torch.randn(2, 32)
    y, calls, real = model(x), [], ops.empty_packed

    def failing(rows, *args):
        if rows == 128:  # the buffer of gate and up
            calls.append(rows)
            if len(calls) == at:
                raise torch.OutOfMemoryError("no room")
        return real(rows, *args)

    monkeypatch.setattr(ops, "empty_packed", failing)
    if at > 2:
        sparse24.sparsify(model)
        return
    with pytest.raises(torch.OutOfMemoryError):
        sparse24.sparsify(model)
    monkeypatch.undo()
    after = contents(model)
    assert torch.equal(model(x), y) and not list(model.buffers())
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in before.items()}
    assert {k: set(v[1]) for k, v in after.items()} == {k: set(v[1]) for k, v in before.items()}
    assert all(sparse24.sparsify(model).fused.values()) is False


def test_our_names_can_be_read_and_set_where_the_user_has_none():
    model = nn.Sequential(MLP())
    sparse24.sparsify(model)
    layer = model[0].up_proj
    assert layer.mask is mask_of(layer) and layer.phase == "sparse" and layer.packed.shape == (64, 16)
    layer.phase, layer.rank, layer.mvue = "dense", 3, False
    state = state_of(layer)
    assert (state.phase, state.rank, state.mvue) == ("dense", 3, False) and "rank" not in vars(layer)
    with pytest.raises(sparse24.Sparse24Error, match="phase must be"):
        layer.phase = "warmup"
    layer.packed = "mine"  # nothing that may be set: an attribute of the user's from here on
    assert layer.packed == "mine" and layer._buffers["_sparse24_packed"].shape == (64, 16)
    del layer.packed
    assert layer.packed.shape == (64, 16) and isinstance(layer, SparseLayer)
    sparse24.densify(model)
    assert not hasattr(layer, "mask") and not hasattr(layer, "phase")


def test_densify_decides_before_it_changes_anything():
    model = nn.Sequential(MLP(), MLP())
    sparse24.sparsify(model)
    nn.utils.parametrizations.orthogonal(model[1].down_proj)
    with pytest.raises(sparse24.Sparse24Error, match="1.down_proj is a ParametrizedSparseLinear.*remove_parametri"):
        sparse24.densify(model)
    assert all(isinstance(block, FusedFeedForward) for block in model)
    nn.utils.parametrize.remove_parametrizations(model[1].down_proj, "weight")
    assert len(sparse24.densify(model)) == 4
