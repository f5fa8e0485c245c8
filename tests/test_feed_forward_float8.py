"""The ops of whole 8-bit layers have the bits, the notes and the errors of the single ops that they stand for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ActivatedMLP, Gated
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Sparse24Error, ops
from sparse24.functional import float8 as functional
from sparse24.layers.float8 import ALL_BUFFERS
from sparse24.ops import float8
from sparse24.ops.feed_forward import BackwardOptions
from sparse24.ops.float8.feed_forward import feed_forward_float8, feed_forward_float8_backward

TOKENS, D_MODEL, D_FF = 40, 64, 128
MODES = ("fp8-hybrid", "fp8")
BLOCKS = {
    "gated": lambda: Gated(width=D_MODEL, hidden=D_FF),
    "plain": lambda: ActivatedMLP(D_MODEL, D_FF),
    "odd": lambda: ActivatedMLP(36, 100),
}


class Layer:
    """Operands of a layer: weights packed both ways, biases, and how its four tensors are cast."""

    def __init__(self, device, gated, full):
        self.device, self.gated, self.full, self.rows = device, gated, full, 2 * D_FF if gated else D_FF
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.generator = torch.Generator().manual_seed(0)
        (self.up, self.up_t), (self.down, self.down_t) = self.weight(self.rows, D_MODEL), self.weight(D_MODEL, D_FF)
        self.x, self.dy = self.randn(TOKENS, D_MODEL), self.randn(TOKENS, D_MODEL)
        self.biases, self.seeds = (self.randn(self.rows), self.randn(D_MODEL)), ops.draw_seeds(self.x, 2)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def weight(self, rows, cols):
        w, scale, amax = self.randn(rows, cols), torch.tensor([2.0**-6], device=self.device), self.cast(0)[1]
        forms = float8.empty_packed_float8(rows, cols, self.device)
        float8.pack_float8_(True, [w], [ops.transposable_mask(w)], [[t] for t in forms], [scale], [amax])
        return (*forms[:2], scale), (*forms[2:], scale)

    def cast(self, exponent):
        scale = torch.tensor([2.0**exponent], device=self.device)
        return scale, torch.zeros(1, device=self.device), torch.zeros(3, dtype=torch.int64, device=self.device)

    def forward(self, casts):
        settings = ("silu", self.gated), self.biases, (self.full, True, True)
        return feed_forward_float8(self.x, self.up, self.down, *settings, casts)

    def saved(self):
        casts = self.cast(-6), self.cast(-4)
        _, gate_up, x8_t, h = self.forward(casts)
        return gate_up, (x8_t if self.full else self.x, casts[0][0]), (h, casts[1][0])


def noting(cast):
    return dict(amax=cast[1], counts=cast[2])


def product(x8, cast, weight, like, bias=None):
    return float8.sparse_mm_float8(x8, cast[0], *weight, weight[0].shape[0], bias=bias, out_dtype=like.dtype)


def assert_same(found, expected):
    for ours, parts in zip(found, expected, strict=True):
        assert ours.dtype == parts.dtype and torch.equal(*(t.view(torch.uint8) for t in (ours, parts)))


@pytest.mark.parametrize("full", [True, False], ids=["fp8", "hybrid"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_forward_is_its_four_parts(device, gated, full):
    layer = Layer(device, gated, full)
    (of_x, of_h), casts = (layer.cast(-6), layer.cast(-4)), (layer.cast(-6), layer.cast(-4))
    x8, x8_t = float8.quantize(layer.x, of_x[0], transposed=full, **noting(of_x))
    gate_up = product(x8, of_x, layer.up, layer.x, layer.biases[0])
    settings = dict(gated=gated, keep_h=not full, transposed=full)
    h, h8, h8_t = float8.activation_quantize(gate_up, "silu", of_h[0], **settings, **noting(of_h))
    y = product(h8, of_h, layer.down, layer.x, layer.biases[1])
    assert_same(layer.forward(casts), (y, gate_up, x8_t, h8_t if full else h))
    assert_same([*casts[0], *casts[1]], [*of_x, *of_h])
    assert all(amax > 0 and counts[2] > 0 for _, amax, counts in casts)


@pytest.mark.parametrize("adds", [True, False], ids=["added", "new"])
@pytest.mark.parametrize("full", [True, False], ids=["fp8", "hybrid"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_backward_is_its_six_parts(device, gated, full, adds):
    layer = Layer(device, gated, full)
    gate_up, *inputs = layer.saved()
    (of_dy, of_d), casts = (layer.cast(-6), layer.cast(-6)), (layer.cast(-6), layer.cast(-6))
    shapes = (layer.rows, D_MODEL), (D_MODEL, D_FF)
    before = [torch.ones(shape, device=device) if adds else None for shape in shapes]

    settings = dict(float8=full, bias_grad=True)
    *pruned_dy, dy8, db_down = float8.mvue_quantize(layer.dy, layer.seeds[0], of_dy[0], **settings, **noting(of_dy))
    dh = product(dy8, of_dy, layer.down_t, layer.x)
    *pruned_d, d8, db_up = float8.activation_backward_quantize(
        dh, gate_up, "silu", layer.seeds[1], of_d[0], gated=gated, **settings, **noting(of_d)
    )
    weights = []
    for (rows, cols), (packed, E), (kept, kept_scale), cast in zip(
        shapes, (pruned_d, pruned_dy), inputs, (of_d, of_dy), strict=True
    ):
        out = torch.ones(rows, cols, device=device) if adds else torch.empty(rows, cols, device=device)
        if full:
            float8.grad_weight_float8_(packed, E, cast[0], kept, kept_scale, out, adds)
        else:
            ops.sparse_mm_grad_weight(packed, E, kept, rows, out=out, accumulate=adds)
        weights.append(out)
    dx = product(d8, of_d, layer.up_t, layer.x)

    versions = [t._version for t in before] if adds else []
    found = feed_forward_float8_backward(
        layer.dy, (gate_up, *inputs), layer.up_t, layer.down_t, layer.seeds, ("silu", gated), casts,
        BackwardOptions(0, True, True, True, torch.float32), before,
    )  # fmt: skip
    assert_same((found[0], *(before if adds else found[1:3]), *found[3:]), (dx, *weights, db_up, db_down))
    assert_same([*casts[0], *casts[1]], [*of_dy, *of_d])
    if adds:
        assert all(t._version > version for t, version in zip(before, versions, strict=True))
        assert all(t.numel() == 0 for t in found[1:3])


@pytest.mark.parametrize("full", [True, False], ids=["fp8", "hybrid"])
def test_what_nobody_needs_is_empty(device, full):
    layer = Layer(device, True, full)
    settings = ("silu", True), (None, None), (full, False, False)
    casts = (layer.cast(-6)[0], None, None), (layer.cast(-4)[0], None, None)
    _, _, x8_t, h = feed_forward_float8(layer.x, layer.up, layer.down, *settings, casts)
    assert x8_t.numel() == h.numel() == 0
    wanted = BackwardOptions(0, False, False, False, torch.float32)
    operands = (layer.dy, layer.saved(), layer.up_t, layer.down_t, layer.seeds, ("silu", True), casts, wanted)
    dx, d_up, d_down, *biases = feed_forward_float8_backward(*operands, (None, None))
    assert all(t.numel() == 0 for t in (dx, *biases)) and d_up.dtype == d_down.dtype == torch.float32


def test_a_drawn_seed_follows_the_generator(device):
    layer = Layer(device, True, True)
    saved, casts, wanted = layer.saved(), (layer.cast(-6),) * 2, BackwardOptions(3, True, False, False, torch.float32)
    torch.manual_seed(0)
    seeds = ops.draw_seeds(layer.x, 2, 3)
    torch.manual_seed(0)
    drawn, given = (
        feed_forward_float8_backward(
            layer.dy, saved, layer.up_t, layer.down_t, seed, ("silu", True), casts, wanted, (None, None)
        )
        for seed in (None, seeds)
    )
    assert_same(drawn, given)


FORWARD_FAULTS = {
    "x": (lambda layer: setattr(layer, "x", layer.x[:, :32]), "packed must be contiguous e4m3"),
    "packed": (lambda layer: setattr(layer, "down", layer.up), "packed must be contiguous e4m3"),
    "bias": (lambda layer: setattr(layer, "biases", (layer.biases[1], None)), "bias must be floating of shape"),
    "scale": (lambda layer: setattr(layer, "up", (*layer.up[:2], layer.x)), "must be one float32"),
    "list": (lambda layer: setattr(layer, "up", layer.up[:2]), "up must be a tuple"),
}


@pytest.mark.parametrize("wrong", FORWARD_FAULTS)
def test_forward_refuses_what_does_not_fit(device, wrong):
    layer, (spoil, words) = Layer(device, False, True), FORWARD_FAULTS[wrong]
    spoil(layer)
    cast = layer.cast(-6)
    with pytest.raises(Sparse24Error, match=words):
        layer.forward((cast, cast))
    assert cast[1] == 0, "noted before it was refused"


@pytest.mark.parametrize("full", [True, False], ids=["fp8", "hybrid"])
@pytest.mark.parametrize("wrong", ["tokens", "width", "dtype", "input", "seeds", "packed", "into", "amax"])
def test_backward_refuses_what_does_not_fit(device, wrong, full):
    layer = Layer(device, True, full)
    gate_up, of_x, of_h = layer.saved()
    dy, seeds, forms, casts, into = layer.dy, layer.seeds, layer.up_t, [layer.cast(-6), layer.cast(-6)], None
    if wrong == "tokens":
        dy = dy[:-8]
    elif wrong == "width":
        gate_up = gate_up[:, :D_FF].contiguous()
    elif wrong == "dtype":
        gate_up = gate_up.double()
    elif wrong == "input":
        of_x = (of_x[0][:-8], of_x[1])
    elif wrong == "seeds":
        seeds = seeds.T
    elif wrong == "packed":
        forms = layer.down_t
    elif wrong == "into":
        into = torch.zeros(D_MODEL, D_FF + 4, device=device)
    else:
        casts[1] = (casts[1][0], torch.zeros(2, device=device), None)
    options = BackwardOptions(0, True, False, False, torch.float32)
    with pytest.raises(Sparse24Error):
        feed_forward_float8_backward(
            dy, (gate_up, of_x, of_h), forms, layer.down_t, seeds, ("silu", True), casts, options, (None, into)
        )


# ---- layers ---------------------------------------------------------------------------------------------------------


class Called(TorchDispatchMode):
    """Notes the ops of this package that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sparse24":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


