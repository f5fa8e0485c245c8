"""Where the GPU's time goes in one call: kernels from torch.profiler, sorted into the costs of sparse training."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch

#: cost -> pattern over kernel names; the first that matches wins
COSTS = {
    "sparse products": r"sparse24.*gemm|SparseMainloop|SparseGemm",
    "search": r"search_and_pack|search_mask",
    "pack": r"pack_by_mask|sparse24.*(?<!un)pack(?!.*mvue)",
    "mvue": r"(?<!backward_)mvue",
    "activation": r"sparse24.*(activation|forward_patch|forward_stream|backward)",
    "decay": r"masked_decay",
    "attention": r"flash|fmha|sdpa|cudnn",
    "dense products": r"nvjet|gemm|cutlass|cublas|s16816|sm90_xmma",
    "optimizer": r"[Aa]dam|multi_tensor_apply",
    "copies": r"Memcpy|Memset|copy",
}


def cost_of(kernel: str) -> str:
    """The name of the cost that a kernel belongs to, by its name; "other" (norms, residuals, losses, casts) else."""
    return next((cost for cost, pattern in COSTS.items() if re.search(pattern, kernel)), "other")


def record(call: Callable, calls: int = 3) -> list[tuple[str, float, float]]:
    """(kernel, microseconds a call, launches a call) of everything that `call` runs on the GPU, the longest first."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    total, count = defaultdict(float), defaultdict(int)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time
            count[event.name] += 1
    return sorted(((name, total[name] / calls, count[name] / calls) for name in total), key=lambda row: -row[1])


def costs(call: Callable, calls: int = 3) -> dict[str, float]:
    """Microseconds a call by cost."""
    found: dict[str, float] = defaultdict(float)
    for name, time_us, _ in record(call, calls):
        found[cost_of(name)] += time_us
    return dict(found)
