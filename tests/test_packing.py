"""Packing by mask: exact both ways, the same bits from every backend and layout, nothing wrong accepted."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, ops, reference
from sparse24.testing import assert_same_bits, column_major

SHAPES = [(4, 4), (4, 8), (8, 4), (12, 20), (64, 64), (68, 132), (128, 128), (132, 260), (256, 1024)]
NAMES = ("packed", "E", "packed_t", "E_t")


def dtype_pairs(device):
    """(weight dtype, packed dtype) that a device takes."""
    pairs = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16)]
    pairs += [(torch.float16, torch.float16), (torch.bfloat16, torch.float16)]
    return pairs + [(torch.float32, torch.float32)] if device == "cpu" else pairs


def misaligned(w):
    room = torch.zeros(w.shape[0], w.shape[1] + 3, dtype=w.dtype, device=w.device)
    room[:, 1:-2] = w
    return room[:, 1:-2]


def every_second_column(w):
    room = torch.zeros(w.shape[0], 2 * w.shape[1], dtype=w.dtype, device=w.device)
    room[:, ::2] = w
    return room[:, ::2]


def expanded(w):
    """Every row is the first one, at stride 0."""
    return w[:1].expand(w.shape)


LAYOUTS = [
    pytest.param(torch.clone, id="row"),
    pytest.param(column_major, id="column"),
    pytest.param(misaligned, id="misaligned", marks=pytest.mark.fault(22)),
    pytest.param(every_second_column, id="sliced", marks=pytest.mark.fault(19)),
    pytest.param(expanded, id="expanded", marks=pytest.mark.fault(19)),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_forms_equal_the_reference_bit_for_bit(device, shape, layout):
    for dtype, packed_dtype in dtype_pairs(device):
        on_device = layout(torch.randn(shape).to(device, dtype))
        w = on_device.cpu().contiguous()
        mask = reference.transposable_mask(w)
        expected = reference.compress(w, mask, packed_dtype)
        for name, ours, theirs in zip(
            NAMES, ops.compress(on_device, mask.to(device), packed_dtype), expected, strict=True
        ):
            assert_same_bits(ours, theirs, f"{name} {dtype} -> {packed_dtype}")
        searched = ops.prune_compress(on_device, packed_dtype)
        for name, ours, theirs in zip(("mask", *NAMES), searched, (mask, *expected), strict=True):
            assert_same_bits(ours, theirs, f"prune_compress {name} {dtype} -> {packed_dtype}")


@pytest.mark.parametrize("shape", SHAPES)
def test_decompress_returns_exactly_the_masked_weight(device, shape):
    w = torch.randn(shape, dtype=torch.bfloat16, device=device)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w)
    expected = w.masked_fill(~ops.unpack_mask(mask), 0.0)
    assert_same_bits(ops.decompress(packed, E, *shape), expected, "packed")
    assert_same_bits(ops.decompress(packed_t, E_t, *shape, transposed=True), expected, "packed_t")


def any_bits(dtype):
    """Every bit pattern is likely: NaNs with payloads, infinities, denormals, both zeros."""
    size = torch.int32 if dtype == torch.float32 else torch.int16
    return torch.randint(-(2 ** (8 * size.itemsize - 1)), 2 ** (8 * size.itemsize - 1), (132, 264), dtype=size).view(
        dtype
    )


@pytest.mark.fault(1, 2, 4, 6, 8)
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_packing_is_lossless_for_any_bits_both_ways(device, layout):
    for dtype, packed_dtype in dtype_pairs(device):
        if dtype != packed_dtype:
            continue  # rounding: compared with the reference above
        w = layout(any_bits(dtype).to(device))
        mask, packed, E, packed_t, E_t = ops.prune_compress(w)
        expected = w.contiguous().masked_fill(~ops.unpack_mask(mask), 0.0)
        assert_same_bits(ops.decompress(packed, E, *w.shape), expected, f"packed {dtype}")
        assert_same_bits(ops.decompress(packed_t, E_t, *w.shape, transposed=True), expected, f"packed_t {dtype}")


@pytest.mark.fault(3, 5, 7)
@pytest.mark.parametrize(
    "block, dtype, kept",
    [
        ([[1.0, 65504, 65504, 65504], *[[65504.0] * 4] * 3], torch.float16, 0xC33C),  # sums past fp16
        ([[0.0] * 4] * 4, torch.bfloat16, 0xC3C3),
        ([[-2.5] * 4] * 4, torch.float32, 0xC3C3),
        ([[1 + 2.0**-20, 1, 1 + 2.0**-20, 1], [1, 1 + 2.0**-20, 1, 1 + 2.0**-20]] * 2, torch.float32, 0xA5A5),
    ],
)
def test_packing_searches_in_fp32_with_the_order_of_ties(device, block, dtype, kept):
    w = torch.tensor(block, device=device).to(dtype).repeat(2, 4)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w, torch.float16 if dtype == torch.float16 else torch.bfloat16)
    assert (mask.to(torch.int32) == kept).all()
    bits = ops.unpack_mask(mask)
    assert torch.equal(ops.decompress(packed, E, 8, 16) != 0, bits & (w != 0))
    assert torch.equal(ops.decompress(packed_t, E_t, 8, 16, transposed=True) != 0, bits & (w != 0))


@pytest.mark.fault(8)
def test_kept_zeros_keep_their_places(device):
    w = torch.zeros(64, 64, device=device, dtype=torch.bfloat16)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w)
    assert ops.is_valid_metadata(E, 64, 64) and ops.is_valid_metadata(E_t, 64, 64)
    nibbles = reference.decode_metadata(E.cpu(), 64, 64)
    assert set(nibbles.unique().tolist()) == {0x4, 0xE}  # {0, 1} and {2, 3}: the first pattern


@pytest.mark.fault(4)
def test_negative_zero_is_packed_as_it_is(device):
    w = torch.full((8, 8), -0.0, device=device, dtype=torch.float16)
    packed = ops.prune_compress(w)[1]
    assert (packed.view(torch.int16) == -32768).all()


@pytest.mark.fault(1, 2)
def test_special_values_survive_packing(device):
    w = torch.randn(64, 64)
    w[3, 5], w[9, 9] = float("nan"), float("inf")
    for dtype in (torch.bfloat16, torch.float16):
        mask, packed, E, packed_t, E_t = ops.prune_compress(w.to(device), dtype)
        for dense in (ops.decompress(packed, E, 64, 64), ops.decompress(packed_t, E_t, 64, 64, transposed=True)):
            assert dense[3, 5].isnan() and dense[9, 9].isinf()


def test_metadata_padding_holds_increasing_pairs(device):
    _, packed, E, packed_t, E_t = ops.prune_compress(torch.randn(12, 20, device=device))
    assert ops.is_valid_metadata(E, 64, 64) and ops.is_valid_metadata(E_t, 64, 64)


def test_metadata_order_matches_an_independent_construction():
    """Nibbles sit as the sparse wgmma reads them: walk the 64x64 block in the hardware's own nesting."""
    m, k = 128, 192
    nibbles = torch.arange(m * k // 4, dtype=torch.int64).reshape(m, k // 4) % 15
    walk = []
    for block_k in range(0, k, 64):
        for block_m in range(0, m, 64):
            for slab in range(4):  # 16 rows, 128 bytes
                for k_half_parity in range(2):  # k/16 odd or even, 64 bytes
                    for row in range(8):
                        for k_half in range(2):  # 32 elements of k
                            for upper in range(2):  # rows 8..15 of the slab
                                for pair in range(2):  # 8 elements of k
                                    i = block_m + 16 * slab + 8 * upper + row
                                    j = block_k + 32 * k_half + 16 * k_half_parity + 8 * pair
                                    walk.append(nibbles[i, j // 4] | nibbles[i, j // 4 + 1] << 4)
    assert torch.equal(reference.encode_metadata(nibbles), torch.stack(walk).to(torch.uint8))


def test_many_weights_are_packed_in_place_as_one_by_one(device):
    shapes = [(64, 128), (12, 20), (132, 260), (64, 128)]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    weights[3] = column_major(weights[3])
    masks = [torch.zeros(r // 4, c // 4, dtype=torch.uint16, device=device) for r, c in shapes]
    buffers = [ops.empty_packed(r, c, torch.bfloat16, device) for r, c in shapes]
    addresses = [part.data_ptr() for parts in buffers for part in parts]
    ops.prune_compress_(weights, masks, *map(list, zip(*buffers, strict=True)))
    assert addresses == [part.data_ptr() for parts in buffers for part in parts]
    for w, mask, parts in zip(weights, masks, buffers, strict=True):
        for name, ours, theirs in zip(
            ("mask", *NAMES), (mask, *parts), ops.prune_compress(w, torch.bfloat16), strict=True
        ):
            assert_same_bits(ours, theirs, name)
    for w in weights:
        w.mul_(0.5)
    ops.compress_(weights, [mask.view(torch.uint8) for mask in masks], *map(list, zip(*buffers, strict=True)))
    for w, mask, parts in zip(weights, masks, buffers, strict=True):
        for name, ours, theirs in zip(NAMES, parts, ops.compress(w, mask, torch.bfloat16), strict=True):
            assert_same_bits(ours, theirs, name)


def test_packing_in_place_is_seen_by_autograd(device):
    w = torch.randn(64, 64, device=device)
    mask, *parts = ops.prune_compress(w, torch.bfloat16)
    before = parts[2]._version
    ops.compress_([w], [mask], *([part] for part in parts))
    assert parts[2]._version > before


@pytest.mark.fault(9)
def test_masks_that_are_not_transposable_are_refused_when_asked(device):
    mask = torch.full((4, 4), 0x00FF, dtype=torch.uint16, device=device)
    with pytest.raises(Sparse24Error, match="two elements in every row and column"):
        ops.compress(torch.randn(16, 16, device=device), mask, torch.bfloat16, validate=True)


@pytest.mark.fault(9)
def test_masks_are_not_checked_unless_asked(device):
    """The training path: whatever the mask says is read, and nothing is launched to look at it."""
    w, mask = torch.randn(16, 16, device=device), torch.full((4, 4), 0x5A5A, dtype=torch.uint16, device=device)
    expected = w.bfloat16().masked_fill(~ops.unpack_mask(mask), 0.0)
    packed, E, packed_t, E_t = ops.compress(w, mask, torch.bfloat16)
    assert_same_bits(ops.decompress(packed, E, 16, 16), expected, "packed")
    assert_same_bits(ops.decompress(packed_t, E_t, 16, 16, transposed=True), expected, "packed_t")


@pytest.mark.fault(13, 25)
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (1, 4), (2, 8), (4, 3)])
def test_extents_that_are_not_multiples_of_four_are_named(device, shape):
    w = torch.randn(shape, device=device)
    with pytest.raises(Sparse24Error, match="multiples of 4"):
        ops.prune_compress(w, torch.bfloat16)
    with pytest.raises(Sparse24Error, match="multiples of 4"):
        ops.compress(w, torch.zeros(1, 1, dtype=torch.uint16, device=device), torch.bfloat16)


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(4, 4, dtype=torch.int32), "uint16"),
        (torch.zeros(4, 5, dtype=torch.uint16), "shape"),
        (torch.zeros(0, 0, dtype=torch.uint16), "shape"),
        (torch.zeros(4, 8, dtype=torch.int32).to(torch.uint16)[:, ::2], "contiguous"),
    ],
)
def test_wrong_masks_are_named(device, mask, message):
    with pytest.raises(Sparse24Error, match=message):
        ops.compress(
            torch.randn(16, 16, device=device), mask.to(device) if mask.is_contiguous() else mask, torch.bfloat16
        )


