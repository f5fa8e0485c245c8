"""The command line: options, exit codes, one-line errors."""

import os
import shlex
import subprocess
import sys
import time

import forks
import pytest
from run_files import alone, command_line

from sparse24.pretrain.metrics import read_rows


@pytest.fixture
def arguments(text_file, cache_dir, tmp_path):
    options = (
        "--device cpu --layers 1 --width 32 --heads 2 --ctx 32 --vocab-size 300 --batch 4 --steps 6 --warmup 1 "
        "--mask-interval 2 --eval-interval 3 --eval-tokens 256 --samples 1 --sample-tokens 4"
    )
    return ["pretrain", "--data", text_file, "--cache-dir", cache_dir, "--out", tmp_path / "run", *options.split()]


def test_pretrain_prints_the_table_and_exits_with_0(run_cli, arguments, tmp_path):
    status, out, _ = run_cli(*arguments, "--ffn", "dense", "--ffn", "half", "--no-mvue")
    assert status == 0 and "| dense" in out and "| half" in out and "loss.png" in out
    assert read_rows(tmp_path / "run" / "metrics.csv", "half")[-1]["step"] == 6


def test_resume_takes_the_saved_settings(run_cli, arguments, tmp_path, cache_dir):
    assert run_cli(*arguments, "--ffn", "dense")[0] == 0
    status, out, err = run_cli("pretrain", "--resume", "--out", tmp_path / "run")
    assert status == 0 and "dense: finished before" in out
    status, out, err = run_cli("pretrain", "--resume", "--out", tmp_path / "run", "--width", 64)
    assert status == 2 and "width was 32, is 64" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--width", 33], "error: --width must be a multiple of --heads (2), got 33; use --width 34"),
        (["--data", "absent.txt"], "error: --data absent.txt does not exist; name UTF-8 text files or folders of them"),
        (["--ffn", "thin"], "error: --ffn must be one of dense, sparse, half, narrow, wide, activation, got 'thin'"),
        (["--resume"], "holds no run"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(run_cli, arguments, more, message):
    status, out, err = run_cli(*arguments, *more)
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_value_of_the_wrong_type_exits_with_2(run_cli, arguments):
    status, _, err = run_cli(*arguments, "--steps", "many")
    assert status == 2 and "--steps" in err


def test_help_lists_every_setting_with_its_meaning(run_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run_cli("pretrain", "--help")
    assert status == 0
    for name in (
        "--data",
        "--valid",
        "--preset",
        "--compare",
        "--no-mvue",
        "--mask-interval",
        "--resume",
        "--deterministic",
    ):
        assert name in out


def test_env_tells_versions_and_devices(run_cli):
    status, out, _ = run_cli("env")
    assert status == 0 and "torch" in out and "cpu" in out and "backend" in out


def test_tune_finds_a_decay_and_goes_on_where_it_stopped(run_cli, text_file, cache_dir, tmp_path):
    options = (
        "--device cpu --layers 1 --width 32 --heads 2 --ctx 32 --vocab-size 300 --batch 4 --micro-batch 2 --steps 40 "
        "--warmup 12 --mask-interval 3 --lr 0.01 --grid 0.01 --grid 0.1"
    )
    command = ["tune", "--data", text_file, "--cache-dir", cache_dir, "--out", tmp_path / "tune", *options.split()]
    status, out, err = run_cli(*command)
    assert status in (0, 1) and "decay" in out and not err  # 1: no decay was feasible
    for name in ("tune.json", "tune.png", "config.json"):
        assert (tmp_path / "tune" / name).stat().st_size > 0
    table = out[out.index("dense: flip rate") :]
    assert table in run_cli(*command)[1]
    status, _, err = run_cli(*command, "--width", 64)
    assert status == 2 and "holds a run with other settings or text" in err
    status, _, err = run_cli(*command, "--probe-step", 50)
    assert status == 2 and "error: --probe-step must not exceed --steps (40), got 50" in err


def test_tune_prints_a_command_that_trains_with_the_decay(run_cli, text_file, cache_dir, tmp_path):
    options = (
        "--device cpu --layers 1 --width 32 --heads 2 --ctx 32 --vocab-size 300 --batch 4 --steps 9 --warmup 6 "
        "--mask-interval 2 --lr 0.01 --no-mvue --grid 0 --grid 0.01 --grid 0.03 --grid 0.1 --grid 0.3 --grid 1"
    )
    status, out, _ = run_cli(
        "tune", "--data", text_file, "--cache-dir", cache_dir, "--out", tmp_path / "tune", *options.split()
    )
    assert status == 0, out
    words = shlex.split(out[out.index("use it with: ") :].partition(": ")[2])
    assert words[:4] == ["python", "-m", "sparse24", "pretrain"] and "--no-mvue" in words
    status, _, err = run_cli(*words[3:], "--samples", 0, "--out", tmp_path / "run")
    assert status == 0, err
    rows = read_rows(tmp_path / "run" / "metrics.csv", "sparse")
    assert rows[-1]["step"] == 9 and {row["decay"] for row in rows} > {float(words[-1])}


@pytest.fixture
def strange_names(text_file, tmp_path):
    """Options for a folder of texts whose names are not UTF-8."""
    if sys.platform != "linux":
        pytest.skip("elsewhere file names are no bytes")
    data = tmp_path / os.fsdecode(b"data \xff")
    data.mkdir()
    (data / os.fsdecode(b"\xe9t\xe9.txt")).write_bytes(text_file.read_bytes())
    (data / os.fsdecode(b"\xff.bin")).write_bytes(b"\0")
    return ["--data", str(data), "--ffn", "sparse"]


def test_file_names_may_be_any_bytes(arguments, strange_names, tmp_path):
    words = (*arguments, *strange_names)
    process = forks.context().Process(target=alone, args=(tmp_path / "told", command_line, *words))
    process.start()
    process.join(timeout=120)
    told = (tmp_path / "told").read_bytes()
    assert process.exitcode == 0, told[-2000:]
    assert b"skipped" in told and (tmp_path / "run" / "summary.md").is_file()


def test_file_names_may_be_any_bytes_on_a_terminal_that_cannot_print_them(arguments, strange_names, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sparse24", *map(str, arguments), *strange_names],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"skipped" in done.stdout + done.stderr and (tmp_path / "run" / "summary.md").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_sigterm_saves_and_exits_with_143(arguments, tmp_path):
    words = (*arguments, "--ffn", "dense", "--steps", "100000", "--warmup", "10")
    process = forks.context().Process(target=alone, args=(tmp_path / "told", command_line, *words))
    process.start()
    deadline = time.monotonic() + 240
    while len(read_rows(tmp_path / "run" / "metrics.csv")) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.join(timeout=120)
    told = (tmp_path / "told").read_text()
    assert process.exitcode == 143, told
    assert "stopped; saved" in told and "--resume --out" in told
    (saved,) = (tmp_path / "run" / "checkpoint" / "dense").iterdir()
    assert int(saved.name.removeprefix("step-")) == read_rows(tmp_path / "run" / "metrics.csv")[-1]["step"]
