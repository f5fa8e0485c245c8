"""Masked decay inside a weight gradient's product: the product and then the decay, exact where numbers are small."""

from __future__ import annotations

import pytest
import torch
from gemm_cases import compute_dtypes, dense_gradient, layer, small_integers

from sparse24 import Sparse24DtypeError, Sparse24Error, _library, ops
from sparse24.ops.gemm import DecayTerm
from sparse24.ops.gemm import launch as gemm_launch
from sparse24.ops.gemm.decay import decay_fields
from sparse24.testing import assert_as_accurate, column_major


def decayed(out_features, in_features, dtype, device, parts=1, layout=torch.clone, integers=True):
    """`decay=` of a product: weights stacked along out_features, masks, and a factor of 2 or 0.37."""
    make = small_integers if integers else lambda *s, dtype, device: torch.randn(s).to(device, dtype)
    weights = [layout(make(out_features // parts, in_features, dtype=dtype, device=device)) for _ in range(parts)]
    factor = torch.tensor([2.0 if integers else 0.37], device=device)
    return factor, weights, [ops.transposable_mask(w) for w in weights]


def pull_of(decay, dtype=torch.float32):
    factor, weights, masks = decay
    kept = torch.cat([ops.unpack_mask(mask) for mask in masks])
    return torch.where(kept, 0, factor.to(dtype) * torch.cat(weights).to(dtype)), kept


@pytest.mark.parametrize("shape", [(96, 64, 128), (300, 1024, 256), (31, 64, 128), (33, 20, 128), (5, 4, 4)])
@pytest.mark.parametrize("out_dtype", ["same", torch.float32])
@pytest.mark.parametrize("layout", [torch.clone, column_major])
def test_decay_of_small_integers_is_exact(device, shape, out_dtype, layout):
    """One weight or two, in the dtype of the gradient or not, added to what is there or not."""
    tokens, in_features, out_features = shape
    for dtype in compute_dtypes(device):
        wanted = dtype if out_dtype == "same" else out_dtype
        x, _, dy, _ = layer(*shape, dtype, device, integers=True)
        packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
        product = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=torch.float32)
        for parts in (1, 2) if out_features % 8 == 0 else (1,):
            for w_dtype in {wanted, torch.float32}:
                decay = decayed(out_features, in_features, w_dtype, device, parts, layout)
                expected = product + pull_of(decay)[0]
                dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=wanted, decay=decay)
                if wanted == torch.float32:
                    assert torch.equal(dw, expected)
                else:  # sums of many tokens are rounded, twice where the decay is a pass of its own
                    twice = (product.to(wanted).float() + pull_of(decay)[0]).to(wanted)
                    assert_as_accurate(dw, twice, expected.double())
                total = small_integers(out_features, in_features, dtype=torch.float32, device=device)
                expected = total + expected
                ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out=total, accumulate=True, decay=decay)
                assert torch.equal(total, expected)


def test_decay_in_the_product_is_the_product_and_then_the_decay(device):
    """In fp32 bit for bit; in 16 bits at most twice the error of the two passes. What is kept has the same bits."""
    for dtype in compute_dtypes(device):
        for parts in (1, 2):
            x, _, dy, _ = layer(257, 136, 264 if parts == 1 else 256, dtype, device)
            packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device=device))
            out_features = dy.shape[1]
            for wanted in {dtype, torch.float32}:
                product = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=wanted)
                decay = decayed(out_features, 136, wanted, device, parts, integers=False)
                factor, weights, masks = decay
                dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=wanted, decay=decay)
                two_passes = product.clone()
                rows = [w.shape[0] for w in weights]
                ops.foreach_masked_decay_(list(two_passes.split(rows)), weights, masks, 1.0, factor)
                pull, kept = pull_of(decay, torch.float64)
                assert torch.equal(dw[kept], product[kept])
                if wanted == torch.float32:
                    assert torch.equal(dw, two_passes)
                    continue
                exact = dense_gradient(packed_dy, E_dy, x.shape[0]).double().T @ x.double() + pull
                assert_as_accurate(dw, two_passes, exact)


def test_decay_without_tokens_or_with_factor_zero(device):
    dtype = compute_dtypes(device)[0]
    x, _, dy, _ = layer(0, 64, 32, dtype, device)
    empty = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    decay = decayed(32, 64, dtype, device)
    dw = ops.sparse_mm_grad_weight(*empty, x, 32, decay=decay)
    assert torch.equal(dw.float(), pull_of(decay)[0])
    x, _, dy, _ = layer(24, 64, 32, dtype, device)
    packed = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    decay[0].zero_()
    plain = ops.sparse_mm_grad_weight(*packed, x, 32)
    assert torch.equal(ops.sparse_mm_grad_weight(*packed, x, 32, decay=decay), plain)


def test_decay_takes_masks_of_bytes_and_weights_that_require_gradients(device):
    dtype = compute_dtypes(device)[0]
    x, _, dy, _ = layer(24, 64, 32, dtype, device, integers=True)
    packed = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    factor, (w,), (mask,) = decayed(32, 64, dtype, device)
    expected = ops.sparse_mm_grad_weight(*packed, x, 32, decay=(factor, [w], [mask]))
    dw = ops.sparse_mm_grad_weight(*packed, x, 32, decay=(factor, (w.requires_grad_(),), (mask.view(torch.uint8),)))
    assert torch.equal(dw, expected) and not dw.requires_grad


