"""The compiled library: its absence, a mismatch and importing are explained, never a surprise."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import sparse24
from sparse24 import Sparse24BuildError, Sparse24Warning, _library, ops, reference
from sparse24.cli import what_was_built
from sparse24.ops._common import where
from sparse24.testing import assert_same_bits


def forget_what_was_found():
    for cached in vars(_library).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.fixture
def another_library(monkeypatch):
    """Puts another binding in place of the compiled one, for one test."""

    def put(binding, why_missing=""):
        monkeypatch.setattr(_library, "_binding", binding)
        monkeypatch.setattr(_library, "_why_missing", why_missing)
        forget_what_was_found()

    yield put
    monkeypatch.undo()
    forget_what_was_found()


@pytest.mark.fault(37)
def test_without_a_library_ops_run_the_reference_and_say_so_once(another_library, recwarn):
    another_library(None, "sparse24._C was not built")
    w = torch.randn(64, 64)
    with pytest.warns(Sparse24Warning, match="no compiled library .*not built.*rebuild"):
        mask, packed, *_ = ops.prune_compress(w)
    assert_same_bits(mask, reference.transposable_mask(w), "mask")
    recwarn.clear()
    ops.decompress(packed, ops.prune_compress(w)[2], 64, 64)
    assert not [warning for warning in recwarn if issubclass(warning.category, Sparse24Warning)]
    answer = sparse24.is_available("cpu")
    assert not answer and answer.backend == "reference" and "not built" in answer.reason


@pytest.mark.fault(38)
def test_a_binding_of_other_sources_is_named_at_the_first_op(another_library):
    """The version is the same: an editable installation that was not built anew."""

    class Stale:
        interface = 1

        @staticmethod
        def version():
            return sparse24.__version__

    another_library(Stale())
    with pytest.raises(Sparse24BuildError, match="built from other sources .interface 1, .*pip install"):
        ops.transposable_mask(torch.randn(4, 4))
    assert not sparse24.is_available("cpu") and "other sources" in sparse24.is_available("cpu").reason


@pytest.mark.fault(38)
def test_a_library_of_another_version_is_named_at_the_first_op(another_library):
    class Old:
        @staticmethod
        def version():
            return "0.0.9"

    another_library(Old())
    with pytest.raises(Sparse24BuildError, match=rf"{sparse24.__version__} found libsparse24 0\.0\.9.*pip install"):
        ops.transposable_mask(torch.randn(8, 8))
    assert "0.0.9" in sparse24.is_available("cpu").reason


class Ampere:
    """A library with CUDA kernels for Hopper, beside a made-up GPU of another kind."""

    interface = _library.INTERFACE

    @staticmethod
    def version():
        return sparse24.__version__

    @staticmethod
    def device_info(index):
        reason = "sparse kernels are built for sm_90a, and this GPU is sm_80" if index == 0 else ""
        return {"cuda_built": True, "reason": reason, "capability_major": 8 + index, "capability_minor": 0}


@pytest.mark.fault(36, 38)
def test_a_gpu_without_kernels_is_named_once_and_its_ops_run_in_plain_pytorch(another_library, monkeypatch, recwarn):
    """Both versions, the GPU and the way to rebuild are in the message; a GPU with kernels is not affected."""
    another_library(Ampere())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    tensors = [
        SimpleNamespace(is_cuda=True, get_device=lambda index=index: index, dtype=torch.bfloat16) for index in (0, 1)
    ]
    with pytest.warns(Sparse24Warning, match=rf"cuda:0 .*sm_80 \(sparse24 .* {sparse24.__version__}\).*pip install"):
        assert where(tensors[0])[0] is None
    recwarn.clear()
    assert where(tensors[0])[0] is None and where(tensors[1])[1] == _library.CUDA
    assert not recwarn.list


@pytest.mark.fault(99)
def test_what_was_built_and_why_a_gpu_has_no_kernels_is_told(another_library, monkeypatch):
    """For which GPUs the library was compiled, and for one that it was not, the build that would have its code."""
    built = Ampere()
    reason = "the GPU is sm_80, and libsparse24 was built for 90a alone; build it with SPARSE24_CUDA_ARCHS=all"
    info = {"cuda_built": True, "cuda_archs": "90a", "gemm_archs": "sm_90a", "reason": reason}
    built.device_info = lambda index: {**info, "capability_major": 8, "capability_minor": 0}
    another_library(built)
    assert what_was_built() == "kernels for 90a; products for sm_90a"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = sparse24.is_available("cuda:0")
    assert not found and found.reason == reason and found.arch == "sm_80"


@pytest.mark.fault(39)
def test_importing_makes_no_cuda_context_and_survives_a_fork():
    code = (
        "import os, torch, sparse24\n"
        "assert not torch.cuda.is_initialized()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    w = torch.randn(8, 8)\n"
        "    os._exit(0 if sparse24.ops.is_transposable(sparse24.ops.transposable_mask(w)) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(34)
def test_threads_share_the_library_without_disturbing_each_other(device):
    """Bits do not depend on what other threads run."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    weights = [torch.randn(256, 256, device=device).to(dtype) for _ in range(8)]
    expected = [ops.prune_compress(w) for w in weights]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(ops.prune_compress, weights * 4), expected * 4, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)
