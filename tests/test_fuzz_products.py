"""Products, activations and a whole layer, of any shape, strides, dtype, offset and value: right, or a named exception.

Right is the product of a plain copy of the same values in float64, up to the rounding of its sums (fuzzing.py).
"""

from __future__ import annotations

import math

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
    is_computed,
    lay_out,
    on,
    plain,
    same,
)

from sparse24 import functional, ops, reference
from sparse24.formats import as_rows
from sparse24.testing import assert_same_bits

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "squared_relu", "tanh")


def packed_layer(device, rows, cols, dtype):
    w = torch.randint(-3, 4, (rows, cols), generator=torch.Generator().manual_seed(rows + cols)).to(device, dtype)
    mask, *packed = ops.prune_compress(w)
    return w.masked_fill(~ops.unpack_mask(mask), 0), packed


def float_for(draw, device):
    return draw.pick(FLOATS if device == "cpu" else FLOATS[1:])


def shape_before(draw):
    return tuple(draw.pick(EXTENTS) for _ in range(draw.randint(0, 2)))


@fuzz(300)
def test_products_with_a_weight(device, draw):
    rows, cols, dtype = draw.pick(BLOCKS), draw.pick(BLOCKS), float_for(draw, device)
    masked, (packed, E, packed_t, E_t) = packed_layer(device, rows, cols, dtype)
    for op, width, values, metadata, dense, other in (
        (ops.sparse_mm, cols, packed, E, masked.t(), rows),
        (ops.sparse_mm_grad_input, rows, packed_t, E_t, masked, cols),
    ):
        width_given, declared = draw.usually(width, width + 4), draw.usually(other, other + 4)
        x = on(device, draw.tensor((*shape_before(draw), width_given), draw.usually((dtype,), DTYPES, share=0.6)))
        # fp32 values, a CPU's, serve activations of any floating dtype.
        fits = x.dtype == dtype or (dtype == torch.float32 and x.dtype.is_floating_point)
        y = attempt(width_given == width and declared == other and fits, op, x, values, metadata, declared)
        if y is None:
            continue
        assert y.shape == (*x.shape[:-1], other) and y.dtype == x.dtype
        finite = x.nan_to_num(0.0, 0.0, 0.0)
        if torch.equal(finite, x):
            assert_product(y, finite, dense)
        else:  # what is not finite shows wherever it is multiplied with something that is not 0
            meets = (~x.isfinite()).double() @ (dense != 0).double() > 0
            assert not y[meets].isfinite().any()


@fuzz(200)
def test_products_of_a_pruned_activation(device, draw):
    tokens, rows, cols, dtype = draw.pick(EXTENTS), draw.pick(BLOCKS), draw.pick(BLOCKS), float_for(draw, device)
    shape = draw.usually((rows, cols), (rows, cols + 4), (rows + 4, cols), (rows,))
    w = on(device, draw.tensor(shape, draw.usually((dtype,), FLOATS)))
    bias = draw.usually(None, rows, rows, rows + 1, share=0.5)
    bias = None if bias is None else torch.arange(bias, device=device).to(w.dtype)
    forward = {} if bias is None else {"bias": bias}
    for op, features, right, terms in (
        (ops.sparse_mm_input, cols, w.t(), forward),
        (ops.sparse_mm_grad_input_output, rows, w, {}),
    ):
        whole = on(device, draw.tensor((tokens + -tokens % 4, features), (dtype,), ("plain",)))
        packed, E, *_ = ops.prune_compress(whole)[1:]
        packed, dense = packed[:tokens], reference.decompress(plain(packed), plain(E), *whole.shape)[:tokens]
        fits = w.dim() == 2 and right.shape[0] == features and w.dtype == dtype
        out = attempt(fits and all(len(t) == w.shape[0] for t in terms.values()), op, packed, E, w, **terms)
        if out is None:
            continue
        assert out.shape == (tokens, right.shape[1]) and out.dtype == dtype and out.is_contiguous()
        if dense.isfinite().all() and w.isfinite().all():
            assert_product(out, dense, right, *terms.values())


