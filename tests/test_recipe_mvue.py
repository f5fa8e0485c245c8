"""method="mvue": dense weights, sparse weight gradients; and the dense layer under it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rounding import MANY_SUMS
from tiny_models import MLP, gpt2, tokens
from tiny_recipes import make, run
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Recipe, Sparse24Error, functional
from sparse24.recipe.noise import relative_variance


def draws(prune, count=400):
    """Weight gradients of one layer, [count, out, in], each from noise of its own; and the exact ones of everything."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 12, requires_grad=True)
    weight, bias = torch.randn(8, 12, requires_grad=True), torch.randn(8, requires_grad=True)
    dy = torch.randn(4, 6, 8)
    exact = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), dy)
    found = []
    for _ in range(count):
        y = functional.dense_linear(x, weight, bias, mvue=prune)
        dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
        torch.testing.assert_close(y, F.linear(x, weight, bias))
        torch.testing.assert_close((dx, db), (exact[0], exact[2]))
        found.append(dw)
    return torch.stack(found), exact[1]


@pytest.mark.parametrize("prune", ["output", "input"])
def test_the_weight_gradient_alone_is_noisy_and_is_right_on_average(prune):
    found, exact = draws(prune)
    assert not torch.equal(found[0], found[1])
    error = (found.mean(0) - exact).abs() / (found.std(0) / len(found) ** 0.5).clamp_min(1e-6)
    assert error.max() < 5


@pytest.mark.parametrize("prune", ["output", "input"])
def test_the_noise_is_a_function_of_torchs_seed(prune):
    x, dy, weight = torch.randn(8, 12), torch.randn(8, 8), torch.randn(8, 12, requires_grad=True)

    def gradient():
        torch.manual_seed(3)
        return torch.autograd.grad(functional.dense_linear(x, weight, mvue=prune), weight, dy)[0]

    assert torch.equal(gradient(), gradient())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_noise_of_the_first_forward_again(reentrant):
    model, _, _ = make(method="mvue", mvue="input")
    x, gradients = torch.randn(8, 16, requires_grad=True), []
    for run_model in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        model.zero_grad()
        run_model(x).square().sum().backward()
        gradients.append(model.fc1.weight.grad.clone())
    assert torch.equal(*gradients)


def test_other_operands_are_refused():
    with pytest.raises(Sparse24Error, match='mvue must be True, "output", "input" or False'):
        functional.dense_linear(torch.zeros(4, 4), torch.zeros(4, 4), mvue="both")


def test_the_method_keeps_the_function_of_a_pretrained_model():
    """Forward, and the gradients of all but the sparse layers' weights, are those of the dense model."""
    dense, model = gpt2(), gpt2()
    sparse24.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = Recipe(model, optimizer, total_steps=8, method="mvue", decay=1.0)
    ids = tokens()
    for one in (dense, model):
        one(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(model(input_ids=ids).logits, dense(input_ids=ids).logits)
    weights = {f"{name}.weight" for name in recipe.layers}
    for (name, mine), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name in weights:
            assert not torch.allclose(mine.grad, theirs.grad, rtol=1e-3)
            cosine = F.cosine_similarity(mine.grad.flatten(), theirs.grad.flatten(), dim=0)
            assert 0.5 < cosine < 0.999
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, **MANY_SUMS)
    assert recipe.current_decay == 0 and recipe.phase == "dense"


def test_the_method_searches_nothing_and_resumes():
    model, optimizer, recipe = make(method="mvue")
    masks = [layer.mask.clone() for layer in recipe.layers.values()]
    run(model, optimizer, 5)
    assert recipe.step == 5 and recipe.metrics()["flip_rate"] == 0 and "gap_q50" not in recipe.metrics()
    assert all(torch.equal(layer.mask, mask) for layer, mask in zip(recipe.layers.values(), masks, strict=True))
    state, weights = recipe.state_dict(), model.state_dict()
    other, other_optimizer, again = make(method="mvue")
    other.load_state_dict(weights)
    again.load_state_dict(state)
    run(model, optimizer, 3, first=5)
    torch.set_rng_state(state["rng"]["cpu"])
    run(other, other_optimizer, 3, first=5)
    assert again.step == recipe.step == 8
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_method_with_masks_after_it_prunes_no_dense_gradients():
    model, optimizer, recipe = make(method="mvue")
    recipe.detach()
    Recipe(model, optimizer, total_steps=4, dense_fraction=1)
    x = torch.randn(8, 16)
    twin = MLP()
    twin.load_state_dict(model.state_dict())
    for one in (model, twin):
        one.zero_grad()
        one(x).square().sum().backward()
    torch.testing.assert_close(model.fc1.weight.grad, twin.fc1.weight.grad)


