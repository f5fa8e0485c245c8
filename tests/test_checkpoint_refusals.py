"""Checkpoints that do not fit, or would run code, are refused by name and change nothing."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_checkpoints import assert_same, make, rewrite, run
from tiny_models import MLP
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparse24.errors import Sparse24Error
from sparse24.files import seal
from sparse24.save import load_checkpoint, save_checkpoint
from sparse24.save.folders import STATE, WEIGHTS, checkpoints

# -- what does not fit ------------------------------------------------------------------------------------------------


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


# -- what would run code ----------------------------------------------------------------------------------------------


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
