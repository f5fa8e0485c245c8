"""Weights and inputs that are no plain tensors: right, or refused by name with nothing changed."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from rounding import ORDER
from tiny_layers import sparse_mlp
from tiny_models import ActivatedMLP as MLP
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune

import sparse24
from sparse24 import Recipe, SparseLinear, ops
from sparse24.errors import Sparse24Error
from sparse24.layers import SparseLayer, mask_of

pytestmark = pytest.mark.fault(85)


def masked(layer, x):
    return F.linear(x, torch.where(ops.unpack_mask(mask_of(layer)), layer.weight, 0), layer.bias)


def reference(model, x):
    mlp = model[0]
    return masked(mlp.down_proj, mlp.act(masked(mlp.up_proj, x)))


class Wrapped(torch.Tensor):
    """A tensor subclass as quantisation libraries have them: nobody may read its numbers as they are."""

    @staticmethod
    def __new__(cls, tensor):
        return torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)

    def __init__(self, tensor):
        self.inner = tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        raise NotImplementedError(f"Wrapped has no {func}")


class Float8Linear(nn.Linear):
    """What torchao's convert_to_float8_training and its QAT put in a linear layer's place: the same Parameter."""

    @classmethod
    def from_float(cls, old):
        with torch.device("meta"):
            new = cls(old.in_features, old.out_features, bias=False)
        new.weight, new.bias = old.weight, old.bias
        return new


# -- layers that are something else already -------------------------------------------------------------------------


def quantised(mlp):
    mlp.up_proj.weight = nn.Parameter(Wrapped(mlp.up_proj.weight.detach()), requires_grad=False)


def prepared(mlp):
    mlp.up_proj.qconfig = torch.ao.quantization.default_qat_qconfig


BEFORE = {
    "tensor subclass": (quantised, "Wrapped"),
    "float8": (lambda mlp: setattr(mlp, "up_proj", Float8Linear.from_float(mlp.up_proj)), "Float8Linear"),
    "prepared for quantisation": (prepared, "qconfig"),
    "weight norm": (lambda mlp: parametrizations.weight_norm(mlp.up_proj), "remove_parametrizations"),
    "old weight norm": (lambda mlp: nn.utils.weight_norm(mlp.up_proj), "not a plain parameter"),
    "pruned": (lambda mlp: prune.l1_unstructured(mlp.up_proj, "weight", 0.5), "not a plain parameter"),
    "integers": (
        lambda mlp: setattr(mlp.up_proj, "weight", nn.Parameter(torch.ones(64, 32, dtype=torch.int8), False)),
        "int8",
    ),
    "float8 dtype": (lambda mlp: mlp.up_proj.to(torch.float8_e4m3fn), "float8_e4m3fn"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BEFORE)
def test_such_layers_are_skipped_by_name(name):
    change, words = BEFORE[name]
    model = nn.Sequential(MLP())
    change(model[0])
    layer = model[0].up_proj
    report = sparse24.sparsify(model, include=("*_proj",))
    (skipped,) = report.skipped
    assert skipped.name == "0.up_proj" and words in skipped.reason and report.converted == ["0.down_proj"]
    assert model[0].up_proj is layer and not isinstance(layer, SparseLayer)


# -- and those that come over sparse layers -------------------------------------------------------------------------


def test_a_dense_twin_does_not_take_a_sparse_layers_place():
    model, x = sparse_mlp(), torch.randn(4, 32)
    before, y = model[0].up_proj, model(x)
    for put in (
        lambda new: setattr(model[0], "up_proj", new),
        lambda new: model[0].add_module("up_proj", new),
        lambda new: model.set_submodule("0.up_proj", new),
    ):
        with pytest.raises(Sparse24Error, match=r"Float8Linear would take the place of .*'up_proj'.*densify"):
            put(Float8Linear.from_float(before))
    assert model[0].up_proj is before and torch.equal(model(x), y)
    model[0].up_proj = nn.Linear(32, 64)  # a layer of its own is the user's business
    sparse24.densify(model)
    model[0].down_proj = Float8Linear.from_float(model[0].down_proj)


def test_a_quantised_weight_is_refused_and_the_layer_stays():
    layer, x = SparseLinear(32, 64), torch.randn(4, 32)
    weight, y = layer.weight, layer(x)
    with pytest.raises(Sparse24Error, match="type Wrapped .*densify.model, masked=True"):
        layer.weight = nn.Parameter(Wrapped(torch.randn(64, 32)), requires_grad=False)
    for other, words in ((torch.ones(64, 32, dtype=torch.int8), "int8"), (torch.randn(62, 32), "62 x 32")):
        with pytest.raises(Sparse24Error, match=words):
            layer.weight = nn.Parameter(other, requires_grad=False)
    with pytest.raises(Sparse24Error, match="got 64$|got 64;"):
        layer.weight = nn.Parameter(torch.randn(64))
    assert layer.weight is weight and torch.equal(layer(x), y)


def test_torchs_own_quantisation_leaves_sparse_layers_sparse():
    model, x = sparse_mlp(), torch.randn(4, 32)
    y = model(x)
    made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(made(x), y)


def test_masked_densify_gives_quantisation_the_same_function():
    model, x = sparse_mlp(), torch.randn(4, 32)
    y = model(x)
    sparse24.densify(model, masked=True)
    torch.testing.assert_close(model(x), y)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)(x)


# -- reparametrised after conversion, and taken back ----------------------------------------------------------------


def old_spectral(layer):
    nn.utils.spectral_norm(layer)
    layer.eval()


def bare_weight(layer):
    parametrize.remove_parametrizations(layer, "weight")


def unpruned(layer):
    prune.remove(layer, "weight")


REPARAMETRISE = {
    "weight norm": (parametrizations.weight_norm, bare_weight),
    "spectral norm": (parametrizations.spectral_norm, bare_weight),
    "orthogonal": (parametrizations.orthogonal, bare_weight),
    "old weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral norm": (old_spectral, nn.utils.remove_spectral_norm),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), unpruned),
    "pruned rows": (lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0), unpruned),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "error::sparse24.Sparse24Warning")
@pytest.mark.parametrize("name", REPARAMETRISE)
def test_reparametrised_weights_multiply_and_so_do_they_after_removal(name):
    put, take = REPARAMETRISE[name]
    model, x = sparse_mlp(), torch.randn(4, 32)
    layer = model[0].up_proj
    put(layer)
    model.eval()
    model(x)  # pre-hooks write the weight
    torch.testing.assert_close(model(x), reference(model, x))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.5)
    model(x)
    torch.testing.assert_close(model(x), reference(model, x))
    assert sparse24.verify(model)
    take(layer)
    assert type(layer) is SparseLinear and layer.weight is layer._parameters["weight"]
    torch.testing.assert_close(model(x), reference(model, x))
    assert sparse24.verify(model), str(sparse24.verify(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Recipe(model, optimizer, total_steps=4)
    model(x).sum().backward()
    optimizer.step()
    assert sparse24.verify(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRISE)
def test_a_recipe_over_such_weights_is_refused_by_name(name):
    model = sparse_mlp()
    REPARAMETRISE[name][0](model[0].up_proj)
    with pytest.raises(Sparse24Error, match="0.up_proj are computed from other parameters"):
        Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)


def test_a_layer_that_grows_is_masked_and_packed_anew():
    model, x = sparse_mlp(), torch.randn(4, 32)
    mlp = model[0]
    mlp.up_proj.weight, mlp.up_proj.bias = nn.Parameter(torch.randn(96, 32)), nn.Parameter(torch.randn(96))
    mlp.down_proj.weight = nn.Parameter(torch.randn(32, 96))
    expected = reference(model, x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2 * ORDER * expected.abs().max().item())
    assert sparse24.verify(model)


# -- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_jagged_inputs_give_jagged_outputs(autocast):
    model = sparse_mlp()
    for layer in (model[0].up_proj, model[0].down_proj):
        layer.set_mvue(False)
    parts = [torch.randn(3, 32), torch.randn(5, 32)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    flat = torch.cat(parts).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = model(x), model(flat)
    assert y.is_nested and torch.equal(y.offsets(), x.offsets())
    torch.testing.assert_close(y.values(), expected)
    (gradient,) = torch.autograd.grad(y.values().sum(), x)
    (wanted,) = torch.autograd.grad(expected.sum(), flat)
    torch.testing.assert_close(gradient.values(), wanted)


def test_other_nested_inputs_are_refused_by_name():
    model = sparse_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says, once a process, that they are a prototype
        strided = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)])
    jagged = torch.nested.nested_tensor([torch.randn(32, 3), torch.randn(32, 5)], layout=torch.jagged)
    with pytest.raises(Sparse24Error, match="layout torch.jagged"):
        model(strided)
    with pytest.raises(Sparse24Error, match="layout torch.jagged"):
        model(jagged.transpose(1, 2).transpose(1, 2)) if jagged._ragged_idx == 1 else model(jagged)


def test_fake_tensors_are_shaped_and_nothing_is_read():
    with FakeTensorMode():
        model = nn.Sequential(MLP())
        report = sparse24.sparsify(model)
        assert len(report.converted) == 2 and report.fused == {"0": ""}
        y = model(torch.randn(4, 32))
        assert isinstance(y, FakeTensor) and y.shape == (4, 32)
        assert isinstance(mask_of(model[0].up_proj), FakeTensor)
        sparse24.densify(model)


def train_on_meta(model):
    """One step and one evaluation, as shapes and FLOPs are counted."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = sparse24.Recipe(model, optimizer, 10, takeover=True)
    model(torch.empty(4, 32, device="meta")).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert model.eval()(torch.empty(3, 32, device="meta")).shape == (3, 32)
    recipe.detach()


