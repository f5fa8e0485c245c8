"""The three products of a 2:4 linear layer; those that make an activation too: gemm_activation.py.

Each runs the sparse GEMM where the library has one for the device and dtype, with zeros around operands of odd sizes
(padding.py), and otherwise a dense product over the decompressed operand: the same function up to rounding, noted
once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _library
from ...errors import Sparse24DtypeError, Sparse24Error
from ...formats import (
    DTYPE_CODE,
    FORWARD,
    GRAD_INPUT,
    GRAD_WEIGHT,
    HALF_DTYPES,
    as_rows,
    mask_as_uint16,
    metadata_bytes,
    padded_tokens,
)
from .._common import call_without_grad, check_mask, check_packed_operand, check_same_device, check_weight, define_op
from ..arguments import check_no_shared_memory, check_writable, names_wrong_types
from . import launch, padding, tuning


def empty_rows(t: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A new tensor of t's leading dimensions and `width`, and its view as rows."""
    if t.dim() == 2:  # quicker by a microsecond than the general form
        out = t.new_empty((t.shape[0], width), dtype=dtype)
        return out, out
    out = t.new_empty((*t.shape[:-1], width), dtype=dtype)
    return out, out.view(-1, width) if out.numel() else out


def _dense(packed: Tensor, E: Tensor, rows: int, cols: int, transposed: bool, dtype: torch.dtype) -> Tensor:
    """The decompressed operand as a dense product takes it (on the CPU, fp32 values may meet 16-bit activations)."""
    dense = torch.ops.sparse24.decompress.default(packed, E, rows, cols, transposed)
    return dense if dense.dtype == dtype else dense.to(dtype)


def _matmul(lhs: Tensor, rhs: Tensor, out_dtype: torch.dtype) -> Tensor:
    """lhs @ rhs with an fp32 result where asked for; plain torch otherwise."""
    if out_dtype == lhs.dtype:
        return lhs @ rhs
    return (lhs.to(out_dtype) @ rhs.to(out_dtype)).to(out_dtype)


def _output_dtype(t: Tensor, out_dtype: torch.dtype | None, name: str = "x") -> torch.dtype:
    if out_dtype is None or out_dtype == t.dtype or out_dtype == torch.float32:
        return out_dtype or t.dtype
    raise Sparse24DtypeError(f"out_dtype must be {name}'s dtype or torch.float32, got {out_dtype} for {t.dtype}")


def _check_values_fit(packed: Tensor, packed_name: str, t: Tensor, name: str) -> None:
    if packed.device != t.device:
        check_same_device(t, name, **{packed_name: packed})
    if packed.dtype == t.dtype:
        return
    # On the CPU an fp32 master may serve 16-bit activations: decompression casts, as autocast does for dense layers.
    on_cpu = t.device.type == "cpu" and packed.dtype in (torch.float32, torch.float64) and t.is_floating_point()
    if not on_cpu:
        raise Sparse24DtypeError(
            f"{name} and {packed_name} must have the same dtype, got {t.dtype} and {packed.dtype}; "
            f"cast {name}, run under autocast, or pack with dtype={t.dtype}"
        )


# ---- forward --------------------------------------------------------------------------------------------------------


