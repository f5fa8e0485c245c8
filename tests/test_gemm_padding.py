"""Products of odd sizes run the sparse kernels, with zeros around them, and are what they would be without.

Where there is no GPU the kernels are played on the CPU, with their rules, and on just the memory that they would touch.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from gemm_cases import dense_gradient, layer, packed_rows, small_integers
from played_kernels import DTYPE, forbidden, full_of_rubbish, memory

from sparse24 import Sparse24Warning, _library, ops, reference
from sparse24.formats import (
    DTYPE_CODE,
    FORWARD,
    GRAD_INPUT,
    GRAD_INPUT_OF_OUTPUT,
    GRAD_WEIGHT,
    GRAD_WEIGHT_OF_INPUT,
    HALF_DTYPES,
    M_BY_N,
    OF_ACTIVATIONS,
    GemmProblem,
    SparseOperand,
    metadata_bytes,
    padded_tokens,
    round_up,
)
from sparse24.ops.gemm import launch as gemm_launch
from sparse24.ops.gemm import products, pruned_activations, weight_gradient
from sparse24.ops.gemm.padding import pad, padded_extents
from sparse24.testing import assert_as_accurate

DENSE = products.dense
WEIGHT_GRADIENTS = (GRAD_WEIGHT, GRAD_WEIGHT_OF_INPUT)
PASSES = (FORWARD, GRAD_INPUT, *WEIGHT_GRADIENTS, *OF_ACTIVATIONS)
ALONG_K = (FORWARD, *OF_ACTIVATIONS)  # the sparse operand
ROWS_OF_K = (*WEIGHT_GRADIENTS, GRAD_INPUT_OF_OUTPUT)  # the dense one
FEATURES = (4, 12, 20, 36, 1500, 2044)
# (tokens, in_features, out_features): each odd size on both sides, alone and beside one that fits.
SHAPES = [
    (1, 4, 4), (7, 12, 20), (31, 20, 12), (65, 36, 100), (31, 24, 64), (7, 64, 36), (65, 16, 12), (31, 128, 1500),
    (7, 1500, 64), (65, 1500, 2044), (31, 2044, 1500), (1, 2044, 36),
]  # fmt: skip


# ---- the kernels, played on the CPU ---------------------------------------------------------------------------------


def refusal(problem, rhs_ld, out_ld, index=0) -> str:
    """`unsupported` of csrc/gemm/sparse_gemm.cpp, as far as it is about sizes."""
    pass_code, m, _, k, dtype, out_dtype = problem
    if DTYPE[dtype] not in HALF_DTYPES:
        return "dtype"
    if rhs_ld % 8:
        return "rows of the dense operand"
    if out_ld % (16 // DTYPE[out_dtype].itemsize):
        return "rows of the output"
    if pass_code in OF_ACTIVATIONS and out_dtype != dtype:
        return "no kernel"
    if pass_code in ALONG_K and (k % 16 or (k == 0 and pass_code == FORWARD)):
        return "in_features"
    return "rows of the sparse operand" if pass_code not in ALONG_K and m % 8 else ""


def contiguous(pass_code, m, n, k) -> tuple[int, int]:
    """rhs_ld and out_ld where nothing lies between rows."""
    return n if pass_code in ROWS_OF_K else k, n if pass_code in M_BY_N else m


def extents(pass_code, m, other) -> tuple[int, int, int]:
    """m, n, k of which two are features, the third tokens."""
    if pass_code in OF_ACTIVATIONS:
        return 31, m, other
    return (m, other, 31) if pass_code in WEIGHT_GRADIENTS else (m, 31, other)


class Kernels:
    """Stands in for the binding; `launched` counts."""

    launched = 0

    def sparse_gemm(self, problem, lhs, rhs, out, terms, *_):
        pass_code, m, n, k, dtype, out_dtype = problem
        (packed, E, _), (rhs, rhs_ld, _), (out, out_ld), (bias, accumulate, *_) = lhs, rhs, out, terms
        assert not refusal(GemmProblem(pass_code, m, n, k, dtype, out_dtype), rhs_ld, out_ld)
        dtype, out_dtype = DTYPE[dtype], DTYPE[out_dtype]
        assert not any(pointer % 16 for pointer in (packed, E, rhs, out))
        along_k, rows_of_k = pass_code in ALONG_K, pass_code in ROWS_OF_K
        sparse_k = padded_tokens(k) if pass_code in WEIGHT_GRADIENTS else k
        rows, columns = (m, sparse_k // 2) if along_k else (sparse_k // 2, m)
        values = memory(packed, rows, columns, columns, dtype)
        positions = memory(E, 1, metadata_bytes(m, sparse_k), 0, torch.uint8)[0]
        if along_k:
            lhs = reference.decompress(values, positions, m, k).double()
        else:
            lhs = reference.decompress(values, positions, sparse_k, m, True).double()[:k].T
        rhs = memory(rhs, *((k, n) if rows_of_k else (n, k)), rhs_ld, dtype).double()
        result = lhs @ (rhs if rows_of_k else rhs.T)
        if pass_code not in M_BY_N:
            result = result.T
        whole_units = min(out_ld, round_up(result.shape[1], 16 // out_dtype.itemsize))
        out = memory(out, result.shape[0], whole_units, out_ld, out_dtype)
        out[:, result.shape[1] :] = float("nan")
        out = out[:, : result.shape[1]]
        if bias:
            result = result + memory(bias, 1, m, m, dtype).double()
        out.copy_(result + out.double() if accumulate else result)
        Kernels.launched += 1


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """Where sparse kernels run; that they do is part of each test."""
    for module in (products, pruned_activations, weight_gradient):
        monkeypatch.setattr(module, "dense", forbidden)
    if request.param == "cpu":
        monkeypatch.setattr(gemm_launch, "where", lambda t: (Kernels(), _library.CUDA, 0, 0))
        monkeypatch.setattr(gemm_launch, "unsupported", refusal)
        monkeypatch.setattr(gemm_launch, "plan", lambda *product: (1, 0))
        monkeypatch.setattr(torch.Tensor, "new_empty", full_of_rubbish)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        yield request.param


# ---- extents --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(14)
@pytest.mark.parametrize("pass_code", PASSES)
def test_padded_extents_obey_the_kernels_are_least_and_keep_E(pass_code):
    sizes = (*FEATURES, 8, 16, 24, 60, 64, 68, 124, 252, 260)
    for m, other, dtype, out_bytes in itertools.product(sizes, sizes, HALF_DTYPES, (2, 4)):
        if pass_code in OF_ACTIVATIONS and out_bytes != 2:
            continue  # no kernel
        m, n, k = extents(pass_code, m, other)
        codes = (DTYPE_CODE[dtype], DTYPE_CODE[dtype if out_bytes == 2 else torch.float32])
        to = padded_extents(pass_code, m, n, k, out_bytes)
        assert not refusal(GemmProblem(pass_code, *to[:3], *codes), to.rhs_ld, to.out_ld)
        assert (m, n, k) <= to[:3] and to.m < m + 8 and to.n == n and to.k < k + 16
        sparse_k = padded_tokens(k) if pass_code in WEIGHT_GRADIENTS else k
        assert metadata_bytes(to.m, round_up(to.k, 4)) == metadata_bytes(m, sparse_k)
        rhs_ld, out_ld = contiguous(pass_code, m, n, k)
        if not refusal(GemmProblem(pass_code, m, n, k, *codes), rhs_ld, out_ld):
            assert to == (m, n, k, rhs_ld, out_ld), "padded what fits"


@pytest.mark.gpu
def test_the_rules_that_tests_play_are_those_of_the_library():
    sizes = (4, 8, 12, 16, 20, 24, 36, 40, 1500, 2044)
    for pass_code, m, other, out in itertools.product(PASSES, sizes, sizes, (torch.bfloat16, torch.float32)):
        m, n, k = extents(pass_code, m, other)
        codes = (DTYPE_CODE[torch.bfloat16], DTYPE_CODE[out])
        product = (GemmProblem(pass_code, m, n, k, *codes), *contiguous(pass_code, m, n, k), 0)
        assert bool(gemm_launch.unsupported(*product)) == bool(refusal(*product)), product
        if pass_code in OF_ACTIVATIONS and out != torch.bfloat16:
            continue  # no kernel
        to = padded_extents(pass_code, m, n, k, out.itemsize)
        padded = GemmProblem(pass_code, *to[:3], *codes)
        assert not gemm_launch.unsupported(padded, to.rhs_ld, to.out_ld, 0), product


def test_what_fits_is_not_copied():
    """A product that is here for the rows of its output alone."""
    weight = SparseOperand(torch.randn(36, 32).bfloat16(), torch.zeros(metadata_bytes(36, 64), dtype=torch.uint8))
    x, out = torch.randn(5, 64).bfloat16(), torch.empty(5, 36, dtype=torch.bfloat16)
    padded = pad(GemmProblem(FORWARD, 36, 5, 64, 1, 1), weight, x, out, False)
    assert padded.lhs.values is weight.values and padded.lhs.E is weight.E and padded.rhs is x
    assert padded.out.shape == (5, 40) and padded.wanted is out
    dw = torch.empty(64, 36, dtype=torch.float32)  # nine units of four: only x must be padded
    packed_dy = SparseOperand(torch.zeros(4, 64).bfloat16(), weight.E, k_major=False)
    padded = pad(GemmProblem(GRAD_WEIGHT, 64, 36, 5, 1, 0), packed_dy, torch.zeros(5, 36).bfloat16(), dw, True)
    assert padded.out is dw and padded.accumulate and padded.rhs.shape == (5, 40)
    w, dx = torch.zeros(16, 24).bfloat16(), torch.zeros(5, 24).bfloat16()  # here for the address of dy
    packed_dy = SparseOperand(torch.zeros(5, 8).bfloat16(), weight.E)
    padded = pad(GemmProblem(GRAD_INPUT_OF_OUTPUT, 5, 24, 16, 1, 1), packed_dy, w, dx, False)
    assert padded.rhs is w and padded.out is dx and padded.lhs.values is packed_dy.values


# ---- products -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_odd_sizes_are_exact_on_small_integers(device, shape):
    tokens, in_features, out_features = shape
    for dtype, wide in itertools.product(HALF_DTYPES, (False, True)):
        out_dtype = torch.float32 if wide else dtype
        x, w, dy, (packed, E, packed_t, E_t) = layer(*shape, dtype, device, integers=True)
        bias = torch.arange(out_features, device=device).remainder(7).to(dtype)
        exact = x.double() @ w.double().T
        assert torch.equal(ops.sparse_mm(x, packed, E, out_features, out_dtype=out_dtype), exact.to(out_dtype))
        y = ops.sparse_mm(x, packed, E, out_features, bias=bias, out_dtype=out_dtype)
        assert torch.equal(y, (exact + bias.double()).to(out_dtype)) and y.is_contiguous()
        dx = ops.sparse_mm_grad_input(dy, packed_t, E_t, in_features, out_dtype=out_dtype)
        assert torch.equal(dx, (dy.double() @ w.double()).to(out_dtype)) and dx.is_contiguous()
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        exact = dense_gradient(packed_dy, E_dy, tokens).double().T @ x.double()
        dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=out_dtype)
        assert torch.equal(dw, exact.to(out_dtype)) and dw.is_contiguous()
        packed_x, E_x = ops.mvue_compress(x, torch.tensor([3, 4], device=device))
        exact = dy.double().T @ dense_gradient(packed_x, E_x, tokens).double()
        dw = ops.sparse_mm_grad_weight_input(packed_x, E_x, dy, in_features, out_dtype=out_dtype)
        assert torch.equal(dw, exact.to(out_dtype)) and dw.is_contiguous()


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_of_odd_sizes_are_at_most_twice_those_of_dense_pytorch(device, shape):
    tokens, in_features, out_features = shape
    for dtype in HALF_DTYPES:
        x, w, dy, (packed, E, packed_t, E_t) = layer(*shape, dtype, device)
        bias = torch.randn(out_features).to(device, dtype)
        exact = x.double() @ w.double().T + bias.double()
        plain = torch.nn.functional.linear(x, w, bias)
        assert_as_accurate(ops.sparse_mm(x, packed, E, out_features, bias=bias), plain, exact)
        dx = ops.sparse_mm_grad_input(dy, packed_t, E_t, in_features)
        assert_as_accurate(dx, dy @ w, dy.double() @ w.double())
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        pruned = dense_gradient(packed_dy, E_dy, tokens)
        dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features)
        assert_as_accurate(dw, pruned.T @ x, pruned.double().T @ x.double())


@pytest.mark.fault(14, 15, 22)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_pruned_activations_of_odd_sizes_are_exact_on_small_integers(device, shape, offset):
    """The weight begins anywhere, as in a flat buffer; what lies around it is nobody's. A bias is rounded once."""
    tokens, in_features, out_features = shape
    numel = in_features * out_features
    for dtype in HALF_DTYPES:
        x, dy = (small_integers(tokens, n, dtype=dtype, device=device) for n in (in_features, out_features))
        (x, *packed_x), (dy, *packed_dy) = packed_rows(x), packed_rows(dy)
        flat = torch.full((numel + 64,), float("nan"), device=device, dtype=dtype)
        w = flat[offset : offset + numel].view(out_features, in_features)
        w.copy_(small_integers(out_features, in_features, dtype=dtype, device=device))
        # Steps of 1/2 around 512: rounding the product first, or twice, would show in bfloat16.
        bias = torch.randint(-600, 601, (out_features,), device=device).to(dtype)
        exact = x.double() @ w.double().T
        y = ops.sparse_mm_input(*packed_x, w)
        assert torch.equal(y, exact.to(dtype)) and y.is_contiguous()
        assert torch.equal(ops.sparse_mm_input(*packed_x, w, bias=bias), (exact + bias.double()).to(dtype))
        dx = ops.sparse_mm_grad_input_output(*packed_dy, w)
        assert torch.equal(dx, (dy.double() @ w.double()).to(dtype)) and dx.is_contiguous()


