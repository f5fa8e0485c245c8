"""Tuning of the sparse GEMM: only right results win, and a cache on disk that is broken or of elsewhere is not used.

The library and the clock are stand-ins in the first part, which runs without a GPU; the second tunes on one.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from gemm_cases import packed_rows

from sparse24 import Sparse24Error, Sparse24Warning, _library, ops
from sparse24.formats import GemmProblem
from sparse24.ops.gemm import launch as gemm_launch
from sparse24.ops.gemm import tuned_products
from sparse24.ops.gemm import tuning as gemm_tuning

KEY = GemmProblem(2, 3072, 768, 16384, 1, 1)
RIGHT, SLOW, WRONG = 11, 12, 13
TIMES = {RIGHT: 20.0, SLOW: 30.0, WRONG: 1.0}


class Library:
    """What tuning asks of the binding."""

    configs = [SLOW, RIGHT, WRONG]

    def sparse_gemm_configs(self, *args):
        return list(self.configs)

    def sparse_gemm_config(self, *args):
        return f"config {args[1]}"


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
    assert gemm_tuning.tuned_config(KEY, 0) == RIGHT


def test_a_config_that_leaves_values_unwritten_is_wrong(tuner):
    out = torch.eye(4)
    idle = gemm_tuning.Product("sparse_mm", KEY, lambda config: None, out, lambda: torch.eye(4))
    with pytest.raises(Sparse24Error, match="no config of sparse_mm gives the right result"):
        gemm_tuning.tune(idle, 0)


def test_no_right_config_is_an_error_and_nothing_is_kept(tuner):
    with pytest.raises(Sparse24Error, match="please report"):
        gemm_tuning.tune(product(wrong=Library.configs), 0)
    assert not tuner.exists() and gemm_tuning.tuned_config(KEY, 0) == 0


def test_equal_times_keep_the_librarys_own_choice():
    assert gemm_tuning.fastest({5: 2.0, 3: 2.0, 9: 2.5}, "sparse_mm") == 5


def test_the_cache_is_read_again_by_another_process(tuner):
    gemm_tuning.remember(KEY, RIGHT, 0)
    gemm_tuning.remember(KEY._replace(out_dtype=0), SLOW, 1)
    gemm_tuning._read.cache_clear()
    assert gemm_tuning.tuned_config(KEY, 0) == RIGHT
    assert gemm_tuning.tuned_config(KEY, 1) == 0  # another GPU
    assert gemm_tuning.tuned_config(KEY._replace(k=8192), 0) == 0  # another product
    assert json.loads(tuner.read_text()) == {
        "gpu 0": {"2 3072 768 16384 1 1": RIGHT},
        "gpu 1": {"2 3072 768 16384 1 0": SLOW},
    }
    assert [p.name for p in tuner.parent.iterdir()] == ["gemm.json"]  # no scratch file stays


def test_kernels_of_another_gpu_are_tuned_apart(monkeypatch):
    gpu = type("Properties", (), {"name": "H200", "multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    keys = set()
    for asked in ("", "sm80", "sm86"):
        monkeypatch.setenv("SPARSE24_ARCH", asked)
        keys.add(gemm_tuning.device_key.__wrapped__(0))
    monkeypatch.delenv("SPARSE24_ARCH")
    assert gemm_tuning.device_key.__wrapped__(0) in keys and len(keys) == 3


def test_configs_that_this_build_does_not_have_are_not_used(tuner):
    gemm_tuning.remember(KEY, 99, 0)
    assert gemm_tuning.tuned_config(KEY, 0) == 0


@pytest.mark.parametrize("content", ["", "not json", "[1, 2]", '{"gpu 0": 3}', '{"gpu 0": {"a": "b"}}'])
def test_a_broken_cache_is_told_of_ignored_and_replaced(tuner, content):
    tuner.parent.mkdir()
    tuner.write_text(content)
    _library.warn_once.cache_clear()
    with pytest.warns(Sparse24Warning, match="gemm.json is not readable"):
        assert gemm_tuning.tuned_config(KEY, 0) == 0
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
    assert gemm_tuning.tuned_config(KEY, 0) == RIGHT and not tuner.exists()


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv(gemm_tuning.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gemm_tuning.cache_file() == tmp_path / "sparse24" / "gemm.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_tuning_without_a_gpu_says_what_is_missing():
    with pytest.raises(Sparse24Error, match="tune_gemm needs a GPU with sparse kernels"):
        ops.tune_gemm(64, 64, 64)


# ---- on a GPU -------------------------------------------------------------------------------------------------------

LAYERS = [  # tokens, in_features, out_features, dtype, dtype of the weight gradient
    (512, 256, 1024, torch.bfloat16, None),
    (1000, 768, 320, torch.float16, torch.float32),
    (65, 36, 100, torch.bfloat16, torch.float32),  # padded, all three
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache file that is empty as yet."""
    monkeypatch.setenv(gemm_tuning.CACHE_VARIABLE, str(tmp_path / "gemm.json"))
    forget()
    yield tmp_path / "gemm.json"
    monkeypatch.undo()
    forget()


