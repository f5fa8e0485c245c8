"""functional.sparse_activation_mlp: values and gradients of a layer whose activation is the 2:4 operand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Sparse24DtypeError, Sparse24Error, functional, ops
from sparse24.testing import assert_as_accurate, assert_same_bits

NAMES = ("x", "up", "down", "bias_up", "bias_down")


@pytest.fixture
def dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def make(device, dtype, tokens=(3, 11), d_model=32, d_ff=64, biases=True):
    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    made = {"x": draw(*tokens, d_model), "up": draw(d_ff, d_model), "down": draw(d_model, d_ff)}
    return made | ({"bias_up": draw(d_ff), "bias_down": draw(d_model)} if biases else {})


def run(t, kind="squared_relu", **settings):
    biases = {name: t.get(name) for name in ("bias_up", "bias_down")}
    return functional.sparse_activation_mlp(t["x"], t["up"], t["down"], kind, **biases, **settings)


def kept(u):
    """Written out: of each four the two that are larger than all but one, of equal ones the first."""
    r = u.clamp(min=0).unflatten(-1, (-1, 4))
    rank = torch.zeros_like(r)
    for i in range(4):
        for j in range(4):
            ahead = r[..., j] > r[..., i] if j >= i else r[..., j] >= r[..., i]
            rank[..., i] += ahead
    return (rank < 2).flatten(-2)


def by_hand(t, kind):
    """y and the gradients of y's sum against `dy`, of the pruned function; mask and u in the dtype of the tensors."""
    wide = {name: tensor.detach().double() for name, tensor in t.items()}
    u16 = F.linear(t["x"], t["up"], t.get("bias_up")).detach()
    leaves = {name: tensor.requires_grad_() for name, tensor in wide.items()}
    u = F.linear(leaves["x"], leaves["up"], leaves.get("bias_up"))
    act = F.relu(u).square() if kind == "squared_relu" else F.relu(u)
    y = F.linear(torch.where(kept(u16), act, 0), leaves["down"], leaves.get("bias_down"))
    return y, leaves


