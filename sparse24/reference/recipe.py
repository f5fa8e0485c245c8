"""What the recipe does to gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import unpack_mask


def masked_decay(grad: Tensor, w: Tensor, mask: Tensor, decay: float, grad_scale: Tensor | None = None) -> Tensor:
    """grad + decay * (1 - mask) * w: fp32 product, fp32 sum, one rounding to grad's dtype (float64 stays float64)."""
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    factor = torch.tensor(decay, dtype=wide, device=grad.device)
    if grad_scale is not None:
        factor = factor * grad_scale.to(wide)
    pulled = grad.to(wide) + factor * w.to(wide)
    return torch.where(unpack_mask(mask), grad, pulled.to(grad.dtype))
