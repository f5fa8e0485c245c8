"""The three sparse products: exact where exact is possible, as accurate as dense PyTorch elsewhere, any token count."""

from __future__ import annotations

import pytest
import torch
from gemm_cases import SHAPES, compute_dtypes, dense_gradient, layer, small_integers

import sparse24
from sparse24 import Sparse24DtypeError, Sparse24Error, ops, reference
from sparse24.testing import assert_as_accurate, column_major


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_small_integers_are_exact(device, shape):
    tokens, in_features, out_features = shape
    for dtype in compute_dtypes(device):
        x, w, dy, (packed, E, packed_t, E_t) = layer(*shape, dtype, device, integers=True)
        y = ops.sparse_mm(x, packed, E, out_features, out_dtype=torch.float32)
        assert torch.equal(y.cpu(), x.float().cpu() @ w.float().cpu().T)
        dx = ops.sparse_mm_grad_input(dy, packed_t, E_t, in_features, out_dtype=torch.float32)
        assert torch.equal(dx.cpu(), dy.float().cpu() @ w.float().cpu())
        # MVUE scales by sums of magnitudes: halves of small integers, exact in 16 bits too.
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=torch.float32)
        pruned = dense_gradient(packed_dy, E_dy, tokens)
        assert torch.equal(dw.cpu(), pruned.float().cpu().T @ x.float().cpu())


@pytest.mark.fault(14, 15, 17)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_are_at_most_twice_those_of_dense_pytorch(device, shape):
    tokens, in_features, out_features = shape
    for dtype in compute_dtypes(device):
        x, w, dy, (packed, E, packed_t, E_t) = layer(*shape, dtype, device)
        bias = torch.randn(out_features).to(device, dtype)
        exact = x.double() @ w.double().T
        assert_as_accurate(ops.sparse_mm(x, packed, E, out_features), x @ w.T, exact)
        with_bias = torch.nn.functional.linear(x, w, bias)
        assert_as_accurate(ops.sparse_mm(x, packed, E, out_features, bias=bias), with_bias, exact + bias.double())
        dx = ops.sparse_mm_grad_input(dy, packed_t, E_t, in_features)
        assert_as_accurate(dx, dy @ w, dy.double() @ w.double())
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        pruned = dense_gradient(packed_dy, E_dy, tokens)
        dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features)
        exact_dw = pruned.double().T @ x.double()
        assert_as_accurate(dw, pruned.T @ x, exact_dw)


def test_the_identity_comes_back_bit_for_bit(device):
    dtype = compute_dtypes(device)[0]
    w = torch.randn(256, 128, device=device).to(dtype)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w, dtype)
    masked = w.masked_fill(~ops.unpack_mask(mask), 0)
    eye_in, eye_out = (torch.eye(n, device=device, dtype=dtype) for n in (128, 256))
    assert torch.equal(ops.sparse_mm(eye_in, packed, E, 256), masked.T)
    assert torch.equal(ops.sparse_mm_grad_input(eye_out, packed_t, E_t, 128), masked)


@pytest.mark.fault(18)
@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 4)])
def test_leading_dimensions_are_kept(device, leading):
    dtype = compute_dtypes(device)[0]
    _, w, _, (packed, E, packed_t, E_t) = layer(8, 64, 32, dtype, device, integers=True)
    x = small_integers(*leading, 64, dtype=dtype, device=device)
    dy = small_integers(*leading, 32, dtype=dtype, device=device)
    assert torch.equal(ops.sparse_mm(x, packed, E, 32), x @ w.T)
    assert torch.equal(ops.sparse_mm_grad_input(dy, packed_t, E_t, 64), dy @ w)


@pytest.mark.fault(19, 22)
def test_any_strides_and_offsets_give_the_right_answer(device):
    dtype = compute_dtypes(device)[0]
    _, w, _, (packed, E, packed_t, E_t) = layer(8, 64, 32, dtype, device, integers=True)
    base = small_integers(48, 200, dtype=dtype, device=device)
    views = {
        "every second column": base[:, : 2 * 64 : 2],
        "misaligned": base[:, 3 : 3 + 64],
        "expanded": base[:1, :64].expand(48, 64),
        "column-major": column_major(base[:, :64]),
        "every second row": base[::2, :64],
        "one row, by the stride of a column": base[:1, :64].as_strided((1, 64), (1, 1)),
        "one row of odd rows": base.flatten().as_strided((1, 64), (201, 1), 7),
        "one row, every second column": base[:1, : 2 * 64 : 2],
    }
    for name, x in views.items():
        assert torch.equal(ops.sparse_mm(x, packed, E, 32), x @ w.T), name
    for name, dy in {n: v[:, :32] for n, v in views.items()}.items():
        assert torch.equal(ops.sparse_mm_grad_input(dy, packed_t, E_t, 64), dy @ w), name