@fuzz(150)
def test_products_with_an_activation(device, draw):
    """The bits of the product and of the activation apart."""
    gated, kind, dtype = draw.random() < 0.5, draw.pick(KINDS), float_for(draw, device)
    rows, cols = draw.pick(BLOCKS) * (2 if gated else 1), draw.pick(BLOCKS)
    _, (packed, E, *_) = packed_layer(device, rows, cols, dtype)
    x = on(device, draw.tensor((*shape_before(draw), cols), draw.usually((dtype,), DTYPES)))
    bias = draw.usually(None, rows, rows, rows + 1, share=0.5)
    right_bias = bias in (None, rows)
    bias = None if bias is None else torch.arange(bias, device=device).to(x.dtype)
    fits = x.dtype == dtype or (dtype == torch.float32 and x.dtype.is_floating_point)
    op, width = (ops.sparse_mm_gated_activation, rows // 2) if gated else (ops.sparse_mm_activation, rows)
    both = attempt(fits and kind != "tanh" and right_bias, op, x, packed, E, width, kind, bias=bias)
    if both is not None:
        y = ops.sparse_mm(x, packed, E, rows, bias=bias)
        same(both, (y, ops.gated_activation(y, kind) if gated else ops.activation(y, kind)), "both")


@fuzz(300)
def test_weight_gradients(device, draw):
    dy, seed = on(device, draw.tensor()), torch.tensor(draw.usually(SEED, (1,), (1, 2, 3)))
    seed = seed.to(device, draw.usually(torch.int64, torch.int32))
    right_seed = seed.dtype == torch.int64 and seed.numel() == 2
    packed_dy = attempt(dy.dim() == 2 and is_computed(dy) and right_seed, ops.mvue_compress, dy, seed)
    if packed_dy is None:
        return
    same(packed_dy, reference.mvue_compress(plain(dy), seed.cpu()), "mvue_compress")
    tokens, features = dy.shape
    x = on(device, draw.tensor((tokens + draw.usually(0, 8), draw.pick(EXTENTS)), draw.usually((dy.dtype,), FLOATS)))
    valid = x.shape[0] == tokens and x.dtype == dy.dtype
    of_output = attempt(valid, ops.sparse_mm_grad_weight, *packed_dy, x, features)
    of_input = attempt(valid, ops.sparse_mm_grad_weight_input, *packed_dy, x, features)
    if of_output is None or not x.isfinite().all():
        return
    pruned = reference.decompress(*map(plain, packed_dy), 2 * packed_dy[0].shape[0], features, transposed=True)[:tokens]
    if pruned.isfinite().all():
        assert_product(of_output, pruned.t(), x)
        assert_product(of_input, x.t(), pruned)


@fuzz(200)
def test_weight_gradients_into_memory_of_the_caller(device, draw):
    """Exact on small integers, with accumulation and masked decay; what does not fit leaves `out` as it was."""
    rows, cols, tokens = draw.pick(BLOCKS), draw.pick(BLOCKS), draw.pick(EXTENTS)
    dtype, accumulate = float_for(draw, device), draw.random() < 0.5
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    dy, x = (torch.randint(-2, 3, (tokens, n), generator=generator).to(device, dtype) for n in (rows, cols))
    packed_dy = ops.mvue_compress(dy, torch.tensor(SEED, device=device))
    out = on(device, draw.tensor(draw.usually((rows, cols), (cols, rows), (rows, cols + 4)), (dtype, torch.float32)))
    w, mask = (
        on(device, draw.tensor((rows, cols), (dtype,), ("plain", "transposed"))),
        on(device, draw.mask((rows, cols))),
    )
    decay = draw.usually(None, (torch.tensor([0.5], device=device), [w], [mask]), share=0.5)
    valid = tuple(out.shape) == (rows, cols) and out.is_contiguous() and (decay is None or fits_mask(mask, w.shape))
    before = plain(out)
    run = ops.sparse_mm_grad_weight
    if attempt(valid, run, *packed_dy, x, rows, out=out, accumulate=accumulate, decay=decay) is None:
        assert_same_bits(out, before, "a refused out")
        return
    pruned = reference.decompress(*map(plain, packed_dy), 2 * packed_dy[0].shape[0], rows, transposed=True)[:tokens]
    added = [before] if accumulate else []
    if decay is not None:
        added.append(0.5 * plain(w).double().masked_fill(reference.unpack_mask(plain(mask)), 0))
    if all(t.isfinite().all() for t in added):
        assert_product(out, pruned.t(), x, *added)


@fuzz(150)
def test_operands_of_any_size_are_refused_or_right(device, draw):
    """Values and metadata that do not fit what is declared."""
    rows, cols = draw.pick(BLOCKS), draw.pick(BLOCKS)
    masked, (packed, E, *_) = packed_layer(device, rows, cols, torch.bfloat16)
    values = {"rows": packed[:-1], "cols": packed[:, :-1], "strided": lay_out(packed, "every other"),
              "integers": packed.to(torch.int16)}  # fmt: skip
    metadata = {"short": E[:-1], "long": torch.cat([E, E[:1]]), "E dtype": E.to(torch.int32), "2-D": E.view(1, -1)}
    bad = draw.pick(["nothing", *values, *metadata])
    operand = values.get(bad, packed), metadata.get(bad, E)
    out = attempt(bad == "nothing", ops.decompress, *operand, rows, cols)
    if out is not None:
        same(out, masked, "decompress")
    x = torch.ones(3, cols, dtype=torch.bfloat16, device=device)
    attempt(bad == "nothing", ops.sparse_mm, x, *operand, rows)


@fuzz(200)
def test_rows_of_a_product_have_a_leading_dimension(device, draw):
    """What the GEMM is given: rows side by side or further apart, also where one row has any stride to the next."""
    x = on(device, draw.tensor(dtypes=FLOATS))
    one_row = x[:1].as_strided(x[:1].shape, (draw.randint(1, 9), *x.stride()[1:])) if x.dim() and len(x) else x
    for t in (x, one_row):
        if t.dim() == 0 or t.numel() == 0:
            continue
        rows = as_rows(t)
        assert rows.stride(0) >= rows.shape[1] and (rows.stride(1) == 1 or rows.shape[1] == 1)
        assert_same_bits(rows, plain(t).reshape(-1, t.shape[-1]), "rows")


# -- activations ----------------------------------------------------------------------------------------------------


@fuzz(400)
def test_activations(device, draw):
    gated, kind = draw.random() < 0.5, draw.pick(KINDS)
    gate_up = on(device, draw.tensor(dtypes=(*FLOATS, *DTYPES)))
    right_width = gate_up.dim() > 0 and not (gated and gate_up.shape[-1] % 2)
    valid, columns = kind != "tanh" and right_width and is_computed(gate_up), draw.random() < 0.5
    h = attempt(valid, ops.gated_activation if gated else ops.activation, gate_up, kind, column_major=columns)
    if h is None:
        return
    expected = reference.gated_activation(plain(gate_up), kind, gated)
    assert h.shape == expected.shape and h.dtype == gate_up.dtype
    gate, up = plain(gate_up).chunk(2, -1) if gated else (plain(gate_up), torch.zeros(()))
    # limits at infinity; a NaN stays one
    assert_units_apart(h.cpu(), expected, (gate, gate, up), slack_of_phi(h, kind, gate, gate, up))
    dh = on(device, draw.tensor(draw.usually(h.shape, (*h.shape[:-1], h.shape[-1] + 2)), (gate_up.dtype,)))
    backward = ops.gated_activation_backward if gated else ops.activation_backward
    d_gate_up = attempt(dh.shape == h.shape, backward, dh, gate_up, kind)
    if d_gate_up is None:
        return
    assert d_gate_up.shape == gate_up.shape
    expected = reference.gated_activation_backward(plain(dh), plain(gate_up), kind, gated)[0]

    def both_halves(t):
        return torch.cat([t, t], -1) if gated else t

    parts = [both_halves(part) for part in ((gate, up, plain(dh)) if gated else (gate, plain(dh)))]
    finite = torch.stack([part.isfinite() for part in parts]).all(0)
    parts = [part[finite] for part in parts]
    slack = slack_of_phi(d_gate_up, kind, *parts)
    assert_units_apart(d_gate_up.cpu()[finite], expected[finite], (parts[0], *parts), slack)
    packing = ops.gated_activation_backward_mvue if gated else ops.activation_backward_mvue
    seed = torch.tensor(SEED, device=device)
    both = attempt(gate_up.dim() == 2, packing, dh, gate_up, kind, seed)
    if both is not None:
        same(both, (d_gate_up, *ops.mvue_compress(d_gate_up, seed)), "both forms")


@fuzz(300)
def test_pruned_activations(device, draw):
    """The bits of the reference, but for sums, which are those of `mvue_compress`."""
    kind = draw.usually("relu", "squared_relu", "gelu")
    u = on(device, draw.tensor(dtypes=(*FLOATS, *DTYPES)))
    fits = u.dim() == 2 and is_computed(u) and u.shape[1] % 4 == 0 and kind != "gelu"
    seed, cpu_seed = (None, None) if draw.random() < 0.5 else (torch.tensor(SEED, device=device), torch.tensor(SEED))
    packed = attempt(fits, ops.activation_compress, u, kind, seed)
    dh = on(device, draw.tensor(draw.usually(u.shape, (*u.shape, 4)), draw.usually((u.dtype,), DTYPES)))
    right_dh = dh.shape == u.shape and dh.dtype == u.dtype
    backward = attempt(fits and right_dh, ops.activation_backward_compress, dh, u, kind, seed, bias_grad=True)
    if packed is None:
        return
    expected = reference.activation_compress(plain(u), kind, cpu_seed)
    same(packed, expected, "activation_compress")
    if backward is not None:
        *forms, _ = reference.activation_backward_compress(plain(dh), plain(u), kind, cpu_seed)
        same(backward[:3], forms, "activation_backward_compress")
        du = on(device, reference.decompress(forms[0], expected[1], *u.shape))
        same(backward[3], ops.mvue_compress(du, torch.tensor(SEED, device=device), bias_grad=True)[2], "db")


def slack_of_phi(out, kind, gate, *factors):
    """The error that a GPU's Phi(gate) brings to a 16-bit GELU: 2^-14 of itself (csrc/activation/functions.h)."""
    if kind != "gelu" or out.device.type == "cpu" or out.dtype == torch.float32:
        return 0.0
    phi = torch.special.ndtr(gate.double())
    return 2.0**-14 * math.prod((factor.double().abs() for factor in factors), start=phi).nan_to_num(0, 0, 0)


def assert_units_apart(ours, theirs, factors, slack):
    """Each element within eight units of fp32 of what its factors can reach, and then of the output's dtype.

    Eight: exp, erf and tanh of two libraries lie up to four apart, products and sums round three times more.
    """
    assert ours.isnan().equal(theirs.isnan())
    a, b = ours.double().nan_to_num(), theirs.double().nan_to_num()
    reach = torch.ones(())
    for factor in factors:
        reach = reach * (1 + factor.double().abs().nan_to_num(0, 0, 0))
    # silu, gelu, squared relu and their slopes stay below (1 + |x|)^2
    bound = slack + 8 * 2.0**-24 * reach + torch.finfo(ours.dtype).eps * b.abs() + torch.finfo(ours.dtype).tiny
    assert ((a - b).abs() <= bound).all(), f"{(a - b).abs().max():.2e} apart"


@fuzz(100)
def test_copies_in_columns(device, draw):
    x = on(device, draw.tensor())
    copy = attempt(x.dim() > 0 and is_computed(x), ops.column_major_copy, x)
    if copy is not None:
        assert_same_bits(copy, plain(x).reshape(-1, x.shape[-1]) if copy.dim() != x.dim() else plain(x), "copy")


# -- a whole layer --------------------------------------------------------------------------------------------------


@fuzz(200)
def test_a_linear_layer_forward_and_backward(device, draw):
    """Any number of leading dimensions, any strides of input and gradient; gradients by the reference's products."""
    rows, cols, bias, mvue = draw.pick(BLOCKS), draw.pick(BLOCKS), draw.random() < 0.5, draw.random() < 0.5
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    masked, packed = packed_layer(device, rows, cols, dtype)
    w = torch.zeros(rows, cols, dtype=dtype, device=device, requires_grad=True)
    shape = shape_before(draw)
    x = on(device, draw.tensor((*shape, cols), (dtype,))).detach().requires_grad_()
    dy = on(device, draw.tensor((*shape, rows), (dtype,)))
    b = torch.ones(rows, dtype=dtype, device=device, requires_grad=True) if bias else None
    y = functional.sparse_linear(x, w, *packed, b, mvue=mvue, seed=torch.tensor(SEED, device=device))
    y.backward(dy)
    assert y.shape == (*shape, rows) and x.grad.shape == x.shape and w.grad.shape == w.shape
    if not (x.isfinite().all() and dy.isfinite().all()):
        return
    assert_product(y.detach(), x.detach(), masked.t(), *([b.detach()] if bias else []))
    assert_product(x.grad, dy, masked)
    flat_dy, flat_x = plain(dy).reshape(-1, rows), plain(x.detach()).reshape(-1, cols)
    if bias:
        assert_product(b.grad, torch.ones(len(flat_dy)), flat_dy)
    if mvue:
        parts = reference.mvue_compress(flat_dy, torch.tensor(SEED))
        flat_dy = reference.decompress(*parts, 2 * parts[0].shape[0], rows, transposed=True)[: flat_x.shape[0]]
    if flat_dy.isfinite().all():
        assert_product(w.grad, flat_dy.t(), flat_x)
