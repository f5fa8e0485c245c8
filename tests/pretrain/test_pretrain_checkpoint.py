"""A checkpoint is there in full or not at all, runs no code, and refuses what does not fit."""

import os
import shutil

import pytest
import torch
from torch import nn

from sparse24.errors import Sparse24Error
from sparse24.pretrain import checkpoint
from sparse24.pretrain.tokenizer import ByteTokenizer


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self, width=4):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embedding.weight


def save(folder, step, model):
    return checkpoint.save(folder, step, model, {"x": torch.arange(3)}, {"steps": 9}, ByteTokenizer())


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_loaded_checkpoint_equals_the_saved_one(tmp_path):
    model, other = Tied(), Tied()
    save(tmp_path, 3, model)
    found = checkpoint.load(tmp_path)
    checkpoint.load_weights(other, found)
    assert equal(model, other) and other.head.weight is other.embedding.weight
    assert (
        found.state["step"] == 3 and torch.equal(found.state["x"], torch.arange(3)) and found.settings == {"steps": 9}
    )


def test_only_the_newest_is_kept_and_no_temporary_one(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, Tied())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]


@pytest.mark.fault(62)
@pytest.mark.parametrize("fails", ["config.json", "state.pt", "rename"])
def test_crash_while_writing_leaves_the_one_before(tmp_path, monkeypatch, fails):
    first, second = Tied(), Tied()
    save(tmp_path, 1, first)

    def crash(*arguments, **options):
        raise KeyboardInterrupt

    target = {
        "config.json": "sparse24.pretrain.checkpoint.export",
        "state.pt": "torch.save",
        "rename": "os.rename",
    }
    with monkeypatch.context() as patch:
        patch.setattr(target[fails], crash)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, second)
    found = checkpoint.load(tmp_path)
    assert found.state["step"] == 1
    loaded = Tied()
    checkpoint.load_weights(loaded, found)
    assert equal(loaded, first)
    assert save(tmp_path, 2, second).name == "step-000002"  # what the crash left is no hindrance


@pytest.mark.fault(62)
def test_full_disk_is_told_and_leaves_the_one_before(tmp_path, file_size_limit):
    first = Tied()
    save(tmp_path, 1, first)
    with (
        file_size_limit(1000),
        pytest.raises(Sparse24Error, match="checkpoint of step 2 .*could not be written .* make room, then --resume"),
    ):
        save(tmp_path, 2, Tied())
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    loaded = Tied()
    checkpoint.load_weights(loaded, checkpoint.load(tmp_path))
    assert equal(loaded, first)


def test_a_step_of_another_run_is_not_taken_for_this_one(tmp_path):
    save(tmp_path, 3, Tied())
    assert save(tmp_path, 3, Tied()).name == "step-000003"
    with pytest.raises(Sparse24Error, match="step-000003 is of another run; name another --out"):
        checkpoint.save(tmp_path, 3, Tied(), {}, {"steps": 10}, ByteTokenizer())


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json", "settings.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage", "one bit", "of another run"])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, name, damage):
    path = save(tmp_path, 1, Tied()) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "one bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "of another run":
        other = checkpoint.save(tmp_path / "other", 1, Tied(8), {"x": torch.arange(4)}, {"steps": 8}, ByteTokenizer())
        path.write_bytes((other / name).read_bytes() + (b"\n" if name == "config.json" else b""))
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\x93" * 64)
    with pytest.raises(Sparse24Error, match="checkpoint .*step-000001 cannot be read .*truncated or corrupt"):
        checkpoint.load(tmp_path)


@pytest.mark.fault(45)
def test_state_that_would_run_code_is_refused(tmp_path):
    path = save(tmp_path, 1, Tied())
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({"version": 1, "evil": Evil()}, path / "state.pt")
    with pytest.raises(Sparse24Error, match="cannot be read"):
        checkpoint.load(tmp_path)
    assert not marker.exists()


@pytest.mark.fault(46)
def test_another_version_of_the_state_is_refused(tmp_path):
    path = save(tmp_path, 1, Tied())
    torch.save({"version": 99}, path / "state.pt")
    with pytest.raises(Sparse24Error, match="has version 99, this sparse24 reads 1"):
        checkpoint.load(tmp_path)


@pytest.mark.fault(46)
def test_weights_of_another_shape_are_refused_and_the_model_stays(tmp_path):
    save(tmp_path, 1, Tied(width=8))
    model = Tied()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        Sparse24Error,
        match=r"of another model: embedding.weight is \(10, 8\) in the checkpoint, \(10, 4\) in the model",
    ):
        checkpoint.load_weights(model, checkpoint.load(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.load(tmp_path) is None and checkpoint.load(tmp_path / "absent") is None
    shutil.copytree(save(tmp_path, 1, Tied()), tmp_path / "else" / ".step-000005.17-00ff.tmp")
    assert checkpoint.load(tmp_path / "else") is None
    assert not list((tmp_path / "else").iterdir())  # what was never finished is gone