def by_torch(t, kind):
    """The same by torch's own ops in the dtype of the tensors: what errors are measured by."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in t.items()}
    u = F.linear(leaves["x"], leaves["up"], leaves.get("bias_up"))
    act = F.relu(u).square() if kind == "squared_relu" else F.relu(u)
    return F.linear(torch.where(kept(u.detach()), act, 0), leaves["down"], leaves.get("bias_down")), leaves


@pytest.mark.parametrize("kind", ["squared_relu", "relu"])
@pytest.mark.parametrize(
    "tokens, d_model, d_ff", [((3, 11), 32, 64), ((130,), 20, 72), ((8,), 12, 4), ((1, 1), 64, 128)]
)
def test_value_and_gradients_are_those_of_the_pruned_function(device, dtype, kind, tokens, d_model, d_ff):
    """Weight gradients are so on average over draws, and in each where no group of four tokens has more than two
    non-zeros, which MVUE keeps as they are. So every other token is silent here.
    """
    torch.manual_seed(0)
    t = make(device, dtype, tokens, d_model, d_ff)
    quiet = torch.zeros(t["x"].shape[:-1], dtype=torch.bool, device=device).view(-1)
    quiet[1::2] = True
    with torch.no_grad():
        t["bias_up"].zero_()
        t["x"].view(-1, d_model)[quiet] = 0  # u = 0: nothing is kept of these
    y = run(t, kind)
    exact, leaves = by_hand(t, kind)
    plain, others = by_torch(t, kind)
    assert_as_accurate(y, plain, exact)
    dy = torch.randn_like(y)
    y.backward(dy), exact.backward(dy.double()), plain.backward(dy)
    for name in t:
        assert_as_accurate(t[name].grad, others[name].grad, leaves[name].grad)


def test_weight_gradients_are_right_on_average(device):
    """The mean of 512 draws lies within 6 standard errors of the gradient of the pruned function."""
    torch.manual_seed(1)
    t = make(device, torch.float32 if device == "cpu" else torch.bfloat16, (16,), 8, 8, biases=False)
    dy = torch.randn(16, 8, device=device)
    exact, leaves = by_hand(t, "squared_relu")
    wanted = torch.autograd.grad(exact, (leaves["up"], leaves["down"]), dy.double())
    draws = 512
    sums = [torch.zeros_like(w) for w in wanted]
    squares = [torch.zeros_like(w) for w in wanted]
    for _ in range(draws):
        y = run(t)
        for i, grad in enumerate(torch.autograd.grad(y, (t["up"], t["down"]), dy.to(y.dtype))):
            sums[i] += grad.double()
            squares[i] += grad.double().square()
    for total, square, mean in zip(sums, squares, wanted, strict=True):
        variance = (square / draws - (total / draws).square()).clamp(min=0)
        # four roundings of operands and results, each by half a unit of the largest, on either side
        rounding = 4 * torch.finfo(t["x"].dtype).eps * mean.abs().max()
        assert ((total / draws - mean).abs() <= 6 * (variance / draws).sqrt() + rounding).all()


def test_seeds_rule_the_draws(device, dtype):
    torch.manual_seed(2)
    t = make(device, dtype)
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)

    def gradients(**settings):
        y = run(t, **settings)
        return torch.autograd.grad(y.float().sum(), (t["up"], t["down"]))

    for first, second in zip(gradients(seed=seeds), gradients(seed=seeds), strict=True):
        assert_same_bits(first, second)
    other = gradients(seed=seeds.flip(0))
    assert any(not torch.equal(a, b) for a, b in zip(gradients(seed=seeds), other, strict=True))
    torch.manual_seed(3)
    first = gradients()
    torch.manual_seed(3)
    for a, b in zip(first, gradients(), strict=True):
        assert_same_bits(a, b)
    torch.manual_seed(3)
    assert any(not torch.equal(a, b) for a, b in zip(first, gradients(rank=1), strict=True))


@pytest.mark.parametrize("wanted", [("x",), ("up",), ("down",), ("bias_up",), ("bias_down",), ("x", "down"), NAMES])
def test_only_wanted_gradients_are_made_and_each_is_the_same(device, dtype, wanted):
    torch.manual_seed(4)
    t = make(device, dtype)
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    dy = torch.randn_like(run(t))
    all_of_them = dict(zip(NAMES, torch.autograd.grad(run(t, seed=seeds), [t[n] for n in NAMES], dy), strict=True))
    for name in NAMES:
        t[name].requires_grad_(name in wanted)
    y = run(t, seed=seeds)
    y.backward(dy)
    for name in NAMES:
        if name in wanted:
            assert_same_bits(t[name].grad, all_of_them[name])
        else:
            assert t[name].grad is None


def test_gradients_of_micro_batches_add_up(device, dtype):
    torch.manual_seed(5)
    t = make(device, dtype, biases=False)
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    y = run(t, seed=seeds)
    once = torch.autograd.grad(y.float().sum(), (t["up"], t["down"]))
    for _ in range(2):
        run(t, seed=seeds).float().sum().backward()
    for name, grad in zip(("up", "down"), once, strict=True):
        assert_as_accurate(t[name].grad, grad + grad, 2 * grad.double())


def test_checkpointing_draws_alike(device, dtype):
    t = make(device, dtype)
    torch.manual_seed(6)
    run(t, training=True).float().sum().backward()
    plain = {name: tensor.grad for name, tensor in t.items()}
    for tensor in t.values():
        tensor.grad = None
    torch.manual_seed(6)
    checkpoint(lambda: run(t, training=True), use_reentrant=False).float().sum().backward()
    assert_same_bits(t["down"].grad, plain["down"])  # h is drawn in forward, which runs twice from one state
    for name in ("x", "bias_up", "bias_down"):
        assert_same_bits(t[name].grad, plain[name])


def test_autocast_casts_and_fp32_weights_get_fp32_gradients(device):
    torch.manual_seed(7)
    t = make(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y = run(t)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(t[name].grad.dtype == torch.float32 for name in t)
    half = {name: tensor.detach().bfloat16() for name, tensor in t.items()}
    assert_same_bits(y, run(half))


def test_without_gradients_nothing_is_drawn(device, dtype):
    t = make(device, dtype)
    torch.manual_seed(8)
    before = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    with torch.no_grad():
        y = run(t)
    after = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(before, after) and not y.requires_grad
    assert_same_bits(y, run(t).detach())


def test_compiled_it_is_the_same(device, dtype):
    torch.compiler.reset()
    torch.manual_seed(9)
    t = make(device, dtype)
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    eager = run(t, seed=seeds)
    compiled = torch.compile(lambda: run(t, seed=seeds), fullgraph=True)()
    exact, _ = by_hand(t, "squared_relu")
    assert_as_accurate(compiled, eager, exact)


def test_kept_activations_are_what_the_function_keeps(device, dtype):
    torch.manual_seed(10)
    t = make(device, dtype, biases=False)
    u = F.linear(t["x"], t["up"]).detach()
    h = F.relu(u).square()
    packed, E, *_ = ops.activation_compress(u.view(-1, 64), "squared_relu")
    dense = ops.decompress(packed, E, *u.view(-1, 64).shape).view(h.shape)
    assert_same_bits(torch.where(functional.kept_activations(u), h, 0) + 0.0, dense)


def test_it_says_what_does_not_fit(device, dtype):
    t = make(device, dtype)
    with pytest.raises(Sparse24Error, match="relu or squared_relu.*other activations make no zeros"):
        run(t, "gelu")
    with pytest.raises(Sparse24Error, match=r"up must be \(d_ff, d_model\) and down \(d_out, d_ff\)"):
        run(t | {"down": t["up"]})
    with pytest.raises(Sparse24DtypeError, match="bias"):
        run(t | {"bias_up": t["bias_up"].double()})
    odd = make(device, dtype, (4,), 8, 6)
    with pytest.raises(Sparse24Error, match="multiples of 4"):
        run(odd)
    with pytest.raises(Sparse24Error, match="second derivatives"):
        (grad,) = torch.autograd.grad(run(t).float().sum(), t["x"], create_graph=True)
        grad.sum().backward()
    with pytest.raises(Sparse24Error, match="torch.func"):
        torch.vmap(lambda x: run(t | {"x": x}))(t["x"])


# ---- whole blocks ---------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, width=32, hidden=64):
        super().__init__()
        self.up_proj = torch.nn.Linear(width, hidden, bias=False)
        self.down_proj = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


#: the ops of a training step of one block: a layer that ran one by one would have none of them
STEP = {
    None: {
        "activation_compress",
        "sparse_mm_input",
        "activation_backward_compress",
        "sparse_mm_grad_input_output",
        "sparse_mm_grad_weight",
        "sparse_mm_grad_weight_input",
    },
    "fp8": {
        "activation_compress_float8",
        "sparse_mm_input_float8",
        "activation_backward_compress_float8",
        "grad_weight_float8_",
        "grad_weight_of_input_float8_",
    },
}


@pytest.mark.parametrize("precision", STEP)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_of_fp32_weights_under_autocast_runs_by_the_sparse_products(device, compiled, precision):
    """Pruning between layers that run one by one computes the same, densely: only the ops tell."""
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.LayerNorm(32), Block()).to(device)
    sparse24.sparsify(model, operand="activation", backend="sparse", precision=precision)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(2, 32, 32, device=device)

    def step():
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            y = run(x)
        y.float().sum().backward()

    step()  # compilers are done by then
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    seen = {event.key.removeprefix("sparse24::") for event in profile.key_averages()}
    assert seen >= STEP[precision]
