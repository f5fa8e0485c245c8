"""From the tensors of a product to a launch of the sparse GEMM: whether the library takes them, with which config.

Operands of odd sizes or addresses go padded (padding.py); masked decay goes into the product where the kernel
takes it, and after it otherwise. What the GPU does not take at all is left to the caller.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from ... import _library
from ...formats import (
    DTYPE_CODE,
    FORMATS,
    FORWARD,
    FORWARD_OF_INPUT,
    GRAD_INPUT,
    GRAD_INPUT_OF_OUTPUT,
    GRAD_WEIGHT,
    GRAD_WEIGHT_OF_INPUT,
    HALF_DTYPES,
    OF_ACTIVATIONS,
    GemmProblem,
    SparseOperand,
    names,
)
from .._common import where
from . import padding, tuning
from .decay import DecayTerm, decay_after, decay_fields

#: names of the passes that are padded, for messages
PASS_NAME = {
    FORWARD: "sparse_mm",
    GRAD_INPUT: "sparse_mm_grad_input",
    GRAD_WEIGHT: "sparse_mm_grad_weight",
    GRAD_WEIGHT_OF_INPUT: "sparse_mm_grad_weight_input",
    FORWARD_OF_INPUT: "sparse_mm_input",
    GRAD_INPUT_OF_OUTPUT: "sparse_mm_grad_input_output",
}
_DTYPE = {format_.code: dtype for dtype, format_ in FORMATS.items()}
_NO_POINTER = 0


def problem_of(pass_code: int, mnk: tuple[int, int, int], operand: Tensor, out: Tensor) -> GemmProblem:
    """The problem of a product whose dense operand and result are these; code -1 for dtypes of the reference."""
    return _problem(pass_code, mnk, operand.dtype, out.dtype)


@lru_cache(maxsize=4096)  # each call asks, and a training has few shapes
def _problem(pass_code: int, mnk: tuple[int, int, int], dtype: torch.dtype, out_dtype: torch.dtype) -> GemmProblem:
    return GemmProblem(pass_code, *mnk, DTYPE_CODE.get(dtype, -1), DTYPE_CODE.get(out_dtype, -1))


@cache
def unsupported(problem: GemmProblem, rhs_ld: int, out_ld: int, index: int) -> str:
    """Why the GPU's sparse GEMM cannot take a product ("" if it can); token counts never matter to the answer."""
    if (dtype := _DTYPE[problem.format]) not in HALF_DTYPES:
        return f"dtype {dtype} (sparse tensor cores take {names(HALF_DTYPES, 'and')})"
    return _library.binding().sparse_gemm_unsupported(problem, rhs_ld, out_ld, _library.CUDA, index)


@lru_cache(maxsize=4096)
def _whatever_tokens(problem: GemmProblem) -> GemmProblem:
    """The problem with a constant for its token count, which keeps the cache of answers small."""
    pass_code, m, n, k, *dtypes = problem
    if pass_code in (GRAD_WEIGHT, GRAD_WEIGHT_OF_INPUT):
        return GemmProblem(pass_code, m, n, 64, *dtypes)
    if pass_code in OF_ACTIVATIONS:
        return GemmProblem(pass_code, 64, n, k, *dtypes)
    return GemmProblem(pass_code, m, 64, k, *dtypes)


@lru_cache(maxsize=4096)
def plan(problem: GemmProblem, index: int) -> tuple[int, int]:
    """(config, bytes of workspace) of a product: what `tune_gemm` found, else the library's own choice."""
    library = _library.binding()
    config = tuning.tuned_config(problem, index)
    config = config or library.sparse_gemm_configs(problem, _library.CUDA, index)[0]
    return config, library.sparse_gemm_workspace_bytes(problem, config, _library.CUDA, index)


def run(
    problem: GemmProblem,
    lhs: SparseOperand,
    rhs: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    config: int | None = None,
    decay: DecayTerm | None = None,
    activation: tuple[int, int, int] | None = None,
) -> bool:
    """Launch the product on the GPU's sparse GEMM; False, and nothing done, where it does not take these operands.

    config      of the kernel; 0 is the library's own choice, None what `plan` has
    activation  (address of h, its leading dimension, code of the activation), of forward products that make h too
    """
    library, backend, index, stream = where(rhs)
    if backend != _library.CUDA:
        return False
    rhs_ld, out_ld, rhs_pointer, out_pointer = rhs.stride(0), out.stride(0), rhs.data_ptr(), out.data_ptr()
    packed_pointer, E_pointer = lhs.values.data_ptr(), lhs.E.data_ptr()
    why_not = unsupported(_whatever_tokens(problem), rhs_ld, out_ld, index)
    if why_not or (rhs_pointer | out_pointer | packed_pointer | E_pointer) % 16:
        if activation is not None:  # by two ops, of which the product is padded
            return False
        return _run_padded(problem, lhs, rhs, out, index, bias=bias, accumulate=accumulate, config=config, decay=decay)
    if config is None:
        config, scratch_bytes = plan(problem, index)
    else:
        scratch_bytes = library.sparse_gemm_workspace_bytes(problem, config, backend, index)
    # From the caching allocator: freed on this stream right after the launch, and reused only behind it.
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=rhs.device) if scratch_bytes else None
    fields = None if decay is None else decay_fields(out, decay)
    bias_pointer = _NO_POINTER if bias is None else bias.data_ptr()
    scratch_pointer = _NO_POINTER if scratch is None else scratch.data_ptr()
    library.sparse_gemm(
        problem,
        (packed_pointer, E_pointer, _NO_POINTER),
        (rhs_pointer, rhs_ld, _NO_POINTER),
        (out_pointer, out_ld),
        (bias_pointer, accumulate, fields, activation),
        (config, scratch_pointer),
        backend,
        index,
        stream,
    )
    if decay is not None and fields is None:
        decay_after(out, decay)
    return True


def _run_padded(problem, lhs, rhs, out, index, *, bias, accumulate, config, decay) -> bool:
    """The product by padded operands; False, and said once, where the GPU does not take those either."""
    pass_code, m, n, k, *dtypes = problem
    if k == 0:  # a sum of nothing, and perhaps a bias
        return False
    to = padding.padded_extents(pass_code, m, n, k, out.element_size())
    padded = _whatever_tokens(GemmProblem(pass_code, to.m, to.n, to.k, *dtypes))
    why_not = unsupported(padded, to.rhs_ld, to.out_ld, index)
    if why_not:
        _library.warn_once(f"{PASS_NAME[pass_code]} multiplies densely over the unpacked operand: {why_not}")
        return False
    p = padding.pad(problem, lhs, rhs, out, accumulate)
    problem = problem_of(pass_code, p.extents[:3], p.rhs, p.out)
    if not run(problem, p.lhs, p.rhs, p.out, bias=bias, accumulate=p.accumulate, config=config):
        return False
    p.finish()
    if decay is not None:
        decay_after(out, decay)
    return True