def forget():
    """What a new process does not know."""
    gemm_tuning._read.cache_clear()
    gemm_launch.plan.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """(pass, m, n, k, dtype, out dtype) and config of each product that ops launch."""
    seen = []

    class Watched:
        def __getattr__(self, name):
            return getattr(_library.binding(), name)

        def sparse_gemm(self, *args):
            problem, *_, (config, _), _, _, _ = args
            seen.append((problem, config))
            _library.binding().sparse_gemm(*args)

    original = gemm_launch.where
    monkeypatch.setattr(gemm_launch, "where", lambda t: (Watched(), *original(t)[1:]))
    return seen


def check_products(tokens, in_features, out_features, dtype, grad_dtype):
    """All six, against exact ones."""
    make = lambda *shape: torch.randint(-2, 3, shape, device="cuda").to(dtype)  # noqa: E731
    x, dy, w = make(tokens, in_features), make(tokens, out_features), make(out_features, in_features)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w)
    (pruned_x, *packed_x), (pruned_dy, *packed_dy) = packed_rows(x), packed_rows(dy)
    assert torch.equal(ops.sparse_mm_input(*packed_x, w), (pruned_x.double() @ w.double().T).to(dtype))
    assert torch.equal(ops.sparse_mm_grad_input_output(*packed_dy, w), (pruned_dy.double() @ w.double()).to(dtype))
    w = w.masked_fill(~ops.unpack_mask(mask), 0).double()
    assert torch.equal(ops.sparse_mm(x, packed, E, out_features), (x.double() @ w.T).to(dtype))
    assert torch.equal(ops.sparse_mm_grad_input(dy, packed_t, E_t, in_features), (dy.double() @ w).to(dtype))
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device="cuda"))
    pruned = ops.decompress(packed_dy, E_dy, 2 * packed_dy.shape[0], out_features, transposed=True)[:tokens]
    dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype=grad_dtype)
    assert torch.equal(dw, (pruned.double().T @ x.double()).to(grad_dtype or dtype))
    packed_x, E_x = ops.mvue_compress(x, torch.tensor([3, 4], device="cuda"))
    pruned = ops.decompress(packed_x, E_x, 2 * packed_x.shape[0], in_features, transposed=True)[:tokens]
    dw = ops.sparse_mm_grad_weight_input(packed_x, E_x, dy, in_features, out_dtype=grad_dtype)
    assert torch.equal(dw, (dy.double().T @ pruned.double()).to(grad_dtype or dtype))


