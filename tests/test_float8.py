"""8-bit operands: casts, packing, MVUE, passes and products. The compiled library has the reference's bits."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, ops, reference
from sparse24.ops import float8
from sparse24.reference import float8 as plain
from sparse24.testing import assert_as_accurate, assert_same_bits

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scale(value: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32, device=device)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


def without_library(monkeypatch):
    """Ops by the reference alone."""
    for module in (float8.casts, float8.weights, float8.gradients, float8.activations):
        monkeypatch.setattr(module, "where", lambda t: (None, -1, -1, 0))


def all_bf16(device: str) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(torch.bfloat16).view(256, 256)


# ---- casts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 2.0**-9, 2.0**12])
def test_every_bf16_value_is_cast_as_torch_casts_it_and_saturates(device, factor):
    x = all_bf16(device)
    x8, _ = float8.quantize(x, scale(factor, device))
    wide = (x.float() / factor).clamp(-448, 448)
    expected = torch.where(x.isfinite(), wide.to(E4M3).view(torch.uint8), 0x7F)
    assert torch.equal(bits(x8), expected)
    assert x8.float()[~x.isfinite()].isnan().all()  # an overflow before the cast stays visible


@pytest.mark.parametrize("shape", [(32, 16), (33, 48), (1, 16), (200, 130), (0, 16), (64, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_equal_the_reference_in_both_layouts(device, shape, dtype):
    torch.manual_seed(0)
    x, amax = 30 * torch.randn(shape, device=device).to(dtype), scale(0.0, device)
    x8, x8_t = float8.quantize(x, scale(0.25, device), transposed=True, amax=amax)
    expected = plain.to_float8(x, scale(0.25, device))
    assert torch.equal(bits(x8), bits(expected)) and torch.equal(bits(x8_t), bits(plain.transpose_padded(expected)))
    assert torch.equal(amax, plain.amax(x))


def test_column_major_and_sliced_inputs(device):
    x = torch.randn(96, 80, device=device)
    for view in (x.T, x[:, 16:48], x[::2]):
        x8, _ = float8.quantize(view, scale(1.0, device))
        assert torch.equal(bits(x8), bits(plain.to_float8(view, scale(1.0, device))))


def test_scales_are_powers_of_two_that_leave_the_margin():
    amax = torch.tensor([0.0, 1.0, 224.0, 225.0, 1e-30, 448.0, 2.0**-133])
    scales = float8.scale_of(amax)
    assert torch.equal(scales[:4], torch.tensor([1.0, 2.0**-7, 1.0, 2.0]))
    assert (torch.frexp(scales)[0] == 0.5).all()
    assert (2 * amax / scales <= 448).all()


def test_bad_scales_and_inputs_are_named():
    x = torch.randn(32, 32)
    with pytest.raises(Sparse24DtypeError, match="scale must be one float32"):
        float8.quantize(x, torch.ones(2))
    with pytest.raises(Sparse24DtypeError, match="scale must be one float32"):
        float8.quantize(x, torch.ones(1, dtype=torch.float64))
    with pytest.raises(Sparse24Error, match="must be 2-D"):
        float8.quantize(x[0], scale(1.0))


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (32, 32), (96, 224), (4, 36)])
def test_weights_are_packed_as_the_reference_packs_them(device, shape, search):
    torch.manual_seed(0)
    weights = [torch.randn(shape, device=device), torch.randn(shape, device=device, dtype=torch.bfloat16)]
    masks = [ops.transposable_mask(w) for w in weights]
    found = [m.clone().zero_() if search else m for m in masks]
    outs = [float8.empty_packed_float8(*shape, device) for _ in weights]
    scales, amaxes = [scale(2.0**-6, device)] * 2, [scale(0.0, device) for _ in weights]
    float8.pack_float8_(search, weights, found, zip(*outs, strict=True), scales, amaxes)
    for w, mask, got, out, amax in zip(weights, masks, found, outs, amaxes, strict=True):
        assert torch.equal(got, mask) and float(amax) == float(w.abs().max())
        for ours, theirs in zip(out, plain.pack_float8(w, mask, scales[0], E4M3), strict=True):
            assert torch.equal(bits(ours), bits(theirs))
        dense = float8.decompress_float8(*out[:2], scales[0], *shape)
        kept = torch.where(reference.unpack_mask(mask), plain.to_float8(w, scales[0]).float() * scales[0], 0)
        assert torch.equal(dense, kept)
        assert torch.equal(float8.decompress_float8(*out[2:], scales[0], *shape[::-1]), kept.T)


def test_masks_are_searched_on_the_weight_and_not_on_its_eight_bits():
    torch.manual_seed(0)
    w = 1 + 1e-3 * torch.randn(64, 64)  # all the same in 8 bits
    mask, outs = torch.zeros(16, 16, dtype=torch.uint16), float8.empty_packed_float8(64, 64, "cpu")
    float8.pack_float8_(True, [w], [mask], [[t] for t in outs], [scale(1.0)], [scale(0.0)])
    assert torch.equal(mask, ops.transposable_mask(w))


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (32, 16), (40, 20), (100, 130)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mvue_equals_the_reference_and_brings_the_cast(device, shape, dtype):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 gradients have no kernel on a GPU")
    torch.manual_seed(0)
    dy, seed, one = (
        torch.randn(shape, device=device).to(dtype),
        torch.tensor([3, 5], device=device),
        scale(2.0**-5, device),
    )
    amax = scale(0.0, device)
    packed, E, dy8, bias = float8.mvue_quantize(dy, seed, one, float8=True, bias_grad=True, amax=amax)
    values, positions = plain.mvue_pack_float8(dy, seed, one, E4M3)
    assert torch.equal(bits(packed), bits(values)) and torch.equal(E, positions)
    assert torch.equal(bits(dy8), bits(plain.to_float8(dy, one))) and torch.equal(amax, plain.amax(dy))
    assert_as_accurate(bias, dy.sum(0, dtype=torch.float32), dy.double().sum(0))

    packed16, E16, again, _ = float8.mvue_quantize(dy, seed, one, float8=False)
    expected, expected_E = ops.mvue_compress(dy, seed)
    assert_same_bits(packed16, expected)
    assert torch.equal(E16, expected_E) and torch.equal(bits(again), bits(dy8))


@pytest.mark.fault(91)
def test_mvue_in_eight_bits_is_unbiased_where_rounding_to_nearest_would_not_be():
    """Values far below the last place of e4m3 round to 0 to nearest; at random their mean stays."""
    torch.manual_seed(0)
    dy, draws = (torch.randn(32, 64) * torch.logspace(-3, 0, 64)).bfloat16(), 4000
    mean, square = torch.zeros(64, 32, dtype=torch.float64), torch.zeros(64, 32, dtype=torch.float64)
    one = scale(8.0)
    for i in range(draws):
        packed, E, *_ = float8.mvue_quantize(dy, torch.tensor([i, 1]), one, float8=True)
        dense = float8.decompress_float8(packed, E, one, 64, 32).double()
        mean += dense / draws
        square += dense.square() / draws
    error = (square - mean.square()).clamp_min(0).sqrt() / draws**0.5
    off = (mean - dy.T.double()).abs() / error.clamp_min(1e-12)
    assert (off < 5).float().mean() > 0.999 and off.median() < 1
    to_nearest = plain.to_float8(dy, one).float() * one
    assert (to_nearest[:, :4] == 0).all() and (mean[:4].abs().sum(1) > 0).all()


@pytest.mark.fault(89, 91)
def test_passes_count_what_they_clip_and_flush(device):
    """Of 90 tokens, without those that pad the transposed form."""
    torch.manual_seed(0)
    dy, one, seed = torch.randn(90, 64, device=device).bfloat16(), scale(2.0**-9, device), torch.tensor([1, 2])
    dy[0, :5], dy[1, :3], dy[2, 0], dy[3] = 100.0, 1e-7, torch.inf, 0.0
    expected = plain.cast_counts(dy, one)
    clipped = ((dy.float() / one).abs() > 448) & dy.isfinite()
    assert expected.tolist()[0] == int(clipped.sum()) >= 5 and expected.tolist()[1] >= 3 and expected[2] == 90 * 64
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    float8.quantize(dy, one, transposed=True, counts=counts)
    assert torch.equal(counts, expected)
    float8.mvue_quantize(dy, seed.to(device), one, float8=True, counts=counts)
    assert torch.equal(counts, 2 * expected)
    h = ops.activation(dy, "relu")
    counts.zero_()
    float8.activation_quantize(dy, "relu", one, gated=False, keep_h=False, transposed=False, counts=counts)
    assert torch.equal(counts, plain.cast_counts(h, one))
    d = ops.activation_backward(dy, dy, "relu")
    counts.zero_()
    settings = dict(gated=False, float8=False, counts=counts)
    float8.activation_backward_quantize(dy, dy, "relu", seed.to(device), one, **settings)
    assert torch.equal(counts, plain.cast_counts(d, one))
    with pytest.raises(Sparse24DtypeError, match="counts must be three int64"):
        float8.quantize(dy, one, counts=counts[:2])


@pytest.mark.fault(89)
def test_inf_and_nan_survive_in_all_forms(device):
    dy = torch.randn(32, 32, device=device).bfloat16()
    dy[3, 5], dy[9, 7] = torch.inf, torch.nan
    one = scale(1.0, device)
    packed, E, dy8, _ = float8.mvue_quantize(dy, torch.tensor([1, 2], device=device), one, float8=True)
    dense = float8.decompress_float8(packed, E, one, 32, 32)
    assert dense[5, 3].isnan() and dense[7, 9].isnan() and int(dense.isnan().sum()) == 2
    assert int(dy8.float().isnan().sum()) == 2


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, gated", [("silu", True), ("gelu_tanh", False), ("squared_relu", False)])
def test_activations_leave_in_eight_bits_as_h_would(device, kind, gated):
    torch.manual_seed(0)
    gate_up = torch.randn(70, 96, device=device).bfloat16()
    one, amax = scale(2.0**-6, device), scale(0.0, device)
    run = ops.gated_activation if gated else ops.activation
    h = run(gate_up, kind)
    kept, h8, h8_t = float8.activation_quantize(
        gate_up, kind, one, gated=gated, keep_h=True, transposed=True, amax=amax
    )
    assert_same_bits(kept, h)
    assert torch.equal(bits(h8), bits(plain.to_float8(h, one)))
    assert torch.equal(bits(h8_t), bits(plain.transpose_padded(h8))) and torch.equal(amax, plain.amax(h))

    dh, seed = torch.randn_like(h), torch.tensor([7, 8], device=device)
    backward = ops.gated_activation_backward if gated else ops.activation_backward
    d_gate_up = backward(dh, gate_up, kind)
    for eight in (True, False):
        ours = float8.activation_backward_quantize(dh, gate_up, kind, seed, one, gated=gated, float8=eight)
        theirs = float8.mvue_quantize(d_gate_up, seed, one, float8=eight)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours[:3], theirs[:3], strict=True))


# ---- products -------------------------------------------------------------------------------------------------------


def operands(m: int, n: int, k: int, device: str, integers: bool):
    torch.manual_seed(0)
    draw = (lambda *s: torch.randint(-4, 5, s).float()) if integers else (lambda *s: torch.randn(*s))
    w, x = draw(m, k).to(device), draw(n, k).to(device)
    one, other = (
        (scale(1.0, device), scale(1.0, device)) if integers else (scale(2.0**-6, device), scale(2.0**-5, device))
    )
    mask, forms = ops.transposable_mask(w), float8.empty_packed_float8(m, k, device)
    float8.pack_float8_(False, [w], [mask], [[t] for t in forms], [one], [scale(0.0, device)])
    x8, _ = float8.quantize(x, other)
    return forms, one, x8, other


@pytest.mark.parametrize("shape", [(128, 256, 128), (64, 40, 96), (256, 33, 512)])
@pytest.mark.parametrize("integers", [True, False])
def test_products_equal_float64_on_the_same_operands(device, shape, integers):
    m, n, k = shape
    (packed, E, packed_t, E_t), w_scale, x8, x_scale = operands(m, n, k, device, integers)
    w = float8.decompress_float8(packed, E, w_scale, m, k).double()
    x = x8.double() * x_scale
    bias = torch.arange(m, device=device).bfloat16()
    y = float8.sparse_mm_float8(x8, x_scale, packed, E, w_scale, m, bias=bias, accumulation="promoted")
    exact = x @ w.T + bias.double()
    if integers:
        assert torch.equal(y, exact.bfloat16())
    else:
        assert (y.double() - exact).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()

    dy8, dy_scale = float8.quantize(torch.randn(n, m, device=device).bfloat16(), x_scale)[0], x_scale
    dx = float8.sparse_mm_float8(dy8, dy_scale, packed_t, E_t, w_scale, k)
    exact = dy8.double() * dy_scale @ w
    assert (dx.double() - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradients_of_eight_bit_operands(device, accumulate, dtype):
    torch.manual_seed(0)
    tokens, m, n, one = 200, 64, 96, scale(2.0**-5, device)
    dy, x = torch.randn(tokens, m, device=device).bfloat16(), torch.randn(tokens, n, device=device).bfloat16()
    packed, E, *_ = float8.mvue_quantize(dy, torch.tensor([1, 2], device=device), one, float8=True)
    _, x8_t = float8.quantize(x, one, rows=False, transposed=True)
    out = torch.full((m, n), 3.0, dtype=dtype, device=device)
    float8.grad_weight_float8_(packed, E, one, x8_t, one, out, accumulate)
    pruned = float8.decompress_float8(packed, E, one, m, x8_t.shape[1]).double()
    exact = pruned @ (x8_t.double() * one).T + (3 if accumulate else 0)
    # The tensor cores keep 14 bits of the sums of 256 k that are promoted, and cut off the rest: up to 2^-13 of the
    # largest sum on each of the two sides of a promotion. The CPU multiplies in fp32.
    exact_bits = {"cuda": 2.0**-12, "cpu": 2e-6}[device]
    tolerance = max(exact_bits, 2 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 0)
    assert (out.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_wrong_operands_are_named():
    (packed, E, *_), w_scale, x8, x_scale = operands(64, 32, 64, "cpu", False)
    with pytest.raises(Sparse24Error, match="packed must be contiguous e4m3"):
        float8.sparse_mm_float8(x8, x_scale, packed[:32], E, w_scale, 64)
    with pytest.raises(Sparse24Error, match="E of packed must be 1024 contiguous uint8"):
        float8.sparse_mm_float8(x8, x_scale, packed, E[:-1], w_scale, 64)
    with pytest.raises(Sparse24DtypeError, match="2-D e4m3"):
        float8.sparse_mm_float8(x8.float(), x_scale, packed, E, w_scale, 64)


def test_what_would_be_read_or_written_outside_is_refused_first():
    """Each of these sizes is taken from another argument by the kernels."""
    torch.manual_seed(0)
    (packed, E, *_), w_scale, x8, x_scale = operands(64, 32, 64, "cpu", False)
    w, x, out, seed = torch.randn(64, 64), torch.randn(32, 64), torch.zeros(64, 32), torch.tensor([1, 2])
    forms, mask = [[t] for t in float8.empty_packed_float8(64, 64, "cpu")], ops.transposable_mask(w)
    half, two = torch.zeros(1, dtype=torch.float16), torch.zeros(2)
    packed_dy, E_dy, *_ = float8.mvue_quantize(x, seed, w_scale, float8=True)
    x8_t = float8.quantize(x, x_scale, transposed=True)[1]
    refused = [
        lambda: float8.quantize(x, x_scale, amax=half),
        lambda: float8.mvue_quantize(x, seed, x_scale, float8=True, amax=two),
        lambda: float8.activation_quantize(x, "silu", x_scale, gated=True, keep_h=False, transposed=False, amax=half),
        lambda: float8.activation_quantize(x[:, :63], "silu", x_scale, gated=True, keep_h=True, transposed=False),
        lambda: float8.activation_backward_quantize(x, x, "silu", seed, x_scale, gated=True, float8=True),
        lambda: float8.pack_float8_(False, [w], [mask], forms, [x_scale], [half]),
        lambda: float8.pack_float8_(False, [w, w], [mask], forms, [x_scale], [two[:1]]),
        lambda: float8.pack_float8_(False, [w], [mask], [forms[0], forms[1], forms[0], forms[3]], [x_scale], [two[:1]]),
        lambda: float8.pack_float8_(False, [w], [mask], [*forms[:3], [forms[3][0].int()]], [x_scale], [two[:1]]),
        lambda: float8.pack_float8_(False, [], [], [[], [], [], []], [], []),
        lambda: float8.decompress_float8(packed, E[:-1], w_scale, 64, 64),
        lambda: float8.decompress_float8(packed, E, half, 64, 64),
        lambda: float8.decompress_float8(packed, E, w_scale, 64, 66),
        lambda: float8.sparse_mm_float8(x8, half, packed, E, w_scale, 64),
        lambda: float8.sparse_mm_float8(x8, x_scale, packed, E, two, 64),
        lambda: float8.sparse_mm_float8(x8, x_scale, packed, E, w_scale, 64, bias=torch.zeros(63)),
        lambda: float8.sparse_mm_float8(x8[:1].expand(32, 64), x_scale, packed, E, w_scale, 64),
        lambda: float8.sparse_mm_float8(x8, x_scale, packed, E, w_scale, 64, out_dtype=torch.int8),
        lambda: float8.sparse_mm_float8(x8, x_scale, packed, E, w_scale, 64, accumulation="exact"),
        lambda: float8.grad_weight_float8_(packed_dy, E_dy, w_scale, x8_t, x_scale, out),
        lambda: float8.grad_weight_float8_(packed_dy, E_dy, w_scale, x8_t, x_scale, torch.zeros(64, 1).expand(64, 64)),
        lambda: float8.quantize(None, x_scale),
    ]
    for call in refused:
        with pytest.raises(Sparse24Error):
            call()
    assert not out.any() and not two.any()


def test_the_reference_runs_where_there_is_no_library(monkeypatch):
    torch.manual_seed(0)
    x, one = torch.randn(48, 64), scale(2.0**-6)
    ours = float8.quantize(x, one, transposed=True)
    mvue = float8.mvue_quantize(x, torch.tensor([1, 2]), one, float8=True)
    without_library(monkeypatch)
    assert all(
        torch.equal(bits(a), bits(b)) for a, b in zip(ours, float8.quantize(x, one, transposed=True), strict=True)
    )
    again = float8.mvue_quantize(x, torch.tensor([1, 2]), one, float8=True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(mvue[:3], again[:3], strict=True))
