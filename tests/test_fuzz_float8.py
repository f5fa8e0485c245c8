"""8-bit ops of any shape, strides, dtype, offset and value: the reference's bits, or a named exception (fuzzing.py)."""

from __future__ import annotations

import torch
from fuzzing import (
    BLOCKS,
    DTYPES,
    EXTENTS,
    FLOATS,
    SEED,
    assert_product,
    attempt,
    fits_mask,
    fuzz,
    lay_out,
    on,
    plain,
    same,
)

from sparse24 import ops, reference
from sparse24.ops import float8
from sparse24.ops.activation_packing import PRUNED_KINDS
from sparse24.reference import float8 as reference8

E4M3 = torch.float8_e4m3fn
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "squared_relu", "tanh")


def unit_of_sums(device):
    """The tensor cores add products of 8-bit values in 14 bits, and cut off the rest; a CPU adds them in fp32."""
    return 2.0**-13 if device == "cuda" else 2.0**-23


def one(device, value=1.0, dtype=torch.float32, count=1):
    return torch.full((count,), value, dtype=dtype, device=device)


def scale_and_amax(draw, device):
    """A scale and a place for the largest magnitude; now and then of another kind. And whether they are right."""
    scale = draw.usually(
        one(device, 2.0 ** draw.randint(-8, 8)), one(device, dtype=torch.float64), one(device, count=2)
    )
    amax = draw.usually(one(device, 0.0), None, one(device, dtype=torch.float16), one(device, count=3), share=0.6)
    return scale, amax, all(t is None or (t.dtype == torch.float32 and t.numel() == 1) for t in (scale, amax))


def counters(draw, device):
    counts = draw.usually(torch.zeros(3, dtype=torch.int64, device=device), None, torch.zeros(2, device=device))
    return counts, counts is None or counts.dtype == torch.int64


def is_matrix(x):
    return x.dim() == 2 and (x.dtype in FLOATS or (x.dtype == torch.float64 and x.device.type == "cpu"))


def is_pruned(dy):
    """A GPU prunes no gradients of 32 bits: its sparse tensor cores could not multiply them. Of none, none are left."""
    return dy.device.type == "cpu" or dy.dtype != torch.float32 or dy.numel() == 0


@fuzz(100)
def test_casts(device, draw):
    x = on(device, draw.tensor())
    scale, amax, right = scale_and_amax(draw, device)
    counts, right_counts = counters(draw, device)
    out = attempt(
        is_matrix(x) and right and right_counts, float8.quantize, x, scale, transposed=True, amax=amax, counts=counts
    )
    if out is None:
        return
    expected, scale = plain(x), scale.cpu()
    x8 = reference8.to_float8(expected, scale)
    same(out, (x8, reference8.transpose_padded(x8)), "quantize")
    if amax is not None:
        same(amax, reference8.amax(expected), "amax")
    if counts is not None:
        assert counts.tolist()[:2] == reference8.cast_counts(expected, scale).tolist()[:2]


@fuzz(100)
def test_packing_and_products(device, draw):
    """The values that the 8 bits hold, multiplied exactly."""
    rows, cols, search = draw.pick(BLOCKS), draw.pick(BLOCKS), draw.random() < 0.5
    w, mask = on(device, draw.tensor((rows, cols), (*FLOATS, torch.int8))), on(device, draw.mask((rows, cols)))
    scale, amax, right = scale_and_amax(draw, device)
    amax, right = (one(device, 0.0), right) if amax is None else (amax, right)
    forms = [t.view(torch.uint8).zero_().view(t.dtype) for t in float8.empty_packed_float8(rows, cols, device)]
    bad = draw.usually(None, "short", "dtype", "strided", share=0.7)
    place = draw.randrange(4)
    whole = forms[place]
    if bad == "short":
        forms[place] = whole[:-1]
    elif bad == "dtype":
        forms[place] = whole.view(torch.uint8).to(torch.int32)
    elif bad == "strided":
        forms[place] = lay_out(whole.view(torch.uint8), "every other").view(whole.dtype)
        bad = None if forms[place].is_contiguous() else bad
    valid = w.dtype in FLOATS and fits_mask(mask, w.shape) and right and bad is None
    lists = [w], [mask], [[t] for t in forms], [scale], [amax]
    if attempt(valid, float8.pack_float8_, search, *lists) is None:
        return
    found = reference.transposable_mask(plain(w)) if search else plain(mask)
    same(mask, found, "mask")
    same(forms, reference8.pack_float8(plain(w), found, scale.cpu(), E4M3), "forms")
    assert_products(draw, device, (rows, cols), forms, scale)


