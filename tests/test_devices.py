"""Where work runs: on the device and stream of the tensors, whatever thread asks; a launch that fails says which."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparse24 import _library, functional, ops
from sparse24.ops import _common

ROOT = Path(__file__).resolve().parents[1]


def compute_dtype(device):
    return torch.float32 if device == "cpu" else torch.bfloat16


def train_once(device, seed=0, width=64):
    """Results of every product of a layer on `device`: y, dx, dw, and the packed forms."""
    generator = torch.Generator().manual_seed(seed)
    dtype = compute_dtype(torch.device(device).type)
    x = torch.randn(40, width, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(2 * width, width, generator=generator).to(device, dtype).requires_grad_()
    mask, *packed = ops.prune_compress(w.detach())
    y = functional.sparse_linear(x, w, *packed, seed=torch.tensor([seed, 1], device=device))
    y.backward(torch.randn(40, 2 * width, generator=generator).to(device, dtype))
    return [t.cpu() for t in (y.detach(), x.grad, w.grad, mask.view(torch.uint8), *packed)]


def all_equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- devices ----------------------------------------------------------------------------------------------------------


class SomewhereElse:
    """Of a tensor, what decides where its work runs."""

    dtype = torch.bfloat16

    def __init__(self, device):
        self.device = torch.device(device)
        self.is_cuda, self.get_device = self.device.type == "cuda", lambda: self.device.index


@pytest.mark.fault(31, 33)
def test_work_goes_to_the_device_of_the_tensor_and_to_its_stream(monkeypatch):
    """With made-up GPUs: the current device is never asked for, the current stream of the tensor's device is."""
    asked = []
    monkeypatch.setattr(_library, "backend_code", lambda kind: _library.CUDA if kind == "cuda" else _library.CPU)
    monkeypatch.setattr(_library, "runs_on", lambda index: True)
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: asked.append(index) or 1000 + index, raising=False
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("the current device does not matter"))
    for index in (1, 0, 1):
        _, code, device, stream = _common.where(SomewhereElse(f"cuda:{index}"))
        assert (code, device, stream) == (_library.CUDA, index, 1000 + index)
    assert asked == [1, 0, 1]


@pytest.mark.multigpu
@pytest.mark.fault(31)
def test_tensors_on_the_second_gpu_work_while_the_first_is_current():
    """The same bits as on the first, and the current device is what it was."""
    torch.cuda.set_device(0)
    expected = train_once("cuda:0")
    assert all_equal(train_once("cuda:1"), expected)
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert all_equal(train_once("cuda:0"), expected)
        assert torch.cuda.current_device() == 1


@pytest.mark.multigpu
@pytest.mark.fault(32)
def test_operands_on_two_gpus_are_named():
    w = torch.randn(64, 64, device="cuda:0", dtype=torch.bfloat16)
    mask, packed, E, *_ = ops.prune_compress(w)
    with pytest.raises(ValueError, match="cuda:0 but .* cuda:1"):
        ops.sparse_mm(w.to("cuda:1"), packed, E, 64)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault(34)
def test_threads_train_side_by_side_without_disturbing_each_other(device):
    """Forward and backward of many layers in four threads: the bits of one thread. Nothing is shared but read-only."""
    expected = [train_once(device, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda s: train_once(device, s % 8), range(32)), expected * 4, strict=True):
            assert all_equal(ours, theirs)