@pytest.mark.fault(14)
@pytest.mark.parametrize("shape", [(31, 20, 12), (65, 36, 64), (7, 64, 36), (31, 2044, 1500)])
def test_decay_follows_a_padded_product(device, shape):
    """The epilogue would take the padded extents for those of weight and mask."""
    tokens, in_features, out_features = shape
    x, w, dy, _ = layer(*shape, torch.bfloat16, device, integers=True)
    mask = ops.transposable_mask(w)
    decay = (torch.tensor([2.0], device=device), [w], [mask])
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
    for out_dtype in (torch.bfloat16, torch.float32):
        expected = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=out_dtype)
        ops.masked_decay_(expected, w, mask, 2.0)
        dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=out_dtype, decay=decay)
        assert torch.equal(dw, expected)
        packed_x, E_x = ops.mvue_compress(x, torch.tensor([3, 4], device=device))
        expected = ops.sparse_mm_grad_weight_input(packed_x, E_x, dy, in_features, out_dtype=out_dtype)
        ops.masked_decay_(expected, w, mask, 2.0)
        dw = ops.sparse_mm_grad_weight_input(packed_x, E_x, dy, in_features, out_dtype=out_dtype, decay=decay)
        assert torch.equal(dw, expected)


@pytest.mark.fault(14, 22)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(31, 20, 12), (65, 36, 64), (7, 64, 36), (31, 64, 64), (65, 37, 1500), (7, 5, 8)])
def test_gradients_of_odd_sizes_accumulate_with_one_rounding(device, shape, offset):
    """Into outputs that begin anywhere, as in a flat buffer; beside them nothing changes."""
    tokens, in_features, out_features = shape
    for dtype, wide in itertools.product(HALF_DTYPES, (False, True)):
        out_dtype = torch.float32 if wide else dtype
        x = torch.randint(-3, 4, (tokens, in_features), device=device).to(dtype)
        dy = torch.randint(-3, 4, (tokens, out_features), device=device).to(dtype)
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        once = dense_gradient(packed_dy, E_dy, tokens).double().T @ x.double()
        numel = in_features * out_features
        flat = torch.full((numel + 64,), 7.0, device=device).to(out_dtype)
        out = flat[offset : offset + numel].view(out_features, in_features)
        # Steps of 1/2 around 512: rounding the product first, or twice, would show in bfloat16.
        out.copy_(torch.randint(-600, 601, out.shape, device=device))
        before = out.double()
        assert ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out=out, accumulate=True) is out
        assert torch.equal(out, (before + once).to(out_dtype))
        ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out=out)
        assert torch.equal(out, once.to(out_dtype))
        packed_x, E_x = ops.mvue_compress(x, torch.tensor([3, 4], device=device))
        once = dy.double().T @ dense_gradient(packed_x, E_x, tokens).double()
        out.copy_(before)
        assert ops.sparse_mm_grad_weight_input(packed_x, E_x, dy, in_features, out=out, accumulate=True) is out
        assert torch.equal(out, (before + once).to(out_dtype))
        assert (flat[:offset] == 7).all() and (flat[offset + numel :] == 7).all()


