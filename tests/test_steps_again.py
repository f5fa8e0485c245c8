"""Steps that fail, are interrupted, or run again on gradients of before: each decays once, and is counted once."""

import warnings

import pytest
import torch
from tiny_models import MLP
from tiny_recipes import kept, loss_of, make, run

import sparse24

IMPLEMENTATIONS = [dict(foreach=False), dict(foreach=True), dict(fused=True)]


class Failure(Exception):
    """Raised once by a test, where a step may be stopped."""


def fail_once(register):
    """By a hook of an optimizer."""

    def fail(*_):
        handle.remove()
        raise Failure

    handle = register(fail)


def decay_of(layer, factor):
    return factor * torch.where(kept(layer), 0, layer.weight.detach())


@pytest.mark.fault(106)
@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_gradient_that_is_stepped_twice_has_its_decay_once(kind, options):
    """As a dense optimizer takes two steps along one gradient. The decay is that of the first, as the gradient is."""
    model, optimizer, recipe = make(kind, 0.01, opt=options, decay=0.5, mvue=False)
    loss_of(model).backward()
    layer = model.fc1
    expected = layer.weight.grad + decay_of(layer, 0.5)
    with pytest.warns(sparse24.Sparse24Warning, match="runs again on the gradients of fc1, fc2") as seen:
        for _ in range(3):
            optimizer.step()
            assert torch.equal(layer.weight.grad, expected)
    assert recipe.step == 3 and len(seen) == 1 and sparse24.verify(model)


@pytest.mark.fault(106)
@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("to_none", [True, False])
def test_new_gradients_get_their_decay_wherever_they_are_written(options, to_none):
    """Also in the memory of those before: zeroed and added to, copied, clipped."""
    model, optimizer, recipe = make(torch.optim.SGD, 0.0, opt=options, decay=0.5, mvue=False)
    decay = decay_of(model.fc1, 0.5)
    for step in range(3):
        optimizer.zero_grad(set_to_none=to_none)
        loss_of(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        gradient = model.fc1.weight.grad.clone()
        optimizer.step()
        assert torch.equal(model.fc1.weight.grad, gradient + decay)
    for write in (torch.Tensor.copy_, lambda old, new: torch._foreach_copy_([old], [new])):
        with torch.no_grad():
            for p in model.parameters():
                write(p.grad, torch.ones_like(p))
        optimizer.step()
        assert torch.equal(model.fc1.weight.grad, 1 + decay)


@pytest.mark.fault(106)
@pytest.mark.parametrize("where", ["before the decay", "after the decay"])
@pytest.mark.parametrize("kind, method", [("SGD", "fst"), ("AdamW", "fst"), ("SGD", "sr-ste"), ("AdamW", "step")])
def test_a_step_that_fails_and_is_tried_again_is_one_step(kind, method, where):
    """Weights, decay and count are those of a run without the failure."""

    def trained(fails):
        model, optimizer, recipe = make(made, 0.05, decay=0.5, mvue=False, method=method)
        run(model, optimizer, 4)
        loss_of(model, 4).backward()
        if fails:
            early.append(True) if where == "before the decay" else fail_once(optimizer.register_step_pre_hook)
            with pytest.raises(Failure):
                optimizer.step()
            assert recipe.state_dict()["step"] == 4
        optimizer.step()
        optimizer.zero_grad()
        run(model, optimizer, 3, first=5)
        assert recipe.step == 8 and sparse24.verify(model)
        return model

    early = []  # what a hook that is registered before the recipe's does

    def first(*_):
        if early:
            early.clear()
            raise Failure

    def made(params, lr):
        optimizer = getattr(torch.optim, kind)(params, lr)
        optimizer.register_step_pre_hook(first)
        return optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("error", sparse24.Sparse24Warning)
        models = [trained(fails) for fails in (False, True)]
    assert all(map(torch.equal, *(model.parameters() for model in models)))


@pytest.mark.fault(106)
def test_a_batch_that_is_given_up_after_a_failing_step_leaves_no_decay_behind():
    """The next batch has gradients of its own, which get theirs."""
    model, optimizer, recipe = make(torch.optim.SGD, 0.0, decay=0.5, mvue=False)
    fail_once(optimizer.register_step_pre_hook)
    loss_of(model, 0).backward()
    with pytest.raises(Failure):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    expected = model.fc1.weight.grad + decay_of(model.fc1, 0.5)
    optimizer.step()
    assert torch.equal(model.fc1.weight.grad, expected) and recipe.step == 1


@pytest.mark.gpu
@pytest.mark.fault(35, 106)
def test_gradients_that_a_graph_writes_get_their_decay_at_each_replay():
    """A replay raises no version: nothing tells its gradient from that of the step before."""
    torch.manual_seed(0)
    model = MLP(64, 128).cuda().bfloat16()
    sparse24.sparsify(model, backend="sparse")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    recipe = sparse24.Recipe(model, optimizer, 10, decay=0.5, dense_fraction=0, mvue=False)
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)

    def make_gradients():
        (model(x) - x).square().mean().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        make_gradients()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in model.parameters():
            p.grad = None
        make_gradients()
    for step in range(3):
        x.copy_(torch.randn(64, 64, generator=torch.Generator().manual_seed(step)))
        graph.replay()
        before = model.fc1.weight.grad.float()
        optimizer.step()
        exact = before + decay_of(model.fc1, 0.5).float()
        assert torch.equal(model.fc1.weight.grad, exact.bfloat16())
    assert recipe.step == 3


