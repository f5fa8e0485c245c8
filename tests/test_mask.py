"""The transposable mask: valid, optimal, deterministic, the same from every backend and layout."""

from __future__ import annotations

import pytest
import torch
from rounding import ANOTHER_ORDER

from sparse24 import Sparse24DtypeError, Sparse24Error, ops, reference
from sparse24.testing import assert_same_bits, column_major

SHAPES = [(4, 4), (4, 8), (8, 4), (12, 20), (64, 64), (68, 132), (128, 128), (132, 260), (256, 1024)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL_VALUES = torch.tensor(
    [0.0, -0.0, 1.4e-45, 1.0, -1.0, 3.4e38, -3.4e38, float("inf"), -float("inf"), float("nan")]
)


def kept_magnitude(w, mask):
    """Kept magnitude of each block in float64, ranked as the search ranks; where the mask is."""
    kept = reference.to_blocks(ops.unpack_mask(mask))
    return (reference.to_blocks(reference.ranked_magnitude(w.to(mask.device)).double()) * kept).sum((-1, -2))


def assert_optimal(w, mask, ulps=4):
    best = reference.pattern_scores(w.to(mask.device)).amax(-1)
    ours = kept_magnitude(w, mask)
    assert (best - ours <= ulps * 2.0**-23 * best).all(), f"worst gap {(best - ours).max()} of {best.max()}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_equals_the_reference_bit_for_bit(device, shape, dtype):
    w = torch.randn(shape, dtype=dtype)
    assert_same_bits(ops.transposable_mask(w.to(device)), reference.transposable_mask(w), "mask")


@pytest.mark.fault(19, 22)
@pytest.mark.parametrize("shape", SHAPES)
def test_mask_does_not_depend_on_layout(device, shape):
    w = torch.randint(-2, 3, shape).float().to(device)  # many ties: the order of ties must not follow the layout
    expected = ops.transposable_mask(w)
    assert_same_bits(ops.transposable_mask(column_major(w)), expected, "column-major")
    wide = torch.zeros(shape[0], 2 * shape[1], device=device)
    wide[:, ::2] = w
    assert_same_bits(ops.transposable_mask(wide[:, ::2]), expected, "every second column")
    padded = torch.zeros(shape[0], shape[1] + 3, device=device)
    padded[:, 1:-2] = w
    assert_same_bits(ops.transposable_mask(padded[:, 1:-2]), expected, "misaligned rows")
    one_row = w[:1].expand(shape)
    assert_same_bits(ops.transposable_mask(one_row), ops.transposable_mask(one_row.contiguous()), "stride 0")


def test_no_pattern_keeps_more_than_the_mask_on_normal_weights(device):
    w = torch.randn(512, 1024)
    mask = ops.transposable_mask(w.to(device))
    assert_optimal(w, mask)
    assert ops.is_transposable(mask)
    share = (kept_magnitude(w, mask).sum() / w.abs().double().sum()).item()
    # 32,768 blocks, whose shares spread by 0.05, know the mean to 0.0003: seven times that
    assert share == pytest.approx(0.7025, abs=0.002)


def test_no_pattern_keeps_more_on_every_block_of_zeros_and_ones(device):
    numbers = torch.arange(65536).view(256, 256)
    w = reference.from_blocks(((numbers.unsqueeze(-1) >> torch.arange(16)) & 1).float().unflatten(-1, (4, 4)))
    mask = ops.transposable_mask(w.to(device))
    assert ops.is_transposable(mask)
    assert_optimal(w, mask, ulps=0)


def ten_million_blocks(kind: str):
    """Weights on the GPU with 10 * 2^20 blocks, in parts that leave room for 90 scores a block."""
    for _ in range(10):
        if kind == "special":
            yield SPECIAL_VALUES.cuda()[torch.randint(len(SPECIAL_VALUES), (4096, 4096), device="cuda")]
        elif kind == "wide":
            exponents = torch.randint(-20, 20, (4096, 4096), device="cuda")
            yield torch.ldexp(torch.randn(4096, 4096, device="cuda"), exponents)
        else:
            yield torch.randn(4096, 4096, device="cuda", dtype=getattr(torch, kind))


@pytest.mark.gpu
@pytest.mark.fault(1, 2, 3, 4, 6, 7)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "wide", "special"])
def test_no_pattern_keeps_more_on_ten_million_blocks(kind):
    """The CPU's turn at as many blocks is in cpp/mask_test.cpp."""
    for w in ten_million_blocks(kind):
        mask = ops.transposable_mask(w)
        assert ops.is_transposable(mask)
        assert_optimal(w, mask)
        assert torch.equal(ops.prune_compress(w, torch.bfloat16)[0].view(torch.uint8), mask.view(torch.uint8))