@pytest.mark.fault(19, 22)
def test_operands_off_a_16_byte_boundary_run_the_kernels_too(device):
    x, w, dy, (packed, E, packed_t, E_t) = layer(31, 64, 32, torch.bfloat16, device, integers=True)

    def shifted(t, by=1):
        flat = t.new_zeros(t.numel() + by)
        flat[by:] = t.reshape(-1)
        return flat[by:].view(t.shape)

    y = x.float() @ w.float().T
    for operands in [(shifted(x), packed, E), (x, shifted(packed), E), (x, packed, shifted(E, 3))]:
        assert torch.equal(ops.sparse_mm(*operands, 32, out_dtype=torch.float32), y)
    dx = ops.sparse_mm_grad_input(shifted(dy), shifted(packed_t), shifted(E_t), 64, out_dtype=torch.float32)
    assert torch.equal(dx, dy.float() @ w.float())
    wide = x.new_zeros(31, 75)
    wide[:, 3:67] = x
    assert torch.equal(ops.sparse_mm(wide[:, 3:67], packed, E, 32, out_dtype=torch.float32), y)


def test_not_a_number_stays_in_its_row(device):
    """Zeros beside an operand meet nothing but zeros."""
    x, w, dy, (packed, E, packed_t, E_t) = layer(7, 20, 12, torch.bfloat16, device, integers=True)
    x[3], dy[5] = float("nan"), float("inf")
    y, dx = ops.sparse_mm(x, packed, E, 12), ops.sparse_mm_grad_input(dy, packed_t, E_t, 20)
    assert y[3].isnan().all() and y[torch.arange(7) != 3].isfinite().all()
    assert not dx[5].isfinite().all() and dx[torch.arange(7) != 5].isfinite().all()


