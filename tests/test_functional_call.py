"""torch.func.functional_call, or another that puts a weight in a layer's place: it multiplies with that weight."""

import copy
import warnings
import weakref

import pytest
import torch
from tiny_models import MLP, gpt2, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import sparse24
from sparse24 import Recipe, SparseGatedMLP, SparseLinear, ops
from sparse24.errors import Sparse24Error
from sparse24.layers.fused.feedforward import FusedFeedForward
from sparse24.layers.modules import SparseLayer

pytestmark = pytest.mark.fault(57)


def sparse_mlp(**settings):
    model = MLP()
    sparse24.sparsify(model, **settings)
    return model


def soft_mlp():
    model = sparse_mlp()
    Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=8, method="s-ste")
    return model


MAKERS = {
    "layers": sparse_mlp,
    "lean": lambda: sparse_mlp(lean=True),
    "float64": lambda: sparse_mlp().double(),
    "packed for another dtype": lambda: sparse_mlp(dtype=torch.bfloat16),
    "s-ste": soft_mlp,
    "gated block": lambda: nn.Sequential(SparseGatedMLP(16, 64, bias=True)),
}


def without_mvue(model):
    """The model, with gradients that can be compared."""
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            layer.mvue = False
    return model


def other_weights(model):
    return {name: 0.2 * torch.randn_like(p) for name, p in model.named_parameters()}


