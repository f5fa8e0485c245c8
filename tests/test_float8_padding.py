"""8-bit products and layers of any multiples of four, and of any number of tokens: those of the masked weight, exactly.

Operands are small integers, which e4m3 holds as they are, so nothing rounds that is not said here. Two of each four
tokens have a gradient of zero: MVUE then keeps the other two as they are. Where there is no GPU the kernels are played
on the CPU, with their rules, and on just the memory that they would touch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings

import pytest
import torch
from played_kernels import DTYPE, forbidden, full_of_rubbish, memory
from torch import nn

import sparse24
from sparse24 import Sparse24Warning, SparseGatedMLP, SparseLinear, _library, ops
from sparse24.formats import (
    DTYPE_CODE,
    E4M3,
    FORMATS,
    FORWARD,
    GRAD_WEIGHT,
    GemmProblem,
    SparseOperand,
    metadata_bytes,
    round_up,
)
from sparse24.layers import float8 as float8_layers
from sparse24.ops import float8
from sparse24.ops.float8 import products
from sparse24.ops.gemm.padding import pad, padded_extents
from sparse24.reference import float8 as reference8

MODES = ("fp8-hybrid", "fp8")
# (tokens, in_features, out_features): each odd size on both sides, alone and beside one that fits.
SHAPES = [
    (1, 4, 4), (7, 12, 20), (31, 36, 100), (33, 48, 68), (31, 40, 64), (7, 64, 36), (65, 96, 132), (33, 132, 96),
    (31, 128, 1500), (7, 260, 1500), (1, 2044, 36),
]  # fmt: skip


# ---- the kernels, played on the CPU ---------------------------------------------------------------------------------


def refusal(problem, rhs_ld, out_ld, accumulation=0, index=0) -> str:
    """`unsupported_layout` of csrc/gemm/operands.cpp, 8 bits; overlapping rows are an error of csrc/api/gemm.cpp."""
    width = problem.n if problem.pass_code == GRAD_WEIGHT else problem.m
    assert rhs_ld >= problem.k and out_ld >= width
    if rhs_ld % 16:
        return "rows of the dense operand"
    if problem.k == 0 or problem.k % 32:
        return "k"
    return "rows of the output" if out_ld % (16 // DTYPE[problem.out_dtype].itemsize) else ""


class Kernels:
    """Stands in for the binding; `launched` counts."""

    launched = 0

    def sparse_gemm(self, problem, lhs, rhs, out, terms, *_):
        (packed, E, scale), (rhs, rhs_ld, rhs_scale), (out, out_ld), (bias, accumulate, *_) = lhs, rhs, out, terms
        assert not refusal(problem, rhs_ld, out_ld)
        assert not any(pointer % 16 for pointer in (packed, E, rhs, out))
        pass_code, m, n, k, _, out_dtype = problem
        values = memory(packed, m, k // 2, k // 2, torch.uint8).view(E4M3)
        positions = memory(E, 1, metadata_bytes(m, k, E4M3), 0, torch.uint8)[0]
        scale, rhs_scale = (memory(pointer, 1, 1, 1, torch.float32) for pointer in (scale, rhs_scale))
        lhs = reference8.decompress_float8(values, positions, scale, m, k).double()
        rhs = memory(rhs, n, k, rhs_ld, torch.uint8).view(E4M3).double() * rhs_scale
        result = lhs @ rhs.T if pass_code == GRAD_WEIGHT else rhs @ lhs.T
        out_dtype = DTYPE[out_dtype]
        whole_units = min(out_ld, round_up(result.shape[1], 16 // out_dtype.itemsize))
        out = memory(out, result.shape[0], whole_units, out_ld, out_dtype)
        out[:, result.shape[1] :] = float("nan")
        out = out[:, : result.shape[1]]
        if bias:
            result = result + memory(bias, 1, m, m, out_dtype).double()
        out.copy_(result + out.double() if accumulate else result)
        Kernels.launched += 1


@contextlib.contextmanager
def sparse_kernels_only(where: str):
    """8-bit products are made by kernels: those of "cuda", or "played" on the CPU. Gives the device."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        dense = products.unpack_dense
        patch.setattr(products, "unpack_dense", lambda *args: forbidden() if args[4] else dense(*args))  # but of no k
        if where == "played":
            patch.setattr(products, "where", lambda t: (Kernels(), _library.CUDA, 0, 0))
            patch.setattr(products, "_unsupported", refusal)
            patch.setattr(products, "_plan", lambda *product: (1, 0))
            patch.setattr(torch.Tensor, "new_empty", full_of_rubbish)
        warnings.simplefilter("error", Sparse24Warning)
        yield "cpu" if where == "played" else where


