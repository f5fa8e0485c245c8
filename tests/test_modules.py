"""SparseLinear, SparseConv1D, SparseGatedMLP: the function they compute."""

import pytest
import torch
import torch.nn.functional as F
from rounding import ANOTHER_ORDER, EPS
from tiny_layers import masked, sparse_conv1d, sparse_linear
from tiny_models import MLP
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparse24
from sparse24 import SparseGatedMLP, SparseLinear
from sparse24.errors import Sparse24DtypeError, Sparse24Error, Sparse24Warning
from sparse24.layers.modules import ACTIVATIONS

# -- one layer --------------------------------------------------------------------------------------------------------


def test_forward_is_linear_with_masked_weight():
    layer, x = sparse_linear(), torch.randn(5, 16)
    torch.testing.assert_close(layer(x), F.linear(x, masked(layer), layer.bias), **ANOTHER_ORDER)


def test_conv1d_forward_and_gradients_are_those_of_the_masked_transpose():
    layer, x = sparse_conv1d(), torch.randn(6, 16, requires_grad=True)
    layer.mvue = False
    dy = torch.randn(6, 24)
    y = layer(x)
    y.backward(dy)
    torch.testing.assert_close(y, F.linear(x, masked(layer), layer.bias), **ANOTHER_ORDER)
    torch.testing.assert_close(x.grad, dy @ masked(layer), **ANOTHER_ORDER)
    torch.testing.assert_close(layer.weight.grad, x.detach().t() @ dy, **ANOTHER_ORDER)
    assert layer.weight.grad.shape == layer.weight.shape == (16, 24)


def test_gradients_are_straight_through_to_every_weight():
    layer, x, dy = sparse_linear(mvue=False), torch.randn(8, 16, requires_grad=True), torch.randn(8, 24)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ masked(layer), **ANOTHER_ORDER)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ x.detach(), **ANOTHER_ORDER)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0), **ANOTHER_ORDER)


def test_dense_phase_is_exactly_the_dense_layer():
    layer, x = sparse_linear(), torch.randn(5, 16)
    layer.phase = "dense"
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    conv = sparse_conv1d()
    conv.phase = "dense"
    assert torch.equal(conv(x), Conv1D.forward(conv, x))


def test_module_is_a_linear_with_the_same_state_dict():
    layer = sparse_linear()
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
    nn.Linear(16, 24).load_state_dict(layer.state_dict())
    assert layer.mask.dtype == torch.uint8 and layer.mask.shape == (6, 8)


@pytest.mark.fault(15, 16, 17, 18)
@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 2, 16), (2, 2, 2, 16), (31, 16), (0, 16), (2, 0, 16)], ids=str)
def test_any_number_of_leading_dimensions_and_tokens(shape):
    """Odd token counts, none, one; 1-D to 4-D input."""
    layer, x = sparse_linear(), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y, F.linear(x, masked(layer), layer.bias), **ANOTHER_ORDER)
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad.shape == layer.weight.shape
    if 0 in shape:
        assert not layer.weight.grad.any()


@pytest.mark.parametrize("scale", [3.0, 64 / 3])
@pytest.mark.fault(20)
def test_gradient_of_a_scaled_sum_keeps_its_scale(scale):
    """Autograd hands over a gradient of stride 0 that holds the scale, not ones."""
    layer, x = sparse_linear(mvue=False), torch.randn(8, 16)
    (layer(x).sum() * scale).backward()
    expected = scale * x.sum(0).expand(24, 16)
    reach = scale * x.abs().sum(0).max().item()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=len(x) * EPS * reach)


