"""A model is trained, copied, averaged, saved, loaded, made dense and written to in random order; after each step every
live copy computes what a plain masked-dense twin computes.

SPARSE24_MACHINE_STEPS=200000 runs longer than the 2,000 steps of every day.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import warnings
from pathlib import Path

import forks
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from plain_twin import LAYERS, Twin, make_net
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training_machine import Live, TrainingMachine, X, assert_close, indices, seeds

import sparse24
from sparse24.layers.state import state_of

STEPS = int(os.environ.get("SPARSE24_MACHINE_STEPS", "2000"))
STEPS_EACH = 50


def evaluate_what_was_saved(path) -> None:
    """In a process that knows of no model: the output takes the place of weights, state and input."""
    torch.set_num_threads(1)
    weights, state, x = torch.load(path, weights_only=True)
    model = make_net()
    model.load_state_dict(weights)
    sparse24.load_masks(model, state)
    torch.save(model(x), path)


def saved_bytes(value) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def loaded(data: bytes):
    return torch.load(io.BytesIO(data), weights_only=True)


def half(averaged, now, count) -> None:
    """An exponential average that pickles."""
    torch._foreach_lerp_(averaged, now, 0.5)


class Machine(TrainingMachine):
    processes = 0  # real ones, of all runs

    # -- copies -----------------------------------------------------------------------------------------------------

    def copied(self, index: int) -> Live:
        return self.copies[index % len(self.copies)]

    has_copies = precondition(lambda self: self.copies)

    @rule(index=indices)
    def snapshot(self, index):
        live = self.some(index)
        self.follow_if_it_should(live)
        other = Live(copy.deepcopy(live.model), live.twin.copy(), live.origin or live, mask_is_state=live.mask_is_state)
        if live.dense:
            other.origin, other.dense = None, True
        self.keep(other)

    @rule(index=indices)
    def pickled(self, index):
        live = self.some(index)
        self.follow_if_it_should(live)
        other = Live(pickle.loads(pickle.dumps(live.model)), live.twin.copy(), mask_is_state=live.mask_is_state)
        other.dense = live.dense
        self.keep(other)

    @rule()
    def average(self):
        averaged = AveragedModel(self.main.net, multi_avg_fn=half)
        self.keep(Live(averaged, self.main.twin.copy(), self.main, mask_is_state=self.main.mask_is_state))

    @has_copies
    @rule(index=indices)
    def update_average(self, index):
        live = self.copied(index)
        if not isinstance(live.model, AveragedModel) or live.origin is None:
            return
        first = int(live.model.n_averaged) == 0
        live.model.update_parameters(live.origin.net)
        for name, weight in live.origin.twin.weights.items():
            live.twin.weights[name] = weight.clone() if first else live.twin.weights[name].lerp(weight, 0.5)
        live.written()

    @has_copies
    @rule(index=indices, seed=seeds)
    def write_into_a_copy(self, index, seed):
        live = self.copied(index)
        self.write(live, seed)
        live.written()
        if live.origin is None:
            sparse24.refresh(live.model)

    @has_copies
    @rule(index=indices, seed=seeds, layer=st.sampled_from(LAYERS))
    def replace_a_parameter_of_a_copy(self, index, seed, layer):
        live = self.copied(index)
        if live.dense:
            return
        weight = torch.randn(live.twin.weights[f"{layer}.weight"].shape, generator=torch.Generator().manual_seed(seed))
        # Whether a mask is training's already depends on more than whole models; by which rule it goes is looked up.
        keeps = state_of(live.net.get_submodule(layer)).mask_is_state
        live.net.get_submodule(layer).weight = nn.Parameter(weight * 0.3)
        live.twin.weights[f"{layer}.weight"] = weight * 0.3
        if live.origin is not None:
            live.twin.masks[layer] = live.origin.twin.masks[layer]  # this layer's: the others are not written
            self.follow_now(live)
        elif not keeps:
            live.twin.masks[layer] = Twin(live.twin.weights).masks[layer]

    def follow_now(self, live: Live) -> None:
        """One written layer among untouched ones: have the rest follow too, as the reference knows whole models."""
        sparse24.follow(live.model, like=live.origin.net)
        live.twin.follow(live.origin.twin)
        live.follows = False

    @has_copies
    @rule(index=indices)
    def follow(self, index):
        live = self.copied(index)
        sparse24.follow(live.model, like=self.main.net)
        live.twin.follow(self.main.twin)
        live.mask_is_state, live.dense, live.follows = True, False, False
        if live.origin is not self.main:
            live.origin = None

    @rule(index=indices)
    def refresh(self, index):
        sparse24.refresh(self.some(index).model)

    @has_copies
    @rule(index=indices)
    def densify(self, index):
        live = self.copied(index)
        assert live.dense or len(sparse24.densify(live.model)) == len(LAYERS)
        live.dense, live.origin, live.follows, live.twin.phase = True, None, False, "dense"
        for other in self.copies:
            if other.origin is live:  # nobody is left whom it could follow
                other.origin, other.follows = None, False

    @has_copies
    @rule(index=indices)
    def sparsify_again(self, index):
        live = self.copied(index)
        if live.dense:
            sparse24.sparsify(live.model, mvue=False)
            live.dense, live.twin.phase, live.mask_is_state = False, "sparse", False
            live.twin.search()

    @has_copies
    @rule(index=indices)
    def go_on_with_a_copy(self, index):
        """The copy is trained from here on; the model that it was copied from stays what it is."""
        live = self.copied(index)
        if live.dense or isinstance(live.model, AveragedModel):
            return
        self.copies = [other for other in self.copies if other is not live]
        self.recipe.detach()
        self.keep(self.main)
        self.train_with_a_new_recipe(live)

    # -- files and processes ----------------------------------------------------------------------------------------

    @rule()
    def save(self):
        weights, state = saved_bytes(self.main.net.state_dict()), saved_bytes(self.recipe.state_dict())
        entry = (weights, state, self.main.twin.copy(), copy.copy(self.plan), dict(self.settings))
        self.saves = [*self.saves[-2:], entry]

    has_saves = precondition(lambda self: self.saves)

    @has_saves
    @rule(index=indices, weights_first=st.booleans())
    def resume(self, index, weights_first):
        """In another process: nothing of the old one is left but its copies, which keep what they have."""
        weights, state, twin, plan, self.settings = self.saves[index % len(self.saves)]
        old = self.main
        net = make_net()
        sparse24.sparsify(net, mvue=False)
        self.train_with_a_new_recipe(Live(net, twin.copy()))
        self.plan = copy.copy(plan)
        for load in ("weights", "recipe") if weights_first else ("recipe", "weights"):
            self.recipe.load_state_dict(loaded(state)) if load == "recipe" else net.load_state_dict(loaded(weights))
        self.main.twin, self.main.mask_is_state = twin.copy(), True
        for live in self.copies:
            if live.origin is old:
                self.follow_if_it_should(live)
                live.origin, live.follows = None, False
        del old
        gc.collect()

    @has_saves
    @rule(index=indices, order=st.sampled_from(["dense", "masks first", "weights first"]))
    def evaluate(self, index, order):
        weights, state, twin, *_ = self.saves[index % len(self.saves)]
        net = make_net()
        if order != "dense":
            sparse24.sparsify(net, mvue=False)
        if order == "masks first":
            sparse24.load_masks(net, loaded(state))
        net.load_state_dict(loaded(weights))
        if order == "weights first":
            self.told_before_masks_come(net, twin)
        if order != "masks first":
            sparse24.load_masks(net, loaded(state))
        self.keep(Live(net, twin.copy()))

    def told_before_masks_come(self, net, twin: Twin) -> None:
        """Weights alone: masks are searched in them, and the next forward says so where these are others."""
        searched = Twin(twin.weights)
        differs = twin.phase == "dense" or not all(torch.equal(searched.masks[n], twin.masks[n]) for n in LAYERS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with torch.no_grad():
                net(X)
        assert differs == any("load_masks" in str(w.message) for w in caught), (twin.phase, differs, caught)

    @has_saves
    @has_copies
    @rule(index=indices, which=indices)
    def load_into_a_copy(self, index, which):
        weights, state, twin, *_ = self.saves[which % len(self.saves)]
        live = self.copied(index)
        if live.dense:
            return
        live.net.load_state_dict(loaded(weights))
        sparse24.load_masks(live.model, loaded(state))
        live.twin, live.origin, live.follows, live.mask_is_state = twin.copy(), None, False, True

    @has_copies
    @rule(index=indices)
    def load_the_models_weights_into_a_copy(self, index):
        live = self.copied(index)
        if live.dense or live.origin is not self.main:
            return
        live.net.load_state_dict(self.main.net.state_dict())
        live.twin, live.follows = self.main.twin.copy(), False

    @has_saves
    @rule(index=indices)
    def evaluate_in_a_real_process(self, index):
        if Machine.processes >= max(3, STEPS // 2000):  # seconds each
            return
        Machine.processes += 1
        weights, state, twin, *_ = self.saves[index % len(self.saves)]
        path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sparse24-machine-{os.getpid()}.pt"
        torch.save((loaded(weights), loaded(state), X), path)
        process = forks.context().Process(target=evaluate_what_was_saved, args=(path,))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert_close(torch.load(path, weights_only=True), twin(X))
        path.unlink()

    @rule(index=indices)
    def move(self, index):
        self.some(index).net.double().float()

    @rule(index=indices, seed=seeds)
    def lent_weights(self, index, seed):
        live, g = self.some(index), torch.Generator().manual_seed(seed)
        lent = {n: 0.3 * torch.randn(w.shape, generator=g) for n, w in live.twin.weights.items()}
        self.follow_if_it_should(live)
        if self.copies_rest:
            sparse24.refresh(live.model)  # a lent weight hides whether the own one was written
        with torch.no_grad():
            assert_close(torch.func.functional_call(live.net, lent, X), live.twin(X, lent))


@pytest.mark.fault(79, 80)
def test_every_copy_computes_what_its_plain_twin_computes():
    gc.freeze()  # what is there already need not be looked through at each `resume`
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=max(1, STEPS // STEPS_EACH), stateful_step_count=STEPS_EACH, deadline=None, database=None,
                derandomize=STEPS <= 2000,  # the everyday run is the same for all; longer ones look elsewhere
                suppress_health_check=list(HealthCheck), print_blob=True,
            ),
        )  # fmt: skip
    finally:
        gc.unfreeze()
        print(f"{Machine.steps} steps")