@pytest.mark.fault(56)
def test_conversion_under_a_default_device_and_modes():
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        model = nn.Sequential(MLP())
        assert sparse24.sparsify(model).fused == {"0": ""}
        train_on_meta(model)
    train_on_meta(model)
    model.to_empty(device="cpu")
    for layer in (model[0].up_proj, model[0].down_proj):
        layer.reset_parameters()
    x = torch.randn(4, 32)
    torch.testing.assert_close(model(x), reference(model, x))


# -- tracers --------------------------------------------------------------------------------------------------------


TRACERS = {
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "jit.script": lambda model, x: torch.jit.script(model),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", TRACERS)
def test_other_tracers_are_told_of_export_and_densify_which_works(name, fuse):
    model, x = nn.Sequential(MLP()), torch.randn(4, 32)
    sparse24.sparsify(model, fuse=fuse)
    y = model(x)
    with pytest.raises(Sparse24Error, match=r"torch.export, or .*densify\(model, masked=True\)"):
        TRACERS[name](model, x)
    assert torch.equal(model(x), y)
    sparse24.densify(model, masked=True)
    torch.testing.assert_close(TRACERS[name](model, x)(x), y)


def test_a_training_of_an_exported_program_is_told_of_by_torch():
    model, x = sparse_mlp(), torch.randn(4, 32)
    program = torch.export.export(model, (x,)).module()
    with pytest.warns(UserWarning, match="sparse24::.*: an autograd kernel was not registered"):
        program(x).sum().backward()
    assert all(weight.grad is None for name, weight in program.named_parameters() if name.endswith("weight"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_dense_phase_can_be_traced():
    model, x = sparse_mlp(), torch.randn(4, 32)
    for layer in (model[0].up_proj, model[0].down_proj):
        layer.enter("dense")
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), model(x))
