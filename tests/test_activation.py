"""Activations: as accurate as eager PyTorch, every layout, backward equal to autograd, the fused form bit-equal."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, functional, ops, reference
from sparse24.testing import assert_as_accurate, assert_same_bits, column_major

KINDS = ["silu", "gelu", "gelu_tanh", "relu", "squared_relu", "identity"]
SHAPES = [(1, 1), (3, 5), (8, 8), (31, 24), (65, 64), (64, 65), (130, 136), (256, 512), (7, 1000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def laid_out(t, layout):
    return column_major(t) if layout == "column" else t


def eager(gate_up, kind, gated):
    """What a PyTorch user writes, in gate_up's own dtype."""
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "relu": torch.relu,
        "squared_relu": lambda t: torch.relu(t) ** 2,
        "identity": lambda t: t,
    }
    if not gated:
        return functions[kind](gate_up)
    gate, up = gate_up.chunk(2, -1)
    return functions[kind](gate) * up


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_accurate_as_eager_in_every_layout(device, kind, gated, shape):
    tokens, d_ff = shape
    for dtype in DTYPES:
        gate_up = (3 * torch.randn(tokens, (2 if gated else 1) * d_ff)).to(device, dtype)
        exact = eager(gate_up.double(), kind, gated)
        plain = eager(gate_up, kind, gated)
        op = ops.gated_activation if gated else ops.activation
        first = op(gate_up, kind)
        assert first.shape == exact.shape and first.is_contiguous()
        assert_as_accurate(first, plain, exact)
        for layout in ("row", "column"):
            for column_major_out in (False, True):
                h = op(laid_out(gate_up, layout), kind, column_major=column_major_out)
                assert_same_bits(h, first, f"{layout} in, column_major={column_major_out} out, {dtype}")
                if column_major_out:
                    assert h.t().is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_as_accurate_as_eager_in_every_layout(device, kind, gated, shape):
    tokens, d_ff = shape
    for dtype in DTYPES:
        gate_up = (3 * torch.randn(tokens, (2 if gated else 1) * d_ff)).to(device, dtype)
        dh = torch.randn(tokens, d_ff).to(device, dtype)
        leaf, leaf64 = gate_up.clone().requires_grad_(), gate_up.double().requires_grad_()
        (plain,) = torch.autograd.grad(eager(leaf, kind, gated), leaf, dh)
        (exact,) = torch.autograd.grad(eager(leaf64, kind, gated), leaf64, dh.double())
        backward = ops.gated_activation_backward if gated else ops.activation_backward
        first, h = backward(dh, gate_up, kind, recompute_h=True)
        assert_as_accurate(first, plain, exact)
        assert_same_bits(h, (ops.gated_activation if gated else ops.activation)(gate_up, kind), "recomputed h")
        for layout_dh in ("row", "column"):
            for layout_gate_up in ("row", "column"):
                for column_major_out in (False, True):
                    d_gate_up, again_h = backward(
                        laid_out(dh, layout_dh), laid_out(gate_up, layout_gate_up), kind,
                        recompute_h=True, column_major=column_major_out,
                    )  # fmt: skip
                    where = f"dh {layout_dh}, gate_up {layout_gate_up}, column_major={column_major_out} out, {dtype}"
                    assert_same_bits(d_gate_up, first, f"d_gate_up, {where}")
                    assert_same_bits(again_h, h, f"h, {where}")
                    if column_major_out:
                        assert d_gate_up.t().is_contiguous() and again_h.t().is_contiguous()
                again = backward(laid_out(dh, layout_dh), laid_out(gate_up, layout_gate_up), kind)
                assert_same_bits(again, first, f"without h, dh {layout_dh}, gate_up {layout_gate_up}, {dtype}")


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "squared_relu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_backward_and_mvue_equal_the_two_apart(device, kind, gated, shape):
    tokens, d_ff = shape
    seed = torch.tensor([11, -5], device=device)
    for dtype in (torch.bfloat16, torch.float16):
        gate_up = torch.randn(tokens, (2 if gated else 1) * d_ff).to(device, dtype)
        dh = torch.randn(tokens, d_ff).to(device, dtype)
        fused = ops.gated_activation_backward_mvue if gated else ops.activation_backward_mvue
        apart = ops.gated_activation_backward if gated else ops.activation_backward
        for layout in ("row", "column"):
            d_gate_up, packed, E, h = fused(
                laid_out(dh, layout), laid_out(gate_up, layout), kind, seed, recompute_h=True
            )
            expected, expected_h = apart(dh, gate_up, kind, recompute_h=True)
            assert_same_bits(d_gate_up, expected, "d_gate_up")
            assert_same_bits(h, expected_h, "h")
            expected_packed, expected_E, expected_sums = ops.mvue_compress(expected, seed, bias_grad=True)
            assert_same_bits(packed, expected_packed, "packed")
            assert_same_bits(E, expected_E, "E")
            with_sums = fused(laid_out(dh, layout), laid_out(gate_up, layout), kind, seed, bias_grad=True)
            for ours, alone in zip(with_sums, (d_gate_up, packed, E, expected_sums), strict=True):
                assert_same_bits(ours, alone, "with the gradient of a bias")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck_of_the_reference(kind, gated):
    gate_up = torch.randn(6, 8, dtype=torch.float64)
    gate_up = torch.where(gate_up.abs() < 0.05, 0.3, gate_up).requires_grad_()  # away from ReLU's corner
    assert torch.autograd.gradcheck(lambda t: reference.gated_activation(t, kind, gated), gate_up)


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_copies_bits_from_one_layout_to_another(device, shape):
    """What turns the weight gradient of a Conv1D: signed zeros, infinities, denormals and all."""
    for dtype in DTYPES:
        x = torch.randn(shape).to(device, dtype)
        for i, value in enumerate((-0.0, float("inf"), -float("inf"), torch.finfo(dtype).smallest_normal / 4)):
            x.view(-1)[i % x.numel()] = value
        for layout in ("row", "column"):
            for column_major_out in (False, True):
                copy = ops.activation(laid_out(x, layout), "identity", column_major=column_major_out)
                assert (copy.t() if column_major_out else copy).is_contiguous()
                assert_same_bits(copy.contiguous(), x, f"{layout}, {dtype}")
                assert torch.equal(copy.signbit(), x.signbit())


