"""MVUE: exactly two picks, no bias, least variance, the same bits from every backend."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, ops, reference
from sparse24.testing import assert_as_accurate, assert_same_bits, column_major

SHAPES = [(1, 1), (3, 5), (8, 8), (31, 10), (64, 64), (65, 130), (128, 136), (260, 129), (1024, 256)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seed_on(device, first=20240109, second=-7):
    return torch.tensor([first, second], device=device)


def unpacked(packed, E, tokens):
    """Dense [tokens, features] of an MVUE-packed gradient."""
    return ops.decompress(packed, E, 2 * packed.shape[0], packed.shape[1], transposed=True)[:tokens]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["row", "column", "strided"])
def test_draws_equal_the_reference_bit_for_bit(device, shape, dtype, layout):
    dy = (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)
    expected = reference.mvue_compress(dy, seed_on("cpu"))
    on_device = dy.to(device)
    if layout == "column":
        on_device = column_major(on_device)
    if layout == "strided":
        on_device = torch.cat([dy.to(device), dy.to(device)], 1)[:, : shape[1]]
    packed, E = ops.mvue_compress(on_device, seed_on(device))
    assert_same_bits(packed, expected[0], "packed")
    assert_same_bits(E, expected[1], "E")


@pytest.mark.parametrize("shape", [*SHAPES, (0, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["row", "column"])
def test_a_bias_gradient_comes_with_the_packing(device, shape, dtype, layout):
    """The draws do not change, and the sums are as accurate as torch's."""
    dy = torch.randn(shape, device=device).to(dtype)
    dy = column_major(dy) if layout == "column" else dy
    packed, E, db = ops.mvue_compress(dy, seed_on(device), bias_grad=True)
    for ours, alone in zip((packed, E), ops.mvue_compress(dy, seed_on(device)), strict=True):
        assert_same_bits(ours, alone)
    assert db.dtype == torch.float32 and db.shape == (shape[1],)
    assert_as_accurate(db, dy.float().sum(0), dy.double().sum(0))


@pytest.mark.parametrize("tokens", [64, 1, 200])
def test_a_bias_gradient_of_integers_is_exact_and_carries_inf_and_nan(device, tokens):
    dy = torch.randint(-8, 9, (tokens, 24), device=device).bfloat16()
    dy[0, 3], dy[-1, 5] = float("inf"), float("nan")
    db = ops.mvue_compress(dy, seed_on(device), bias_grad=True)[2]
    assert torch.equal(db.nan_to_num(nan=1e9), dy.float().sum(0).nan_to_num(nan=1e9))


@pytest.mark.fault(10, 11, 12)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_groups_equal_the_reference_and_stay_valid(device, dtype):
    values = [0.0, -0.0, 1e-7, -1e-7, 1.0, -2.0, 6e4, 1.4e-45, 3e38, float("inf"), -float("inf"), float("nan")]
    dy = torch.tensor(values)[torch.randint(len(values), (4096, 64))].to(dtype)
    packed, E = ops.mvue_compress(dy.to(device), seed_on(device))
    expected = reference.mvue_compress(dy, seed_on("cpu"))
    assert_same_bits(packed, expected[0], "packed")
    assert_same_bits(E, expected[1], "E")
    assert ops.is_valid_metadata(E, 64, 4096)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-44, 1e37])
def test_exactly_two_picks_and_zeros_preserved(device, scale):
    dy = torch.randn(100_000, 100) * scale  # 2.5 million groups
    dy[torch.rand_like(dy) < 0.4] = 0
    dense = unpacked(*ops.mvue_compress(dy.to(device), seed_on(device)), dy.shape[0]).cpu()
    nonzero = (dy != 0).view(-1, 4, 100).sum(1)
    kept = (dense != 0).view(-1, 4, 100).sum(1)
    assert torch.equal(kept, nonzero.clamp(max=2))
    assert not dense[dy == 0].any()
    assert torch.equal(dense.sign() * dy.sign(), dense.sign().abs())
    few = (nonzero <= 2).repeat_interleave(4, 0)
    assert torch.equal(dense[few], dy[few])  # two or fewer non-zeros are kept exactly


def test_every_uniform_leaves_two_picks_in_awkward_groups():
    """All 2^16 of them, on ties, p = 1, zeros in each place: their mean is the group, up to the grid."""
    u = (2 * torch.arange(2**16) + 1).float() * 2.0**-17
    base = [[1, 1, 1, 1], [2, 1, 1, 0], [1, 0, 1, 2], [3, 1, 1, 1], [5, 1, 1, 1], [1e-45] * 4, [0.1, 0.2, 0.3, 0.6]]
    for group in base:
        for turn in range(4):
            a = torch.tensor(group).roll(turn)
            positions, values = reference.mvue_groups(a.expand(len(u), 4), u)
            assert (positions[:, 0] < positions[:, 1]).all()
            assert (values != 0).all()
            dense = torch.zeros(len(u), 4).scatter_(1, positions, values)
            if a.sum() > 1e-30:
                assert (dense.double().mean(0) - a.double()).abs().max() < 2.0**-16 * a.sum()


