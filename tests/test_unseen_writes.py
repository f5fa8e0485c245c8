"""Writes through `.data`, which no version shows: averages that swap themselves into the model that is trained."""

import copy
import io
import warnings

import pytest
import torch
from masked_outputs import X, assert_right, evaluated, masked_output
from tiny_models import MLP
from tiny_recipes import make, run
from torch.utils.checkpoint import checkpoint

import sparse24
from sparse24 import Sparse24Warning
from sparse24.convert import sparse_layers
from sparse24.layers.state import PACKED, state_of
from sparse24.layers.watch import unseen


class SwappedAverage:
    """An exponential average of parameters, as diffusers' EMAModel and torch_ema keep it: beside the model."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(self.shadow, self.parameters, 0.5)

    def store(self):
        self.stored = [p.detach().clone() for p in self.parameters]

    def copy_to(self):
        for parameter, value in zip(self.parameters, self.shadow, strict=True):
            parameter.data.copy_(value.data)

    def restore(self):
        for parameter, value in zip(self.parameters, self.stored, strict=True):
            parameter.data.copy_(value.data)


def trained(**settings):
    model, optimizer, recipe = make(lr=1.0, dense_fraction=0, mask_interval=2, **settings)
    ema = SwappedAverage(model.parameters())
    for step in range(4):
        run(model, optimizer, 1, first=step)
        ema.update()
    return model, optimizer, recipe, ema


@pytest.mark.parametrize("how", ["eval()", "no_grad", "after another evaluation", "recipe detached"])
@pytest.mark.fault(83)
def test_an_average_swapped_in_by_data_is_evaluated_and_training_goes_on_after_it(how):
    model, optimizer, recipe, ema = trained()
    before = model(X).detach()
    if how == "after another evaluation":
        torch.testing.assert_close(evaluated(model), before)
    if how == "recipe detached":
        recipe.detach()
    ema.store()
    ema.copy_to()
    if how == "eval()":
        model.eval()
    with pytest.warns(Sparse24Warning, match="packed anew"):
        assert_right(model, evaluated(model))
    assert not torch.allclose(masked_output(model), before, atol=1e-3), "the average is another function"
    ema.restore()
    model.train()
    torch.testing.assert_close(model(X).detach(), before)
    run(model, optimizer, 2, first=4)
    sparse24.refresh(model) if how == "recipe detached" else None
    assert_right(model, model(X))


def test_all_layers_look_when_one_has_found_something():
    """The lookout is the first layer; a write into the second alone is found at the next change of mode."""
    model, _, _, ema = trained()
    evaluated(model)
    ema.copy_to()
    with pytest.warns(Sparse24Warning):
        evaluated(model)
    assert sparse24.verify(model)
    with torch.no_grad():
        model.fc2.weight.data.mul_(2)
    model.eval()
    assert_right(model, evaluated(model))


def test_a_swapped_average_of_s_ste():
    model, _, _, ema = trained(method="s-ste")
    evaluated(model)
    ema.copy_to()
    with pytest.warns(Sparse24Warning):
        output = evaluated(model)
    sparse24.refresh(model)
    torch.testing.assert_close(output, evaluated(model), rtol=0, atol=0)


def test_a_swapped_average_in_8_bits():
    torch.manual_seed(0)
    model = MLP(width=64, hidden=128)
    sparse24.sparsify(model, precision="fp8")
    x = torch.randn(8, 64)
    with torch.no_grad():
        model(x)
        for parameter in model.parameters():
            parameter.data.mul_(0.7)
        with pytest.warns(Sparse24Warning):
            output = model(x)
        sparse24.refresh(model)
        torch.testing.assert_close(output, model(x), rtol=0, atol=0)


def test_copies_and_pickles_look_for_themselves():
    for copied in (copy.deepcopy, lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False)):
        model, *_ = trained()
        other = copied(model)
        lookouts = {id(state_of(layer).lookout) for layer in sparse_layers(other).values()}
        assert len(lookouts) == 1 and lookouts.isdisjoint(
            id(state_of(la).lookout) for la in sparse_layers(model).values()
        )
        evaluated(other)
        for parameter in other.parameters():
            parameter.data.mul_(0.7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Sparse24Warning)
            assert_right(other, evaluated(other))


def saved(model) -> bytes:
    torch.save(model, buffer := io.BytesIO())
    return buffer.getvalue()


def test_training_steps_compare_nothing(monkeypatch):
    """Nor do steps with activation checkpointing, whose first pass has no gradients: it looks in the first step."""
    looked = []
    first_rows = unseen.first_rows_are_packed
    monkeypatch.setattr(unseen, "first_rows_are_packed", lambda la: looked.append(la) or first_rows(la))
    model, optimizer, _ = make()
    run(model, optimizer, 2)
    assert looked == [model.fc1, model.fc2] * 2, "for who initialises a converted model, or writes in every step"
    looked.clear()
    model.train()
    run(model, optimizer, 6)
    assert not looked
    for step in range(4):
        looked.clear()
        x = X.clone().requires_grad_()
        checkpoint(model, x, use_reentrant=True).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert bool(looked) == (step == 0)


def test_an_evaluation_compares_the_first_layer_in_each_pass_and_all_of_them_once(monkeypatch):
    looked = []
    first_rows = unseen.first_rows_are_packed
    monkeypatch.setattr(unseen, "first_rows_are_packed", lambda la: looked.append(la) or first_rows(la))
    model, *_ = trained()
    looked.clear()
    for _ in range(3):
        evaluated(model)
    assert looked == [model.fc1, model.fc2] * 3  # the first, and of the others one in turn
    looked.clear()
    model(X)
    assert looked == [model.fc1, model.fc2], "training begins: somebody may have swapped back"
    looked.clear()
    model(X)
    assert not looked


def test_the_first_rows_are_enough_to_see_a_change_of_the_packed_form():
    model, *_ = trained()
    layer = model.fc1
    assert unseen.first_rows_are_packed(layer)
    layer._buffers[PACKED][0, 0] += 1
    assert not unseen.first_rows_are_packed(layer)
