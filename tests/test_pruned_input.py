"""mvue="input": the weight gradient prunes the layer's input. Unbiased, packed in forward, kept in its place."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse24 import Sparse24Error, functional, ops
from sparse24.testing import assert_as_accurate, assert_same_bits


@pytest.fixture
def dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def make_layer(device, dtype, tokens=40, in_features=64, out_features=48):
    draw = lambda *shape: torch.randn(shape, device=device).to(dtype)  # noqa: E731
    x, w, b = draw(tokens, in_features), draw(out_features, in_features), draw(out_features)
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), ops.prune_compress(w.detach(), dtype)[1:]


def pruned(x, seed):
    packed, E = ops.mvue_compress(x.detach(), seed)
    return ops.decompress(packed, E, 2 * packed.shape[0], x.shape[1], transposed=True)[: x.shape[0]]


# ---- the product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 16, 8), (31, 64, 128), (65, 128, 64), (300, 264, 136), (33, 20, 12), (0, 64, 32)]
)
def test_it_is_the_product_with_the_pruned_input(device, dtype, shape):
    """Exact on small integers, in every form: new, into, added, with the decay of one weight or two."""
    tokens, in_features, out_features = shape
    x, dy = (torch.randint(-3, 4, (tokens, n), device=device).to(dtype) for n in (in_features, out_features))
    packed = ops.mvue_compress(x, torch.tensor([3, 4], device=device))
    exact = dy.double().T @ pruned(x, torch.tensor([3, 4], device=device)).double()
    assert torch.equal(
        ops.sparse_mm_grad_weight_input(*packed, dy, in_features, out_dtype=torch.float32), exact.float()
    )
    out = torch.full((out_features, in_features), 5.0, device=device)
    assert ops.sparse_mm_grad_weight_input(*packed, dy, in_features, out=out, accumulate=True) is out
    assert torch.equal(out, exact.float() + 5)
    for parts in (1, 2) if out_features % 8 == 0 else (1,):
        weights = [
            torch.randint(-3, 4, (out_features // parts, in_features), device=device).float() for _ in range(parts)
        ]
        decay = torch.tensor([2.0], device=device), weights, [ops.transposable_mask(w) for w in weights]
        kept = torch.cat([ops.unpack_mask(mask) for mask in decay[2]])
        expected = exact.float() + torch.where(kept, 0, 2 * torch.cat(weights))
        dw = ops.sparse_mm_grad_weight_input(*packed, dy, in_features, out_dtype=torch.float32, decay=decay)
        assert torch.equal(dw, expected)


def test_it_is_the_transpose_of_the_other_weight_gradient(device, dtype):
    x, dy = torch.randn(72, 64, device=device).to(dtype), torch.randn(72, 48, device=device).to(dtype)
    packed = ops.mvue_compress(x, torch.tensor([3, 4], device=device))
    ours = ops.sparse_mm_grad_weight_input(*packed, dy, 64, out_dtype=torch.float32)
    theirs = ops.sparse_mm_grad_weight(*packed, dy, 64, out_dtype=torch.float32)
    values = pruned(x, torch.tensor([3, 4], device=device))
    assert_as_accurate(ours, theirs.T, dy.double().T @ values.double())


@pytest.mark.fault(42)
def test_operands_that_do_not_fit_are_named(device, dtype):
    x, dy = torch.randn(40, 64, device=device).to(dtype), torch.randn(40, 48, device=device).to(dtype)
    packed, E = ops.mvue_compress(x, torch.tensor([3, 4], device=device))
    for args, words in (
        ((packed, E, dy[:-8], 64), r"packed_x must have shape \(16, 64\)"),
        ((packed, E, dy, 48), "packed_x must have shape"),
        ((packed, E[:-1], dy, 64), "E of packed_x must be"),
        ((packed, E, dy[None], 64), r"dy must be 2-D, \(tokens, out_features\)"),
        ((packed, E, dy.double(), 64), "dy and packed_x must have the same dtype"),
    ):
        with pytest.raises(Sparse24Error, match=words):
            ops.sparse_mm_grad_weight_input(*args)
    with pytest.raises(Sparse24Error, match=r"out must be contiguous of shape \(48, 64\)"):
        ops.sparse_mm_grad_weight_input(packed, E, dy, 64, out=torch.zeros(64, 48, device=device))


# ---- a linear layer -------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_seed(device, dtype):
    x, w, b, packed = make_layer(device, dtype)
    seed = torch.tensor([5, 6], device=device)
    y = functional.sparse_linear(x, w, *packed, b, mvue="input", seed=seed)
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, (x, w, b), dy)
    expected = ops.sparse_mm_grad_weight_input(*ops.mvue_compress(x.detach(), seed), dy, 64)
    assert_same_bits(dw, expected, "dW")
    plain = functional.sparse_linear(x, w, *packed, b, mvue=False)
    assert_same_bits(y, plain, "y")
    for ours, theirs in zip((dx, db), torch.autograd.grad(plain, (x, b), dy), strict=True):
        assert_same_bits(ours, theirs, "what does not depend on it")


def test_the_mean_of_many_draws_is_the_dense_gradient(device, dtype):
    """Within 5 standard errors, element by element, and with the variance that the probabilities promise."""
    x, w, _, packed = make_layer(device, dtype, tokens=16, in_features=16, out_features=8)
    dy, draws = torch.randn(16, 8, device=device).to(dtype), 600
    torch.manual_seed(0)
    gradients = torch.stack(
        [
            torch.autograd.grad(functional.sparse_linear(x, w, *packed, mvue="input"), w, dy)[0].double()
            for _ in range(draws)
        ]
    )
    exact = dy.double().T @ x.detach().double()
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * exact.abs().max()
    error = (gradients.mean(0) - exact).abs()
    assert (error <= 5 * gradients.std(0) / draws**0.5 + rounding + 1e-6).all()
    assert gradients.std(0).max() > 0.1


def test_backward_keeps_1_125_bytes_an_element(device):
    x, w, _, packed = make_layer(device, torch.bfloat16, tokens=256, in_features=128, out_features=64)
    kept = {}

    def count(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    sizes = {}
    for mvue in ("input", "output"):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            functional.sparse_linear(x, w, *packed, mvue=mvue)
        sizes[mvue] = sum(kept.values())
    weights = sum(t.numel() * t.element_size() for t in packed[2:])
    assert sizes["output"] - weights == 2 * x.numel()
    assert sizes["input"] - weights == 1.125 * x.numel()


def test_noise_is_drawn_in_training_alone(device, dtype):
    """Not without a weight to train, not in evaluation; a copy of the generator's state tells."""
    x, w, _, packed = make_layer(device, dtype)
    state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    before = state()
    with torch.no_grad():
        functional.sparse_linear(x, w, *packed, mvue="input")
    functional.sparse_linear(x, w.detach(), *packed, mvue="input").sum().backward()
    assert torch.equal(state(), before)
    torch.manual_seed(3)
    first = torch.autograd.grad(functional.sparse_linear(x, w, *packed, mvue="input").sin().sum(), w)[0]
    torch.manual_seed(3)
    second = torch.autograd.grad(functional.sparse_linear(x, w, *packed, mvue="input").sin().sum(), w)[0]
    third = torch.autograd.grad(functional.sparse_linear(x, w, *packed, mvue="input").sin().sum(), w)[0]
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.fault(54)
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing_both_passes_draw_the_same(device, dtype, reentrant):
    """The same gradient as without, and the dropout behind the layer drops the same elements in both passes."""
    x, w, b, packed = make_layer(device, dtype)
    dy = torch.randn(40, 48, device=device).to(dtype)

    def run(t):
        y = functional.sparse_linear(t, w, *packed, b, mvue="input", training=True)
        return torch.nn.functional.dropout(y, 0.5)

    torch.manual_seed(5)
    plain = torch.autograd.grad(run(x), (x, w, b), dy)
    torch.manual_seed(5)
    checkpoint(run, x, use_reentrant=reentrant).backward(dy)
    for p, expected in zip((x, w, b), plain, strict=True):
        assert_same_bits(p.grad, expected)


