"""Which layers of a model `include` and `exclude` mean, and which of these can be 2:4."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from ..errors import Sparse24Error
from ..formats import WEIGHT_DTYPES
from ..layers import DTYPES, SparseLayer
from ..layers.checks import is_plain_parameter
from ..layers.packing import is_dtensor
from ..layers.parallel import tensor_parallel
from ..layers.state import is_ours
from . import structure
from .report import ALREADY_SPARSE, Skipped, SparsifyReport

#: names of a sparse layer's methods: an attribute of such a name on a user's module would hide the method
METHODS = {
    name
    for base in SparseLayer.__mro__[:-1]
    for name, value in vars(base).items()
    if callable(value) and not name.startswith("__") and name != "train"  # which some put on an object, and may
}


def patterns(value: str | Iterable[str], argument: str) -> tuple[str, ...]:
    """`value` as a tuple of patterns. Raises Sparse24Error, naming the argument, for anything else."""
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(p, str) and p for p in patterns):
        raise Sparse24Error(f"{argument} must be patterns over module names, got {value!r}")
    return patterns


def find_candidates(
    model: nn.Module, include: str | Sequence[str], exclude: tuple[str, ...], report: SparsifyReport
) -> dict[str, nn.Module]:
    """The layers that `include` names and `exclude` does not; experts go to the report."""
    modules = dict(model.named_modules())
    chosen = _found_by_structure(model, report) if include == "auto" else _matched(model, include)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise_no_match("exclude", pattern, [name for name in modules if name])
    left = {name: modules[name] for name in chosen if not any(fnmatchcase(name, p) for p in exclude)}
    if chosen and not left:
        raise Sparse24Error(
            f"exclude={exclude} leaves none of the layers that include={include!r} names: {some(list(chosen))}"
        )
    return left


def _found_by_structure(model: nn.Module, report: SparsifyReport) -> dict[str, None]:
    chosen: dict[str, None] = {}  # in order, once each
    for ffn in structure.find_feed_forwards(model):
        if ffn.is_expert:
            reason = "an expert of a mixture: each sees too few tokens to pay for its re-packing"
            report.skipped += [Skipped(name, reason) for name in ffn.layers]
        else:
            chosen.update(dict.fromkeys(ffn.layers))
    for name in structure.find_fused_experts(model):
        report.skipped.append(Skipped(name, "experts of a mixture in 3-D parameters: not supported"))
    return chosen


def _matched(model: nn.Module, include: str | Sequence[str]) -> dict[str, None]:
    names, chosen = linear_names(model), {}
    for pattern in patterns(include, "include"):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise_no_match("include", pattern, names)
        chosen.update(dict.fromkeys(matched))
    return chosen


def why_not(module: nn.Module, owners: dict[int, list[nn.Module]], allow_tied: bool) -> str | None:
    """Why this layer cannot be 2:4, or None."""
    if isinstance(module, SparseLayer):
        return ALREADY_SPARSE
    if (reason := why_not_plain(module)) is not None:
        return reason
    weight = module._parameters["weight"]
    if len(owners[id(weight)]) > 1 and not allow_tied:
        return "its weight is tied with another module, which would be masked too; allow_tied=True converts it"
    is_parallel = is_dtensor(weight) and tensor_parallel.APPLIED in vars(module)
    if is_parallel and (reason := tensor_parallel.why_not_cut(weight)) is not None:
        return f"it is tensor parallel, and {reason}"
    in_features, out_features = structure.features(module)
    if min(in_features, out_features) < 4:
        return f"{out_features} x {in_features} has no whole 4x4 block"
    if in_features % 4 or out_features % 4:
        return f"{out_features} x {in_features} is not a multiple of 4 on both sides; choose widths that are"
    allowed = WEIGHT_DTYPES if weight.device.type == "cuda" else DTYPES
    if weight.dtype not in allowed:
        return f"{weight.dtype} weights are not supported (supported: {', '.join(map(str, allowed))})"
    return None


def why_not_plain(module: nn.Module) -> str | None:
    """Why this module is more than an nn.Linear or Conv1D with a plain weight, or None."""
    if parametrize.is_parametrized(module):
        computed = " and ".join(module.parametrizations)
        return f"{type(module).__name__} computes its {computed}; call remove_parametrizations first"
    if type(module) is not nn.Linear and not (structure.is_conv1d(module) and type(module).__name__ == "Conv1D"):
        return f"{type(module).__name__} is a linear layer with a forward of its own; name plain nn.Linear layers"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (offloading or another library's hook)"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantisation (it has a qconfig), which would not see a sparse layer"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (parametrized, pruned or normalised)"
    if not is_plain_parameter(weight):
        return f"its weight is a {type(weight).__name__}, not a plain parameter (quantised, perhaps)"
    own = [*module.__dict__, *module._buffers, *module._parameters, *module._modules]
    if clash := [name for name in own if is_ours(name) or name in METHODS]:
        return f"its attribute {clash[0]!r} has a name that a sparse layer needs; rename it"
    return None


def weight_owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """id of a parameter -> the modules that hold it. One module under two names holds its weight once."""
    owners = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(module)
    return owners


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and structure.is_linear(module)]


def raise_no_match(argument: str, pattern: str, names: list[str]) -> None:
    """Sparse24Error with the names that come closest to a pattern that matches nothing."""
    bare = pattern.strip("*")
    parts = {part for name in names for part in name.split(".")}
    close = set(difflib.get_close_matches(bare, sorted({*names, *parts}), n=5, cutoff=0.5))
    near = [name for name in names if name in close or close & set(name.split("."))]
    if any(f".{bare}." in f".{name}." for name in names):
        hint = f"it must match whole names, as '*{bare}*' does here"
    else:
        hint = f"the closest are {some(near)}" if near else f"names here: {some(names)}"
    raise Sparse24Error(f"{argument} pattern {pattern!r} matches no layer; {hint}")


def some(names: list[str], count: int = 8) -> str:
    """The first names as text, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "") or "none"