# -- between the optimizer's step and the recipe's part -------------------------------------------------------------


class Momentum(torch.optim.Optimizer):
    """Somebody's, that writes through `.data`: its weights show no version."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["momentum"] = 0.9 * state.get("momentum", 0) + p.grad
                state["taken"] = state.get("taken", 0) + 1
                p.data.sub_(state["momentum"], alpha=group["lr"])


@pytest.mark.fault(62)
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("step", [5, 9], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    "kind, options",
    [
        *((kind, options) for kind in (torch.optim.SGD, torch.optim.AdamW) for options in IMPLEMENTATIONS),
        (Momentum, {}),
    ],
)
def test_an_interrupt_behind_the_optimizers_step_loses_no_count(kind, options, step, saves):
    """Ctrl-C between the optimizer's step and the recipe's hook, in both phases: the step counts, saved or gone on."""
    interrupted = []

    def interrupt(*_):
        if interrupted:
            interrupted.clear()
            raise KeyboardInterrupt

    def made(params, lr):
        optimizer = kind(params, lr, **options)
        optimizer.register_step_post_hook(interrupt)
        return optimizer

    model, optimizer, recipe = make(made, 0.01, mvue=False)
    run(model, optimizer, step)
    interrupted.append(True)
    with pytest.raises(KeyboardInterrupt):
        run(model, optimizer, 1, first=step)
    optimizer.zero_grad()
    if saves:
        assert recipe.state_dict()["step"] == recipe.step == step + 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the weights of fc1, fc2")  # the forward pass packs them first, and says so
        run(model, optimizer, 2, first=step + 1)
    assert recipe.step == step + 3 and sparse24.verify(model)


@pytest.mark.fault(106)
@pytest.mark.parametrize("step", [0, 5, 9], ids=["first", "sparse", "dense"])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_that_fails_half_way_counts_once_it_is_tried_again(monkeypatch, step, foreach):
    """By then the optimizer has applied its weight decay, to some weights or to all, as it would have to dense ones."""
    opt = dict(foreach=foreach, weight_decay=0.1)
    model, optimizer, recipe = make(torch.optim.AdamW, 0.01, opt=opt, mvue=False)
    run(model, optimizer, step)
    loss_of(model, step).backward()

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "_foreach_lerp_", out_of_memory)
    monkeypatch.setattr(torch.Tensor, "lerp_", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    assert recipe.step == step + 1 and sparse24.verify(model)


@pytest.mark.fault(62)
def test_a_state_that_a_hook_of_the_same_step_asks_for_is_of_the_whole_step_and_counts_it_once():
    """Registered before the recipe, the hook runs between the optimizer's step and the recipe's part."""
    states = []

    def made(params, lr):
        optimizer = torch.optim.AdamW(params, lr)
        optimizer.register_step_post_hook(lambda *_: states.append(recipe.state_dict()["step"]))
        return optimizer

    model, optimizer, recipe = make(made, 0.01, mvue=False)
    run(model, optimizer, 11)
    assert states == [*range(1, 12)] and recipe.step == 11 and sparse24.verify(model)


@pytest.mark.fault(62)
@pytest.mark.parametrize("step", [5, 9], ids=["sparse", "dense"])
def test_an_interrupt_before_the_optimizers_step_counts_nothing(step):
    model, optimizer, recipe = make(torch.optim.AdamW, 0.01, model=MLP(), mvue=False)
    run(model, optimizer, step)
    fail_once(optimizer.register_step_pre_hook)
    with pytest.raises(Failure):
        run(model, optimizer, 1, first=step)
    assert recipe.state_dict()["step"] == step
    optimizer.zero_grad()
    run(model, optimizer, 2, first=step)
    assert recipe.step == step + 2