def holding(model, weights):
    """A copy of the model that holds these weights, with the masks of the model."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        layer.mask_is_state = True
    twin.load_state_dict({**twin.state_dict(), **{name: weight.detach() for name, weight in weights.items()}})
    return twin


def inputs(model):
    return torch.randn(8, 16, dtype=next(model.parameters()).dtype)


@pytest.mark.filterwarnings("ignore:packed for torch.bfloat16")
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_substituted_weights_give_the_output_and_the_gradients_of_a_model_that_holds_them(make):
    model = without_mvue(make())
    weights = {name: w.requires_grad_() for name, w in other_weights(model).items()}
    twin, x = holding(model, weights), inputs(model)
    before, buffers = model(x), [b.clone() for b in model.buffers()]

    y = functional_call(model, weights, x)
    torch.testing.assert_close(y, twin(x))
    assert not torch.allclose(y, before)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(weights[name].grad, parameter.grad, msg=name)
    assert all(p.grad is None for p in model.parameters())

    assert torch.equal(model(x), before)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_substituted_weights_of_a_real_model_with_conv1d_and_fused_blocks():
    model = gpt2(1)
    sparse24.sparsify(model)
    assert any(isinstance(module, FusedFeedForward) for module in model.modules())
    weights = {name: w for name, w in other_weights(model).items() if "mlp" in name}
    kwargs = dict(input_ids=tokens(), use_cache=False)
    torch.testing.assert_close(
        functional_call(model, weights, (), kwargs).logits, holding(model, weights)(**kwargs).logits
    )


def test_decay_in_backward_is_that_of_the_substituted_weights():
    model, x = without_mvue(sparse_mlp()), torch.randn(8, 16)
    weight = torch.randn(32, 16, requires_grad=True)
    gradients = []
    for factor in (None, torch.tensor([0.5])):
        model.fc1.decay_factor = factor
        gradients += torch.autograd.grad(functional_call(model, {"fc1.weight": weight}, x).square().sum(), weight)
    pruned = torch.where(ops.unpack_mask(model.fc1.mask), 0, weight)
    torch.testing.assert_close(gradients[1], gradients[0] + 0.5 * pruned)


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("buffers", ["left out", "the model's", "copies"])
def test_it_does_not_matter_what_the_weights_are_nor_which_buffers_come_along(parameter, buffers):
    """The common idiom hands all buffers over too; the packed ones among them are of the model's own weights."""
    model, x = sparse_mlp(), torch.randn(8, 16)
    weights = other_weights(model)
    expected = holding(model, weights)(x)
    if parameter:
        weights = {name: nn.Parameter(w) for name, w in weights.items()}
    given = {} if buffers == "left out" else dict(model.named_buffers())
    if buffers == "copies":
        given = {name: b.clone() for name, b in given.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(functional_call(model, {**weights, **given}, x), expected)


def test_own_weights_handed_back_are_the_same_function():
    model, x = sparse_mlp(), torch.randn(8, 16)
    for weights in (dict(model.named_parameters()), {n: p.detach() for n, p in model.named_parameters()}):
        assert torch.equal(functional_call(model, weights, x), model(x))


def test_a_step_on_substituted_weights_is_a_step_of_training():
    """As meta-learning has it: the updated weights are no leaves, and gradients go through the update."""
    model, x = without_mvue(sparse_mlp()), torch.randn(8, 16)
    gradients = torch.autograd.grad(model(x).square().mean(), [*model.parameters()])
    updated = {n: p - 0.1 * g for (n, p), g in zip(model.named_parameters(), gradients, strict=True)}
    loss = functional_call(model, updated, x).square().mean()
    loss.backward()
    twin = holding(model, updated)
    twin(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_skeleton_on_the_meta_device_takes_weights_and_buffers():
    with torch.device("meta"):
        skeleton = sparse_mlp()
    model, x = sparse_mlp(), torch.randn(8, 16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(functional_call(skeleton, tensors, x), model(x))
    with pytest.raises(Sparse24Error, match="mask is on meta"):
        functional_call(skeleton, dict(model.named_parameters()), x)


def test_substituted_weights_that_do_not_fit_are_refused():
    model, x = sparse_mlp(), torch.randn(8, 16)
    with pytest.raises(Sparse24Error, match="mask must have shape"):
        functional_call(model, {"fc1.weight": torch.randn(16, 16)}, x)
    with pytest.raises(Sparse24Error, match="same dtype"):
        functional_call(model, {"fc1.weight": torch.randn(32, 16, dtype=torch.bfloat16)}, x)


@pytest.mark.fault(52)
@pytest.mark.parametrize("make", [sparse_mlp, soft_mlp], ids=["fst", "s-ste"])
def test_function_transforms_over_substituted_weights_are_refused(make):
    model, x = make(), torch.randn(8, 16)
    weights = other_weights(model)
    stacked = {name: torch.stack([w, w]) for name, w in weights.items()}
    with pytest.raises(Sparse24Error, match="torch.func transforms"):
        torch.func.grad(lambda w: functional_call(model, w, x).sum())(weights)
    with pytest.raises(Sparse24Error, match="torch.func transforms"):
        torch.func.vmap(lambda w: functional_call(model, w, x))(stacked)


# -- copies -----------------------------------------------------------------------------------------------------------


AVERAGED = {
    "layers": sparse_mlp,
    "lean": lambda: sparse_mlp(lean=True),
    "gated block": lambda: nn.Sequential(SparseGatedMLP(16, 64)),
}


def averaged(make, steps):
    """A model after as many of 8 steps, the last 4 dense; an average of all but the last, which hands its buffers to it
    as well; and a copy from before the steps.
    """
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Recipe(model, optimizer, total_steps=8, mask_interval=1, dense_fraction=0.5)
    average, snapshot = AveragedModel(model), copy.deepcopy(model)
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        if step < steps - 1:
            average.update_parameters(model)
    return model, average.module, snapshot


@pytest.mark.fault(79)
@pytest.mark.parametrize("steps", [3, 6], ids=["other masks", "dense"])
@pytest.mark.parametrize("make", AVERAGED.values(), ids=AVERAGED)
def test_weights_lent_to_an_average_that_has_never_run_go_under_the_masks_of_its_model(make, steps):
    model, average, snapshot = averaged(make, steps)
    own, lent, x = copy.deepcopy(dict(average.named_parameters())), other_weights(model), inputs(model)
    expected = functional_call(model, lent, x)
    assert torch.equal(functional_call(average, lent, x), expected)
    assert sparse24.verify(average, like=model)
    assert all(torch.equal(p, own[name]) for name, p in average.named_parameters())
    assert not torch.allclose(functional_call(snapshot, lent, x), expected), "a snapshot keeps its masks"
    assert not sparse24.verify(snapshot, like=model)


# -- compilers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.fault(53)
@pytest.mark.parametrize("make", [sparse_mlp, soft_mlp], ids=["fst", "s-ste"])
def test_substituted_weights_inside_and_around_a_compiled_function(make, fresh_compiler):
    """One graph for a model's own weights and one for substituted ones, whichever come first."""
    model, x = without_mvue(make()), torch.randn(8, 16)
    weights = {name: w.requires_grad_() for name, w in other_weights(model).items()}
    expected = functional_call(model, weights, x)
    torch.testing.assert_close(expected, holding(model, weights)(x))
    gradients = torch.autograd.grad(expected.square().sum(), [*weights.values()])

    def call(weights, x):
        return functional_call(model, weights, x)

    counter = CompileCounterWithBackend("aot_eager")
    inside = torch.compile(call, backend=counter, fullgraph=True)
    around = torch.compile(model, backend=counter, fullgraph=True)
    prefixed = {f"_orig_mod.{name}": w for name, w in weights.items()}
    for run, frames in ((lambda: inside(weights, x), 1), (lambda: functional_call(around, prefixed, x), 2)):
        for _ in range(2):
            y = run()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y.square().sum(), [*weights.values()]), gradients)
        assert counter.frame_count == frames
    for _ in range(2):
        torch.testing.assert_close(around(x), model(x))
    torch.testing.assert_close(functional_call(around, prefixed, x), expected)
    assert counter.frame_count == 3


@pytest.mark.parametrize("strict", [False, True])
def test_export_multiplies_with_the_packed_forms(strict):
    """The exporter puts tracers in place of weights, which is no reason to pack in its graph."""
    model, x = sparse_mlp().eval().requires_grad_(False), torch.randn(8, 16)
    program = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(program.module()(x), model(x))
    called = {str(node.target) for part in program.graph_module.modules() for node in part.graph.nodes}
    assert "sparse24.feed_forward.default" in called and "sparse24.compress.default" not in called


# -- other substitutes, and what a layer remembers -----------------------------------------------------------------


def test_parametrization_of_a_sparse_weight_is_what_multiplies():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = SparseLinear(16, 24, bias=False), torch.randn(4, 16)
    before = layer(x)
    parametrize.register_parametrization(layer, "weight", Double())
    torch.testing.assert_close(layer(x), 2 * before)
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3)
    torch.testing.assert_close(layer(x), 6 * before)


def test_the_weight_is_no_second_parameter_and_an_old_one_is_let_go():
    layer = SparseLinear(16, 24)
    assert [*layer.state_dict()] == [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.randn(24, 16))
    assert old() is None
