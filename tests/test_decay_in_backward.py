"""Recipe(decay_in="backward"): the same training as with the decay in the step, on every path, and what it refuses."""

import copy

import pytest
import torch
from rounding import ANOTHER_ORDER, MANY_SUMS
from tiny_models import MLP, gpt2, llama, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparse24
from sparse24 import Recipe, ops
from sparse24.errors import Sparse24Error


def kept(layer):
    return ops.unpack_mask(layer.mask)


def pull(layer, decay):
    return torch.where(kept(layer), 0, decay * layer.weight.detach())


def make(optimizer=torch.optim.SGD, lr=0.1, model=None, opt=None, sparsify=None, **settings):
    torch.manual_seed(0)
    model = MLP() if model is None else model
    sparse24.sparsify(model, **(sparsify or {}))
    optimizer = optimizer(model.parameters(), lr=lr, **(opt or {}))
    settings = dict(total_steps=12, mask_interval=4, dense_fraction=0.25, decay_in="backward") | settings
    return model, optimizer, Recipe(model, optimizer, **settings)


def run(model, optimizer, steps, first=0, micro_batches=1):
    """Steps on data that depends on the step's number alone."""
    for step in range(first, first + steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        for part in x.chunk(micro_batches):
            ((model(part) - part.flip(-1)).square().mean() / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(model, optimizer, steps, autocast=False):
    for step in range(steps):
        ids = tokens(seed=step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# -- the same training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_model", [gpt2, llama])
@pytest.mark.parametrize("sparsify", [dict(), dict(fuse=False), dict(lean=True), dict(lean=True, fuse=False)], ids=str)
@pytest.mark.parametrize("mvue", [True, False])
def test_training_is_that_with_the_decay_in_the_step(make_model, sparsify, mvue):
    """Whole blocks and single layers, Conv1D, lean ones; sparse and dense weight gradients; a schedule, both phases."""
    weights = []
    for decay_in in ("step", "backward"):
        settings = dict(decay=0.05, decay_schedule="linear", mvue=mvue, decay_in=decay_in)
        model, optimizer, recipe = make(model=make_model(1), sparsify=sparsify, **settings)
        train(model, optimizer, 12)
        assert recipe.phase == "dense" and sparse24.verify(model)
        weights.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, **ANOTHER_ORDER)


@pytest.mark.parametrize("mvue", [True, False])
def test_under_autocast_it_is_that_with_the_decay_in_the_step(mvue):
    weights = []
    for decay_in in ("step", "backward"):
        model, optimizer, _ = make(model=llama(1), decay=0.05, mvue=mvue, decay_in=decay_in)
        train(model, optimizer, 6, autocast=True)
        weights.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, **MANY_SUMS)


@pytest.mark.filterwarnings("ignore:packed for torch.bfloat16 but called")
def test_it_is_added_where_the_packed_dtype_does_not_fit():
    """Dense products over the masked weight: backward adds it there too."""
    model, optimizer, _ = make(sparsify=dict(dtype=torch.bfloat16), decay=0.5, lr=0.0)
    model(torch.zeros(4, 16)).mul(0).sum().backward()
    for layer in (model.fc1, model.fc2):
        torch.testing.assert_close(layer.weight.grad, pull(layer, 0.5))


@pytest.mark.fault(59)
@pytest.mark.parametrize("mvue", [True, False])
def test_micro_batches_share_the_decay(mvue):
    model, optimizer, _ = make(decay=0.6, micro_batches=3, lr=0.0, mvue=mvue)
    for _ in range(3):
        model(torch.zeros(8, 16)).mul(0).sum().backward()
    for layer in (model.fc1, model.fc2):
        torch.testing.assert_close(layer.weight.grad, pull(layer, 0.6))
    optimizer.step()
    for layer in (model.fc1, model.fc2):  # the step adds none
        torch.testing.assert_close(layer.weight.grad, pull(layer, 0.6))


@pytest.mark.fault(59)
def test_accumulated_training_is_that_with_the_decay_in_the_step():
    weights = []
    for decay_in in ("step", "backward"):
        model, optimizer, _ = make(decay=0.1, micro_batches=4, mvue=False, decay_in=decay_in)
        run(model, optimizer, 12, micro_batches=4)
        weights.append(model.fc1.weight.detach())
    torch.testing.assert_close(*weights, **MANY_SUMS)


def test_the_step_adds_nothing():
    model, optimizer, _ = make(lr=0.0, decay=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


def test_closures_add_it_in_each_backward():
    """LBFGS evaluates several times; each gradient has the decay once."""
    model, optimizer, recipe = make(torch.optim.LBFGS, 0.1, opt=dict(max_iter=3), mvue=False, decay=0.5)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.zeros(4, 16)).sum() * 0
        loss.backward()
        torch.testing.assert_close(model.fc1.weight.grad, pull(model.fc1, 0.5))
        return loss

    optimizer.step(closure)
    assert recipe.step == 1


# -- the factor -------------------------------------------------------------------------------------------------------


def factors(model):
    return [None if layer.decay_factor is None else layer.decay_factor.item() for layer in (model.fc1, model.fc2)]


def test_the_factor_is_that_of_the_next_step():
    model, optimizer, recipe = make(decay=0.8, decay_schedule="cosine", micro_batches=2)
    address = model.fc1.decay_factor.data_ptr()
    for step in range(12):
        assert factors(model) == pytest.approx([recipe.current_decay / 2] * 2)
        assert (recipe.current_decay > 0) == (step < 9)
        run(model, optimizer, 1, step)
    assert factors(model) == [0.0, 0.0] and recipe.phase == "dense"
    recipe.load_state_dict(make(decay=0.8, decay_schedule="cosine")[-1].state_dict())
    assert factors(model) == pytest.approx([0.4, 0.4])
    recipe.decay = 0.2
    assert factors(model) == pytest.approx([0.1, 0.1]) and model.fc1.decay_factor.data_ptr() == address


def test_without_a_decay_there_is_no_factor():
    for settings in (dict(decay=0.0), dict(decay=0.5, decay_in="step")):
        model, _, recipe = make(**settings)
        assert factors(model) == [None, None]
    model, _, recipe = make(decay=0.0)
    recipe.decay = 0.5
    assert factors(model) == [0.5, 0.5]


def test_a_listener_may_set_the_decay_between_forward_and_backward():
    model, _, recipe = make(decay=0.5)
    loss = model(torch.zeros(4, 16)).sum() * 0
    recipe.decay = 0.25
    loss.backward()
    torch.testing.assert_close(model.fc1.weight.grad, pull(model.fc1, 0.25))


@pytest.mark.fault(56)
def test_the_factor_keeps_its_value_in_a_moved_model_and_stays_out_of_copies_and_states():
    model, optimizer, recipe = make(decay=0.3)
    assert "decay_factor" not in "".join(model.state_dict())
    twin = copy.deepcopy(model)
    assert factors(twin) == [None, None]
    model.double()
    assert model.fc1.decay_factor.dtype == torch.float32 and factors(model) == pytest.approx([0.3, 0.3])
    model.float()
    recipe.decay = 0.2
    assert factors(model) == pytest.approx([0.2, 0.2])
    sparse24.densify(model)
    assert not hasattr(model.fc1, "decay_factor")


@pytest.mark.fault(77)
def test_the_factor_goes_with_its_recipe():
    model, optimizer, recipe = make(decay=0.3)
    recipe.detach()
    assert factors(model) == [None, None]
    recipe.decay = 0.2
    assert factors(model) == [None, None]
    make(model=model, decay=0.4)
    assert factors(model) == pytest.approx([0.4, 0.4])
    make(model=model, decay=0.4, decay_in="step")
    assert factors(model) == [None, None]


# -- compiled code and graphs -----------------------------------------------------------------------------------------


@pytest.mark.fault(53)
@pytest.mark.parametrize("sparsify", [dict(), dict(lean=True), dict(fuse=False)], ids=str)
@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_schedule_changes_the_decay_of_compiled_code_without_recompiling(make_model, sparsify):
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        settings = dict(decay=0.5, decay_schedule="linear", mvue=False, dense_fraction=0, lr=0.05)
        model, optimizer, recipe = make(model=make_model(1), sparsify=sparsify, **settings)
        counter = CompileCounterWithBackend("aot_eager")
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        losses.append([])
        for step in range(6):
            ids = tokens(seed=step)
            logits = forward(input_ids=ids, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        recipe.decay = 0.0
        forward(input_ids=tokens(), use_cache=False).logits.sum().backward()
    assert counter.frame_count == 1
    torch._dynamo.reset()
    torch.testing.assert_close(losses[1], losses[0], **ANOTHER_ORDER)


class Graph:
    """Stands for torch.cuda.CUDAGraph: its replay does what was captured."""

    def __init__(self, replay):
        self.replay = replay


@pytest.mark.fault(35)
def test_captured_steps_follow_the_schedule(monkeypatch):
    """The factor is read from memory, and `replay` writes it: a graph holds no decay of its own."""
    settings = dict(lr=0.05, decay=0.1, total_steps=8, mask_interval=2, mvue=False, decay_schedule="linear")
    model, optimizer, recipe = make(**settings)
    twin, twin_optimizer, _ = make(**settings, decay_in="step")

    def replayed():
        """The kernels of a step, its packing included, and none of what the recipe does on the host."""
        with monkeypatch.context() as context:
            context.setattr(recipe._steps, "finish", lambda step: None)
            run(model, optimizer, 1, recipe.step)
        for layer in recipe.layers.values():
            layer._repack()

    with recipe.capturing(), monkeypatch.context() as context:
        context.setattr(sparse24.recipe.hooks, "is_capturing", lambda: True)
        optimizer.step()  # no gradients: nothing moves
    graph = Graph(replayed)
    for step in range(6):
        recipe.replay(graph)
        run(twin, twin_optimizer, 1, step)
        torch.testing.assert_close(model.fc1.weight, twin.fc1.weight)
        recipe.decay = recipe.decay  # another one would do as well
    with pytest.raises(Sparse24Error, match="sparse phase with a decay in backward, the next step is dense"):
        recipe.replay(graph)


@pytest.mark.fault(35)
def test_graph_captured_without_a_decay_is_refused_once_there_is_one(monkeypatch):
    _, optimizer, recipe = make(decay=0.0)
    with recipe.capturing(), monkeypatch.context() as context:
        context.setattr(sparse24.recipe.hooks, "is_capturing", lambda: True)
        optimizer.step()
    recipe.decay = 0.1
    with pytest.raises(Sparse24Error, match="with no decay in backward, the next step is sparse with a decay in back"):
        recipe.replay(Graph(None))


# -- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.fault(71)
@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(decay_in="forward"), "decay_in must be one of step, backward, got 'forward'"),
        (dict(micro_batches=0), "micro_batches must be an integer, 1 or more, got 0"),
        (dict(micro_batches=1.5), "micro_batches must be an integer"),
        (dict(micro_batches=True), "micro_batches must be an integer"),
        (dict(method="sr-ste"), "where method='sr-ste' has none; leave decay_in='step'"),
        (dict(method="ste"), "where method='ste' has none"),
        (dict(method="s-ste"), "where method='s-ste' has none"),
        (dict(method="dense"), "where method='dense' has none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(Sparse24Error, match=words):
        make(**settings)


def test_weights_that_layers_share_are_refused():
    model = nn.ModuleList([MLP(), MLP()])
    model[1].fc1.weight = model[0].fc1.weight
    with pytest.raises(Sparse24Error, match="weight that several layers share once for each"):
        make(model=model, sparsify=dict(allow_tied=True))


@pytest.mark.fault(58)
@pytest.mark.parametrize("poison", [False, True])
def test_a_scaler_is_refused_before_anything_changes(poison):
    model, optimizer, recipe = make(torch.optim.AdamW, opt=dict(fused=True), decay=0.5)
    before = model.fc1.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.randn(8, 16)).square().sum() * (float("inf") if poison else 1)).backward()
    with pytest.raises(
        Sparse24Error, match="scaled by a GradScaler.*use bfloat16 without a scaler, or decay_in='step'"
    ):
        scaler.step(optimizer)
    assert recipe.step == 0 and torch.equal(model.fc1.weight, before)


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(61)
@pytest.mark.parametrize("stop", [0, 3, 8, 10])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(stop):
    settings = dict(optimizer=torch.optim.AdamW, lr=1e-2, decay=0.1, decay_schedule="cosine")
    model, optimizer, recipe = make(**settings)
    run(model, optimizer, stop)
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict(), recipe.state_dict()])
    run(model, optimizer, 12 - stop, stop)
    resumed, again, recipe_again = make(**settings)
    for part, saved in zip((resumed, again, recipe_again), state, strict=True):
        part.load_state_dict(saved)
    run(resumed, again, 12 - stop, stop)
    assert torch.equal(resumed.fc1.weight, model.fc1.weight) and torch.equal(resumed.fc1.mask, model.fc1.mask)


def test_state_of_the_other_kind_is_refused_unless_overridden():
    *_, step = make(decay_in="step")
    model, _, backward = make(decay=0.1)
    with pytest.raises(Sparse24Error, match="decay_in was 'step', is 'backward'"):
        backward.load_state_dict(step.state_dict())
    with pytest.raises(Sparse24Error, match="decay_in was 'backward', is 'step'"):
        step.load_state_dict(backward.state_dict())
    backward.load_state_dict(step.state_dict(), override=True)
    assert backward.decay_in == "backward"


def test_states_from_before_there_was_a_choice_are_of_the_step():
    *_, recipe = make(decay_in="step")
    old = recipe.state_dict()
    del old["settings"]["decay_in"]
    recipe.load_state_dict(old)
    *_, backward = make()
    with pytest.raises(Sparse24Error, match="decay_in was 'step', is 'backward'"):
        backward.load_state_dict(old)


def test_states_do_not_depend_on_the_number_of_micro_batches():
    *_, recipe = make(micro_batches=2)
    *_, other = make(micro_batches=4)
    other.load_state_dict(recipe.state_dict())
