"""More than 2^31 elements: offsets have 64 bits everywhere, one extent may not reach 2^30 on a GPU, and says so."""

from __future__ import annotations

import fcntl
import gc
import re
import tempfile
from pathlib import Path

import pytest
import torch

from sparse24 import Sparse24Error, ops
from sparse24.testing import assert_same_bits, column_major

ROOT = Path(__file__).resolve().parents[1]
ROWS, COLS = 4_194_308, 512  # 2^31 + 2048 elements, and more tiles along rows than a grid's y or z can count
PART = 1 << 18


# -- on the CPU: a few rows, far apart in memory that is never touched in between -------------------------------------


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """`values` as a view whose last row begins beyond element 2^31; None of the memory in between is used."""
    rows, cols = values.shape
    stride = ((1 << 31) // (rows - 1) + 64) // 8 * 8
    assert (rows - 1) * stride > 1 << 31
    try:
        view = torch.empty((rows - 1) * stride + cols, dtype=values.dtype).as_strided((rows, cols), (stride, 1))
    except RuntimeError as error:
        pytest.skip(f"no room for addresses: {error}")
    return view.copy_(values)


@pytest.mark.fault(23)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_offsets_beyond_two_to_the_31_are_right_on_the_cpu(layout):
    """Of searching, packing, decay, gaps, MVUE and activations, row- and column-major."""
    w = torch.randn(16, 24).bfloat16()
    far = far_apart(w) if layout == "rows" else far_apart(w.t()).t()
    near = w if layout == "rows" else column_major(w)
    for ours, theirs in zip(ops.prune_compress(far), ops.prune_compress(near), strict=True):
        assert_same_bits(ours, theirs, "prune_compress")
    mask = ops.transposable_mask(near)
    assert_same_bits(ops.transposable_mask(far), mask, "mask")
    assert_same_bits(ops.mask_gap(far), ops.mask_gap(near), "gap")
    for ours, theirs in zip(ops.compress(far, mask), ops.compress(near, mask), strict=True):
        assert_same_bits(ours, theirs, "packed")
    seed = torch.tensor([5, 6])
    for ours, theirs in zip(ops.mvue_compress(far, seed), ops.mvue_compress(near, seed), strict=True):
        assert_same_bits(ours, theirs, "MVUE")
    assert_same_bits(ops.gated_activation(far), ops.gated_activation(near), "h")
    for ours, theirs in zip(_pruned_activations(far, seed), _pruned_activations(near, seed), strict=True):
        assert_same_bits(ours, theirs, "pruned activations")
    dh = torch.randn(16, 12).bfloat16()
    assert_same_bits(ops.gated_activation_backward(dh, far), ops.gated_activation_backward(dh, near), "d_gate_up")
    expected = ops.masked_decay_(near.clone(), near, mask, 0.5)
    assert_same_bits(ops.masked_decay_(far, near, mask, 0.5), expected, "grad")


def _pruned_activations(u, seed):
    backward = ops.activation_backward_compress(u.abs(), u, "squared_relu", seed, bias_grad=True)
    return *ops.activation_compress(u, "squared_relu", seed), *backward


@pytest.mark.fault(23)
def test_shapes_of_huge_results_are_computed_in_64_bits():
    """The fake ops, which compilers call, with tensors that have no memory."""
    w = torch.empty(ROWS, COLS, dtype=torch.bfloat16, device="meta")
    assert w.numel() > 1 << 31
    mask, packed, E, packed_t, E_t = torch.ops.sparse24.prune_compress.default(w, None)
    assert mask.shape == (ROWS // 4, COLS // 4) and packed.shape == (ROWS, COLS // 2)
    assert packed_t.shape == (ROWS // 2, COLS)
    assert E.numel() == ops.metadata_bytes(ROWS, COLS) == (ROWS + 60) * COLS // 8 == E_t.numel()
    x = torch.empty(ROWS + 1, COLS, dtype=torch.bfloat16, device="meta")
    assert torch.ops.sparse24.activation.default(x, "silu", True, False).shape == (ROWS + 1, COLS // 2)


@pytest.mark.fault(24)
def test_no_kernel_of_ours_counts_blocks_along_y_or_z():
    """Grids are one-dimensional, so the limit of 65,535 in y and z cannot be met; products are persistent kernels."""
    for path in sorted((ROOT / "csrc").rglob("*.cu*")):
        text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\b(blockIdx|gridDim)\.[yz]\b", text), path
        for launch in re.findall(r"<<<\s*([^,]+),", text):
            assert "dim3" not in launch, f"{path}: <<<{launch}"


# -- on the GPU: all of it --------------------------------------------------------------------------------------------


def parts(rows=ROWS):
    """Slices of whole blocks and groups that cover `rows`, the one across element 2^31 and the last among them."""
    return [slice(first, min(first + PART, rows)) for first in range(0, rows, PART)]


@pytest.fixture
def roomy():
    """One of these tests at a time, also where pytest-xdist runs several."""
    with open(Path(tempfile.gettempdir()) / "sparse24-roomy.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if torch.cuda.mem_get_info()[0] < 32 << 30:
            pytest.skip("needs 32 GiB of free GPU memory")
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.fault(23, 24)
def test_weights_of_more_than_two_to_the_31_elements(roomy):
    """Search, packing both ways, unpacking, decay: every part equals that of the part alone."""
    w = torch.randn(ROWS, COLS, dtype=torch.bfloat16, device="cuda")
    mask, packed, E, packed_t, E_t = ops.prune_compress(w)
    rows, columns = ops.decompress(packed, E, ROWS, COLS), ops.decompress(packed_t, E_t, ROWS, COLS, transposed=True)
    grad = ops.masked_decay_(torch.zeros_like(w), w, mask, 0.5)
    for part in parts():
        blocks = slice(part.start // 4, part.stop // 4)
        expected = ops.transposable_mask(w[part])
        assert torch.equal(mask[blocks].view(torch.uint8), expected.view(torch.uint8)), part
        kept = ops.unpack_mask(expected)
        masked = w[part].masked_fill(~kept, 0)
        assert torch.equal(rows[part], masked) and torch.equal(columns[part], masked), part
        assert torch.equal(grad[part], (0.5 * w[part]).masked_fill(kept, 0)), part
    assert ops.is_valid_metadata(E, ROWS, COLS) and ops.is_transposable(mask)


@pytest.mark.gpu
@pytest.mark.fault(23)
def test_activations_of_more_than_two_to_the_31_elements_are_pruned(roomy):
    """Every part equals that of the part alone, along features."""
    u = torch.randn(ROWS, COLS, dtype=torch.bfloat16, device="cuda")
    packed, E, packed_t, E_t = ops.activation_compress(u, "relu", torch.tensor([3, 4], device="cuda"))
    packed_du, *_, db = ops.activation_backward_compress(u, u, "relu", bias_grad=True)
    assert torch.equal(packed_du, packed)  # u times 1 or 0
    rows = ops.decompress(packed, E, ROWS, COLS)
    for part in parts():
        alone, E_alone, *_ = ops.activation_compress(u[part], "relu")
        assert torch.equal(packed[part], alone), part
        assert torch.equal(rows[part], ops.decompress(alone, E_alone, *u[part].shape)), part
    assert ops.is_valid_metadata(E, ROWS, COLS) and ops.is_valid_metadata(E_t, COLS, 2 * packed_t.shape[0])
    assert torch.isfinite(db).all()


@pytest.mark.gpu
@pytest.mark.fault(23)
def test_gradients_of_more_than_two_to_the_31_elements(roomy):
    """Groups with two that are not zero are kept as they are, so each element is known; tokens need padding too."""
    tokens = ROWS - 3
    dy = torch.randn(tokens, COLS, dtype=torch.bfloat16, device="cuda")
    dy[1::4], dy[2::4] = 0, 0
    packed, E = ops.mvue_compress(dy, torch.tensor([3, 4], device="cuda"))
    padded = 2 * packed.shape[0]
    unpacked = ops.decompress(packed, E, padded, COLS, transposed=True)
    assert all(torch.equal(unpacked[part], dy[part]) for part in parts(tokens))
    assert not unpacked[tokens:].any()


@pytest.mark.gpu
@pytest.mark.fault(23)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_activations_of_more_than_two_to_the_31_elements(roomy, layout):
    shape = (ROWS, 2 * COLS) if layout == "rows" else (2 * COLS, ROWS)
    gate_up = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    gate_up = gate_up if layout == "rows" else gate_up.t()
    h = ops.gated_activation(gate_up)
    assert h.numel() > 1 << 31
    assert all(torch.equal(h[part], ops.gated_activation(gate_up[part].contiguous())) for part in parts())
    d_gate_up = ops.gated_activation_backward(h, gate_up)
    for part in parts():
        expected = ops.gated_activation_backward(h[part].contiguous(), gate_up[part].contiguous())
        assert torch.equal(d_gate_up[part], expected), part


@pytest.mark.gpu
@pytest.mark.fault(23)
def test_products_of_more_than_two_to_the_31_elements(roomy):
    """Small integers, so every part is exact; the weight gradient's tokens are zero but for a few, far apart."""
    tokens = ROWS - 3
    x = torch.randint(-2, 3, (tokens, COLS), dtype=torch.int8, device="cuda").bfloat16()
    w = torch.randint(-2, 3, (COLS, COLS), device="cuda").bfloat16()
    mask, packed, E, packed_t, E_t = ops.prune_compress(w)
    masked = w.masked_fill(~ops.unpack_mask(mask), 0)
    y = ops.sparse_mm(x, packed, E, COLS)
    assert all(torch.equal(y[part], x[part] @ masked.t()) for part in parts(tokens))
    del y
    dx = ops.sparse_mm_grad_input(x, packed_t, E_t, COLS)
    assert all(torch.equal(dx[part], x[part] @ masked) for part in parts(tokens))
    del dx
    some = torch.tensor([0, 7, tokens // 2, tokens - 9, tokens - 1], device="cuda")
    dy = torch.zeros(tokens, COLS, dtype=torch.bfloat16, device="cuda")
    dy[some] = torch.randint(-2, 3, (5, COLS), device="cuda").bfloat16()
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([3, 4], device="cuda"))
    dw = ops.sparse_mm_grad_weight(packed_dy, E_dy, x, COLS, out_dtype=torch.float32)
    assert torch.equal(dw, dy[some].float().t() @ x[some].float())


@pytest.mark.gpu
@pytest.mark.fault(23)
def test_an_extent_of_two_to_the_30_is_refused_by_name(roomy):
    """The limit is stated, by each op that has it, before anything is launched."""
    tall = torch.empty(1 << 30, 4, dtype=torch.bfloat16, device="cuda")
    mask = torch.empty(1 << 28, 1, dtype=torch.uint16, device="cuda")
    limit = r"must have fewer than 2\^30 rows and columns, got \[1073741824, 4\]"
    for name, call in {
        "w": lambda: ops.transposable_mask(tall),
        "w ": lambda: ops.mask_gap(tall),
        "grad": lambda: ops.masked_decay_(tall, tall, mask, 0.5),
        "dy": lambda: ops.mvue_compress(tall, torch.tensor([1, 2], device="cuda")),
        "gate_up": lambda: ops.gated_activation(tall),
        "u": lambda: ops.activation_compress(tall, "relu"),
        "u ": lambda: ops.activation_backward_compress(tall, tall, "relu"),
    }.items():
        with pytest.raises(Sparse24Error, match=f"{name.strip()} {limit}"):
            call()