def test_small_integers_are_searched_exactly(device):
    w = torch.randint(-7, 8, (512, 512)).float()
    assert_optimal(w, ops.transposable_mask(w.to(device)), ulps=0)


@pytest.mark.fault(1, 2, 4, 6)
def test_special_values_give_valid_optimal_masks(device):
    w = SPECIAL_VALUES[torch.randint(len(SPECIAL_VALUES), (1024, 1024))]
    mask = ops.transposable_mask(w.to(device))
    assert ops.is_transposable(mask)
    assert_optimal(w, mask)
    assert_same_bits(mask, reference.transposable_mask(w), "mask")


@pytest.mark.fault(1)
def test_one_nan_is_kept(device):
    w = torch.randn(64, 64)
    w[13, 27] = float("nan")
    assert ops.unpack_mask(ops.transposable_mask(w.to(device)))[13, 27]


@pytest.mark.fault(2)
def test_two_infinities_in_a_block_are_both_kept(device):
    w = torch.randn(8, 8)
    w[0, 1], w[0, 3] = float("inf"), -float("inf")
    bits = ops.unpack_mask(ops.transposable_mask(w.to(device)))
    assert bits[0, 1] and bits[0, 3]


@pytest.mark.fault(3)
def test_fp16_blocks_whose_sum_overflows_fp16_are_ranked_in_fp32(device):
    w = torch.full((4, 4), 65504.0, dtype=torch.float16)
    w[0, 0] = 1.0
    mask = ops.transposable_mask(w.to(device))
    assert not ops.unpack_mask(mask)[0, 0]


@pytest.mark.fault(5)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0])
def test_blocks_without_preference_get_the_first_pattern(device, value):
    mask = ops.transposable_mask(torch.full((8, 8), value, device=device))
    assert (mask.to(torch.int32) == 0xC3C3).all()


@pytest.mark.fault(6)
def test_denormals_are_ranked(device):
    w = torch.zeros(4, 4)
    w[0] = torch.tensor([1e-44, 3e-44, 2e-44, 0.0])
    assert ops.unpack_mask(ops.transposable_mask(w.to(device)))[0].tolist() == [False, True, True, False]


@pytest.mark.fault(7)
def test_weights_that_differ_below_bf16_are_ranked_in_fp32(device):
    w = 1.0 + torch.rand(256, 256) * 2.0**-12  # all equal in bf16 and TF32
    mask = ops.transposable_mask(w.to(device))
    best = reference.pattern_scores(w.to(device)).amax(-1)
    assert (best - kept_magnitude(w, mask)).max() < 2.0**-19


def test_mask_agrees_with_the_convolution_of_the_paper():
    w = torch.randn(256, 256)
    assert_same_bits(reference.transposable_mask_by_convolution(w), reference.transposable_mask(w), "mask")


def test_mask_of_transpose_is_transposed_mask(device):
    w = torch.randn(64, 128, device=device)
    assert torch.equal(ops.unpack_mask(ops.transposable_mask(w.T)), ops.unpack_mask(ops.transposable_mask(w)).T)


def test_unpack_mask_equals_the_reference(device):
    mask = ops.transposable_mask(torch.randn(132, 260, device=device))
    assert torch.equal(ops.unpack_mask(mask).cpu(), reference.unpack_mask(mask.cpu()))
    assert torch.equal(ops.unpack_mask(mask.view(torch.uint8)), ops.unpack_mask(mask))


def test_is_transposable_finds_one_bad_block(device):
    mask = ops.transposable_mask(torch.randn(64, 64, device=device))
    assert ops.is_transposable(mask)
    mask[3, 5] = 0xFF00
    assert not ops.is_transposable(mask)


