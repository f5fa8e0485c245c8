"""Gradients of sparse layers: which are computed, by which noise, and what autograd refuses."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from rounding import ANOTHER_ORDER, MANY_SUMS
from tiny_layers import masked, sparse_linear
from tiny_models import MLP, Gated
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import SparseGatedMLP, SparseLinear
from sparse24.errors import Sparse24Error


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
def test_a_layer_without_bias_is_its_product_alone():
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


def input_gradient(module, x):
    return torch.autograd.grad(module(x).sum(), x, create_graph=True)[0].square().sum()


SECOND_DERIVATIVES = {
    "penalty, for the input": lambda module, x: torch.autograd.grad(input_gradient(module, x), x),
    "penalty, for an inner tensor": lambda module, x: input_gradient(module, 2 * x).backward(),
    "penalty, for weights": lambda module, x: torch.autograd.grad(
        input_gradient(module, x), [*module.parameters()], allow_unused=True
    ),
    "hessian": lambda module, x: torch.autograd.functional.hessian(lambda x: module(x).sum(), x),
    "jvp": lambda module, x: torch.autograd.functional.jvp(module, x, x.detach()),
    "hvp": lambda module, x: torch.autograd.functional.hvp(lambda x: module(x).sum(), x, x.detach()),
}


@pytest.mark.fault(51)
@pytest.mark.parametrize("ask", SECOND_DERIVATIVES.values(), ids=SECOND_DERIVATIVES)
@pytest.mark.parametrize("make", [
    lambda: SparseLinear(16, 32), lambda: SparseLinear(16, 32, mvue="input"), lambda: SparseGatedMLP(16, 64),
    lambda: SparseLinear(32, 32, precision="fp8"), lambda: SparseGatedMLP(16, 64, mvue="input"),
], ids=["linear", "pruned input", "block", "8 bits", "block, pruned input"])  # fmt: skip
def test_a_second_derivative_is_never_a_silent_zero(make, ask):
    """Where the loss is a sum, the output's gradient is a constant, and `torch.autograd.grad` follows paths alone."""
    module = make()
    x = torch.randn(8, next(module.parameters()).shape[1], requires_grad=True)
    with pytest.raises(RuntimeError, match="have no second derivatives.*densify") as raised:
        ask(module, x)
    assert isinstance(raised.value, Sparse24Error)


@pytest.mark.fault(51, 54)
def test_a_second_derivative_through_activation_checkpointing_is_refused():
    """Of the kind that has any: the reentrant one gives gradients without a graph, of dense layers too."""
    block, x = SparseGatedMLP(16, 64, mvue=False), torch.randn(8, 16, requires_grad=True)
    (dx,) = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        dx.sum().backward()


@pytest.mark.fault(51)
def test_gradients_with_a_graph_have_one_in_every_micro_batch():
    layer, x = SparseLinear(16, 32, mvue=False), torch.randn(8, 16)
    for _ in range(2):
        layer(x).sum().backward(create_graph=True)
    torch.testing.assert_close(layer.weight.grad.detach(), 2 * x.sum(0).expand(32, 16), **MANY_SUMS)
    with pytest.raises(RuntimeError, match="have no second derivatives"):
        layer.weight.grad.sum().backward()


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


@pytest.mark.fault(48)
@pytest.mark.parametrize("mvue", [False, True, "input"])
@pytest.mark.parametrize("block", [MLP, Gated])
def test_gradients_are_none_where_those_of_dense_layers_are(block, mvue):
    """Of the output and of what hooks see inside, whatever is frozen, by `torch.autograd.grad(allow_unused=True)`."""

    def absent(model, frozen, watched):
        for p in model.parameters():
            p.requires_grad_(p not in frozen)
        seen = []
        handles = [m.register_forward_hook(lambda *args: seen.append(args[-1])) for m in model.children() if watched]
        x = torch.randn(8, next(model.parameters()).shape[1], requires_grad=True)
        outputs = [model(x), *seen]
        for handle in handles:
            handle.remove()
        trained = [p for p in model.parameters() if p.requires_grad]
        wanted = [[x, *seen[:i], *trained] for i in range(len(outputs))]
        return [
            [g is None for g in torch.autograd.grad(y.sum(), of, retain_graph=True, allow_unused=True)]
            for y, of in zip(outputs, wanted, strict=True)
        ]

    dense, model = block(), block()
    sparse24.sparsify(model)
    sparse24.Recipe(model, torch.optim.SGD(model.parameters(), 0.1), 4, mvue=mvue)
    for size, watched in itertools.product(range(4), (False, True)):
        for chosen in itertools.combinations(range(len(list(dense.parameters()))), size):
            ours, theirs = (
                absent(one, {p for i, p in enumerate(one.parameters()) if i in chosen}, watched)
                for one in (model, dense)
            )
            assert ours == theirs, (chosen, watched)
