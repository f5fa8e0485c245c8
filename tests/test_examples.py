"""The examples run as they stand."""

import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Examples write into the current folder."""
    monkeypatch.chdir(tmp_path)


def test_plain_loop(tmp_path):
    assert example("plain_loop.py")(steps=20) < math.log(64)  # better than a guess among 64 ids
    state = torch.load(tmp_path / "plain_loop.pt", weights_only=True)
    assert state["recipe"]["step"] == 20 and state["recipe"]["phase"] == "dense"


def test_hf_trainer(tmp_path):
    pytest.importorskip("transformers")
    trainer = example("hf_trainer.py")(steps=10, out=str(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoint-10" / "sparse24.pt").is_file()
    assert any("sparse24/flip_rate" in entry for entry in trainer.state.log_history)


def test_accelerate_loop(tmp_path):
    """Its checkpoint takes the recipe along, so that a run in two parts equals one in one part."""
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(reset_partial_state=True)
    main = example("accelerate_loop.py")
    recipe = main(steps=12, out="whole", cpu=True)
    assert recipe.step == 12 and recipe.phase == "dense"
    assert torch.load(tmp_path / "whole" / "custom_checkpoint_0.pkl", weights_only=True)["step"] == 12
    again = main(steps=12, out="whole", cpu=True, resume=True)
    assert again.step == 12 and again.monitor.history() == recipe.monitor.history()
    for ours, theirs in zip(again.layers.values(), recipe.layers.values(), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_accelerate_loop_in_mixed_precision_on_a_gpu(precision):
    """Loss scaling may skip steps: the loop runs until as many have been taken as were asked for."""
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(reset_partial_state=True)
    recipe = example("accelerate_loop.py")(steps=8, mixed_precision=precision, out=precision)
    assert recipe.step == 8
    layer = next(iter(recipe.layers.values()))
    assert layer.packed.is_cuda and layer.packed.dtype == (torch.float16 if precision == "fp16" else torch.bfloat16)


def test_lightning_module():
    pytest.importorskip("lightning")
    callback = example("lightning_module.py")(steps=10)
    recipe = callback.recipe
    assert recipe.step == 10 and recipe.phase == "dense" and len(recipe.layers) == 6
    assert [step for step, _ in recipe.monitor.history()], "masks were searched on the way"
    # In the dense phase a layer is a plain one: its weight, not weight * mask.
    layer = next(iter(recipe.layers.values()))
    x = torch.randn(4, layer.in_features)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_ddp_with_one_process(tmp_path):
    """In a process of its own: process groups of a test before it would be in its way."""
    world = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    command = [sys.executable, str(EXAMPLES / "ddp.py"), "--steps", "10"]
    run = subprocess.run(command, env=os.environ | world, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "4 layers 2:4" in run.stdout and "step 10 of 10" in run.stdout, run.stdout


def test_tune_decay(tmp_path):
    result = example("tune_decay.py")(probe_step=30, out=str(tmp_path))
    assert len(result.table) == 7 and (tmp_path / "tune.png").is_file() and (tmp_path / "tune.json").is_file()


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_a_speedrun_with_muon_learns(operand):
    """Squared-ReLU layers under Muon and AdamW; the text's own noise leaves a loss of about 0.7."""
    losses = example("muon_speedrun.py")(steps=60, operand=operand)
    assert len(losses) == 60 and sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_notebook_runs_and_holds_its_outputs(tmp_path):
    """In less than a minute; what it prints is in the file, but for rounding, which differs from machine to machine."""
    pytest.importorskip("matplotlib").use("agg")
    root = EXAMPLES.parent
    notebook_of = runpy.run_path(str(root / "packaging" / "notebook.py"))
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    start = time.process_time()
    made = notebook_of["run"](notebook, str(tmp_path))
    assert time.process_time() - start < 60
    stored = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [[out["output_type"] for out in outputs] for outputs in made] == [
        [out["output_type"] for out in outputs] for outputs in stored
    ]
    for ours, theirs in zip(made, stored, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if "text" in a and "GPU" not in "".join(b["text"]) and "loss" not in "".join(b["text"]):
                assert a["text"][1:] == b["text"][1:]
    page = notebook_of["as_markdown"](notebook)
    assert "data:image/png;base64," in page and "```python\nimport torch" in page
