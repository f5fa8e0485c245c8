"""Checkpoints as files: what is in them, and that a write that fails or is killed leaves the one before."""

import os
import signal

import forks
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import STEPS, Net, make, run
from tiny_models import MLP

import sparse24
from sparse24 import Recipe
from sparse24.errors import Sparse24Error
from sparse24.save import load_checkpoint, save_checkpoint
from sparse24.save.folders import STATE, WEIGHTS, checkpoints


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


def killed_while_writing(folder):
    """SIGKILL in the middle of the second checkpoint's state."""
    model, optimizer, recipe = make()
    save_checkpoint(folder, model, optimizer, recipe)
    run(model, optimizer, 0, 1)
    whole = torch.save

    def killed(state, target):
        whole(state, target)
        if not hasattr(target, "write"):
            os.truncate(target, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = killed
    save_checkpoint(folder, model, optimizer, recipe)


@pytest.mark.fault(62)
def test_a_process_killed_while_writing_leaves_the_checkpoint_before(tmp_path):
    """The next save removes what was left."""
    process = forks.context().Process(target=killed_while_writing, args=(tmp_path,))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the whole one, and what was being written
    model, optimizer, recipe = make(seed=1)
    assert load_checkpoint(tmp_path, model, optimizer, recipe) == {} and recipe.step == 0
    run(model, optimizer, 0, 2)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