BY_ONE_OP = ["feed_forward_float8", "feed_forward_float8_backward"]


def by_parts(monkeypatch):
    """From here on layers are put together from single ops."""
    monkeypatch.setattr(functional, "_forward_by_one_op", functional._forward_by_parts)
    monkeypatch.setattr(functional, "_trains_plainly", lambda ctx, plan: False)


def started(make, precision, device, dtype=torch.float32, **settings):
    """A block whose scales are known, its optimizer and its recipe."""
    torch.manual_seed(0)
    root = nn.ModuleDict({"mlp": BLOCKS[make]()}).to(device, dtype)
    assert set(sparse24.sparsify(root, precision=precision, backend="sparse", **settings).fused.values()) == {""}
    block = root["mlp"]
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-2)
    recipe = sparse24.Recipe(block, optimizer, total_steps=100, dense_fraction=0, count_casts=True)
    block(torch.randn(48, next(block.parameters()).shape[1], device=device, dtype=dtype)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return block, optimizer, recipe


def run(block, optimizer, recipe, change=lambda block, x: None, around=lambda block, x: block(x), calls=2):
    """(all that a step makes, the ops that its last pass has called): results, gradients, scales and what they note."""
    torch.manual_seed(1)
    like, results = next(block.parameters()), []
    x = torch.randn(2, 20, like.shape[1]).to(like).requires_grad_()
    change(block, x)
    for _ in range(calls):
        with Called() as called:
            y = around(block, x)
            y.sin().sum().backward()
        results.append(y.detach())
    results += [t.grad.clone() for t in (x, *block.parameters()) if t.grad is not None]
    layers = [layer for layer in block.modules() if isinstance(layer, sparse24.SparseLinear)]
    noted = [layer._buffers[name].clone() for layer in layers for name in ALL_BUFFERS]
    optimizer.step()
    return results + noted + [layer._buffers[name] for layer in layers for name in ALL_BUFFERS], called.names


def frozen(block, x):
    for p in [*block.parameters()][:2]:
        p.requires_grad_(False)


def spoiled(value):
    def change(block, x):
        with torch.no_grad():
            x[0, 3, 5] = value

    return change


def checkpointed(reentrant):
    return lambda block, x: checkpoint(block, x, use_reentrant=reentrant)


def autocast(block, x):
    with torch.autocast(x.device.type, torch.bfloat16):
        return block(x)


WAYS = {
    "plain": {},
    "without x": dict(change=lambda block, x: x.requires_grad_(False)),
    "inf": dict(change=spoiled(torch.inf)),
    "nan": dict(change=spoiled(torch.nan)),
    "huge": dict(change=spoiled(1e30)),
    "autocast": dict(around=autocast),
    "checkpoint": dict(around=checkpointed(False)),
    "reentrant": dict(around=checkpointed(True)),
    "frozen": dict(change=frozen),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("make", BLOCKS)
def test_a_layer_by_one_op_is_the_layer_by_its_parts(device, make, precision, way, monkeypatch):
    """Results, gradients of two micro-batches, largest magnitudes and counts, and the scales of the next step."""
    dtype = torch.float32 if device == "cpu" or way == "autocast" else torch.bfloat16
    found, called = run(*started(make, precision, device, dtype), **WAYS[way])
    by_parts(monkeypatch)
    expected, single = run(*started(make, precision, device, dtype), **WAYS[way])
    assert_same(found, expected)
    if way == "frozen":
        assert called[0] == BY_ONE_OP[0] and BY_ONE_OP[1] not in called
    elif way in ("checkpoint", "reentrant"):
        assert called == [BY_ONE_OP[0], *BY_ONE_OP]
    else:
        assert called == BY_ONE_OP
    assert not {*single} & {*BY_ONE_OP}


@pytest.mark.parametrize("precision", MODES)
def test_layers_with_another_backward_run_by_single_ops(precision):
    for settings in (dict(mvue=False), {}):
        torch.manual_seed(0)
        root = nn.ModuleDict({"mlp": BLOCKS["gated"]()})
        sparse24.sparsify(root, precision=precision, **settings)
        with Called() as called:  # without a step, whose scales it could know
            root["mlp"](torch.randn(40, D_MODEL)).sum().backward()
        assert not {*called.names} & {*BY_ONE_OP}


@pytest.mark.parametrize("precision", MODES)
def test_weights_of_two_dtypes_get_gradients_in_theirs(precision):
    block, *others = started("gated", precision, "cpu")
    block.down_proj.bfloat16()
    called = run(block, *others, around=autocast)[1]
    assert called[0] == BY_ONE_OP[0] and BY_ONE_OP[1] not in called
    assert all(p.grad.dtype == p.dtype and p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("precision", MODES)
def test_compiled_graphs_have_one_op_each_way(precision):
    block, *_ = started("gated", precision, "cpu")
    called = []

    def note(graph, _):
        nodes = graph.graph.nodes
        targets = [node.args[0] if "auto_functionalized" in str(node.target) else node.target for node in nodes]
        called.extend(target._opname for target in targets if getattr(target, "namespace", "") == "sparse24")
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        block, fullgraph=True, backend=aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    )
    compiled(torch.randn(40, D_MODEL, requires_grad=True)).sum().backward()
    assert called == BY_ONE_OP
