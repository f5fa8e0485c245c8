"""Whatever moves weights besides `optimizer.step()`: SAM, Lookahead, Schedule-Free, a second optimizer, processes."""

import copy
import warnings
from collections import OrderedDict, defaultdict

import pytest
import torch
from rounding import MANY_SUMS
from tiny_models import MLP
from tiny_recipes import kept, loss_of, make, run
from torch import nn

import sparse24
from sparse24 import Recipe, Sparse24Error, Sparse24Warning


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        yield


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is commonly written: a step up, another gradient, back, a base step."""

    def __init__(self, params, base=torch.optim.SGD, rho=0.05, **settings):
        super().__init__(params, dict(rho=rho, **settings))
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self.parameters()]).norm()
        for p in self.parameters():
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.defaults["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.parameters():
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step()
        closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer and does not call Optimizer.__init__, as common implementations do."""

    def __init__(self, base, alpha=0.5, k=3, by_data=False):
        self.by_data = by_data
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer, self.alpha, self.k, self.taken = base, alpha, k, 0
        self.param_groups, self.state, self.defaults = base.param_groups, defaultdict(dict), dict(base.defaults)
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = self._base_optimizer.step(closure)
        self.taken += 1
        if self.taken % self.k == 0:
            for p, slow in self.slow.items():
                (p.data if self.by_data else p).copy_(slow.lerp_(p, self.alpha))
        return loss


class ScheduleFree(torch.optim.SGD):
    """SGD whose `eval` puts an average of its iterates in the weights' place; `train` takes it out again."""

    by_data = False  # as pytorch_optimizer's, whose writes no version shows

    def swap(self):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", p.detach().clone())
                with torch.no_grad():
                    kept = p.clone()
                    (p.data if self.by_data else p).copy_(average)
                    average.copy_(kept)

    def eval(self):
        self.swap()

    def train(self):
        self.swap()


def prepared(make_optimizer, **settings):
    torch.manual_seed(0)
    model = MLP()
    sparse24.sparsify(model, mvue=False)
    optimizer = make_optimizer(model.parameters())
    return model, optimizer, Recipe(model, optimizer, **(dict(total_steps=24, mask_interval=4, decay=0.01) | settings))


@pytest.mark.fault(83)
@pytest.mark.parametrize("closure", [False, True])
def test_sam_is_one_step_with_the_weights_of_each_pass(closure):
    model, optimizer, recipe = prepared(lambda parameters: SAM(parameters, lr=0.1))
    losses, passes = [], []

    def backward(step):
        packed = sparse24.verify(model)
        passes.append(bool(packed))
        loss = loss_of(model, step % 2)
        loss.backward()
        return loss

    for step in range(12):
        losses.append(backward(step).item())
        if closure:
            optimizer.step(lambda step=step: backward(step))
        else:
            optimizer.first_step()
            backward(step)
            optimizer.second_step()
        optimizer.zero_grad()
    assert recipe.step == 12 and recipe.last_search == 12 and all(passes) and len(passes) == 24
    assert losses[-1] < losses[1] and sparse24.verify(model)


@pytest.mark.fault(83)
def test_sam_decays_the_second_gradient_at_the_weights_that_are_trained():
    model, optimizer, recipe = prepared(lambda parameters: SAM(parameters, lr=0.0), decay=1.0)
    weight, mask = model.fc1.weight.detach().clone(), kept(model.fc1)
    loss_of(model).backward()
    optimizer.first_step()
    model.fc1.weight.grad = torch.zeros_like(weight)
    optimizer.second_step()
    torch.testing.assert_close(model.fc1.weight.grad, torch.where(mask, 0, weight))


@pytest.mark.fault(83)
@pytest.mark.parametrize("by_data", [False, True])
def test_lookahead_is_counted_and_packed_after_its_slow_step(by_data):
    model, optimizer, recipe = prepared(lambda ps: Lookahead(torch.optim.AdamW(ps, 1e-2), by_data=by_data))
    for step in range(12):
        assert sparse24.verify(model)
        loss_of(model, step).backward()
        optimizer.step()
        model.zero_grad()
    assert recipe.step == 12 and sparse24.verify(model)
    recipe.detach()
    assert "step" not in vars(optimizer)


@pytest.mark.fault(83)
@pytest.mark.parametrize("by_data", [False, True])
def test_schedule_free_evaluates_the_weights_of_eval(by_data):
    model, optimizer, recipe = prepared(lambda parameters: ScheduleFree(parameters, 0.1))
    optimizer.by_data = by_data
    for step in range(8):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for mode in (optimizer.eval, optimizer.train):
            mode()
            assert sparse24.verify(model)
    assert recipe.step == 8


@pytest.mark.fault(83)
def test_a_second_optimizer_is_packed_at_once_and_told_of_once():
    model, optimizer, recipe = make(mvue=False)
    run(model, optimizer, 1)
    other = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model).backward()
    with pytest.warns(
        Sparse24Warning, match=r"fc1, fc2 \(2 sparse layers\).*after step 1 of SGD.*does not hear"
    ) as caught:
        other.step()
    loss_of(model)
    assert len(caught) == 1 and "train with sparse24.Recipe" not in str(caught[0].message)
    assert sparse24.verify(model)
    other.step()
    loss_of(model)  # told of once
    assert sparse24.verify(model) and recipe.step == 1


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("out of memory")


