"""Weights, masks and packed forms of any shape, strides, dtype, offset and value: right, or a named exception.

Right is what the reference makes, on the CPU, of a plain copy of the same values. fuzzing.py says how cases are drawn;
`make fuzz` runs a million.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from fuzz_rounds import ROUND, rounds_of
from fuzzing import (
    ALL,
    BLOCKS,
    DTYPES,
    EXTENTS,
    FLOATS,
    LAYOUTS,
    assert_product,
    attempt,
    fits_mask,
    fuzz,
    is_weight,
    lay_out,
    on,
    packed_dtype,
    plain,
    same,
)

from sparse24 import Sparse24Error, ops, reference
from sparse24.ops import float8
from sparse24.testing import assert_same_bits


@fuzz(400)
def test_masks_and_packed_forms(device, draw):
    w = on(device, draw.tensor())
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
def test_packing_by_any_mask_into_any_dtype(device, draw):
    w, dtype = draw.tensor(dtypes=(*FLOATS, torch.int8)), draw.pick([None, *FLOATS, *DTYPES])
    mask = on(device, draw.mask(w.shape if w.dim() == 2 else (8, 8)))
    w = on(device, w)
    fits = is_weight(w) and fits_mask(mask, w.shape)
    known = (None, torch.bfloat16, torch.float16, *((torch.float32,) if device == "cpu" else ()))
    out = attempt(fits and dtype in known, ops.compress, w, mask, dtype)
    if out is not None:
        expected = reference.compress(plain(w), plain(mask), dtype or packed_dtype(w))
        same(out, expected, "compress")
        same(ops.compress_transposed([w], [mask], out[0].dtype), expected[2:], "compress_transposed")


def places_of(t: torch.Tensor) -> int:
    """How many places in memory the elements of a view have."""
    seen = torch.zeros(t.untyped_storage().nbytes() // t.element_size(), dtype=torch.uint8)
    seen.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(1)
    return int(seen.sum())


@fuzz(300)
def test_masked_decay(device, draw):
    decay, scale = draw.pick([0.0, 0.5, 0.25, 1e-3, -1.0, float("nan"), float("inf"), 1e39]), draw.usually(None, 4.0)
    shapes = [(draw.pick(BLOCKS), draw.pick(BLOCKS)) for _ in range(draw.randint(1, 3))]
    grads = [draw.tensor(draw.usually(shape, shape[::-1], share=0.9), FLOATS) for shape in shapes]
    grads, valid = [on(device, grad) for grad in grads], 0 <= decay <= torch.finfo(torch.float32).max
    weights = [on(device, draw.tensor(shape, draw.usually(FLOATS, (torch.int8,), share=0.95))) for shape in shapes]
    masks = [on(device, draw.mask(shape)) for shape in shapes]
    for grad, w, mask in zip(grads, weights, masks, strict=True):
        alone = places_of(grad) == grad.numel()  # each element in a place of its own
        valid &= w.dtype in FLOATS and grad.shape == w.shape and fits_mask(mask, w.shape) and alone
    before = [plain(grad) for grad in grads]
    scale = None if scale is None else torch.tensor(scale, device=device)
    if attempt(valid, ops.foreach_masked_decay_, grads, weights, masks, decay, grad_scale=scale) is None:
        for grad, old in zip(grads, before, strict=True):
            assert_same_bits(grad, old, "a refused gradient")
        return
    for i, (grad, old, w, mask) in enumerate(zip(grads, before, weights, masks, strict=True)):
        times = decay if scale is None else decay * 4
        expected = reference.masked_decay(old, plain(w), plain(mask), times).to(grad.dtype)
        assert_same_bits(grad, expected, f"gradient {i}")


@fuzz(100)
def test_flips_between_masks(device, draw):
    shape = (4 * draw.randint(0, 3), 4 * draw.randint(0, 3))
    a, b = (on(device, draw.mask(shape)) for _ in range(2))
    valid = a.dtype == b.dtype == torch.uint16 and a.dim() == b.dim() == 2 and a.shape == b.shape
    flips = attempt(valid and a.is_contiguous() and b.is_contiguous(), ops.mask_flips, a, b)
    if flips is not None:
        expected = (reference.unpack_mask(plain(a)) != reference.unpack_mask(plain(b))).sum().item()
        assert flips.item() == expected
        assert ops.foreach_mask_flips([a, b, a], [b, b, a]).tolist() == [expected, 0, 0]


@fuzz(200)
def test_any_bits_as_a_mask(device, draw):
    """Any 16 bits can be unpacked; only transposable ones are called so. A mask's bytes serve as well."""
    mask = draw.tensor(dtypes=(torch.int32, torch.int64, torch.float32, torch.uint8))
    kind = mask.dtype
    if kind == torch.int32 and mask.dim():  # as uint16: what a mask is
        mask = lay_out((plain(mask) * 7919 & 0xFFFF).to(torch.int32), draw.pick(LAYOUTS)).to(torch.uint16)
    mask = on(device, mask)
    bytes_fit = kind == torch.uint8 and mask.dim() == 2 and mask.shape[1] % 2 == mask.storage_offset() % 2 == 0
    valid = mask.dim() == 2 and mask.is_contiguous() and (mask.dtype == torch.uint16 or bytes_fit)
    bits = attempt(valid, ops.unpack_mask, mask)
    answer = attempt(valid, ops.is_transposable, mask)
    if bits is None:
        return
    words = plain(mask)
    if kind == torch.uint8:  # by numpy, which views bytes of any stride
        pairs = words.numpy().reshape(-1).view("uint16")
        words = torch.from_numpy(pairs.reshape(words.shape[0], words.shape[1] // 2).copy())
    same(bits, reference.unpack_mask(words), "bits")
    blocks = reference.to_blocks(reference.unpack_mask(words).int())
    assert answer == bool((blocks.sum(-1) == 2).all() and (blocks.sum(-2) == 2).all())


def buffers_of(draw, device, shape):
    """packed, E, packed_t, E_t of a weight; now and then of two dtypes, or without one direction."""
    dtypes = FLOATS if device == "cpu" else FLOATS[1:]
    a = draw.pick(dtypes)
    b = draw.usually(a, *dtypes)
    parts = [t.zero_() for t in (*ops.empty_packed(*shape, a, device)[:2], *ops.empty_packed(*shape, b, device)[2:])]
    gone = draw.usually(None, 0, 2, share=0.6)
    if gone is not None:  # a direction may be left out, as an empty tensor of any dtype
        parts[gone], parts[gone + 1] = torch.empty(0, dtype=draw.pick(DTYPES), device=device), parts[gone + 1][:0]
    return parts


def spoil(draw, kind, buffers, found):
    """Buffers of which one does not fit, or None where that makes no difference."""
    which, part = draw.randrange(len(buffers)), draw.randrange(4)
    spoiled = [list(parts) for parts in buffers]
    t = spoiled[which][part]
    if kind in ("short", "dtype", "strided") and t.numel() < 2:
        return None
    if kind == "short":
        spoiled[which][part] = t[:-1]
    elif kind == "dtype":
        spoiled[which][part] = t.to(torch.int32)
    elif kind == "strided":
        spoiled[which][part] = lay_out(t, "every other")
    elif kind == "mask":
        found[which] = found[which].to(torch.int32)
    lists = [found, *map(list, zip(*spoiled, strict=True))]
    if kind == "missing":
        lists[part].pop()
    return lists


@fuzz(150)
def test_packing_many_weights_into_buffers_of_any_size(device, draw):
    """One buffer that does not fit, and none is written; otherwise each weight as it would be alone."""
    search = draw.random() < 0.5
    shapes = [(draw.pick(BLOCKS), draw.pick(BLOCKS)) for _ in range(draw.randint(1, 5))]
    weights = [on(device, draw.tensor(shape, FLOATS)) for shape in shapes]
    wanted = [reference.transposable_mask(plain(w)) for w in weights]
    found = [torch.zeros_like(m) if search else m for m in (m.to(device) for m in wanted)]
    buffers = [buffers_of(draw, device, shape) for shape in shapes]
    bad = draw.usually(None, "short", "dtype", "missing", "strided", "mask", share=0.4)
    lists = spoil(draw, bad, buffers, found)
    if lists is None:
        return
    kinds = [{t.dtype for t in (parts[0], parts[2]) if t.numel()} for parts in buffers]
    bad = "directions" if bad is None and any(len(kind) > 1 for kind in kinds) else bad
    run = ops.prune_compress_ if search else ops.compress_
    try:
        run(weights, *lists)
    except Sparse24Error as error:
        assert bad, f"refused what it should take: {error}"
        assert not any(t.any() for parts in buffers for t in parts), "written before it was refused"
        return
    assert bad is None, "accepted what it should refuse"
    for w, mask, mask_out, parts in zip(weights, wanted, found, buffers, strict=True):
        same(mask_out, mask, "mask")
        kept = [t for t in parts if t.numel()]
        (dtype,) = {t.dtype for t in kept} - {torch.uint8}
        expected = reference.compress(plain(w), mask, dtype)
        same(kept, [e for e, t in zip(expected, parts, strict=True) if t.numel()], "packed")


@fuzz(150)
def test_any_bytes_as_metadata(device, draw):
    """True where the pairs of all m x k/4 groups rise, false for other bytes and sizes; unpacking stays in bounds."""
    m, k = draw.pick(EXTENTS), 4 * draw.pick(EXTENTS)
    size = ops.metadata_bytes(m, k)
    E = torch.full((size,), draw.pick([0x44, 0xEE, 0x4E, 0x00, 0x45]), dtype=torch.uint8)
    change = draw.pick([None, "one byte", "size", "dtype"])
    if change == "one byte" and size:
        E[draw.randrange(size)] = draw.randrange(256)
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


# -- the fuzzers themselves -------------------------------------------------------------------------------------------

FILES = sorted(Path(__file__).parent.glob("test_fuzz*.py"))
#: they draw at random, look up a number, or time kernels
NOT_COMPUTED = {"draw_seed", "draw_seeds", "metadata_bytes", "padded_tokens", "tune_gemm", "scale_of", "E4M3"}


def test_every_op_is_fuzzed_and_cases_are_counted():
    trees = [ast.parse(path.read_text()) for path in FILES]
    names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    of_one = {"masked_decay_"}  # a list of one, by `foreach_masked_decay_`
    assert {*ops.__all__, *float8.__all__} - NOT_COMPUTED - of_one <= names
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    counts = [call.args[0].value for call in calls if isinstance(call.func, ast.Name) and call.func.id == "fuzz"]
    assert sum(counts) == ALL and ALL >= 2000


def test_a_product_is_held_to_its_terms_where_they_cancel():
    """1e4 - 1e4 + 1e-3: what an order of summation loses is allowed; a term that is missing, doubled or NaN is not."""
    a, b = torch.tensor([[1e4, -1e4, 1e-3]]), torch.ones(3, 1)
    assert_product(torch.zeros(1, 1), a, b)  # PyTorch's own result may be exact
    for wrong in (1e4, -1e4, float("nan"), 1.0):
        with pytest.raises(AssertionError, match="off, by a bound"):
            assert_product(torch.full((1, 1), wrong), a, b)


def test_rounds_cover_every_case_once():
    for cases, processes in ((1, 1), (7, 3), (50_000, 8), (1_000_001, 1), (2, 8)):
        rounds = rounds_of(cases, processes)
        assert sum(rounds) == cases and max(rounds) <= ROUND and (len(rounds) >= min(cases, processes))
