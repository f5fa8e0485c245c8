"""Checkpoints in files: any step of any phase resumes bit for bit, whatever happened to model, process or disk."""

import ast
import copy
import io
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import MLP
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparse24
from sparse24 import Recipe, SparseGatedMLP
from sparse24.errors import Sparse24Error
from sparse24.files import seal
from sparse24.layers.modules import SparseLayer
from sparse24.recipe.methods import METHODS
from sparse24.save import load_checkpoint, save_checkpoint
from sparse24.save.folders import STATE, WEIGHTS, checkpoints

STEPS = 12


class Net(nn.Module):
    """A block that runs as one function, dropout, and a plain FFN layer by layer."""

    def __init__(self):
        super().__init__()
        self.gated, self.drop, self.plain = SparseGatedMLP(16, 64), nn.Dropout(0.1), MLP()

    def forward(self, x):
        return self.plain(self.drop(self.gated(x)))


def make(seed=0, model=None, **settings):
    torch.manual_seed(seed)
    model = Net() if model is None else model
    sparse24.sparsify(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    settings = dict(total_steps=STEPS, mask_interval=4, dense_fraction=0.25, decay=1e-3) | settings
    return model, optimizer, Recipe(model, optimizer, **settings)


def run(model, optimizer, first, last, scaler=None, batches=1):
    """Steps on data that depends on the step's number alone; what a skipped step does comes from the scaler."""
    for step in range(first, last):
        for batch in range(batches):
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(100 * step + batch))
            loss = (model(x) - x.flip(-1)).square().mean() * (float("inf") if scaler and step == 5 else 1.0)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()


