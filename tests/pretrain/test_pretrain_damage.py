"""What other processes, full disks, links and damage do to a run: the right result, or one named line."""

import json
import os
import resource
import shutil

import forks
import numpy as np
import pytest
import torch
from run_files import alone, command_line, final_weights, history, stop_at
from safetensors.torch import load_file

from sparse24.errors import Sparse24Error
from sparse24.files import LOCK
from sparse24.pretrain import Stopped, checkpoint, pretrain, tokens
from sparse24.pretrain.metrics import read_rows
from sparse24.pretrain.settings import resolve
from sparse24.pretrain.train import Trainer


@pytest.fixture
def stopped_run(small, quiet, tmp_path):
    """A dense run that was stopped at step 6 of 12."""
    with pytest.raises(Stopped):
        pretrain(small(ffn=("dense",)), quiet, stop_at(6))
    return tmp_path / "run"


# ---- one process a folder ------------------------------------------------------------------------------------------


@pytest.mark.fault(93)
def test_a_second_process_is_refused_with_the_pid_and_the_first_goes_on(small, quiet, tmp_path):
    lines = []

    def second(done):
        if done == 3:
            for changes in (dict(resume=True), dict(overwrite=True)):
                with pytest.raises(
                    Sparse24Error, match=rf"run is in use by process {os.getpid()} .*kill {os.getpid()}"
                ):
                    pretrain(small(ffn=("dense",), **changes), quiet)
            lines.append(done)

    summary = pretrain(small(ffn=("dense",)), quiet, second)
    assert lines == [3] and summary["arms"]["dense"]["steps"] == 12
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_was_taken_while_this_one_started_is_refused(small, quiet, tmp_path, monkeypatch):
    """The first look at the folder sees nothing; by the time of the lock another run has been there."""
    from sparse24.pretrain import job

    look, seen = job.refuse_mixed_runs, []

    def late(out, settings):
        if not seen:
            seen.append(out)
            out.mkdir()
            (out / "config.json").write_text("{}")
            return None
        return look(out, settings)

    monkeypatch.setattr(job, "refuse_mixed_runs", late)
    with pytest.raises(Sparse24Error, match="already holds a run"):
        pretrain(small(ffn=("dense",)), quiet)
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


@pytest.mark.fault(93)
def test_the_lock_of_a_killed_run_hinders_nobody(small, quiet, stopped_run):
    (stopped_run / LOCK).write_text(f"{os.getppid()} elsewhere\n")
    assert pretrain(small(ffn=("dense",), resume=True), quiet)["arms"]["dense"]["steps"] == 12


# ---- links and old runs --------------------------------------------------------------------------------------------


@pytest.mark.fault(94)
def test_overwrite_replaces_a_run_whose_checkpoints_lie_on_another_disk(small, quiet, tmp_path):
    out, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    out.mkdir()
    (out / "checkpoint").symlink_to(disk)
    pretrain(small(ffn=("dense",), seed=0), quiet)
    old = final_weights(out, "dense")
    pretrain(small(ffn=("dense",), seed=1, overwrite=True), quiet)
    new = final_weights(out, "dense")
    fresh = tmp_path / "fresh"
    pretrain(small(ffn=("dense",), seed=1, out=str(fresh)), quiet)
    expected = final_weights(fresh, "dense")
    assert (out / "checkpoint").is_symlink()
    assert all(torch.equal(new[name], expected[name]) for name in expected)
    assert not all(torch.equal(new[name], old[name]) for name in old)


def test_overwrite_that_cannot_remove_says_so(small, quiet, stopped_run, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(Sparse24Error, match="checkpoint could not be .*Permission denied"):
        pretrain(small(ffn=("dense",), seed=1, overwrite=True), quiet)


@pytest.mark.fault(94)
def test_planted_links_are_replaced_not_followed(small, quiet, tmp_path):
    out, mine = tmp_path / "run", tmp_path / "mine"
    out.mkdir()
    mine.write_text("mine")
    for name in ("metrics.csv", "loss.png", "flip_rate.png", "summary.json", "summary.md", "samples.txt"):
        (out / name).symlink_to(mine)
    for name in ("config.json.writing", "metrics.csv.writing", "summary.json.writing"):
        (out / name).symlink_to(mine)
    pretrain(small(ffn=("dense",)), quiet)
    assert mine.read_text() == "mine" and len(history(out, "dense")) == 13


# ---- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "tokenizer.json", "config.json", "settings.json"])
def test_one_flipped_bit_in_any_file_of_a_checkpoint_stops_the_resume(small, quiet, stopped_run, name):
    path = stopped_run / "checkpoint" / "dense" / "step-000006" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Sparse24Error, match=f"step-000006 cannot be read .*{name}.* start anew with --overwrite"):
        pretrain(small(ffn=("dense",), resume=True), quiet)


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_files_of_two_runs_are_not_mixed(small, quiet, stopped_run, tmp_path, name):
    other = tmp_path / "other"
    with pytest.raises(Stopped):
        pretrain(small(ffn=("dense",), seed=1, out=str(other)), quiet, stop_at(6))
    step = "checkpoint/dense/step-000006"
    shutil.copy(other / step / name, stopped_run / step / name)
    with pytest.raises(Sparse24Error, match=f"{name} is not the file that was written"):
        pretrain(small(ffn=("dense",), resume=True), quiet)