@pytest.mark.fault(11)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_pass_through(device, kind):
    gate_up = torch.ones(4, 16, device=device)
    gate_up[1, 3], gate_up[2, 12] = float("nan"), float("inf")
    h = ops.gated_activation(gate_up, kind)
    assert h[1, 3].isnan() and h[2, 4].isinf() and h[0].isfinite().all()
    big = torch.tensor([[-1e30, -100.0, 1e30 if kind != "squared_relu" else 1e15, 0.0]], device=device)
    assert ops.activation(big, kind).isfinite().all()
    assert ops.activation_backward(torch.ones_like(big), big, kind).isfinite().all()


@pytest.mark.fault(11)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_in_a_gradient_stay_visible(device, kind, bad):
    gate_up = torch.ones(16, 128, device=device, dtype=torch.bfloat16)
    dh = torch.ones(16, 64, device=device, dtype=torch.bfloat16)
    dh[5, 7] = bad
    for layout in ("row", "column"):
        d_gate_up = ops.gated_activation_backward(laid_out(dh, layout), gate_up, kind)
        wrong = ~d_gate_up.isfinite()
        assert wrong[5, 7] and wrong[5, 71] and wrong.sum() == 2
        seed = torch.tensor([1, 2], device=device)
        d_gate_up, packed, _ = ops.gated_activation_backward_mvue(laid_out(dh, layout), gate_up, kind, seed)
        assert torch.equal(~d_gate_up.isfinite(), wrong)
        assert (~packed.isfinite())[:, [7, 71]].any(0).all(), "kept by MVUE too"