def assert_same(ours, theirs):
    """Models equal in weights, phases, masks, and in the packed forms that they multiply with."""
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for (name, a), (_, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        if isinstance(a, SparseLayer):
            assert a.phase == b.phase and torch.equal(a.mask, b.mask), name
            for (buffer, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
                assert a.phase == "dense" or torch.equal(x, y), f"{name}.{buffer}"
    assert str(sparse24.verify(ours)) == str(sparse24.verify(theirs))


# -- any step of any phase ------------------------------------------------------------------------------------------


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


# -- what the files are ---------------------------------------------------------------------------------------------


@pytest.mark.fault(45)
def test_files_are_plain_and_open_without_sparse24(tmp_path):
    """safetensors under the dense model's names; a state of tensors, numbers, strings, lists and dicts."""
    model, optimizer, recipe = make(model=MLP())
    run(model, optimizer, 0, 5)
    path = save_checkpoint(tmp_path, model, optimizer, recipe)
    dense = MLP()
    dense.load_state_dict(load_file(path / WEIGHTS))
    assert torch.equal(dense.fc1.weight, model.fc1.weight)

    def kinds(value):
        if isinstance(value, dict):
            return set().union({dict}, *map(kinds, value), *map(kinds, value.values()))
        return set().union({type(value)}, *map(kinds, value)) if isinstance(value, (list, tuple)) else {type(value)}

    state = torch.load(path / STATE, weights_only=True)
    assert kinds(state) <= {dict, list, tuple, str, int, float, bool, type(None), torch.Tensor}
    packed = model.fc1.packed.numel() + model.fc2.packed.numel()
    masks = sum(mask.numel() for mask in state["recipe"]["masks"].values())
    assert masks * 8 == 2 * packed  # a bit a weight, and packed forms are nowhere


def test_old_checkpoints_go_only_when_the_new_one_is_there(tmp_path):
    model, optimizer, recipe = make()
    for step in range(4):
        save_checkpoint(tmp_path, model, optimizer, recipe, keep=2)
        run(model, optimizer, step, step + 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert sorted(tmp_path.iterdir()) == checkpoints(tmp_path)
    with pytest.raises(Sparse24Error, match="step-00000003 exists already"):
        recipe.start_at(3)
        save_checkpoint(tmp_path, model, optimizer, recipe)


def test_a_run_that_starts_anew_in_the_folder_keeps_what_it_writes(tmp_path):
    model, optimizer, recipe = make()
    run(model, optimizer, 0, 6)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    model, optimizer, recipe = make(seed=1)
    run(model, optimizer, 0, 2)
    written = save_checkpoint(tmp_path, model, optimizer, recipe)
    assert checkpoints(tmp_path) == [written]
    *_, again = fresh = make(seed=2)
    load_checkpoint(tmp_path, *fresh)
    assert again.step == 2


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keeping_none_is_refused(keep, tmp_path):
    with pytest.raises(Sparse24Error, match=f"keep must be an integer, 1 or more, got {keep}"):
        save_checkpoint(tmp_path, *make(), keep=keep)
    assert not checkpoints(tmp_path)


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    model, optimizer, recipe = make()
    assert load_checkpoint(tmp_path / "nothing", model, optimizer, recipe) is None
    assert load_checkpoint(tmp_path, model, optimizer, recipe) is None and recipe.step == 0


@pytest.mark.fault(101)
def test_a_checkpoint_that_somebody_counts_on_must_be_there(tmp_path):
    made = make()
    saved = save_checkpoint(tmp_path / "run", *made)
    assert load_checkpoint(tmp_path / "run", *made, required=True) == {}
    for folder, why in ((tmp_path, "holds no checkpoint"), (tmp_path / "rum", "does not exist")):
        with pytest.raises(Sparse24Error, match=f"^{folder} {why}; name the folder that save_checkpoint was given"):
            load_checkpoint(folder, *made, required=True)
    missing = saved.with_name("step-00000007")
    for required in (True, False):
        with pytest.raises(Sparse24Error, match=f"^{missing} does not exist; checkpoints in .*: {saved.name}$"):
            load_checkpoint(missing, *made, required=required)
    with pytest.raises(Sparse24Error, match="step-00000007 does not exist; checkpoints in .*: none"):
        load_checkpoint(tmp_path / "rum" / missing.name, *made)


@pytest.mark.fault(62)
@pytest.mark.parametrize("fails", ["os.fsync", "os.rename"])
def test_a_disk_that_refuses_leaves_the_checkpoint_before(fails, tmp_path, monkeypatch):
    model, optimizer, recipe = make()
    first = save_checkpoint(tmp_path, model, optimizer, recipe)
    run(model, optimizer, 0, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fails, full)
    if fails == "os.fsync":  # some file systems have none for folders, so a folder's failure is no error
        monkeypatch.setattr("sparse24.files.writing.sync", full)
    with pytest.raises(Sparse24Error, match="step-00000001 could not be written .No space left on device"):
        save_checkpoint(tmp_path, model, optimizer, recipe)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [first]
    assert load_checkpoint(tmp_path, *make(seed=1)) == {}


@pytest.mark.fault(62)
@pytest.mark.parametrize("fits", [1, 1_000, 10_000, "weights"])
def test_a_full_disk_leaves_the_checkpoint_before(fits, tmp_path, file_size_limit):
    """The kernel's own refusal, which torch and safetensors tell in exceptions of their own."""
    model, optimizer, recipe = make()
    first = save_checkpoint(tmp_path, model, optimizer, recipe)
    run(model, optimizer, 0, 1)
    size = (first / WEIGHTS).stat().st_size + 100 if fits == "weights" else fits
    with file_size_limit(size), pytest.raises(Sparse24Error, match="step-00000001 could not be written") as error:
        save_checkpoint(tmp_path, model, optimizer, recipe)
    assert isinstance(error.value, OSError) and "make room" in str(error.value)
    assert list(tmp_path.iterdir()) == [first]
    assert save_checkpoint(tmp_path, model, optimizer, recipe).name == "step-00000001"


@pytest.mark.fault(62)
def test_a_process_killed_while_writing_leaves_the_checkpoint_before(tmp_path):
    """SIGKILL in the middle of the state's file; the next save removes what was left."""
    code = f"""
        import os, signal, sys, torch
        sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
        import sparse24.files
        from test_checkpoints import make, run, save_checkpoint

        model, optimizer, recipe = make()
        save_checkpoint(sys.argv[1], model, optimizer, recipe)
        run(model, optimizer, 0, 1)
        whole = torch.save

        def killed(state, target):
            if hasattr(target, "write"):
                return whole(state, target)
            whole(state, target)
            os.truncate(target, 100)
            os.kill(os.getpid(), signal.SIGKILL)

        torch.save = killed
        save_checkpoint(sys.argv[1], model, optimizer, recipe)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.iterdir())) == 2  # the whole one, and what was being written
    model, optimizer, recipe = make(seed=1)
    assert load_checkpoint(tmp_path, model, optimizer, recipe) == {} and recipe.step == 0
    run(model, optimizer, 0, 2)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


# -- what does not fit ----------------------------------------------------------------------------------------------


def rewrite(path, **changes):
    """A checkpoint with another state, as whoever wrote it on purpose would leave it."""
    state = torch.load(path / STATE, weights_only=True)
    for key, value in changes.items():
        if value is ...:
            del state[key]
        else:
            state[key] = value(state[key]) if callable(value) else value
    torch.save(state, path / STATE)
    seal(path)


def foreign_weights(path):
    save_file({"a": torch.zeros(2)}, path / WEIGHTS)
    seal(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.fault(46, 47)
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: truncate(path / STATE), "cannot be read .*damaged"),
        (lambda path: truncate(path / WEIGHTS), "cannot be read .*model.safetensors is not the file that was written"),
        (lambda path: (path / WEIGHTS).unlink(), "cannot be read .*damaged"),
        (lambda path: rewrite(path, version=99), "has version 99, this sparse24 reads 1"),
        (lambda path: rewrite(path, optimizer=...), "lacks one of optimizer"),
        (lambda path: rewrite(path, optimizer={"param_groups": [{"params": [0]}]}), "another optimizer"),
        (lambda path: rewrite(path, recipe=lambda r: r | {"step": -1}), "corrupt"),
        (lambda path: rewrite(path, recipe=lambda r: r | {"masks": {}}), "another model"),
        (foreign_weights, "of another model: a is not in the model"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(damage, words, tmp_path):
    objects = make()
    run(*objects[:2], 0, 2)  # so that the optimizer that is loaded has moments, others than those below
    path = save_checkpoint(tmp_path, *objects)
    damage(path)
    model, optimizer, recipe = make(seed=1)
    run(model, optimizer, 0, 3)
    before, moments, rng = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    with pytest.raises(Sparse24Error, match=words):
        load_checkpoint(tmp_path, model, optimizer, recipe)
    assert_same(model, before)
    assert recipe.step == 3 and torch.equal(rng, torch.get_rng_state())
    assert optimizer.state_dict()["state"].keys() == moments["state"].keys()
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(moments["state"][key][k])) for k, v in state.items())


def test_a_checkpoint_of_other_settings_is_refused_unless_overridden(tmp_path):
    save_checkpoint(tmp_path, *make())
    model, optimizer, recipe = make(seed=1, mask_interval=3)
    before = copy.deepcopy(model)
    with pytest.raises(Sparse24Error, match="other settings: mask_interval was 4, is 3"):
        load_checkpoint(tmp_path, model, optimizer, recipe)
    assert_same(model, before)
    load_checkpoint(tmp_path, model, optimizer, recipe, override=True)
    assert_same(model, make()[0])


@pytest.mark.fault(100)
def test_arguments_in_another_order_are_named(tmp_path):
    model, optimizer, recipe = make()
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(Sparse24Error, match="^model must be a torch.nn.Module, got PosixPath"):
            call(model, tmp_path, optimizer, recipe)
        with pytest.raises(Sparse24Error, match="^recipe must be the sparse24.Recipe that trains the model, got SGD"):
            call(tmp_path, model, recipe, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(Sparse24Error, match="got NoneType; a model without one is written by sparse24.export"):
            call(tmp_path, model, optimizer, None)
        with pytest.raises(Sparse24Error, match="^optimizer must be a torch.optim.Optimizer, got Recipe"):
            call(tmp_path, model, recipe, recipe)
    assert not checkpoints(tmp_path)


def test_sharded_weights_are_refused_at_both_ends(tmp_path):
    model, optimizer, recipe = make()
    path = save_checkpoint(tmp_path, model, optimizer, recipe)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(MLP(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(Sparse24Error, match="sharded .FSDP2.: save them by torch.distributed.checkpoint"):
            save_checkpoint(tmp_path / "other", sharded, optimizer, recipe)
        with pytest.raises(Sparse24Error, match="sharded .FSDP2.: save them by torch.distributed.checkpoint"):
            load_checkpoint(path, sharded, optimizer, recipe)
    finally:
        dist.destroy_process_group()


@pytest.mark.fault(45)
def test_nothing_in_the_package_unpickles_what_could_run_code():
    root = Path(__file__).resolve().parents[1]
    for path in (*(root / "sparse24").rglob("*.py"), *(root / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in ("pickle.load", "pickle.loads", "joblib.load"), path
            if name == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


@pytest.mark.fault(45)
def test_a_state_that_would_run_code_is_refused_at_both_ends(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return marker.mkdir, ()

    model, optimizer, recipe = make()
    with pytest.raises(Sparse24Error, match="extra must hold plain numbers"):
        save_checkpoint(tmp_path / "run", model, optimizer, recipe, {"evil": Evil()})
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(
        Sparse24Error, match=r"; extra\['a'\]\[1\] is a ConstantLR. Save the state_dict\(\) of schedulers"
    ):
        save_checkpoint(tmp_path / "run", model, optimizer, recipe, {"a": [0, schedule]})
    path = save_checkpoint(tmp_path / "run", model, optimizer, recipe)
    torch.save({"version": 1, "evil": Evil()}, path / STATE)
    with pytest.raises(Sparse24Error, match="cannot be read"):
        load_checkpoint(path, model, optimizer, recipe)
    assert not marker.exists()


# -- another dtype, dense and back ----------------------------------------------------------------------------------


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


# -- copies, and models that come late ------------------------------------------------------------------------------


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


def test_wrapped_models_have_plain_names_in_the_checkpoint(tmp_path):
    """torch.compile and activation checkpointing put prefixes into names; files do not have them."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, optimizer, recipe = make()
    run(model, optimizer, 0, 3)
    path = save_checkpoint(tmp_path, model, optimizer, recipe)
    wrapped = Net()
    sparse24.sparsify(wrapped)
    wrapped.plain = torch.compile(wrapped.plain, backend="eager")
    wrapped.gated = checkpoint_wrapper(wrapped.gated)
    again = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    recipe_again = Recipe(wrapped, again, total_steps=STEPS, mask_interval=4, dense_fraction=0.25, decay=1e-3)
    load_checkpoint(path, wrapped, again, recipe_again)
    second = save_checkpoint(tmp_path / "wrapped", wrapped, again, recipe_again)
    first, again = load_file(path / WEIGHTS), load_file(second / WEIGHTS)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
