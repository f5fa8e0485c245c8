"""Something writes weights between the steps of a recipe: it is found, whatever runs and whatever shows."""

import copy
import warnings

import pytest
import torch
from masked_outputs import X, assert_right, evaluated, masked_output
from rounding import ANOTHER_ORDER
from tiny_models import MLP
from tiny_recipes import loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Recipe, Sparse24Warning
from sparse24.convert import sparse_layers
from sparse24.layers.state import state_of
from sparse24.layers.watch import unseen
from sparse24.layers.watch.unseen import EVERY


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        yield


def train(model, optimizer, steps, *, forward=None, after=lambda: None, before=lambda: None):
    for step in range(steps):
        loss_of(model if forward is None else forward, step).backward()
        before()
        optimizer.step()
        optimizer.zero_grad()
        after()


def prepared(make_optimizer=lambda weights: torch.optim.SGD(weights, 0.1), **settings):
    torch.manual_seed(0)
    model = MLP()
    sparse24.sparsify(model, mvue=False)
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, Recipe(model, optimizer, **(dict(total_steps=200, dense_fraction=0) | settings))


@torch.no_grad()
def clip_by_data(model, names=("fc1", "fc2"), limit=0.02):
    for name in names:
        model.get_submodule(name).weight.data.clamp_(-limit, limit)


@pytest.mark.fault(83)
@pytest.mark.parametrize("names", [("fc1",), ("fc2",), ("fc1", "fc2")])
def test_weights_clipped_by_data_from_some_step_on_are_found_and_packed_from_then_on(names):
    model, optimizer, _ = prepared()
    train(model, optimizer, 3)
    with pytest.warns(Sparse24Warning, match="after step .* does not hear of"):
        train(model, optimizer, 2 * EVERY + 1, after=lambda: clip_by_data(model, names))
    for _ in range(3):
        assert_right(model, model(X))
        train(model, optimizer, 1, after=lambda: clip_by_data(model, names))


@pytest.mark.fault(83)
@pytest.mark.parametrize("names", [("fc1",), ("fc2",), ("fc1", "fc2")])
def test_weights_clipped_by_data_after_every_step_of_a_training_are_right_in_each_pass(names):
    model, optimizer, _ = prepared()
    with pytest.warns(Sparse24Warning, match="after step 1 .* does not hear of"):
        for _ in range(4):
            train(model, optimizer, 1, forward=checked(model), after=lambda: clip_by_data(model, names))


def checked(model):
    """Passes of `model`, each compared with its masked twin."""

    def forward(x):
        y = model(x)
        torch.testing.assert_close(y.detach(), masked_output(model, x), **ANOTHER_ORDER)
        return y

    return forward


@pytest.mark.fault(83)
@pytest.mark.parametrize("write", ["by data", "in place"])
@pytest.mark.parametrize("begins", [0, 3])
def test_weights_moved_for_a_second_pass_and_back_as_sam_does_in_a_loop_of_ones_own(write, begins):
    model, optimizer, recipe = prepared()
    train(model, optimizer, begins)
    forward = checked(model) if begins == 0 or write == "in place" else model  # `.data`: found in every 16th step

    def move(sign, gradients):
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            with torch.no_grad():
                (p.data if write == "by data" else p).add_(gradient, alpha=sign)

    def sam_step():
        gradients = torch.autograd.grad(loss_of(forward), list(model.parameters()))
        move(0.5, gradients)
        loss_of(forward).backward()
        move(-0.5, gradients)
        optimizer.step()
        optimizer.zero_grad()

    with pytest.warns(Sparse24Warning, match="does not hear of"):
        for _ in range(4 if begins == 0 else 2 * EVERY):
            sam_step()
    forward = checked(model)
    sam_step()
    assert recipe.step == begins + (5 if begins == 0 else 2 * EVERY + 1) and sparse24.verify(model)


@pytest.mark.fault(83)
def test_under_activation_checkpointing_they_are_found_too():
    model, optimizer, _ = prepared()

    def forward(x):
        return checkpoint(model, x.requires_grad_(), use_reentrant=True)

    with pytest.warns(Sparse24Warning, match="does not hear of"):
        train(model, optimizer, 2 * EVERY + 1, forward=forward, after=lambda: clip_by_data(model))
    assert_right(model, model(X))


@pytest.mark.fault(83)
def test_a_training_that_nobody_writes_into_compares_one_layer_in_so_many_steps(monkeypatch):
    looked, first_rows = [], unseen.first_rows_are_packed
    monkeypatch.setattr(unseen, "first_rows_are_packed", lambda la: looked.append(la) or first_rows(la))
    model, optimizer, _ = prepared()
    train(model, optimizer, 2)
    looked.clear()
    train(model, optimizer, 3 * EVERY)
    assert looked == [model.fc2, model.fc1, model.fc2]


