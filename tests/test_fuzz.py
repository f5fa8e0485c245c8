"""Any shape, strides, dtype, offset and device: each op gives the right answer or a named exception, nothing else.

Right is what the reference makes, on the CPU, of a plain copy of the same values. Examples are the same in every run;
SPARSE24_FUZZ_SEED=n in the environment draws others, ten times as many, which a failure then names with n.
"""

from __future__ import annotations

import copy
import functools
import io
import os

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, assume, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny_models import MLP  # noqa: E402

import sparse24  # noqa: E402
from sparse24 import Recipe, Sparse24Error, functional, ops, reference  # noqa: E402
from sparse24.formats import as_rows  # noqa: E402
from sparse24.testing import assert_as_accurate, assert_same_bits  # noqa: E402

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64)
EXTENTS = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12, 16, 20, 31, 64, 68])
BLOCKS = st.sampled_from([4, 8, 12, 16, 20, 64, 68])
LAYOUTS = ("plain", "transposed", "every other", "offset", "padded rows", "expanded", "overlapping")
SEED = (11, 7)


FUZZ_SEED = os.environ.get("SPARSE24_FUZZ_SEED")


def fuzz(examples):
    def decorate(test):
        run = settings(
            max_examples=examples if FUZZ_SEED is None else 10 * examples, derandomize=FUZZ_SEED is None, deadline=None,
            database=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        return run(test if FUZZ_SEED is None else seed(int(FUZZ_SEED))(test))

    return decorate


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, or for the last two kinds others, in memory of another kind."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "every other" and values.dim():
        wide = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1]))
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "offset":
        flat = values.new_zeros(values.numel() + 1)
        flat[1:] = values.reshape(-1)
        return flat[1:].view(values.shape)
    if layout == "padded rows" and values.dim():
        wide = values.new_zeros((*values.shape[:-1], values.shape[-1] + 3))
        wide[..., 1:-2] = values
        return wide[..., 1:-2]
    if layout == "expanded" and values.dim() and values.shape[0]:
        return values[:1].expand(values.shape)
    if layout == "overlapping" and values.dim() == 2 and values.numel():
        flat = values.reshape(-1)[: sum(values.shape) - 1]
        return flat.as_strided(values.shape, (1, 1))
    return values


@st.composite
def tensors(draw, shape=None, dtypes=DTYPES, layouts=LAYOUTS):
    """A tensor of a few dimensions, or of `shape`; small integers and a few special values."""
    if shape is None:
        rank = draw(st.sampled_from([2, 2, 2, 2, 0, 1, 3]))
        shape = tuple(draw(BLOCKS if draw(st.booleans()) else EXTENTS) for _ in range(rank))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = torch.randint(-4, 5, shape, generator=generator).to(dtype)
    if dtype.is_floating_point and values.numel() and draw(st.booleans()):
        values = values + torch.rand(shape, generator=generator).to(dtype)
        special = draw(st.sampled_from([-0.0, float("inf"), float("nan"), torch.finfo(dtype).tiny / 2]))
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = special
    return lay_out(values, draw(st.sampled_from(layouts)))


def on(device: str, t: torch.Tensor) -> torch.Tensor:
    """The tensor with its whole storage, so with its strides and its offset, on `device`."""
    if device == "cpu":
        return t
    storage = t.new_empty(0).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def plain(t: torch.Tensor) -> torch.Tensor:
    return t.cpu().clone(memory_format=torch.contiguous_format)


def is_computed(t) -> bool:
    """Dtypes that ops take: float64 by the reference, on the CPU only."""
    return t.dtype in FLOATS or (t.dtype == torch.float64 and t.device.type == "cpu")


def is_weight(t) -> bool:
    return t.dim() == 2 and t.shape[0] % 4 == t.shape[1] % 4 == 0 and is_computed(t)


def packed_dtype(w) -> torch.dtype:
    return torch.bfloat16 if w.device.type == "cuda" and w.dtype == torch.float32 else w.dtype


