"""State of a recipe: a resumed run is the run itself, a bad state changes nothing, and what becomes of copies."""

import copy
import io
import math
import pickle

import pytest
import torch
from tiny_models import MLP
from tiny_recipes import make, run
from torch import nn

import sparse24
from sparse24 import ops
from sparse24.errors import Sparse24Error
from sparse24.recipe.methods import METHODS


def save(model, optimizer, recipe):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "recipe": recipe.state_dict()}
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_decay_that_was_set_during_a_run_comes_back():
    model, optimizer, recipe = make(decay=1e-3)
    recipe.decay = 4e-3
    run(model, optimizer, 2)
    _, _, again = make(decay=1e-3)
    again.load_state_dict(recipe.state_dict())
    assert again.decay == 4e-3 and again.current_decay == recipe.current_decay == 4e-3


@pytest.mark.parametrize("recipe_first", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 9, 11])
@pytest.mark.fault(45, 61)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, stop, recipe_first):
    """Any step, any phase, any order of loading; the state loads with weights_only."""
    settings = dict(optimizer=torch.optim.AdamW, lr=1e-2, method=method, decay=1e-3)
    model, optimizer, recipe = make(**settings)
    torch.manual_seed(5)
    run(model, optimizer, stop)
    state = save(model, optimizer, recipe)
    run(model, optimizer, 12 - stop, stop)

    resumed, again, recipe_again = make(**settings)
    torch.manual_seed(99)
    with torch.no_grad():
        for p in resumed.parameters():
            p.normal_()
    if recipe_first:
        again.load_state_dict(state["optimizer"])
        recipe_again.load_state_dict(state["recipe"])
        resumed.load_state_dict(state["model"])
    else:
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        recipe_again.load_state_dict(state["recipe"])
    run(resumed, again, 12 - stop, stop)
    for (name, ours), (_, theirs) in zip(resumed.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(resumed.fc1.mask, model.fc1.mask)
    assert recipe_again.metrics() == recipe.metrics()
    assert recipe_again.monitor.history() == recipe.monitor.history()


def corrupt(state, key, value):
    state = copy.deepcopy(state)
    if value is ...:
        del state[key]
    else:
        state[key] = value
    return state


ONE = torch.tensor([4])
HISTORY_OF_THREE = {"steps": ONE, "intervals": ONE, "flips": torch.tensor([[1, 2, 3]]), "reported": []}


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("masks", ..., "lacks masks.*truncated"),
        ("version", 99, "version 99, this sparse24 reads 1"),
        ("step", "7", "'step' of the recipe state must be int"),
        ("step", -1, "corrupt"),
        ("phase", "warm", "corrupt: phase 'warm'"),
        ("decay", math.nan, "corrupt: decay nan"),
        ("last_search", 1000, "corrupt"),
        ("masks", {}, "another model"),
        ("masks", {"fc1": torch.zeros(2, 2), "fc2": None}, "must be uint8 \\(8, 8\\), got torch.float32"),
        ("masks", {"fc1": torch.full((8, 8), 255, dtype=torch.uint8), "fc2": None}, "mask of fc1 is corrupt"),
        ("monitor", {}, "flip history lacks"),
        ("monitor", HISTORY_OF_THREE, "flip history in the state does not fit 2 layers"),
        ("settings", {}, "other settings: method was None"),
    ],
)
@pytest.mark.fault(46, 47)
def test_corrupt_state_is_refused_and_changes_nothing(key, value, words):
    """Versioned, checked as a whole, loaded only then."""
    model, optimizer, recipe = make(lr=0.1)
    run(model, optimizer, 5)
    state = corrupt(recipe.state_dict(), key, value)
    run(model, optimizer, 1, 5)
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(Sparse24Error, match=words):
        recipe.load_state_dict(state)
    assert recipe.step == 6 and all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    with pytest.raises(Sparse24Error, match="is a dict, got list"):
        recipe.load_state_dict([])


def test_a_state_under_the_names_of_an_older_version_is_read():
    """What is a search now was called a refresh."""
    model, optimizer, recipe = make(lr=0.1, track_blocks=True)
    run(model, optimizer, 5)
    state = recipe.state_dict()
    older = {key: value for key, value in state.items() if key not in ("last_search", "blocks")}
    older["last_refresh"] = state["last_search"]
    older["blocks"] = {"refreshes": state["blocks"]["searches"], "counts": state["blocks"]["counts"]}
    *_, again = make(track_blocks=True)
    again.load_state_dict(older)
    assert again.last_search == recipe.last_search > 0
    assert again.state_dict()["blocks"]["searches"] == state["blocks"]["searches"] > 0


