"""Activations pruned to 2:4 and packed: the two largest of four, exactly those, by every backend with the same bits."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, ops, reference
from sparse24.testing import assert_as_accurate, assert_same_bits, column_major

KINDS = ["relu", "squared_relu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOKENS = [0, 1, 7, 8, 9, 64, 100, 129]
WIDTHS = [4, 8, 12, 64, 72, 200]
INF, NAN = float("inf"), float("nan")
#: the last three are a NaN of the other sign, the smallest subnormals of fp16 and of bfloat16
SPECIAL = [-3.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 300.0, 6e4, 3e38, INF, -INF, NAN, -NAN, 6e-8, 1e-40]


def seed_on(device):
    return torch.tensor([20250316, -7], device=device)


def skip_without_backend(device, dtype):
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on the CPU")


def special_values(tokens, width, dtype):
    return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (tokens, width))].to(dtype)


def samples(tokens, width, dtype):
    """(dh, u): plain numbers, and special ones on both sides."""
    yield torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    yield special_values(tokens, width, dtype), special_values(tokens, width, dtype)


def two_of_four(group: list[float]) -> list[int]:
    """Which of four are kept, by comparing each with each: brute force."""

    def is_above(i, j):
        a, b = (x if x != x or x > 0 else 0.0 for x in (group[i], group[j]))
        if (a != a) == (b != b):
            return i < j if a != a or a == b else a > b
        return a != a

    ranked = sorted(range(4), key=lambda i: sum(is_above(j, i) for j in range(4) if j != i))
    return sorted(ranked[:2])


def pruned_by_brute_force(u, values):
    """`values` where u is kept, else 0; and the nibbles of E."""
    pruned, nibbles = torch.zeros_like(values), torch.zeros(u.shape[0], u.shape[1] // 4, dtype=torch.uint8)
    for t in range(u.shape[0]):
        for g in range(u.shape[1] // 4):
            first, second = two_of_four(u[t, 4 * g : 4 * g + 4].tolist())
            nibbles[t, g] = first + 4 * second
            for i in (first, second):
                pruned[t, 4 * g + i] = values[t, 4 * g + i]
    return pruned, nibbles


def slow_forward(u, kind):
    r = torch.where(u.isnan() | (u > 0), u, 0)
    wide = r if u.dtype == torch.float64 else r.float()
    return (wide * wide if kind == "squared_relu" else wide).to(u.dtype)


def slow_backward(dh, u, kind):
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    r = torch.where(u.isnan() | (u > 0), u, 0).to(wide)
    slope = 2 * r if kind == "squared_relu" else (r > 0).to(wide)
    return (dh.to(wide) * slope).to(u.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width", [(1, 4), (9, 12), (100, 72)])
def test_the_reference_keeps_what_brute_force_keeps(kind, dtype, tokens, width):
    seed = seed_on("cpu")
    for dh, u in samples(tokens, width, dtype):
        h, nibbles = pruned_by_brute_force(u, slow_forward(u, kind))
        packed, E, packed_t, E_t = reference.activation_compress(u, kind, seed)
        assert_same_bits(ops.decompress(packed, E, tokens, width), h, "pruned h")
        assert_same_bits(reference.decode_metadata(E, tokens, width), nibbles, "E")
        for ours, theirs in zip((packed_t, E_t), reference.mvue_compress(h, seed), strict=True):
            assert_same_bits(ours, theirs, "h along tokens")
        du, _ = pruned_by_brute_force(u, slow_backward(dh, u, kind))
        packed, packed_t, E_t, db = reference.activation_backward_compress(dh, u, kind, seed, True)
        assert_same_bits(ops.decompress(packed, E, tokens, width), du, "pruned du")
        for ours, theirs in zip((packed_t, E_t), reference.mvue_compress(du, seed), strict=True):
            assert_same_bits(ours, theirs, "du along tokens")
        assert_same_bits(db, reference.bias_gradient(du), "db")


@pytest.mark.fault(10, 11, 16, 26)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_backend_has_the_bits_of_the_reference(device, kind, dtype, tokens):
    skip_without_backend(device, dtype)
    for width in WIDTHS:
        for dh, u in samples(tokens, width, dtype):
            for seed in (None, seed_on("cpu")):
                assert_equals_reference(device, dh, u, kind, seed)


def assert_equals_reference(device, dh, u, kind, seed):
    """`dh` and `u` on the CPU, of which copies with their strides go to the device."""

    def there(t):
        return None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)

    names = ("packed", "E", "packed_t", "E_t")
    ours = ops.activation_compress(there(u), kind, there(seed))
    for name, a, b in zip(names, ours, reference.activation_compress(u, kind, seed), strict=True):
        assert_same_bits(a, b, f"{name} of {tuple(u.shape)}")
    assert_backward_equals_reference(there(dh), there(u), kind, there(seed), (dh, u, seed))


def assert_backward_equals_reference(dh, u, kind, seed, on_cpu):
    cpu_dh, cpu_u, cpu_seed = on_cpu
    ours = ops.activation_backward_compress(dh, u, kind, seed, bias_grad=True)
    theirs = reference.activation_backward_compress(cpu_dh, cpu_u, kind, cpu_seed, True)
    for name, a, b in zip(("packed", "packed_t", "E_t"), ours, theirs, strict=False):
        assert_same_bits(a, b, f"{name} of {tuple(u.shape)}")
    alone = ops.activation_backward_compress(dh, u, kind, seed)
    for a, b in zip(alone[:3], ours[:3], strict=True):
        assert_same_bits(a, b, "without db")
    assert alone[3].numel() == 0 and alone[3].dtype == ours[3].dtype
    # Sums have an order, that of mvue_compress, which is not torch's.
    pruned = _pruned(ours[0], reference.activation_compress(cpu_u, kind)[1].to(ours[0].device), u)
    assert_same_bits(ours[3], ops.mvue_compress(pruned, seed_on(u.device), bias_grad=True)[2], "db")


def _pruned(packed, E, like):
    return ops.decompress(packed, E, *like.shape) if like.numel() else torch.zeros_like(like)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_forms_along_tokens_are_those_of_mvue_compress(device, kind, dtype):
    u, dh, seed = torch.randn(200, 136).to(device, dtype), torch.randn(200, 136).to(device, dtype), seed_on(device)
    packed, E, *along_tokens = ops.activation_compress(u, kind, seed)
    h = ops.activation(u, kind)
    pruned = ops.decompress(packed, E, *u.shape)
    kept = reference.kept_activations(u)
    assert_same_bits(pruned, torch.where(kept, h, 0), "pruned h")
    for ours, theirs in zip(along_tokens, ops.mvue_compress(pruned, seed), strict=True):
        assert_same_bits(ours, theirs)
    packed, *results = ops.activation_backward_compress(dh, u, kind, seed, bias_grad=True)
    pruned = ops.decompress(packed, E, *u.shape)
    assert_same_bits(pruned, torch.where(kept, ops.activation_backward(dh, u, kind), 0), "pruned du")
    for ours, theirs in zip(results, ops.mvue_compress(pruned, seed, bias_grad=True), strict=True):
        assert_same_bits(ours, theirs)
    assert_as_accurate(results[2], pruned.float().sum(0), pruned.double().sum(0))


def test_written_answers_for_groups_that_are_special(device):
    """Equal values, no positive one, NaN of both signs, Inf, -0.0: which places, and what stands there."""
    groups = {
        (1.0, 1.0, 1.0, 1.0): (0x4, 1.0, 1.0),
        (0.5, 1.0, 0.5, 0.5): (0x4, 0.25, 1.0),
        (-1.0, -2.0, -0.0, -3.0): (0x4, 0.0, 0.0),
        (-1.0, -2.0, 3.0, -4.0): (0x8, 0.0, 9.0),
        (-1.0, -INF, -0.0, 2.0): (0xC, 0.0, 4.0),
        (INF, NAN, 5.0, -NAN): (0xD, NAN, NAN),
        (INF, 1.0, INF, NAN): (0xC, INF, NAN),
        (1.0, 2.0, 3.0, 4.0): (0xE, 9.0, 16.0),
    }
    for dtype in DTYPES[1:3]:
        u = torch.tensor(list(groups)).to(device, dtype)
        packed, E, *_ = ops.activation_compress(u, "squared_relu")
        nibbles = reference.decode_metadata(E.cpu(), len(groups), 4).flatten().tolist()
        assert nibbles == [nibble for nibble, *_ in groups.values()]
        assert_same_bits(packed, torch.tensor([values for _, *values in groups.values()]).to(dtype))


def test_gradients_that_were_not_kept_are_zero_whatever_comes_from_above(device):
    u = torch.tensor([[1.0, 2.0, 0.5, -1.0]], device=device).bfloat16()
    dh = torch.tensor([[1.0, 3.0, INF, NAN]], device=device).bfloat16()
    packed, packed_t, _, db = ops.activation_backward_compress(dh, u, "squared_relu", seed_on(device), bias_grad=True)
    assert packed.tolist() == [[2.0, 12.0]] and db.tolist() == [2.0, 12.0, 0.0, 0.0]
    assert packed_t.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_any_strides_and_addresses_give_the_same_bits(device, kind, dtype):
    tokens, width, seed = 70, 136, seed_on(device)
    u, dh = torch.randn(tokens, width).to(device, dtype), torch.randn(tokens, width).to(device, dtype)
    expected = (*ops.activation_compress(u, kind, seed), *ops.activation_backward_compress(dh, u, kind, seed, True))

    def odd_address(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def odd_rows(t):
        return torch.cat([t, t.new_zeros(tokens, 3)], 1)[:, :width]

    def wide_rows(t):
        return torch.cat([t, t.new_zeros(tokens, 8)], 1)[:, :width]

    def every_other(t):
        return t.repeat_interleave(2, 1)[:, ::2]

    for change in (odd_address, odd_rows, wide_rows, every_other, column_major):
        for changed in ((change(dh), change(u)), (dh, change(u)), (change(dh), u)):
            ours = ops.activation_compress(changed[1], kind, seed)
            ours += ops.activation_backward_compress(*changed, kind, seed, True)
            for a, b in zip(ours, expected, strict=True):
                assert_same_bits(a, b, change.__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("tokens, width", [(4096, 11008), (8192, 1032), (3001, 4100), (1, 65536)])
def test_large_shapes_equal_the_reference_on_the_same_gpu(kind, dtype, tokens, width):
    u, dh = (torch.randn(tokens, width, device="cuda").to(dtype) for _ in range(2))
    seed = seed_on("cuda")
    for ours, theirs in zip(
        ops.activation_compress(u, kind, seed), reference.activation_compress(u, kind, seed), strict=True
    ):
        assert_same_bits(ours, theirs)
    theirs = reference.activation_backward_compress(dh, u, kind, seed)
    for ours, expected in zip(ops.activation_backward_compress(dh, u, kind, seed)[:3], theirs, strict=False):
        assert_same_bits(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_16_bit_values_is_pruned_alike_on_cpu_and_gpu(kind):
    """Each value beside random others: payloads of NaN, subnormals, squares that over- and underflow."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in DTYPES[1:3]:
        others = bits[torch.randint(len(bits), (3, len(bits)))]
        u = torch.stack([bits, *others], 1).view(-1, 64).view(dtype)
        dh = bits[torch.randint(len(bits), u.shape)].view(dtype)
        assert_equals_reference("cuda", dh, u, kind, seed_on("cpu"))