@pytest.mark.fault(83)
@pytest.mark.parametrize("write", ["by data", "in place"])
def test_weights_written_between_backward_and_step_are_nobodys_business_in_eager_mode(write):
    model, optimizer, _ = prepared()

    def shrink():
        for p in model.parameters():
            with torch.no_grad():
                (p.data if write == "by data" else p).mul_(0.999)

    train(model, optimizer, 2 * EVERY + 2, before=shrink)
    assert sparse24.verify(model)


@pytest.mark.fault(83)
@pytest.mark.parametrize("write", ["by data", "in place"])
def test_a_compiled_training_is_told_of_writes_after_its_steps(write):
    model, optimizer, _ = prepared()
    compiled = torch.compile(model, backend="eager")

    def write_all():
        for p in model.parameters():
            with torch.no_grad():
                (p.data if write == "by data" else p).clamp_(-0.02, 0.02)

    with pytest.warns(Sparse24Warning, match=r"compiled forward passes do not look.*sparse24\.refresh") as caught:
        train(model, optimizer, 2 * EVERY + 1, forward=compiled, after=write_all)
    assert len([w for w in caught if issubclass(w.category, Sparse24Warning)]) == 1


@pytest.mark.fault(83)
def test_refresh_after_each_write_is_right_and_told_of_by_nobody():
    model, optimizer, _ = prepared()
    compiled = torch.compile(model, backend="eager")
    outputs = []

    def write_all():
        clip_by_data(model)
        sparse24.refresh(model)
        outputs.append((compiled(X).detach(), masked_output(model)))

    train(model, optimizer, 2 * EVERY + 1, forward=compiled, after=write_all)
    for ours, expected in outputs:
        torch.testing.assert_close(ours, expected, **ANOTHER_ORDER)


@pytest.mark.fault(83)
def test_another_optimizer_is_packed_after_and_so_right_in_a_compiled_model():
    model, optimizer, recipe = prepared()
    compiled = torch.compile(model, backend="eager")
    train(model, optimizer, 1, forward=compiled)
    other = torch.optim.SGD([model.fc2.weight], lr=5.0)
    loss_of(compiled).backward()
    with pytest.warns(Sparse24Warning, match=r"fc2 \(1 sparse layers\).*after step 1 of SGD"):
        other.step()
    assert_right(model, compiled(X))
    other.step()  # told of once
    assert_right(model, compiled(X))
    assert recipe.step == 1
    recipe.detach()
    with pytest.warns(Sparse24Warning, match="no recipe trains it"):
        other.step()


class InTwo(torch.optim.SGD):
    """An optimizer inside which another one does the work."""

    def __init__(self, params, lr):
        params = list(params)
        super().__init__(params, lr)
        self.parts = [torch.optim.SGD([p], lr) for p in params]

    def step(self, closure=None):
        for part in self.parts:
            part.step()


@pytest.mark.fault(83)
def test_optimizers_inside_of_the_counted_one_are_no_other_ones():
    model, optimizer, recipe = prepared(lambda weights: InTwo(weights, 0.1))
    train(model, optimizer, 3)
    assert recipe.step == 3 and sparse24.verify(model)


class Own(torch.optim.SGD):
    def second_step(self):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.1 * p.grad)


@pytest.mark.fault(83)
def test_a_wrapper_that_steps_without_the_counted_step_is_named():
    model, optimizer, recipe = prepared(lambda weights: Own(weights, 0.1))
    loss_of(model).backward()
    with pytest.warns(Sparse24Warning, match=r"second_step\(\) of Own has moved the weights.*not counted"):
        optimizer.second_step()
    optimizer.second_step()
    assert recipe.step == 0 and sparse24.verify(model)


class Deep(nn.Sequential):
    def __init__(self):
        super().__init__(*(MLP() for _ in range(3)))


@pytest.mark.fault(83)
@pytest.mark.parametrize("mode", [True, False])
def test_a_write_into_one_layer_is_found_after_as_many_evaluations_as_there_are_layers(mode):
    torch.manual_seed(0)
    model = Deep().train(mode)
    sparse24.sparsify(model)
    layers = sparse_layers(model)
    evaluated(model)
    for name, layer in layers.items():
        layer.weight.data.mul_(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Sparse24Warning)
            for _ in layers:
                evaluated(model)
        assert sparse24.verify(model), name


