"""The paper's arm of bench_paper_peer: what it is composed of, what is counted, and what is said where parts lack."""

import math
import subprocess
import sys
import types

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as packed,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as unpacked,
)

from bench import bench_paper_peer as peer
from bench import measured, tables
from bench.peers import cutlass_products
from sparse24 import ops
from sparse24.benchmark import suite, timing

SHAPE = suite.ffn_shape("small", 128, 64, 128, gated=False)


def two_of_four(x):
    """The two largest of each four along a row, at twice their value: not MVUE, but as easy to tell from `x`."""
    groups = x.reshape(x.shape[0], -1, 4)
    kept = groups.abs().topk(2, dim=-1).indices
    return torch.zeros_like(groups).scatter(-1, kept, 2 * groups.gather(-1, kept)).view(x.shape)


@pytest.fixture
def parts(monkeypatch):
    """The Triton parts in plain PyTorch, and the product; without a GPU."""
    masks, packs = types.ModuleType("bench.peers.triton_mask"), types.ModuleType("bench.peers.triton_pack")
    masks.TritonMaskSearch = lambda dtype: ops.transposable_mask

    def pack_by_mask(w, mask, transposed=False):
        mask = ops.unpack_mask(mask)
        return packed((w * (mask.t() if transposed else mask)).contiguous().half())

    packs.pack_by_mask, packs.pack_by_mvue = pack_by_mask, lambda dy, seed: packed(two_of_four(dy).contiguous().half())
    for module in (masks, packs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return lambda values, meta, x: (unpacked(values, meta).float() @ x.float()).half()


def test_the_papers_layer_multiplies_with_masked_weights_and_pruned_gradients(parts):
    torch.manual_seed(0)
    arm = peer.Arm(SHAPE, peer.PAPER, parts)
    up, down = arm.paper
    arm.first()
    x, dy = arm.inputs[0].detach().double(), arm.d_out.double()
    w_up, w_down = ((layer.weight * ops.unpack_mask(layer.mask)).detach().half().double() for layer in arm.paper)
    u = (x @ w_up.t()).requires_grad_()
    h = torch.nn.functional.gelu(u)
    h.backward(dy @ w_down)
    for grad, exact in (
        (down.weight.grad, two_of_four(dy.t()) @ h.detach()),
        (up.weight.grad, two_of_four(u.grad.half().t()).double() @ x),
    ):
        assert grad.dtype == torch.float32
        # two fp16 products and an activation between; the few groups whose order rounding turns are off by themselves
        off = (grad.double() - exact).abs() > 16 * 2**-11 * exact.abs().max()
        assert off.double().mean() < 0.01


def test_a_step_changes_what_it_multiplies_with(parts):
    arm = peer.Arm(SHAPE, peer.PAPER, parts)
    arm.first()
    layer, before = arm.paper[0], [t.clone() for t in arm.paper[0].packed]
    layer.weight.grad.zero_()
    arm.decay()
    assert torch.equal(layer.weight.grad != 0, ~ops.unpack_mask(layer.mask))
    with torch.no_grad():
        layer.weight.mul_(-1)
    arm.repack()
    assert torch.equal(layer.packed[1], before[1]) and torch.equal(layer.packed[0], -before[0])
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    arm.search()
    assert not torch.equal(layer.packed[1], before[1])


def test_ours_and_dense_are_the_same_layer_in_fp16():
    arms = [peer.Arm(SHAPE, kind) for kind in (peer.EAGER, peer.OURS)]
    for arm in arms:
        arm.first()
        arm.accumulate()
        assert {p.dtype for p in arm.module.parameters()} == {torch.float32}
    assert len(arms[1].layers) == 2 and {layer.packed.dtype for layer in arms[1].layers} == {torch.float16}


def test_a_step_costs_its_micro_batches_and_what_is_paid_once():
    times = {"first": 100.0, "more": 90.0, "repack": 8.0, "search": 88.0, "decay": 3.0}
    assert peer.step_us(times, 1) == 100 + 8 + 2 + 3 and peer.step_us(times, 8) == 113 + 7 * 90
    assert peer.step_us({"first": 100.0, "more": 90.0}, 2) == 190
    rows, dense = [], {"first": 200.0, "more": 200.0}
    table = types.SimpleNamespace(add=lambda *cells: rows.append(cells))
    peer.add_rows(table, SHAPE, {peer.COMPILED: dense, peer.OURS: times}, {peer.OURS: "ours", peer.PAPER: "paper"})
    ((name, arm, us, speedup, many, over, *_),) = rows
    assert (name, arm, us, speedup, many) == ("small", "ours", 113, 200 / 113, 1600 / 743) and math.isnan(over)


def test_rows_become_the_pages_table(monkeypatch, tmp_path):
    for module in (measured, tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    assert tables.paper_peer() == "Not measured yet.\n"
    layer, ours = {"first": 1000.0, "more": 900.0}, {"first": 500.0, "more": 450.0}
    ours |= {"repack": 60.0, "search": 100.0, "decay": 39.0}
    times = {peer.EAGER: layer, peer.COMPILED: layer, peer.PAPER: layer, peer.OURS: ours}
    table = timing.Table("paper_peer", peer.COLUMNS, 2, tmp_path, quiet=True)
    peer.add_rows(table, SHAPE, times, {kind: kind for kind in times})
    peer.add_rows(table, SHAPE, times, {peer.OURS: "2:4, as sm80"})
    *_, row = tables.paper_peer().splitlines()
    speeds = "1.67x, 1.95x"  # 1000 / 600; 7300 / 3750
    assert row == f"| small | 1.00 | 1.00x, 1.00x | 1.00x, 1.00x | {speeds} | {speeds} | 1.67x | 1.67x |"


def test_what_is_said_where_there_is_nothing_to_run(monkeypatch, capsys):
    """PyTorch's product refuses the GPU, and there is neither a library nor a compiler to make one."""
    for name in ("triton_mask", "triton_pack"):
        module = types.ModuleType(f"bench.peers.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(sys.modules["bench.peers"], name, module, raising=False)
    monkeypatch.setattr(cutlass_products.shutil, "which", lambda name: None)
    monkeypatch.setattr(cutlass_products, "LIBRARY", cutlass_products.LIBRARY.with_name("none.so"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    cutlass_products._function.cache_clear()
    assert peer.paper_multiply() is None
    said = capsys.readouterr().out
    assert "_sparse_semi_structured_mm does not run here" in said and "nvcc is not on PATH" in said
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: types.SimpleNamespace(returncode=1))
    peer.as_sm80()
    assert "was not measured" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("rows, cols", [(64, 128), (192, 320), (128, 1600)])
def test_the_triton_kernel_packs_as_torch_does(rows, cols):
    triton_pack = pytest.importorskip("bench.peers.triton_pack", reason="no Triton here")
    w = torch.randn(rows, cols, device="cuda")
    mask = ops.transposable_mask(w)
    masked = (w * ops.unpack_mask(mask)).half()
    for made, dense in (
        (triton_pack.pack_by_mask(w, mask), masked),
        (triton_pack.pack_by_mask(w.t(), mask, transposed=True), masked.t().contiguous()),
    ):
        assert all(torch.equal(a, b) for a, b in zip(made, packed(dense), strict=True))
    pruned = [
        triton_pack.pack_by_mvue(x, torch.tensor([3], device="cuda")) for x in (w.half(), w.half().t().contiguous().t())
    ]
    dense = [unpacked(values.contiguous(), meta) for values, meta in pruned]
    assert torch.equal(*dense) and ((dense[0].view(rows, -1, 4) != 0).sum(-1) == 2).all()
