"""Does what was read from a file fit this model and this optimizer? Asked before either is touched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import plain_name, unwrap
from ..errors import Sparse24Error
from .exporting import plain_state

#: options that a step cannot do without; for newer ones torch has a default, so older states may lack those
OPTIONS = {"lr", "betas", "eps", "weight_decay", "momentum"}
#: moments that every optimizer keeps in the shape of its parameter
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "grad_avg", "sum"}


def check_weights(path: Path, saved: dict[str, Tensor], model: nn.Module) -> None:
    """Names, shapes and kinds of numbers of `saved` are those of the model; else Sparse24Error."""
    have = plain_state(model)
    problems = [f"{name} is not in the checkpoint" for name in have.keys() - saved.keys()]
    problems += [f"{name} is not in the model" for name in saved.keys() - have.keys()]
    for name in have.keys() & saved.keys():
        ours, theirs = have[name], saved[name]
        if ours.shape != theirs.shape:
            shapes = f"{tuple(theirs.shape)} in the checkpoint, {tuple(ours.shape)} in the model"
            problems.append(f"{name} is {shapes}")
        elif _kind(ours) != _kind(theirs):
            problems.append(f"{name} is {theirs.dtype} in the checkpoint, {ours.dtype} in the model")
    if problems:
        raise Sparse24Error(f"checkpoint {path} is of another model: {'; '.join(sorted(problems)[:4])}")


def _kind(tensor: Tensor) -> str:
    """The kind of numbers: a cast within a kind only rounds, one to another kind changes what the numbers mean."""
    if tensor.is_floating_point() or tensor.is_complex():
        return "complex" if tensor.is_complex() else "floating"
    return str(tensor.dtype)


def load_weights(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Load what `check_weights` has seen, by the names that wrappers give it here."""
    names = {plain_name(name): name for name in unwrap(model).state_dict()}
    unwrap(model).load_state_dict({names[name]: tensor for name, tensor in saved.items()})


def check_optimizer(path: Path, saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """`saved` is a state of this kind of optimizer over parameters of these shapes; else Sparse24Error.

    Groups must have as many tensors and the options of this optimizer's; tensors as large as their parameter must have
    its shape, and be free of NaN. Which tensors a class of torch.optim keeps is seen from a step of it on a small
    parameter; other classes are only compared with themselves: within a group, all parameters keep the same.
    """
    problem = _groups_problem(saved, optimizer)
    if problem is None:
        index = {}
        for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
            index |= dict(zip(group["params"], ((p, group) for p in own["params"]), strict=True))
        problem = _states_problem(saved["state"], index, optimizer)
    if problem:
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        raise Sparse24Error(
            f"checkpoint {path} is of another optimizer: {problem}; this one is {type(optimizer).__name__} with "
            f"parameter groups of {sizes} tensors: make it as it was made then"
        )


def _groups_problem(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return "its state is no dict of states and groups"
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return "it has no list of parameter groups"
    sizes = [len(group["params"]) if _are_numbers(group.get("params")) else None for group in groups]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return f"it has parameter groups of {sizes} tensors"
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        lacking = sorted(OPTIONS & own.keys() - group.keys())
        if lacking:
            return f"a group lacks {', '.join(lacking)}"
        for name in (group.keys() & own.keys()) - {"params", "param_names"}:
            if not _is_like(group[name], own[name]):
                return f"a group has {name} = {group[name]!r:.60}"
    return None


def _are_numbers(params: Any) -> bool:
    """Whether a group names its parameters by their numbers, each once."""
    return isinstance(params, list) and all(type(n) is int for n in params) and len(set(params)) == len(params)


def _is_like(value: Any, own: Any) -> bool:
    """Whether an option has the type that this optimizer has for it; a step with any other would raise or give NaN."""
    if isinstance(own, (tuple, list)):
        fits = isinstance(value, (tuple, list)) and len(value) == len(own)
        return fits and all(_is_like(*pair) for pair in zip(value, own, strict=True))
    if own is None or isinstance(own, bool):  # such as foreach, which is None where torch may choose
        return value is None or isinstance(value, bool) or (own is None and _is_number(value))
    return _is_number(value) if _is_number(own) else isinstance(value, type(own))


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and bool(value.isfinite())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _states_problem(states: dict, index: dict, optimizer: torch.optim.Optimizer) -> str | None:
    expected: dict[tuple[int, int], set] = {}  # by group and number of axes: Adafactor's states depend on it
    for key, state in states.items():
        if key not in index or not isinstance(state, dict):
            return f"it has a state of {key!r}, which is {type(state).__name__}"
        parameter, group = index[key]
        kind = id(group), parameter.dim()
        if kind not in expected:
            names = _expected_names(optimizer, group, parameter.dim())
            expected[kind] = set(state) if names is None else names
        if set(state) != expected[kind]:
            wanted = sorted(map(str, expected[kind]))
            return f"parameter {key} has {sorted(map(str, state))} where {wanted} belong"
        for name, value in state.items():
            if problem := _value_problem(name, value, parameter):
                return f"{name} of parameter {key} {problem}"
    return None


def _value_problem(name: Any, value: Any, parameter: Tensor) -> str | None:
    if name == "step" and not (_is_number(value) and float(value) >= 0):
        return f"is {value!r:.60}, no number of steps"
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    is_as_large = isinstance(value, Tensor) and value.numel() == parameter.numel() > 1
    if (name in MOMENTS or is_as_large) and shape != tuple(parameter.shape):
        return f"is {shape}, the parameter {tuple(parameter.shape)}"
    if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
        return "holds NaN: the run had diverged, so take an older checkpoint"
    return None


def _expected_names(optimizer: torch.optim.Optimizer, group: dict, dim: int) -> set | None:
    """What a class of torch.optim keeps for a parameter under the options of `group`, from a step on a small one."""
    kind = next((base for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim.")), None)
    if kind is None or kind is not type(optimizer) or kind is torch.optim.LBFGS:
        return None
    small = nn.Parameter(torch.zeros((2,) * dim))
    small.grad = torch.zeros_like(small)
    try:
        trial = kind(
            [{**{k: v for k, v in group.items() if k not in ("params", "param_names")}, "params": [small]}], lr=1e-3
        )
        trial.step()
    except Exception:  # options that do not go together elsewhere, such as capturable on a CPU: nothing is known then
        return None
    return set(trial.state[small])
