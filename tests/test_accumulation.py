"""Gradients of later micro-batches: the product adds them to `.grad`, and only where autograd would do just that."""

import threading

import pytest
import torch
from rounding import ANOTHER_ORDER
from tiny_models import Gated, Plain
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import SparseLinear, functional, ops
from sparse24.functional import accumulation
from sparse24.ops.gemm import weight_gradient


@pytest.fixture
def added(monkeypatch):
    """Shapes of the gradients that products have added to in place."""
    shapes = []
    original = weight_gradient._compute_into

    def watch(pruning, operand, other, out, accumulate, decay):
        if accumulate:
            shapes.append(tuple(out.shape))
        return original(pruning, operand, other, out, accumulate, decay)

    monkeypatch.setattr(weight_gradient, "_compute_into", watch)
    return shapes


def block(make=Gated, **settings):
    root = nn.ModuleDict({"mlp": make()})
    sparse24.sparsify(root, **settings)
    return root["mlp"]


def linear(**settings):
    torch.manual_seed(0)
    return SparseLinear(32, 64, **settings)


def train(module, width, calls=3, seed=0):
    """Sums of gradients over a few micro-batches, with the same inputs and the same noise at each call."""
    torch.manual_seed(seed)
    for _ in range(calls):
        module(torch.randn(16, width, requires_grad=True)).sin().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("mvue", [True, False])
@pytest.mark.parametrize(
    "make, width, shapes",
    [
        (lambda **s: linear(**s), 32, {(64, 32)}),
        (lambda **s: block(Gated, **s), 32, {(128, 32), (32, 64)}),
        (lambda **s: block(Plain, **s), 16, {(32, 16), (16, 32)}),
    ],
    ids=["linear", "gated", "plain"],
)
def test_sums_are_those_of_autograd_and_made_by_the_product(make, width, shapes, mvue, added, monkeypatch):
    module = make(mvue=mvue)
    sums = train(module, width)
    assert set(added) == (shapes if mvue else set())
    assert len(added) == (2 * len(shapes) if mvue else 0)  # the first micro-batch has nothing to add to
    for p in module.parameters():
        p.grad = None
    monkeypatch.setattr(accumulation, "_nobody_watches", lambda leaf: False)
    for ours, autograds in zip(sums, train(module, width), strict=True):
        torch.testing.assert_close(ours, autograds, **ANOTHER_ORDER)


def test_a_gradient_stays_where_it_is():
    """Its address, since DDP's buckets, CUDA graphs and flat optimizers know it."""
    module = block()
    train(module, 32, 1)
    before = [(p.grad.data_ptr(), p.grad._version) for p in module.parameters()]
    train(module, 32, 1)
    after = [(p.grad.data_ptr(), p.grad._version) for p in module.parameters()]
    assert [a for a, _ in before] == [a for a, _ in after]
    assert all(new > old for (_, old), (_, new) in zip(before, after, strict=True))


def test_16_bit_sums_are_rounded_once():
    """In fp32 and with one rounding: nearer to the exact sum than what autograd would add up."""
    layer = linear(dtype=torch.bfloat16, mvue=False)
    layer.mvue, x, dy = True, torch.randn(64, 32, dtype=torch.bfloat16), torch.randn(64, 64, dtype=torch.bfloat16)
    seed = ops.draw_seed(x)
    packed, E = ops.mvue_compress(dy, seed)
    start = torch.randn(64, 32, dtype=torch.bfloat16)
    product = ops.sparse_mm_grad_weight(packed, E, x, 64, out_dtype=torch.float32)
    layer.weight.grad = start.clone()
    functional.sparse_linear(x, layer.weight, layer.packed, layer.E, layer.packed_t, layer.E_t, seed=seed).backward(dy)
    assert torch.equal(layer.weight.grad, (start.float() + product).bfloat16())


@pytest.mark.parametrize(
    "watch",
    [
        lambda w: w.register_hook(lambda grad: seen.append(grad.shape)),
        lambda w: w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape)),
    ],
    ids=["hook", "post-accumulate"],
)
def test_hooks_on_a_parameter_see_every_gradient(watch, added):
    seen.clear()
    layer = linear(bias=False)
    watch(layer.weight)
    train(layer, 32)
    assert seen == [(64, 32)] * 3 and added == []


seen: list = []


def test_asking_for_gradients_leaves_those_that_are_there_alone(added):
    layer, other = linear(), linear()
    train(layer, 32, 1)
    before = layer.weight.grad.clone()
    x = torch.randn(16, 32, requires_grad=True)

    def loss(of):
        torch.manual_seed(1)  # the same noise in each gradient
        return of(x).sin().sum()

    loss(other).backward()
    (gradient,) = torch.autograd.grad(loss(layer), [layer.weight])
    assert torch.equal(gradient, other.weight.grad)
    torch.autograd.grad(loss(layer), [x])
    loss(layer).backward(inputs=[x])
    assert torch.equal(layer.weight.grad, before) and added == []
    loss(layer).backward(inputs=[layer.weight])
    torch.testing.assert_close(layer.weight.grad, before + gradient, **ANOTHER_ORDER)
    assert added == [(64, 32)]


