"""Every op passes torch's own checks of schema, fake and autograd registration, and compiles without graph breaks."""

from __future__ import annotations

import pytest
import torch

from sparse24 import functional, ops
from sparse24.ops import float8

TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
#: ops with 8-bit inputs, which torch's test of schemas cannot compare: it multiplies them
READ_8_BITS = (
    "decompress_float8",
    "feed_forward_float8",
    "feed_forward_float8_backward",
    "grad_weight_float8_",
    "grad_weight_of_input_float8_",
    "pack_float8_",
    "sparse_mm_float8",
    "sparse_mm_input_float8",
)


def sample_calls(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    w = torch.randn(16, 32, device=device).to(dtype)
    x, dy = torch.randn(24, 32, device=device).to(dtype), torch.randn(24, 16, device=device).to(dtype)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w, dtype)
    seed = torch.tensor([1, 2], device=device)
    packed_dy, E_dy = ops.mvue_compress(dy, seed)
    gate_up, dh = torch.randn(24, 32, device=device).to(dtype), torch.randn(24, 16, device=device).to(dtype)
    lists = [[mask], [packed], [E], [packed_t], [E_t]]
    packed_x, E_x = ops.mvue_compress(x, seed)
    rows_x, E_rows_x = ops.prune_compress(x, dtype)[1:3]  # two of each four neighbours in a row
    rows_dy, E_rows_dy = ops.prune_compress(dy, dtype)[1:3]
    decay = (torch.tensor([0.1], device=device), [w], [mask])
    return {
        "transposable_mask": (w,),
        "unpack_mask": (mask,),
        "foreach_mask_flips": ([mask], [mask.clone()]),
        "mask_gap": (w,),
        "compress": (w, mask, dtype),
        "prune_compress": (w, dtype),
        "compress_": ([w], *([t.clone() for t in part] for part in lists)),
        "prune_compress_": ([w], *([t.clone() for t in part] for part in lists)),
        "decompress": (packed, E, 16, 32, False),
        "mvue_compress": (dy, seed),
        "mvue_compress_and_sum": (dy, seed),
        "draw_seeds": (dy, 2, 0),
        "sparse_mm": (x, packed, E, 16, None, None),
        "sparse_mm_activation": (x, packed, E, 16, "silu", True, None),
        "sparse_mm_grad_input": (dy, packed_t, E_t, 32, None),
        "sparse_mm_grad_weight": (packed_dy, E_dy, x, 16, None, *decay),
        "sparse_mm_grad_weight_": (packed_dy, E_dy, x, 16, torch.zeros_like(w), True, *decay),
        "sparse_mm_grad_weight_input": (packed_x, E_x, dy, 32, None, *decay),
        "sparse_mm_grad_weight_input_": (packed_x, E_x, dy, 32, torch.zeros_like(w), True, *decay),
        "sparse_mm_input": (rows_x, E_rows_x, w, torch.randn(16, device=device).to(dtype)),
        "sparse_mm_grad_input_output": (rows_dy, E_rows_dy, w),
        "activation_compress": (gate_up, "squared_relu", seed),
        "activation_backward_compress": (gate_up, gate_up.flip(0), "squared_relu", seed, True),
        "activation": (gate_up, "silu", True, False),
        "activation_backward": (dh, gate_up, "silu", True, True),
        "activation_backward_mvue": (dh, gate_up, "silu", True, seed, True, True),
        "foreach_masked_decay_": ([torch.zeros_like(w)], [w], [mask], 0.1, None),
        **feed_forward_calls(device, dtype),
        **float8_calls(device, dtype),
        **float8_feed_forward_calls(device, dtype),
    }


def feed_forward_calls(device, dtype):
    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    up, down = (ops.prune_compress(randn(*shape), dtype)[1:] for shape in ((64, 32), (32, 32)))
    x, dy, biases, seeds = randn(24, 32), randn(24, 32), (randn(64), randn(32)), ops.draw_seeds(randn(1), 2)
    gate_up, h = ops.sparse_mm_gated_activation(x, *up[:2], 32, bias=biases[0])
    operands, wanted = (dy, gate_up, x, h, *up[2:], *down[2:], seeds, "silu", True), (0, True, True, True)
    return {
        "feed_forward": (x, *up[:2], *down[:2], "silu", True, *biases),
        "feed_forward_backward": (*operands, *wanted, dtype, torch.zeros_like(randn(64, 32)), None),
    }


