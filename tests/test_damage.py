"""Checkpoints and exports that are not as they were written: every size of damage is told, none is loaded."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import assert_same, make, rewrite, run

import sparse24
from sparse24.errors import Sparse24Error
from sparse24.save import load_checkpoint, load_compressed, save_checkpoint
from sparse24.save.exporting import load_exported
from sparse24.save.fitting import check_optimizer
from sparse24.save.folders import STATE, WEIGHTS

FILES = (WEIGHTS, STATE, "SHA256SUMS")


def damaged(content: bytes, size: int, generator: torch.Generator) -> bytes:
    """`content` with one bit (size 0) or a run of `size` bytes changed."""
    start = int(torch.randint(max(1, len(content) - size), (), generator=generator))
    if size == 0:
        bit = 1 << int(torch.randint(8, (), generator=generator))
        return content[:start] + bytes([content[start] ^ bit]) + content[start + 1 :]
    noise = torch.randint(1, 256, (min(size, len(content)),), generator=generator).tolist()
    changed = bytes(a ^ b for a, b in zip(content[start : start + size], noise, strict=False))
    return content[:start] + changed + content[start + len(changed) :]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, optimizer, recipe = make()
    run(model, optimizer, 0, 5)
    return save_checkpoint(tmp_path_factory.mktemp("saved"), model, optimizer, recipe)


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.fixture
def fresh():
    """A model, optimizer and recipe that refused loads must not touch, and a check that they did not."""
    model, optimizer, recipe = make(seed=1)
    run(model, optimizer, 0, 3)
    before, moments = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())

    def unchanged():
        assert_same(model, before)
        assert recipe.step == 3
        state = optimizer.state_dict()
        assert state["param_groups"] == moments["param_groups"] and state["state"].keys() == moments["state"].keys()
        for key, values in state["state"].items():
            assert all(torch.equal(value, moments["state"][key][name]) for name, value in values.items())

    unchanged()
    return (model, optimizer, recipe), unchanged


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 1, 64, 4096])
def test_flipped_bytes_anywhere_in_a_checkpoint_are_refused(name, size, checkpoint, fresh):
    path, (objects, unchanged) = checkpoint / name, fresh
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(size)
    rng = torch.get_rng_state()
    for _ in range(25):
        path.write_bytes(damaged(whole, size, generator))
        with pytest.raises(Sparse24Error, match="cannot be read|has version"):
            load_checkpoint(checkpoint, *objects)
    unchanged()
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.999, None])
def test_truncated_and_missing_files_are_refused(name, keep, checkpoint, fresh):
    path, (objects, unchanged) = checkpoint / name, fresh
    path.write_bytes(path.read_bytes()[: int((keep or 0) * path.stat().st_size)])
    if keep is None:
        path.unlink()
    for folder in (checkpoint, checkpoint.parent):  # named, or found as the newest
        with pytest.raises(Sparse24Error, match="cannot be read"):
            load_checkpoint(folder, *objects)
    unchanged()


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_run_is_refused(name, checkpoint, fresh, tmp_path):
    model, optimizer, recipe = make(seed=7)
    run(model, optimizer, 0, 5)
    other = save_checkpoint(tmp_path / "other", model, optimizer, recipe)
    shutil.copy(other / name, checkpoint / name)
    with pytest.raises(Sparse24Error, match="is not the file that was written: .* or is of another checkpoint"):
        load_checkpoint(checkpoint, *fresh[0])
    fresh[1]()


@pytest.mark.fault(62)
def test_a_process_killed_while_it_removes_an_old_checkpoint_leaves_the_new_one_the_newest(tmp_path, monkeypatch):
    """The kill comes after the first file is gone; what is left of the old one must not be taken for the newest."""
    model, optimizer, recipe = make()
    run(model, optimizer, 0, 2)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    run(model, optimizer, 2, 4)

    class Killed(BaseException):
        pass

    def killed(path, **kwargs):
        if not list(path.glob("*")):  # the temporary folder of the new one, which has its name by now
            return
        (path / STATE).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", killed)
        save_checkpoint(tmp_path, model, optimizer, recipe)
    again = make(seed=1)
    load_checkpoint(tmp_path, *again)
    assert_same(model, again[0])
    assert again[2].step == 4
    run(model, optimizer, 4, 5)
    newest = save_checkpoint(tmp_path, model, optimizer, recipe)
    assert list(tmp_path.iterdir()) == [newest]  # the rest of the old one is gone too


def no_moments(state):
    for values in state["state"].values():
        values.pop("exp_avg")
    return state


@pytest.mark.parametrize("version", [None, True, 1.0, "1", 2, torch.zeros(3), [1]], ids=str)
def test_a_version_of_another_kind_is_refused(version, checkpoint, fresh):
    rewrite(checkpoint, version=version)
    with pytest.raises(Sparse24Error, match="has version .*, this sparse24 reads 1"):
        load_checkpoint(checkpoint, *fresh[0])
    fresh[1]()


def of_group(**options):
    return lambda state: state | {"param_groups": [group | options for group in state["param_groups"]]}


def of_all(change):
    def apply(state):
        for key, values in state["state"].items():
            state["state"][key] = change(values)
        return state

    return apply


@pytest.mark.fault(46, 47)
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: [], "its state is no dict"),
        (lambda s: {"param_groups": s["param_groups"]}, "its state is no dict"),
        (lambda s: s | {"state": []}, "its state is no dict"),
        (lambda s: s | {"state": {0: 5}}, "a state of 0, which is int"),
        (lambda s: s | {"state": {99: {}}}, "a state of 99"),
        (lambda s: s | {"param_groups": 5}, "no list of parameter groups"),
        (lambda s: s | {"param_groups": [5]}, "no list of parameter groups"),
        (lambda s: s | {"param_groups": [{"params": 5}]}, "parameter groups of .None. tensors"),
        (lambda s: s | {"param_groups": [{"params": s["param_groups"][0]["params"]}]}, "a group lacks betas, eps, lr"),
        (of_group(lr=None), "a group has lr = None"),
        (of_group(betas=(0.9,)), "a group has betas = .0.9,"),
        (of_group(weight_decay=float("nan")), "a group has weight_decay = nan"),
        (of_group(lr=torch.tensor(float("nan"))), "a group has lr = tensor.nan"),
        (of_group(lr=torch.zeros(2)), "a group has lr = tensor..0., 0."),
        (of_group(lr=torch.tensor(1j)), "a group has lr = tensor.0..1.j."),
        (of_group(amsgrad="yes"), "a group has amsgrad = .yes"),
        (of_group(foreach=[]), "a group has foreach = .."),
        (of_all(lambda v: v | {"step": "x"}), "step of parameter 0 is 'x', no number of steps"),
        (of_all(lambda v: v | {"step": torch.tensor(-1.0)}), "step of parameter 0 is tensor.-1.*no number of steps"),
        (no_moments, r"parameter 0 has .*'step'.* where .*'exp_avg'"),
        (of_all(lambda v: {"momentum_buffer": v["exp_avg"]}), "'momentum_buffer'. where .*'exp_avg'"),
        (of_all(lambda v: v | {"exp_avg": v["exp_avg"].flatten()}), "exp_avg of parameter 0 is"),
        (of_all(lambda v: v | {"exp_avg": torch.zeros(3)}), "exp_avg of parameter 0 is .3,."),
        (of_all(lambda v: v | {"exp_avg": 0.5}), "exp_avg of parameter 0 is float"),
        (of_all(lambda v: v | {"exp_avg_sq": v["exp_avg_sq"] * float("nan")}), "exp_avg_sq of parameter 0 holds NaN"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused_first(change, words, checkpoint, fresh):
    rewrite(checkpoint, optimizer=change)
    with pytest.raises(Sparse24Error, match=f"of another optimizer: .*{words}"):
        load_checkpoint(checkpoint, *fresh[0])
    fresh[1]()


def test_a_momentum_of_another_shape_is_refused_from_two_elements_on():
    """Beside a parameter of one element, what is as large may as well be a count."""

    def check(size):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(size))], lr=0.1, momentum=0.9)
        state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": torch.zeros(size, 1)}}}
        check_optimizer(Path("run"), state, optimizer)

    check(1)
    with pytest.raises(Sparse24Error, match="momentum_buffer of parameter 0 is .2, 1., the parameter .2,."):
        check(2)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("SGD", {"momentum": 0.9}),
        ("SGD", {}),
        ("AdamW", {"amsgrad": True}),
        ("Adafactor", {}),
        ("Adagrad", {}),
        ("NAdam", {}),
        ("RMSprop", {"momentum": 0.1}),
    ],
)
def test_states_of_other_optimizers_come_back(kind, settings, tmp_path):
    def build(seed):
        model, _, _ = make(seed)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **settings)
        return model, optimizer, sparse24.Recipe(model, optimizer, total_steps=12, mask_interval=4)

    model, optimizer, recipe = build(0)
    run(model, optimizer, 0, 3)
    save_checkpoint(tmp_path, model, optimizer, recipe)
    again = build(1)
    assert load_checkpoint(tmp_path, *again) == {}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again[0].parameters(), strict=True))
    saved, loaded = optimizer.state_dict()["state"], again[1].state_dict()["state"]
    assert saved.keys() == loaded.keys()


@pytest.mark.fault(46)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(dtype, checkpoint, fresh):
    from safetensors.torch import load_file, save_file

    from sparse24.files import seal

    weights = load_file(checkpoint / WEIGHTS)
    weights["plain.fc1.weight"] = weights["plain.fc1.weight"].to(dtype)
    save_file(weights, checkpoint / WEIGHTS)
    seal(checkpoint)
    with pytest.raises(
        Sparse24Error, match=f"plain.fc1.weight is {dtype} in the checkpoint, torch.float32 in the model"
    ):
        load_checkpoint(checkpoint, *fresh[0])
    fresh[1]()


def test_a_file_is_not_a_folder_of_checkpoints(saved, fresh):
    with pytest.raises(Sparse24Error, match="is a file; name the folder of a checkpoint"):
        load_checkpoint(saved / WEIGHTS, *fresh[0])


# -- exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(47)
@pytest.mark.parametrize("form", [dict(), dict(masked=True), dict(format="compressed")], ids=str)
@pytest.mark.parametrize("size", [0, 1, 64, 1000])
def test_flipped_bytes_in_an_export_are_refused_or_change_nothing(form, size, tmp_path):
    """White space of the header may change; no value, name, shape or mark may."""
    model, _, _ = make()
    path, generator = tmp_path / "exported", torch.Generator().manual_seed(size)
    sparse24.export(model, path, **form)
    whole, (weights, masked) = path.read_bytes(), load_exported(path)[:2]
    refused = 0
    for place in range(150):
        path.write_bytes(damaged(whole[: 2000 if place < 75 else None], size, generator) + whole[2000:] * (place < 75))
        try:
            found = load_exported(path)
        except Sparse24Error:
            refused += 1
            continue
        assert found.masked == masked and found.weights.keys() == weights.keys()
        assert all(torch.equal(found.weights[name], weights[name]) for name in weights)
    assert refused > 140


@pytest.mark.fault(45)
@pytest.mark.parametrize("header", ["[" * 100_000, '{"version": 1, "x": ' + "9" * 5000 + "}", "5", "{", "nul", "[]"])
def test_hostile_headers_are_named_errors(header, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "hostile"
    save_file({"w": torch.zeros(2)}, path, metadata={"sparse24": header})
    for read in (load_compressed, load_exported, lambda p: sparse24.verify(make()[0], p)):
        with pytest.raises(Sparse24Error, match="the header of .*hostile"):
            read(path)
