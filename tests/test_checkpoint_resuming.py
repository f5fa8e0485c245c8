"""Any step of any phase resumes bit for bit from a checkpoint, whatever model it is loaded into."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import STEPS, Net, assert_same, make, run
from tiny_models import MLP
from torch import nn

import sparse24
from sparse24 import Recipe
from sparse24.errors import Sparse24Error
from sparse24.layers.modules import SparseLayer
from sparse24.recipe.methods import METHODS
from sparse24.save import load_checkpoint, save_checkpoint
from sparse24.save.folders import WEIGHTS, checkpoints

# -- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(61)
@pytest.mark.parametrize("dense_at", ["start", "end", "none"])
def test_every_step_of_every_phase_resumes_bit_for_bit(dense_at, tmp_path):
    """Before the first step and after the last, on both sides of each phase's border, with noise and dropout."""
    model, optimizer, recipe = make(dense_at=dense_at)
    torch.manual_seed(5)
    for step in range(STEPS + 1):
        save_checkpoint(tmp_path, model, optimizer, recipe, {"step": step}, keep=100)
        run(model, optimizer, step, min(step + 1, STEPS))
    saved = checkpoints(tmp_path)
    assert [path.name for path in saved] == [f"step-{step:08d}" for step in range(STEPS + 1)]
    phases = set()
    for path in saved:
        resumed, again, recipe_again = make(seed=1, dense_at=dense_at)
        step = load_checkpoint(path, resumed, again, recipe_again)["step"]
        assert recipe_again.step == step
        phases.add(recipe_again.phase)
        run(resumed, again, step, STEPS)
        assert_same(resumed, model)
        assert recipe_again.metrics() == recipe.metrics()
    assert phases == ({"sparse"} if dense_at == "none" else {"sparse", "dense"})


@pytest.mark.fault(61)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bit_for_bit(method, tmp_path):
    model, optimizer, recipe = make(method=method, model=MLP())
    torch.manual_seed(5)
    run(model, optimizer, 0, 7)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    run(model, optimizer, 7, STEPS)
    resumed, again, recipe_again = make(seed=1, method=method, model=MLP())
    assert load_checkpoint(tmp_path, resumed, again, recipe_again) == {}
    run(resumed, again, 7, STEPS)
    assert_same(resumed, model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_lean_layers_take_up_the_checkpoint_of_others_and_go_on_alike(tmp_path):
    """How a weight is packed is no part of the state: the same numbers with one packed form and with two."""
    model, optimizer, recipe = make(model=MLP())
    torch.manual_seed(5)
    run(model, optimizer, 0, 6)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    run(model, optimizer, 6, STEPS)
    lean = MLP()
    sparse24.sparsify(lean, lean=True)
    resumed, again, recipe_again = make(seed=1, model=lean)
    load_checkpoint(tmp_path, resumed, again, recipe_again)
    assert resumed.fc1.packed_t.numel() == 0 and sparse24.verify(resumed)
    run(resumed, again, 6, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    assert torch.equal(resumed.fc1.mask, model.fc1.mask)


@pytest.mark.fault(58, 59, 61)
@pytest.mark.parametrize("stop", [5, 6, 9])
def test_scaler_and_accumulation_resume_bit_for_bit(stop, tmp_path):
    """Right before and after a step that the scaler skips, with three micro-batches a step."""
    model, optimizer, recipe = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    torch.manual_seed(5)
    run(model, optimizer, 0, stop, scaler, 3)
    assert recipe.step == stop - (stop > 5)
    save_checkpoint(tmp_path, model, optimizer, recipe, {"scaler": scaler.state_dict()})
    run(model, optimizer, stop, STEPS, scaler, 3)
    resumed, again, recipe_again = make(seed=1)
    scaler_again = torch.amp.GradScaler("cpu")
    scaler_again.load_state_dict(load_checkpoint(tmp_path, resumed, again, recipe_again)["scaler"])
    run(resumed, again, stop, STEPS, scaler_again, 3)
    assert_same(resumed, model)
    assert scaler.state_dict() == scaler_again.state_dict()


# -- another dtype, dense and back ------------------------------------------------------------------------------------


@pytest.mark.fault(63)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_takes_the_masks_and_packs_its_own_values(dtype, tmp_path):
    """Masks of the state, not those that the cast weights would give; the run goes on."""
    model, optimizer, recipe = make(model=MLP())
    run(model, optimizer, 0, 6)  # masks of step 4
    save_checkpoint(tmp_path, model, optimizer, recipe)
    torch.manual_seed(1)
    other, other_optimizer, other_recipe = make(seed=1, model=MLP(dtype=dtype))
    load_checkpoint(tmp_path, other, other_optimizer, other_recipe)
    for ours, theirs in ((other.fc1, model.fc1), (other.fc2, model.fc2)):
        assert torch.equal(ours.mask, theirs.mask) and ours.packed.dtype == dtype
        assert torch.equal(ours.weight, theirs.weight.to(dtype))
    assert sparse24.verify(other) and other_recipe.step == 6
    x = torch.randn(8, 16, dtype=dtype)
    other(x).sum().backward()
    other_optimizer.step()
    assert other_recipe.step == 7 and sparse24.verify(other)


@pytest.mark.fault(46)
def test_densify_ends_the_recipe_and_a_new_one_takes_up_its_state():
    """Dense steps in between need no recipe; weights load into the dense model and back."""
    model, optimizer, recipe = make(model=MLP())
    torch.manual_seed(5)
    run(model, optimizer, 0, 6)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), recipe.state_dict()))
    run(model, optimizer, 6, STEPS)

    dense, dense_optimizer, ended = make(seed=1, model=MLP())
    sparse24.densify(dense)
    for call in (ended.state_dict, ended.metrics, lambda: ended.load_state_dict(state[2])):
        with pytest.raises(Sparse24Error, match="dense again .fc1, fc2.*sparsify the model, make a new recipe"):
            call()
    run(dense, dense_optimizer, 0, 2)  # the hooks are off
    assert ended.step == 0 and type(dense.fc1) is nn.Linear
    dense.load_state_dict(state[0])
    assert torch.equal(dense.fc1.weight, state[0]["fc1.weight"])

    resumed, again, recipe_again = make(model=dense)
    again.load_state_dict(state[1])
    recipe_again.load_state_dict(state[2])
    run(resumed, again, 6, STEPS)
    assert_same(resumed, model)