@pytest.mark.fault(19, 22)
def test_any_strides_and_leading_dimensions(device):
    base = torch.randn(6, 10, 40, device=device, dtype=torch.bfloat16)
    expected = ops.gated_activation(base.contiguous(), "silu")
    assert expected.shape == (6, 10, 20)
    assert_same_bits(ops.gated_activation(base[0], "silu"), expected[0], "2-D")
    assert_same_bits(ops.gated_activation(base[0, 0], "silu"), expected[0, 0], "1-D")
    shifted = torch.zeros(6, 10, 43, device=device, dtype=torch.bfloat16)
    shifted[..., 1:41] = base
    assert_same_bits(ops.gated_activation(shifted[..., 1:41], "silu"), expected, "misaligned")
    swapped = base.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(ops.gated_activation(swapped, "silu"), expected, "permuted")
    row = base[:1, 0].expand(5, 40)
    assert_same_bits(ops.gated_activation(row, "silu"), ops.gated_activation(row.contiguous(), "silu"), "expanded")


@pytest.mark.fault(18)
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (2, 1, 3, 40)])
def test_leading_dimensions_are_flattened_and_given_back(device, shape):
    gate_up, dh = torch.randn(shape, device=device), torch.randn(*shape[:-1], 20, device=device)
    flat_gate_up, flat_dh = gate_up.reshape(-1, 40), dh.reshape(-1, 20)
    assert_same_bits(
        ops.gated_activation(gate_up, "silu").reshape(-1, 20), ops.gated_activation(flat_gate_up, "silu"), "h"
    )
    column = ops.gated_activation(gate_up, "silu", column_major=True)
    assert_same_bits(column, ops.gated_activation(gate_up, "silu"), "h, tokens contiguous")
    d_gate_up, h = ops.gated_activation_backward(dh, gate_up, "silu", recompute_h=True)
    assert d_gate_up.shape == gate_up.shape and h.shape == dh.shape
    assert_same_bits(
        d_gate_up.reshape(-1, 40), ops.gated_activation_backward(flat_dh, flat_gate_up, "silu"), "d_gate_up"
    )
    with pytest.raises(Sparse24Error, match="at least one dimension, got a scalar"):
        ops.gated_activation(torch.tensor(1.0, device=device), "silu")


@pytest.mark.fault(17)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_gives_the_bits_that_it_gives_among_many(device, dtype):
    gate_up, dh = torch.randn(9, 272, device=device).to(dtype), torch.randn(9, 136, device=device).to(dtype)
    h, d_gate_up = ops.gated_activation(gate_up, "silu"), ops.gated_activation_backward(dh, gate_up, "silu")
    for layout in ("row", "column"):
        one = laid_out(gate_up[4:5], layout)
        for column_major_out in (False, True):
            assert_same_bits(ops.gated_activation(one, "silu", column_major=column_major_out), h[4:5], layout)
        assert_same_bits(ops.gated_activation_backward(dh[4:5], one, "silu"), d_gate_up[4:5], f"d_gate_up {layout}")


@pytest.mark.fault(19)
def test_slices_and_overlaps_in_forward_and_backward(device):
    base = torch.randn(24, 160, device=device, dtype=torch.bfloat16)
    windows = torch.randn(300, device=device, dtype=torch.bfloat16).as_strided((24, 80), (8, 1))
    for gate_up in (
        base[:, ::2],
        base[::2, :80],
        base[:, 40:120],
        base.flip(1)[:, :80],
        windows,
        base[:1, :80].expand(24, 80),
    ):
        dh = torch.randn(gate_up.shape[0], 120, device=device, dtype=torch.bfloat16)[:, ::3]
        dense_gate_up, dense_dh = gate_up.clone(memory_format=torch.contiguous_format), dh.contiguous()
        for column_major_out in (False, True):
            h = ops.gated_activation(gate_up, "gelu", column_major=column_major_out)
            assert_same_bits(h, ops.gated_activation(dense_gate_up, "gelu"), f"h of strides {gate_up.stride()}")
        expected = ops.gated_activation_backward(dense_dh, dense_gate_up, "gelu")
        assert_same_bits(
            ops.gated_activation_backward(dh, gate_up, "gelu"), expected, f"d_gate_up of strides {gate_up.stride()}"
        )


