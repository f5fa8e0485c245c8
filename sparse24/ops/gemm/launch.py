"""From the tensors of a product to a launch of the sparse GEMM: whether the library takes them, with which config.

Operands of odd sizes or addresses go padded (padding.py); masked decay goes into the product where the kernel
takes it, and after it otherwise. What the GPU does not take at all is left to the caller.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch

from ... import _library
from ...formats import DTYPE_CODE, GRAD_WEIGHT, HALF_DTYPES, META_BLOCK, is_column_major, is_row_major
from .._common import where
from . import padding, tuning

#: names of the passes that are padded and tuned, for messages
PASS_NAME = ("sparse_mm", "sparse_mm_grad_input", "sparse_mm_grad_weight")
_NO_POINTER = 0


@cache
def unsupported(pass_code: int, m: int, n: int, k: int, dtype, out_dtype, rhs_ld: int, out_ld: int, index: int) -> str:
    """Why the GPU's sparse GEMM cannot take a product ("" if it can); token counts never matter to the answer."""
    if dtype not in HALF_DTYPES:
        return f"dtype {dtype} (sparse tensor cores take bfloat16 and float16)"
    return _library.binding().sparse_gemm_unsupported(
        pass_code, m, n, k, DTYPE_CODE[dtype], DTYPE_CODE[out_dtype], rhs_ld, out_ld, _library.CUDA, index
    )


@lru_cache(maxsize=4096)
def plan(pass_code: int, m: int, n: int, k: int, dtype: int, out_dtype: int, index: int) -> tuple[int, int]:
    """(config, bytes of workspace) of a product: what `tune_gemm` found, else the library's own choice."""
    library, product = _library.binding(), (pass_code, m, n, k, dtype, out_dtype)
    config = tuning.tuned_config(*product, index)
    config = config or library.sparse_gemm_configs(*product, _library.CUDA, index)[0]
    return config, library.sparse_gemm_workspace_bytes(*product, config, _library.CUDA, index)


def run(
    pass_code, m, n, k, packed, E, rhs, out, bias=None, accumulate=False, config=None, decay=None, activation=None
) -> bool:
    """Launch the product on the GPU's sparse GEMM; False, and nothing done, where it does not take these operands."""
    library, backend, index, stream = where(rhs)
    if backend != _library.CUDA:
        return False
    rhs_ld, out_ld, rhs_pointer, out_pointer = rhs.stride(0), out.stride(0), rhs.data_ptr(), out.data_ptr()
    packed_pointer, E_pointer = packed.data_ptr(), E.data_ptr()
    # Token counts never matter to the answer: a constant keeps the cache small.
    if pass_code == GRAD_WEIGHT:
        why_not = unsupported(pass_code, m, n, 64, rhs.dtype, out.dtype, rhs_ld, out_ld, index)
    else:
        why_not = unsupported(pass_code, m, 64, k, rhs.dtype, out.dtype, rhs_ld, out_ld, index)
    if why_not or (rhs_pointer | out_pointer | packed_pointer | E_pointer) % 16:
        if activation is not None:  # by two ops, of which the product is padded
            return False
        return _run_padded(pass_code, m, n, k, packed, E, rhs, out, bias, accumulate, config, index, decay)
    dtype, out_dtype = DTYPE_CODE[rhs.dtype], DTYPE_CODE[out.dtype]
    if config is None:
        config, scratch_bytes = plan(pass_code, m, n, k, dtype, out_dtype, index)
    else:
        scratch_bytes = library.sparse_gemm_workspace_bytes(
            pass_code, m, n, k, dtype, out_dtype, config, backend, index
        )
    # From the caching allocator: freed on this stream right after the launch, and reused only behind it.
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=rhs.device) if scratch_bytes else None
    fields = None if decay is None else decay_fields(out, *decay)
    library.sparse_gemm(
        pass_code, m, n, k, dtype, out_dtype, packed_pointer, E_pointer, rhs_pointer, rhs_ld, out_pointer, out_ld,
        _NO_POINTER if bias is None else bias.data_ptr(), accumulate,
        _NO_POINTER if scratch is None else scratch.data_ptr(), config, backend, index, stream, fields, activation,
    )  # fmt: skip
    if decay is not None and fields is None:
        decay_after(out, *decay)
    return True


def _run_padded(pass_code, m, n, k, packed, E, rhs, out, bias, accumulate, config, index, decay) -> bool:
    """The product by padded operands; False, and said once, where the GPU does not take those either."""
    if k == 0:  # a sum of nothing, and perhaps a bias
        return False
    to = padding.padded_extents(pass_code, m, n, k, out.element_size())
    to_n, to_k = (to.n, 64) if pass_code == GRAD_WEIGHT else (64, to.k)
    why_not = unsupported(pass_code, to.m, to_n, to_k, rhs.dtype, out.dtype, to.rhs_ld, to.out_ld, index)
    if why_not:
        _library.warn_once(f"{PASS_NAME[pass_code]} multiplies densely over the decompressed operand: {why_not}")
        return False
    p = padding.pad(pass_code, m, n, k, packed, E, rhs, out, accumulate)
    m, n, k, *_ = p.extents
    if not run(pass_code, m, n, k, p.packed, p.E, p.rhs, p.out, bias, p.accumulate, config):
        return False
    p.finish()
    if decay is not None:
        decay_after(out, *decay)
    return True


# ---- masked decay ---------------------------------------------------------------------------------------------------


def decay_fields(out, factor, weights, masks) -> tuple | None:
    """What the kernel takes of masked decay in its epilogue; None where it is to follow in a pass of its own."""
    w, rows = weights[0], weights[0].shape[0]
    second = len(weights) - 1  # the only weight again where there is one
    fits = (
        all(t.dtype == out.dtype and t.stride() == w.stride() for t in weights)
        and (second == 0 or rows % META_BLOCK == 0)
        and ((is_row_major(w) and w.stride(0) % 2 == 0) or is_column_major(w))
        and all(t.data_ptr() % (2 * t.element_size()) == 0 for t in weights)
    )
    if not fits:
        return None
    pointers = [t.data_ptr() for t in (w, weights[second], masks[0], masks[second])]
    return factor.data_ptr(), *pointers[:2], *w.stride(), *pointers[2:], rows


def decay_after(out, factor, weights, masks) -> None:
    """Masked decay in a pass of its own, right after the product."""
    parts = list(out.split([w.shape[0] for w in weights]))
    torch.ops.sparse24.foreach_masked_decay_.default(parts, weights, masks, 1.0, factor)
