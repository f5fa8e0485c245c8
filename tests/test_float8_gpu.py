"""8-bit products and layers on a GPU: against float64 and `torch._scaled_mm`, in training, in graphs (`-m gpu`)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse24
from sparse24 import Recipe, SparseGatedMLP, ops
from sparse24.ops import float8

pytestmark = pytest.mark.gpu
E4M3 = torch.float8_e4m3fn
MODES = ("fp8-hybrid", "fp8")
#: (m, n, k) of products: tiles and less, odd numbers of tokens, layers of GPT-2 774M and Llama 7B
SIZES = [(128, 256, 128), (64, 32, 96), (160, 1000, 2048), (5120, 4096, 1280), (4096, 2048, 11008)]


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32, device="cuda")


class Operands:
    """A weight (m, k) packed in 8 bits and an activation (n, k), with scales; `sign` gives both values of one sign."""

    def __init__(self, m: int, n: int, k: int, *, sign: bool = False):
        torch.manual_seed(0)
        w, x = (torch.randn(rows, k, device="cuda") for rows in (m, n))
        w, x = (w.abs(), x.abs()) if sign else (w, x)
        self.w_scale, self.x_scale = one(2.0**-6), one(2.0**-5)
        self.forms = float8.empty_packed_float8(m, k, "cuda")
        mask = ops.transposable_mask(w)
        float8.pack_float8_(False, [w], [mask], [[t] for t in self.forms], [self.w_scale], [one(0.0)])
        self.x8, _ = float8.quantize(x, self.x_scale)
        self.w8 = float8.decompress_float8(*self.forms[:2], one(1.0), m, k).to(E4M3)  # dense, the same values
        self.exact = (self.x8.double() @ self.w8.double().T) * float(self.w_scale * self.x_scale)

    def product(self, accumulation: str = "auto") -> torch.Tensor:
        packed, E = self.forms[:2]
        return float8.sparse_mm_float8(
            self.x8, self.x_scale, packed, E, self.w_scale, packed.shape[0], accumulation=accumulation
        )

    def scaled_mm(self, fast: bool) -> torch.Tensor:
        scales = self.x_scale.view(()), self.w_scale.view(())
        return torch._scaled_mm(self.x8, self.w8.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("accumulation", ["fast", "promoted"])
def test_products_err_at_most_twice_as_much_as_scaled_mm(size, accumulation):
    case = Operands(*size)
    floor = torch.finfo(torch.bfloat16).eps * case.exact.abs().max()
    ours, theirs = (
        (y.double() - case.exact).abs().max()
        for y in (case.product(accumulation), case.scaled_mm(accumulation == "fast"))
    )
    assert ours <= 2 * theirs + floor


@pytest.mark.fault(90)
@pytest.mark.parametrize("size", [(256, 512, 4096), (256, 512, 14336)])
def test_promoted_sums_of_one_sign_have_no_bias(size):
    case = Operands(*size, sign=True)
    bias = lambda y: float(((y.double() - case.exact) / case.exact).mean())  # noqa: E731
    assert abs(bias(case.product("promoted"))) <= 1e-3
    assert abs(bias(case.product("promoted"))) <= abs(bias(case.product("fast")))


@pytest.mark.fault(90)
def test_weight_gradients_over_many_tokens_of_one_sign_have_no_bias():
    tokens, m, n = 16384, 256, 512
    torch.manual_seed(0)
    dy, x = (torch.randn(tokens, width, device="cuda").abs().bfloat16() for width in (m, n))
    scale, seed = one(2.0**-5), torch.tensor([1, 2], device="cuda")
    packed, E, *_ = float8.mvue_quantize(dy, seed, scale, float8=True)
    _, x8_t = float8.quantize(x, scale, rows=False, transposed=True)
    exact = float8.decompress_float8(packed, E, scale, m, tokens).double() @ (x8_t.double() * scale).T
    dw = torch.empty(m, n, device="cuda")
    float8.grad_weight_float8_(packed, E, scale, x8_t, scale, dw)
    assert abs(float(((dw.double() - exact) / exact).mean())) <= 1e-3


@pytest.mark.parametrize("accumulation", ["fast", "promoted"])
def test_small_integers_are_exact(accumulation):
    m, n, k = 256, 384, 512
    torch.manual_seed(0)
    w, x = (torch.randint(-4, 5, (rows, k), device="cuda").float() for rows in (m, n))
    mask, forms = ops.transposable_mask(w), float8.empty_packed_float8(m, k, "cuda")
    float8.pack_float8_(False, [w], [mask], [[t] for t in forms], [one(1.0)], [one(0.0)])
    x8, _ = float8.quantize(x, one(1.0))
    y = float8.sparse_mm_float8(x8, one(1.0), *forms[:2], one(1.0), m, accumulation=accumulation)
    w = torch.where(ops.unpack_mask(mask), w, 0)
    assert torch.equal(y, (x.double() @ w.double().T).bfloat16())


def test_repeats_have_the_same_bits():
    case = Operands(512, 1024, 2048)
    first = case.product()
    assert all(torch.equal(case.product(), first) for _ in range(250))


# ---- layers ---------------------------------------------------------------------------------------------------------


def block(precision: str, width: int = 256, d_ff: int = 512, **settings) -> SparseGatedMLP:
    torch.manual_seed(0)
    return SparseGatedMLP(width, d_ff, precision=precision, **settings).bfloat16().cuda()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("precision", MODES)
def test_a_block_has_the_results_of_the_cpu(precision):
    """Without MVUE, whose draws differ: 8-bit casts have the same bits, products the rounding of bf16."""
    on_gpu = block(precision, mvue=False)
    on_cpu = copy.deepcopy(on_gpu).cpu()
    results = []
    x, dy = torch.randn(96, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    for module in (on_gpu, on_cpu):
        device = next(module.parameters()).device
        inputs = x.to(device).requires_grad_()
        y = module(inputs)
        y.backward(dy.to(device))
        results.append([y.detach(), inputs.grad, *(p.grad for p in module.parameters())])
    assert max(map(relative, *results)) < 0.03


def train(model: nn.Module, steps: int, forward=None, recipe: Recipe | None = None, optimizer=None) -> list[float]:
    losses = []
    for step in range(steps):
        x = torch.randn(512, 256, generator=torch.Generator().manual_seed(step)).cuda().bfloat16()
        loss = F.mse_loss((model if forward is None else forward)(x), x.roll(1, -1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(precision, steps=60, compiled=False):
    model = block(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    recipe = Recipe(model, optimizer, total_steps=200, mask_interval=10, dense_fraction=0)
    torch.manual_seed(1)
    forward = torch.compile(model, fullgraph=True) if compiled else None
    return model, recipe, train(model, steps, forward, recipe, optimizer)


@pytest.mark.parametrize("precision", MODES)
def test_training_learns_as_sixteen_bits_do_and_repeats_bit_for_bit(precision):
    model, _, losses = trained(precision)
    assert sparse24.verify(model)
    sixteen = trained(None)[2]
    assert sum(losses[-10:]) < 1.1 * sum(sixteen[-10:]) and losses[-1] < losses[0]
    again, _, repeated = trained(precision)
    assert losses == repeated
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("precision", MODES)
def test_compiled_training_is_that_of_eager(precision):
    compiled, eager = trained(precision, 20, compiled=True)[2], trained(precision, 20)[2]
    # A cast to e4m3 errs by up to 2^-4 of a value, in a sum of 64 terms by 2^-7 of it; a step has four such casts.
    torch.testing.assert_close(compiled, eager, rtol=2.0**-5, atol=2.0**-5)


@pytest.mark.fault(98)
@pytest.mark.parametrize("precision", MODES)
def test_compiled_gradients_are_those_of_eager(precision):
    """Losses of a short training hardly show that a layer's gradients are 0."""
    model, x = block(precision, mvue=False), torch.randn(512, 256, device="cuda").bfloat16()
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        forward(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(relative(ours, theirs) < 0.01 for theirs, ours in zip(*gradients, strict=True))


@pytest.mark.parametrize("precision", MODES)
def test_a_captured_step_updates_its_scales(precision):
    """The whole step is in the graph: casts, amaxes, scales, packing. Scales follow inputs that grow."""
    model = block(precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
    recipe = Recipe(model, optimizer, total_steps=100, mask_interval=50, dense_fraction=0)
    x = torch.randn(512, 256, device="cuda").bfloat16()

    def step():
        F.mse_loss(model(x), x.roll(1, -1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with recipe.capturing(), torch.cuda.graph(graph):
        step()
    scales = [b.clone() for name, b in model.gate_proj.named_buffers() if name.endswith("x_scale")]
    x.mul_(64)
    for _ in range(3):
        recipe.replay(graph)
    after = [b for name, b in model.gate_proj.named_buffers() if name.endswith("x_scale")]
    assert scales and all(torch.equal(new, 64 * old) for new, old in zip(after, scales, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.fault(89)
@pytest.mark.parametrize("precision", MODES)
def test_inf_reaches_the_gradients(precision):
    model = block(precision)
    x = torch.randn(64, 256, device="cuda").bfloat16()
    x[3, 5] = torch.inf
    model(x).sum().backward()
    assert not all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision", MODES)
def test_forward_keeps_less_than_sixteen_bits_do(precision):
    kept = {}
    for mode in (None, precision):
        model = block(mode, 1024, 4096)
        x = torch.randn(4096, 1024, device="cuda").bfloat16().requires_grad_()
        model(x).sum().backward()
        before = torch.cuda.memory_allocated()
        y = model(x)
        kept[mode] = torch.cuda.memory_allocated() - before
        del y
    assert kept[precision] <= kept[None] * (0.92 if precision == "fp8" else 1.01)