# -- copies, and models that come late --------------------------------------------------------------------------------


@pytest.mark.fault(56)
def test_copies_in_the_middle_of_training_are_independent(tmp_path):
    """deepcopy, and torch.save of a whole module: masks of the moment, later steps do not reach them."""
    model, optimizer, recipe = make()
    run(model, optimizer, 0, 5)
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    masks = [m.mask.clone() for m in model.modules() if isinstance(m, SparseLayer)]
    for twin in copies:
        assert_same(twin, model)
    run(model, optimizer, 5, 9)
    for twin in copies:
        kept = [m.mask for m in twin.modules() if isinstance(m, SparseLayer)]
        assert all(torch.equal(a, b) for a, b in zip(kept, masks, strict=True)) and sparse24.verify(twin)
        assert not torch.equal(twin.plain.fc1.weight, model.plain.fc1.weight)
    assert recipe.step == 9 and sparse24.verify(model)


@pytest.mark.fault(56, 57)
def test_an_averaged_model_is_saved_and_swapped_in(tmp_path):
    """EMA: update, refresh, export, and evaluate with it in place of the trained weights, then go back."""
    model, optimizer, recipe = make()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(6):
        run(model, optimizer, step, step + 1)
        ema.update_parameters(model)
    sparse24.refresh(ema)
    sparse24.export(ema.module, tmp_path / "ema", masked=True)
    assert sparse24.verify(ema) and sparse24.verify(ema.module, tmp_path / "ema")
    trained = copy.deepcopy(model.state_dict())
    model.load_state_dict(ema.module.state_dict())
    assert sparse24.verify(model) and torch.equal(model.plain.fc1.weight, ema.module.plain.fc1.weight)
    model.load_state_dict(trained)
    twin, twin_optimizer, _ = make()
    run(twin, twin_optimizer, 0, 6)
    assert torch.equal(twin.plain.fc1.mask, model.plain.fc1.mask)  # the swap searched no masks
    assert sparse24.verify(model)


@pytest.mark.fault(56)
@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_a_model_made_on_the_meta_device_resumes_bit_for_bit(how, tmp_path):
    model, optimizer, recipe = make()
    torch.manual_seed(5)
    run(model, optimizer, 0, 6)
    path = save_checkpoint(tmp_path, model, optimizer, recipe)
    run(model, optimizer, 6, STEPS)

    with torch.device("meta"):
        late = Net()
    sparse24.sparsify(late)
    assert all(t.is_meta for t in (*late.parameters(), *late.buffers()))
    if how == "assign":
        late.load_state_dict(load_file(path / WEIGHTS), assign=True)
    else:
        late.to_empty(device="cpu")
        late.load_state_dict(load_file(path / WEIGHTS))
    again = torch.optim.AdamW(late.parameters(), lr=1e-2)
    recipe_again = Recipe(late, again, total_steps=STEPS, mask_interval=4, dense_fraction=0.25, decay=1e-3)
    load_checkpoint(path, late, again, recipe_again)
    run(late, again, 6, STEPS)
    assert_same(late, model)