@pytest.mark.fault(53)
def test_it_compiles_whole(device, dtype):
    x, w, b, packed = make_layer(device, dtype)
    dy = torch.randn(40, 48, device=device).to(dtype)

    def run(t):
        return functional.sparse_linear(t, w, *packed, b, mvue="input")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    eager = torch.autograd.grad(run(x), (x, w, b), dy)
    torch.manual_seed(5)
    traced = torch.autograd.grad(compiled(x), (x, w, b), dy)
    for ours, theirs in zip(traced, eager, strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("lean", [False, True])
def test_decay_and_micro_batches(device, dtype, lean):
    """The decay comes with each product, and the second product adds to the gradient of the first."""
    x, w, _, packed = make_layer(device, dtype)
    mask, factor = ops.transposable_mask(w.detach()), torch.tensor([0.5], device=device)
    packed = (*packed[:2], *(t.new_empty(0) for t in packed[2:])) if lean else packed
    for _ in range(2):
        functional.sparse_linear(x * 0, w, *packed, mask=mask, decay=factor, mvue="input").sum().backward()
    assert torch.equal(w.grad, torch.where(ops.unpack_mask(mask), 0, w.detach()))


def test_the_product_adds_to_a_gradient_that_is_there(device, dtype, monkeypatch):
    x, w, _, packed = make_layer(device, dtype)
    added, original = [], ops.sparse_mm_grad_weight_input

    def watch(*args, accumulate=False, **settings):
        added.append(accumulate)
        return original(*args, accumulate=accumulate, **settings)

    monkeypatch.setattr(ops, "sparse_mm_grad_weight_input", watch)
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    for seed in seeds:
        functional.sparse_linear(x, w, *packed, mvue="input", seed=seed).sum().backward()
    assert added == [False, True]
    dy = torch.ones(40, 48, device=device).double()
    exact = sum(dy.T @ pruned(x, seed).double() for seed in seeds)
    plain = sum(dy.to(dtype).T @ pruned(x, seed) for seed in seeds)
    assert_as_accurate(w.grad, plain, exact)


def test_other_words_are_refused(device, dtype):
    x, w, _, packed = make_layer(device, dtype)
    for wrong in ("inputs", 2, "auto"):
        with pytest.raises(Sparse24Error, match='mvue must be True, "output", "input" or False, got'):
            functional.sparse_linear(x, w, *packed, mvue=wrong)
    with pytest.raises(Sparse24Error, match="mvue must be one choice, or a pair"):
        functional.mlp(x, w, packed, w.t(), packed, mvue=(True, True, True))


# ---- a whole feed-forward layer -------------------------------------------------------------------------------------

CHOICES = ["input", ("input", "output"), ("output", "input"), ("input", False), (False, "input")]


def feed_forward_case(device, gated, lean=False):
    dtype, d_model, d_ff = torch.bfloat16, 32, 64
    draw = lambda *shape: torch.randn(shape, device=device).to(dtype).requires_grad_()  # noqa: E731
    x, up, down = draw(2, 20, d_model), draw(2 * d_ff if gated else d_ff, d_model), draw(d_model, d_ff)
    biases = draw(up.shape[0]), draw(d_model)
    forms = []
    for w in (up, down):
        mask, *form = ops.prune_compress(w.detach())
        form = [*form[:2], *(t.new_empty(0) for t in form[2:])] if lean else form
        forms.append(functional.PackedWeight(*form, (mask,)))
    return (x, up, down, *biases), forms


@pytest.mark.parametrize("mvue", CHOICES, ids=str)
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("gated", [True, False])
def test_a_whole_layer_equals_its_parts(device, gated, lean, mvue):
    (x, up, down, b_up, b_down), forms = feed_forward_case(device, gated, lean)
    seeds = torch.tensor([[1, 2], [3, 4]], device=device)
    decay = torch.tensor([0.25], device=device)
    name = "bias_gate_up" if gated else "bias_up"
    whole = (functional.gated_mlp if gated else functional.mlp)(
        x, up, forms[0], down, forms[1], "silu", **{name: b_up}, bias_down=b_down, mvue=mvue, seed=seeds, decay=decay
    )
    choices = mvue if isinstance(mvue, tuple) else (mvue, mvue)
    settings = [
        dict(mvue=choice, seed=seed, decay=decay, mask=form.masks[0])
        for choice, seed, form in zip(choices, (seeds[1], seeds[0]), forms, strict=True)
    ]
    gate_up = functional.sparse_linear(x, up, *forms[0][:4], b_up, **settings[0])
    h = functional.gated_activation(gate_up, "silu") if gated else functional.activation(gate_up, "silu")
    parts = functional.sparse_linear(h, down, *forms[1][:4], b_down, **settings[1])
    dy, leaves = torch.randn_like(whole), (x, up, down, b_up, b_down)
    for ours, theirs in zip(
        (whole, *torch.autograd.grad(whole, leaves, dy)), (parts, *torch.autograd.grad(parts, leaves, dy)), strict=True
    ):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("mvue", CHOICES, ids=str)
def test_a_whole_layer_compiles_and_checkpoints(device, mvue):
    leaves, (packed_up, packed_down) = feed_forward_case(device, gated=True)
    x, up, down, *_ = leaves
    dy = torch.randn_like(x)

    def run(t):
        return functional.gated_mlp(t, up, packed_up, down, packed_down, mvue=mvue, training=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (
        run,
        compiled,
        lambda t: checkpoint(run, t, use_reentrant=False),
        lambda t: checkpoint(run, t, use_reentrant=True),
    ):
        for p in (x, up, down):
            p.grad = None
        torch.manual_seed(7)
        function(x).backward(dy)
        results.append([p.grad for p in (x, up, down)])
    for other in results[1:3]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert_same_bits(ours, theirs)
    assert_same_bits(results[3][0], results[0][0], "dx, which has no noise")


def test_a_whole_layer_keeps_packed_inputs(device):
    (x, up, down, *_), (packed_up, packed_down) = feed_forward_case(device, gated=True)
    x = torch.randn(256, 32, device=device).bfloat16().requires_grad_()
    kept = {}

    def count(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def size(mvue):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            functional.gated_mlp(x, up, packed_up, down, packed_down, mvue=mvue)
        return sum(kept.values())

    elements, seeds = {"x": 256 * 32, "h": 256 * 64}, 32
    metadata = {"x": 256 * 64 / 8, "h": 256 * 64 / 8}  # features of x are padded to 64
    saved = {name: 2 * n - n - metadata[name] for name, n in elements.items()}
    assert size("output") - size(("input", "output")) == saved["x"] - seeds
    assert size("output") - size(("output", "input")) == saved["h"] - seeds
    assert size("output") - size("input") == saved["x"] + saved["h"] - seeds