# -- which operand ----------------------------------------------------------------------------------------------------


def test_relative_variance_is_that_of_the_draws():
    torch.manual_seed(0)
    normal = torch.randn(4096, 64)
    # of 262,144 normal values known to 0.0012; the numbers have two digits
    assert relative_variance(normal) == pytest.approx(0.47, abs=0.01)
    # the same
    assert relative_variance(F.gelu(normal)) == pytest.approx(0.18, abs=0.01)
    sparse = torch.tensor([[1.0, 0.0, -2.0, 0.0]]).t()
    assert relative_variance(sparse) == 0 and relative_variance(torch.zeros(8, 2)) == 0
    for a in (torch.randn(8, 3), torch.tensor([[10.0, 1.0, 2.0, 0.5]]).t()):
        seeds = torch.arange(4000 * 2).view(-1, 2)
        total = torch.zeros(())
        for seed in seeds:
            packed, E = sparse24.ops.mvue_compress(a, seed)
            kept = sparse24.ops.decompress(packed, E, 2 * packed.shape[0], a.shape[1], transposed=True)
            total += (kept[: a.shape[0]] - a).square().sum()
        # the error of a draw squared spreads by as much as its mean: 4,000 draws know it to 1.6 %, here six times that
        assert relative_variance(a) == pytest.approx(float(total / 4000 / a.square().sum()), rel=0.1)


@pytest.mark.parametrize("method", ["mvue", "fst"])
def test_auto_takes_the_quieter_operand_and_says_so(method):
    """What enters fc2 is the output of a ReLU, whose zeros cost nothing to prune; its output's gradient is dense."""
    model, optimizer, recipe = make(method=method, mvue="auto", mask_interval=2)
    heard = []
    recipe.on_event(heard.append)
    assert model.fc1.mvue == model.fc2.mvue == "output"
    run(model, optimizer, 7)
    assert model.fc2.mvue == "input"
    assert [event["kind"] for event in heard] == ["mvue"] * len(heard) and "fc2" in heard[0]["layers"]
    assert recipe.events == heard and "fc2 input (" in heard[0]["message"]
    assert not model.fc1._forward_hooks and not model.fc2._forward_hooks


@pytest.mark.fault(61)
@pytest.mark.parametrize("interval", [1, 2])
def test_auto_resumes_with_what_it_had_chosen_and_was_looking_at(interval):
    """At each step of the sparse phase: the choices, and the look at the next pass."""
    settings = dict(mvue="auto", mask_interval=interval)
    model, optimizer, recipe = make(**settings)
    saved = []
    for step in range(8):
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), recipe.state_dict())))
        run(model, optimizer, 1, first=step)
    assert model.fc2.mvue == "input"
    for step, states in enumerate(saved):
        other, *others = make(**settings)
        for part, state in zip((other, *others), states, strict=True):
            part.load_state_dict(state)
        run(other, others[0], 8 - step, first=step)
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, theirs), f"resumed at step {step}"
    with pytest.raises(Sparse24Error, match="neither 'output' nor 'input'"):
        recipe.load_state_dict(recipe.state_dict() | {"pruned": {"fc1": "both"}})


def test_input_is_pruned_where_it_is_asked_for():
    model, optimizer, recipe = make(method="mvue", mvue="input")
    run(model, optimizer, 2)
    assert model.fc1.mvue == "input" and recipe.step == 2
    with pytest.raises(Sparse24Error, match="mvue='input' is not available with method='s-ste'"):
        make(method="s-ste", mvue="input")
    with pytest.raises(Sparse24Error, match="mvue must be True, False, None"):
        make(mvue="both")


def test_auto_says_once_that_compiled_layers_show_no_noise():
    model, optimizer, recipe = make(method="mvue", mvue="auto", mask_interval=2)
    for _ in range(6):  # as compiled code: the layers' own calls, and so their hooks, are left out
        x = torch.randn(8, 16)
        y = F.linear(torch.relu(F.linear(x, model.fc1.weight)), model.fc2.weight)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [event["layers"] for event in recipe.events] == [[]]
    assert "no noise was measured" in recipe.events[0]["message"] and model.fc2.mvue == "output"
