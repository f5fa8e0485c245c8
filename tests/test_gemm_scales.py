"""The binding's keywords for 8-bit products: scales, accumulation, and the weight gradient of a pruned input."""

from __future__ import annotations

import pytest
import torch

from sparse24 import _library
from sparse24.errors import Sparse24Error
from sparse24.formats import FORWARD, GRAD_WEIGHT, GRAD_WEIGHT_OF_INPUT

library = _library.binding()
pytestmark = pytest.mark.skipif(library is None, reason="needs the compiled library")
E4M3, FLOAT32 = 3, 0


def operands(m: int, n: int, k: int):
    """Packed lhs that keeps the first two of each four (E of 0x44), what it stands for, and rhs; small integers."""
    draw = torch.Generator().manual_seed(m + n + k)
    packed = torch.randint(-3, 4, (m, k // 2), generator=draw).float()
    rhs = torch.randint(-3, 4, (n, k), generator=draw).float()
    dense = torch.zeros(m, k)
    dense.view(m, k // 4, 4)[:, :, :2] = packed.view(m, k // 4, 2)
    E = torch.full((-(-m // 64) * 64 * (-(-k // 128) * 128) // 8,), 0x44, dtype=torch.uint8)
    return packed.to(torch.float8_e4m3fn), E, dense, rhs.to(torch.float8_e4m3fn)


def product(pass_code, m, n, k, packed, E, rhs, out, scales=(0, 0), **keywords):
    problem, terms, plan = (pass_code, m, n, k, E4M3, FLOAT32), (0, 0, None, None), (0, 0)
    lhs, rhs = (packed.data_ptr(), E.data_ptr(), scales[0]), (rhs.data_ptr(), k, scales[1])
    library.sparse_gemm(problem, lhs, rhs, (out.data_ptr(), out.stride(0)), terms, plan, _library.CPU, 0, 0, **keywords)


@pytest.mark.parametrize("pass_code", [FORWARD, GRAD_WEIGHT, GRAD_WEIGHT_OF_INPUT])
@pytest.mark.parametrize("accumulation", [0, 1, 2])
def test_scales_multiply_the_product(pass_code, accumulation):
    m, n, k = 24, 10, 160
    packed, E, dense, rhs = operands(m, n, k)
    scale_lhs, scale_rhs = torch.tensor([0.25]), torch.tensor([2.0])
    expected = 0.5 * dense @ rhs.float().T
    if pass_code != GRAD_WEIGHT:  # stored with m contiguous
        expected = expected.T
    out = torch.full_like(expected, torch.nan).contiguous()
    scales = (scale_lhs.data_ptr(), scale_rhs.data_ptr())
    product(pass_code, m, n, k, packed, E, rhs, out, scales=scales, accumulation=accumulation)
    assert torch.equal(out, expected)
    product(pass_code, m, n, k, packed, E, rhs, out, accumulation=accumulation)
    assert torch.equal(out, 2 * expected)


def test_unknown_codes_are_named():
    packed, E, _, rhs = operands(4, 4, 32)
    out = torch.empty(4, 4)
    with pytest.raises(Sparse24Error, match="pass code must be between 0 and 7, got 8"):
        product(8, 4, 4, 32, packed, E, rhs, out)
    with pytest.raises(Sparse24Error, match="accumulation code must be between 0 and 2, got 3"):
        product(FORWARD, 4, 4, 32, packed, E, rhs, out, accumulation=3)
