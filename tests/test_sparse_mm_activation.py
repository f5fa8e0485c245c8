"""Forward products with the activation in their epilogue: what the two ops give, for any shape."""

from __future__ import annotations

import pytest
import torch

from sparse24 import Sparse24DtypeError, Sparse24Error, functional, ops
from sparse24.ops.activations import KINDS
from sparse24.testing import assert_as_accurate

#: (leading dimensions of x, in_features, width of h): whole tiles, tokens at odd ends, several tiles, long k
#: (stream-K), and widths that take the two ops
SHAPES = [
    ((64,), 64, 64), ((1,), 16, 64), ((3, 31), 208, 128), ((300,), 128, 640), ((257,), 4160, 128),
    ((2, 1000), 256, 1024), ((33,), 64, 48), ((40,), 68, 64), ((5,), 4, 4),
]  # fmt: skip


def compute_dtypes(device):
    return [torch.bfloat16, torch.float16] if device == "cuda" else [torch.float32, torch.bfloat16]


def packed_layer(leading, in_features, out_features, dtype, device):
    x = torch.randn(*leading, in_features, device=device).to(dtype)
    w = (torch.randn(out_features, in_features, device=device) * in_features**-0.5).to(dtype)
    _, packed, E, _, _ = ops.prune_compress(w, dtype)
    return x, packed, E


def both(gated, x, packed, E, width, kind, bias=None):
    if gated:
        return ops.sparse_mm_gated_activation(x, packed, E, width, kind, bias=bias)
    return ops.sparse_mm_activation(x, packed, E, width, kind, bias=bias)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_give_what_the_two_ops_give(device, shape, gated):
    leading, in_features, width = shape
    out_features = 2 * width if gated else width
    separate = ops.gated_activation if gated else ops.activation
    for dtype in compute_dtypes(device):
        x, packed, E = packed_layer(leading, in_features, out_features, dtype, device)
        w = ops.decompress(packed, E, out_features, in_features)
        some_bias = torch.randn(out_features, device=device).to(dtype)
        for bias, kind in zip([None, some_bias] * 3, KINDS, strict=True):
            y, h = both(gated, x, packed, E, width, kind, bias)
            assert y.shape == (*leading, out_features) and h.shape == (*leading, width)
            assert y.is_contiguous() and h.is_contiguous() and h.dtype == y.dtype == dtype
            assert torch.equal(h, separate(y, kind))
            exact = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert_as_accurate(y, torch.nn.functional.linear(x, w, bias), exact)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_results_do_not_depend_on_the_run(device, gated):
    x, packed, E = packed_layer((1000,), 1024, 1280, compute_dtypes(device)[0], device)
    width = 640 if gated else 1280
    first = both(gated, x, packed, E, width, "silu")
    for _ in range(20):
        assert all(map(torch.equal, both(gated, x, packed, E, width, "silu"), first))


def test_no_tokens_give_no_rows(device):
    x, packed, E = packed_layer((0,), 64, 128, compute_dtypes(device)[0], device)
    assert [t.shape for t in both(True, x, packed, E, 64, "silu")] == [(0, 128), (0, 64)]
    assert [t.shape for t in both(False, x, packed, E, 128, "relu")] == [(0, 128), (0, 128)]


@pytest.mark.fault(14, 15)
def test_wrong_operands_are_named_before_anything_runs(device):
    dtype = compute_dtypes(device)[0]
    x, packed, E = packed_layer((8,), 64, 128, dtype, device)
    with pytest.raises(Sparse24Error, match=r"packed must have shape \(256, 32\)"):
        ops.sparse_mm_gated_activation(x, packed, E, 128)
    with pytest.raises(Sparse24Error, match="kind must be one of silu"):
        ops.sparse_mm_activation(x, packed, E, 128, "swish")
    with pytest.raises(Sparse24Error, match=r"bias must have shape \(128,\)"):
        ops.sparse_mm_gated_activation(x, packed, E, 64, bias=torch.zeros(64, dtype=dtype, device=device))
    if device == "cuda":
        with pytest.raises(Sparse24DtypeError, match="same dtype"):
            ops.sparse_mm_activation(x.float(), packed, E, 128, "relu")


def test_their_gradient_is_that_of_the_layer_not_of_the_op(device):
    x, packed, E = packed_layer((8,), 64, 128, compute_dtypes(device)[0], device)
    for gated, width, remedy in ((True, 64, "gated_mlp"), (False, 128, "mlp")):
        _, h = both(gated, x.requires_grad_(), packed, E, width, "silu")
        with pytest.raises(Sparse24Error, match=rf"functional\.{remedy}"):
            h.float().sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_one_kernel_makes_both_also_in_a_graph(gated):
    x, packed, E = packed_layer((512,), 256, 1024, torch.bfloat16, "cuda")
    width = 512 if gated else 1024
    expected = both(gated, x, packed, E, width, "gelu_tanh")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both(gated, x, packed, E, width, "gelu_tanh")
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels and not any("stream_kernel" in name or "tile_kernel" in name for name in kernels), kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(gated, x, packed, E, width, "gelu_tanh")
    for out in captured:
        out.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_block_trains_as_with_the_two_ops(monkeypatch, gated):
    """Same output and gradients, bit for bit, as where the product refuses the activation."""
    tokens, d_model, d_ff = 384, 256, 512
    bf16 = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x, down = torch.randn(tokens, d_model, **bf16), torch.randn(d_model, d_ff, **bf16)
    up = torch.randn(2 * d_ff if gated else d_ff, d_model, **bf16)
    forms = [functional.PackedWeight(*ops.prune_compress(w.detach())[1:]) for w in (up, down)]
    seed = torch.tensor([[1, 2], [3, 4]], device="cuda")
    run = functional.gated_mlp if gated else functional.mlp
    fused, results = ops.gemm.launch.run, []

    def without_activation(*args, activation=None, **settings):
        return activation is None and fused(*args, **settings)

    for product in (fused, without_activation):
        monkeypatch.setattr(ops.gemm.launch, "run", product)
        y = run(x, up, forms[0], down, forms[1], "silu", seed=seed)
        results.append((y, *torch.autograd.grad(y.float().square().mean(), (x, up, down))))
    assert all(map(torch.equal, *results))