@pytest.mark.fault(47)
def test_metrics_with_a_tail_that_is_no_text_go_on(small, quiet, stopped_run, tmp_path):
    with (stopped_run / "metrics.csv").open("ab") as f:
        f.write(b"dense,7,sparse,\xff\xfe\x00\x80,1,2\r\ndense,8,\x00\x00\x00")
    pretrain(small(ffn=("dense",), resume=True), quiet)
    pretrain(small(ffn=("dense",), out=str(tmp_path / "whole")), quiet)
    assert history(stopped_run, "dense") == history(tmp_path / "whole", "dense")


@pytest.mark.fault(47)
@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "\x00" * 100, "arm,step\ndense,3\n"])
def test_metrics_that_hold_nothing_give_a_table_or_a_named_error(small, quiet, stopped_run, content):
    (stopped_run / "metrics.csv").write_text(content)
    summary = pretrain(small(ffn=("dense",), resume=True), quiet)
    assert summary["arms"]["dense"]["steps"] == 12


def test_metrics_that_are_gone_after_the_last_step_are_told(small, quiet, tmp_path):
    pretrain(small(ffn=("dense",)), quiet)
    for name in ("metrics.csv", "summary.json"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(Sparse24Error, match="metrics.csv lacks the losses of dense.*--overwrite"):
        pretrain(small(ffn=("dense",), resume=True), quiet)


@pytest.mark.fault(45, 47)
@pytest.mark.parametrize(
    "changes",
    [{"ffn": "sparse"}, {"lr": "a"}, {"steps": None}, {"steps": 1e400}, {"data": [5]}, {"resume": 1}, {"layers": True}],
    ids=str,
)
def test_a_config_with_other_types_is_refused(small, quiet, stopped_run, changes):
    path = stopped_run / "config.json"
    config = json.loads(path.read_text())
    config["settings"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(Sparse24Error, match="config.json is not the config.json of a run|other settings"):
        pretrain(small(ffn=("dense",), resume=True), quiet)


@pytest.mark.fault(45, 47)
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"data": ' + "9" * 5000 + "}", "[]", '{"data": 1, "settings": 5}', ""]
)
def test_a_config_that_is_none_is_refused(small, quiet, stopped_run, text):
    (stopped_run / "config.json").write_text(text)
    with pytest.raises(Sparse24Error, match="is not the config.json of a run"):
        pretrain(small(ffn=("dense",), resume=True), quiet)


@pytest.mark.parametrize("text", ['{"arms": 5}', "[]", '{"arms": {"dense": {}}}', '{"arms": {"dense": 5}}', "{"])
def test_a_summary_that_is_none_is_made_anew(small, quiet, tmp_path, text):
    whole = pretrain(small(ffn=("dense",)), quiet)
    (tmp_path / "run" / "summary.json").write_text(text)
    again = pretrain(small(ffn=("dense",), resume=True), quiet)
    assert again["arms"]["dense"]["valid_loss"] == whole["arms"]["dense"]["valid_loss"]


@pytest.mark.fault(47)
@pytest.mark.parametrize("name", ["train.bin", "valid.bin", "tokenizer.json", "meta.json", "SHA256SUMS"])
def test_changed_tokens_in_the_cache_are_made_anew(small, tmp_path, name):
    settings, lines = resolve(small(cache_dir=str(tmp_path / "cache"))), []
    before = tokens.prepare(settings)
    ids = np.array(before.train)
    (folder,) = (tmp_path / "cache").iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1  # the same size; of ids, another token
    (folder / name).write_bytes(content)
    again = tokens.prepare(settings, lines.append)
    assert np.array_equal(again.train, ids) and any("not as they were written" in line for line in lines)


# ---- a full disk ---------------------------------------------------------------------------------------------------


def with_a_full_disk(limit, *arguments):
    """`python -m sparse24` that can write no larger file from step 7 on."""
    step = Trainer.train_step

    def limited(self):
        if self.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return step(self)

    Trainer.train_step = limited
    command_line(*arguments)


@pytest.mark.fault(62)
@pytest.mark.parametrize("limit", [1, 30_000, 100_000])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_resume_goes_on(small, quiet, tmp_path, limit):
    """The limit of file sizes stands for the disk: metrics, weights and state meet it in turn."""
    out, whole, s = tmp_path / "run", tmp_path / "whole", small(ffn=("dense",))
    pretrain(small(ffn=("dense",), out=str(whole)), quiet)
    words = [f"--{name.replace('_', '-')}={getattr(s, name)}" for name in (
        "cache_dir", "device", "layers", "width", "heads", "ctx", "vocab_size", "batch", "micro_batch", "steps",
        "warmup", "lr", "mask_interval", "eval_interval", "eval_tokens", "save_interval", "samples", "sample_tokens",
        "out",
    )]  # fmt: skip
    os.mkfifo(tmp_path / "told")  # a pipe may be written to
    arguments = (limit, "pretrain", "--data", s.data[0], "--ffn", "dense", *words)
    process = forks.context().Process(target=alone, args=(tmp_path / "told", with_a_full_disk, *arguments))
    process.start()
    told = (tmp_path / "told").read_text()
    process.join(timeout=240)
    assert process.exitcode == 2 and "Traceback" not in told, told
    expected, weights = history(whole, "dense"), final_weights(whole, "dense")
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: ") and "could not be written" in last and "make room, then --resume" in last
    assert [p.name for p in (out / "checkpoint" / "dense").iterdir()] == ["step-000005"]
    pretrain(small(ffn=("dense",), resume=True), quiet)
    assert history(out, "dense") == expected
    ours = final_weights(out, "dense")
    assert ours.keys() == weights.keys() and all(torch.equal(ours[k], weights[k]) for k in weights)


# ---- the loop itself -----------------------------------------------------------------------------------------------


def test_clipping_and_learning_rates_are_those_of_a_loop_by_hand(small, quiet, tmp_path):
    """A clip so small that each step's gradient is cut, and the rate of row k that of step k - 1."""
    from sparse24.pretrain.model import build_model, build_optimizer, model_config, next_token_loss
    from sparse24.pretrain.train import learning_rate

    given = small(ffn=("dense",), clip=1e-3, micro_batch=4)
    pretrain(given, quiet)
    s = resolve(given)
    rows = read_rows(tmp_path / "run" / "metrics.csv")[1:]
    assert [row["lr"] for row in rows] == [learning_rate(step, s) for step in range(s.steps)]
    assert all(row["grad_norm"] > 1e-2 for row in rows)

    data = tokens.prepare(s)
    model = build_model(model_config(s, "dense", data.tokenizer.vocab_size, data.tokenizer.end_of_text), s.seed).train()
    optimizer, batches = build_optimizer(model, s), tokens.Batches(data.train, s.ctx, s.batch, s.seed)
    for step in range(s.steps):
        x, y = map(torch.from_numpy, batches(step))
        next_token_loss(model, x, y).backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        for parameter in model.parameters():
            parameter.grad *= 1e-3 / (norm + 1e-6)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_file(checkpoint.complete(tmp_path / "run" / "checkpoint" / "dense")[-1][1] / "model.safetensors")
    ours = dict(model.named_parameters())
    unclipped = build_model(model.config, s.seed)  # how far training went at all
    for name, tensor in trained.items():
        moved = (tensor - dict(unclipped.named_parameters())[name]).abs().max()
        assert (tensor - ours[name]).abs().max() <= 1e-3 * moved + 1e-7, name


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_folder_that_nobody_may_write_is_named(small, quiet):
    """Root may write where others may not; in /proc not even root may."""
    with pytest.raises(Sparse24Error, match="--out /proc/run cannot be written .*; name a folder that can"):
        pretrain(small(out="/proc/run"), quiet)


def test_a_folder_without_permission_is_named_and_not_left_behind(small, quiet, tmp_path, monkeypatch):
    import tempfile

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(
        Sparse24Error, match="--out .*run cannot be written .Permission denied.; name a folder that can"
    ):
        pretrain(small(), quiet)
    assert not (tmp_path / "run").exists()
