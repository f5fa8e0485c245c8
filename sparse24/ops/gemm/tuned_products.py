"""`tune_gemm`: the fastest config of a layer's products on this GPU. tuning.py tries them and remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _library
from ...errors import Sparse24Error
from ...formats import (
    BLOCK,
    DEFAULT_DTYPE,
    FORWARD,
    FORWARD_OF_INPUT,
    GRAD_INPUT,
    GRAD_INPUT_OF_OUTPUT,
    GRAD_WEIGHT,
    GRAD_WEIGHT_OF_INPUT,
    M_BY_N,
    GemmProblem,
    SparseOperand,
    padded_tokens,
)
from ..arguments import names_wrong_types
from . import launch, padding, tuning
from .dense import dense, output_dtype


@names_wrong_types
def tune_gemm(
    tokens: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype = DEFAULT_DTYPE,
    *,
    grad_dtype: torch.dtype | None = None,
    device=None,
) -> list[tuning.Trial]:
    """Find the fastest config of a layer's products on this GPU, and use it from now on.

    tokens, in_features, out_features  of the layer, as its products will see them (tokens of one call)
    dtype       of its products, of 16 bits
    grad_dtype  of its weight gradient: dtype (default) or float32
    device      a CUDA device; default the current one
    returns     every config that was tried: its time, and whether its result was right

    The library's own choice is within a few per cent of the best at the shapes of its sweep, so this is seldom worth
    it. A config whose result differs from the dense product of small integers, which is exact, never wins. What wins
    is written to a cache on disk (`SPARSE24_GEMM_CACHE` names the file, empty: none), for this GPU and these versions.
    Products with an activation in them (`sparse_mm_activation`, so the first one of a fused block) keep to the
    library's choice: each has one kernel, so there is no other tile to try.

    Raises Sparse24Error where sparse kernels do not run, and where no config of a product gives the right result;
    Sparse24DtypeError for a dtype or a grad_dtype that the products do not take.
    """
    availability = _library.is_available("cuda" if device is None else device)
    if not availability:
        raise Sparse24Error(f"tune_gemm needs a GPU with sparse kernels: {availability.reason}")
    device = torch.device("cuda" if device is None else device)
    index = torch.cuda.current_device() if device.index is None else device.index
    trials = []
    try:
        with torch.cuda.device(index), torch.no_grad():
            for product in _tunable_products(tokens, in_features, out_features, dtype, grad_dtype, index):
                trials += tuning.tune(product, index)
    finally:
        launch.plan.cache_clear()  # of what was found before an error, too
    return trials


class _Case(NamedTuple):
    """A product of small integers, and what a dense one makes of them, which is exact."""

    pass_code: int
    mnk: tuple[int, int, int]
    lhs: SparseOperand
    rhs: Tensor
    out_dtype: torch.dtype
    expected: Callable[[], Tensor]

    def empty_out(self) -> Tensor:
        m, n, _ = self.mnk
        shape = (m, n) if self.pass_code in M_BY_N else (n, m)
        return torch.empty(shape, dtype=self.out_dtype, device=self.rhs.device)


def _tunable_products(tokens, in_features, out_features, dtype, grad_dtype, index) -> Iterator[tuning.Product]:
    for case in _cases(tokens, in_features, out_features, dtype, grad_dtype, index):
        out = case.empty_out()
        problem = launch.problem_of(case.pass_code, case.mnk, case.rhs, out)

        def run(config, case=case, problem=problem, out=out):
            return launch.run(problem, case.lhs, case.rhs, out, config=config)

        # The op asks for the config of the product that is launched, so of the padded one.
        m, n, k, *_ = padding.padded_extents(case.pass_code, *case.mnk, out.element_size())
        if run(0):
            key = GemmProblem(case.pass_code, m, n, k, problem.format, problem.out_dtype)
            yield tuning.Product(launch.PASS_NAME[case.pass_code], key, run, out, case.expected)


def _cases(tokens, in_features, out_features, dtype, grad_dtype, index) -> list[_Case]:
    drawn = torch.Generator(f"cuda:{index}").manual_seed(0)  # of its own: training goes on as if nothing were tuned
    make = lambda *s: torch.randint(-2, 3, s, device=drawn.device, generator=drawn).to(dtype)  # noqa: E731
    x, dy, w = make(tokens, in_features), make(tokens, out_features), make(out_features, in_features)
    grad_dtype = output_dtype(x, grad_dtype)
    mask = torch.ops.sparse24.transposable_mask.default(w)
    packed, E, packed_t, E_t = torch.ops.sparse24.compress.default(w, mask, dtype)
    weight, weight_t = SparseOperand(packed, E), SparseOperand(packed_t, E_t, k_major=False)
    w = dense(weight, out_features, in_features, dtype)
    exact = lambda a, b: a.float() @ b.float()  # noqa: E731
    mnk = (out_features, tokens, in_features), (in_features, tokens, out_features)
    cases = [
        _Case(FORWARD, mnk[0], weight, x, dtype, lambda: exact(x, w.T)),
        _Case(GRAD_INPUT, mnk[1], weight_t, dy, dtype, lambda: exact(dy, w)),
    ]
    for pass_code, pruned, other in ((GRAD_WEIGHT, dy, x), (GRAD_WEIGHT_OF_INPUT, x, dy)):
        lhs = SparseOperand(*torch.ops.sparse24.mvue_compress.default(pruned, _seed(x)), k_major=False)
        m, n = pruned.shape[1], other.shape[1]
        values = dense(lhs, m, padded_tokens(tokens), dtype)[:tokens]
        left, right = (values, other) if pass_code == GRAD_WEIGHT else (other, values)
        expected = lambda left=left, right=right: exact(left.T, right)  # noqa: E731
        cases.append(_Case(pass_code, (m, n, tokens), lhs, other, grad_dtype, expected))
    for pass_code, pruned, other in ((FORWARD_OF_INPUT, x, w.T), (GRAD_INPUT_OF_OUTPUT, dy, w)):
        lhs, (k, n) = _packed_rows(pruned), other.shape
        values = dense(lhs, tokens, k, dtype)
        expected = lambda values=values, other=other: exact(values, other)  # noqa: E731
        cases.append(_Case(pass_code, (tokens, n, k), lhs, w, dtype, expected))
    return cases


def _packed_rows(t: Tensor) -> SparseOperand:
    """An activation pruned along its features, by the mask of its 4x4 blocks."""
    tokens = t.shape[0]
    whole = torch.nn.functional.pad(t, (0, 0, 0, -tokens % BLOCK))
    mask = torch.ops.sparse24.transposable_mask.default(whole)
    packed, E, *_ = torch.ops.sparse24.compress.default(whole, mask, t.dtype)
    return SparseOperand(packed[:tokens], E)


def _seed(like: Tensor) -> Tensor:
    return torch.tensor([1, 2], device=like.device)