@pytest.mark.fault(34)
def test_backward_may_run_on_a_thread_that_has_done_nothing_before(device):
    """Autograd has threads of its own; here a fresh one calls backward of a graph that another made."""
    dtype = compute_dtype(device)
    x = torch.randn(24, 64, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(48, 64, device=device, dtype=dtype, requires_grad=True)
    _, *packed = ops.prune_compress(w.detach())
    dy, seed = torch.randn(24, 48, device=device, dtype=dtype), torch.tensor([1, 2], device=device)
    expected = torch.autograd.grad(functional.sparse_linear(x, w, *packed, seed=seed), (x, w), dy)
    y = functional.sparse_linear(x, w, *packed, seed=seed)
    thread = threading.Thread(target=y.backward, args=(dy,))
    thread.start()
    thread.join()
    assert all_equal((x.grad, w.grad), expected)


@pytest.mark.multigpu
@pytest.mark.fault(34)
def test_two_gpus_in_turn_and_at_once():
    """Two devices in one thread, then a thread for each."""
    expected = [train_once("cuda:0", seed) for seed in range(4)]
    for seed in range(4):
        assert all_equal(train_once(f"cuda:{seed % 2}", seed), expected[seed])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: train_once(f"cuda:{seed % 2}", seed), range(4)))
    assert all(all_equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


# -- launches ---------------------------------------------------------------------------------------------------------


CHECK = re.compile(r"SP24_CHECK_LAUNCH\(\s*(?:op|\"[\w ]+)")  # begins with the name of the op


def definitions(text: str) -> list[tuple[str, str]]:
    """(name, source) of what is defined at the outermost level: functions, and classes that launch."""
    found = []
    for source in re.split(r"^};?$", re.sub(r"//.*", "", text), flags=re.MULTILINE):
        name = re.search(r"\bstruct (\w+)[^;{]*{|(\w+)\([^;{}]*\)[^;{}]*{", source)
        found.append((name[1] or name[2] if name else "", source))
    return found


def last_call(source: str, names: set[str]) -> int:
    """Where the last launch, or the last use of one of `names`, ends; -1 where there is none."""
    calls = [call.end() for call in re.finditer(r"<<<", source)]
    calls += [call.end() for name in names for call in re.finditer(rf"\b{name}\b", source)]
    return max(calls, default=-1)


def unchecked_launches(sources: list[tuple[str, str]]) -> set[str]:
    """Functions that launch a kernel which neither they check nor those that call them."""
    unchecked: set[str] = set()  # these leave the check to their callers
    while True:
        ends = {(name, source): last_call(source, unchecked - {name}) for name, source in sources}
        left = {name for (name, source), end in ends.items() if end >= 0 and not CHECK.search(source, end)}
        if left == unchecked:
            break
        unchecked = left
    uses = {name: re.compile(rf"\b{name}\b") for name in unchecked}
    return {name for name in unchecked if not any(uses[name].search(text) for other, text in sources if other != name)}


@pytest.mark.fault(41)
def test_every_launch_in_the_sources_is_checked_by_name():
    """After `<<<...>>>`, in its function or in all that call it, comes SP24_CHECK_LAUNCH."""
    paths = [path for kind in ("*.cuh", "*.cu") for path in sorted((ROOT / "csrc").rglob(kind))]
    sources = [d for path in paths for d in definitions(path.read_text(encoding="utf-8"))]
    assert sum(source.count("<<<") for _, source in sources) > 10
    assert unchecked_launches(sources) == set()
    forgetful = [(name, source.replace("SP24_CHECK_LAUNCH", "")) for name, source in sources]
    assert {"mask_gap", "search_and_pack"} <= unchecked_launches(forgetful)


@pytest.mark.fault(41)
def test_a_sparse_gemm_that_does_not_launch_is_an_error_with_its_shapes():
    """A cluster is launched by a call that returns a status; the extents are added where they are known."""
    for path in sorted((ROOT / "csrc").rglob("*.[hc]*")):
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"\bcudaLaunch\w+\(", text)) == len(
            re.findall(r"SP24_CHECK_CUDA\(\s*cudaLaunch\w+\(", text)
        ), f"{path}: a launch whose status is dropped"
    run = (ROOT / "csrc/gemm/sparse_gemm.cpp").read_text(encoding="utf-8")
    to_catch = r"try {\s*arch\.launchers\[.*?}\s*catch \(const Error& error\) {[^}]*to_string\(desc\)"
    assert re.search(to_catch, run, re.DOTALL)


@pytest.mark.gpu
@pytest.mark.fault(41)
def test_a_launch_that_fails_names_the_op_and_its_shapes():
    """First one that CUDA refuses and forgets: the legacy stream while a blocking stream captures. Then one after an
    assertion in a kernel of PyTorch, which leaves nothing to be launched any more; so all of it in another process.
    """
    code = """
        import ctypes, torch
        from sparse24 import Sparse24Error, ops

        grad, w = torch.zeros(64, 128, device="cuda"), torch.randn(64, 128, device="cuda")
        mask = ops.transposable_mask(w)
        expected = ops.masked_decay_(grad.clone(), w, mask, 0.5)
        torch.cuda.synchronize()

        def fails(reason):
            try:
                ops.masked_decay_(grad, w, mask, 0.5)
            except Sparse24Error as error:
                for word in ("masked_decay", "[64, 128]", "CUDA reports " + reason):
                    assert word in str(error), error
            else:
                raise SystemExit("the launch did not fail")

        with open("/proc/self/maps") as maps:
            runtime = ctypes.CDLL(next(line.split()[-1] for line in maps if "libcudart" in line))
        stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
        assert runtime.cudaStreamCreate(ctypes.byref(stream)) == 0
        assert runtime.cudaStreamBeginCapture(stream, 0) == 0
        fails("cudaErrorStreamCapture")
        runtime.cudaStreamEndCapture(stream, ctypes.byref(graph))
        runtime.cudaGetLastError()
        assert torch.equal(ops.masked_decay_(grad, w, mask, 0.5), expected), "the next one works"

        torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")]
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            pass
        fails("cudaErrorAssert")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
