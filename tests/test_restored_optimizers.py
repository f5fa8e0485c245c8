"""An optimizer whose state is put back, or made by somebody else's step, while it has a recipe."""

import copy
import warnings

import pytest
import torch
from tiny_recipes import loss_of, make, run
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import sparse24


def search_for_a_rate(model, optimizer, recipe, *, whole):
    """Trains at rising rates and puts everything back; the recipe too, if `whole`."""
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), recipe.state_dict()))
    for step in range(3):
        optimizer.param_groups[0]["lr"] *= 2
        run(model, optimizer, 1, first=20 + step)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if whole:
        recipe.load_state_dict(saved[2])


@pytest.mark.fault(108)
def test_a_search_that_puts_back_the_recipe_too_leaves_no_trace():
    """Also one that puts it back before the optimizer."""
    settings = dict(opt=dict(weight_decay=0.1), decay=0.1)
    plain, optimizer, recipe = make(torch.optim.AdamW, 1e-2, **settings)
    run(plain, optimizer, 7)
    model, optimizer, again = make(torch.optim.AdamW, 1e-2, **settings)
    run(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sparse24.Sparse24Warning)
        search_for_a_rate(model, optimizer, again, whole=True)
        again.load_state_dict(again.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        run(model, optimizer, 4, first=3)
    assert again.step == recipe.step and all(map(torch.equal, plain.parameters(), model.parameters()))


@pytest.mark.fault(108)
@pytest.mark.filterwarnings("ignore:the weights of fc1, fc2")  # of the masks, at the next forward pass
def test_a_search_that_forgets_the_recipe_is_told_so():
    model, optimizer, recipe = make(torch.optim.AdamW, 1e-2)
    run(model, optimizer, 1)
    search_for_a_rate(model, optimizer, recipe, whole=False)
    words = r"after step 4 of this recipe, which was not.*recipe\.load_state_dict\(state\)"
    with pytest.warns(sparse24.Sparse24Warning, match=words):
        run(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sparse24.Sparse24Warning)
        run(model, optimizer, 1)
    assert recipe.step == 6


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.fault(108)
def test_the_step_by_which_torch_makes_an_optimizers_state_counts_nothing(kind):
    """torch.distributed.checkpoint takes one where there is no state: on gradients of 0, at a rate of 0."""
    model, optimizer, recipe = make(kind, 1e-2, decay=0.5)
    get_optimizer_state_dict(model, optimizer)
    assert recipe.step == 0 and sparse24.verify(model)
    assert not any(state["exp_avg"].any() for state in optimizer.state.values()), "no decay is in it"
    run(model, optimizer, 5)
    moments, state = copy.deepcopy(get_optimizer_state_dict(model, optimizer)), recipe.state_dict()
    other, its_optimizer, resumed = make(kind, 1e-2, decay=0.5)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    set_optimizer_state_dict(other, its_optimizer, moments)
    assert resumed.step == 5
    for pair in ((model, optimizer), (other, its_optimizer)):
        torch.set_rng_state(state["rng"]["cpu"])
        run(*pair, 3, first=5)
    assert resumed.step == recipe.step == 8 and all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_first_step_at_a_rate_of_zero_counts():
    """Warm-ups begin with it."""
    model, optimizer, recipe = make(torch.optim.AdamW, 0.0, decay=0.5)
    loss_of(model).backward()
    optimizer.step()
    assert recipe.step == 1
