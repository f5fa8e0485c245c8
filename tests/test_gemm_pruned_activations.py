"""Products of a pruned activation and a dense weight: exact where exact is possible, any token count, named errors."""

from __future__ import annotations

import pytest
import torch
from gemm_cases import SHAPES, compute_dtypes, packed_rows, small_integers
from torch.utils.flop_counter import FlopCounterMode

from sparse24 import Sparse24DtypeError, Sparse24Error, _library, ops
from sparse24.formats import FORWARD_OF_INPUT, GRAD_INPUT_OF_OUTPUT, metadata_bytes
from sparse24.ops.gemm.launch import problem_of
from sparse24.testing import assert_as_accurate, column_major


def operands(tokens, in_features, out_features, dtype, device, integers=False):
    """Weight, bias, and both activations: dense, packed and E."""
    make = small_integers if integers else lambda *s, dtype, device: torch.randn(s).to(device, dtype)
    w, bias = (
        make(out_features, in_features, dtype=dtype, device=device),
        make(out_features, dtype=dtype, device=device),
    )
    x, dy = (packed_rows(make(tokens, n, dtype=dtype, device=device)) for n in (in_features, out_features))
    return w, bias, x, dy


@pytest.mark.parametrize("shape", [*SHAPES, (130, 256, 264), (1025, 256, 512)])
def test_products_of_small_integers_are_exact(device, shape):
    """Sums are integers below 2^24, exact in float32, and a GPU rounds them once; CPUs differ in that."""
    for dtype in compute_dtypes(device) if device == "cuda" else [torch.float32]:
        w, bias, (x, *packed_x), (dy, *packed_dy) = operands(*shape, dtype, device, integers=True)
        y = ops.sparse_mm_input(*packed_x, w)
        assert torch.equal(y, (x.double() @ w.double().T).to(dtype)) and y.is_contiguous()
        y = ops.sparse_mm_input(*packed_x, w, bias=bias)
        assert torch.equal(y, (x.double() @ w.double().T + bias.double()).to(dtype))
        dx = ops.sparse_mm_grad_input_output(*packed_dy, w)
        assert torch.equal(dx, (dy.double() @ w.double()).to(dtype)) and dx.is_contiguous()


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_at_most_twice_those_of_dense_pytorch(device, shape):
    for dtype in compute_dtypes(device):
        w, bias, (x, *packed_x), (dy, *packed_dy) = operands(*shape, dtype, device)
        exact = x.double() @ w.double().T
        assert_as_accurate(ops.sparse_mm_input(*packed_x, w), x @ w.T, exact)
        with_bias = torch.nn.functional.linear(x, w, bias)
        assert_as_accurate(ops.sparse_mm_input(*packed_x, w, bias=bias), with_bias, exact + bias.double())
        dx = ops.sparse_mm_grad_input_output(*packed_dy, w)
        assert_as_accurate(dx, dy @ w, dy.double() @ w.double())


def test_float64_runs_on_the_cpu():
    w, bias, (x, *packed_x), (dy, *packed_dy) = operands(7, 20, 12, torch.float64, "cpu", integers=True)
    assert torch.equal(ops.sparse_mm_input(*packed_x, w, bias=bias), x @ w.T + bias)
    assert torch.equal(ops.sparse_mm_grad_input_output(*packed_dy, w), dy @ w)


@pytest.mark.fault(19, 22)
@pytest.mark.parametrize("shape", [(31, 64, 48), (33, 36, 20)])
def test_any_strides_and_offsets_of_the_weight_give_the_right_answer(device, shape):
    dtype = compute_dtypes(device)[0]
    _, in_features, out_features = shape
    _, bias, (x, *packed_x), (dy, *packed_dy) = operands(*shape, dtype, device, integers=True)
    base = small_integers(2 * out_features, 2 * in_features + 8, dtype=dtype, device=device)
    views = {
        "rows further apart": base[:out_features, :in_features],
        "misaligned": base[:out_features, 3 : 3 + in_features],
        "every second row": base[::2, :in_features],
        "every second column": base[:out_features, : 2 * in_features : 2],
        "column-major": column_major(base[:out_features, :in_features]),
        "one row, many times": base[:1, :in_features].expand(out_features, in_features),
    }
    for name, w in views.items():
        y, exact = ops.sparse_mm_input(*packed_x, w, bias=bias), x.double() @ w.double().T + bias.double()
        assert torch.equal(y, exact.to(dtype)), name
        dx = ops.sparse_mm_grad_input_output(*packed_dy, w)
        assert torch.equal(dx, (dy.double() @ w.double()).to(dtype)), name