@pytest.mark.gpu
def test_a_second_stream_and_repeats_give_the_same_bits():
    u, dh = torch.randn(2, 1000, 1024, device="cuda").bfloat16()
    seed = seed_on("cuda")

    def both():
        forward = ops.activation_compress(u, "squared_relu", seed)
        return *forward, *ops.activation_backward_compress(dh, u, "squared_relu", seed, True)

    first = both()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = [both() for _ in range(20)]
    stream.synchronize()
    for result in results:
        for a, b in zip(result, first, strict=True):
            assert_same_bits(a, b)


def test_a_replay_needs_no_more_than_a_new_seed_and_new_values(device):
    """The seed is read where it lies, so other numbers at the same address draw anew; forward's rows do not change."""
    u, seed = torch.randn(64, 64, device=device).bfloat16(), seed_on(device)
    packed, E, packed_t, _ = ops.activation_compress(u, "relu", seed)
    seed.add_(1)
    again, E_again, packed_t_again, _ = ops.activation_compress(u, "relu", seed)
    assert torch.equal(packed, again) and torch.equal(E, E_again) and not torch.equal(packed_t, packed_t_again)


def test_wrong_arguments_are_named(device):
    u = torch.randn(8, 16, device=device).bfloat16()
    seed = seed_on(device)
    wrong = [
        ((u, "gelu"), Sparse24Error, "kind must be relu or squared_relu, got 'gelu': other activations make no zeros"),
        ((u.view(2, 4, 16), "relu"), Sparse24Error, "u must be 2-D"),
        ((u[:, :6], "relu"), Sparse24Error, "u must have features in multiples of 4, got 6"),
        ((u.int(), "relu"), Sparse24DtypeError, "u must be float32, bfloat16 or float16"),
        ((u, "relu", seed.int()), Sparse24DtypeError, "seed must be an int64 tensor of two"),
        ((u, "relu", seed.to("meta")), Sparse24Error, "seed is on meta but u is on"),
    ]
    for (first, *others), error, message in wrong:
        with pytest.raises(error, match=message):
            ops.activation_compress(first, *others)
        with pytest.raises(error, match=message):
            ops.activation_backward_compress(torch.zeros_like(first), first, *others)
    for dh in (u[:4], u.float()):
        with pytest.raises(Sparse24Error, match=r"dh must have shape \(8, 16\) and dtype torch.bfloat16"):
            ops.activation_backward_compress(dh, u, "relu")


def test_gradients_are_asked_of_the_differentiable_function(device):
    u = torch.randn(8, 16, device=device, requires_grad=True)
    with pytest.raises(Sparse24Error, match="activation_compress is not differentiable"):
        ops.activation_compress(u, "relu")[0].sum().backward()


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("shape", [(0, 16), (7, 12), (9, 0)])
def test_fakes_have_the_shapes_and_dtypes_of_results(seeded, shape):
    u = torch.randn(shape).bfloat16()
    seed = seed_on("cpu") if seeded else None
    calls = [
        (torch.ops.sparse24.activation_compress, (u, "relu", seed)),
        (torch.ops.sparse24.activation_backward_compress, (u, u, "relu", seed, True)),
        (torch.ops.sparse24.activation_backward_compress, (u, u, "relu", seed, False)),
    ]
    for op, args in calls:
        on_meta = op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args))
        for real, fake in zip(op(*args), on_meta, strict=True):
            assert real.shape == fake.shape and real.dtype == fake.dtype and real.is_contiguous()
