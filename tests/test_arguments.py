"""What every op says of arguments that it cannot take: memory that is shared, Python types, tensors without values."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import sparse24
from sparse24 import Sparse24DtypeError, Sparse24Error, ops
from sparse24.testing import assert_same_bits

pytestmark = pytest.mark.fault(42)


def packing(device, shape=(64, 64), dtype=torch.bfloat16):
    """(weights, masks, packed, E, packed_t, E_t) for one weight, as lists."""
    w = torch.randn(shape, device=device).to(dtype)
    return [[w], [ops.transposable_mask(w)], *([part.zero_()] for part in ops.empty_packed(*shape, dtype, device))]


# ---- memory that is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [ops.compress_, ops.prune_compress_])
def test_outputs_in_the_memory_of_a_weight_are_refused(device, pack):
    lists = packing(device)
    w = lists[0][0]
    before = w.clone()
    lists[2] = [w.view(-1)[:2048].view(64, 32)]
    with pytest.raises(Sparse24Error, match=r"share memory, and one of them is written"):
        pack(*lists)
    assert torch.equal(w, before)


@pytest.mark.parametrize("pack", [ops.compress_, ops.prune_compress_])
@pytest.mark.parametrize("part", [2, 3, 4, 5])
def test_one_output_for_two_weights_is_refused(device, pack, part):
    first, second = packing(device), packing(device)
    lists = [a + b for a, b in zip(first, second, strict=True)]
    lists[part] = [first[part][0]] * 2
    with pytest.raises(Sparse24Error, match=r"\[[01]\] and \w+\[[01]\] share memory"):
        pack(*lists)
    assert not any(t.any() for part in lists[2:] for t in part), "written before it was refused"


def test_a_mask_is_written_by_the_search_alone(device):
    """Two weights may be packed by one mask; searched, each needs its own."""
    first, second = packing(device), packing(device)
    lists = [a + b for a, b in zip(first, second, strict=True)]
    lists[1] = [first[1][0]] * 2
    ops.compress_(*lists)
    for w, mask, *parts in zip(*lists, strict=True):
        for ours, theirs in zip(parts, ops.compress(w, mask), strict=True):
            assert_same_bits(ours, theirs)
    with pytest.raises(Sparse24Error, match=r"masks\[[01]\] and masks\[[01]\] share memory"):
        ops.prune_compress_(*lists)


def test_outputs_side_by_side_in_one_buffer_are_taken(device):
    lists, room = packing(device), torch.zeros(64 * 32 * 2, dtype=torch.bfloat16, device=device)
    lists[2], lists[4] = [room[:2048].view(64, 32)], [room[2048:].view(32, 64)]
    ops.compress_(*lists)
    for (ours,), theirs in zip(lists[2:], ops.compress(lists[0][0], lists[1][0]), strict=True):
        assert_same_bits(ours, theirs)


def test_gradients_that_overlap_are_refused_before_anything_is_written(device):
    w = torch.randn(8, 8, device=device)
    mask, room = ops.transposable_mask(w), torch.zeros(8, 16, device=device)
    overlapping = torch.zeros(15, device=device).as_strided((8, 8), (1, 1))
    for bad in (torch.zeros(1, 8, device=device).expand(8, 8), overlapping):
        with pytest.raises(Sparse24Error, match="belong to several elements"):
            ops.foreach_masked_decay_([room[:, ::2], bad], [w, w], [mask, mask], 0.5)
        assert not room.any()
    for grads in ([room[:, :8]] * 2, [room[:, :8], room[:, 4:12]]):
        with pytest.raises(Sparse24Error, match="share memory"):
            ops.foreach_masked_decay_(grads, [w, w], [mask, mask], 0.5)
        assert not room.any()
    with pytest.raises(Sparse24Error, match="share memory"):
        ops.masked_decay_(w.t(), w, mask, 0.5)


def test_gradients_side_by_side_in_one_matrix_and_a_gradient_that_is_its_weight_are_taken(device):
    w = torch.randn(8, 8, device=device)
    mask, room = ops.transposable_mask(w), torch.zeros(8, 16, device=device)
    expected = torch.where(ops.unpack_mask(mask), 0, 0.5 * w)
    ops.foreach_masked_decay_([room[:, :8], room[:, 8:]], [w, w], [mask, mask], 0.5)
    assert torch.equal(room, torch.cat([expected, expected], 1))
    assert torch.equal(ops.masked_decay_(w.clone(), w, mask, 0.5), w + expected)
    twice = w + expected
    assert torch.equal(ops.masked_decay_(w, w, mask, 0.5), twice)


@pytest.mark.parametrize("which", ["x", "packed_dy"])
def test_a_weight_gradient_in_the_memory_of_an_operand_is_refused(device, which):
    x, dy = (torch.randn(64, 32, device=device).bfloat16() for _ in range(2))
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    out = x[:32] if which == "x" else packed_dy
    with pytest.raises(Sparse24Error, match=f"(out and {which}|{which} and out) share memory"):
        ops.sparse_mm_grad_weight(packed_dy, E_dy, x, 32, out=out)


def test_lazily_negated_tensors_are_read_and_not_written(device):
    w = torch.randn(8, 8, device=device)
    mask, negated = ops.transposable_mask(w), torch._neg_view(w)
    expected = ops.masked_decay_(torch.zeros_like(w), -w, mask, 0.5)
    assert torch.equal(ops.masked_decay_(torch.zeros_like(w), negated, mask, 0.5), expected)
    with pytest.raises(Sparse24Error, match="grads.0. is a lazily negated view"):
        ops.masked_decay_(negated, torch.ones_like(w), mask, 0.5)
    dy = torch.randn(8, 8, device=device).bfloat16()
    packed_dy, E_dy = ops.mvue_compress(dy, torch.tensor([1, 2], device=device))
    with pytest.raises(Sparse24Error, match="out is a lazily negated view"):
        ops.sparse_mm_grad_weight(packed_dy, E_dy, dy, 8, out=torch._neg_view(torch.zeros_like(dy)))


def test_inference_tensors_are_written_inside_inference_mode_alone(device):
    w = torch.randn(8, 8, device=device)
    mask = ops.transposable_mask(w)
    with torch.inference_mode():
        grad = torch.zeros(8, 8, device=device)
    with pytest.raises(Sparse24Error, match="made in inference mode"):
        ops.masked_decay_(grad, w, mask, 0.5)
    assert not grad.any()


# ---- Python types ---------------------------------------------------------------------------------------------------


def calls():
    """A right call of each kind; each argument is then replaced with something of a wrong type."""
    w = torch.randn(16, 32)
    mask, packed, E, packed_t, E_t = ops.prune_compress(w)
    x, dy, seed = torch.randn(8, 32), torch.randn(8, 16), torch.tensor([1, 2])
    packed_dy, E_dy = ops.mvue_compress(dy, seed)
    lists = [[t.clone()] for t in (w, mask, packed, E, packed_t, E_t)]
    return {
        "transposable_mask": (w,),
        "unpack_mask": (mask,),
        "is_transposable": (mask,),
        "mask_flips": (mask, mask),
        "foreach_mask_flips": ([mask], [mask]),
        "mask_gap": (w,),
        "compress": (w, mask, torch.float32),
        "prune_compress": (w, torch.float32),
        "compress_": lists,
        "prune_compress_": lists,
        "compress_transposed": ([w], [mask], torch.float32),
        "decompress": (packed, E, 16, 32),
        "empty_packed": (16, 32, torch.float32),
        "is_valid_metadata": (E, 16, 32),
        "mvue_compress": (dy, seed),
        "draw_seed": (dy, 0),
        "draw_seeds": (dy, 2, 0),
        "sparse_mm": (x, packed, E, 16),
        "sparse_mm_activation": (x, packed, E, 16, "silu"),
        "sparse_mm_gated_activation": (x, packed, E, 8, "silu"),
        "sparse_mm_grad_input": (dy, packed_t, E_t, 32),
        "sparse_mm_grad_weight": (packed_dy, E_dy, x, 16),
        "sparse_mm_grad_weight_input": (*ops.mvue_compress(x, seed), dy, 32),
        "sparse_mm_input": (*ops.prune_compress(x)[1:3], w),
        "sparse_mm_grad_input_output": (*ops.prune_compress(dy)[1:3], w),
        "column_major_copy": (x,),
        "activation_compress": (x, "squared_relu"),
        "activation_backward_compress": (x, x, "squared_relu"),
        "activation": (x, "silu"),
        "gated_activation": (x, "silu"),
        "activation_backward": (x, x, "silu"),
        "gated_activation_backward": (dy, x, "silu"),
        "activation_backward_mvue": (x, x, "silu", seed),
        "gated_activation_backward_mvue": (dy, x, "silu", seed),
        "masked_decay_": (w.clone(), w, mask, 0.5),
        "foreach_masked_decay_": ([w.clone()], [w], [mask], 0.5),
    }


CALLS = calls()


def test_every_op_with_operands_is_called_here():
    left_out = {"metadata_bytes", "padded_tokens", "tune_gemm"}  # two of plain integers, and one for GPUs
    assert set(ops.__all__) - left_out == set(CALLS)


def _takes(name, argument, wrong) -> bool:
    """Whether `wrong` is not wrong there: numbers for numbers, None for a dtype that has a default."""
    if isinstance(argument, torch.dtype):
        return wrong is None
    if isinstance(argument, float):
        return isinstance(wrong, (int, float))
    if isinstance(argument, int):
        return wrong == 3 or (name == "is_valid_metadata" and isinstance(wrong, (int, float)))  # false, for any extents
    return False


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wrong", [None, 3, 4.5, "text", 2**70, [None], b"", object()], ids=lambda v: type(v).__name__)
def test_wrong_python_types_are_named(name, wrong):
    function, right = getattr(ops, name), CALLS[name]
    extra = ("cpu",) if name == "empty_packed" else ()
    for i, argument in enumerate(right):
        if _takes(name, argument, wrong):
            continue
        arguments = [*right[:i], wrong, *right[i + 1 :]]
        with pytest.raises(Sparse24Error) as error:
            function(*arguments, *extra)
        assert len(str(error.value)) > 20


@pytest.mark.parametrize("make", [lambda t: t.to_sparse(), lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)])
def test_sparse_and_quantized_tensors_are_named(make):
    with pytest.raises(Sparse24Error, match="w must be"):
        ops.transposable_mask(make(torch.randn(16, 16)))


def test_extents_and_counts_below_zero_are_named():
    with pytest.raises(Sparse24Error, match="multiples of 4, 0 or more, got -4 and 8"):
        ops.empty_packed(-4, 8, torch.float32, "cpu")
    with pytest.raises(Sparse24Error, match="count must be 0 or more, got -1"):
        ops.draw_seeds(torch.ones(1), -1)
    with pytest.raises(Sparse24DtypeError, match="rank must be an integer of 64 bits"):
        ops.draw_seeds(torch.ones(1), 1, 2**70)


def test_what_is_no_module_is_named_by_every_function_of_a_model(tmp_path):
    wrong = [torch.zeros(4, 4)]
    others = {"path": tmp_path / "file", "folder": tmp_path, "optimizer": None, "recipe": None, "recipe_state": {}}
    others |= {"total_steps": 1, "copy": wrong, "like": wrong}
    tried = set()
    for name in sparse24.__all__:
        function = getattr(sparse24, name)
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) or name == "Recipe" else {}
        if not parameters.keys() & {"model", "like"}:
            continue
        needed = [p for p, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
        with pytest.raises(Sparse24Error, match="must be a torch.nn.Module, got list"):
            function(**{p: others.get(p, wrong) for p in needed})
        tried.add(name)
    assert tried >= {"sparsify", "densify", "refresh", "export", "verify", "follow", "Recipe", "save_checkpoint"}


# ---- tensors without values -----------------------------------------------------------------------------------------


def test_checks_that_read_values_name_tensors_that_have_none():
    w = torch.randn(16, 32)
    mask, _, E, *_ = ops.prune_compress(w)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(mask), mode.from_tensor(E)]
    for bare_mask, bare_E in ((mask.to("meta"), E.to("meta")), fakes):
        with pytest.raises(Sparse24Error, match="is_transposable reads the values of mask"):
            ops.is_transposable(bare_mask)
        with pytest.raises(Sparse24Error, match="is_valid_metadata reads the values of E"):
            ops.is_valid_metadata(bare_E, 16, 32)
    with pytest.raises(Sparse24Error, match="a meta or fake tensor has none"):
        ops.compress(w.to("meta"), mask.to("meta"), validate=True)


def test_no_address_is_taken_of_a_tensor_that_nobody_holds():
    """A copy that is made inside of `matrix(...)` or before `.data_ptr()` is gone when the kernel reads it."""
    for path in sorted(Path(ops.__file__).parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            taken = node.args[:1] if name == "matrix" else [node.func.value] if name == "data_ptr" else []
            for t in taken:
                copies = isinstance(t, ast.Call) and getattr(t.func, "attr", "") not in (
                    "reshape",
                    "view",
                    "untyped_storage",
                )
                assert not copies, f"{path.name}:{node.lineno}: hold {ast.unparse(t)} by a name"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_of_matrices_in_any_order_of_memory(dtype):
    """More than two dimensions, the last two swapped: the op copies them first."""
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(-1, -2)
    for _ in range(5):
        assert torch.equal(ops.column_major_copy(x), x)
        assert torch.equal(ops.activation(x, "relu"), x.clamp(min=0))
