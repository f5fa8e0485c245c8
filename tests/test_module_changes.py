"""What may happen to a sparse layer (another weight, a copy, a cast, a move): packed forms stay those of its weight."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from tiny_layers import assert_packed_is_current, sparse_conv1d, sparse_linear
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24 import SparseLinear, ops
from sparse24.errors import Sparse24Warning


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
