"""Whatever torch.nn.Module lets a user change on a fused block or its children takes effect, as on the unfused one."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from rounding import MANY_SUMS
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import sparse24
from sparse24 import SparseGatedMLP, SparseLinear
from sparse24.layers.fused.feedforward import FusedFeedForward

pytestmark = pytest.mark.fault(82)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 64), nn.Linear(32, 64)
        self.down_proj, self.act_fn = nn.Linear(64, 32), nn.GELU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(32, 64), nn.Linear(64, 32), nn.GELU()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        h = self.up_proj(x)
        h = self.act_fn(h)
        h = self.down_proj(h)
        return self.dropout(h)


BLOCKS = [Gated, Plain]


def make(block, *, fuse):
    torch.manual_seed(0)
    root = nn.Sequential(block())
    report = sparse24.sparsify(root, include=("*_proj",), fuse=fuse, mvue=False)
    assert list(report.fused.values()) == ([""] if fuse else [])
    return root[0]


def halve(module, args, out):
    return out / 2


class Shifted(SparseLinear):
    def forward(self, x):
        return super().forward(x) + 1


class Called(nn.GELU):
    def __call__(self, x):
        return 3 * super().__call__(x)


class Scale(nn.Module):
    def forward(self, weight):
        return 2 * weight


def patched_forward(child):
    def change(block, seen):
        module = getattr(block, child)
        own = module.forward
        module.forward = lambda x: (seen.append(child), own(x) * 2)[1]

    return change


def hooked(child, kind):
    def change(block, seen):
        module = block if child == "block" else getattr(block, child)

        def hook(module, *rest):
            seen.append((child, kind))

        getattr(module, f"register_{kind}_hook")(hook)

    return change


def replace(**children):
    def change(block, seen):
        for name, make in children.items():
            torch.manual_seed(7)
            setattr(block, name, make())

    return change


def parametrized(child):
    return lambda block, seen: parametrize.register_parametrization(getattr(block, child), "weight", Scale())


def with_bias(block, seen):
    block.up_proj.bias = None


CHANGES = {
    "another activation": replace(act_fn=nn.ReLU),
    "an activation that we do not have": replace(act_fn=nn.Tanh),
    "an activation of the same class": replace(act_fn=lambda: nn.GELU("tanh")),
    "an attribute of the activation": lambda block, seen: setattr(block.act_fn, "approximate", "tanh"),
    "an activation with a __call__ of its own": replace(act_fn=Called),
    "the activation's class": lambda block, seen: setattr(block.act_fn, "__class__", nn.Tanh),
    "activation in _modules": lambda block, seen: block._modules.update(act_fn=nn.ReLU()),
    "set_submodule": lambda block, seen: block.set_submodule("act_fn", nn.ReLU()),
    "a dense layer": replace(up_proj=lambda: nn.Linear(32, 64)),
    "a layer with a forward of its own": replace(down_proj=lambda: Shifted(64, 32, mvue=False)),
    "a layer inside another module": lambda block, seen: setattr(
        block, "up_proj", nn.Sequential(block.up_proj, nn.ReLU())
    ),
    "a layer's class": lambda block, seen: setattr(block.down_proj, "__class__", Shifted),
    "no bias on one layer": with_bias,
    "a weight": lambda block, seen: setattr(
        block.up_proj, "weight", nn.Parameter(block.up_proj.weight.detach().flip(0))
    ),
    "a weight through a parametrization": parametrized("up_proj"),
    "weight norm": lambda block, seen: parametrizations.weight_norm(block.down_proj),
    "old weight norm": lambda block, seen: nn.utils.weight_norm(block.down_proj),
    "old spectral norm": lambda block, seen: nn.utils.spectral_norm(block.up_proj).eval(),
    "pruning": lambda block, seen: prune.l1_unstructured(block.up_proj, "weight", 0.3),
    "a parametrized bias": lambda block, seen: parametrize.register_parametrization(block.up_proj, "bias", Scale()),
    "forward patched on the block": lambda block, seen: setattr(block, "forward", lambda x: x * 3),
    "forward patched and back": lambda block, seen: (setattr(block, "forward", len), delattr(block, "forward")),
    "a partial as forward": lambda block, seen: setattr(
        block.up_proj, "forward", functools.partial(type(block.up_proj).forward, block.up_proj)
    ),
    "the dense phase of one layer": lambda block, seen: block.up_proj.enter("dense"),
    "requires_grad_": lambda block, seen: block.up_proj.requires_grad_(False),
    "eval": lambda block, seen: block.eval(),
    "module.compile": lambda block, seen: block.act_fn.compile(backend="eager"),
    **{f"forward patched on {child}": patched_forward(child) for child in ("up_proj", "down_proj", "act_fn")},
    **{
        f"{kind} hook on {child}": hooked(child, kind)
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
        for child in ("block", "up_proj", "down_proj", "act_fn")
    },
    "a hook that changes the activation": lambda block, seen: block.act_fn.register_forward_hook(halve),
    "a hook that changes a layer": lambda block, seen: block.down_proj.register_forward_hook(halve),
    "a hook on a layer, always called": lambda block, seen: block.up_proj.register_forward_hook(
        halve, always_call=True
    ),
}
PLAIN_ONLY = {
    "dropout": lambda block, seen: setattr(block.dropout, "p", 1.0),
    "another module for dropout": replace(dropout=nn.ReLU),
    "a hook on dropout": lambda block, seen: block.dropout.register_forward_hook(halve),
}


def run(block, x):
    """Outputs and gradients, and no more than that: a block twice in a row, as training does."""
    x = x.clone().requires_grad_()
    y = block(x)
    block.zero_grad()
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def compare(fused, plain, x):
    for ours, theirs in zip(run(fused, x), run(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, **MANY_SUMS)


@pytest.mark.filterwarnings("ignore")  # torch's own, of deprecated parametrizations
@pytest.mark.parametrize(
    ("block", "name"), [*itertools.product(BLOCKS, CHANGES), *((Plain, name) for name in PLAIN_ONLY)], ids=str
)
def test_change_takes_effect(block, name):
    change = (CHANGES | PLAIN_ONLY)[name]
    fused, plain = make(block, fuse=True), make(block, fuse=False)
    seen = [], []
    x = torch.randn(6, 32)
    compare(fused, plain, x)
    for made, calls in zip((fused, plain), seen, strict=True):
        torch.manual_seed(3)
        change(made, calls)
    compare(fused, plain, x)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_global_hooks_see_every_module(block, kind):
    counts = []
    for fuse in (True, False):
        made, seen = make(block, fuse=fuse), []
        names = {module: name for name, module in made.named_modules()}
        register = getattr(nn.modules.module, f"register_module_{kind}_hook")
        handle = register(lambda module, *rest, seen=seen, names=names: seen.append(names.get(module)))
        try:
            run(made, torch.randn(2, 32))
        finally:
            handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] and "act_fn" in counts[0]


@pytest.mark.parametrize("where", ["block", "activation", "layer"])
def test_patches_on_a_class_take_effect(where, monkeypatch):
    x = torch.randn(4, 32)
    fused, plain = make(Gated, fuse=True), make(Gated, fuse=False)
    cls = {"block": Gated, "activation": nn.GELU, "layer": SparseLinear}[where]
    own = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: own(self, x) + 1)
    compare(fused, plain, x)
    monkeypatch.undo()
    compare(fused, plain, x)


class Counting(Gated):
    calls = 0

    def __call__(self, *args, **kwargs):
        Counting.calls += 1
        return super().__call__(*args, **kwargs)


def test_a_blocks_own_call_runs():
    block = make(Counting, fuse=True)
    block(torch.randn(2, 32))
    assert Counting.calls == 1 and isinstance(block, FusedFeedForward)


def test_what_is_changed_back_runs_fused_again(monkeypatch):
    block, calls = make(Plain, fuse=True), []
    real = sparse24.functional.mlp
    monkeypatch.setattr(sparse24.functional, "mlp", lambda *a, **k: calls.append(1) or real(*a, **k))
    x, act = torch.randn(2, 32), block.act_fn
    block(x)
    block.act_fn = nn.ReLU()
    handle = block.up_proj.register_forward_hook(halve)
    block(x)
    block.act_fn = act
    block(x)
    assert len(calls) == 1
    handle.remove()
    block(x)
    block.eval()(x)
    assert len(calls) == 3


def test_what_fully_shard_writes_on_modules_changes_nothing(monkeypatch):
    """Its marks are for compilers; any other attribute of an activation may change what it does."""
    block, calls = make(Plain, fuse=True), []
    real = sparse24.functional.mlp
    monkeypatch.setattr(sparse24.functional, "mlp", lambda *a, **k: calls.append(1) or real(*a, **k))
    for module in block.modules():
        module._is_fsdp_managed_module = module._fsdp_use_orig_params = True
    block(torch.randn(2, 32))
    assert len(calls) == 1
    block.act_fn.other = True
    block(torch.randn(2, 32))
    assert len(calls) == 1


def test_sparsify_once_more_takes_a_new_activation_up(monkeypatch):
    block, kinds = make(Plain, fuse=True), []
    real = sparse24.functional.mlp
    monkeypatch.setattr(sparse24.functional, "mlp", lambda *a, **k: kinds.append(a[5]) or real(*a, **k))
    block.act_fn = nn.ReLU()
    sparse24.sparsify(nn.Sequential(block), include=("*_proj",))
    block(torch.randn(2, 32))
    assert kinds == ["relu"]


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))], ids=["copy", "pickle"]
)
def test_a_copy_sees_its_own_parts(how):
    block = make(Gated, fuse=True)
    block.act_fn.approximate = "tanh"  # after it was fused: the copy looks anew
    twin, plain = how(block), make(Gated, fuse=False)
    plain.act_fn.approximate = "tanh"
    compare(twin, plain, torch.randn(4, 32))
    twin.act_fn = plain.act_fn = nn.ReLU()
    compare(twin, plain, torch.randn(4, 32))
    assert isinstance(block.act_fn, nn.GELU)


def test_own_gated_block_follows_its_activation():
    block, x = SparseGatedMLP(32, 64), torch.randn(3, 32)
    block.activation = "relu"
    expected = block.down_proj(F.relu(block.gate_proj(x)) * block.up_proj(x))
    torch.testing.assert_close(block(x), expected)

    class Mine(SparseGatedMLP):
        def act_fn(self, h):
            return torch.tanh(h)

    block = Mine(32, 64)
    torch.testing.assert_close(block(x), block.down_proj(torch.tanh(block.gate_proj(x)) * block.up_proj(x)))


def test_recognising_a_block_calls_no_hooks_and_draws_no_numbers():
    torch.manual_seed(0)
    root, calls = nn.Sequential(Plain()), []
    root[0].act_fn.register_forward_hook(lambda *_: calls.append(1))
    before = torch.get_rng_state()
    sparse24.sparsify(root)
    assert not calls and torch.equal(before, torch.get_rng_state()) and root[0].training


def test_a_gate_of_another_width_written_through_data_is_refused_as_by_dense_layers():
    block = make(Gated, fuse=True)
    block.gate_proj.weight.data, block.gate_proj.bias.data = torch.randn(32, 32), torch.randn(32)
    with pytest.warns(sparse24.Sparse24Warning, match="was written since it was packed"):
        with pytest.raises(RuntimeError, match="must match the size of tensor b"):
            block(torch.randn(4, 32))