@pytest.mark.fault(16)
def test_a_sum_of_nothing_is_the_bias(device, monkeypatch):
    monkeypatch.setattr(products, "dense", DENSE)
    _, _, _, (packed, E, *_) = layer(3, 0, 8, torch.bfloat16, device)
    bias = torch.randn(8, device=device).bfloat16()
    for x in (bias.new_zeros(3, 0), bias.new_zeros(3, 16)[:, :0]):
        assert torch.equal(ops.sparse_mm(x, packed, E, 8, bias=bias), bias.expand(3, 8))


def test_a_kernel_of_odd_size_is_launched_once(device):
    if device != "cpu":
        pytest.skip("counts the launches of the stand-in")
    x, _, _, (packed, E, *_) = layer(7, 20, 12, torch.bfloat16, device)
    before = Kernels.launched
    ops.sparse_mm(x, packed, E, 12)
    assert Kernels.launched == before + 1


@pytest.mark.fault(14, 36)
def test_what_padding_does_not_help_is_multiplied_densely_and_said_once(monkeypatch):
    reason = "the GPU is of another kind"
    monkeypatch.setattr(gemm_launch, "where", lambda t: (Kernels(), _library.CUDA, 0, 0))
    monkeypatch.setattr(gemm_launch, "unsupported", lambda *product: reason)
    _library.warn_once.cache_clear()
    x, w, _, (packed, E, *_) = layer(7, 20, 12, torch.bfloat16, "cpu", integers=True)
    with pytest.warns(Sparse24Warning, match=f"multiplies densely .*{reason}") as caught:
        for _ in range(2):
            assert torch.equal(ops.sparse_mm(x, packed, E, 12), x @ w.T)
    assert len(caught) == 1


@pytest.mark.gpu
@pytest.mark.fault(35)
def test_products_of_odd_sizes_replay_in_a_cuda_graph():
    x, w, dy, (packed, E, packed_t, E_t) = layer(31, 36, 20, torch.bfloat16, "cuda", integers=True)
    step = lambda: (ops.sparse_mm(x, packed, E, 20), ops.sparse_mm_grad_input(dy, packed_t, E_t, 36))  # noqa: E731
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    x.neg_()
    dy.mul_(2)
    graph.replay()
    assert torch.equal(y, x @ w.T) and torch.equal(dx, dy @ w)
