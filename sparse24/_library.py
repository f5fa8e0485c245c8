"""The compiled library: looked for once, at import. Where it is missing or does not match, the first op says why.

Importing this module never raises, never touches a GPU and never creates a CUDA context.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from ._version import __version__
from .errors import Sparse24BuildError, Sparse24Warning

CPU, CUDA = 0, 1  # backend codes of the C++ library
INTERFACE = 10  # of the binding's signatures: kInterface in csrc/bindings/python_api.cpp

_why_missing = ""
try:
    _binding = importlib.import_module("sparse24._C")
except ModuleNotFoundError:
    _binding, _why_missing = None, "sparse24._C was not built"
except ImportError as error:  # built, but it does not load: another Python, a missing libstdc++, ...
    _binding, _why_missing = None, str(error)

_REBUILD = "rebuild with `pip install --force-reinstall --no-deps .` in the source folder"


@cache
def binding():
    """The binding, or None where there is no compiled library (ops then run `sparse24.reference`).

    Raises Sparse24BuildError when the Python files, the binding and libsparse24 are not from one build.
    """
    if mismatch := _mismatch():
        raise Sparse24BuildError(mismatch)
    return _binding


def _mismatch() -> str:
    """Which two of Python files, binding and library are from different builds; "" if none, or nothing is compiled."""
    if _binding is None:
        return ""
    version, interface = _binding.version(), getattr(_binding, "interface", 0)
    if version != __version__:
        return f"sparse24 {__version__} found libsparse24 {version}: the two must be built together; {_REBUILD}"
    if interface != INTERFACE:
        return f"sparse24._C was built from other sources (interface {interface}, not {INTERFACE}); {_REBUILD}"
    return ""


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, Sparse24Warning, stacklevel=3)


@cache
def device_info(index: int) -> dict:
    """What libsparse24 says about CUDA device `index`; -1: about the build alone, without asking the driver."""
    return binding().device_info(index)


@cache
def backend_code(device_type: str) -> int | None:
    """The backend for tensors on `device_type`: CPU, CUDA, or None for the reference in plain PyTorch."""
    if binding() is None:
        warn_once(
            f"sparse24 has no compiled library ({_why_missing}); ops run in plain PyTorch, correct but slow; {_REBUILD}"
        )
        return None
    if device_type == "cpu":
        return CPU
    if device_type == "cuda":
        if cuda_built():
            return CUDA
        warn_once(
            "sparse24 was built without CUDA; ops on GPU tensors run in plain PyTorch, correct but slow; "
            "rebuild with SPARSE24_CUDA=1 and nvcc on the PATH"
        )
    return None


@cache
def cuda_built() -> bool:
    return binding() is not None and bool(binding().device_info(-1)["cuda_built"])


@cache
def runs_on(index: int) -> bool:
    """Whether libsparse24 has kernels for CUDA device `index`; warns once where it has none."""
    reason = device_info(index)["reason"]
    if reason:
        warn_once(
            f"ops on cuda:{index} run in plain PyTorch, correct but slow: {reason} (sparse24 {__version__}, "
            f"libsparse24 {binding().version()}); if that library is not the one for this GPU, {_REBUILD}"
        )
    return not reason


@dataclass(frozen=True)
class Availability:
    """Whether sparse GEMM kernels run on a device; truthy when they do.

    arch     compute capability such as "sm_90", "cpu" for the CPU
    backend  "cuda" (sparse tensor cores), "cpu" (the C++ backend) or "reference" (plain PyTorch)
    reason   why not; empty when available
    """

    available: bool
    reason: str
    arch: str
    backend: str

    def __bool__(self) -> bool:
        return self.available


def is_available(device=None) -> Availability:
    """Can 2:4 layers run on sparse tensor cores of `device`?

    device  anything `torch.device` takes, a tensor's `.device`, or None: the current GPU if there is one, else the CPU.
            On a CPU the answer is false, with the reason; the ops work there all the same.

    Never raises for a missing GPU, driver or compiled library: the answer's `reason` says what is missing.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if _binding is None:
        return Availability(False, f"no compiled library: {_why_missing}", device.type, "reference")
    if mismatch := _mismatch():
        return Availability(False, mismatch, device.type, "reference")
    if device.type == "cpu":
        return Availability(False, "the CPU has no sparse tensor cores; ops run on the C++ backend", "cpu", "cpu")
    if device.type != "cuda":
        return Availability(False, f"no kernels for device type {device.type!r}", device.type, "reference")
    if not cuda_built():
        return Availability(False, "built without CUDA; rebuild with SPARSE24_CUDA=1", "cuda", "reference")
    if not torch.cuda.is_available():
        return Availability(False, "PyTorch sees no CUDA device", "cuda", "reference")
    index = torch.cuda.current_device() if device.index is None else device.index
    if not 0 <= index < torch.cuda.device_count():
        return Availability(False, f"there is no device cuda:{index}", "cuda", "reference")
    info = device_info(index)
    arch = f"sm_{info['capability_major']}{info['capability_minor']}"
    return Availability(not info["reason"], info["reason"], arch, "cuda")
