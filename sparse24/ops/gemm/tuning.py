"""Tuning of the sparse GEMM: which config is fastest for a product on this GPU, remembered on disk.

The library chooses by a formula (csrc/gemm/config.cpp). `ops.tune_gemm` measures instead: every config that can compute
a product runs, its result is compared with the dense product, and of those that are right the fastest is kept. The
cache is a JSON file; a key has the device, the versions and the product, so nothing measured elsewhere is ever used.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ... import _library
from ..._version import __version__
from ...errors import Sparse24Error
from ...files.writing import write_text_atomically
from ...formats import GemmProblem

#: of what the codes of configs stand for: raised when a kernel of the table is replaced or does something else
KERNELS = 3
#: names the cache file; empty: nothing is read or written
CACHE_VARIABLE = "SPARSE24_GEMM_CACHE"


@dataclass(frozen=True)
class Product:
    """One product to tune: `run(config)` writes `out`, which must then equal `expected()`, rounded.

    key  the problem as it is launched, so of padded extents
    """

    name: str
    key: GemmProblem
    run: Callable[[int], object]
    out: Tensor
    expected: Callable[[], Tensor]


@dataclass(frozen=True)
class Trial:
    """A config that was tried. time_us is NaN where the result was wrong."""

    product: str
    m: int
    n: int
    k: int
    config: str
    right: bool
    time_us: float
    chosen: bool


def tune(product: Product, index: int) -> list[Trial]:
    """Try all configs of a product on device `index`; the fastest right one is remembered.

    Raises Sparse24Error where none is right, OSError where the cache file cannot be written.
    """
    library = _library.binding()
    codes = library.sparse_gemm_configs(product.key, _library.CUDA, index)
    expected = product.expected().to(product.out.dtype)
    right = [code for code in codes if _is_right(product, code, expected)]
    times = time_interleaved({code: lambda code=code: product.run(code) for code in right})
    best = fastest(times, product.name)
    remember(product.key, best, index)
    _, m, n, k, *_ = product.key
    text = {code: library.sparse_gemm_config(product.key, code, _library.CUDA, index) for code in codes}
    return [
        Trial(product.name, m, n, k, text[code], code in times, times.get(code, float("nan")), code == best)
        for code in codes
    ]


def _is_right(product: Product, code: int, expected: Tensor) -> bool:
    product.out.fill_(float("nan"))
    product.run(code)
    return torch.equal(product.out, expected)


def fastest(times: dict[int, float], name: str) -> int:
    """The config of the least time; the first of equals, which is the library's own choice.

    Raises Sparse24Error, with `name`, where no config has a time.
    """
    if not times:
        raise Sparse24Error(f"no config of {name} gives the right result on this GPU; please report it")
    return min(times, key=times.__getitem__)


def time_interleaved(candidates: dict[int, Callable], rounds: int = 15) -> dict[int, float]:
    """Median microseconds of each candidate, run in turn on a GPU that they keep busy."""
    events: dict[int, list] = {code: [] for code in candidates}
    for _ in range(rounds):
        torch.cuda._sleep(4_000_000)  # some 2 ms: the host gets ahead, and its costs stay outside
        for code, run in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            run()
            start.record()
            run()
            end.record()
            events[code].append((start, end))
    torch.cuda.synchronize()
    return {
        code: 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs) for code, pairs in events.items()
    }


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_file() -> Path | None:
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None:
        return Path(named) if named else None
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "sparse24" / "gemm.json"


@cache
def device_key(index: int) -> str:
    """What a measurement is good for: the GPU, its multiprocessors, these kernels, this version and CUDA's.

    A GPU that runs the kernels of another (SPARSE24_ARCH) is another GPU: codes of configs count other tables.
    """
    properties = torch.cuda.get_device_properties(index)
    asked = os.environ.get("SPARSE24_ARCH", "")
    return (
        f"{properties.name}, {properties.multi_processor_count} SMs, sparse24 {__version__}, kernels {KERNELS}, "
        f"CUDA {torch.version.cuda}{', as ' if asked else ''}{asked}"
    )


def product_key(key: GemmProblem) -> str:
    return " ".join(str(number) for number in key)


@cache
def _read(path: Path | None) -> dict[str, dict[str, int]]:
    """The cache's content, read once; a warning names a file that is no such cache, which is ignored."""
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        return {
            str(device): {str(product): int(config) for product, config in products.items()}
            for device, products in content.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _library.warn_once(f"the GEMM cache {path} is not readable and not used: {error}; delete it or tune again")
        return {}


def tuned_config(problem: GemmProblem, index: int) -> int:
    """The config that tuning found for a product, or 0: the library's own choice."""
    known = _read(cache_file())
    if not known:
        return 0
    config = known.get(device_key(index), {}).get(product_key(problem), 0)
    if config and config not in _library.binding().sparse_gemm_configs(problem, _library.CUDA, index):
        return 0  # a file from another build, or edited
    return config


def remember(key: GemmProblem, config: int, index: int) -> None:
    """Keep a config for this process and, if there is a cache file, in it: replaced as a whole, never half written.

    Raises OSError where the file cannot be written; this process keeps the config all the same.
    """
    path = cache_file()
    content = _read(path)
    content.setdefault(device_key(index), {})[product_key(key)] = config
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(content, indent=1, sort_keys=True))
