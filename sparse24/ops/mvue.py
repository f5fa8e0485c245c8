"""MVUE: 2:4 pruning of a gradient without bias, and the seeds that govern it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..errors import Sparse24DtypeError, Sparse24Error
from ..formats import DTYPE_CODE, HALF_DTYPES, WEIGHT_DTYPES, as_major, metadata_bytes, padded_tokens
from ._common import call_without_grad, check_same_device, check_weight_dtype, define_op, matrix, where
from .arguments import names_wrong_types

#: tokens that one row of `tile_sums` adds up
TILE_TOKENS = 64


def check_seed(seed: Tensor, like: Tensor, name: str = "dy") -> None:
    """`name`: of `like`, for messages."""
    if seed.dtype != torch.int64 or seed.shape != (2,) or not seed.is_contiguous():
        raise Sparse24DtypeError(
            "seed must be an int64 tensor of two numbers, one behind the other, got "
            f"{seed.dtype} of shape {tuple(seed.shape)} and strides {seed.stride()}; ops.draw_seed makes one"
        )
    if seed.device != like.device:
        check_same_device(like, name, seed=seed)


def check_seeds(seeds: Tensor, like: Tensor) -> None:
    """The same of seeds for two gradients, one a row."""
    if seeds.dtype != torch.int64 or seeds.shape != (2, 2) or not seeds.is_contiguous():
        raise Sparse24DtypeError(
            f"seed must be a contiguous int64 tensor of shape (2, 2), got {seeds.dtype} of shape {tuple(seeds.shape)} "
            f"with strides {seeds.stride()}; ops.draw_seeds(x, 2) makes one"
        )
    if seeds.device != like.device:
        check_same_device(like, "dy", seed=seeds)


def has_kernel(dy: Tensor) -> bool:
    """fp32 gradients have no GPU kernel: the weight gradient's operand is 16-bit there. The reference takes them."""
    return dy.dtype in HALF_DTYPES or dy.device.type == "cpu"


def _check_mvue(dy: Tensor, seed: Tensor) -> None:
    if dy.dim() != 2:
        raise Sparse24Error(f"dy must be 2-D, (tokens, features), got shape {tuple(dy.shape)}; flatten it first")
    if dy.dtype not in WEIGHT_DTYPES:
        check_weight_dtype(dy, "dy")
    check_seed(seed, dy)


