"""A model in training, in random order, beside a plain twin: the part of `test_state_machine` that knows no copies.

After each step every live model computes what its plain masked-dense twin computes.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from plain_twin import Plan, Twin, as_good, make_net
from rounding import MANY_SUMS
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sparse24
from sparse24 import Sparse24Error, Sparse24Warning, ops
from sparse24.convert import sparse_layers

LR, DECAY = 0.1, 0.05
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))

seeds, indices = st.integers(0, 2**31 - 1), st.integers(0, 11)


def assert_close(ours, expected) -> None:
    """As torch.testing.assert_close, which takes longer than what it compares. Where the twin has NaN, so have we."""
    tolerances = MANY_SUMS | dict(equal_nan=True)
    if ours.dtype != expected.dtype or ours.shape != expected.shape or not torch.allclose(ours, expected, **tolerances):
        torch.testing.assert_close(ours, expected, **tolerances)


class Live:
    """A model and its twin. `origin`: the one that it was copied from, as long as it is there."""

    def __init__(self, model, twin, origin=None, *, follows=False, mask_is_state=True):
        self.model, self.twin, self.origin = model, twin, origin
        self.follows = follows  # its weights are written: it runs under the masks that the origin has now
        self.mask_is_state = mask_is_state
        self.dense = False  # no layer of sparse24 is left in it

    @property
    def net(self):
        return self.model.module if isinstance(self.model, AveragedModel) else self.model

    def written(self):
        """Weights have been put in: those of a copy run under the origin's masks."""
        if self.origin is not None and not self.dense:
            self.follows = True


class TrainingMachine(RuleBasedStateMachine):
    """The model in training is `main`; `copies` are others, newest last, which rules of a subclass make."""

    steps = 0  # of all runs

    @initialize(
        seed=seeds, interval=st.integers(1, 5), total=st.integers(4, 30), dense_fraction=st.sampled_from([0.0, 0.25])
    )
    def begin(self, seed, interval, total, dense_fraction):
        torch.manual_seed(seed)
        self.settings = dict(total=total, interval=interval, dense_fraction=dense_fraction)
        net = make_net()
        sparse24.sparsify(net, mvue=False, fuse=seed % 3 > 0)
        self.copies: list[Live] = []
        self.saves: list[tuple] = []
        self.forward_as, self.copies_rest = "eval", False
        self.train_with_a_new_recipe(Live(net, Twin(net.state_dict())))

    # -- the model in training --------------------------------------------------------------------------------------

    def train_with_a_new_recipe(self, live: Live) -> None:
        total, interval, fraction = self.settings["total"], self.settings["interval"], self.settings["dense_fraction"]
        self.optimizer = torch.optim.SGD(live.net.parameters(), LR)
        self.recipe = sparse24.Recipe(live.net, self.optimizer, total, DECAY, interval, fraction, mvue=False)
        self.plan, self.main = Plan(total, fraction, interval), live
        live.twin.search()
        live.twin.phase, live.origin, live.follows, live.mask_is_state = self.plan.phase(), None, False, False

    @rule(seed=seeds)
    def train(self, seed):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        loss = nn.functional.mse_loss(self.main.net(x), x.flip(-1))
        if not loss < 10:
            return  # what was written into the weights has made SGD diverge: both would be NaN in a few steps
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.main.twin.train(x, LR, DECAY)
        self.sync(self.main)
        self.plan.finish_step(self.main.twin)
        assert self.recipe.step == self.plan.step and self.recipe.phase == self.plan.phase()
        self.main.mask_is_state |= self.plan.phase() == "sparse"

    @rule()
    def another_recipe(self):
        self.recipe.detach()
        self.train_with_a_new_recipe(self.main)

    @rule(frozen=st.booleans())
    def freeze_masks(self, frozen):
        self.recipe.freeze_masks() if frozen else self.recipe.unfreeze_masks()
        self.plan.frozen = frozen

    @rule(seed=seeds)
    def write_into_the_model(self, seed):
        self.write(self.main, seed)
        sparse24.refresh(self.main.net)

    @rule(index=indices, seed=seeds)
    def swap_weights_in_and_out_by_data(self, index, seed):
        """As averages do that have no model of their own: no version shows it, an evaluation finds it."""
        live = self.some(index)
        if live.origin is not None:
            return
        g, kept = torch.Generator().manual_seed(seed), live.twin.weights
        swapped = {name: weight + 0.3 * torch.randn(weight.shape, generator=g) for name, weight in kept.items()}
        for weights in (swapped, kept):
            for name, parameter in live.net.named_parameters():
                parameter.data.copy_(weights[name])
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", Sparse24Warning)
                assert_close(live.model(X), live.twin(X, weights))

    @rule(mode=st.sampled_from(["eval", "train", "train with grad"]))
    def forward_from_here_on(self, mode):
        self.forward_as = mode

    @rule(rest=st.booleans())
    def let_copies_rest(self, rest):
        """Copies that are not run still have to be what they would be, when they are read, copied or left alone."""
        self.copies_rest = rest

    @rule()
    def search_by_hand(self):
        sparse24.refresh(self.main.net, search=True)
        self.main.twin.search()

    @rule(key=st.sampled_from(["masks", "step", "monitor"]))
    def a_damaged_state_is_refused(self, key):
        state = self.recipe.state_dict()
        state.pop(key)
        with pytest.raises(Sparse24Error, match=f"lacks {key}"):
            self.recipe.load_state_dict(state)

    # -- what holds -------------------------------------------------------------------------------------------------

    def keep(self, live: Live) -> None:
        self.copies = [*self.copies[-3:], live]

    def some(self, index: int) -> Live:
        return [self.main, *self.copies][index % (1 + len(self.copies))]

    def write(self, live: Live, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in live.net.named_parameters():
                noise = 0.05 * torch.randn(parameter.shape, generator=g)
                parameter.add_(noise)
                live.twin.weights[name] = live.twin.weights[name] + noise

    def sync(self, live: Live) -> None:
        """The weights are as they should be; take their last bits over, or rounding would add up."""
        for name, weight in live.net.state_dict().items():
            assert_close(weight, live.twin.weights[name])
            live.twin.weights[name] = weight.clone()

    def follow_if_it_should(self, live: Live) -> None:
        if live.follows and live.origin is not None:
            live.twin.follow(live.origin.twin)

    @invariant()
    def every_copy_computes_what_its_twin_computes(self):
        if not hasattr(self, "main"):
            return
        TrainingMachine.steps += 1
        for live in (self.main, *(() if self.copies_rest else self.copies)):
            self.sync(live)
            self.follow_if_it_should(live)
            live.model.train(self.forward_as != "eval")  # averages are evaluated in any of these
            with torch.set_grad_enabled(self.forward_as == "train with grad"), warnings.catch_warnings():
                warnings.simplefilter("error", Sparse24Warning)
                warnings.filterwarnings("ignore", message=".*flip rate", category=Sparse24Warning)
                out = live.model(X)
            if not live.dense:
                self.adopt_ties(live)
            assert_close(out.detach(), live.twin(X))

    def adopt_ties(self, live: Live) -> None:
        """Two patterns may keep the same to the last bit; the model's choice then is as good as the twin's."""
        for name, layer in sparse_layers(live.net).items():
            mask = ops.unpack_mask(layer.mask.view(torch.uint16))
            if not torch.equal(mask, live.twin.masks[name]):
                weight = live.twin.weights[f"{name}.weight"]
                if as_good(mask, weight) and as_good(live.twin.masks[name], weight):
                    live.twin.masks[name] = mask
