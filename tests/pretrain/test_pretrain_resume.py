"""A run that was stopped goes on as if it had not been: same losses, same weights, bit for bit."""

import json
import os
import signal

import pytest
import torch
from run_files import final_weights, history, stop_at

from sparse24.errors import Sparse24Error
from sparse24.pretrain import Stopped, TrainingDiverged, checkpoint, pretrain
from sparse24.pretrain.train import Trainer


# 7: between two searches, between two checkpoints, in the sparse phase; 11: in the dense phase; 10: where it begins
@pytest.mark.parametrize("stop", [7, 10, 11])
@pytest.mark.parametrize("arm", ["dense", "sparse"])
def test_run_stopped_and_resumed_equals_the_uninterrupted_one(small, tmp_path, quiet, arm, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(small(out=str(whole), ffn=(arm,), dropout=0.1), quiet)
    with pytest.raises(Stopped):
        pretrain(small(out=str(parts), ffn=(arm,), dropout=0.1), quiet, stop_at(stop))
    assert len(history(parts, arm)) == stop + 1  # and the evaluation before the first step
    torch.manual_seed(12345)  # whatever the new process has drawn before
    pretrain(small(out=str(parts), ffn=(arm,), dropout=0.1, resume=True), quiet)
    assert history(parts, arm) == history(whole, arm)
    a, b = final_weights(whole, arm), final_weights(parts, arm)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_run_goes_on_from_its_last_checkpoint_without_double_rows(small, tmp_path, quiet):
    class Killed(BaseException):
        pass

    def kill(done):
        if done == 8:  # the checkpoint before is of step 5
            raise Killed

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(small(out=str(whole)), quiet)
    with pytest.raises(Killed):
        pretrain(small(out=str(parts)), quiet, kill)
    pretrain(small(out=str(parts), resume=True), quiet)
    assert history(parts, "sparse") == history(whole, "sparse")


def test_comparison_goes_on_with_the_arm_that_was_stopped(small, tmp_path, quiet):
    seen = []

    def on_step(done):
        seen.append(done)
        if len(seen) == 12 + 6:  # in the second arm
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        pretrain(small(compare=True), quiet, on_step)
    assert stopped.value.signal == signal.SIGTERM and stopped.value.path.name == "step-000006"
    seen.clear()
    summary = pretrain(small(compare=True, resume=True), quiet, seen.append)
    assert seen == list(range(7, 13)) and set(summary["arms"]) == {"dense", "sparse"}
    lines = []
    assert pretrain(small(compare=True, resume=True), lines.append)["arms"].keys() == summary["arms"].keys()
    assert "dense: finished before" in lines and "sparse: finished before" in lines


def test_resume_before_the_first_checkpoint_starts_anew(small, quiet):
    class Killed(BaseException):
        pass

    def kill(done):
        raise Killed

    with pytest.raises(Killed):
        pretrain(small(ffn=("dense",)), quiet, kill)
    lines = []
    pretrain(small(ffn=("dense",), resume=True), lines.append)
    assert "dense: no checkpoint yet, starting at step 0" in lines


def test_second_ctrl_c_stops_at_once(small, quiet):
    def twice(done):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pretrain(small(ffn=("dense",)), quiet, twice)
    assert signal.getsignal(signal.SIGINT) is before


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def stopped_run(small, quiet, tmp_path):
    with pytest.raises(Stopped):
        pretrain(small(ffn=("dense",)), quiet, stop_at(6))
    return tmp_path / "run"


def test_resume_with_other_settings_names_each_difference_and_changes_nothing(small, quiet, stopped_run):
    before = {p: p.read_bytes() for p in stopped_run.rglob("*") if p.is_file()}
    with pytest.raises(Sparse24Error, match="other settings: width was 32, is 64; .*steps was 12, is 20"):
        pretrain(small(ffn=("dense",), width=64, steps=20, resume=True), quiet)
    assert {p: p.read_bytes() for p in stopped_run.rglob("*") if p.is_file()} == before


def test_checkpoint_of_another_model_is_refused_by_what_differs(small, quiet, stopped_run):
    config = json.loads((stopped_run / "config.json").read_text())
    config["settings"] |= {"width": 64, "ffn_width": 256}  # somebody copied a checkpoint into another run's folder
    (stopped_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(Sparse24Error, match="checkpoint .*step-000006 is of another run: width was 32, is 64"):
        pretrain(small(ffn=("dense",), width=64, resume=True), quiet)


def test_resume_on_changed_text_is_refused(small, quiet, tmp_path, text_file):
    path = tmp_path / "words.txt"
    path.write_text(text_file.read_text())
    with pytest.raises(Stopped):
        pretrain(small(data=(str(path),), ffn=("dense",)), quiet, stop_at(6))
    path.write_text(text_file.read_text() + "One more line.\n")
    with pytest.raises(Sparse24Error, match="--resume: the text has changed since the run in .* began"):
        pretrain(small(data=(str(path),), ffn=("dense",), resume=True), quiet)


@pytest.mark.fault(101)
def test_resume_of_nothing_and_start_over_a_run_are_refused(small, quiet, tmp_path, stopped_run):
    with pytest.raises(Sparse24Error, match="--out .*empty holds no run .*leave --resume out"):
        pretrain(small(out=str(tmp_path / "empty"), resume=True), quiet)
    assert not (tmp_path / "empty").exists()
    with pytest.raises(
        Sparse24Error, match="--out .*run already holds a run; --resume goes on with it, --overwrite replaces it"
    ):
        pretrain(small(ffn=("dense",)), quiet)


def test_overwrite_replaces_the_run_and_nothing_else(small, quiet, stopped_run):
    (stopped_run / "notes.txt").write_text("mine")
    summary = pretrain(small(ffn=("dense",), steps=4, warmup=1, overwrite=True), quiet)
    assert summary["arms"]["dense"]["steps"] == 4 and len(history(stopped_run, "dense")) == 5
    assert (stopped_run / "notes.txt").read_text() == "mine"


# ---- NaN -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nan_at_step_8(monkeypatch):
    original = Trainer.train_step

    def poisoned(self):
        if self.step == 7:
            next(self.model.parameters()).data.fill_(float("nan"))
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)


@pytest.mark.parametrize("log_interval", [1, 4])
def test_nan_loss_names_the_step_and_keeps_the_last_good_checkpoint(
    small, quiet, tmp_path, monkeypatch, nan_at_step_8, log_interval
):
    with pytest.raises(
        TrainingDiverged,
        match="dense: loss nan .* at step 8 .*last good checkpoint is .*step-000005; start anew .* lower --lr",
    ):
        pretrain(small(ffn=("dense",), log_interval=log_interval, save_interval=5), quiet)
    found = checkpoint.load(tmp_path / "run" / "checkpoint" / "dense")
    assert found.state["step"] == 5 and all(torch.isfinite(w).all() for w in found.weights.values())
    assert (tmp_path / "run" / "loss.png").exists()
    monkeypatch.undo()
    pretrain(small(ffn=("dense",), resume=True), quiet)
    assert len(history(tmp_path / "run", "dense")) == 13


def test_signal_at_a_nan_step_does_not_save_it(small, quiet, tmp_path, nan_at_step_8):
    with pytest.raises(TrainingDiverged):
        pretrain(small(ffn=("dense",)), quiet, stop_at(8))
    assert os.listdir(tmp_path / "run" / "checkpoint" / "dense") == ["step-000005"]