@pytest.mark.fault(46)
def test_state_of_another_shape_or_model_is_refused():
    """Masks of other layers or sizes."""
    *_, recipe = make()
    *_, wider = make(model=MLP(32, 64))
    with pytest.raises(Sparse24Error, match="must be uint8"):
        wider.load_state_dict(recipe.state_dict())
    *_, other = make(model=nn.ModuleDict({"ffn": MLP()}))
    with pytest.raises(Sparse24Error, match="another model: it lacks masks of \\['ffn.fc1'"):
        other.load_state_dict(recipe.state_dict())


@pytest.mark.fault(73, 74)
def test_phase_that_differs_from_the_settings_is_refused_unless_overridden():
    """A dense state in a sparse phase; going back finds new masks, as told."""
    model, optimizer, recipe = make(lr=0.1)
    run(model, optimizer, 10)
    state = recipe.state_dict()
    assert state["phase"] == "dense"
    model, optimizer, longer = make(lr=0.1, total_steps=40)
    with pytest.raises(Sparse24Error, match="total_steps was 12, is 40"):
        longer.load_state_dict(state)
    longer.load_state_dict(state, override=True)
    assert longer.phase == "sparse" and longer.step == 10 and sparse24.verify(model).phase == "sparse"
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), model.fc1.mask)
    longer.load_state_dict(longer.state_dict())
    longer.load_state_dict(longer.state_dict())
    assert longer.phase == "sparse"


@pytest.mark.fault(62)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_interrupted_behind_the_optimizer_is_counted(monkeypatch, fused):
    """Between the optimizer's own step and the recipe's part; nothing shows in the versions of fused ones."""

    def interrupt():
        raise KeyboardInterrupt

    model, optimizer, recipe = make(opt={"fused": fused}, mask_interval=2, mvue=False)
    plain = make(opt={"fused": fused}, mask_interval=2, mvue=False)
    run(*plain[:2], 4)
    run(model, optimizer, 3)
    with monkeypatch.context() as patch:
        patch.setattr(recipe._steps, "after", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, optimizer, 1, first=3)
    state = recipe.state_dict()
    assert state["step"] == 4 and sparse24.verify(model)
    assert all(map(torch.equal, state["masks"].values(), plain[2].state_dict()["masks"].values()))


@pytest.mark.fault(62)
def test_a_step_that_is_interrupted_before_the_weights_move_is_not_counted():
    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    model, optimizer, recipe = make(optimizer=Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, optimizer, 1)
    assert recipe.state_dict()["step"] == 0 and sparse24.verify(model)


METHODS = ("fst", "ste", "sr-ste", "step", "s-ste", "mvue", "dense")


@pytest.mark.fault(88)
@pytest.mark.parametrize("saved", METHODS)
def test_override_takes_the_state_of_any_method(saved):
    """It is the way out that the refusal names."""
    model, optimizer, recipe = make(torch.optim.AdamW, lr=1e-3, method=saved, mask_interval=2, track_blocks=True)
    run(model, optimizer, 7)
    state = recipe.state_dict()
    for method in METHODS:
        model, optimizer, other = make(torch.optim.AdamW, lr=1e-3, method=method, mask_interval=2, track_blocks=True)
        other.load_state_dict(state, override=True)
        assert sparse24.verify(model), f"{saved} to {method}"
        run(model, optimizer, 5)
        other.load_state_dict(other.state_dict())
        assert other.step == 12 and sparse24.verify(model), f"{saved} to {method}"


def test_a_state_of_a_gpu_leaves_its_generators_alone_on_a_cpu(monkeypatch):
    *_, recipe = make()
    state = recipe.state_dict()
    state["rng"]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    drawn = torch.randn(4)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("there is no such generator here"))
    recipe.load_state_dict(state)
    assert torch.equal(torch.randn(4), drawn)  # the CPU's is as it was


@pytest.mark.fault(63)
def test_masks_of_a_state_serve_another_dtype():
    """Masks are loaded, not recomputed, whatever the new run's dtype."""
    model, optimizer, recipe = make(lr=0.1)
    run(model, optimizer, 5)
    other, _, recipe_16 = make(model=MLP().bfloat16())
    other.load_state_dict({n: t.bfloat16() for n, t in model.state_dict().items()})
    recipe_16.load_state_dict(recipe.state_dict())
    assert torch.equal(other.fc1.mask, model.fc1.mask) and sparse24.verify(other)


