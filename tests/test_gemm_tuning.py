"""Tuning of the sparse GEMM: only right results win, and a cache on disk that is broken or of elsewhere is not used.

The library and the clock are stand-ins, so all of it runs without a GPU.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from sparse24 import Sparse24Error, Sparse24Warning, _library, ops
from sparse24.ops import gemm_tuning

KEY = (2, 3072, 768, 16384, 1, 1)
RIGHT, SLOW, WRONG = 11, 12, 13
TIMES = {RIGHT: 20.0, SLOW: 30.0, WRONG: 1.0}


class Library:
    """What tuning asks of the binding."""

    configs = [SLOW, RIGHT, WRONG]

    def sparse_gemm_configs(self, *args):
        return list(self.configs)

    def sparse_gemm_config(self, *args):
        return f"config {args[len(KEY)]}"


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """A cache file of its own, three configs, and times as in TIMES."""
    monkeypatch.setenv(gemm_tuning.CACHE_VARIABLE, str(tmp_path / "folder" / "gemm.json"))
    monkeypatch.setattr(_library, "binding", Library)
    monkeypatch.setattr(gemm_tuning, "device_key", lambda index: f"gpu {index}")
    monkeypatch.setattr(gemm_tuning, "time_interleaved", lambda runs: {code: TIMES[code] for code in runs})
    gemm_tuning._read.cache_clear()
    yield tmp_path / "folder" / "gemm.json"
    gemm_tuning._read.cache_clear()


def product(wrong=(WRONG,)) -> gemm_tuning.Product:
    out = torch.zeros(4, 4)

    def run(config):
        out.copy_(torch.eye(4))
        if config in wrong:
            out[3, 3] += 1

    return gemm_tuning.Product("sparse_mm_grad_weight", KEY, run, out, lambda: torch.eye(4))


def test_the_fastest_right_config_wins_and_a_wrong_one_never(tuner):
    trials = gemm_tuning.tune(product(), 0)
    assert [(t.config, t.right, t.chosen) for t in trials] == [
        (f"config {SLOW}", True, False),
        (f"config {RIGHT}", True, True),
        (f"config {WRONG}", False, False),
    ]
    assert trials[1].time_us == TIMES[RIGHT] and math.isnan(trials[2].time_us)
    assert gemm_tuning.tuned_config(*KEY, 0) == RIGHT


def test_a_config_that_leaves_values_unwritten_is_wrong(tuner):
    out = torch.eye(4)
    idle = gemm_tuning.Product("sparse_mm", KEY, lambda config: None, out, lambda: torch.eye(4))
    with pytest.raises(Sparse24Error, match="no config of sparse_mm gives the right result"):
        gemm_tuning.tune(idle, 0)


def test_no_right_config_is_an_error_and_nothing_is_kept(tuner):
    with pytest.raises(Sparse24Error, match="please report"):
        gemm_tuning.tune(product(wrong=Library.configs), 0)
    assert not tuner.exists() and gemm_tuning.tuned_config(*KEY, 0) == 0


def test_equal_times_keep_the_librarys_own_choice():
    assert gemm_tuning.fastest({5: 2.0, 3: 2.0, 9: 2.5}, "sparse_mm") == 5


def test_the_cache_is_read_again_by_another_process(tuner):
    gemm_tuning.remember(KEY, RIGHT, 0)
    gemm_tuning.remember((*KEY[:-1], 0), SLOW, 1)
    gemm_tuning._read.cache_clear()
    assert gemm_tuning.tuned_config(*KEY, 0) == RIGHT
    assert gemm_tuning.tuned_config(*KEY, 1) == 0  # another GPU
    assert gemm_tuning.tuned_config(2, 3072, 768, 8192, 1, 1, 0) == 0  # another product
    assert json.loads(tuner.read_text()) == {
        "gpu 0": {"2 3072 768 16384 1 1": RIGHT},
        "gpu 1": {"2 3072 768 16384 1 0": SLOW},
    }
    assert [p.name for p in tuner.parent.iterdir()] == ["gemm.json"]  # no scratch file stays


def test_configs_that_this_build_does_not_have_are_not_used(tuner):
    gemm_tuning.remember(KEY, 99, 0)
    assert gemm_tuning.tuned_config(*KEY, 0) == 0


@pytest.mark.parametrize("content", ["", "not json", "[1, 2]", '{"gpu 0": 3}', '{"gpu 0": {"a": "b"}}'])
def test_a_broken_cache_is_told_of_ignored_and_replaced(tuner, content):
    tuner.parent.mkdir()
    tuner.write_text(content)
    _library.warn_once.cache_clear()
    with pytest.warns(Sparse24Warning, match="gemm.json is not readable"):
        assert gemm_tuning.tuned_config(*KEY, 0) == 0
    gemm_tuning.remember(KEY, RIGHT, 0)
    assert json.loads(tuner.read_text()) == {"gpu 0": {"2 3072 768 16384 1 1": RIGHT}}


def test_a_write_that_fails_leaves_the_old_cache(tuner, monkeypatch):
    gemm_tuning.remember(KEY, RIGHT, 0)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(gemm_tuning.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        gemm_tuning.remember(KEY, SLOW, 0)
    assert json.loads(tuner.read_text())["gpu 0"]["2 3072 768 16384 1 1"] == RIGHT
    assert [p.name for p in tuner.parent.iterdir()] == ["gemm.json"]


def test_an_empty_variable_keeps_tuning_in_memory(monkeypatch, tuner):
    monkeypatch.setenv(gemm_tuning.CACHE_VARIABLE, "")
    assert gemm_tuning.cache_file() is None
    gemm_tuning.remember(KEY, RIGHT, 0)
    assert gemm_tuning.tuned_config(*KEY, 0) == RIGHT and not tuner.exists()


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(gemm_tuning.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gemm_tuning.cache_file() == tmp_path / "sparse24" / "gemm.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_tuning_without_a_gpu_says_what_is_missing():
    with pytest.raises(Sparse24Error, match="tune_gemm needs a GPU with sparse kernels"):
        ops.tune_gemm(64, 64, 64)


@pytest.mark.gpu
def test_tuned_products_stay_right(tmp_path, monkeypatch):
    monkeypatch.setenv(gemm_tuning.CACHE_VARIABLE, str(tmp_path / "gemm.json"))
    gemm_tuning._read.cache_clear()
    trials = ops.tune_gemm(512, 256, 1024)
    assert {t.product for t in trials} == {"sparse_mm", "sparse_mm_grad_input", "sparse_mm_grad_weight"}
    assert all(t.right for t in trials) and sum(t.chosen for t in trials) == 3
    assert (tmp_path / "gemm.json").exists()
    x = torch.randint(-2, 3, (512, 256), device="cuda").bfloat16()
    w = torch.randint(-2, 3, (1024, 256), device="cuda").bfloat16()
    mask, packed, E, *_ = ops.prune_compress(w)
    expected = x.float() @ w.masked_fill(~ops.unpack_mask(mask), 0).float().T
    assert torch.equal(ops.sparse_mm(x, packed, E, 1024, out_dtype=torch.float32), expected)
    gemm_tuning._read.cache_clear()