@pytest.fixture(params=["played", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request) -> str:
    """The device where sparse kernels run; that they do is part of each test."""
    with sparse_kernels_only(request.param) as device:
        yield device


# ---- extents --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(14)
@pytest.mark.parametrize("pass_code", [FORWARD, GRAD_WEIGHT])
def test_padded_extents_obey_the_kernels_are_least_and_keep_E(pass_code):
    sizes = (4, 8, 12, 20, 28, 32, 36, 60, 64, 68, 96, 124, 128, 132, 1500)
    for m, n, k, out_dtype in itertools.product(sizes, sizes, sizes, (torch.bfloat16, torch.float32)):
        problem = GemmProblem(pass_code, m, n, k, DTYPE_CODE[E4M3], DTYPE_CODE[out_dtype])
        to = padded_extents(*problem[:4], out_dtype.itemsize, FORMATS[E4M3])
        assert not refusal(problem._replace(k=to.k), to.rhs_ld, to.out_ld)
        assert (to.m, to.n) == (m, n) and k <= to.k < k + 32 and to.rhs_ld == to.k
        assert metadata_bytes(m, to.k, E4M3) == metadata_bytes(m, k, E4M3)
        width = n if pass_code == GRAD_WEIGHT else m
        if not refusal(problem, k, width):
            assert to == (m, n, k, k, width), "padded what fits"


@pytest.mark.gpu
def test_the_rules_that_tests_play_are_those_of_the_library():
    sizes = (4, 8, 12, 16, 32, 36, 48, 64, 96, 1500)
    for pass_code, m, k, out_dtype in itertools.product((FORWARD, GRAD_WEIGHT), sizes, sizes, DTYPE.values()):
        if out_dtype != torch.bfloat16 and (pass_code == FORWARD or out_dtype != torch.float32):
            continue  # no kernel writes that
        problem = GemmProblem(pass_code, m, m, k, DTYPE_CODE[E4M3], DTYPE_CODE[out_dtype])
        product = (problem, k, m, 0, torch.cuda.current_device())
        assert bool(products._unsupported(*product)) == bool(refusal(*product)), product
        to = padded_extents(*problem[:4], out_dtype.itemsize, FORMATS[E4M3])
        assert not products._unsupported(problem._replace(k=to.k), to.rhs_ld, to.out_ld, *product[3:]), product


def test_what_fits_is_not_copied():
    """A product that is here for the rows of its output alone."""
    E = torch.zeros(metadata_bytes(36, 64, E4M3), dtype=torch.uint8)
    weight, x8 = SparseOperand(torch.zeros(36, 32).to(E4M3), E), torch.zeros(5, 64).to(E4M3)
    out = torch.empty(5, 36, dtype=torch.bfloat16)
    padded = pad(GemmProblem(FORWARD, 36, 5, 64, 3, 1), weight, x8, out, False)
    assert padded.lhs.values is weight.values and padded.lhs.E is E and padded.rhs is x8
    assert padded.out.shape == (5, 40) and padded.wanted is out


# ---- products -------------------------------------------------------------------------------------------------------


def one(device, value=1.0):
    return torch.full((1,), value, device=device)


def integers(*shape, device="cpu"):
    return torch.randint(-3, 4, shape).float().to(device)


def gradient(tokens: int, features: int, device="cpu", largest: int = 3):
    """Zero for two of each four tokens."""
    dy = torch.randint(-largest, largest + 1, (tokens, features)).float()
    dy[torch.arange(tokens) % 4 >= 2] = 0
    return dy.to(device)


def packed_weight(w):
    """(w where it is kept, its forms in 8 bits)."""
    mask, forms = ops.transposable_mask(w), float8.empty_packed_float8(*w.shape, w.device)
    float8.pack_float8_(False, [w], [mask], [[t] for t in forms], [one(w.device)], [one(w.device, 0.0)])
    return torch.where(ops.unpack_mask(mask), w, 0).double(), forms


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_odd_sizes_are_exact_on_small_integers(kernels, shape):
    tokens, in_features, out_features = shape
    unit = one(kernels)
    w, (packed, E, packed_t, E_t) = packed_weight(integers(out_features, in_features, device=kernels))
    x, dy = integers(tokens, in_features, device=kernels), gradient(tokens, out_features, kernels).bfloat16()
    bias = torch.arange(out_features, device=kernels).remainder(7).float()
    x8, x8_t = float8.quantize(x, unit, transposed=True)
    y = float8.sparse_mm_float8(x8, unit, packed, E, unit, out_features, bias=bias)
    assert torch.equal(y, (x.double() @ w.T + bias).bfloat16()) and y.is_contiguous()
    pruned, E_dy, dy8, _ = float8.mvue_quantize(dy, torch.tensor([3, 4], device=kernels), unit, float8=True)
    dx = float8.sparse_mm_float8(dy8, unit, packed_t, E_t, unit, in_features)
    assert torch.equal(dx, (dy.double() @ w).bfloat16()) and dx.is_contiguous()
    exact = dy.double().T @ x.double()
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        dw = torch.full(exact.shape, 5.0, dtype=dtype, device=kernels)
        float8.grad_weight_float8_(pruned, E_dy, unit, x8_t, unit, dw, True)
        assert torch.equal(dw, (exact + 5).to(dtype))
        float8.grad_weight_float8_(pruned, E_dy, unit, x8_t, unit, dw)
        assert torch.equal(dw, exact.to(dtype))


@pytest.mark.fault(14, 22)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(31, 20, 12), (7, 64, 36), (31, 64, 64), (65, 37, 1500), (7, 5, 8), (7, 5, 1)])
def test_gradients_accumulate_into_memory_that_begins_anywhere(kernels, shape, offset):
    """As `.grad` in a flat buffer does; beside them nothing changes."""
    tokens, in_features, out_features = shape
    unit, numel = one(kernels), in_features * out_features
    x, dy = integers(tokens, in_features, device=kernels), gradient(tokens, out_features, kernels).bfloat16()
    x8_t = float8.quantize(x, unit, rows=False, transposed=True)[1]
    pruned, E, *_ = float8.mvue_quantize(dy, torch.tensor([3, 4], device=kernels), unit, float8=True)
    once = dy.double().T @ x.double()
    for dtype in (torch.bfloat16, torch.float32):
        flat = torch.full((numel + 64,), 7.0, device=kernels, dtype=dtype)
        out = flat[offset : offset + numel].view(out_features, in_features)
        # Around 512 bfloat16 has steps of 4: rounding the product first, or twice, would show.
        out.copy_(torch.randint(-600, 601, out.shape, device=kernels))
        expected = (out.double() + once).to(dtype)
        float8.grad_weight_float8_(pruned, E, unit, x8_t, unit, out, True)
        assert torch.equal(out, expected)
        assert (flat[:offset] == 7).all() and (flat[offset + numel :] == 7).all()