def check_sparse_mm(x, packed, E, out_features, bias, out_dtype) -> tuple[int, torch.dtype]:
    if x.dim() == 0:
        raise Sparse24Error("x must have at least one dimension, got a scalar")
    in_features = x.shape[-1]
    packed_features = 2 * packed.shape[-1] if packed.dim() == 2 else in_features
    if in_features != packed_features and E.numel() == metadata_bytes(out_features, packed_features):
        raise Sparse24Error(
            f"x must have {packed_features} features in its last dimension, as the packed weight has, "
            f"got shape {tuple(x.shape)}"
        )
    check_packed_operand(packed, E, "packed", (out_features, in_features // 2), out_features, in_features)
    _check_values_fit(packed, "packed", x, "x")
    if bias is not None:
        check_same_device(x, "x", bias=bias)
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise Sparse24Error(
            f"bias must have shape ({out_features},) and x's dtype {x.dtype}, got {tuple(bias.shape)} and {bias.dtype}"
        )
    return in_features, _output_dtype(x, out_dtype)


def _sparse_mm(x, packed, E, out_features, bias, out_dtype):
    in_features, out_dtype = check_sparse_mm(x, packed, E, out_features, bias, out_dtype)
    y, y_rows = empty_rows(x, out_features, out_dtype)
    if y.numel() == 0:
        return y
    rows = as_rows(x)
    bias = bias if bias is None else bias.contiguous()
    if launch.run(FORWARD, out_features, rows.shape[0], in_features, packed, E, rows, y_rows, bias):
        return y
    w = _dense(packed, E, out_features, in_features, False, x.dtype)
    if out_dtype == x.dtype:
        return y.copy_(torch.nn.functional.linear(rows, w, bias).view(y.shape))
    product = _matmul(rows, w.T, out_dtype)
    return y.copy_((product if bias is None else product + bias).view(y.shape))


def _sparse_mm_fake(x, packed, E, out_features, bias, out_dtype):
    _, out_dtype = check_sparse_mm(x, packed, E, out_features, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


_op_sparse_mm = define_op(
    "sparse_mm",
    "(Tensor x, Tensor packed, Tensor E, int out_features, Tensor? bias, ScalarType? out_dtype) -> Tensor",
    _sparse_mm,
    _sparse_mm_fake,
)


@names_wrong_types
def sparse_mm(
    x: Tensor,
    packed: Tensor,
    E: Tensor,
    out_features: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + bias, where W (out_features, in_features) is 2:4 sparse along in_features.

    x          (..., in_features), any strides and any number of tokens
    packed, E  from `compress`: values (out_features, in_features/2) and metadata
    bias       (out_features,) in x's dtype, or None
    out_dtype  x's dtype (default) or float32; sums are fp32 in either case
    returns    (..., out_features), row-major

    Raises, before anything is launched, Sparse24Error when packed, E or bias do not have the size that the shapes
    declare, or bias not x's dtype, or are on another device than x; Sparse24DtypeError for packed values in another
    dtype, and for another out_dtype.
    """
    args = (x, packed, E, out_features, bias, out_dtype)
    return call_without_grad("sparse_mm", "functional.sparse_linear", _op_sparse_mm, args)


# ---- input gradient -------------------------------------------------------------------------------------------------


def _check_grad_input(dy, packed_t, E_t, in_features, out_dtype) -> tuple[int, torch.dtype]:
    if dy.dim() == 0:
        raise Sparse24Error("dy must have at least one dimension, got a scalar")
    out_features = dy.shape[-1]
    check_packed_operand(packed_t, E_t, "packed_t", (out_features // 2, in_features), in_features, out_features)
    _check_values_fit(packed_t, "packed_t", dy, "dy")
    return out_features, _output_dtype(dy, out_dtype, "dy")


def _sparse_mm_grad_input(dy, packed_t, E_t, in_features, out_dtype):
    out_features, out_dtype = _check_grad_input(dy, packed_t, E_t, in_features, out_dtype)
    dx, dx_rows = empty_rows(dy, in_features, out_dtype)
    if dx.numel() == 0:
        return dx
    rows = as_rows(dy)
    if launch.run(GRAD_INPUT, in_features, rows.shape[0], out_features, packed_t, E_t, rows, dx_rows):
        return dx
    w = _dense(packed_t, E_t, out_features, in_features, True, dy.dtype)
    return dx.copy_(_matmul(rows, w, out_dtype).view(dx.shape))


def _sparse_mm_grad_input_fake(dy, packed_t, E_t, in_features, out_dtype):
    _, out_dtype = _check_grad_input(dy, packed_t, E_t, in_features, out_dtype)
    return dy.new_empty((*dy.shape[:-1], in_features), dtype=out_dtype)


_op_sparse_mm_grad_input = define_op(
    "sparse_mm_grad_input",
    "(Tensor dy, Tensor packed_t, Tensor E_t, int in_features, ScalarType? out_dtype) -> Tensor",
    _sparse_mm_grad_input,
    _sparse_mm_grad_input_fake,
)


@names_wrong_types
def sparse_mm_grad_input(
    dy: Tensor, packed_t: Tensor, E_t: Tensor, in_features: int, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """dx = dy W, where W (out_features, in_features) is 2:4 sparse along out_features.

    dy             (..., out_features), any strides (a broadcast gradient too)
    packed_t, E_t  from `compress`: values (out_features/2, in_features) and metadata
    out_dtype      dy's dtype (default) or float32
    returns        (..., in_features), row-major

    Raises, before anything is launched, Sparse24Error when packed_t or E_t do not have the size that the shapes
    declare, or are on another device than dy; Sparse24DtypeError for packed values in another dtype, and for another
    out_dtype.
    """
    args = (dy, packed_t, E_t, in_features, out_dtype)
    return call_without_grad("sparse_mm_grad_input", "functional.sparse_linear", _op_sparse_mm_grad_input, args)


# ---- weight gradient ------------------------------------------------------------------------------------------------


def _check_grad_weight(packed_dy, E_dy, x, out_features, out_dtype) -> tuple[int, int, torch.dtype]:
    if x.dim() != 2:
        raise Sparse24Error(f"x must be 2-D, (tokens, in_features), got shape {tuple(x.shape)}; flatten it first")
    tokens, in_features = x.shape
    padded = padded_tokens(tokens)
    check_packed_operand(packed_dy, E_dy, "packed_dy", (padded // 2, out_features), out_features, padded)
    if packed_dy.device != x.device:
        check_same_device(x, "x", packed_dy=packed_dy)
    if packed_dy.dtype != x.dtype:
        raise Sparse24DtypeError(f"x and packed_dy must have the same dtype, got {x.dtype} and {packed_dy.dtype}")
    return tokens, in_features, _output_dtype(x, out_dtype)


def _check_decay_term(x, out_features, factor, weights, masks) -> None:
    """The rules on `decay=(factor, weights, masks)`, which schemas have as three arguments."""
    if factor is None:
        if weights or masks:
            raise Sparse24Error("decay needs its factor, one float32 tensor, beside weights and masks")
        return
    if factor.dtype != torch.float32 or factor.numel() != 1:
        raise Sparse24DtypeError(f"decay's factor must be one float32, got {factor.dtype} {tuple(factor.shape)}")
    if not 1 <= len(weights) <= 2 or len(masks) != len(weights):
        raise Sparse24Error(
            f"decay needs one weight, or two stacked along out_features, and the mask of each; got {len(weights)} "
            f"weights and {len(masks)} masks"
        )
    for w, mask in zip(weights, masks, strict=True):
        check_weight(w, "decay's weight")
        check_mask(mask, *w.shape, "decay's mask")
        check_same_device(x, "x", **{"decay's factor": factor, "decay's weight": w, "decay's mask": mask})
    stacked = (sum(w.shape[0] for w in weights), weights[0].shape[1])
    if stacked != (out_features, x.shape[1]) or weights[-1].shape[1] != stacked[1]:
        raise Sparse24Error(
            f"decay's weights must make up ({out_features}, {x.shape[1]}), the shape of the gradient, got "
            f"{' and '.join(str(tuple(w.shape)) for w in weights)}"
        )


def _grad_weight_into(packed_dy, E_dy, x, out_features, out, accumulate, factor, weights, masks) -> None:
    tokens, in_features = x.shape
    if out.numel() == 0:
        return
    decay = (factor, weights, masks) if weights else None
    if tokens == 0:
        if not accumulate:
            out.zero_()
    else:
        rows = as_rows(x)
        if launch.run(
            GRAD_WEIGHT, out_features, in_features, tokens, packed_dy, E_dy, rows, out,
            accumulate=accumulate, decay=decay,
        ):  # fmt: skip
            return
        dy = _dense(packed_dy, E_dy, padded_tokens(tokens), out_features, True, x.dtype)[:tokens]
        if accumulate:  # one rounding, at the end
            out.add_(_matmul(dy.T, rows, torch.float32 if x.dtype in HALF_DTYPES else x.dtype))
        else:
            out.copy_(_matmul(dy.T, rows, out.dtype))
    if decay is not None:
        launch.decay_after(out, *decay)


def _sparse_mm_grad_weight(packed_dy, E_dy, x, out_features, out_dtype, factor, weights, masks):
    _, in_features, out_dtype = _check_grad_weight(packed_dy, E_dy, x, out_features, out_dtype)
    _check_decay_term(x, out_features, factor, weights, masks)
    dw = x.new_empty((out_features, in_features), dtype=out_dtype)
    _grad_weight_into(packed_dy, E_dy, x, out_features, dw, False, factor, weights, masks)
    return dw


def _sparse_mm_grad_weight_fake(packed_dy, E_dy, x, out_features, out_dtype, factor, weights, masks):
    _, in_features, out_dtype = _check_grad_weight(packed_dy, E_dy, x, out_features, out_dtype)
    _check_decay_term(x, out_features, factor, weights, masks)
    return x.new_empty((out_features, in_features), dtype=out_dtype)


def _check_grad_weight_out(packed_dy, E_dy, x, out_features, out) -> None:
    _, in_features, _ = _check_grad_weight(packed_dy, E_dy, x, out_features, out.dtype)
    check_same_device(x, "x", out=out)
    if tuple(out.shape) != (out_features, in_features) or not out.is_contiguous():
        raise Sparse24Error(
            f"out must be contiguous of shape {(out_features, in_features)}, "
            f"got {tuple(out.shape)} with strides {out.stride()}"
        )


def _sparse_mm_grad_weight_(packed_dy, E_dy, x, out_features, out, accumulate, factor, weights, masks):
    _check_grad_weight_out(packed_dy, E_dy, x, out_features, out)
    _check_decay_term(x, out_features, factor, weights, masks)
    read = [("packed_dy", packed_dy), ("E_dy", E_dy), ("x", x)]
    read += [(f"decay's {name}", t) for name, part in (("weight", weights), ("mask", masks)) for t in part]
    check_no_shared_memory([("out", out)], read)
    _grad_weight_into(packed_dy, E_dy, x, out_features, out, accumulate, factor, weights, masks)


def _sparse_mm_grad_weight_fake_(packed_dy, E_dy, x, out_features, out, accumulate, factor, weights, masks):
    _check_grad_weight_out(packed_dy, E_dy, x, out_features, out)
    _check_decay_term(x, out_features, factor, weights, masks)


_op_sparse_mm_grad_weight = define_op(
    "sparse_mm_grad_weight",
    "(Tensor packed_dy, Tensor E_dy, Tensor x, int out_features, ScalarType? out_dtype, "
    "Tensor? decay_factor, Tensor[] decay_weights, Tensor[] decay_masks) -> Tensor",
    _sparse_mm_grad_weight,
    _sparse_mm_grad_weight_fake,
)
_op_sparse_mm_grad_weight_ = define_op(
    "sparse_mm_grad_weight_",
    "(Tensor packed_dy, Tensor E_dy, Tensor x, int out_features, Tensor(a!) out, bool accumulate, "
    "Tensor? decay_factor, Tensor[] decay_weights, Tensor[] decay_masks) -> ()",
    _sparse_mm_grad_weight_,
    _sparse_mm_grad_weight_fake_,
)


def _decay_term(factor, weights, masks) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return factor, [w.detach() for w in weights], [mask_as_uint16(mask) for mask in masks]


@names_wrong_types
def sparse_mm_grad_weight(
    packed_dy: Tensor,
    E_dy: Tensor,
    x: Tensor,
    out_features: int,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    decay: tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None = None,
) -> Tensor:
    """dW = dy^T x, where dy is 2:4 sparse along tokens.

    packed_dy, E_dy  from `mvue_compress` of dy (tokens, out_features)
    x                (tokens, in_features), the layer's input, in packed_dy's dtype
    out              contiguous (out_features, in_features) to write to: x's dtype or float32; default a new tensor
    accumulate       add to `out` instead of overwriting it: gradient accumulation without another pass
    out_dtype        of a new tensor: x's dtype (default) or float32
    decay            (factor, weights, masks): adds factor * (1 - mask) * weight before the one rounding. One float32
                     on the device; one weight, or two stacked along out_features, and the uint16 mask of each

    The decay is part of the product where weights are in the dtype of dW and row- or column-major alike, the first of
    two with rows in multiples of 64, and nothing is padded; else `foreach_masked_decay_` adds it right after.

    Raises, before anything is launched, Sparse24Error for `accumulate` without `out`, and when packed_dy, E_dy, x, out
    or a part of decay does not fit in shape, size, strides or device, or out shares memory with any of them;
    Sparse24DtypeError for a dtype that does not, and for an out_dtype that is not out's.
    """
    if accumulate and out is None:
        raise Sparse24Error("accumulate=True needs out=, the gradient to add to")
    term = (None, [], []) if decay is None else _decay_term(*decay)
    if out is None:
        args = (packed_dy, E_dy, x, out_features, out_dtype, *term)
        return call_without_grad("sparse_mm_grad_weight", "functional.sparse_linear", _op_sparse_mm_grad_weight, args)
    if out_dtype is not None and out_dtype != out.dtype:
        raise Sparse24DtypeError(f"out_dtype {out_dtype} contradicts out, which is {out.dtype}; pass one of them")
    check_writable(("out", out))
    with torch.no_grad():
        _op_sparse_mm_grad_weight_(packed_dy, E_dy, x, out_features, out, accumulate, *term)
    torch.autograd.graph.increment_version(out)
    return out


# ---- tuning ---------------------------------------------------------------------------------------------------------


@names_wrong_types
def tune_gemm(
    tokens: int,
    in_features: int,
    out_features: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    grad_dtype: torch.dtype | None = None,
    device=None,
) -> list[tuning.Trial]:
    """Find the fastest config of a layer's three products on this GPU, and use it from now on.

    tokens, in_features, out_features  of the layer, as its products will see them (tokens of one call)
    dtype       of its products: bfloat16 or float16
    grad_dtype  of its weight gradient: dtype (default) or float32
    device      a CUDA device; default the current one
    returns     every config that was tried: its time, and whether its result was right

    The library's own choice is within a few per cent of the best at the shapes of its sweep, so this is seldom worth
    it. A config whose result differs from the dense product of small integers, which is exact, never wins. What wins
    is written to a cache on disk (`SPARSE24_GEMM_CACHE` names the file, empty: none), for this GPU and these versions.
    Products with an activation in them (`sparse_mm_activation`) keep to the library's choice.

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


def _tunable_products(tokens, in_features, out_features, dtype, grad_dtype, index):
    """Operands of small integers, and what dense products make of them."""
    drawn = torch.Generator(f"cuda:{index}").manual_seed(0)  # of its own: training goes on as if nothing were tuned
    make = lambda *s: torch.randint(-2, 3, s, device=drawn.device, generator=drawn).to(dtype)  # noqa: E731
    x, dy, w = make(tokens, in_features), make(tokens, out_features), make(out_features, in_features)
    grad_dtype = _output_dtype(x, grad_dtype)
    mask = torch.ops.sparse24.transposable_mask.default(w)
    packed, E, packed_t, E_t = torch.ops.sparse24.compress.default(w, mask, dtype)
    seed = torch.tensor([1, 2], device=x.device)
    packed_dy, E_dy = torch.ops.sparse24.mvue_compress.default(dy, seed)
    w = _dense(packed, E, out_features, in_features, False, dtype)
    dy_pruned = _dense(packed_dy, E_dy, padded_tokens(tokens), out_features, True, dtype)[:tokens]
    exact = lambda a, b: a.float() @ b.float()  # noqa: E731
    for pass_code, (m, n, k), operands, result_dtype, expected in (
        (FORWARD, (out_features, tokens, in_features), (packed, E, x), dtype, lambda: exact(x, w.T)),
        (GRAD_INPUT, (in_features, tokens, out_features), (packed_t, E_t, dy), dtype, lambda: exact(dy, w)),
        (
            GRAD_WEIGHT,
            (out_features, in_features, tokens),
            (packed_dy, E_dy, x),
            grad_dtype,
            lambda: exact(dy_pruned.T, x),
        ),
    ):
        out = torch.empty((m, n) if pass_code == GRAD_WEIGHT else (n, m), dtype=result_dtype, device=x.device)

        def run(config, pass_code=pass_code, mnk=(m, n, k), operands=operands, out=out):
            return launch.run(pass_code, *mnk, *operands, out, config=config)

        # The op asks for the config of the product that is launched, so of the padded one.
        m, n, k, *_ = padding.padded_extents(pass_code, m, n, k, out.element_size())
        codes = (DTYPE_CODE[dtype], DTYPE_CODE[result_dtype])
        if run(0):
            yield tuning.Product(launch.PASS_NAME[pass_code], (pass_code, m, n, k, *codes), run, out, expected)