@pytest.mark.fault(16)
def test_no_tokens_give_empty_results_and_no_features_the_bias(device):
    dtype = compute_dtypes(device)[-1]
    w, bias = torch.randn(32, 64, device=device).to(dtype), torch.randn(32, device=device).to(dtype)
    E = torch.empty(0, dtype=torch.uint8, device=device)
    assert ops.sparse_mm_input(w.new_empty(0, 32), E, w, bias=bias).shape == (0, 32)
    assert ops.sparse_mm_grad_input_output(w.new_empty(0, 16), E, w).shape == (0, 64)
    nothing = w.new_empty(5, 0)
    assert torch.equal(ops.sparse_mm_input(nothing, E, w[:, :0], bias=bias), bias.expand(5, 32))
    assert not ops.sparse_mm_input(nothing, E, w[:, :0]).any()
    dx = ops.sparse_mm_grad_input_output(nothing, E, w[:0])
    assert dx.shape == (5, 64) and not dx.any()
    assert ops.sparse_mm_input(w.new_empty(5, 32), w.new_zeros(512, dtype=torch.uint8), w[:0]).shape == (5, 0)


@pytest.mark.fault(30, 42)
def test_operands_that_do_not_fit_are_named(device):
    dtype = compute_dtypes(device)[-1]
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    w, bias, (_, x, E_x), (_, dy, E_dy) = operands(40, 64, 32, dtype, device)
    forward, backward = ops.sparse_mm_input, ops.sparse_mm_grad_input_output
    for call, words in (
        (lambda: forward(x[:, :-2], E_x, w), r"packed_x must have shape \(40, 32\), got \(40, 30\)"),
        (lambda: forward(x[None], E_x, w), r"packed_x must be 2-D, \(tokens, in_features/2\)"),
        (lambda: forward(x, E_x[:-1], w), "E of packed_x must be"),
        (lambda: forward(x, E_x.to(torch.int8), w), "E of packed_x must be"),
        (lambda: forward(x.T.contiguous().T, E_x, w), "packed_x must be contiguous"),
        (lambda: forward(x, E_x, w[:, :-4]), r"packed_x must have shape \(40, 30\)"),
        (lambda: forward(x, E_x, w[:, :-2]), "weight must have columns in multiples of 4"),
        (lambda: forward(x, E_x, w[None]), "weight must be 2-D"),
        (lambda: forward(x, E_x, w, bias=bias[:-1]), r"bias must have shape \(32,\)"),
        (lambda: forward(x, E_x, w, bias=bias.double()), "bias must have .* weight's dtype"),
        (lambda: backward(dy[:, :-2], E_dy, w), r"packed_dy must have shape \(40, 16\)"),
        (lambda: backward(dy, E_dy[1:], w), "E of packed_dy must be"),
        (lambda: backward(dy[0], E_dy, w), r"packed_dy must be 2-D, \(tokens, out_features/2\)"),
    ):
        with pytest.raises(Sparse24Error, match=words):
            call()
    for call, name in (
        (lambda: forward(x, E_x, w.to(other)), "packed_x"),
        (lambda: backward(dy, E_dy, w.to(other)), "packed_dy"),
    ):
        with pytest.raises(Sparse24DtypeError, match=f"{name} and weight must have the same dtype"):
            call()


@pytest.mark.parametrize("tokens", [1, 31, 64])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.skipif(_library.binding() is None, reason="needs the compiled library")
def test_the_codes_of_the_binding_are_those_of_the_products(tokens, accumulate):
    """By the loops of the CPU backend, which know the layouts of each pass."""
    w, _, (x, *packed_x), (dy, *packed_dy) = operands(tokens, 64, 32, torch.bfloat16, "cpu", integers=True)
    for code, (values, E), dense, rhs in (
        (FORWARD_OF_INPUT, packed_x, x, w.T),
        (GRAD_INPUT_OF_OUTPUT, packed_dy, dy, w),
    ):
        k, n = rhs.shape
        before = small_integers(tokens, n, dtype=torch.bfloat16, device="cpu")
        out = before.clone()
        problem, lhs = problem_of(code, (tokens, n, k), w, out), (values.data_ptr(), E.data_ptr(), 0)
        rest = (w.data_ptr(), w.stride(0), 0), (out.data_ptr(), n), (0, accumulate, None, None), (0, 0)
        _library.binding().sparse_gemm(problem, lhs, *rest, _library.CPU, 0, 0)
        exact = dense.double() @ rhs.double() + (before.double() if accumulate else 0)
        assert torch.equal(out, exact.bfloat16())


