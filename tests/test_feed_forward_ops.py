"""The ops of whole feed-forward layers have the bits of the single ops that they stand for."""

import pytest
import torch

from sparse24 import Sparse24Error, ops
from sparse24.ops.feed_forward import BackwardOptions, feed_forward, feed_forward_backward

TOKENS, D_MODEL, D_FF = 40, 32, 64


def layer(device, gated):
    dtype, generator = torch.float32 if device == "cpu" else torch.bfloat16, torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows = 2 * D_FF if gated else D_FF
    up, down = (ops.prune_compress(randn(*shape), dtype)[1:] for shape in ((rows, D_MODEL), (D_MODEL, D_FF)))
    return randn(TOKENS, D_MODEL), up, down, (randn(rows), randn(D_MODEL)), randn(TOKENS, D_MODEL)


@pytest.mark.parametrize("gated", [True, False])
def test_forward_is_a_product_with_its_activation_and_another(device, gated):
    x, up, down, biases, _ = layer(device, gated)
    first = ops.sparse_mm_gated_activation if gated else ops.sparse_mm_activation
    gate_up, h = first(x, *up[:2], D_FF, "silu", bias=biases[0])
    expected = ops.sparse_mm(h, *down[:2], D_MODEL, bias=biases[1]), gate_up, h
    found = feed_forward(x, up[:2], down[:2], "silu", gated, *biases)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("adds", [True, False], ids=["added", "new"])
@pytest.mark.parametrize("gated", [True, False])
def test_backward_is_its_six_parts(device, gated, adds):
    x, up, down, biases, dy = layer(device, gated)
    _, gate_up, h = feed_forward(x, up[:2], down[:2], "silu", gated, *biases)
    seeds = ops.draw_seeds(x, 2)

    dh = ops.sparse_mm_grad_input(dy, *down[2:], D_FF)
    activated = ops.gated_activation_backward_mvue if gated else ops.activation_backward_mvue
    d_gate_up, *packed, db_up = activated(dh, gate_up, "silu", seeds[1], bias_grad=True)
    *packed_dy, db_down = ops.mvue_compress(dy, seeds[0], bias_grad=True)
    before = [
        torch.ones(rows, cols).to(x) if adds else None for rows, cols in ((up[0].shape[0], D_MODEL), (D_MODEL, D_FF))
    ]
    settings = [dict(out=t.clone(), accumulate=True) if adds else {} for t in before]
    d_up = ops.sparse_mm_grad_weight(*packed, x, up[0].shape[0], **settings[0])
    d_down = ops.sparse_mm_grad_weight(*packed_dy, h, D_MODEL, **settings[1])
    dx = ops.sparse_mm_grad_input(d_gate_up, *up[2:], D_MODEL)

    versions = [t._version for t in before] if adds else []
    found = feed_forward_backward(
        dy,
        (gate_up, x, h),
        up[2:],
        down[2:],
        seeds,
        ("silu", gated),
        BackwardOptions(0, True, True, True, dy.dtype),
        before,
    )
    weights = before if adds else found[1:3]
    for ours, parts in zip((found[0], *weights, *found[3:]), (dx, d_up, d_down, db_up, db_down), strict=True):
        assert torch.equal(ours, parts)
    if adds:
        assert all(t._version > version for t, version in zip(before, versions, strict=True))
        assert all(t.numel() == 0 for t in found[1:3])


def test_backward_makes_what_is_wanted_alone(device):
    x, up, down, _, dy = layer(device, True)
    _, gate_up, h = feed_forward(x, up[:2], down[:2], "silu", True, None, None)
    wanted = BackwardOptions(0, False, False, False, torch.float32)
    arguments = (dy, (gate_up, x, h), up[2:], down[2:], ops.draw_seeds(x, 2), ("silu", True), wanted, (None, None))
    dx, d_up, d_down, *biases = feed_forward_backward(*arguments)
    assert all(t.numel() == 0 for t in (dx, *biases))
    assert d_up.dtype == d_down.dtype == torch.float32


@pytest.mark.parametrize("wrong", ["tokens", "width", "dtype", "seeds", "packed"])
def test_backward_refuses_what_does_not_fit(device, wrong):
    x, up, down, _, dy = layer(device, True)
    _, gate_up, h = feed_forward(x, up[:2], down[:2], "silu", True, None, None)
    seeds, forms = ops.draw_seeds(x, 2), up[2:]
    if wrong == "tokens":
        x = x[:-4]
    elif wrong == "width":
        gate_up = gate_up[:, :D_FF].contiguous()
    elif wrong == "dtype":
        h = h.double()
    elif wrong == "seeds":
        seeds = seeds.T
    else:
        forms = down[2:]
    options = BackwardOptions(0, True, False, False, dy.dtype)
    with pytest.raises(Sparse24Error):
        feed_forward_backward(dy, (gate_up, x, h), forms, down[2:], seeds, ("silu", True), options, (None, None))


def test_a_drawn_seed_follows_the_generator(device):
    x, up, down, _, dy = layer(device, True)
    _, gate_up, h = feed_forward(x, up[:2], down[:2], "silu", True, None, None)
    arguments = (dy, (gate_up, x, h), up[2:], down[2:])
    rest = ("silu", True), BackwardOptions(3, True, False, False, dy.dtype), (None, None)
    torch.manual_seed(0)
    seeds = ops.draw_seeds(x, 2, 3)
    torch.manual_seed(0)
    drawn, given = feed_forward_backward(*arguments, None, *rest), feed_forward_backward(*arguments, seeds, *rest)
    assert all(torch.equal(a, b) for a, b in zip(drawn, given, strict=True))