@pytest.mark.fault(19, 22)
def test_operands_off_a_16_byte_boundary_run_the_kernels_too(kernels):
    unit = one(kernels)
    w, (packed, E, *_) = packed_weight(integers(32, 64, device=kernels))
    x = integers(31, 64, device=kernels)
    x8 = float8.quantize(x, unit)[0]

    def shifted(t, by=1):
        flat = t.new_zeros(t.numel() + by)
        flat[by:] = t.reshape(-1)
        return flat[by:].view(t.shape)

    wide = x8.new_zeros(31, 75)
    wide[:, 3:67] = x8
    for operands in [(shifted(x8), packed, E), (x8, shifted(packed), E), (x8, packed, shifted(E, 3)),
                     (wide[:, 3:67], packed, E)]:  # fmt: skip
        y = float8.sparse_mm_float8(operands[0], unit, *operands[1:], unit, 32)
        assert torch.equal(y, (x.double() @ w.T).bfloat16())


def test_a_single_row_may_have_any_stride(kernels):
    unit, x, seed = one(kernels), integers(7, 64, device=kernels), torch.tensor([3, 4], device=kernels)
    w, (packed, E, *_) = packed_weight(integers(32, 64, device=kernels))
    x8, x8_t = float8.quantize(x, unit, transposed=True)
    y = float8.sparse_mm_float8(x8[:1].as_strided((1, 64), (1, 1)), unit, packed, E, unit, 32)
    assert torch.equal(y, (x[:1].double() @ w.T).bfloat16())
    dy = gradient(7, 1, kernels).bfloat16()
    pruned, E, *_ = float8.mvue_quantize(dy, seed, unit, float8=True)
    dw = torch.zeros(64, device=kernels).as_strided((1, 64), (1, 1))
    float8.grad_weight_float8_(pruned, E, unit, x8_t, unit, dw)
    assert torch.equal(dw, (dy.double().T @ x.double()).float())


