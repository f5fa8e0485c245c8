"""Dense FP8 training, the rival of 8-bit 2:4 layers.

torchao's where it is installed; else `torch._scaled_mm` with casts that torch.compile fuses, one scale a tensor, made
from the tensor itself.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
#: what torchao calls its ways to scale
RECIPES = ("tensorwise", "rowwise")


def variants() -> dict[str, str]:
    """Column -> name of what runs there: torchao's recipes, or the one that is ours."""
    if importlib.util.find_spec("torchao") is not None:
        return {f"FP8 dense {recipe}": recipe for recipe in RECIPES}
    return {"FP8 dense _scaled_mm": "scaled_mm"}


def _is_dense(module: nn.Module, name: str = "") -> bool:
    """2:4 layers are nn.Linear too, and stay what they are."""
    return type(module) is nn.Linear


def convert(module: nn.Module, variant: str) -> nn.Module:
    """The dense linear layers inside `module`, in place, to dense FP8 training. Raises ImportError where torchao is
    asked for and missing.
    """
    if variant == "scaled_mm":
        for child in filter(_is_dense, module.modules()):
            child.__class__ = ScaledLinear
        return module
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(variant)
    convert_to_float8_training(module, config=config, module_filter_fn=_is_dense)
    return module


class ScaledLinear(nn.Linear):
    """nn.Linear whose three products are FP8 dense ones; x (..., in_features) in bf16, or under its autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _ScaledProducts.apply(x.flatten(0, -2), self.weight.to(x.dtype)).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in e4m3, and the scale by which it is multiplied again."""
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(E4M3).max
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


def _product(a: tuple[Tensor, Tensor], b_t: tuple[Tensor, Tensor]) -> Tensor:
    """a (m, k) by the transpose of b_t (n, k), both with k along rows: (m, n) bf16."""
    return torch._scaled_mm(a[0], b_t[0].t(), a[1], b_t[1], out_dtype=torch.bfloat16, use_fast_accum=True)


def _transposed(x8: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x8[0].t().contiguous(), x8[1]


class _ScaledProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(_cast(x), _cast(weight))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy8 = _cast(dy)
        dx = _product(dy8, _transposed(_cast(weight)))
        return dx, _product(_transposed(dy8), _transposed(_cast(x)))