@pytest.mark.fault(62)
def test_interrupt_inside_a_step_is_made_good_before_saving(monkeypatch):
    """The search belongs to the step; a save right after an interrupt is that of a whole step."""
    model, optimizer, recipe = make(lr=0.2, mvue=False)
    run(model, optimizer, 3)
    twin, twin_optimizer, twin_recipe = make(lr=0.2, mvue=False)
    run(twin, twin_optimizer, 4)

    real = ops.prune_compress_

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "prune_compress_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch.manual_seed(0)
        run(model, optimizer, 1, 3)
    monkeypatch.undo()
    assert recipe.step == 3
    state = recipe.state_dict()
    assert state["step"] == 4 and state["last_search"] == 4
    assert torch.equal(ops.transposable_mask(model.fc1.weight).view(torch.uint8), state["masks"]["fc1"])
    assert len(state["monitor"]["steps"]) == 1
    assert recipe.monitor.history() == twin_recipe.monitor.history() and recipe.monitor.rate() > 0


@pytest.mark.fault(62)
@pytest.mark.filterwarnings("ignore:the weight of a sparse layer has changed")
@pytest.mark.parametrize("saves", [False, True])
def test_training_that_goes_on_after_an_interrupt_loses_no_step(monkeypatch, saves):
    """Also when the interrupt hits the change of phases: every layer is in the new one before the next step."""
    model, optimizer, recipe = make(lr=0.2, total_steps=8)
    run(model, optimizer, 5)

    def interrupted(phase):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.fc2, "enter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, optimizer, 1, 5)
    monkeypatch.undo()
    assert [model.fc1.phase, model.fc2.phase] == ["dense", "sparse"]
    if saves:
        assert recipe.state_dict()["step"] == 6
        assert [model.fc1.phase, model.fc2.phase] == ["dense", "dense"]
    run(model, optimizer, 1, 6)
    assert recipe.step == 7 and [model.fc1.phase, model.fc2.phase] == ["dense", "dense"]


@pytest.mark.fault(56, 57)
def test_ema_copy_is_independent_and_current():
    """Averaged copies follow the model that they were made of, before their next forward pass or by refresh."""
    model, optimizer, recipe = make(lr=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model)
    run(model, optimizer, 3)
    ema.update_parameters(model)
    ema(torch.randn(2, 16))
    assert sparse24.verify(ema, like=model) and sparse24.verify(model)
    run(model, optimizer, 2, first=3)
    ema.update_parameters(model)
    assert sparse24.refresh(ema) == 2
    assert sparse24.verify(ema, like=model) and not torch.equal(ema.module.fc1.weight, model.fc1.weight)


COPIES = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a dict": lambda recipe: copy.deepcopy({"layers": recipe.layers, "recipe": recipe}),
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "torch.save": lambda recipe: torch.save(recipe, io.BytesIO()),
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("how", COPIES)
def test_recipe_in_use_is_not_copied_and_the_remedy_works(how):
    """Its copy would have no hooks. State and model make the recipe of a copy, which trains as the original."""
    model, optimizer, recipe = make(torch.optim.AdamW, lr=1e-2)
    run(model, optimizer, 5)
    with pytest.raises(Sparse24Error, match=r"cannot be copied or pickled.*recipe\.state_dict\(\).*new Recipe"):
        COPIES[how](recipe)
    states = copy.deepcopy((optimizer.state_dict(), recipe.state_dict()))
    twin, twin_optimizer, twin_recipe = make(torch.optim.AdamW, lr=1e-2, model=copy.deepcopy(model))
    twin_optimizer.load_state_dict(states[0])
    for m, o, r in ((model, optimizer, recipe), (twin, twin_optimizer, twin_recipe)):
        r.load_state_dict(states[1])  # with the generator that MVUE draws from
        run(m, o, 4, first=5)
    assert torch.equal(model.fc1.weight, twin.fc1.weight) and torch.equal(model.fc1.mask, twin.fc1.mask)


@pytest.mark.fault(56)
def test_detached_recipe_may_be_copied():
    """Trainers keep theirs after training, in callbacks that may be copied or sent to other processes."""
    model, optimizer, recipe = make()
    run(model, optimizer, 5)
    recipe.detach()
    for twin in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert twin.metrics() == recipe.metrics() and twin.monitor.history() == recipe.monitor.history()