def attempt(valid: bool, function, *args, **kwargs):
    """The result, or None for a named exception; valid arguments must give a result, others must not."""
    try:
        result = function(*args, **kwargs)
    except Sparse24Error as error:
        assert not valid, f"refused what it should take: {error}"
        assert len(str(error)) > 20, "says nothing"
        return None
    assert valid, "accepted what it should refuse"
    return result


def same(ours, theirs, what):
    ours, theirs = ((ours,), (theirs,)) if isinstance(ours, torch.Tensor) else (ours, theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_same_bits(a, b, f"{what}[{i}]")


# -- weights --------------------------------------------------------------------------------------------------------


@fuzz(400)
@given(w=tensors())
def test_masks_and_packed_forms(device, w):
    w = on(device, w)
    valid = is_weight(w)
    mask = attempt(valid, ops.transposable_mask, w)
    packed = attempt(valid, ops.prune_compress, w)
    gap = attempt(valid, ops.mask_gap, w)
    if mask is None:
        return
    expected = reference.transposable_mask(plain(w))
    same(mask, expected, "mask")
    assert ops.is_transposable(mask)
    same(ops.unpack_mask(mask), reference.unpack_mask(expected), "bits")
    same(packed, (expected, *reference.compress(plain(w), expected, packed_dtype(w))), "prune_compress")
    same(ops.compress(w, mask), packed[1:], "compress")
    # A difference of sums: right to a few units in the last place of the largest magnitude of the block.
    largest = reference.to_blocks(reference.ranked_magnitude(plain(w))).amax((-1, -2))
    error = (gap.cpu() - reference.mask_gap(plain(w))).abs()
    assert (error <= 16 * torch.finfo(torch.float32).eps * largest).all()
    kept = plain(w).masked_fill(~reference.unpack_mask(expected), 0).to(packed_dtype(w))
    same(ops.decompress(*packed[1:3], *w.shape), kept, "decompress")
    same(ops.decompress(*packed[3:], *w.shape, transposed=True), kept, "decompress, transposed")
    assert ops.is_valid_metadata(packed[2], *w.shape) and ops.is_valid_metadata(packed[4], *reversed(w.shape))


@fuzz(300)
@given(w=tensors(dtypes=(*FLOATS, torch.int8)), dtype=st.sampled_from([None, *FLOATS, *DTYPES]), data=st.data())
def test_packing_by_any_mask_into_any_dtype(device, w, dtype, data):
    mask = on(device, data.draw(masks(w.shape if w.dim() == 2 else (8, 8))))
    w = on(device, w)
    fits = is_weight(w) and mask.dtype == torch.uint16 and tuple(mask.shape) == tuple(n // 4 for n in w.shape)
    known = (None, torch.bfloat16, torch.float16, *((torch.float32,) if device == "cpu" else ()))
    out = attempt(fits and mask.is_contiguous() and dtype in known, ops.compress, w, mask, dtype)
    if out is not None:
        same(out, reference.compress(plain(w), plain(mask), dtype or packed_dtype(w)), "compress")


@st.composite
def masks(draw, shape):
    """A mask that may fit a weight of `shape`, or not."""
    rows, cols = (n // 4 for n in shape)
    kind = draw(st.sampled_from(["fits", "fits", "fits", "fits", "fits", "taller", "int32", "strided", "flat"]))
    rows += kind == "taller"
    mask = reference.transposable_mask(torch.randn(4 * rows, 4 * cols, generator=torch.Generator().manual_seed(rows)))
    if kind == "int32":
        return mask.to(torch.int32)
    if kind == "strided":
        return mask.to(torch.int32).repeat_interleave(2, 1).to(torch.uint16)[:, ::2]
    return mask.reshape(-1) if kind == "flat" else mask


@fuzz(300)
@given(data=st.data(), decay=st.sampled_from([0.0, 0.5, 0.25, 1e-3, -1.0, float("nan"), float("inf")]))
def test_masked_decay(device, data, decay):
    shape = (data.draw(BLOCKS), data.draw(BLOCKS))
    w = on(device, data.draw(tensors(shape, (*FLOATS, torch.int8))))
    grad = data.draw(tensors(data.draw(st.sampled_from([shape, shape, shape, shape[::-1]])), FLOATS, LAYOUTS))
    grad, mask = on(device, grad), on(device, data.draw(masks(shape)))
    fits = mask.dtype == torch.uint16 and mask.dim() == 2 and tuple(mask.shape) == tuple(n // 4 for n in shape)
    valid = 0 <= decay < float("inf") and w.dtype in FLOATS and grad.shape == w.shape and fits and mask.is_contiguous()
    repeats = len(
        {*torch.arange(grad.untyped_storage().nbytes()).as_strided(grad.shape, grad.stride()).flatten().tolist()}
    )
    valid &= repeats == grad.numel()  # each element in a place of its own
    before = plain(grad)
    if attempt(valid, ops.masked_decay_, grad, w, mask, decay) is None:
        assert_same_bits(grad, before, "a refused gradient")
    else:
        expected = reference.masked_decay(before, plain(w), plain(mask), decay)
        assert_same_bits(grad, expected.to(grad.dtype), "gradient")


@fuzz(100)
@given(data=st.data())
def test_flips_between_masks(device, data):
    shape = (4 * data.draw(st.integers(0, 3)), 4 * data.draw(st.integers(0, 3)))
    a, b = (on(device, data.draw(masks(shape))) for _ in range(2))
    valid = a.dtype == b.dtype == torch.uint16 and a.dim() == b.dim() == 2 and a.shape == b.shape
    flips = attempt(valid and a.is_contiguous() and b.is_contiguous(), ops.mask_flips, a, b)
    if flips is not None:
        expected = reference.unpack_mask(plain(a)) != reference.unpack_mask(plain(b))
        assert flips.item() == expected.sum().item()


@fuzz(200)
@given(mask=tensors(dtypes=(torch.int32, torch.int64, torch.float32, torch.uint8)), layout=st.sampled_from(LAYOUTS))
def test_any_bits_as_a_mask(device, mask, layout):
    """Any 16 bits can be unpacked; only transposable ones are called so. A mask's bytes serve as well."""
    kind = mask.dtype
    if kind == torch.int32 and mask.dim():  # as uint16: what a mask is
        mask = lay_out((plain(mask) * 7919 & 0xFFFF).to(torch.int32), layout).to(torch.uint16)
    mask = on(device, mask)
    bytes_fit = kind == torch.uint8 and mask.dim() == 2 and mask.shape[1] % 2 == mask.storage_offset() % 2 == 0
    valid = mask.dim() == 2 and mask.is_contiguous() and (mask.dtype == torch.uint16 or bytes_fit)
    bits = attempt(valid, ops.unpack_mask, mask)
    answer = attempt(valid, ops.is_transposable, mask)
    if bits is None:
        return
    words = plain(mask).view(torch.uint16) if kind == torch.uint8 else plain(mask)
    same(bits, reference.unpack_mask(words), "bits")
    blocks = reference.to_blocks(reference.unpack_mask(words).int())
    assert answer == bool((blocks.sum(-1) == 2).all() and (blocks.sum(-2) == 2).all())


@fuzz(150)
@given(data=st.data(), search=st.booleans())
def test_packing_many_weights_into_buffers_of_any_size(device, data, search):
    """One buffer that does not fit, and none is written; otherwise each weight as it would be alone."""
    shapes = [(data.draw(BLOCKS), data.draw(BLOCKS)) for _ in range(data.draw(st.integers(1, 3)))]
    weights = [on(device, data.draw(tensors(shape, FLOATS))) for shape in shapes]
    wanted = [reference.transposable_mask(plain(w)) for w in weights]
    found = [torch.zeros_like(m) if search else m for m in (m.to(device) for m in wanted)]
    dtypes = st.sampled_from(FLOATS if device == "cpu" else FLOATS[1:])
    both = [(data.draw(dtypes), data.draw(dtypes)) for _ in shapes]  # of the two directions
    both = [(first, data.draw(st.sampled_from([first, first, second]))) for first, second in both]
    buffers = [
        [t.zero_() for t in (*ops.empty_packed(*shape, a, device)[:2], *ops.empty_packed(*shape, b, device)[2:])]
        for shape, (a, b) in zip(shapes, both, strict=True)
    ]
    for parts in buffers:  # a direction may be left out, as an empty tensor of any dtype
        gone = data.draw(st.sampled_from([None, None, None, 0, 2]))
        if gone is not None:
            kind = data.draw(st.sampled_from(DTYPES))
            parts[gone], parts[gone + 1] = torch.empty(0, dtype=kind, device=device), parts[gone + 1][:0]
    kinds = [{t.dtype for t in (parts[0], parts[2]) if t.numel()} for parts in buffers]
    bad = data.draw(st.sampled_from([None, None, None, "short", "dtype", "missing", "strided", "mask"]))
    bad = "directions" if bad is None and any(len(kind) > 1 for kind in kinds) else bad
    which, part = data.draw(st.integers(0, len(shapes) - 1)), data.draw(st.integers(0, 3))
    spoiled = [list(parts) for parts in buffers]
    assume(bad not in ("short", "dtype", "strided") or spoiled[which][part].numel() > 1)
    if bad == "short":
        spoiled[which][part] = spoiled[which][part][:-1]
    elif bad == "dtype":
        spoiled[which][part] = spoiled[which][part].to(torch.int32)
    elif bad == "strided":
        spoiled[which][part] = lay_out(spoiled[which][part], "every other")
    elif bad == "mask":
        found[which] = found[which].to(torch.int32)
    lists = [found, *map(list, zip(*spoiled, strict=True))]
    if bad == "missing":
        lists[part].pop()
    run = ops.prune_compress_ if search else ops.compress_
    try:
        run(weights, *lists)
    except Sparse24Error as error:
        assert bad, f"refused what it should take: {error}"
        assert not any(t.any() for parts in buffers for t in parts), "written before it was refused"
    else:
        assert bad is None, "accepted what it should refuse"
        for w, mask, mask_out, parts in zip(weights, wanted, found, buffers, strict=True):
            same(mask_out, mask, "mask")
            kept = [t for t in parts if t.numel()]
            (dtype,) = {t.dtype for t in kept} - {torch.uint8}
            expected = reference.compress(plain(w), mask, dtype)
            same(kept, [e for e, t in zip(expected, parts, strict=True) if t.numel()], "packed")


@fuzz(150)
@given(data=st.data(), m=EXTENTS, k=EXTENTS)
def test_any_bytes_as_metadata(device, data, m, k):
    """True where the pairs of all m x k/4 groups rise, false for other bytes and sizes; unpacking stays in bounds."""
    k = 4 * k
    size = ops.metadata_bytes(m, k)
    E = torch.full((size,), data.draw(st.sampled_from([0x44, 0xEE, 0x4E, 0x00, 0x45])), dtype=torch.uint8)
    change = data.draw(st.sampled_from([None, "one byte", "size", "dtype"]))
    if change == "one byte" and size:
        E[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    E = E[:-1] if change == "size" else E.to(torch.int16) if change == "dtype" else E
    fits = E.numel() == size and E.dtype == torch.uint8
    nibbles = reference.decode_metadata(E, m, k) if fits else None  # of the groups; what pads them is never looked at
    rises = fits and bool(((nibbles & 3) < (nibbles >> 2)).all())
    E = on(device, E)
    assert ops.is_valid_metadata(E, m, k) == rises
    packed = torch.ones(m, k // 2, dtype=torch.bfloat16, device=device)
    dense = attempt(fits, ops.decompress, packed, E, m, k)
    if dense is not None and rises:
        assert (dense.float().view(m, k // 4, 4).sum(-1) == 2).all()


# -- products -------------------------------------------------------------------------------------------------------


def packed_layer(device, rows, cols, dtype):
    w = torch.randint(-3, 4, (rows, cols), generator=torch.Generator().manual_seed(rows + cols)).to(device, dtype)
    mask, *packed = ops.prune_compress(w)
    return w.masked_fill(~ops.unpack_mask(mask), 0), packed


@fuzz(300)
@given(data=st.data(), rows=BLOCKS, cols=BLOCKS, dtype=st.sampled_from(FLOATS))
def test_products_with_a_weight(device, data, rows, cols, dtype):
    assume(device == "cpu" or dtype != torch.float32)
    masked, (packed, E, packed_t, E_t) = packed_layer(device, rows, cols, dtype)
    for op, width, values, metadata, dense, other in (
        (ops.sparse_mm, cols, packed, E, masked.t(), rows),
        (ops.sparse_mm_grad_input, rows, packed_t, E_t, masked, cols),
    ):
        shape = tuple(data.draw(EXTENTS) for _ in range(data.draw(st.integers(0, 2))))
        width_given = data.draw(st.sampled_from([width] * 5 + [width + 4]))
        x = on(device, data.draw(tensors((*shape, width_given), (dtype, dtype, dtype, *DTYPES))))
        declared = data.draw(st.sampled_from([other] * 5 + [other + 4]))
        # fp32 values, a CPU's, serve activations of any floating dtype.
        fits = x.dtype == dtype or (dtype == torch.float32 and x.dtype.is_floating_point)
        y = attempt(width_given == width and declared == other and fits, op, x, values, metadata, declared)
        if y is None:
            continue
        assert y.shape == (*x.shape[:-1], other) and y.dtype == x.dtype
        finite = x.nan_to_num(0.0, 0.0, 0.0)
        if torch.equal(finite, x):
            assert_as_accurate(y, finite @ dense.to(x.dtype), finite.double() @ dense.double())
        else:  # what is not finite shows wherever it is multiplied with something that is not 0
            meets = (~x.isfinite()).double() @ (dense != 0).double() > 0
            assert not y[meets].isfinite().any()


@fuzz(300)
@given(dy=tensors(), data=st.data())
def test_weight_gradients(device, dy, data):
    seed = torch.tensor(data.draw(st.sampled_from([SEED, SEED, SEED, SEED, SEED, (1,), (1, 2, 3)])))
    seed = seed.to(device, data.draw(st.sampled_from([torch.int64] * 5 + [torch.int32])))
    dy, right_seed = on(device, dy), seed.dtype == torch.int64 and seed.numel() == 2
    packed_dy = attempt(dy.dim() == 2 and is_computed(dy) and right_seed, ops.mvue_compress, dy, seed)
    if packed_dy is None:
        return
    same(packed_dy, reference.mvue_compress(plain(dy), seed.cpu()), "mvue_compress")
    tokens, features = dy.shape
    shape = (tokens + data.draw(st.sampled_from([0] * 5 + [8])), data.draw(EXTENTS))
    x = on(device, data.draw(tensors(shape, (dy.dtype, dy.dtype, *FLOATS))))
    valid = shape[0] == tokens and x.dtype == dy.dtype
    dw = attempt(valid, ops.sparse_mm_grad_weight, *packed_dy, x, features)
    if dw is None or not x.isfinite().all():
        return
    pruned = reference.decompress(*map(plain, packed_dy), 2 * packed_dy[0].shape[0], features, transposed=True)[:tokens]
    if pruned.isfinite().all():
        pruned = pruned.to(device)
        assert_as_accurate(dw, pruned.t() @ x, pruned.double().t() @ x.double())


@fuzz(150)
@given(data=st.data(), rows=BLOCKS, cols=BLOCKS)
def test_operands_of_any_size_are_refused_or_right(device, data, rows, cols):
    """Values and metadata that do not fit what is declared."""
    masked, (packed, E, *_) = packed_layer(device, rows, cols, torch.bfloat16)
    bad = data.draw(
        st.sampled_from(["nothing", "rows", "cols", "E short", "E long", "E dtype", "E 2-D", "strided", "integers"])
    )
    values, metadata = packed, E
    if bad == "rows":
        values = packed[:-1]
    elif bad == "cols":
        values = packed[:, :-1]
    elif bad == "strided":
        values = lay_out(packed, "every other")
    elif bad == "integers":
        values = packed.to(torch.int16)
    elif bad == "E short":
        metadata = E[:-1]
    elif bad == "E long":
        metadata = torch.cat([E, E[:1]])
    elif bad == "E dtype":
        metadata = E.to(torch.int32)
    elif bad == "E 2-D":
        metadata = E.view(1, -1)
    out = attempt(bad == "nothing", ops.decompress, values, metadata, rows, cols)
    if out is not None:
        same(out, masked, "decompress")
    x = torch.ones(3, cols, dtype=torch.bfloat16, device=device)
    attempt(bad == "nothing", ops.sparse_mm, x, values, metadata, rows)


@fuzz(300)
@given(x=tensors(dtypes=FLOATS), many=st.integers(1, 9))
def test_rows_of_a_product_have_a_leading_dimension(x, many):
    """What the GEMM is given: rows side by side or further apart, also where one row has any stride to the next."""
    for t in (x, x[:1].as_strided(x[:1].shape, (many, *x.stride()[1:])) if x.dim() and len(x) else x):
        if t.dim() == 0 or t.numel() == 0:
            continue
        rows = as_rows(t)
        assert rows.stride(0) >= rows.shape[1] and (rows.stride(1) == 1 or rows.shape[1] == 1)
        assert_same_bits(rows, plain(t).reshape(-1, t.shape[-1]), "rows")


# -- activations ----------------------------------------------------------------------------------------------------

KINDS = st.sampled_from(["silu", "gelu", "gelu_tanh", "relu", "squared_relu", "tanh"])


@fuzz(400)
@given(
    gu=tensors(dtypes=(*FLOATS, *DTYPES)), kind=KINDS, gated=st.booleans(), column_major=st.booleans(), data=st.data()
)
def test_activations(device, gu, kind, gated, column_major, data):
    gu = on(device, gu)
    right_width = gu.dim() > 0 and not (gated and gu.shape[-1] % 2)
    run = ops.gated_activation if gated else ops.activation
    h = attempt(kind != "tanh" and right_width and is_computed(gu), run, gu, kind, column_major=column_major)
    if h is None:
        return
    expected = reference.gated_activation(plain(gu), kind, gated)
    assert h.shape == expected.shape and h.dtype == gu.dtype
    torch.testing.assert_close(h.cpu(), expected, equal_nan=True)  # limits at infinity; a NaN stays one
    shape = data.draw(st.sampled_from([h.shape, h.shape, h.shape, (*h.shape[:-1], h.shape[-1] + 2)]))
    dh = on(device, data.draw(tensors(shape, (gu.dtype,))))
    backward = ops.gated_activation_backward if gated else ops.activation_backward
    d_gu = attempt(dh.shape == h.shape, backward, dh, gu, kind)
    if d_gu is not None:
        assert d_gu.shape == gu.shape
        expected = reference.gated_activation_backward(plain(dh), plain(gu), kind, gated)[0]
        parts = plain(gu).chunk(2, -1) if gated else (plain(gu),)
        finite = torch.stack([part.isfinite() for part in (*parts, plain(dh))]).all(0)
        finite = finite.repeat(*[1] * (gu.dim() - 1), len(parts))
        torch.testing.assert_close(d_gu.cpu()[finite], expected[finite])
        packing = ops.gated_activation_backward_mvue if gated else ops.activation_backward_mvue
        seed = torch.tensor(SEED, device=device)
        both = attempt(gu.dim() == 2, packing, dh, gu, kind, seed)
        if both is not None:
            same(both, (d_gu, *ops.mvue_compress(d_gu, seed)), "both forms")


# -- a whole layer --------------------------------------------------------------------------------------------------


@fuzz(200)
@given(data=st.data(), rows=BLOCKS, cols=BLOCKS, bias=st.booleans(), mvue=st.booleans())
def test_a_linear_layer_forward_and_backward(device, data, rows, cols, bias, mvue):
    """Any number of leading dimensions, any strides of input and gradient; gradients by the reference's products."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    masked, packed = packed_layer(device, rows, cols, dtype)
    w = torch.zeros(rows, cols, dtype=dtype, device=device, requires_grad=True)
    shape = tuple(data.draw(EXTENTS) for _ in range(data.draw(st.integers(0, 2))))
    x = on(device, data.draw(tensors((*shape, cols), (dtype,)))).detach().requires_grad_()
    dy = on(device, data.draw(tensors((*shape, rows), (dtype,))))
    b = torch.ones(rows, dtype=dtype, device=device, requires_grad=True) if bias else None
    y = functional.sparse_linear(x, w, *packed, b, mvue=mvue, seed=torch.tensor(SEED, device=device))
    y.backward(dy)
    assert y.shape == (*shape, rows) and x.grad.shape == x.shape and w.grad.shape == w.shape
    if not (x.isfinite().all() and dy.isfinite().all()):
        return
    exact = x.detach().double() @ masked.double().t() + (b.detach().double() if bias else 0)
    assert_as_accurate(y.detach(), torch.nn.functional.linear(x.detach(), masked, b).detach(), exact)
    assert_as_accurate(x.grad, dy @ masked, dy.double() @ masked.double())
    flat_dy, flat_x = plain(dy).reshape(-1, rows), plain(x.detach()).reshape(-1, cols)
    if bias:
        assert_as_accurate(b.grad.cpu(), flat_dy.sum(0), flat_dy.double().sum(0))
    if mvue:
        parts = reference.mvue_compress(flat_dy, torch.tensor(SEED))
        flat_dy = reference.decompress(*parts, 2 * parts[0].shape[0], rows, transposed=True)[: flat_x.shape[0]]
    if flat_dy.isfinite().all():
        assert_as_accurate(w.grad.cpu(), flat_dy.t() @ flat_x, flat_dy.double().t() @ flat_x.double())


# -- states of a recipe ---------------------------------------------------------------------------------------------


def trained(method):
    torch.manual_seed(0)
    model = MLP()
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    settings = dict(total_steps=8, mask_interval=2, dense_fraction=0.25, track_blocks=method == "fst")
    recipe = Recipe(model, optimizer, method=method, **settings)
    for _ in range(5):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, recipe


def everything(model, recipe):
    """What a refused state must leave alone."""
    torch.save((model.state_dict(), list(model.buffers()), recipe.state_dict(), recipe.phase), buffer := io.BytesIO())
    return buffer.getvalue(), [layer.phase for layer in recipe.layers.values()]


def places(state, path=()):
    """Paths to everything in nested dicts and lists."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


JUNK = [None, -1, 10**6, 0.5, float("nan"), True, "x", [], {}, [1], {"x": 1}, torch.zeros(()), torch.zeros(3), ...]


@pytest.mark.fault(47)
@pytest.mark.parametrize("method", ["fst", "step", "s-ste"])
def test_a_state_with_anything_in_any_place_is_refused_or_taken_whole(method):
    """Every place of a valid state, with every piece of junk in it, with a cut tensor, or gone."""
    model, _, recipe = trained(method)
    good = recipe.state_dict()
    before = everything(model, recipe)
    taken = 0
    for path in places(good):
        for junk in (*JUNK, "cut", "cast"):
            state = copy.deepcopy(good)
            holder = functools.reduce(lambda part, key: part[key], path[:-1], state)
            old = holder[path[-1]]
            if junk in ("cut", "cast") and isinstance(junk, str):
                if not isinstance(old, torch.Tensor) or not old.numel():
                    continue
                holder[path[-1]] = old.flatten()[:-1] if junk == "cut" else old.to(torch.float16)
            elif junk is ...:
                del holder[path[-1]]
            else:
                holder[path[-1]] = junk
            try:
                recipe.load_state_dict(state)
            except Sparse24Error as error:
                assert len(str(error)) > 20
                assert everything(model, recipe) == before, f"{path} = {junk!r} was refused, and something changed"
            else:
                taken += 1
                recipe.load_state_dict(good)
                assert everything(model, recipe) == before, f"{path} = {junk!r} was taken and could not be undone"
    assert taken < 60  # what is taken means something: another step of the same phase, another decay, no history