@pytest.mark.fault(16)
@pytest.mark.parametrize("shape", [(8, 2, 0), (0,), (3, 0), (0, 2, 0)])
def test_a_sum_of_no_features_is_zero_as_in_linear(device, shape):
    """Also where leading dimensions cannot be told from the number of elements."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    x = torch.zeros(shape, device=device, dtype=dtype)
    packed, E, _, _ = ops.empty_packed(128, 0, dtype, device)
    bias = torch.arange(128, device=device).to(dtype)
    expected = torch.nn.functional.linear(x, torch.zeros(128, 0, device=device, dtype=dtype), bias)
    assert torch.equal(ops.sparse_mm(x, packed, E, 128, bias=bias), expected)
    assert not ops.sparse_mm(x, packed, E, 128).any()
    _, _, packed_t, E_t = ops.empty_packed(0, 128, dtype, device)
    dx = ops.sparse_mm_grad_input(x, packed_t, E_t, 128)
    assert dx.shape == (*shape[:-1], 128) and not dx.any()


@pytest.mark.fault(16)
def test_no_tokens_give_empty_results_and_a_zero_gradient(device):
    dtype = compute_dtypes(device)[0]
    _, _, _, (packed, E, packed_t, E_t) = layer(8, 64, 32, dtype, device)
    empty_x, empty_dy = (torch.empty(0, n, dtype=dtype, device=device) for n in (64, 32))
    assert ops.sparse_mm(empty_x, packed, E, 32).shape == (0, 32)
    assert ops.sparse_mm_grad_input(empty_dy, packed_t, E_t, 64).shape == (0, 64)
    packed_dy, E_dy = ops.mvue_compress(empty_dy, torch.tensor([1, 2], device=device))
    dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, empty_x, 32)
    assert dw.shape == (32, 64) and not dw.any()


@pytest.mark.parametrize("shape", [(96, 64, 128), (40, 520, 264)], ids=["a part of a tile", "several tiles"])
@pytest.mark.parametrize("out_dtype", ["same", torch.float32])
def test_weight_gradients_accumulate_into_an_existing_one(device, out_dtype, shape):
    tokens, in_features, out_features = shape
    for dtype in compute_dtypes(device):
        x, _, dy, _ = layer(tokens, in_features, out_features, dtype, device, integers=True)
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        wanted = dtype if out_dtype == "same" else out_dtype
        once = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=torch.float32)
        total = small_integers(out_features, in_features, dtype=wanted, device=device)
        expected = (total.float() + once).to(wanted)
        assert ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out=total, accumulate=True) is total
        assert torch.equal(total, expected)
        ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out=total)
        assert torch.equal(total, once.to(wanted))


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 768, 3072), (512, 3072, 768)])
def test_250_repeats_are_bit_equal_beside_another_stream(shape):
    tokens, in_features, out_features = shape
    x, w, dy, (packed, E, packed_t, E_t) = layer(*shape, torch.bfloat16, "cuda")
    seed = torch.tensor([3, 4], device="cuda")

    def all_products():
        packed_dy, E_dy = ops.mvue_compress(dy, seed)
        return (
            ops.sparse_mm(x, packed, E, out_features),
            ops.sparse_mm_grad_input(dy, packed_t, E_t, in_features),
            ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=torch.float32),
        )

    first = all_products()
    side = torch.cuda.Stream()
    load = torch.randn(2048, 2048, device="cuda")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(250):
        with torch.cuda.stream(side):
            torch.mm(load, load)
        for ours, expected in zip(all_products(), first, strict=True):
            different += (ours != expected).sum()
    assert different.item() == 0


@pytest.mark.gpu
def test_real_layers_run_the_sparse_kernels():
    from torch.profiler import ProfilerActivity, profile

    x, w, dy, (packed, E, packed_t, E_t) = layer(1024, 768, 3072, torch.bfloat16, "cuda")
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([1, 2], device="cuda"))
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        ops.sparse_mm(x, packed, E, 3072)
        ops.sparse_mm_grad_input(dy, packed_t, E_t, 768)
        ops.sparse_mm_grad_weight(packed_dy, E_dy, x, 3072)
        torch.cuda.synchronize()
    names = [event.key for event in trace.key_averages()]
    assert sum("sparse24" in name for name in names) >= 3, names
    assert not any("decompress" in name for name in names), names


@pytest.mark.gpu
@pytest.mark.fault(35)
def test_products_and_draws_replay_in_a_cuda_graph():
    x, w, dy, (packed, E, packed_t, E_t) = layer(256, 128, 256, torch.bfloat16, "cuda")

    def step():
        seed = ops.draw_seed(dy)
        packed_dy, E_dy = ops.mvue_compress(dy, seed)
        return ops.sparse_mm(x, packed, E, 256), ops.sparse_mm_grad_weight(packed_dy, E_dy, x, 256)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, dw = step()
    graph.replay()
    first_y, first_dw = y.clone(), dw.clone()
    graph.replay()
    assert torch.equal(y, first_y)
    assert not torch.equal(dw, first_dw)  # fresh noise at each replay


@pytest.mark.gpu
@pytest.mark.fault(33)
def test_work_goes_to_the_current_stream():
    x, w, _, (packed, E, *_) = layer(256, 128, 256, torch.bfloat16, "cuda", integers=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = x * 2
        y = ops.sparse_mm(late, packed, E, 256)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(y, (2 * x) @ w.T)


# -- operands that do not fit -----------------------------------------------------------------------------------------


def test_output_dtypes_other_than_fp32_and_the_input_s_are_refused(device):
    dtype = compute_dtypes(device)[1]
    x, _, _, (packed, E, *_) = layer(8, 64, 32, dtype, device)
    with pytest.raises(Sparse24DtypeError, match="out_dtype"):
        ops.sparse_mm(x, packed, E, 32, out_dtype=torch.float64)


@pytest.mark.fault(30)
def test_dtypes_that_do_not_fit_together_are_named(device):
    dtype = torch.bfloat16
    x, _, dy, (packed, E, packed_t, E_t) = layer(8, 64, 32, dtype, device)
    with pytest.raises(Sparse24DtypeError, match="same dtype"):
        ops.sparse_mm(x.half(), packed, E, 32)
    with pytest.raises(Sparse24DtypeError, match="same dtype"):
        ops.sparse_mm_grad_input(dy.half(), packed_t, E_t, 64)
    with pytest.raises(Sparse24Error, match="bias"):
        ops.sparse_mm(x, packed, E, 32, bias=torch.zeros(32, device=device, dtype=torch.float32))


@pytest.mark.fault(42, 43)
def test_operands_of_another_size_are_refused_before_any_launch(device):
    dtype = torch.bfloat16
    x, _, dy, (packed, E, packed_t, E_t) = layer(8, 64, 32, dtype, device)
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    calls = [
        lambda: ops.sparse_mm(x, packed, E, 36),
        lambda: ops.sparse_mm(x[:, :60], packed, E, 32),
        lambda: ops.sparse_mm(x, packed, E[:-1], 32),
        lambda: ops.sparse_mm(x, packed, E[:0], 32),
        lambda: ops.sparse_mm_grad_input(dy, packed_t, E_t, 60),
        lambda: ops.sparse_mm_grad_input(dy, packed_t, E_t[1:], 64),
        lambda: ops.sparse_mm_grad_weight(packed_dy, E_dy, torch.cat([x, x, x]), 32),
        lambda: ops.sparse_mm_grad_weight(packed_dy, E_dy.to(torch.int8), x, 32),
        lambda: ops.sparse_mm_grad_weight(packed_dy, E_dy, x, 32, out=torch.empty(32, 60, device=device, dtype=dtype)),
    ]
    for call in calls:
        with pytest.raises(Sparse24Error, match="must have (shape|64 features)|must be (a )?contiguous"):
            call()
    with pytest.raises(Sparse24Error, match="accumulate=True needs out="):
        ops.sparse_mm_grad_weight(packed_dy, E_dy, x, 32, accumulate=True)


@pytest.mark.parametrize("make", [lambda: sparse24.SparseLinear(64, 32), lambda: sparse24.SparseGatedMLP(64, 128)])
def test_an_input_of_another_width_is_named_as_such(make):
    with pytest.raises(Sparse24Error, match=r"x must have 64 features in its last dimension, .* got shape \(3, 60\)"):
        make()(torch.randn(3, 60))


@pytest.mark.gpu
@pytest.mark.fault(32)
def test_operands_on_two_devices_are_named():
    x, _, _, (packed, E, *_) = layer(8, 64, 32, torch.bfloat16, "cpu")
    with pytest.raises(Sparse24Error, match="on cpu but .* cuda"):
        ops.sparse_mm(x.cuda(), packed, E, 32)


# -- by the reference -------------------------------------------------------------------------------------------------


def test_decompress_then_matmul_is_the_reference(device):
    dtype = compute_dtypes(device)[0]
    x, w, _, (packed, E, *_) = layer(8, 64, 32, dtype, device, integers=True)
    dense = reference.decompress(packed.cpu(), E.cpu(), 32, 64)
    assert torch.equal(dense, w.cpu())
