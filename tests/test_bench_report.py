"""`bench --report`: one file with all that an owner of a GPU can tell, and what becomes of it in bench/results."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from bench import add_report
from sparse24 import _library
from sparse24.benchmark import command, report, suite, timing
from sparse24.convert import cost_published
from sparse24.errors import Sparse24Error

A100 = {
    "multiprocessors": 108, "memory_bandwidth": 1.555e12, "capability_major": 8, "capability_minor": 0, "reason": "",
    "cuda_built": True, "cuda_archs": "80, 90a", "gemm_archs": "sm_80, sm_90a",
}  # fmt: skip


@pytest.fixture
def a100(monkeypatch):
    """A made-up GPU that is measured in no time."""
    properties = type("Properties", (), {"name": "NVIDIA A100", "total_memory": 40 << 30})()
    monkeypatch.setattr(_library, "binding", lambda: object())
    monkeypatch.setattr(_library, "device_info", lambda index: A100)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(report, "copy_bandwidth", lambda: 1.25)
    for module in (report, timing):
        monkeypatch.setattr(module, "header", lambda: {"device": "NVIDIA A100", "torch": "2.9"})
    monkeypatch.setattr(command, "check_gpu", lambda: None)
    layers = [["bf16", "llama-7B", 100.0]]
    monkeypatch.setattr(suite, "feed_forwards", lambda table, *args: [table.add(*row) for row in layers])


def test_a_report_has_device_build_and_tables_and_is_whole_after_each_row(a100, tmp_path, capsys):
    path = tmp_path / "a100.json"
    begun = report.Report(path)
    table = timing.Table("ffn", ["weights", "layer", "dense_us"])
    begun.follow(table)
    assert json.loads(path.read_text())["tables"] == {}
    table.add("bf16", "llama-7B", 1.5)
    table.add("bf16", "llama-8B", float("nan"))
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    rows = [["bf16", "llama-7B", 1.5], ["bf16", "llama-8B", None]]
    assert found["tables"] == {"ffn": {"columns": table.columns, "rows": rows}}
    assert found["build"]["kernels"] == "80, 90a" and found["header"]["torch"] == "2.9"
    assert found["device"]["capability"] == "8.0" and found["device"]["copy_tb_s"] == 1.25
    rates = cost_published.rates_of_gpu((8, 0), 108, 1.555e12)
    assert found["device"]["rates"]["measured"] is False
    assert found["device"]["rates"]["dense_us_per_gflop"] == rates.dense_us_per_gflop


def test_a_report_becomes_results_of_a_device(a100, tmp_path):
    path = tmp_path / "a100.json"
    command.run_suite(("ffn",), True, None, path)
    (written,) = add_report.add(add_report.read(path), tmp_path / "a100")
    lines = written.read_text().splitlines()
    assert written.name == "ffn.csv" and lines[:3] == ["# device: NVIDIA A100", "# torch: 2.9", "# copy TB/s: 1.25"]
    (row,) = csv.DictReader(lines[3:])
    assert row["layer"] == "llama-7B" and row["dense_us"] == "100"
    assert add_report.text(None) == "nan", "as the benchmarks write what was not measured"


def test_what_a_small_gpu_does_not_hold_is_left_out_and_said(a100, monkeypatch, tmp_path, capsys):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(suite, "blocks", too_large)
    path = tmp_path / "a100.json"
    command.run_suite(("block", "ffn"), True, None, path)
    assert list(json.loads(path.read_text())["tables"]) == ["ffn"]
    assert "# block: too little GPU memory" in capsys.readouterr().out


def test_paths_and_files_that_are_no_reports_are_named(a100, tmp_path):
    with pytest.raises(Sparse24Error, match="--report cannot write .*name another file"):
        report.Report(tmp_path / "no folder" / "a100.json")
    with pytest.raises(SystemExit, match="is no report of `sparse24 bench --report`"):
        add_report.read(tmp_path / "absent.json")
    other = tmp_path / "other.json"
    other.write_text('{"format": 9}')
    with pytest.raises(SystemExit, match="must be a report of format 1, got 9"):
        add_report.read(other)


def test_a_report_of_distributed_runs_is_refused(run_cli, tmp_path):
    status, _, err = run_cli("bench", "--distributed", "--report", tmp_path / "r.json")
    assert status == 2 and "--report" in err
