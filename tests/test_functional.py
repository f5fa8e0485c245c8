"""Differentiable functions: the right gradients, only those asked for, and honest refusals."""

from __future__ import annotations

import pytest
import torch
from rounding import ORDER

from sparse24 import Sparse24DtypeError, Sparse24Error, functional, ops, reference
from sparse24.functional import weight_gradient
from sparse24.testing import assert_as_accurate, assert_same_bits


@pytest.fixture
def dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def make_layer(device, dtype, in_features=64, out_features=48, tokens=24, bias=True):
    x = torch.randint(-3, 4, (tokens, in_features)).to(device, dtype).requires_grad_()
    w = torch.randint(-3, 4, (out_features, in_features)).to(device, dtype).requires_grad_()
    b = torch.randint(-3, 4, (out_features,)).to(device, dtype).requires_grad_() if bias else None
    mask, *packed = ops.prune_compress(w.detach(), dtype)
    masked = w.detach().masked_fill(~ops.unpack_mask(mask), 0)
    return x, w, b, packed, masked


def test_gradients_are_straight_through_and_exact_without_mvue(device, dtype):
    x, w, b, packed, masked = make_layer(device, dtype)
    y = functional.sparse_linear(x, w, *packed, b, mvue=False)
    assert torch.equal(y, torch.nn.functional.linear(x, masked, b))
    dy = torch.randint(-3, 4, y.shape).to(device, dtype)
    y.backward(dy)
    assert torch.equal(x.grad, dy @ masked)
    assert torch.equal(w.grad, (dy.T @ x.detach()))  # every entry, pruned ones too
    assert torch.equal(b.grad, dy.sum(0))


def test_mvue_gradient_is_that_of_the_seed(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    seed = torch.tensor([5, 6], device=device)
    y = functional.sparse_linear(x, w, *packed, b, seed=seed)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = ops.sparse_mm_grad_weight(*ops.mvue_compress(dy, seed), x.detach(), w.shape[0])
    assert_same_bits(w.grad, expected, "dW")


@pytest.mark.fault(78)
def test_noise_follows_the_torch_generator(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    dy = torch.randn(x.shape[0], w.shape[0], device=device, dtype=dtype)

    def gradient(manual_seed, rank=0):
        torch.manual_seed(manual_seed)
        return torch.autograd.grad(functional.sparse_linear(x, w, *packed, b, rank=rank), w, dy)[0]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))
    assert not torch.equal(gradient(1), gradient(1, rank=1))


@pytest.mark.fault(55)
def test_each_backward_draws_new_noise(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    y = functional.sparse_linear(x, w, *packed, b)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, w, dy, retain_graph=True)[0]
    assert not torch.equal(first, torch.autograd.grad(y, w, dy)[0])


@pytest.mark.fault(20)
def test_broadcast_gradients_keep_their_scale(device, dtype):
    x, w, b, packed, masked = make_layer(device, dtype)
    (3.0 * functional.sparse_linear(x, w, *packed, b, mvue=False).sum()).backward()
    assert torch.equal(x.grad, (3 * masked.float().sum(0)).to(dtype).expand_as(x))
    assert torch.equal(b.grad, torch.full_like(b, 3.0 * x.shape[0]))
    x.grad = None
    loss = functional.sparse_linear(x, w, *packed, b).mean() * 1024.0
    loss.backward()
    scale = 1024.0 / (x.shape[0] * w.shape[0])
    expected, reach = (masked.double().sum(0) * scale).expand(x.shape), masked.double().abs().sum(0).max() * scale
    torch.testing.assert_close(x.grad.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=ORDER * reach.item())


@pytest.mark.fault(21)
def test_gradients_that_are_not_contiguous_are_read_right(device, dtype):
    x, w, b, packed, masked = make_layer(device, dtype)
    y = functional.sparse_linear(x.view(2, 12, 64), w, *packed, b, mvue=False)
    dy = torch.randint(-3, 4, (12, 2, 48)).to(device, dtype).transpose(0, 1)
    y.backward(dy)
    assert torch.equal(x.grad, dy.reshape(24, 48) @ masked)
    assert torch.equal(w.grad, dy.reshape(24, 48).T @ x.detach())