def test_probabilities_are_off_by_less_than_a_step_of_the_grid():
    """Over all 2^16 uniforms each element of random groups is kept as often as it should be, to within one step."""
    groups = torch.randn(32, 4) * torch.exp(2 * torch.randn(32, 4))
    u = (2 * torch.arange(2**16) + 1).float() * 2.0**-17
    for a in groups:
        positions, _ = reference.mvue_groups(a.expand(len(u), 4), u)
        kept = torch.bincount(positions.flatten(), minlength=4) / len(u)
        assert (kept.double() - reference.mvue_probabilities(a)).abs().max() <= 2.0**-16


@pytest.mark.slow
def test_mean_is_unbiased_and_variance_is_the_analytic_one(device):
    tiles = torch.randn(8, 64) * torch.exp(torch.randn(8, 64))
    draws, copies = 20_000, 250
    total, square = torch.zeros(8, 64, dtype=torch.float64), torch.zeros(8, 64, dtype=torch.float64)
    repeated = tiles.repeat(copies, 1).to(device)  # groups at other places draw other numbers
    for i in range(draws // copies):
        dense = unpacked(*ops.mvue_compress(repeated, seed_on(device, i)), repeated.shape[0])
        dense = dense.view(copies, 8, 64).double()
        total += dense.sum(0).cpu()
        square += (dense * dense).sum(0).cpu()
    groups = tiles.view(2, 4, 64).transpose(1, 2)
    p = reference.mvue_probabilities(groups).transpose(1, 2).reshape(8, 64)
    variance = tiles.double() ** 2 * (1 / p - 1)
    often = draws * p >= 50
    error = (total / draws - tiles.double()).abs()
    assert (error <= 5 * (variance / draws).sqrt() + 1e-6 * tiles.abs())[often].all()
    measured = square / draws - (total / draws) ** 2
    ratio = measured.sum() / variance.sum()
    assert 0.9 < ratio < 1.1


def test_a_lone_element_is_returned_as_it_is(device):
    dy = torch.tensor([[1.0], [0.0], [0.0], [0.0]], device=device)
    assert torch.equal(unpacked(*ops.mvue_compress(dy, seed_on(device)), 4), dy)


@pytest.mark.fault(11)
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan")])
def test_inf_and_nan_survive(device, special):
    dy = torch.randn(64, 64, device=device, dtype=torch.float16)
    dy[10, 3] = special
    dense = unpacked(*ops.mvue_compress(dy, seed_on(device)), 64)
    assert dense[10, 3].isnan() if special != special else dense[10, 3] == special


@pytest.mark.fault(12)
def test_a_dominating_element_is_kept_unscaled(device):
    dy = torch.full((4, 8), 1e-3, device=device)
    dy[2] = 100.0
    dense = unpacked(*ops.mvue_compress(dy, seed_on(device)), 4)
    assert torch.equal(dense[2], dy[2]) and torch.isfinite(dense).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values_are_the_fp32_ones_rounded_once(device, dtype):
    dy = torch.randn(256, 64).to(dtype)
    packed, E = ops.mvue_compress(dy.to(device), seed_on(device))
    wide, E_wide = ops.mvue_compress(dy.float().to(device), seed_on(device))
    assert_same_bits(E, E_wide, "E")
    assert_same_bits(packed, wide.to(dtype), "packed")


def test_the_seed_decides_and_nothing_else(device):
    dy = torch.randn(256, 64, device=device)
    first = ops.mvue_compress(dy, seed_on(device))[0]
    assert torch.equal(first, ops.mvue_compress(dy, seed_on(device))[0])
    for other in (seed_on(device, 1), seed_on(device, second=1)):
        assert not torch.equal(first, ops.mvue_compress(dy, other)[0])
    # A group's draw depends on its place alone: cutting tokens and features off changes nothing before the cut.
    part = unpacked(*ops.mvue_compress(dy[:128, :20], seed_on(device)), 128)
    assert torch.equal(part, unpacked(*ops.mvue_compress(dy, seed_on(device)), 256)[:128, :20])


@pytest.mark.fault(78)
def test_seeds_follow_the_torch_generator_and_the_rank(device):
    like = torch.empty(0, device=device)
    torch.manual_seed(5)
    first, again = ops.draw_seed(like), ops.draw_seed(like)
    torch.manual_seed(5)
    assert torch.equal(first, ops.draw_seed(like)) and not torch.equal(first, again)
    torch.manual_seed(5)
    assert not torch.equal(first, ops.draw_seed(like, rank=1))


@pytest.mark.fault(26)
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 31, 33])
def test_any_token_count_is_padded_with_zeros(device, tokens):
    dy = torch.randn(tokens, 12, device=device)
    packed, E = ops.mvue_compress(dy, seed_on(device))
    padded = ops.padded_tokens(tokens)
    assert padded % 8 == 0 and packed.shape == (padded // 2, 12)
    dense = ops.decompress(packed, E, padded, 12, transposed=True)
    assert not dense[tokens:].any()


@pytest.mark.fault(16)
def test_no_tokens_give_empty_results(device):
    packed, E = ops.mvue_compress(torch.empty(0, 16, device=device), seed_on(device))
    assert packed.shape == (0, 16) and E.numel() == 0


def test_wrong_seeds_and_gradients_are_named(device):
    dy = torch.randn(8, 8, device=device)
    for bad in (torch.tensor([1]), torch.tensor([1, 2], dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(Sparse24DtypeError, match="seed must be an int64 tensor of two"):
            ops.mvue_compress(dy, bad.to(device))
    with pytest.raises(Sparse24Error, match="dy must be 2-D"):
        ops.mvue_compress(dy.view(2, 4, 8), seed_on(device))