@pytest.mark.gpu
@pytest.mark.fault(32)
def test_operands_on_two_devices_are_named():
    w, _, (_, *packed_x), (_, *packed_dy) = operands(8, 64, 32, torch.bfloat16, "cpu")
    for call in (
        lambda: ops.sparse_mm_input(*packed_x, w.cuda()),
        lambda: ops.sparse_mm_grad_input_output(*packed_dy, w.cuda()),
        lambda: ops.sparse_mm_input(*packed_x, w, bias=torch.zeros(32, dtype=w.dtype, device="cuda")),
    ):
        with pytest.raises(Sparse24Error, match="on (cpu but .* cuda|cuda:0 but .* cpu)"):
            call()


def test_no_gradient_passes_silently():
    w, _, (_, *packed_x), (_, *packed_dy) = operands(8, 64, 32, torch.float32, "cpu")
    w.requires_grad_()
    for out in (ops.sparse_mm_input(*packed_x, w), ops.sparse_mm_grad_input_output(*packed_dy, w)):
        with pytest.raises(Sparse24Error, match="not differentiable"):
            out.sum().backward()


def test_they_count_half_of_the_dense_flops():
    w, _, (_, *packed_x), (_, *packed_dy) = operands(24, 64, 32, torch.float32, "cpu")
    for call in (lambda: ops.sparse_mm_input(*packed_x, w), lambda: ops.sparse_mm_grad_input_output(*packed_dy, w)):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 24 * 64 * 32


def test_metadata_of_tokens_is_that_of_whole_blocks_of_four():
    """What `packed_rows` relies on where tokens are not: E is padded to 64 rows."""
    assert all(metadata_bytes(n, 64) == metadata_bytes(n + -n % 4, 64) for n in range(200))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 768, 3072), (513, 3072, 768)])
def test_repeats_are_bit_equal(shape):
    w, bias, (_, *packed_x), (_, *packed_dy) = operands(*shape, torch.bfloat16, "cuda")

    def products():
        return (
            ops.sparse_mm_input(*packed_x, w),
            ops.sparse_mm_input(*packed_x, w, bias=bias),
            ops.sparse_mm_grad_input_output(*packed_dy, w),
        )

    first, different = products(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        for ours, expected in zip(products(), first, strict=True):
            different += (ours != expected).sum()
    assert different.item() == 0


@pytest.mark.gpu
def test_real_layers_run_the_sparse_kernels():
    """Odd token counts and odd features too: what does not fit is padded, and nothing is unpacked."""
    from torch.profiler import ProfilerActivity, profile

    cases = [operands(*shape, torch.bfloat16, "cuda") for shape in ((1024, 768, 3072), (1001, 36, 20))]
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for w, bias, (_, *packed_x), (_, *packed_dy) in cases:
            ops.sparse_mm_input(*packed_x, w, bias=bias)
            ops.sparse_mm_grad_input_output(*packed_dy, w)
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in trace.key_averages()}
    assert sum(count for name, count in counts.items() if "sparse24" in name) >= 4, counts
    assert not any("decompress" in name or "unpack" in name for name in counts), counts


@pytest.mark.gpu
@pytest.mark.fault(35)
def test_products_replay_in_a_cuda_graph():
    w, bias, (x, *packed_x), (dy, *packed_dy) = operands(259, 128, 256, torch.bfloat16, "cuda", integers=True)
    step = lambda: (ops.sparse_mm_input(*packed_x, w, bias=bias), ops.sparse_mm_grad_input_output(*packed_dy, w))  # noqa: E731
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dx = step()
    w.neg_()
    graph.replay()
    assert torch.equal(y, (x.double() @ w.double().T + bias.double()).bfloat16())
    assert torch.equal(dx, (dy.double() @ w.double()).bfloat16())
