"""Sparse products by CUTLASS' kernels for sm_80, called as published 2:4 training calls them, on any GPU from sm_80 on.

    python -m bench.peers.cutlass_products         # makes build/peers/libcutlass_products.so; needs nvcc, no GPU

PyTorch has the same kernels in `torch._sparse_semi_structured_mm` and refuses to run them on other GPUs than 8.x, and
so does the extension that the paper's authors publish. This library is the same template without that check.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cu")
LIBRARY = SOURCE.parents[2] / "build" / "peers" / "libcutlass_products.so"
ARCHS = ("80", "90")


def cutlass_include() -> Path | None:
    """Where `cmake/Cutlass.cmake` finds or keeps CUTLASS' headers; None where there are none yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse24"
    named = os.environ.get("CUTLASS_DIR")
    for root in [Path(named)] if named else sorted(cache.glob("cutlass-*"), reverse=True):
        for below in (".", "include", "cutlass_library/source/include", "source/include"):
            if (root / below / "cutlass" / "cutlass.h").exists():
                return root / below
    return None


def build() -> Path:
    """Compiles the library, a minute or two of a core. Raises RuntimeError saying what is missing."""
    nvcc, include = shutil.which("nvcc"), cutlass_include()
    if nvcc is None or include is None:
        missing = "nvcc is not on PATH" if nvcc is None else "no CUTLASS headers (set CUTLASS_DIR, or build sparse24)"
        raise RuntimeError(f"{LIBRARY.name} cannot be built: {missing}")
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    archs = [option for arch in ARCHS for option in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    unfinished = LIBRARY.with_suffix(".unfinished")
    command = [
        nvcc, "-O3", "-std=c++17", "-DNDEBUG", "--expt-relaxed-constexpr", "-shared", "-Xcompiler", "-fPIC",
        f"-I{include}", *archs, "-o", str(unfinished), str(SOURCE),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    unfinished.replace(LIBRARY)
    return LIBRARY


@functools.cache
def _function():
    if not LIBRARY.exists():
        build()
    function = ctypes.CDLL(str(LIBRARY)).cutlass_sparse_product
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 7 + [ctypes.c_void_p]
    return function


def _leading(x: Tensor) -> tuple[int, bool]:
    """Leading dimension, and whether rows are contiguous."""
    row_major = x.stride(1) == 1
    assert row_major or x.stride(0) == 1, f"neither rows nor columns are contiguous: {x.stride()}"
    return x.stride(0) if row_major else x.stride(1), row_major


def sparse_mm(packed: Tensor, meta: Tensor, x: Tensor) -> Tensor:
    """packed [m, k/2] with its meta, fp16, by x [k, n]: [m, n] row-major. As torch._sparse_semi_structured_mm."""
    (m, half), (k, n) = packed.shape, x.shape
    assert k == 2 * half and packed.dtype == x.dtype == torch.float16 and meta.dtype == torch.int16
    assert m % 32 == 0 and k % 64 == 0 and n % 8 == 0, f"sizes that CUTLASS' kernels refuse: {m} x {n} x {k}"
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    pointers = [tensor.data_ptr() for tensor in (packed, meta, x, out)]
    stream = torch.cuda.current_stream(x.device).cuda_stream
    status = _function()(*pointers, m, n, k, *_leading(packed), *_leading(x), stream)
    if status:
        raise RuntimeError(f"CUTLASS' sparse product of {m} x {n} x {k} failed with cutlass::Status {status}")
    return out


if __name__ == "__main__":
    print("wrote", build())
