"""Recipe in CUDA graphs: which steps may be captured, and that replays are counted."""

import pytest
import torch
from tiny_recipes import make, run

import sparse24
from sparse24.errors import Sparse24Error


class Graph:
    """Stands for torch.cuda.CUDAGraph: its replay does what was captured."""

    def __init__(self, replay):
        self.replay = replay


@pytest.fixture
def capture(monkeypatch):
    """capture(step): run `step` as in a capture; returns the graph."""

    def run_captured(step):
        monkeypatch.setattr(sparse24.recipe.hooks, "is_capturing", lambda: True)
        try:
            step()
        finally:
            monkeypatch.undo()

    return run_captured


@pytest.mark.fault(35)
def test_captured_steps_are_counted_by_replay_and_refused_otherwise(capture):
    model, optimizer, recipe = make(lr=0.05, decay=0.1, total_steps=8, mask_interval=2, mvue=False)
    twin, twin_optimizer, twin_recipe = make(lr=0.05, decay=0.1, total_steps=8, mask_interval=2, mvue=False)
    step = lambda: run(model, optimizer, 1, recipe.step)  # noqa: E731
    with pytest.raises(Sparse24Error, match="could not count; capture under `with recipe.capturing"):
        capture(lambda: (model(torch.ones(4, 16)).sum() * 0).backward() or optimizer.step())
    with pytest.raises(Sparse24Error, match="no step has been captured"):
        recipe.replay(Graph(step))
    assert torch.equal(model.fc1.weight, twin.fc1.weight) and not model.fc1.weight.grad.any()
    optimizer.zero_grad()
    with recipe.capturing():
        capture(optimizer.step)  # no gradients: nothing moves
    assert recipe.step == 0
    graph = Graph(lambda: capture_free(step, recipe))
    for _ in range(6):
        recipe.replay(graph)
        run(twin, twin_optimizer, 1, twin_recipe.step)
        assert recipe.step == twin_recipe.step and torch.equal(model.fc1.weight, twin.fc1.weight)
        assert torch.equal(model.fc1.mask, twin.fc1.mask) and sparse24.verify(model)
    assert recipe.phase == "dense" and recipe.monitor.history() == twin_recipe.monitor.history()
    with pytest.raises(Sparse24Error, match="step of the sparse phase with decay 0.1, the next step is dense"):
        recipe.replay(graph)


def capture_free(step, recipe):
    """One replay: the kernels of the step, its packing included, and none of what the recipe does on the host."""
    finish, recipe._steps.finish = recipe._steps.finish, lambda step: None
    try:
        step()
        for layer in recipe.layers.values():
            layer._repack()
    finally:
        recipe._steps.finish = finish


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(method="sr-ste"), "a step of method='sr-ste' cannot be captured"),
        (dict(decay_schedule="cosine"), "decay_schedule='cosine' changes the decay at each step"),
    ],
)
def test_steps_that_a_graph_cannot_hold_are_not_captured(settings, words):
    *_, recipe = make(**settings)
    with pytest.raises(Sparse24Error, match=words), recipe.capturing():
        pass