def assert_products(draw, device, shape, forms, scale):
    rows, cols = shape
    dense = float8.decompress_float8(*forms[:2], scale, rows, cols)
    same(dense, reference8.decompress_float8(*map(plain, forms[:2]), scale.cpu(), rows, cols), "decompress_float8")
    x8, x_scale = float8.quantize(on(device, draw.tensor((draw.pick(EXTENTS), cols), FLOATS)), one(device, 0.5))[0], 0.5
    bias, declared = draw.usually(None, rows, rows + 1, share=0.6), draw.usually(rows, rows + 4)
    valid = declared == rows and bias in (None, rows)
    bias = None if bias is None else torch.arange(bias, device=device, dtype=torch.float32)
    x_scale = one(device, x_scale)
    y = attempt(valid, float8.sparse_mm_float8, x8, x_scale, *forms[:2], scale, declared, bias=bias,
                out_dtype=torch.float32 if device == "cpu" else torch.bfloat16)  # fmt: skip
    if y is None or not (dense.isfinite().all() and x8.float().isfinite().all()):
        return
    x = x8.float() * x_scale
    assert_product(y, x, dense.T, *([] if bias is None else [bias]), unit=unit_of_sums(device))


@fuzz(100)
def test_gradients_and_their_products(device, draw):
    dy, seed = on(device, draw.tensor()), torch.tensor(SEED, device=device)
    scale, amax, right = scale_and_amax(draw, device)
    whole, options = draw.random() < 0.5, dict(bias_grad=True, amax=amax)
    out = attempt(
        is_matrix(dy) and right and is_pruned(dy), float8.mvue_quantize, dy, seed, scale, float8=whole, **options
    )
    if out is None:
        return
    expected, cpu_seed = plain(dy), torch.tensor(SEED)
    if whole:
        pruned = reference8.mvue_pack_float8(expected, cpu_seed, scale.cpu(), E4M3)
    else:
        pruned = reference.mvue_compress(expected, cpu_seed)
    same(out[:3], (*pruned, reference8.to_float8(expected, scale.cpu())), "mvue_quantize")
    if not whole:
        return
    tokens, features = dy.shape
    n = draw.pick(EXTENTS)
    x8_t = float8.quantize(on(device, draw.tensor((tokens, n), FLOATS)), one(device), transposed=True)[1]
    shape = draw.usually((features, n), (features, n + 1), (n + 4, features, 1))
    into = on(device, draw.tensor(shape, (torch.float32, torch.float32, torch.int8), ("plain", "expanded")))
    valid = tuple(into.shape) == (features, n) and into.dtype == torch.float32
    valid &= into.numel() < 2 or into.stride(0) != 0 or into.shape[0] < 2
    before = into.double()
    if attempt(valid, float8.grad_weight_float8_, *out[:2], scale, x8_t, one(device), into, True) is None:
        return
    dense = float8.decompress_float8(*out[:2], scale, features, x8_t.shape[1])
    if dense.isfinite().all() and x8_t.float().isfinite().all() and before.isfinite().all():
        assert_product(into, dense, x8_t.float().T, before, unit=unit_of_sums(device))


