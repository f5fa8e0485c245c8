"""Assertions and cases for tests of sparse24 and of what is built on it. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(out: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """`out` may err `factor` times as much as `plain`, the dense PyTorch result in the same dtype.

    exact  the float64 result. One rounding unit of the largest exact value is allowed on top.
    """
    exact = exact.double()
    floor = torch.finfo(plain.dtype).eps * exact.abs().max() if exact.numel() else 0.0
    ours, theirs = ((t.double() - exact).abs().max() if t.numel() else 0.0 for t in (out, plain))
    assert ours <= factor * theirs + floor, f"error {ours:.3e} against PyTorch's {theirs:.3e}, floor {floor:.3e}"


def assert_same_bits(ours: Tensor, theirs: Tensor, what: str = "tensor") -> None:
    """Equal shape, dtype and bits, but for NaN, where any NaN will do; reports the first place that differs."""
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} against {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype} against {theirs.dtype}"
    a, b = ours.detach().cpu().contiguous(), theirs.detach().cpu().contiguous()
    both_nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    different = (a.view(bits) != b.view(bits)) & ~both_nan
    if different.any():
        place = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {a.numel()} differ, first at {place}: {a[place]} against {b[place]}"
        )


def column_major(t: Tensor) -> Tensor:
    """The same matrix with columns contiguous."""
    return t.t().contiguous().t()