def test_not_a_number_stays_in_its_row(kernels):
    """Zeros beside an operand meet nothing but zeros."""
    unit, x = one(kernels), integers(7, 20, device=kernels)
    x[3] = float("nan")
    _, (packed, E, *_) = packed_weight(integers(12, 20, device=kernels))
    y = float8.sparse_mm_float8(float8.quantize(x, unit)[0], unit, packed, E, unit, 12)
    assert y[3].isnan().all() and y[torch.arange(7) != 3].isfinite().all()


@pytest.mark.fault(14, 36)
def test_what_padding_does_not_help_is_multiplied_densely_and_said_once(monkeypatch):
    monkeypatch.setattr(products, "where", lambda t: (Kernels(), _library.CUDA, 0, 0))
    monkeypatch.setattr(products, "_unsupported", lambda *product: "the GPU is of another kind")
    _library.warn_once.cache_clear()
    unit, x = one("cpu"), integers(7, 20)
    w, (packed, E, *_) = packed_weight(integers(12, 20))
    x8 = float8.quantize(x, unit)[0]
    with pytest.warns(Sparse24Warning, match="an 8-bit product multiplies densely .*of another kind") as caught:
        for _ in range(2):
            y = float8.sparse_mm_float8(x8, unit, packed, E, unit, 12)
            assert torch.equal(y, (x.double() @ w.T).bfloat16())
    assert len(caught) == 1


@pytest.mark.gpu
@pytest.mark.fault(35)
def test_products_of_odd_sizes_replay_in_a_cuda_graph():
    unit, x = one("cuda"), integers(31, 36, device="cuda")
    w, (packed, E, *_) = packed_weight(integers(20, 36, device="cuda"))
    step = lambda: float8.sparse_mm_float8(float8.quantize(x, unit)[0], unit, packed, E, unit, 20)  # noqa: E731
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    x.neg_()
    graph.replay()
    assert torch.equal(y, (x.double() @ w.T).bfloat16())