@pytest.mark.fault(83, 106)
def test_after_a_counted_step_that_raised_another_optimizer_is_another_one_again():
    """Its steps would pass for parts of the one that never came to its end, and leave compiled passes behind."""
    model, optimizer, recipe = make(Failing, mvue=False)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 16)
    compiled(x).square().sum().backward()
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()
    other = torch.optim.SGD(model.parameters(), lr=5.0)
    with pytest.warns(Sparse24Warning, match=r"fc1, fc2 \(2 sparse layers\).*does not hear"):
        other.step()
    assert sparse24.verify(model) and recipe.step == 0
    torch.testing.assert_close(compiled(x), model(x), **MANY_SUMS)


@pytest.mark.fault(83)
def test_a_model_without_a_recipe_is_packed_and_told_of():
    model = MLP()
    sparse24.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss_of(model).backward()
    with pytest.warns(Sparse24Warning, match="no recipe trains it"):
        optimizer.step()
    loss_of(model)
    assert sparse24.verify(model)


@pytest.mark.fault(83)
def test_weights_in_shared_memory_are_packed_whenever_they_run():
    """Hogwild: other processes write them, and no version shows it."""
    model = MLP()
    sparse24.sparsify(model, mvue=False)
    model.share_memory()
    loss_of(model)
    for layer in (model.fc1, model.fc2):
        layer.weight.data.mul_(3)
    loss_of(model)
    assert sparse24.verify(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = Recipe(model, optimizer, total_steps=20, mask_interval=100)
    for step in range(3):
        (loss_of(model, step) + loss_of(model, step + 1)).backward()  # two forward passes in one graph
        optimizer.step()
        optimizer.zero_grad()
    assert recipe.step == 3 and sparse24.verify(model)


@pytest.mark.fault(83)
def test_an_optimizer_that_runs_no_hooks_is_refused_with_what_to_do():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups, self.state = [{"params": list(params)}], {}

        def step(self, closure=None):
            pass

    with pytest.raises(Sparse24Error, match=r"step\(\) of Bare runs no hooks.*super\(\).__init__"):
        prepared(Bare)
    with pytest.raises(Sparse24Error, match="empty list"):
        prepared(lambda parameters: [])


class Wrapper:
    """No optimizer itself, but with step() and .optimizer, as trainers have them."""

    def __init__(self, optimizer):
        self.optimizer, self.taken = optimizer, 0

    def step(self):
        self.optimizer.step()
        self.taken += 1


def test_a_copied_wrapper_knows_nothing_of_the_recipe():
    model, wrapper, recipe = prepared(lambda parameters: Wrapper(torch.optim.SGD(parameters, 0.1)))
    copied = copy.deepcopy(wrapper)
    copied.step()
    assert recipe.step == 0 and copied.taken == 1 and wrapper.taken == 0
    wrapper.step()
    assert recipe.step == 1 and wrapper.taken == 1


@pytest.mark.fault(87)
def test_the_same_optimizer_in_a_new_run_takes_the_old_recipe_over():
    model, optimizer, first = make(decay=1.0, lr=0.0)
    run(model, optimizer, 2)
    with pytest.raises(Sparse24Error, match="at step 2 of 12.*takeover=True"):
        Recipe(model, optimizer, total_steps=4)
    second = Recipe(model, optimizer, total_steps=4, decay=1.0, takeover=True)
    model.fc1.weight.grad = torch.zeros_like(model.fc1.weight)
    optimizer.step()
    torch.testing.assert_close(model.fc1.weight.grad, torch.where(kept(model.fc1), 0, model.fc1.weight))
    assert (first.step, second.step) == (2, 1)
    run(model, optimizer, 3)
    third = Recipe(model, optimizer, total_steps=4)  # the second is over
    run(model, optimizer, 1)
    assert (second.step, third.step) == (4, 1)


@pytest.mark.fault(85)
def test_computed_weights_are_refused_by_name():
    model = MLP()
    sparse24.sparsify(model)
    nn.utils.parametrizations.weight_norm(model.fc1)
    with pytest.raises(Sparse24Error, match="fc1.*weight_norm"):
        Recipe(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=4)


@pytest.mark.parametrize("converted", [True, False])
def test_mvue_is_as_converted_unless_the_recipe_says(converted):
    model = MLP()
    sparse24.sparsify(model, mvue=converted)
    Recipe(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=4)
    assert model.fc1.mvue is converted
    Recipe(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=4, mvue=not converted)
    assert model.fc1.mvue is not converted


def test_presets_are_defaults_that_arguments_replace():
    assert make(preset="equal-time", dense_fraction=None)[2].phases.sparse_until == 8
    assert make(preset="equal-time", dense_fraction=0.5)[2].phases.sparse_until == 6
    with pytest.raises(Sparse24Error, match="preset must be one of paper, equal-time"):
        make(preset="best")