@pytest.mark.fault(48)
@pytest.mark.parametrize("wanted", [(), ("x",), ("w",), ("b",), ("x", "b"), ("w", "b"), ("x", "w", "b")])
def test_only_gradients_that_are_needed_are_computed(device, dtype, wanted, monkeypatch):
    x, w, b, packed, _ = make_layer(device, dtype)
    for name, tensor in (("x", x), ("w", w), ("b", b)):
        tensor.requires_grad_(name in wanted)
    calls = []
    for op in ("mvue_compress", "sparse_mm_grad_input", "sparse_mm_grad_weight"):
        original = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *a, _op=op, _f=original, **k: (calls.append(_op), _f(*a, **k))[1])
    y = functional.sparse_linear(x, w, *packed, b)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
    assert ("sparse_mm_grad_input" in calls) == ("x" in wanted)
    assert ("mvue_compress" in calls) == ("sparse_mm_grad_weight" in calls) == ("w" in wanted)
    for name, tensor in (("x", x), ("w", w), ("b", b)):
        assert (tensor.grad is not None) == (name in wanted)


@pytest.mark.fault(28)
def test_repacking_between_forward_and_backward_is_reported_by_autograd(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    mask = ops.transposable_mask(w)
    y = functional.sparse_linear(x, w, *packed, b)
    ops.compress_([w], [mask], *([part] for part in packed))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.fault(51)
def test_double_backward_is_refused(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    y = functional.sparse_linear(x, w, *packed, b, mvue=False)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.fault(52)
def test_vmap_and_forward_mode_are_refused(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    gate_up = torch.randn(4, 32, device=device, dtype=dtype)
    up, down = ops.prune_compress(w.detach(), dtype)[1:], ops.prune_compress(w.detach().t(), dtype)[1:]
    functions = (
        (lambda t: functional.sparse_linear(t, w, *packed, b), x.detach()),
        (lambda t: functional.mlp(t, w, up, w.t(), down), x.detach()),
        (functional.gated_activation, gate_up),
        (functional.activation, gate_up),
    )
    for function, t in functions:
        for call in (
            lambda f=function, t=t: torch.func.vmap(f)(t),
            lambda f=function, t=t: torch.func.jvp(f, (t,), (t,)),
            lambda f=function, t=t: torch.func.grad(lambda s: f(s).sum())(t),
            lambda f=function, t=t: forward_mode(f, t),
        ):
            with pytest.raises(Sparse24Error, match="torch.func transforms.*forward-mode.*densify"):
                call()
        with torch.autograd.forward_ad.dual_level():
            function(t)  # no tangent comes in: nothing to refuse


def forward_mode(function, t):
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(t, t))


@pytest.mark.fault(30)
def test_autocast_casts_as_linear_does_and_mismatches_are_named(device):
    x = torch.randn(24, 64, device=device, requires_grad=True)
    w = torch.randn(48, 64, device=device, requires_grad=True)
    b = torch.randn(48, device=device, requires_grad=True)
    mask, *packed = ops.prune_compress(w.detach(), torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        y = functional.sparse_linear(x, w, *packed, b)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
    exact = w.detach().cpu().double()
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.sparse_linear(x.cpu().double(), exact, *ops.prune_compress(exact)[1:])
    assert y.dtype == torch.float64
    with pytest.raises(Sparse24DtypeError, match="same dtype"):
        functional.sparse_linear(x, w, *packed)
    with pytest.raises(Sparse24DtypeError, match="x and bias"):
        functional.sparse_linear(x.bfloat16(), w, *packed, b)


@pytest.mark.fault(54)
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(device, dtype, reentrant):
    from torch.utils.checkpoint import checkpoint

    x, w, b, packed, _ = make_layer(device, dtype)
    dy = torch.randn(x.shape[0], w.shape[0], device=device, dtype=dtype)
    seed = torch.tensor([1, 2], device=device)

    def run(t):
        return functional.sparse_linear(t, w, *packed, b, seed=seed)

    plain = torch.autograd.grad(run(x), (x, w), dy)
    y = checkpoint(run, x, use_reentrant=reentrant)
    y.backward(dy)
    assert torch.equal(x.grad, plain[0]) and torch.equal(w.grad, plain[1])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mvue", [True, False])
def test_whole_feed_forward_equals_its_parts(device, gated, mvue):
    dtype = torch.bfloat16
    d_model, d_ff, tokens = 32, 64, 40
    up_rows = 2 * d_ff if gated else d_ff
    x = torch.randn(2, tokens // 2, d_model, device=device, dtype=dtype, requires_grad=True)
    up = torch.randn(up_rows, d_model, device=device, requires_grad=True)
    down = torch.randn(d_model, d_ff, device=device, requires_grad=True)
    b_up = torch.randn(up_rows, device=device, dtype=dtype, requires_grad=True)
    b_down = torch.randn(d_model, device=device, dtype=dtype, requires_grad=True)
    packed_up, packed_down = (ops.prune_compress(w.detach(), dtype)[1:] for w in (up, down))
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    leaves = (x, up, down, b_up, b_down)
    dy = torch.randn(2, tokens // 2, d_model, device=device, dtype=dtype)

    if gated:
        whole = functional.gated_mlp(
            x, up, packed_up, down, packed_down, "silu", bias_gate_up=b_up, bias_down=b_down, mvue=mvue, seed=seeds
        )
    else:
        whole = functional.mlp(
            x, up, packed_up, down, packed_down, "gelu_tanh", bias_up=b_up, bias_down=b_down, mvue=mvue, seed=seeds
        )
    ours = torch.autograd.grad(whole, leaves, dy)

    gate_up = functional.sparse_linear(x, up, *packed_up, b_up, mvue=mvue, seed=seeds[1])
    h = functional.gated_activation(gate_up, "silu") if gated else functional.activation(gate_up, "gelu_tanh")
    parts = functional.sparse_linear(h, down, *packed_down, b_down, mvue=mvue, seed=seeds[0])
    theirs = torch.autograd.grad(parts, leaves, dy)
    assert_same_bits(whole, parts, "y")
    for name, a, b in zip(("dx", "d_up", "d_down", "db_up", "db_down"), ours, theirs, strict=True):
        assert_same_bits(a, b, name)


def test_two_parameters_share_one_packed_buffer(device):
    dtype = torch.bfloat16
    x = torch.randn(16, 32, device=device, dtype=dtype)
    gate, up = (torch.randn(64, 32, device=device, requires_grad=True) for _ in range(2))
    down = torch.randn(32, 64, device=device, requires_grad=True)
    joined = torch.cat([gate, up]).detach().requires_grad_()
    packed = ops.prune_compress(joined.detach(), dtype)[1:]
    packed_down = ops.prune_compress(down.detach(), dtype)[1:]
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    one = functional.gated_mlp(x, joined, packed, down, packed_down, seed=seeds)
    two = functional.gated_mlp(x, (gate, up), packed, down, packed_down, seed=seeds)
    assert_same_bits(one, two, "y")
    d_joined = torch.autograd.grad(one.float().sum(), joined)[0]
    d_gate, d_up = torch.autograd.grad(two.float().sum(), (gate, up))
    assert_same_bits(torch.cat([d_gate, d_up]), d_joined, "gradients")


def test_training_on_a_fixed_mask_follows_the_reference_for_32_steps(device):
    """A linear layer with MVUE, by our functions and by the plain PyTorch reference, step by step."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(3)
    data, target = torch.randn(64, 32).to(dtype), torch.randn(64, 16).to(dtype)
    start = torch.randn(16, 32) * 0.1
    mask = reference.transposable_mask(start)
    ours, plain = start.clone().to(device).requires_grad_(), start.clone()
    for step in range(32):
        seed = torch.tensor([step, 9])
        packed = ops.compress(ours.detach(), mask.to(device), dtype)
        y = functional.sparse_linear(data.to(device), ours, *packed, seed=seed.to(device))
        (dy,) = torch.autograd.grad((y.float() - target.to(device).float()).square().mean(), y, retain_graph=True)
        (grad,) = torch.autograd.grad(y, ours, dy)
        ours.data -= 0.5 * grad

        values = reference.decompress(*reference.compress(plain, mask, dtype)[:2], 16, 32)
        y = data @ values.T
        dy = (2 * (y.float() - target.float()) / y.numel()).to(dtype)
        packed_dy, E_dy = reference.mvue_compress(dy, seed)
        pruned = reference.decompress(packed_dy, E_dy, 64, 16, transposed=True)
        plain -= 0.5 * (pruned.float().T @ data.float())
    tolerance = 1e-4 if device == "cpu" else 3e-2
    torch.testing.assert_close(ours.detach().cpu(), plain, rtol=tolerance, atol=tolerance)


def test_wrong_arguments_are_named(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    with pytest.raises(Sparse24Error, match="weight must be 2-D"):
        functional.sparse_linear(x, w.view(-1), *packed, b)
    with pytest.raises(Sparse24DtypeError, match=r"seed must be int64 of shape \(2, 2\)"):
        functional.mlp(x, w, packed, w, packed, seed=torch.tensor([1, 2], device=device))


@pytest.mark.parametrize("mvue", [True, False])
def test_gradient_of_a_column_major_weight_has_its_layout(device, mvue):
    """A Conv1D's weight is the transpose of what products see: autograd takes such a gradient without a copy."""
    stored = torch.randn(64, 128, device=device).requires_grad_()  # [in, out]
    weight = stored.t()
    form = functional.PackedWeight(*ops.prune_compress(weight.detach(), torch.bfloat16)[1:])
    x, dy = (torch.randn(16, n, device=device, dtype=torch.bfloat16) for n in (64, 128))
    seed = ops.draw_seed(x)
    functional.sparse_linear(x, weight, *form[:4], mvue=mvue, seed=seed).backward(dy)
    row_major = weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    functional.sparse_linear(x, row_major, *form[:4], mvue=mvue, seed=seed).backward(dy)
    assert stored.grad.is_contiguous() and torch.equal(stored.grad.t(), row_major.grad)
    (given,) = torch.autograd.grad(functional.sparse_linear(x, weight, *form[:4], mvue=mvue, seed=seed), [weight], dy)
    assert given.stride() == weight.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 3, 512])
def test_sums_over_tokens_and_fp32_products_are_as_accurate_as_torchs(tokens):
    """On a GPU they are products with a fp32 result; torch's own are rounded to 16 bits."""
    x, dy = (torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in (64, 128))
    for dtype in (torch.bfloat16, torch.float32):
        ours = weight_gradient.bias_gradient(dy, dtype)
        assert ours.dtype == dtype and ours.shape == (128,)
        assert_as_accurate(ours, dy.sum(0).to(dtype), dy.double().sum(0))
    exact, into = dy.double().T @ x.double(), torch.ones(128, 64, device="cuda")
    ours = weight_gradient.dense_weight_gradient(dy, x, torch.float32)
    assert ours.dtype == torch.float32
    assert_as_accurate(ours, (dy.T @ x).float(), exact)
    assert weight_gradient.dense_weight_gradient(dy, x, torch.float32, into) is None
    assert_as_accurate(into, 1 + (dy.T @ x).float(), 1 + exact)


# -- masked decay in backward -----------------------------------------------------------------------------------------


def pulled(w, mask, factor):
    return torch.where(ops.unpack_mask(mask), 0, factor * w.detach())


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("mvue", [False, True])
def test_backward_adds_the_decay_of_pruned_weights(device, dtype, mvue, lean):
    x, w, b, packed, _ = make_layer(device, dtype)
    mask = ops.transposable_mask(w.detach())
    packed = (*packed[:2], *(t.new_empty(0) for t in packed[2:])) if lean else packed
    settings = dict(mvue=mvue, seed=torch.tensor([5, 6], device=device), mask=mask)
    dy = torch.randint(-3, 4, (x.shape[0], w.shape[0])).to(device, dtype)
    plain = torch.autograd.grad(functional.sparse_linear(x, w, *packed, b, **settings), (x, w, b), dy)
    factor = torch.tensor([0.5], device=device)
    ours = torch.autograd.grad(functional.sparse_linear(x, w, *packed, b, **settings, decay=factor), (x, w, b), dy)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[2], plain[2])
    exact = plain[1].double() + pulled(w.double(), mask, 0.5)
    assert_as_accurate(ours[1], exact.to(dtype), exact)
    assert torch.equal(ours[1][ops.unpack_mask(mask)], plain[1][ops.unpack_mask(mask)])


@pytest.mark.parametrize("gated, two", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("mvue", [False, True])
def test_feed_forward_adds_the_decay_of_all_its_weights(device, dtype, gated, two, mvue):
    make = lambda *s: torch.randn(s, device=device).to(dtype).requires_grad_()  # noqa: E731
    ups, x = [make(64, 32) for _ in range(2 if two else 1)], make(24, 32)
    down = make(32, 64 if two or not gated else 32)
    up = torch.cat([w.detach() for w in ups])
    masks = [ops.transposable_mask(w.detach()) for w in (*ups, down)]
    packed_up = functional.PackedWeight(*ops.compress(up, torch.cat(masks[:-1]), dtype), tuple(masks[:-1]))
    packed_down = functional.PackedWeight(*ops.compress(down.detach(), masks[-1], dtype), (masks[-1],))
    seed = torch.tensor([[1, 2], [3, 4]], device=device)
    function = functional.gated_mlp if gated else functional.mlp
    gradients = []
    for decay in (None, torch.tensor([0.5], device=device)):
        weights = tuple(ups) if two else ups[0]
        y = function(x, weights, packed_up, down, packed_down, mvue=mvue, seed=seed, decay=decay)
        gradients.append(torch.autograd.grad(y, (x, *ups, down), torch.ones_like(y)))
    plain, ours = gradients
    assert torch.equal(plain[0], ours[0])
    for w, mask, before, after in zip((*ups, down), masks, plain[1:], ours[1:], strict=True):
        exact = before.double() + pulled(w.double(), mask, 0.5)
        assert_as_accurate(after, exact.to(dtype), exact)


def test_two_micro_batches_add_their_decay_each(device, dtype):
    """Whether autograd sums the gradients or the second product adds to the first."""
    x, w, b, packed, _ = make_layer(device, dtype)
    mask, factor = ops.transposable_mask(w.detach()), torch.tensor([0.5], device=device)
    for _ in range(2):
        functional.sparse_linear(x * 0, w, *packed, b, mask=mask, decay=factor).sum().backward()
    assert torch.equal(w.grad, pulled(w, mask, 1.0))


def test_decay_is_read_when_backward_runs(device, dtype):
    x, w, _, packed, _ = make_layer(device, dtype)
    mask, factor = ops.transposable_mask(w.detach()), torch.tensor([0.5], device=device)
    y = functional.sparse_linear(x * 0, w, *packed, mask=mask, decay=factor)
    factor.data.fill_(2.0)
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], pulled(w, mask, 2.0))


def test_decay_needs_the_mask_and_a_frozen_weight_needs_none(device, dtype):
    x, w, b, packed, _ = make_layer(device, dtype)
    factor = torch.tensor([0.5], device=device)
    with pytest.raises(Sparse24Error, match="backward adds a decay to pruned weights and needs the mask of each of 1"):
        functional.sparse_linear(x, w, *packed, b, decay=factor)
    functional.sparse_linear(x, w.detach(), *packed, b, decay=factor).sum().backward()
    assert w.grad is None
