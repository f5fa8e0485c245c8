"""follow, load_masks: a model takes the masks and the phase that its weights belong to, without an optimizer.

Masks and phase are kept beside the weights: in the recipe's state and in the layers that it trains. Whoever else holds
these weights, such as an average, a reference model or an evaluation in a new program, gets them by these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..convert import plain_name, sparse_layers, sparsify, unwrap
from ..errors import Sparse24Error
from ..layers import SparseLayer, check_module, state_of
from ..layers.parallel.tensor_parallel import whole_mask
from ..layers.watch.copies import settle
from ..options import checked_options
from .state import check_state, phases_of, scales_of, upgraded


@checked_options()
def follow(copy: nn.Module, *, like: nn.Module, once: bool = False) -> int:
    """Give `copy` the masks, the phase and S-STE's scales that `like` has now, and pack its own weights under them.

    copy  a model of the same architecture: an average (EMA, SWA), a reference, an evaluation's; sparse or dense, and
          wrapped or not (AveragedModel, DDP, torch.compile). Layers that are sparse in `like` and dense here are made
          sparse first; weights stay as they are
    like  a model with sparse layers, in training or not
    once  from here on the copy keeps these masks and this phase, also if it is one that would follow by itself

    Call it again when masks or phase of `like` have moved on. Returns how many layers were packed. Raises
    Sparse24Error, changing nothing, when `like` has no sparse layers, or the layers of the two differ in name or shape.
    """
    check_module(copy, "copy")
    check_module(like, "like")
    theirs = sparse_layers(like)
    if not theirs:
        raise Sparse24Error(
            f"like is a {type(like).__name__} without sparse layers, and so has no masks; sparsify it, or "
            "sparse24.densify(copy) if the copy is to be dense too"
        )
    shapes = {name: _kernel_shape(layer) for name, layer in theirs.items()}
    first = next(iter(theirs.values()))
    state = state_of(first)
    dtype = None if state.precision else state.compute_dtype
    settings = dict(mvue=state.mvue, dtype=dtype, lean=state.lean, precision=state.precision)
    mine = _layers_named(copy, shapes, "the model to follow", settings)
    for name, layer in mine.items():
        other = theirs[name]
        layer.take_state(state_of(other).phase, whole_mask(other), state_of(other).soft_scale)
        settle(layer, like=None if once else other)
    return len(mine)


def load_masks(model: nn.Module, recipe_state: dict) -> int:
    """Give `model` the masks and the phase of a saved `Recipe.state_dict()`, and pack: evaluation in a new program.

    model         with the weights that were saved beside this state, before or after: loading weights keeps the masks.
                  A dense model is made sparse first, in the layers that the state has masks of
    recipe_state  "recipe" in the state.pt of `save_checkpoint`, sparse24.pt of the Hugging Face callback, or what
                  `Recipe.state_dict` returned

    The recipe's settings do not matter, since nothing is trained. Returns how many layers were packed. Raises
    Sparse24Error, changing nothing, for a state that is corrupt or of another model.
    """
    check_module(model)
    recipe_state = upgraded(recipe_state)
    masks = recipe_state.get("masks") if isinstance(recipe_state, dict) else None
    if not isinstance(masks, dict) or not masks or not all(map(_is_matrix, masks.values())):
        raise Sparse24Error(
            "recipe_state must be what Recipe.state_dict() returned, a dict with the masks of its layers; from a "
            'checkpoint of save_checkpoint it is torch.load("state.pt", weights_only=True)["recipe"]'
        )
    shapes = {name: torch.Size((mask.shape[0] * 4, mask.shape[1] * 2)) for name, mask in masks.items()}
    checked = check_state(recipe_state, {}, masks, override=True, shapes=None)
    layers = _layers_named(model, shapes, "the recipe state", {})
    scales, phases = scales_of(recipe_state), phases_of(recipe_state)
    for name, mask in checked.items():
        layers[name].take_state(phases[name], mask, scales.get(name))
        settle(layers[name])
    return len(layers)


def _is_matrix(value) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def _layers_named(
    model: nn.Module, shapes: dict[str, torch.Size], source: str, settings: dict
) -> dict[str, SparseLayer]:
    """The sparse layers of `model` by the names in `shapes`, made so where they are dense.

    shapes  name -> (out_features, in_features)
    """
    inner = unwrap(model)
    layers = sparse_layers(inner)
    own_names = {plain_name(name): name for name, _ in inner.named_modules()}
    modules = {name: inner.get_submodule(own) for name, own in own_names.items()}
    dense = [name for name in shapes if name not in layers]
    missing = [name for name in dense if getattr(modules.get(name), "weight", None) is None]
    extra = [name for name in layers if name not in shapes]
    if missing or extra:
        raise Sparse24Error(
            f"the layers of {type(inner).__name__} are not those of {source}: it lacks {missing[:4] or 'none'} and has "
            f"{extra[:4] or 'none'} besides; give it a model of the same architecture and names"
        )
    odd = [
        f"{name} is {tuple(_kernel_shape(modules[name]))} here and {tuple(shape)} there"
        for name, shape in shapes.items()
        if name in modules and _kernel_shape(modules[name]) != shape
    ]
    if odd:
        raise Sparse24Error(f"{type(inner).__name__} has other shapes than {source}: {'; '.join(odd[:4])}")
    if dense:
        sparsify(inner, include=[own_names[name] for name in dense], backend="sparse", allow_tied=True, **settings)
        layers = sparse_layers(inner)
    return {name: layers[name] for name in shapes}


def _kernel_shape(module: nn.Module) -> torch.Size:
    """(out_features, in_features), also of transformers' Conv1D, whose weight is [in, out]."""
    transposed = isinstance(module, nn.Module) and hasattr(module, "nf")
    return torch.Size(reversed(module.weight.shape)) if transposed else module.weight.shape