@fuzz(100)
def test_activations_in_8_bits(device, draw):
    """The bits of the 16-bit op, cast; backward those of its gradient, pruned and cast."""
    gated, kind, seed = draw.random() < 0.5, draw.pick(KINDS), torch.tensor(SEED, device=device)
    x = on(device, draw.tensor())
    scale, amax, right = scale_and_amax(draw, device)
    fits = is_matrix(x) and right and kind != "tanh" and not (gated and x.shape[1] % 2)
    keep = draw.random() < 0.5
    options = dict(gated=gated, amax=amax)
    out = attempt(fits, float8.activation_quantize, x, kind, scale, keep_h=keep, transposed=True, **options)
    if out is None:
        return
    h = (ops.gated_activation if gated else ops.activation)(x, kind)
    same(out[1:], float8.quantize(h, scale, transposed=True), "activation_quantize")
    same(out[0], h if keep else h.new_empty(0), "h")
    dtypes = draw.usually((x.dtype,), DTYPES)
    dh = on(device, draw.tensor(draw.usually(h.shape, (h.shape[0], h.shape[1] + 2)), dtypes))
    valid = dh.shape == h.shape and dh.dtype == x.dtype and is_pruned(x)
    backward, options = float8.activation_backward_quantize, dict(gated=gated, float8=draw.random() < 0.5)
    out = attempt(valid, backward, dh, x, kind, seed, scale, **options)
    if out is not None:
        of_16_bits = ops.gated_activation_backward if gated else ops.activation_backward
        d = of_16_bits(dh, x, kind)
        same(out, float8.mvue_quantize(d, seed, scale, float8=options["float8"]), "activation_backward_quantize")


@fuzz(100)
def test_pruned_activations(device, draw):
    """Both packed forms with the reference's bytes, and the products that read them, of values as 8 bits hold them."""
    kind, cpu_seed = draw.pick(KINDS), draw.usually(torch.tensor(SEED), None, share=0.7)
    seed = None if cpu_seed is None else cpu_seed.to(device)
    u = on(device, draw.tensor())
    valid = is_matrix(u) and kind in PRUNED_KINDS and u.shape[1] % 4 == 0
    h = attempt(valid, float8.activation_compress_float8, u, kind, seed)
    if h is None:
        return
    same(h, reference8.activation_compress(plain(u), kind, cpu_seed), "activation_compress_float8")
    dtypes = draw.usually((u.dtype,), DTYPES)
    dh = on(device, draw.tensor(draw.usually(u.shape, (u.shape[0], u.shape[1] + 4)), dtypes))
    valid = dh.shape == u.shape and dh.dtype == u.dtype
    du = attempt(valid, float8.activation_backward_compress_float8, dh, u, kind, seed)
    if du is not None:
        *expected, _ = reference8.activation_backward_compress(plain(dh), plain(u), kind, cpu_seed)
        same(du[:4], expected, "activation_backward_compress_float8")
    assert_products_of_pruned(draw, device, u.shape, h)


def assert_products_of_pruned(draw, device, shape, h):
    (tokens, features), (packed, E, packed_t, E_t, scale), n = shape, h, draw.pick(EXTENTS)
    wide, unit = torch.float32 if device == "cpu" else torch.bfloat16, unit_of_sums(device)
    w = on(device, draw.tensor((n, features), FLOATS))
    w8, _, w_scale = float8.quantize_current(w)
    same(w_scale, reference8.scale_of(reference8.amax(plain(w))), "quantize_current")
    y = float8.sparse_mm_input_float8(packed, E, scale, w8, w_scale, out_dtype=wide)
    dense, w = float8.decompress_float8(packed, E, scale, tokens, features), w8.float() * w_scale
    if dense.isfinite().all() and w.isfinite().all():
        assert_product(y, dense, w.T, unit=unit)
    x8 = float8.quantize(on(device, draw.tensor((tokens, features), FLOATS)), one(device, 0.5))[0]
    y = float8.dense_mm_float8(x8, one(device, 0.5), w8, w_scale, out_dtype=wide)
    if x8.float().isfinite().all() and w.isfinite().all():
        assert_product(y, x8.float() * 0.5, w.T, unit=unit)
    if packed_t.numel() == 0:
        return
    dy8_t = float8.quantize(on(device, draw.tensor((tokens, n), FLOATS)), one(device), transposed=True)[1]
    into = torch.zeros(n, features, device=device)
    float8.grad_weight_of_input_float8_(packed_t, E_t, scale, dy8_t, one(device), into)
    dense = float8.decompress_float8(packed_t, E_t, scale, features, dy8_t.shape[1])
    if dense.isfinite().all() and dy8_t.float().isfinite().all():
        assert_product(into, dy8_t.float(), dense.T, unit=unit)