@pytest.mark.fault(42)
def test_decay_terms_that_do_not_fit_are_named(device):
    dtype = compute_dtypes(device)[0]
    x, _, dy, _ = layer(24, 64, 32, dtype, device)
    packed = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    factor, (w,), (mask,) = decayed(32, 64, dtype, device)
    for decay, error, words in (
        ((factor.double(), [w], [mask]), Sparse24DtypeError, "decay's factor must be one float32, got torch.float64"),
        ((factor.expand(2), [w], [mask]), Sparse24DtypeError, "decay's factor must be one float32"),
        ((None, [w], [mask]), Sparse24Error, "decay needs its factor"),
        ((factor, [], []), Sparse24Error, "decay needs one weight, or two.* got 0 weights and 0 masks"),
        ((factor, [w], [mask, mask]), Sparse24Error, "got 1 weights and 2 masks"),
        ((factor, [w[:16]], [mask[:4]]), Sparse24Error, r"must make up \(32, 64\).* got \(16, 64\)"),
        ((factor, [w[:, :32]], [mask[:, :8].contiguous()]), Sparse24Error, r"got \(32, 32\)"),
        ((factor, [w[:16], w[16:, :32]], [mask[:4], mask[4:, :8].contiguous()]), Sparse24Error, r"and \(16, 32\)"),
        ((factor, [w], [mask[:4]]), Sparse24Error, "decay's mask must have shape"),
        ((factor, [w], [mask.t().contiguous().t()]), Sparse24Error, "decay's mask must be contiguous"),
        ((factor, [w[0]], [mask]), Sparse24Error, "decay's weight must be 2-D"),
        ((factor.to("meta"), [w], [mask]), Sparse24Error, "decay's factor is on meta"),
    ):
        with pytest.raises(error, match=words):
            ops.sparse_mm_grad_weight(*packed, x, 32, decay=decay)


class CpuGemm:
    """Plays the GPU's library: the same calls, by the C++ CPU backend's own product."""

    def sparse_gemm(self, *args):
        *product, (_, workspace), backend, index, stream = args
        assert backend == _library.CUDA
        _library.binding().sparse_gemm(*product, (0, workspace), _library.CPU, 0, 0)


@pytest.mark.parametrize("layout", [torch.clone, column_major])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_library_gets_weights_and_masks_of_the_decay(monkeypatch, parts, layout):
    """Addresses, strides and rows arrive as the kernels read them, and no pass follows."""
    for wanted in (torch.bfloat16, torch.float32):
        x, _, dy, _ = layer(24, 72, 128, torch.bfloat16, "cpu", integers=True)
        packed = ops.mvue_compress(dy, torch.tensor([3, 4]))
        decay = decayed(128, 72, wanted, "cpu", parts, layout)
        expected = ops.sparse_mm_grad_weight(*packed, x, 128, out_dtype=torch.float32) + pull_of(decay)[0]
        with monkeypatch.context() as context:
            context.setattr(gemm_launch, "where", lambda t: (CpuGemm(), _library.CUDA, 0, 0))
            context.setattr(gemm_launch, "unsupported", lambda *product: "")
            context.setattr(gemm_launch, "plan", lambda *product: (1, 0))
            context.delattr(gemm_launch, "decay_after")
            dw = ops.sparse_mm_grad_weight(*packed, x, 128, out_dtype=wanted, decay=decay)
            assert torch.equal(dw, expected.to(wanted))
            total = torch.ones(128, 72)
            if wanted == torch.float32:
                ops.sparse_mm_grad_weight(*packed, x, 128, out=total, accumulate=True, decay=decay)
                assert torch.equal(total, expected + 1)


def test_weights_that_the_kernels_do_not_take_decay_in_a_pass_of_their_own():
    """Another dtype than the gradient's, unlike layouts, halves that share a block of 64 rows, odd addresses."""
    w = torch.zeros(128, 72).bfloat16()
    out, factor, mask = torch.zeros(128, 72).bfloat16(), torch.ones(1), ops.transposable_mask(w)
    fields = lambda *weights: decay_fields(out, DecayTerm(factor, weights, [mask] * len(weights)))  # noqa: E731
    column = column_major(w)
    for weights, strides, rows in (((w,), (72, 1), 128), ((column,), (1, 128), 128), ((w[:64], w[64:]), (72, 1), 64)):
        first, second = weights[0].data_ptr(), weights[-1].data_ptr()
        assert fields(*weights) == (factor.data_ptr(), first, second, *strides, *[mask.data_ptr()] * 2, rows)
    assert fields(w.float()) is None
    assert fields(w[:64], column_major(w[64:])) is None
    assert fields(w[:60], w[60:]) is None
    assert fields(torch.zeros(128 * 72 + 1).bfloat16()[1:].view(128, 72)) is None
    assert fields(w.repeat(1, 2)[:, ::2]) is None


@pytest.mark.gpu
def test_decay_in_the_product_takes_no_pass_of_its_own():
    from torch.profiler import ProfilerActivity, profile

    x, _, dy, _ = layer(1024, 768, 3072, torch.bfloat16, "cuda")
    packed = ops.mvue_compress(dy, torch.tensor([1, 2], device="cuda"))
    decay = decayed(3072, 768, torch.bfloat16, "cuda", parts=2)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        ops.sparse_mm_grad_weight(*packed, x, 3072, decay=decay)
        torch.cuda.synchronize()
    names = [event.key for event in trace.key_averages()]
    assert not any("masked_decay" in name for name in names), names