# ---- layers ---------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self, width: int, d_ff: int, bias: bool):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, d_ff, bias), nn.ReLU(), nn.Linear(d_ff, width, bias)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def few(rows: int, columns: int, count: int) -> torch.Tensor:
    """`count` of each row are 1 or -1."""
    places = torch.rand(rows, columns).argsort(1)[:, :count]
    return torch.zeros(rows, columns).scatter(1, places, torch.randint(0, 2, places.shape) * 2.0 - 1)


@torch.no_grad()
def with_small_integers(module: nn.Module) -> nn.Module:
    """Sums before and behind an activation stay below 17, the first integer that e4m3 rounds."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            is_down = name in ("fc2", "down_proj")
            layer.weight.copy_(few(*layer.weight.T.shape, 2).T if is_down else few(*layer.weight.shape, 3))
            if layer.bias is not None:
                layer.bias.copy_(torch.randint(-1, 2, layer.bias.shape))
    sparse24.refresh(module, search=True)
    return module


def linear(width: int, d_ff: int, bias: bool, precision: str, **settings) -> nn.Module:
    return with_small_integers(SparseLinear(width, d_ff, bias, precision=precision, **settings))


def plain(width: int, d_ff: int, bias: bool, precision: str, **settings) -> nn.Module:
    root = nn.ModuleDict({"mlp": Plain(width, d_ff, bias)})
    report = sparse24.sparsify(root, precision=precision, **settings)
    assert report.converted == ["mlp.fc1", "mlp.fc2"] and not report.skipped and report.fused == {"mlp": ""}
    return with_small_integers(root["mlp"])


def gated(width: int, d_ff: int, bias: bool, precision: str, **settings) -> nn.Module:
    module = SparseGatedMLP(width, d_ff, bias, "relu", precision=precision, **settings)
    assert (module.packed is not None) == (d_ff % 64 == 0), "run as one function where E has whole blocks"
    return with_small_integers(module)


def results(module: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def masked(module: nn.Module) -> nn.Module:
    """The dense module whose weights are masked, in float64."""
    twin = copy.deepcopy(module)
    sparse24.densify(twin, masked=True)
    return twin.double()


@pytest.fixture(params=["cpu", "played", pytest.param("cuda", marks=pytest.mark.gpu)])
def rounding(request):
    """(device, dtype to which products round): a GPU's kernels write bfloat16."""
    if request.param == "cpu":
        yield "cpu", torch.float32
        return
    with sparse_kernels_only(request.param) as device:
        yield device, torch.float32 if device == "cpu" else torch.bfloat16


@pytest.mark.fault(14, 15, 16, 17)
@pytest.mark.parametrize("precision", MODES)
@pytest.mark.parametrize("make", [linear, plain, gated])
@pytest.mark.parametrize("sizes", [(4, 36), (40, 68), (100, 64), (48, 192), (64, 128)])
def test_layers_compute_the_masked_function(rounding, sizes, make, precision):
    """With scales that each cast makes for itself, and with those of the step before."""
    device, rounded = rounding
    for bias, mvue, counts in ((False, True, (0, 1, 31, 33)), (True, True, (0, 1, 31, 33)), (True, False, (33,))):
        module = make(*sizes, bias, precision, mvue=mvue).to(device)
        twin, layers = masked(module), [layer for layer in module.modules() if isinstance(layer, SparseLinear)]
        for tokens in counts:
            x = torch.randint(-1, 2, (tokens, sizes[0])).float().to(device)
            dy = gradient(tokens, layers[-1].out_features, device, largest=1)
            y, dx, *of_parameters = results(twin, x.double(), dy.double())
            expected = [y.to(rounded), dx.to(rounded), *of_parameters]
            float8_layers.forget_scales(layers)
            for _ in range(2):
                for ours, exact in zip(results(module, x, dy), expected, strict=True):
                    assert ours.dtype == torch.float32 and torch.equal(ours, exact.float())
                float8_layers.update_scales(layers)
                sparse24.refresh(module)
