"""What a block costs the host, counted: functions of ours that one forward and backward pass call.

Time would be of the machine and of the hour. Kernels of small layers wait for Python, at about a microsecond for each
call of a function and what it does, so a block that calls more of them is a slower one (bench/bench_host.py has times).
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse24
from bench.bench_host import D_MODEL, Gated, Plain
from sparse24 import _library
from sparse24.ops.float8 import products
from sparse24.ops.gemm import launch as gemm_launch

PACKAGE = str(Path(sparse24.__file__).parent)
#: (forward, forward and backward), as many as they are: who needs another says what for, and who saves some lowers it
CALLS = {
    (Plain, None): (95, 176),
    (Gated, None): (106, 186),
    (Plain, "fp8"): (124, 227),
    (Gated, "fp8"): (137, 239),
    (Plain, "fp8-hybrid"): (121, 217),
}


class Launched:
    """The GPU's library, which takes every product. It computes none: only the host is looked at."""

    def sparse_gemm(self, *args):
        pass


def trained(block: type, precision: str | None) -> tuple[nn.Module, sparse24.Recipe]:
    """A block in the middle of a training: what is looked at once has been looked at. Without its recipe, which must
    stay alive, each pass would look for weights that were written.
    """
    model = nn.Sequential(block(dtype=torch.bfloat16))
    sparse24.sparsify(model, backend="sparse", precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    recipe = sparse24.Recipe(model, optimizer, total_steps=10**6, dense_fraction=0)
    for _ in range(4):
        model(torch.randn(64, D_MODEL).bfloat16().requires_grad_()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, recipe


def calls_of_ours(run) -> int:
    count, before = 0, sys.getprofile()

    def note(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    gc.disable()  # finalizers of what other tests leave behind would be counted
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


@pytest.mark.parametrize("block, precision", CALLS)
def test_a_block_calls_no_more_functions_than_it_did(monkeypatch, block, precision):
    model, recipe = trained(block, precision)
    x = torch.randn(64, D_MODEL).bfloat16().requires_grad_()
    monkeypatch.setattr(gemm_launch, "where", lambda t: (Launched(), _library.CUDA, 0, 0))
    monkeypatch.setattr(gemm_launch, "unsupported", lambda *product: "")
    monkeypatch.setattr(gemm_launch, "plan", lambda *product: (1, 0))
    monkeypatch.setattr(products, "where", lambda t: (Launched(), _library.CUDA, 0, 0))
    monkeypatch.setattr(products, "_unsupported", lambda *product: "")
    monkeypatch.setattr(products, "_plan", lambda *product: (1, 0))
    model(x).sum().backward()
    model.zero_grad()
    counts = calls_of_ours(lambda: model(x)), calls_of_ours(lambda: model(x).sum().backward())
    assert all(now <= ceiling for now, ceiling in zip(counts, CALLS[block, precision], strict=True)), counts