def test_an_evaluation_compares_two_layers_in_a_pass():
    model = Deep()
    sparse24.sparsify(model)
    layers = list(sparse_layers(model).values())
    lookout = state_of(layers[0]).lookout
    for _ in range(3):
        seen = [[la for la in layers if lookout.has_turn(la, False)] for _ in range(len(layers) - 1)]
    assert all(first is layers[0] and len(rest) == 1 for first, *rest in seen)
    assert {id(rest[0]) for _, *rest in seen} == set(map(id, layers[1:]))


def test_a_training_without_a_recipe_seldom_waits_for_the_device(monkeypatch):
    """Each comparison does: in the first two passes, and in every 16th."""
    model = Deep()
    sparse24.sparsify(model)
    compared = []
    monkeypatch.setattr(unseen, "first_rows_are_packed", lambda layer: compared.append(id(layer)) or True)
    looks = []
    for _ in range(6 * EVERY):
        compared.clear()
        model(X).sum().backward()
        looks.append(tuple(compared))
    layers = [id(layer) for layer in sparse_layers(model).values()]
    begins, *rest = looks
    when = [i for i, found in enumerate(rest, 1) if found]
    assert begins == tuple(layers), "all of them in the pass that begins it"
    assert when == [1, *range(EVERY - 1, 6 * EVERY, EVERY)]
    assert all(found[0] == layers[0] and len(found) == 2 for found in rest if found)
    assert {found[1] for found in rest if found} == set(layers[1:])


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    "when", ["before a recipe", "under a recipe, before its first step", "after a pass, without a recipe"]
)
def test_weights_initialised_by_data_after_the_conversion_are_packed_in_the_next_training_pass(when):
    torch.manual_seed(0)
    model = MLP()
    sparse24.sparsify(model)
    if when.startswith("under"):
        recipe = Recipe(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=20)
        assert recipe.step == 0
    if when.startswith("after"):
        model(X)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Sparse24Warning)
        assert_right(model, model(X))


@pytest.mark.fault(83)
@pytest.mark.parametrize("make_layer", [lambda: sparse24.SparseLinear(16, 16), lambda: sparse24.SparseGatedMLP(16, 64)])
def test_a_layer_that_stands_alone_looks_for_itself(make_layer):
    layer = make_layer()
    evaluated(layer)
    evaluated(layer)
    for parameter in layer.parameters():
        parameter.data.mul_(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Sparse24Warning)
        evaluated(layer)
    assert sparse24.verify(layer)


@pytest.mark.fault(83)
@pytest.mark.parametrize("write", ["by data", "in place"])
def test_a_compiled_evaluation_looks_when_eval_is_called_and_not_otherwise(write):
    """The boundary: compiled passes multiply with what was packed last. `eval`, `train` and `refresh` look."""
    model, optimizer, _ = prepared()
    compiled = torch.compile(model, backend="eager")
    train(model, optimizer, 1, forward=compiled)
    before = evaluated(compiled)
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.data if write == "by data" else parameter).mul_(2)
    biases_alone = evaluated(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Sparse24Warning)
        compiled.eval()
        assert_right(model, evaluated(compiled))
    assert not torch.allclose(biases_alone, evaluated(compiled), atol=1e-3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    sparse24.refresh(model)
    torch.testing.assert_close(evaluated(compiled), before)


@pytest.mark.fault(83)
@pytest.mark.parametrize("whose", ["a model without a recipe", "a copy", "a model whose recipe was detached"])
def test_a_compiled_training_without_a_recipe_is_packed_after_each_step_and_told_of(whose):
    model, optimizer, recipe = prepared()
    train(model, optimizer, 2)
    if whose == "a copy":
        model = copy.deepcopy(model)
    elif whose.startswith("a model without"):
        model = MLP()
        sparse24.sparsify(model, mvue=False)
    else:
        recipe.detach()
    compiled = torch.compile(model, backend="eager")
    other = torch.optim.SGD(model.parameters(), 0.5)
    with pytest.warns(Sparse24Warning, match="no recipe trains it"):
        train(model, other, 3, forward=compiled)
    assert_right(model, evaluated(compiled))


@pytest.mark.fault(83)
def test_weights_made_in_inference_mode_are_looked_at_too():
    with torch.inference_mode():
        model = MLP()
        sparse24.sparsify(model)
        model(X)
        model.fc1.weight.mul_(2)
        with pytest.warns(Sparse24Warning, match="no recipe trains it"):
            y = model(X)
        assert sparse24.verify(model)
        torch.testing.assert_close(y, model(X))