def float8_calls(device, dtype):
    one, amax = torch.ones(1, device=device), torch.zeros(1, device=device)
    w, x, dy = (torch.randn(*shape, device=device).to(dtype) for shape in ((32, 64), (40, 64), (40, 32)))
    mask, seed = ops.transposable_mask(w), torch.tensor([1, 2], device=device)
    forms = [[t] for t in float8.empty_packed_float8(32, 64, device)]
    float8.pack_float8_(False, [w], [mask], forms, [one], [amax])
    (packed,), (E,), *_ = forms
    x8, x8_t = float8.quantize(x, one, transposed=True)
    packed_dy, E_dy, *_ = float8.mvue_quantize(dy, seed, one, float8=True)
    counts, out = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(32, 64, device=device)
    gate_up, dh = torch.randn(40, 64, device=device).to(dtype), dy
    packed_h, E_h, packed_ht, E_ht, h_scale = float8.activation_compress_float8(x, "squared_relu", seed)
    w8, dy8_t = float8.quantize(w, one)[0], float8.quantize(dy, one, transposed=True)[1]
    return {
        "quantize_current": (x, True, True),
        "activation_compress_float8": (x, "relu", seed),
        "activation_backward_compress_float8": (x, x, "relu", seed, True),
        "sparse_mm_input_float8": (packed_h, E_h, h_scale, w8, one, None, torch.bfloat16),
        "grad_weight_of_input_float8_": (packed_ht, E_ht, h_scale, dy8_t, one, out.clone(), True),
        "quantize": (x, one, True, True, amax, counts),
        "mvue_quantize": (dy, seed, one, True, True, amax, counts),
        "activation_quantize": (gate_up, "silu", True, one, True, True, amax, counts),
        "activation_backward_quantize": (dh, gate_up, "silu", True, seed, one, False, True, amax, counts),
        "pack_float8_": (True, [w], [mask.clone()], *([t.clone() for t in form] for form in forms), [one], [amax]),
        "decompress_float8": (packed, E, one, 32, 64, torch.float32),
        "sparse_mm_float8": (x8, one, packed, E, one, 32, None, torch.bfloat16, 0),
        "grad_weight_float8_": (packed_dy, E_dy, one, x8_t, one, out, True),
    }


def float8_feed_forward_calls(device, dtype):
    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    def cast():
        return (
            torch.ones(1, device=device),
            torch.zeros(1, device=device),
            torch.zeros(3, dtype=torch.long, device=device),
        )

    def weight(rows, cols):
        w, one, forms = randn(rows, cols), torch.ones(1, device=device), float8.empty_packed_float8(rows, cols, device)
        float8.pack_float8_(True, [w], [ops.transposable_mask(w)], [[t] for t in forms], [one], [cast()[1]])
        return [*forms[:2], one], [*forms[2:], one]

    (up, up_t), (down, down_t) = weight(128, 64), weight(64, 64)
    x, dy, biases, seeds = randn(40, 64), randn(40, 64), (randn(128), randn(64)), ops.draw_seeds(randn(1), 2)
    keeps, casts, into = (True, True, True), (*cast(), *cast()), torch.zeros_like(randn(128, 64))
    forward = (x, up, down, "silu", True, *biases, *keeps, *casts)
    _, gate_up, x8_t, h8_t = torch.ops.sparse24.feed_forward_float8(*forward)
    saved, wanted = (gate_up, [x8_t, casts[0]], [h8_t, casts[0]]), (0, True, True, True, torch.float32)
    return {
        "feed_forward_float8": forward,
        "feed_forward_float8_backward": (dy, *saved, up_t, down_t, "silu", True, seeds, *wanted, into, None, *casts),
    }


ALL_OPS = sorted(sample_calls("cpu"))


def test_the_list_of_ops_is_complete():
    registered = {
        schema.name.removeprefix("sparse24::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("sparse24::")
    }
    assert registered == set(ALL_OPS)


@pytest.mark.parametrize("name", ALL_OPS)
def test_op_passes_opcheck(device, name):
    tests = TESTS[:2] if name == "draw_seeds" else TESTS  # its results differ from call to call, as they should
    if name in READ_8_BITS:
        tests = TESTS[1:]
    op = getattr(torch.ops.sparse24, name).default
    torch.library.opcheck(op, sample_calls(device)[name], test_utils=tests)


@pytest.mark.fault(53)
def test_sparse_linear_compiles_whole_with_any_token_count(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    w = torch.randn(48, 64, device=device, dtype=dtype, requires_grad=True)
    packed = ops.prune_compress(w.detach(), dtype)[1:]
    seed = torch.tensor([1, 2], device=device)

    def run(x):
        return functional.sparse_linear(x, w, *packed, seed=seed)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (8, 24, 31):
        x = torch.randn(tokens, 64, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(tokens, 48, device=device, dtype=dtype)
        eager = torch.autograd.grad(run(x), (x, w), dy)
        traced = torch.autograd.grad(compiled(x), (x, w), dy)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


@pytest.mark.fault(53)
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_compiles_whole(device, gated):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    up = torch.randn(64 if gated else 32, 32, device=device, dtype=dtype, requires_grad=True)
    down = torch.randn(32, 32, device=device, dtype=dtype, requires_grad=True)
    packed_up, packed_down = (ops.prune_compress(w.detach(), dtype)[1:] for w in (up, down))
    seed = torch.tensor([[1, 2], [3, 4]], device=device)
    function = functional.gated_mlp if gated else functional.mlp

    def run(x):
        return function(x, up, packed_up, down, packed_down, seed=seed)

    x = torch.randn(24, 32, device=device, dtype=dtype, requires_grad=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    dy = torch.randn(24, 32, device=device, dtype=dtype)
    eager = torch.autograd.grad(run(x), (x, up, down), dy)
    traced = torch.autograd.grad(compiled(x), (x, up, down), dy)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_manual_seed_rules_compiled_noise_too(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    w = torch.randn(48, 64, device=device, dtype=dtype, requires_grad=True)
    packed = ops.prune_compress(w.detach(), dtype)[1:]
    x = torch.randn(24, 64, device=device, dtype=dtype)
    dy = torch.randn(24, 48, device=device, dtype=dtype)

    def run(t):
        return functional.sparse_linear(t, w, *packed)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    eager = torch.autograd.grad(run(x), w, dy)[0]
    torch.manual_seed(3)
    traced = torch.autograd.grad(compiled(x), w, dy)[0]
    assert torch.equal(eager, traced)
