"""Masked decay: the formula, its order of rounding, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, functional, ops, reference
from sparse24.testing import assert_same_bits, column_major

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_decay_of_the_worked_example_is_right(device):
    w = torch.arange(1, 17, device=device).float().view(4, 4)
    mask = torch.tensor([[0xC3C3]], dtype=torch.uint16, device=device)  # rows keep {0,1}, {2,3}, {0,1}, {2,3}
    grad = ops.masked_decay_(torch.zeros(4, 4, device=device), w, mask, 0.03)
    expected = 0.03 * w * torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]] * 2, device=device)
    torch.testing.assert_close(grad, expected)


def test_decay_of_the_worked_example_in_backward_is_right(device):
    """g = 0, w = [1, 2, 3, 4] of which 1 and 3 are kept, decay 0.03: the gradient is [0, 0.06, 0, 0.12]."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    w = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 64, device=device, dtype=dtype).repeat(1, 16).requires_grad_()
    mask = torch.full((16, 16), 0xA5A5, dtype=torch.int32).to(torch.uint16).to(device)  # rows {0, 2} and {1, 3} in turn
    packed = ops.compress(w.detach(), mask, dtype)
    x = torch.zeros(8, 64, device=device, dtype=dtype)
    factor = torch.tensor([0.03], device=device)
    for mvue in (True, False):
        y = functional.sparse_linear(x, w, *packed, mvue=mvue, mask=mask, decay=factor)
        (grad,) = torch.autograd.grad(y, w, torch.ones_like(y))
        expected = torch.tensor([0, 0.06, 0, 0.12] * 16, device=device).to(dtype)
        torch.testing.assert_close(grad[0], expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("shape", [(4, 4), (12, 20), (64, 64), (132, 260), (256, 1024)])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
def test_it_equals_the_reference_bit_for_bit_in_every_layout(device, shape, grad_dtype, w_dtype):
    w, grad = torch.randn(shape).to(w_dtype), torch.randn(shape).to(grad_dtype)
    mask = reference.transposable_mask(w)
    expected = reference.masked_decay(grad, w, mask, 0.37)
    for grad_layout in (torch.clone, column_major):
        for w_layout in (torch.clone, column_major):
            ours = grad_layout(grad.to(device))
            ops.masked_decay_(ours, w_layout(w.to(device)), mask.to(device), 0.37)
            assert_same_bits(ours, expected, f"{grad_layout.__name__}, {w_layout.__name__}")


def test_many_tensors_at_once_equal_one_by_one(device):
    shapes = [(4, 8), (64, 128), (132, 260)] * 15
    weights = [torch.randn(shape, device=device) for shape in shapes]
    grads = [torch.randn(shape, device=device) for shape in shapes]
    masks = [ops.transposable_mask(w) for w in weights]
    expected = [ops.masked_decay_(g.clone(), w, m, 1e-2) for g, w, m in zip(grads, weights, masks, strict=True)]
    ops.foreach_masked_decay_(grads, weights, [mask.view(torch.uint8) for mask in masks], 1e-2)
    for ours, theirs in zip(grads, expected, strict=True):
        assert_same_bits(ours, theirs, "grad")


@pytest.mark.fault(19)
def test_views_with_any_strides_are_updated_in_place(device):
    w = torch.randn(8, 8, device=device)
    mask = ops.transposable_mask(w)
    room = torch.zeros(8, 16, device=device)
    ops.masked_decay_(room[:, ::2], w, mask, 0.5)
    assert_same_bits(room[:, ::2].contiguous(), reference.masked_decay(torch.zeros(8, 8), w.cpu(), mask.cpu(), 0.5))
    assert not room[:, 1::2].any()


@pytest.mark.fault(22)
@pytest.mark.parametrize("dtype", DTYPES)
def test_data_off_vector_boundaries_are_updated_in_place(device, dtype):
    w, grad = torch.randn(64 * 72 + 1).to(dtype), torch.randn(64 * 72 + 1).to(dtype)
    mask = reference.transposable_mask(w[1:].view(64, 72))
    expected = reference.masked_decay(grad[1:].view(64, 72), w[1:].view(64, 72), mask, 0.37)
    ours = grad.to(device)
    ops.masked_decay_(ours[1:].view(64, 72), w.to(device)[1:].view(64, 72), mask.to(device), 0.37)
    assert_same_bits(ours[1:].view(64, 72), expected, "grad")
    assert ours[0].item() == grad[0].item()


@pytest.mark.fault(1, 2)
def test_what_is_not_finite_stays_visible_where_it_is_pruned(device):
    w = torch.ones(8, 8, device=device)
    mask = ops.transposable_mask(w)  # 0xC3C3: (0, 2) and (0, 3) are pruned
    w[0, 2], w[0, 3] = float("nan"), float("inf")
    grad = ops.masked_decay_(torch.zeros(8, 8, device=device), w, mask, 0.5)
    assert grad[0, 2].isnan() and grad[0, 3].isinf() and grad.isfinite().sum() == 62


@pytest.mark.fault(58)
def test_a_gradient_scale_multiplies_the_decay(device):
    w, mask = torch.randn(64, 64, device=device), None
    mask = ops.transposable_mask(w)
    scale = torch.tensor(1024.0, device=device)
    scaled = ops.masked_decay_(torch.zeros_like(w), w, mask, 0.25, grad_scale=scale)
    assert_same_bits(scaled, ops.masked_decay_(torch.zeros_like(w), w, mask, 256.0))


@pytest.mark.fault(71)
@pytest.mark.parametrize("decay", [-1e-3, float("nan"), float("inf"), 1e39])
def test_decays_that_are_not_finite_and_non_negative_are_refused(device, decay):
    w = torch.randn(4, 4, device=device)
    with pytest.raises(Sparse24Error, match="decay must be a finite number >= 0"):
        ops.masked_decay_(torch.zeros_like(w), w, ops.transposable_mask(w), decay)


def test_no_decay_changes_nothing(device):
    w, grad = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device)
    before = grad.clone()
    ops.masked_decay_(grad, w, ops.transposable_mask(w), 0.0)
    assert torch.equal(grad, before)


def test_wrong_shapes_and_scales_are_named(device):
    w = torch.randn(8, 8, device=device)
    mask = ops.transposable_mask(w)
    with pytest.raises(Sparse24Error, match="grad must have w's shape"):
        ops.masked_decay_(torch.zeros(8, 12, device=device), w, mask, 0.1)
    with pytest.raises(Sparse24Error, match="non-empty lists of one length, got 0, 0 and 0"):
        ops.foreach_masked_decay_([], [], [], 0.1)
    with pytest.raises(Sparse24DtypeError, match="grad_scale must be one float32"):
        ops.masked_decay_(torch.zeros_like(w), w, mask, 0.1, grad_scale=torch.zeros(2, device=device))


def test_the_largest_decay_of_float32_is_taken(device):
    """What float32 cannot hold would turn a pruned zero weight into NaN."""
    w = torch.zeros(4, 4, device=device)
    decay = torch.finfo(torch.float32).max
    assert not ops.masked_decay_(torch.zeros_like(w), w, ops.transposable_mask(w), decay).any()