@pytest.mark.fault(22)
@pytest.mark.parametrize("offset", [1, 3, 4, 8])
def test_any_first_element_in_forward_and_backward(device, offset):
    gate_up, dh = torch.randn(40, 128, device=device).half(), torch.randn(40, 64, device=device).half()
    shifted = [
        torch.empty(t.numel() + offset, device=device).half()[offset:].view_as(t).copy_(t) for t in (gate_up, dh)
    ]
    assert shifted[0].data_ptr() % 16 == offset * 2 % 16
    assert_same_bits(ops.gated_activation(shifted[0], "silu"), ops.gated_activation(gate_up, "silu"), "h")
    expected = ops.gated_activation_backward(dh, gate_up, "silu", recompute_h=True)
    for ours, theirs in zip(
        ops.gated_activation_backward(shifted[1], shifted[0], "silu", recompute_h=True), expected, strict=True
    ):
        assert_same_bits(ours, theirs, "backward")


@pytest.mark.fault(23)
@pytest.mark.parametrize("column_major_out", [False, True])
def test_offsets_past_2_to_the_31(device, column_major_out):
    """Two tokens, 2^31 elements apart; the room between them is never touched."""
    room = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    gate_up = room.as_strided((2, 32), (2**31, 1))
    values = torch.randn(2, 32).to(device, torch.bfloat16)
    gate_up.copy_(values)
    assert_same_bits(
        ops.gated_activation(gate_up, "silu", column_major=column_major_out), ops.gated_activation(values, "silu"), "h"
    )
    dh = torch.ones(2, 16, dtype=torch.bfloat16, device=device)
    assert_same_bits(
        ops.gated_activation_backward(dh, gate_up, "silu"),
        ops.gated_activation_backward(dh, values, "silu"),
        "d_gate_up",
    )


@pytest.mark.fault(23)
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements_in_every_layout():
    tokens, d_ff = 4194312, 256  # gate_up: 2^31 + 3584 elements
    rows = torch.tensor([0, 1, 2**22 - 1, 2**22, tokens - 1], device="cuda")
    gate_up = torch.randn(tokens, 2 * d_ff, device="cuda", dtype=torch.bfloat16)
    expected = ops.gated_activation(gate_up[rows], "silu")
    for layout in ("row", "column"):
        source = laid_out(gate_up, layout)
        for column_major_out in (False, True):
            h = ops.gated_activation(source, "silu", column_major=column_major_out)
            assert_same_bits(h[rows], expected, f"{layout} in, column_major={column_major_out} out")
            del h
    del source
    dh = torch.randn(tokens, d_ff, device="cuda", dtype=torch.bfloat16)
    expected = ops.gated_activation_backward(dh[rows], gate_up[rows], "silu")
    assert_same_bits(ops.gated_activation_backward(dh, gate_up, "silu")[rows], expected, "d_gate_up")


@pytest.mark.fault(24)
@pytest.mark.parametrize("tokens, d_ff", [(65536 * 64 + 8, 8), (8, 65536 * 64 + 8)])
def test_more_tiles_than_a_grid_counts_in_y(device, tokens, d_ff):
    gate_up = torch.randn(tokens, 2 * d_ff, device=device, dtype=torch.bfloat16)
    corner = torch.cat([gate_up[-8:, d_ff - 8 : d_ff], gate_up[-8:, -8:]], 1)
    expected = ops.gated_activation(corner, "silu")
    for layout in ("row", "column"):
        for column_major_out in (False, True):
            h = ops.gated_activation(laid_out(gate_up, layout), "silu", column_major=column_major_out)
            assert_same_bits(h[-8:, -8:], expected, f"{layout} in, column_major={column_major_out} out")


@pytest.mark.fault(16)
def test_empty_inputs_give_empty_outputs(device):
    gate_up = torch.empty(0, 16, device=device)
    assert ops.gated_activation(gate_up, "silu").shape == (0, 8)
    assert ops.gated_activation_backward(torch.empty(0, 8, device=device), gate_up, "silu").shape == (0, 16)


