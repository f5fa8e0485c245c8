"""Whether layers that can be 2:4 should be: what their GPU can multiply, and for backend="auto" the cost model."""

from __future__ import annotations

import torch
from torch import nn

from .. import _library
from .._library import is_available
from ..layers.parallel import tensor_parallel
from ..ops.float8.products import why_unavailable as why_no_float8
from . import cost_float8, cost_model, cost_published, structure
from .cost_model import Training

#: how reasons begin that are the cost model's
ESTIMATE = "estimated "


def why_unavailable(model: nn.Module, precision: str | None = None) -> str | None:
    """Why the GPU that holds the model cannot multiply sparse, or None; a model elsewhere runs everywhere."""
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is None:
        return None
    if not (found := is_available(device)):
        return f"no 2:4 products on {device}: {found.reason}"
    if precision is not None and (why := why_no_float8(device.index)):
        return f"no 8-bit 2:4 products on {device}: {why}; precision=None trains in 16 bits"
    return None


def choose_function(
    module: nn.Module,
    backend: str,
    training: Training,
    block: tuple[int, int, bool] | None = None,
    *,
    assumed: bool = False,
) -> tuple[bool, str]:
    """Whether this layer trains 2:4, and why. It depends on shape, expected tokens and device, and on no batch.

    block    (d_model, d_ff, gated) of the feed-forward layer that it is part of, which is then judged as a whole
    assumed  the number of tokens is our default, as the user gave none
    """
    device = module.weight.device
    if backend == "sparse":
        return True, "backend='sparse'"
    if device.type != "cuda":
        return True, f"{device.type}: no speed to gain, so every matching layer is 2:4"
    training, rates = training.of(master_bytes=module.weight.dtype.itemsize), rates_on(device)
    out_features, in_features = structure.part_features(module)[::-1]
    if block is not None and (cut := tensor_parallel.cut_of(module)) is not None:
        block = (block[0], block[1] // cut.parts, block[2])

    def estimate(training: Training) -> float:
        model = cost_float8 if training.precision else cost_model
        if block is not None:
            return model.feed_forward(*block, training, rates).speedup
        return model.linear(out_features, in_features, training, rates).speedup

    what = f"feed-forward layer of {block[0]} x {block[1]}" if block else f"layer of {out_features} x {in_features}"
    speedup = estimate(training)
    remedies = ["backend='sparse' converts it anyway"]
    if training.mvue and (without := estimate(training.of(mvue=False))) >= rates.margin:
        remedies.insert(0, f"with mvue=False it is {without:.2f}x")
    return _verdict(speedup, f"{_rival_of(training)} {what}", training, rates, device, remedies, assumed)


def choose_activations(
    block: tuple[int, int, bool], device: torch.device, backend: str, training: Training, *, assumed: bool
) -> tuple[bool, str]:
    """The same of a plain feed-forward block, (d_model, d_ff, gated), whose activation would be the 2:4 operand."""
    if backend == "sparse":
        return True, "backend='sparse'"
    if device.type != "cuda":
        return True, f"{device.type}: no speed to gain, so every matching block prunes its activation"
    rates, (d_model, d_ff, _) = rates_on(device), block
    model = cost_float8 if training.precision else cost_model
    speedup = model.feed_forward_of_activations(d_model, d_ff, training, rates).speedup
    what = f"{_rival_of(training)} feed-forward layer of {d_model} x {d_ff}"
    return _verdict(speedup, what, training, rates, device, ["backend='sparse' converts it anyway"], assumed)


def _rival_of(training: Training) -> str:
    return "a compiled dense" if training.precision is None else "the faster of a compiled bf16 and FP8 dense"


def _verdict(
    speedup: float,
    rival: str,
    training: Training,
    rates: cost_model.Rates,
    device: torch.device,
    remedies: list[str],
    assumed: bool,
) -> tuple[bool, str]:
    """Whether an estimate is good enough, and the estimate in words."""
    calls = f" and {training.micro_batches} calls a step" if training.micro_batches > 1 else ""
    finding = f"{ESTIMATE}{speedup:.2f}x of {rival} at {training.tokens} tokens a call{calls}"
    finding += " (assumed: say tokens=)" if assumed else ""
    finding += "" if rates.measured else ", by published peaks (not measured by us)"
    if speedup >= rates.margin:
        return True, f"{finding}, on {torch.cuda.get_device_name(device)}"
    return False, f"{finding}, less than the {rates.margin:.2f}x asked for; {', '.join(remedies)}"


def rates_on(device: torch.device) -> cost_model.Rates:
    """The cost model's rates on a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    info = _library.device_info(index)
    capability = (info["capability_major"], info["capability_minor"])
    name = torch.cuda.get_device_name(index)
    return cost_published.rates_of_gpu(capability, info["multiprocessors"], info["memory_bandwidth"], name)
