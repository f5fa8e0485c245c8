"""States of a recipe with anything in any place: taken whole, or refused by name with nothing changed."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from fuzzing import JUNK, everything, places
from tiny_models import MLP

import sparse24
from sparse24 import Recipe, Sparse24Error


def trained(method):
    torch.manual_seed(0)
    model = MLP()
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    settings = dict(total_steps=8, mask_interval=2, dense_fraction=0.25, track_blocks=method == "fst")
    settings["mvue"] = "auto" if method == "fst" else None
    recipe = Recipe(model, optimizer, method=method, **settings)
    for _ in range(5):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, recipe


@pytest.mark.fault(47)
@pytest.mark.parametrize("method", ["fst", "step", "s-ste"])
def test_a_state_with_anything_in_any_place_is_refused_or_taken_whole(method):
    """Every place of a valid state, with every piece of junk in it, with a cut tensor, or gone."""
    model, _, recipe = trained(method)
    good = recipe.state_dict()
    before = everything(model, recipe)
    taken = 0
    for path in places(good):
        for junk in (*JUNK, "cut", "cast"):
            state = copy.deepcopy(good)
            holder = functools.reduce(lambda part, key: part[key], path[:-1], state)
            old = holder[path[-1]]
            if junk in ("cut", "cast") and isinstance(junk, str):
                if not isinstance(old, torch.Tensor) or not old.numel():
                    continue
                holder[path[-1]] = old.flatten()[:-1] if junk == "cut" else old.to(torch.float16)
            elif junk is ...:
                del holder[path[-1]]
            else:
                holder[path[-1]] = junk
            try:
                recipe.load_state_dict(state)
            except Sparse24Error as error:
                assert len(str(error)) > 20
                assert everything(model, recipe) == before, f"{path} = {junk!r} was refused, and something changed"
            else:
                taken += 1
                recipe.load_state_dict(good)
                assert everything(model, recipe) == before, f"{path} = {junk!r} was taken and could not be undone"
    assert taken < 60  # what is taken means something: another step of the same phase, another decay, no history