@pytest.mark.fault(42, 43)
def test_wrong_packed_sizes_are_named(device):
    _, packed, E, packed_t, E_t = ops.prune_compress(torch.randn(64, 64, device=device, dtype=torch.bfloat16))
    for bad in (E[:-1], E[:0], E.to(torch.int32), E.view(8, -1), torch.cat([E, E])[::2]):
        with pytest.raises(Sparse24Error, match="E of packed must be"):
            ops.decompress(packed, bad, 64, 64)
    for bad in (packed[:, :-1], packed[:-4], packed.view(-1), packed.T):
        with pytest.raises(Sparse24Error, match="packed must"):
            ops.decompress(bad, E, 64, 64)


@pytest.mark.parametrize("counts", [[0] * 6, [2, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("pack", [ops.prune_compress_, ops.compress_])
def test_lists_that_are_empty_or_of_several_lengths_are_refused(pack, counts):
    weight = torch.randn(8, 8)
    tensors = (weight, ops.transposable_mask(weight), *ops.empty_packed(8, 8, torch.float32, "cpu"))
    with pytest.raises(Sparse24Error, match="non-empty lists of one length") as error:
        pack(*([tensor] * count for tensor, count in zip(tensors, counts, strict=True)))
    assert str(counts) in str(error.value)


@pytest.mark.fault(44)
def test_illegal_metadata_is_found(device):
    E = ops.prune_compress(torch.randn(64, 128, device=device), torch.bfloat16)[2]
    assert ops.is_valid_metadata(E, 64, 128)
    E[77] = 0x45  # positions 1, 1
    assert not ops.is_valid_metadata(E, 64, 128)
    assert not ops.is_valid_metadata(E[:-1], 64, 128)


def test_dtypes_that_no_product_reads_are_refused(device):
    w = torch.randn(16, 16, device=device)
    with pytest.raises(Sparse24DtypeError, match="bfloat16 or torch.float16"):
        ops.prune_compress(w, torch.int8)
    if device == "cuda":
        with pytest.raises(Sparse24DtypeError, match="float32 on the CPU only"):
            ops.prune_compress(w, torch.float32)
        assert ops.prune_compress(w)[1].dtype == torch.bfloat16


def test_backward_through_compress_names_the_differentiable_function(device):
    w = torch.randn(16, 16, device=device, requires_grad=True)
    packed = ops.prune_compress(w, torch.bfloat16)[1]
    with pytest.raises(Sparse24Error, match="functional.sparse_linear"):
        packed.float().sum().backward()


@pytest.mark.fault(16)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_weights_have_empty_packed_forms(device, shape):
    _, packed, E, packed_t, E_t = ops.prune_compress(torch.empty(shape, device=device), torch.bfloat16)
    assert packed.shape == (shape[0], shape[1] // 2) and packed_t.shape == (shape[0] // 2, shape[1])
    assert E.numel() == E_t.numel() == 0


# ---- two directions, and E that is a view ---------------------------------------------------------------------------


@pytest.mark.fault(42)
@pytest.mark.parametrize("pack", [ops.prune_compress_, ops.compress_])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str)
def test_directions_of_two_dtypes_are_refused(pack, dtypes):
    """One launch writes one dtype: fp32 values would run past the end of a 16-bit buffer."""
    w = torch.randn(64, 64)
    mask = ops.transposable_mask(w)
    for first, second in (dtypes, dtypes[::-1]):
        packed, E, _, _ = (t.zero_() for t in ops.empty_packed(64, 64, first, "cpu"))
        _, _, packed_t, E_t = (t.zero_() for t in ops.empty_packed(64, 64, second, "cpu"))
        with pytest.raises(Sparse24DtypeError, match="packed and packed_t of a weight must have one dtype"):
            pack([w], [mask], [packed], [E], [packed_t], [E_t])
        assert not any(t.any() for t in (packed, E, packed_t, E_t))


@pytest.mark.parametrize("pack", [ops.prune_compress_, ops.compress_])
@pytest.mark.parametrize("left_out_dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("direction", ["packed", "packed_t"])
def test_a_direction_that_is_left_out_has_no_say_in_the_dtype(device, pack, left_out_dtype, direction):
    """`torch.empty(0)` is float32, whatever the other direction holds; a guard behind each output stays as it is."""
    w = torch.randn(64, 72, device=device).bfloat16()
    mask, *expected = ops.prune_compress(w)
    nothing, no_E = (torch.empty(0, dtype=t, device=device) for t in (left_out_dtype, torch.uint8))
    values, E = expected[:2] if direction == "packed" else expected[2:]
    room = torch.full((2 * values.numel(),), 7.0, dtype=values.dtype, device=device)
    written, written_E = room[: values.numel()].view(values.shape), torch.empty_like(E)
    given = [[written], [written_E]], [[nothing], [no_E]]
    pack([w], [mask.clone()], *(part for pair in (given if direction == "packed" else given[::-1]) for part in pair))
    assert_same_bits(written, values, direction)
    assert_same_bits(written_E, E, "E")
    assert (room[values.numel() :] == 7).all()


def test_weights_of_several_packed_dtypes_in_one_call(device):
    """Each weight has a dtype of its own, the same both ways."""
    weights = [torch.randn(64, 64, device=device) for _ in range(2)]
    dtypes = (torch.bfloat16, torch.float16)
    masks = [ops.transposable_mask(w) for w in weights]
    buffers = [ops.empty_packed(64, 64, dtype, device) for dtype in dtypes]
    ops.compress_(weights, masks, *map(list, zip(*buffers, strict=True)))
    for w, mask, dtype, parts in zip(weights, masks, dtypes, buffers, strict=True):
        for name, ours, theirs in zip(NAMES, parts, ops.compress(w, mask, dtype), strict=True):
            assert_same_bits(ours, theirs, f"{name} {dtype}")


@pytest.mark.fault(19, 44)
def test_metadata_with_any_strides_is_judged_by_its_values(device):
    E = ops.prune_compress(torch.randn(256, 256, device=device), torch.bfloat16)[2]
    strided = torch.stack([E, torch.zeros_like(E)], 1)[:, 0]
    assert not strided.is_contiguous()
    for _ in range(20):
        assert ops.is_valid_metadata(strided, 256, 256)
    strided[77] = 0x45
    assert not ops.is_valid_metadata(strided, 256, 256)


@pytest.mark.fault(1, 2, 3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_at_the_ends_of_the_range(device, dtype):
    """A NaN of any payload stays NaN (rounding up its bits could give -0), and fp16 has its largest number and Inf."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    ends = torch.tensor(
        [65504.0, 65519.0, 65520.0, -65504.0, -65520.0, 3.4028235e38, 2.0**-24, 2.0**-25 * 1.5, 2.0**-149]
    )
    w = torch.cat([bits, ends, torch.tensor([1.0, -0.0, 5.0])]).repeat(16, 4).to(device)
    mask = ops.transposable_mask(w)
    expected = torch.where(ops.unpack_mask(mask), w.to(dtype), 0.0)
    _, packed, E, packed_t, E_t = ops.prune_compress(w, dtype)
    assert_same_bits(ops.decompress(packed, E, *w.shape), expected, "packed")
    assert_same_bits(ops.decompress(packed_t, E_t, *w.shape, transposed=True), expected, "packed_t")
    assert expected.isnan().any()