@pytest.mark.fault(27)
def test_odd_widths_and_wrong_gradients_are_named(device):
    with pytest.raises(Sparse24Error, match="two halves"):
        ops.gated_activation(torch.randn(4, 7, device=device), "silu")
    with pytest.raises(Sparse24Error, match="dh must have shape"):
        ops.gated_activation_backward(torch.randn(4, 5, device=device), torch.randn(4, 8, device=device), "silu")
    with pytest.raises(Sparse24Error, match="kind must be one of"):
        ops.gated_activation(torch.randn(4, 8, device=device), "swish")


@pytest.mark.fault(29)
def test_integers_are_refused(device):
    with pytest.raises(Sparse24DtypeError, match="gate_up must be float32"):
        ops.gated_activation(torch.zeros(4, 8, dtype=torch.int32, device=device), "silu")


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_functions_match_eager(device, kind):
    gate_up = torch.randn(12, 16, device=device, requires_grad=True)
    other = gate_up.detach().clone().requires_grad_()
    functional.gated_activation(gate_up, kind).square().sum().backward()
    eager(other, kind, True).square().sum().backward()
    torch.testing.assert_close(gate_up.grad, other.grad)
    gate_up.grad = other.grad = None
    functional.activation(gate_up, kind).square().sum().backward()
    eager(other, kind, False).square().sum().backward()
    torch.testing.assert_close(gate_up.grad, other.grad)


@pytest.mark.fault(11)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_at_infinity_values_and_slopes_are_limits(device, kind, dtype):
    """By the kernels and by the reference alike, where PyTorch has NaN in some places. NaN stays NaN."""
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on the CPU")
    x = torch.tensor([-float("inf"), float("inf"), float("nan")], dtype=dtype, device=device)
    falls = -float("inf") if kind == "identity" else 0.0
    slopes = {"identity": [1.0, 1.0], "squared_relu": [0.0, float("inf")]}.get(kind, [0.0, 1.0])
    value = torch.tensor([falls, float("inf"), float("nan")], dtype=dtype, device=device)
    ones = torch.ones_like(x)
    for h in (ops.activation(x, kind), reference.gated_activation(x, kind, gated=False)):
        assert_same_bits(h, value, "h")
    for d_x in (ops.activation_backward(ones, x, kind), reference.gated_activation_backward(ones, x, kind, False)[0]):
        assert d_x[:2].tolist() == slopes


@pytest.mark.fault(11)
@pytest.mark.parametrize("kind", ["relu", "squared_relu"])
def test_a_closed_gate_over_an_infinite_value_is_nan_in_both_passes(device, kind):
    """0 * Inf has no limit. PyTorch's relu has NaN in forward too, but a gradient of 0 for such a gate."""
    gate_up = torch.tensor([[-1.0, 2.0, float("inf"), 3.0]], device=device)
    dh = torch.ones(1, 2, device=device)
    h, d_gate_up = ops.gated_activation(gate_up, kind), ops.gated_activation_backward(dh, gate_up, kind)
    assert h.isnan().tolist() == [[True, False]] and d_gate_up.isnan().tolist() == [[True, False, False, False]]
    assert d_gate_up[0, 2] == 0
    plain, plain_h = reference.gated_activation_backward(dh, gate_up, kind)
    assert_same_bits(plain_h, h, "h")
    assert plain[0, 0] == 0, "the reference is PyTorch's"


@pytest.mark.fault(11)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize(
    "kind, slope", [("silu", 0.5), ("gelu", 0.5), ("gelu_tanh", 0.5), ("relu", 0.0), ("squared_relu", 0.0)]
)
def test_slopes_at_zero_are_those_of_pytorch(device, kind, slope, zero, dtype):
    """relu is flat at 0, as PyTorch has it: a token that is exactly 0 gets no gradient."""
    if dtype == torch.float64 and device == "cuda":
        pytest.skip("float64 runs on the CPU")
    x, ones = (torch.full((24, 8), value, dtype=dtype, device=device) for value in (zero, 1.0))
    assert (ops.activation_backward(ones, x, kind) == slope).all()
    assert (reference.gated_activation_backward(ones, x, kind, False)[0] == slope).all()
    gate_up = torch.cat([x, ones], -1)
    assert (ops.gated_activation_backward(ones, gate_up, kind)[:, :8] == slope).all()