def empty_mvue(dy: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the packed form of dy (tokens, features)."""
    tokens, features = dy.shape
    padded = padded_tokens(tokens)
    E_bytes = metadata_bytes(features, padded)
    return dy.new_empty(padded // 2, features), dy.new_empty(E_bytes, dtype=torch.uint8)


def empty_tile_sums(dy: Tensor) -> Tensor:
    """Room for the sums of dy's columns over each of its tiles of 64 tokens."""
    return dy.new_empty(-(-dy.shape[0] // TILE_TOKENS), dy.shape[1], dtype=torch.float32)


def mvue_fields(seed: Tensor, packed: Tensor, E: Tensor, scale: Tensor | None = None) -> tuple[int, ...]:
    """The packed form of a gradient, as the binding takes it."""
    scale_pointer = 0 if scale is None else scale.data_ptr()
    return seed.data_ptr(), packed.data_ptr(), DTYPE_CODE[packed.dtype], E.data_ptr(), scale_pointer


def _mvue_compress(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    _check_mvue(dy, seed)
    return compute_mvue(dy, seed)


def compute_mvue(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Of a gradient and a seed that have been checked."""
    library, *place = where(dy)
    if library is None or not has_kernel(dy):
        return reference.mvue_compress(dy, seed)
    return _pack(dy, seed, 0, library, place)


def _pack(dy: Tensor, seed: Tensor, sums_pointer: int, library, place) -> tuple[Tensor, Tensor]:
    dy = as_major(dy)
    packed, E = empty_mvue(dy)
    library.mvue_pack(matrix(dy), mvue_fields(seed, packed, E), None, sums_pointer, *place)
    return packed, E


def fake_mvue(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    _check_mvue(dy, seed)
    return empty_mvue(dy)


_op_mvue_compress = define_op(
    "mvue_compress", "(Tensor dy, Tensor seed) -> (Tensor, Tensor)", _mvue_compress, fake_mvue
)


def _mvue_compress_and_sum(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_mvue(dy, seed)
    return compute_mvue_and_sum(dy, seed)


def compute_mvue_and_sum(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a gradient and a seed that have been checked."""
    library, *place = where(dy)
    if library is None or not has_kernel(dy) or dy.numel() == 0:
        return *compute_mvue(dy, seed), reference.bias_gradient(dy)
    # Columns are added up on the way.
    tile_sums = empty_tile_sums(dy)
    packed, E = _pack(dy, seed, tile_sums.data_ptr(), library, place)
    return packed, E, tile_sums.sum(0)


def fake_mvue_and_sum(dy: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *fake_mvue(dy, seed), empty_bias_grad(dy)


def empty_bias_grad(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[-1], dtype=torch.promote_types(dy.dtype, torch.float32))


_op_mvue_compress_and_sum = define_op(
    "mvue_compress_and_sum",
    "(Tensor dy, Tensor seed) -> (Tensor, Tensor, Tensor)",
    _mvue_compress_and_sum,
    fake_mvue_and_sum,
)


@names_wrong_types
def mvue_compress(dy: Tensor, seed: Tensor, *, bias_grad: bool = False) -> tuple[Tensor, ...]:
    """Prune `dy` to 2:4 along tokens, unbiased and with the least variance, packed for the weight gradient.

    dy      (tokens, features) fp32, bf16 or fp16, row- or column-major (other strides are copied); any extents
    seed    int64 (2,) on dy's device; the result is a pure function of dy and seed, equal on CPU and GPU
    packed  (padded_tokens/2, features) in dy's dtype; tokens are padded with zero rows to a multiple of 8
    E       metadata for (features, padded_tokens)
    bias_grad  also return the sums of dy over its tokens, (features,) fp32: the gradient of a bias, from the same read

    Groups are 4 consecutive tokens of one feature: two are kept, scaled by 1/probability, so that the expected value
    is dy. Arithmetic is fp32, each value rounded once; what leaves fp16's range becomes Inf. Inf and NaN survive.
    Raises Sparse24Error for a dy that is not 2-D or a seed on another device; Sparse24DtypeError for dy's dtype, and
    for a seed that is not two int64.
    Source: arXiv 2404.01847 (MVUE); csrc/pack/mvue_group.h has the exact draw.
    """
    op = _op_mvue_compress_and_sum if bias_grad else _op_mvue_compress
    return call_without_grad("mvue_compress", "functional.sparse_linear", op, (dy, seed))


def compute_seeds(like: Tensor, count: int, rank: int) -> Tensor:
    seeds = like.new_empty(count, 2, dtype=torch.int64)
    seeds.random_(-(2**63), None)
    if rank:
        seeds[:, 1] += rank  # the upper half of Philox' counter: another rank, another stream
    return seeds


def _draw_seeds_fake(like: Tensor, count: int, rank: int) -> Tensor:
    return torch.empty((count, 2), dtype=torch.int64, device=like.device)


_op_draw_seeds = define_op(
    "draw_seeds",
    "(Tensor like, int count, int rank) -> Tensor",
    compute_seeds,
    _draw_seeds_fake,
    tags=(torch.Tag.nondeterministic_seeded,),
)


@names_wrong_types
def draw_seeds(like: Tensor, count: int, rank: int = 0) -> Tensor:
    """`count` fresh seeds, int64 (count, 2) on `like`'s device, from that device's torch generator.

    `torch.manual_seed` therefore governs them, CUDA graph replay advances them, and nothing is read back to the host.
    rank  of this process: ranks that share a torch seed draw different noise

    Raises Sparse24Error for a negative count, Sparse24DtypeError for a wrong Python type.
    """
    if count < 0:
        raise Sparse24Error(f"count must be 0 or more, got {count}")
    return _op_draw_seeds(like, count, rank)


@names_wrong_types
def draw_seed(like: Tensor, rank: int = 0) -> Tensor:
    """One fresh seed, int64 (2,); see `draw_seeds`."""
    return draw_seeds(like, 1, rank)[0]