def test_not_under_torch_distributed(added, monkeypatch):
    """DDP and FSDP2 hang their reductions on autograd's addition."""
    layer = linear()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    train(layer, 32)
    assert added == []


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
def test_gradients_of_another_dtype_or_layout_are_left_to_autograd(added):
    layer = linear(bias=False)
    layer.weight.grad = torch.zeros(32, 64).t()
    (ours,), (theirs,) = train(layer, 32, 1), train(linear(bias=False), 32, 1)
    assert added == [] and torch.equal(ours, theirs)


def test_gate_and_up_with_gradients_of_their_own_are_left_to_autograd(added):
    """One product makes both: only gradients that lie side by side can take it."""
    module = block()
    expected = train(module, 32, 1)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    assert all(map(torch.equal, train(module, 32, 1), expected)) and added == [(32, 64)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing(reentrant):
    """Forward runs again in backward; the sums are the same."""
    module = block(mvue=False)
    plain = train(module, 32, 2)
    for p in module.parameters():
        p.grad = None
    torch.manual_seed(0)
    for _ in range(2):
        x = torch.randn(16, 32, requires_grad=True)
        checkpoint(module, x, use_reentrant=reentrant).sin().sum().backward()
    for p, expected in zip(module.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_a_weight_used_twice_gets_both_gradients():
    layer = linear(mvue=False)
    x = torch.randn(16, 32)
    (single,) = torch.autograd.grad(layer(x).sum(), [layer.weight])
    layer.weight.grad = torch.zeros_like(layer.weight)
    (layer(x).sum() + layer(x).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, 2 * single)


@pytest.mark.parametrize("places", [(64, 0), (0, 80), (0, 64)], ids=["swapped", "apart", "adjacent"])
def test_gradients_in_one_flat_buffer_are_added_to_where_they_lie(added, places):
    """A product for gate and up may take both at once only if up's rows follow gate's, with nothing in between."""
    module = block(mvue=False)
    expected = train(module, 32, 1)
    layers = (module.gate_proj, module.up_proj)
    rows, cols = module.gate_proj.weight.shape
    flat = torch.full(((rows + max(places)) + 16, cols), 3.0)
    module.down_proj.weight.grad = torch.full_like(module.down_proj.weight, 3.0)
    for layer, start in zip(layers, places, strict=True):
        layer.weight.grad = flat[start : start + rows]
    for layer in (*layers, module.down_proj):
        layer.mvue = True
    rest = torch.ones(len(flat), dtype=torch.bool)
    for start in places:
        rest[start : start + rows] = False
    module.gate_proj.mvue = module.up_proj.mvue = module.down_proj.mvue = False
    train(module, 32, 1)
    for p, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient + 3, **ANOTHER_ORDER)
    assert (flat[rest] == 3).all()


@pytest.mark.parametrize("places, fits", [((0, 64), True), ((64, 0), False), ((0, 80), False)])
def test_a_stacked_target_has_nothing_foreign_in_it(places, fits, monkeypatch):
    monkeypatch.setattr(accumulation, "_nobody_watches", lambda leaf: True)
    flat = torch.zeros(160, 32)
    leaves = [torch.nn.Parameter(torch.zeros(64, 32)) for _ in places]
    for leaf, start in zip(leaves, places, strict=True):
        leaf.grad = flat[start : start + 64]
    target = accumulation.stacked_target(leaves, torch.float32)
    assert (target is not None) == fits
    if fits:
        assert target.shape == (128, 32) and target.data_ptr() == flat.data_ptr()


@pytest.mark.fault(34)
def test_threads_that_share_a_weight_lose_no_gradient(monkeypatch):
    """On whole numbers sums are exact in any order. Autograd adds under a lock; a product has none."""
    layer, original, targets = SparseLinear(64, 64, bias=False, mvue=False), accumulation.target, []
    xs = torch.randint(-8, 9, (4, 16, 64)).float()
    layer(xs[0]).sum().backward()
    layer.weight.grad.zero_()

    def watch(leaf, dtype):
        targets.append(original(leaf, dtype))
        return targets[-1]

    def work(x):
        for _ in range(50):
            layer(x).sum().backward()

    monkeypatch.setattr(accumulation, "target", watch)
    threads = [threading.Thread(target=work, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(layer.weight.grad, 50 * xs.sum((0, 1)).expand(64, 64)) and targets == [None] * 200
    layer(xs[0]).sum().backward()
    assert targets[-1] is layer.weight.grad, "one thread again"


@pytest.mark.fault(105)
def test_hooks_of_a_weight_get_every_gradient_and_those_of_its_node_the_first():
    """A node does not show its hooks, so that no product can make way for them."""
    layer, x = SparseLinear(64, 64, bias=False, mvue=False), torch.randn(16, 64)
    of_node, of_weight = [], []
    node = torch.autograd.graph.get_gradient_edge(layer.weight).node  # gone, with its hooks, once nobody holds it
    node.register_prehook(lambda g: of_node.append(g[0] is None))
    for _ in range(2):
        layer(x).sum().backward()
    assert of_node == [False, True]
    layer.weight.register_hook(lambda g: of_weight.append(g.clone()))
    layer.weight.register_post_accumulate_grad_hook(lambda p: of_weight.append(p.grad.clone()))
    before = layer.weight.grad.clone()
    layer(x).sum().backward()
    assert of_node == [False, True, False] and torch.equal(of_weight[1], before + of_weight[0])
