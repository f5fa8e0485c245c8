"""Options of a wrong type are named, with the argument, the rule and the value, before anything changes."""

import io

import numpy as np
import pytest
import torch
from tiny_models import MLP

import sparse24
from sparse24 import Recipe, Sparse24Error, SparseGatedMLP, SparseLinear
from sparse24.integrations.lightning import Sparse24Callback as LightningCallback
from sparse24.integrations.torchtitan import Sparse24Converter
from sparse24.integrations.transformers import Sparse24Callback
from sparse24.pretrain.settings import Settings, resolve

pytestmark = pytest.mark.fault(100)


def sparsify(**options):
    return sparse24.sparsify(MLP(), **options)


def recipe(**options):
    model = MLP()
    sparse24.sparsify(model)
    return Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), **({"total_steps": 8} | options))


def pretrain(**settings):
    return resolve(Settings(**settings))


WRONG = [
    (sparsify, dict(tokens=True), "tokens must be an integer, 1 or more, got True"),
    (sparsify, dict(tokens=64.0), "tokens must be an integer, 1 or more, got 64.0"),
    (sparsify, dict(lean="yes"), "lean must be True or False, got 'yes'"),
    (sparsify, dict(fuse=None), "fuse must be True or False, got None"),
    (sparsify, dict(allow_tied=1), "allow_tied must be True or False, got 1"),
    (sparsify, dict(micro_batches=False), "micro_batches must be an integer, 1 or more, got False"),
    (recipe, dict(total_steps="8"), "total_steps must be the number of .*, an integer of 1 or more, got '8'"),
    (recipe, dict(decay="1e-4"), "decay must be a finite number that float32 holds, 0 or more, got '1e-4'"),
    (recipe, dict(dense_fraction=True), "dense_fraction must be the part .*, a number from 0 to 1, got True"),
    (recipe, dict(mask_interval=True), "mask_interval must be an integer, 1 or more, got True"),
    (recipe, dict(track_blocks="no"), "track_blocks must be True or False, got 'no'"),
    (recipe, dict(takeover=1), "takeover must be True or False, got 1"),
    (recipe, dict(method=["fst"]), r"method must be one of fst, .*, got \['fst'\]"),
    (Sparse24Callback, dict(override="yes"), "override must be True or False, got 'yes'"),
    (Sparse24Callback, dict(total_steps=True), "total_steps must be an integer or None, got True"),
    (Sparse24Callback, dict(lean="yes"), "lean must be True or False, got 'yes'"),
    (LightningCallback, dict(log="no"), "log must be True or False, got 'no'"),
    (LightningCallback, dict(mask_interval=True), "mask_interval must be an integer, 1 or more, got True"),
    (LightningCallback, dict(mask_interval=0), "mask_interval must be an integer, 1 or more, got 0"),
    (Sparse24Callback, dict(dense_at="middle"), "dense_at must be one of auto, start, end, none, got 'middle'"),
    (Sparse24Converter, dict(total_steps=8, takeover=0), "takeover must be True or False, got 0"),
    (pretrain, dict(steps="10"), "--steps must be an integer or None, got '10'"),
    (pretrain, dict(mask_interval=True), "--mask-interval must be an integer or None, got True"),
    (pretrain, dict(compile="no"), "--compile must be True or False, got 'no'"),
    (
        SparseLinear,
        dict(in_features=16, out_features=32, mvue="no"),
        'mvue must be True, "output", "input" or False, got .no.',
    ),
    (SparseLinear, dict(in_features=16, out_features=32, mvue=1), "mvue must be True or False or a string, got 1"),
    (SparseLinear, dict(in_features=16.0, out_features=32), "in_features must be an integer, got 16.0"),
    (SparseGatedMLP, dict(d_model=16, d_ff=32, bias="no"), "bias must be True or False, got 'no'"),
    (lambda **options: sparse24.densify(MLP(), **options), dict(masked="no"), "masked must be True or False, got 'no'"),
    (lambda **options: sparse24.refresh(MLP(), **options), dict(search=1), "search must be True or False, got 1"),
]


@pytest.mark.parametrize("function, options, message", WRONG, ids=[next(reversed(o)) + repr(o) for _, o, _ in WRONG])
def test_an_option_of_a_wrong_type_is_named(function, options, message):
    with pytest.raises(Sparse24Error, match=f"^{message}$"):
        function(**options)


def test_an_option_of_a_wrong_type_leaves_the_model_as_it_was():
    model = MLP()
    with pytest.raises(Sparse24Error):
        sparse24.sparsify(model, lean="yes")
    assert not sparse24.refresh(model)


def test_numbers_of_numpy_are_numbers():
    assert sparsify(tokens=np.int64(64), lean=np.bool_(False), micro_batches=np.uint8(2)).converted
    made = recipe(
        total_steps=np.int32(8), decay=np.float32(0.5), mask_interval=np.int64(2), dense_fraction=np.float16(0.5)
    )
    assert (made.phases.sparse_until, made.decay, made.mask_interval) == (4, 0.5, 2)
    assert all(type(value) in (int, float) for value in (made.decay, made.mask_interval, made.phases.total_steps))
    torch.save(made.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["step"] == 0
    settings = pretrain(steps=np.int64(10), lr=1e-3, compile=np.bool_(False))
    assert type(settings.steps) is int and settings.compile is False


def test_what_is_missing_or_too_much_is_told_by_python():
    with pytest.raises(TypeError, match="unexpected keyword argument 'lein'"):
        sparsify(lein=True)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'optimizer'"):
        Recipe(MLP(), total_steps=8)


def test_warnings_point_at_the_callers_line(tmp_path):
    with pytest.warns(sparse24.Sparse24Warning, match="frozen") as told:
        model = MLP().requires_grad_(False)
        sparse24.sparsify(model)
        Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=8)
    with pytest.warns(sparse24.Sparse24Warning, match="dense phase") as of_export:
        for layer in (model.fc1, model.fc2):
            layer.phase = "dense"
        sparse24.export(model, tmp_path / "model.safetensors", masked=True)
    assert {warning.filename for warning in (*told, *of_export)} == {__file__}


@pytest.mark.parametrize("name", ["mvue", "dense_fraction", "mask_interval", "method", "optimizer", "preset"])
def test_a_setting_of_a_recipe_cannot_be_set_once_it_is_made(name):
    """It would be taken without a word and change nothing."""
    made = recipe()
    with pytest.raises(Sparse24Error, match=f"^{name} of a recipe is fixed when it is made.*takeover=True"):
        setattr(made, name, None)
    made.decay, made.check_ranks_every, made.of_mine = 0.5, 2, "kept"
    assert (made.decay, made.check_ranks_every, made.of_mine) == (0.5, 2, "kept")
