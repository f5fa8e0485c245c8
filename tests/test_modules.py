"""SparseLinear, SparseConv1D, SparseGatedMLP: the function they compute, and what may happen to a module."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from rounding import ANOTHER_ORDER, EPS
from tiny_models import MLP
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import sparse24
from sparse24 import SparseGatedMLP, SparseLinear, ops
from sparse24.errors import Sparse24DtypeError, Sparse24Error, Sparse24Warning
from sparse24.layers.modules import ACTIVATIONS


def masked(layer):
    """weight * mask, as the kernels see it: [out, in]."""
    return torch.where(ops.unpack_mask(layer.mask), layer.kernel_weight(), 0)


def sparse_linear(width=16, out=24, seed=0, **settings):
    torch.manual_seed(seed)
    return SparseLinear(width, out, **settings)


def sparse_conv1d(width=16, out=24):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(out, width))
    sparse24.sparsify(model, include=("0",))
    return model[0]


def assert_packed_is_current(layer):
    report = sparse24.verify(nn.Sequential(layer))
    assert report, str(report)


# -- the function ---------------------------------------------------------------------------------------------------


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


# -- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.fault(55, 78)
def test_noise_follows_torch_seeds_and_is_fresh_in_each_backward():
    """The same seed gives the same gradient, another backward gives another."""
    layer, x, dy = sparse_linear(), torch.randn(64, 16), torch.randn(64, 24)

    def gradient(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        layer.weight.grad = None
        layer(x).backward(dy)
        return layer.weight.grad

    first, again, next_one = gradient(3), gradient(3), gradient()
    assert torch.equal(first, again)
    assert not torch.equal(again, next_one)


@pytest.mark.fault(55)
def test_backward_twice_on_a_retained_graph_draws_new_noise():
    """Noise belongs to a backward call, not to the graph."""
    layer, x, dy = sparse_linear(), torch.randn(64, 16), torch.randn(64, 24)
    y = layer(x)
    (first,) = torch.autograd.grad(y, layer.weight, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, layer.weight, dy)
    assert not torch.equal(first, second)


@pytest.mark.fault(65)
def test_ranks_draw_different_noise_from_the_same_seed():
    """Data-parallel ranks share the torch seed and must not share the noise."""
    layer, x, dy = sparse_linear(), torch.randn(64, 16), torch.randn(64, 24)
    gradients = []
    for rank in (0, 1):
        torch.manual_seed(0)
        layer.rank = rank
        gradients.append(torch.autograd.grad(layer(x), layer.weight, dy)[0])
    assert not torch.equal(*gradients)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "none", "all"])
@pytest.mark.fault(48)
def test_only_the_gradients_asked_for_are_computed(wanted):
    """A frozen weight draws no noise."""
    layer, x = sparse_linear(), torch.randn(8, 16)
    named = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in named.items():
        tensor.requires_grad_(wanted in (name, "all"))
    before = torch.get_rng_state()
    y = layer(x)
    assert y.requires_grad == (wanted != "none")
    if wanted != "none":
        y.backward(torch.ones_like(y))
    for name, tensor in named.items():
        assert (tensor.grad is not None) == (wanted in (name, "all"))
    drawn = not torch.equal(before, torch.get_rng_state())
    assert drawn == (wanted in ("weight", "all"))


@pytest.mark.fault(49)
def test_no_bias():
    """Bias None."""
    layer, x = sparse_linear(bias=False), torch.randn(4, 16)
    torch.testing.assert_close(layer(x), F.linear(x, masked(layer)), **ANOTHER_ORDER)
    assert list(layer.state_dict()) == ["weight"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.fault(50)
def test_evaluation_reads_masks_and_changes_nothing(mode):
    """Evaluation uses the current mask and never searches another."""
    layer, x = sparse_linear().eval(), torch.randn(4, 16)
    with torch.no_grad():
        layer.weight[:, :2] *= 100  # a search now would find other masks
    sparse24.refresh(nn.Sequential(layer))
    before, rng = {name: b.clone() for name, b in layer.named_buffers()}, torch.get_rng_state()
    with mode():
        y = layer(x)
    torch.testing.assert_close(y, F.linear(x, masked(layer), layer.bias), **ANOTHER_ORDER)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.fault(51)
def test_double_backward_is_refused():
    """Second derivatives are not supported, and say so."""
    layer, x = sparse_linear(), torch.randn(4, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.fault(52)
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
@pytest.mark.parametrize("make", [
    lambda: SparseLinear(16, 32), lambda: SparseLinear(16, 32, mvue=False), lambda: SparseGatedMLP(16, 32),
    lambda: SparseLinear(32, 32, precision="fp8"),
])  # fmt: skip
def test_a_batch_of_gradients_is_that_of_a_loop_or_refused_by_name(make, shape):
    layer = make()
    x = torch.randn(*shape[:-1], next(layer.parameters()).shape[1], requires_grad=True)
    y = layer(x)
    grads = torch.randn(3, *y.shape)
    try:
        batch = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)[0]
    except Sparse24Error as error:
        assert "is_grads_batched=True" in str(error) and "retain_graph=True" in str(error)
    else:
        assert layer.mvue is False, "noise is drawn once a backward pass"
        loop = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
        assert torch.equal(batch, torch.stack(loop))


@pytest.mark.fault(52)
def test_function_transforms_are_refused():
    """Vmap and forward-mode raise instead of giving something; the dense phase is plain PyTorch again."""
    layer, x = sparse_linear(), torch.randn(4, 16)
    for block in (layer, SparseGatedMLP(16, 64)):
        with pytest.raises(Sparse24Error, match="torch.func transforms"):
            torch.func.vmap(block)(x)
        with pytest.raises(Sparse24Error, match="forward-mode"):
            torch.func.jvp(block, (x,), (x,))
    layer.phase = "dense"
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.fault(54)
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    """Recomputing forward is harmless, since noise is drawn in backward only."""
    model = MLP()
    sparse24.sparsify(model)
    x, gradients = torch.randn(8, 16), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        model.zero_grad()
        run(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.fault(28)
def test_input_changed_in_place_before_backward_is_autograds_error():
    """As for a dense layer."""
    layer, x = sparse_linear(), torch.randn(4, 16)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.fault(28)
def test_weight_written_behind_autograd_leaves_the_gradients_of_that_forward():
    """Backward uses the packed weight of its own forward."""
    layer, x = sparse_linear(), torch.randn(4, 16, requires_grad=True)
    dy, before = torch.randn(4, 24), masked(layer)
    y = layer(x)
    layer.weight.data.mul_(5)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ before, **ANOTHER_ORDER)


# -- what may happen to a module ------------------------------------------------------------------------------------


@pytest.mark.fault(57)
def test_new_parameter_is_packed_and_keeps_the_mask_of_training():
    """An EMA swap or merge puts another Parameter in; its values count, the mask stays."""
    layer = sparse_linear()
    layer.keep_mask()
    mask = layer.mask.clone()
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    assert torch.equal(layer.mask, mask)
    assert_packed_is_current(layer)


@pytest.mark.fault(57)
def test_new_parameter_of_another_shape_gets_a_new_mask():
    """A mask of the old shape would be nonsense."""
    layer = sparse_linear()
    layer.weight = nn.Parameter(torch.randn(8, 16))
    assert layer.mask.shape == (2, 8)
    assert_packed_is_current(layer)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [sparse_linear, sparse_conv1d])
@pytest.mark.fault(56)
def test_loading_weights_packs_them(make, assign):
    """Load_state_dict, by copy and by assignment."""
    layer = make()
    state = {name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    assert torch.equal(layer.weight, state["weight"])
    assert_packed_is_current(layer)
    assert torch.equal(ops.transposable_mask(layer.kernel_weight()).view(torch.uint8), layer.mask)


@pytest.mark.fault(61)
def test_loading_weights_keeps_a_mask_that_belongs_to_the_training_state():
    """After the recipe has restored a mask, loading weights must not search another."""
    layer = sparse_linear()
    layer.mask_is_state = True
    mask = layer.mask.clone()
    layer.load_state_dict({"weight": torch.randn(24, 16), "bias": torch.zeros(24)})
    assert torch.equal(layer.mask, mask)
    assert_packed_is_current(layer)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("make", [sparse_linear, sparse_conv1d])
@pytest.mark.fault(56)
def test_copies_have_their_own_current_packed_forms(make, how):
    """A copy has the mask of the original, even one that a search would not find now."""
    layer = make()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    sparse24.refresh(nn.Sequential(layer))
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(twin.mask, layer.mask) and torch.equal(twin.packed, layer.packed)
    assert twin.packed.data_ptr() != layer.packed.data_ptr()
    with torch.no_grad():
        twin.weight.zero_()
    assert_packed_is_current(layer)
    x = torch.randn(3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float64)])
@pytest.mark.fault(56)
def test_change_of_dtype_packs_anew_and_keeps_the_mask(convert):
    """.half() and .to()."""
    layer = sparse_linear()
    mask = layer.mask.clone()
    convert(layer)
    assert layer.packed.dtype == layer.weight.dtype
    assert torch.equal(layer.mask, mask)
    assert_packed_is_current(layer)


def test_move_without_effect_keeps_the_addresses():
    layer = sparse_linear()
    addresses = [buffer.data_ptr() for buffer in layer.buffers()]
    layer.to("cpu").float()
    assert addresses == [buffer.data_ptr() for buffer in layer.buffers()]


@pytest.mark.fault(56)
def test_meta_device_then_empty_then_weights():
    """Built on the meta device, materialised, then loaded."""
    layer = SparseLinear(16, 24, device="meta")
    assert layer.mask.is_meta and layer.packed.is_meta
    layer.to_empty(device="cpu")
    assert ops.is_transposable(layer.mask)
    layer.load_state_dict(nn.Linear(16, 24).state_dict())
    assert_packed_is_current(layer)


@pytest.mark.fault(56)
def test_model_built_on_meta_and_assigned_its_weights():
    """Meta-device init with load_state_dict(assign=True)."""
    with torch.device("meta"):
        model = MLP()
    sparse24.sparsify(model)
    model.load_state_dict(MLP().state_dict(), assign=True)
    assert sparse24.verify(model)
    assert model(torch.randn(2, 16)).shape == (2, 16)


def test_reset_parameters_packs_the_new_weight():
    layer = sparse_linear()
    layer.reset_parameters()
    assert_packed_is_current(layer)


def test_weight_written_by_hand_is_packed_by_the_next_forward_and_told_of_once():
    layer, x = sparse_linear(), torch.randn(2, 16)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.warns(Sparse24Warning, match="written since it was packed.*refresh"):
        layer(x)
    assert_packed_is_current(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        layer(x)
    assert_packed_is_current(layer)


def test_packing_under_a_live_graph_is_autograds_error():
    """As for a dense layer whose weight the optimizer changed between forward and backward."""
    layer, x = sparse_linear(), torch.randn(4, 16, requires_grad=True)
    y = layer(x)
    sparse24.refresh(nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- the gated block ------------------------------------------------------------------------------------------------


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