def test_mask_flips_counts_changed_elements(device):
    a, b = (ops.transposable_mask(torch.randn(132, 260, device=device)) for _ in range(2))
    expected = (ops.unpack_mask(a) != ops.unpack_mask(b)).sum().item()
    assert ops.mask_flips(a, b).item() == expected and ops.mask_flips(a, a).item() == 0
    assert ops.foreach_mask_flips([a, a, b], [b, a, a]).tolist() == [expected, 0, expected]
    assert expected / a.numel() / 16 == pytest.approx(0.5, abs=0.02)  # independent masks
    for masks in ([], [a, a]):
        with pytest.raises(Sparse24Error, match=f"non-empty and equally long, got {len(masks)} and 0"):
            ops.foreach_mask_flips(masks, [])


def test_mask_gap_equals_the_reference(device):
    w = torch.randn(132, 260)
    gap = ops.mask_gap(w.to(device)).cpu()
    torch.testing.assert_close(gap, reference.mask_gap(w), **ANOTHER_ORDER)
    assert gap.mean().item() == pytest.approx(0.252, abs=0.02)  # sigma = 1


@pytest.mark.fault(13, 25)
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (1, 4), (4, 3)])
def test_extents_that_are_not_multiples_of_four_are_named(device, shape):
    with pytest.raises(Sparse24Error, match="multiples of 4"):
        ops.transposable_mask(torch.randn(shape, device=device))


@pytest.mark.fault(18)
@pytest.mark.parametrize("shape", [(8,), (2, 8, 8)])
def test_weights_that_are_not_matrices_are_refused(device, shape):
    with pytest.raises(Sparse24Error, match="w must be 2-D"):
        ops.transposable_mask(torch.randn(shape, device=device))


@pytest.mark.fault(29)
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.int64])
def test_dtypes_without_magnitude_order_are_refused(device, dtype):
    with pytest.raises(Sparse24DtypeError, match="float32, bfloat16 or float16"):
        ops.transposable_mask(torch.zeros(8, 8, dtype=dtype, device=device))


@pytest.mark.fault(29)
def test_float64_runs_on_the_cpu():
    w = torch.randn(64, 64, dtype=torch.float64)
    assert_same_bits(ops.transposable_mask(w), reference.transposable_mask(w), "mask")


@pytest.mark.fault(16)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_empty_weights_have_empty_masks(device, shape):
    assert ops.transposable_mask(torch.empty(shape, device=device)).shape == (shape[0] // 4, shape[1] // 4)


def test_blocks_whose_rows_keep_two_and_columns_do_not_are_no_masks(device):
    mask = torch.full((4, 4), 0xC3C3, dtype=torch.int32)
    mask[2, 1] = 0x3333  # each row keeps its first two: columns keep four and none
    assert not ops.is_transposable(mask.to(torch.uint16).to(device))
    mask[2, 1] = 0x0FF0 & 0xFFFF  # columns keep two, rows four and none
    assert not ops.is_transposable(mask.to(torch.uint16).to(device))


@pytest.mark.fault(2)
def test_magnitudes_above_two_to_the_120_are_ties(device):
    """Inf counts as 2^120: a block of one Inf among 2^127 is a block of equals, and sums never overflow."""
    w = torch.full((4, 8), 2.0**127, device=device)
    w[0, 2], w[3, 7] = float("inf"), float("-inf")
    assert (ops.transposable_mask(w).to(torch.int32) == 0xC3C3).all()
    w = torch.full((4, 4), 2.0**119, device=device)
    w[0, 2] = w[0, 3] = 2.0**125
    kept = ops.unpack_mask(ops.transposable_mask(w))
    assert kept[0].tolist() == [False, False, True, True]


def test_the_bytes_of_a_mask_of_one_row_may_have_any_stride(device):
    mask = ops.transposable_mask(torch.randn(4, 32, device=device))
    for stride in (1, 3, 17):
        as_bytes = mask.view(torch.uint8).as_strided((1, 16), (stride, 1))
        assert torch.equal(ops.unpack_mask(as_bytes), ops.unpack_mask(mask))