def stored(cache) -> dict:
    """What the file says of this GPU: product -> config."""
    (products,) = json.loads(cache.read_text()).values()
    return {tuple(int(number) for number in key.split()): config for key, config in products.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_fastest_config_of_each_pass_wins_is_kept_and_is_used(cache, launched, layer):
    trials = ops.tune_gemm(*layer[:4], grad_dtype=layer[4])
    winners = [t for t in trials if t.chosen]
    assert [t.product for t in winners] == [
        f"sparse_mm{end}"
        for end in ("", "_grad_input", "_grad_weight", "_grad_weight_input", "_input", "_grad_input_output")
    ]
    assert all(t.right and t.time_us > 0 for t in trials), trials
    for winner in winners:
        assert winner.time_us == min(t.time_us for t in trials if t.product == winner.product)
    known, library = stored(cache), _library.binding()
    assert len(known) == 6
    for (key, config), winner in zip(sorted(known.items()), winners, strict=True):
        assert config in library.sparse_gemm_configs(key, _library.CUDA, 0)
        assert library.sparse_gemm_config(key, config, _library.CUDA, 0) == winner.config
    for another_process in (False, True):
        if another_process:
            forget()
        launched.clear()
        check_products(*layer)
        assert dict(launched) == known and len(launched) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_winner_that_is_not_the_librarys_own_choice_is_used(cache, launched, monkeypatch, layer):
    monkeypatch.setattr(gemm_tuning, "fastest", lambda times, name: list(times)[-1])
    ops.tune_gemm(*layer[:4], grad_dtype=layer[4])
    known = stored(cache)
    own = {key: _library.binding().sparse_gemm_configs(key, _library.CUDA, 0)[0] for key in known}
    assert all(known[key] != own[key] for key in known)
    launched.clear()
    check_products(*layer)
    assert dict(launched) == known


@pytest.mark.gpu
@pytest.mark.parametrize("spoil", [lambda out: out[-1, -1].add_(64), lambda out: out[0, 0].fill_(float("nan"))])
def test_a_config_whose_result_is_wrong_does_not_win_on_a_gpu(cache, launched, monkeypatch, spoil):
    """The library's own choice, the first that is tried, made wrong in one element."""
    original = tuned_products._tunable_products

    def sabotaged(*args):
        for product in original(*args):
            bad = _library.binding().sparse_gemm_configs(product.key, _library.CUDA, 0)[0]

            def run(config, product=product, bad=bad):
                product.run(config)
                if config == bad:
                    spoil(product.out)

            yield dataclasses.replace(product, run=run)

    monkeypatch.setattr(tuned_products, "_tunable_products", sabotaged)
    monkeypatch.setattr(gemm_tuning, "fastest", lambda times, name: next(iter(times)))
    trials = ops.tune_gemm(512, 256, 1024)
    for name in {t.product for t in trials}:
        first, second, *others = (t for t in trials if t.product == name)
        assert not first.right and not first.chosen and math.isnan(first.time_us)
        assert second.chosen and all(t.right for t in (second, *others))
    known = stored(cache)
    launched.clear()
    check_products(512, 256, 1024, torch.bfloat16, None)
    assert dict(launched) == known


@pytest.mark.gpu
def test_tuning_leaves_the_random_numbers_of_training_alone(cache):
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    ops.tune_gemm(64, 64, 64)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (torch.cuda.get_rng_state(), torch.get_rng_state()), strict=True)
    )


@pytest.mark.gpu
def test_tuning_on_a_side_stream_is_right(cache, launched):
    with torch.cuda.stream(torch.cuda.Stream()):
        trials = ops.tune_gemm(512, 256, 1024)
        assert all(t.right and t.time_us > 0 for t in trials)
        check_products(512, 256, 1024, torch.bfloat16, None)


@pytest.mark.gpu
def test_dtypes_that_no_kernel_writes_are_refused(cache):
    with pytest.raises(Sparse24Error, match="out_dtype must be"):
        ops.tune_gemm(64, 64, 64, grad_dtype=torch.float16)
    assert not cache.exists()