@pytest.mark.fault(21)
def test_gradient_that_is_not_contiguous():
    """A transposed loss gives a gradient that cannot be viewed flat."""
    layer, x = sparse_linear(mvue=False), torch.randn(4, 6, 16, requires_grad=True)
    weights = torch.randn(24, 6, 4)
    (layer(x).permute(2, 1, 0) * weights).sum().backward()
    dy = weights.permute(2, 1, 0)
    torch.testing.assert_close(x.grad, dy @ masked(layer), **ANOTHER_ORDER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.fault(30)
def test_autocast_casts_as_a_dense_linear(dtype):
    """Under autocast the layer takes and gives the dtypes that F.linear would."""
    layer, x = sparse_linear(), torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, plain = layer(x), F.linear(x, masked(layer), layer.bias)
    assert y.dtype == plain.dtype == dtype
    torch.testing.assert_close(y, plain)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.fault(30)
def test_autocast_leaves_float64_alone_and_takes_no_integers(fused):
    """F.linear under autocast computes float64 in float64, and casts neither integers nor complex numbers."""
    model = MLP()
    sparse24.sparsify(model, mvue=False, fuse=fused)
    x = torch.randn(8, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
            with pytest.raises(Sparse24DtypeError, match=f"same dtype.*{dtype}.*float32"):
                model(x.to(dtype))
        with pytest.raises(Sparse24DtypeError, match="float32.*float64"):
            model.double()(x.float())
        y = model(x)
    assert y.dtype == torch.float64 and torch.equal(y, model(x))


@pytest.mark.fault(30, 32)
def test_mismatched_dtypes_and_devices_are_refused_by_name():
    """No autocast, no silent cast; two devices are both named."""
    layer = sparse_linear()
    with pytest.raises(Sparse24DtypeError, match="same dtype.*bfloat16.*float32"):
        layer(torch.randn(2, 16, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="same dtype.*float64.*float32"):
        layer(torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(Sparse24Error, match="meta.*cpu"):
        layer(torch.empty(2, 16, device="meta"))


@pytest.mark.parametrize("sizes", [(3, 8), (8, 3), (6, 8), (8, 1), (2, 2)], ids=str)
@pytest.mark.fault(13, 25)
def test_sizes_that_are_not_multiples_of_four_are_refused(sizes):
    """No 4x4 block fits."""
    with pytest.raises(Sparse24Error, match="multiples of 4, got"):
        SparseLinear(*sizes)


def test_values_packed_in_16_bits_serve_another_dtype_by_the_same_function():
    layer, x = sparse_linear(compute_dtype=torch.bfloat16, mvue=False), torch.randn(4, 16, requires_grad=True)
    with pytest.warns(Sparse24Warning, match="packed for torch.bfloat16 but called in torch.float32"):
        y = layer(x)
    torch.testing.assert_close(y, F.linear(x, masked(layer), layer.bias))
    y.sum().backward()
    assert layer.weight.grad.ne(0).all()  # straight-through here too


# -- the gated block --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_mlp_is_its_formula(activation):
    torch.manual_seed(0)
    block, x = SparseGatedMLP(16, 32, activation=activation), torch.randn(5, 16)
    act = ACTIVATIONS[activation]
    hidden = act(x @ masked(block.gate_proj).t()) * (x @ masked(block.up_proj).t())
    torch.testing.assert_close(block(x), hidden @ masked(block.down_proj).t(), **ANOTHER_ORDER)
    for layer in (block.gate_proj, block.up_proj, block.down_proj):
        layer.phase = "dense"
    dense = act(block.gate_proj(x)) * block.up_proj(x)
    torch.testing.assert_close(block(x), F.linear(dense, block.down_proj.weight))


def test_gated_mlp_has_the_names_of_llama_and_refuses_unknown_activations():
    assert list(SparseGatedMLP(8, 16).state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    with pytest.raises(Sparse24Error, match="activation must be one of silu.*got 'tanh'"):
        SparseGatedMLP(8, 16, activation="tanh")


@pytest.mark.fault(42)
@pytest.mark.parametrize("x", [None, [1.0] * 16, torch.ones(2, 16).numpy()], ids=["None", "list", "numpy"])
def test_an_input_that_is_no_tensor_is_refused(x):
    gated = SparseGatedMLP(16, 64)
    plain = MLP()
    sparse24.sparsify(plain)
    for module in (sparse_linear(), gated, plain):
        with pytest.raises(Sparse24DtypeError, match="the input of a sparse layer must be a tensor, got"):
            module(x)


@pytest.mark.fault(42)
@pytest.mark.parametrize("shape", [(1,), (2, 64), (1, 64), (16,)], ids=str)
def test_a_bias_of_another_shape_is_refused(shape):
    block = SparseGatedMLP(16, 64, bias=True)
    before = block.gate_proj.bias
    with pytest.raises(Sparse24Error, match=r"the bias of this sparse layer must have shape \(64,\), got"):
        block.gate_proj.bias = nn.Parameter(torch.ones(shape))
    assert block.gate_proj.bias is before
    block.gate_proj.bias = nn.Parameter(torch.ones(64))
