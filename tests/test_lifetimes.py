"""What a recipe holds is let go when it ends; what is made in a caller's inference mode can be used outside of it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny_models import MLP
from tiny_recipes import loss_of, make, run

import sparse24


@pytest.mark.fault(103)
def test_a_detached_recipe_frees_model_and_optimizer_without_the_garbage_collector():
    make()  # torch holds the first optimizer of a process, in the frames of an import
    gc.collect()
    gc.disable()
    try:
        model, optimizer, recipe = make()
        run(model, optimizer, 2)
        recipe.detach()
        held = [weakref.ref(one) for one in (recipe, optimizer, *model.modules(), *model.parameters())]
        del model, optimizer, recipe
        assert [ref() for ref in held if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.fault(103)
def test_a_recipe_that_is_dropped_trains_on_and_goes_with_its_optimizer():
    """Hooks of the optimizer hold it, and it holds the optimizer: the garbage collector frees both."""
    make()  # as above
    model, optimizer, recipe = make()
    steps = recipe._steps
    del recipe
    run(model, optimizer, 2)
    assert steps.taken == 2
    held = [weakref.ref(one) for one in (optimizer, *model.modules(), *model.parameters())]
    del model, optimizer, steps
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []


class Wrapper:
    """An optimizer around another, without hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        self.optimizer.step()


@pytest.mark.fault(56)
def test_a_wrapper_under_a_recipe_is_pickled_with_its_own_methods():
    model = MLP()
    sparse24.sparsify(model)
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), 0.1))
    sparse24.Recipe(model, wrapper, 4)
    for other in (pickle.loads(pickle.dumps(wrapper)), copy.deepcopy(wrapper)):
        assert other.step.__func__ is Wrapper.step and other.step.__self__ is other


@pytest.mark.fault(50)
@pytest.mark.parametrize("method", ["fst", "s-ste"])
def test_a_recipe_that_is_made_or_loaded_in_inference_mode_trains_outside_of_it(method):
    def trained(inside: bool):
        torch.manual_seed(0)
        model = MLP()
        sparse24.sparsify(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.inference_mode(inside):
            recipe = sparse24.Recipe(model, optimizer, 12, mask_interval=2, method=method, mvue=False)
        run(model, optimizer, 5)
        with torch.inference_mode(inside):
            recipe.load_state_dict(recipe.state_dict())
            sparse24.follow(copy.deepcopy(model), like=model)
            sparse24.refresh(model)
            recipe.decay = 0.5
        run(model, optimizer, 5, first=5)
        return model

    plain, inside = trained(False), trained(True)
    assert all(map(torch.equal, plain.parameters(), inside.parameters()))


@pytest.mark.fault(50)
def test_masks_that_are_loaded_in_inference_mode_can_be_trained():
    model, optimizer, recipe = make(method="s-ste", mvue=False)
    run(model, optimizer, 2)
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        sparse24.load_masks(copied, recipe.state_dict())
        sparse24.refresh(copied)
    loss_of(copied).backward()
    assert all(p.grad is not None for p in copied.parameters())
