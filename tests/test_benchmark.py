"""The benchmark's own logic, without a GPU: its models and arms, its tables, what it prints, what it refuses."""

import copy
import functools
import math

import benchmarks_on_cpu
import pytest
import torch
from rounding import EPS16

import sparse24
from sparse24.benchmark import arms, command, kernels, models, pytorch_sparse, suite, timing
from sparse24.benchmark.models import Decoder, ModelShape
from sparse24.errors import Sparse24Error
from sparse24.layers.watch import unseen

GATED = ModelShape("gated", "llama", 2, 64, 4, 2, 128, 0, 16, 2)
PLAIN = ModelShape("plain", "gpt2", 2, 64, 4, 4, 128, 96, 16, 2)
BF16, FP32 = torch.bfloat16, torch.float32
THEIRS = "PyTorch's 2:4 over dense"


def greedy_mask(w):
    """Two of four along rows and columns, wherever the large values are."""
    return (torch.arange(w.shape[0])[:, None] // 2 + torch.arange(w.shape[1]) // 2) % 2 == 0


@pytest.fixture
def pytorch_24(monkeypatch):
    """Stand-ins for the ops of PyTorch's own 2:4 training, which need a GPU: "packed" is masked and dense."""

    def tile(w, algorithm, use_cutlass):
        if w.shape[0] % 64:
            raise RuntimeError("wrong shape\nand where")
        masked = w * greedy_mask(w)
        return masked.flatten(), None, masked.t().flatten(), None, None

    def product(packed, x_t, *, transpose_result, alg_id):
        return (packed @ x_t).t().contiguous() if alg_id != 7 else torch.full((x_t.shape[1], len(packed)), torch.nan)

    monkeypatch.setattr(torch, "_sparse_semi_structured_tile", tile)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *args, transpose_result: 3)
    monkeypatch.setattr(pytorch_sparse, "_algorithms", {})


@pytest.fixture
def without_gpu(monkeypatch, pytorch_24):
    """The suite on the CPU: calls run, times are made up, nothing is compiled."""
    benchmarks_on_cpu.without_gpu(monkeypatch, pytorch_sparse, arms)
    time_hot = benchmarks_on_cpu.call_each(lambda name: {"dense": 20.0, "sparse": 10.0}.get(name, 1.0))
    monkeypatch.setattr(suite, "time_hot", time_hot)
    monkeypatch.setattr(suite, "host_time_us", lambda call, calls=5: 3.0)
    monkeypatch.setattr(suite.kernels, "costs", lambda call: {"sparse products": 6.0, "mvue": 1.0})
    monkeypatch.setattr(command, "check_gpu", lambda: None)


def cells(table, column):
    return [row[table.columns.index(column)] for row in table.rows]


@pytest.mark.parametrize("shape", [GATED, PLAIN, GATED.of(vocab=96)])
def test_models_hold_what_their_shape_says(shape):
    """Every feed-forward layer is found and runs fused; flops follow from the weights."""
    model = Decoder(shape)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    weights -= model.positions.weight.numel() if shape.vocab and model.positions is not None else 0
    weights += shape.vocab * shape.d_model  # the head is the embedding
    scores = shape.layers * shape.d_model * shape.length
    assert shape.flops() == 6 * shape.tokens * (weights + scores)
    report = sparse24.sparsify(model)
    assert set(report.fused.values()) == {""} and len(report.fused) == shape.layers
    assert sum(rows * cols for rows, cols in report.shapes.values()) == shape.layers * shape.ffn_weights()


@pytest.mark.parametrize("master", [BF16, FP32])
@pytest.mark.parametrize("shape", [GATED, PLAIN])
def test_a_trainers_step_is_a_training_step(shape, master):
    settings = dict(master=master, micro_batches=2, compiled=False, device="cpu")
    for sparse in (False, True):
        trainer = arms.Trainer(shape, sparse=sparse, **settings)
        matrices = [p for p in trainer.module.parameters() if p.dim() == 2]  # a norm's ones swallow small steps
        before = [p.detach().clone() for p in matrices]
        trainer.step()
        assert all(not torch.equal(p, old) for p, old in zip(matrices, before, strict=True))
        assert all(p.grad is None for p in trainer.module.parameters())
        assert (trainer.recipe.step == 1 and sparse24.verify(trainer.module)) if sparse else not trainer.layers


def test_no_pass_of_an_arm_waits_to_compare_weights(monkeypatch):
    """In every 16th pass of a training without a recipe layers would; under a recipe they do as it says."""
    looks, compare = [], unseen.first_rows_are_packed
    monkeypatch.setattr(unseen, "first_rows_are_packed", lambda layer: looks.append(layer) or compare(layer))
    arm = arms.feed_forward_arm(GATED, sparse=True, master=BF16, compiled=False, device="cpu")
    arm.micro_batch()
    assert len(looks) == len(arm.layers)  # once, before the first
    for _ in range(2 * unseen.EVERY):
        arm.accumulate()
        arm.repack()
    assert len(looks) == len(arm.layers)
    trainer = arms.Trainer(GATED, sparse=True, master=FP32, compiled=False, device="cpu")
    trainer.step()
    trainer.step()
    assert len(looks) == len(arm.layers) + 2 * len(trainer.layers)


def test_one_arm_serves_with_and_without_mvue():
    arm = arms.feed_forward_arm(GATED, sparse=True, master=BF16, compiled=False, device="cpu")
    seen = []
    for mvue in (True, False):
        arm.with_mvue(mvue, lambda: seen.append({layer.mvue for layer in arm.layers}))()
    assert seen == [{True}, {False}]


def test_one_arm_serves_with_the_decay_in_backward_and_without():
    arm = arms.feed_forward_arm(GATED, sparse=True, master=FP32, compiled=False, device="cpu")
    arm.set_mvue(False)
    arm.micro_batch()
    arm.decay()
    expected = [layer.weight.grad.clone() for layer in arm.layers]
    arm.with_decay(arm.micro_batch)()
    for layer, grad in zip(arm.layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.grad, grad)
        assert layer.decay_factor is None


def test_a_trainer_may_have_the_decay_in_backward():
    settings = dict(sparse=True, master=FP32, micro_batches=2, compiled=False, device="cpu", decay_in="backward")
    trainer = arms.Trainer(GATED, **settings)
    trainer.step()
    factors = [layer.decay_factor.item() for layer in trainer.layers]
    assert trainer.recipe.step == 1 and factors == pytest.approx([arms.DECAY / 2] * len(factors))


def test_gradients_of_a_micro_batch_are_fresh_and_sums_are_kept():
    arm = arms.feed_forward_arm(GATED, sparse=True, master=FP32, compiled=False, device="cpu")
    arm.set_mvue(False)
    arm.micro_batch()
    first = arm.layers[0].weight.grad.clone()
    arm.micro_batch()
    torch.testing.assert_close(arm.layers[0].weight.grad, first)
    arm.accumulate()
    torch.testing.assert_close(arm.layers[0].weight.grad, 2 * first)
    arm.decay()
    arm.repack()
    arm.search()
    assert arm.inputs[0].grad is None and sparse24.verify(arm.root)


def masked_copy(module):
    """The dense module whose feed-forward weights are those that PyTorch's own arm multiplies with."""
    dense = copy.deepcopy(module)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, pytorch_sparse.SemiStructuredLinear):
            linear = torch.nn.Linear(*layer.weight.t().shape, bias=layer.bias is not None, dtype=layer.weight.dtype)
            linear.weight.data.copy_(layer.weight * greedy_mask(layer.weight))
            linear.bias = layer.bias
            dense.set_submodule(name, linear)
    return dense


@pytest.mark.parametrize("master", [BF16, FP32])
@pytest.mark.parametrize("shape", [GATED, PLAIN])
def test_pytorchs_own_arm_computes_what_its_masked_weights_do(pytorch_24, shape, master):
    """Outputs and gradients of a block: those of the masked dense one, but for the weights' own, which are dense."""
    arm = pytorch_sparse.block_arm(shape, master=master, compiled=False, device="cpu")
    layers = [layer for layer in arm.module.modules() if isinstance(layer, pytorch_sparse.SemiStructuredLinear)]
    assert len(layers) == 2 and sum(layer.weight.numel() for layer in layers) == shape.ffn_weights()
    dense = masked_copy(arm.module)
    results = []
    for module in (arm.module, dense):
        x = arm.inputs[0].detach().clone().requires_grad_()
        with arm.context():
            y = module(x, arm.inputs[1])
        y.backward(torch.ones_like(y))
        results.append([y, x.grad, *(p.grad for p in module.mlp.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=4 * EPS16, atol=4 * EPS16 * expected.abs().max().item())


def test_pytorchs_own_arm_compiles_without_graph_breaks(pytorch_24):
    arm = pytorch_sparse.block_arm(PLAIN, master=FP32, compiled=False, device="cpu")
    compiled = torch.compile(arm.module, fullgraph=True, backend="aot_eager")
    results = []
    for module in (compiled, arm.module):
        arm.module.zero_grad()
        with arm.context():
            y = module(*arm.inputs)
        y.sum().backward()
        results.append([y.detach(), *(p.grad for p in arm.module.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=4 * EPS16, atol=4 * EPS16 * expected.abs().max().item())


@pytest.mark.parametrize("shape", [GATED, PLAIN])
def test_pytorchs_own_trainer_packs_after_each_step(pytorch_24, shape):
    trainer = pytorch_sparse.Trainer(shape, master=BF16, micro_batches=2, compiled=False, device="cpu")
    layers = [layer for layer in trainer.module.modules() if isinstance(layer, pytorch_sparse.SemiStructuredLinear)]
    before = [layer.weight.detach().clone() for layer in layers]
    trainer.step()
    assert len(layers) == 2 * shape.layers
    for layer, old in zip(layers, before, strict=True):
        assert not torch.equal(layer.weight, old)
        assert torch.equal(layer.packed, layer.weight * greedy_mask(old))
        assert torch.equal(layer.packed_t, layer.packed.t())


def test_an_algorithm_that_computes_something_else_is_not_taken(pytorch_24, monkeypatch, capsys):
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda *args, transpose_result: 7)
    layer = pytorch_sparse.SemiStructuredLinear(torch.nn.Linear(64, 128, dtype=BF16), 32)
    assert layer.algorithm == layer.algorithm_t == 0
    assert "algorithm 7 is wrong for 128 x 32 x 64: its default is taken" in capsys.readouterr().out


def test_what_pytorch_refuses_costs_no_other_column(without_gpu, capsys):
    shape = PLAIN.of(d_ff=96)
    ffn, block, whole = (
        timing.Table(name, getattr(suite, f"{name.upper()}_COLUMNS")) for name in ("ffn", "block", "step")
    )
    suite.feed_forwards(ffn, [shape], ["bf16"])
    suite.blocks(block, [shape], ["bf16"])
    suite.training_step(whole, shape, "bf16")
    for table in (ffn, block, whole):
        assert math.isnan(cells(table, THEIRS)[0]) and cells(table, "speedup")[0] > 1
    assert capsys.readouterr().out.count("# PyTorch's own 2:4 training: RuntimeError: wrong shape\n") == 3


def test_tables_count_everything(without_gpu):
    table, costs = timing.Table("ffn", suite.FFN_COLUMNS), timing.Table("costs", suite.COST_COLUMNS)
    layers = [suite.ffn_shape("g", 16, 64, 128), suite.ffn_shape("p", 16, 64, 128, gated=False)]
    suite.feed_forwards(table, layers, suite.MASTERS, costs)
    assert len(table.rows) == 4 and all(len(row) == len(table.columns) for row in table.rows)
    # 10 us, and re-packing, decay and a fortieth of what a search costs more: 1 us each and nothing.
    assert cells(table, "sparse_us") == [12.0] * 4 and cells(table, "speedup") == [20 / 12] * 4
    assert cells(table, "speedup 8 micro-batches") == [(20 + 7) / (12 + 7)] * 4
    # With the decay in backward: what that takes, made up as 1 us, and the same without the pass of the decay.
    assert cells(table, "decay_in backward us") == [2.0] * 4 and cells(table, "speedup decay in backward") == [10.0] * 4
    assert {row[3] for row in costs.rows} == {"sparse products", "mvue", "pack", "search / 40", "decay"}
    for mvue in ("True", "False"):
        assert abs(sum(row[5] for row in costs.rows if row[:3] == ["bf16", "g", mvue]) - 1) < 1e-9


def test_blocks_and_steps_stand_beside_their_bound(without_gpu):
    table = timing.Table("block", suite.BLOCK_COLUMNS)
    suite.blocks(table, [GATED, PLAIN], ["bf16"])
    assert cells(table, "bound") == [arms.amdahl(1 / 20, 1 / 3)] * 2
    assert cells(table, THEIRS) == [20 / 2] * 2  # a micro-batch, and packing
    suite.blocks(table, [GATED], ["bf16"], pytorch=False)
    assert math.isnan(cells(table, THEIRS)[2])
    table = timing.Table("step", suite.STEP_COLUMNS)
    suite.training_step(table, PLAIN, "bf16", micro_batches=2)
    assert cells(table, "speedup") == [2.0] and cells(table, "micro-batches") == [2]
    assert cells(table, "dense tokens/s") == [2 * 32 / 20 * 1e6] and cells(table, "dense GB") == [1.0]
    assert cells(table, "ffn share") == [2 * 2 * 1 / 20] and cells(table, THEIRS) == [20.0]
    assert cells(table, "speedup decay in backward") == [20.0]


def a_table(folder, append=True, columns=("weights", "layer", "speed")):
    return timing.Table("t", list(columns), key=2, folder=folder, append=append)


def written(folder):
    return (folder / "t.csv").read_text().splitlines()


@pytest.fixture
def head(monkeypatch):
    """The header of the coming tables, to be changed."""
    values = {"device": "NVIDIA H200", "commit": "aaa"}
    monkeypatch.setattr(timing, "header", lambda: dict(values))
    return values


def test_a_table_is_on_disk_after_each_row(head, tmp_path):
    table = a_table(tmp_path / "new", append=False)
    for count in (1, 2):
        table.add("bf16", f"layer {count}", 1.0 / 3)
        assert written(tmp_path / "new")[-1] == f"bf16,layer {count},0.3333"
        assert len(written(tmp_path / "new")) == 2 + 1 + count
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.csv"]
    a_table(tmp_path / "new", append=False).add("bf16", "another", 2.0)
    assert written(tmp_path / "new")[3:] == ["bf16,another,2"]


def test_appended_rows_take_the_place_of_those_with_their_key(head, tmp_path):
    first = a_table(tmp_path, columns=("weights", "layer", "cost"))
    for row in (("bf16", "a", 1.0), ("bf16", "a", 2.0), ("bf16", "b", 3.0)):
        first.add(*row)
    head["commit"] = "bbb"
    second = a_table(tmp_path, columns=("weights", "layer", "cost", "more"))
    second.add("fp32", "a", 4.0, 0.5)
    assert written(tmp_path)[1] == "# commit: bbb, aaa"
    assert written(tmp_path)[3:] == ["bf16,a,1,", "bf16,a,2,", "bf16,b,3,", "fp32,a,4,0.5"]
    second.add("bf16", "a", 5.0, nan := float("nan"))
    assert written(tmp_path)[3:] == ["bf16,a,5,nan", "bf16,b,3,", "fp32,a,4,0.5"]
    second.add("bf16", "b", 6.0, nan)
    assert written(tmp_path)[1:] == [
        "# commit: bbb", "weights,layer,cost,more", "bf16,a,5,nan", "bf16,b,6,nan", "fp32,a,4,0.5"
    ]  # fmt: skip


def test_notes_of_a_header_stay_with_the_rows(head, tmp_path):
    a_table(tmp_path).add("bf16", "a", 1.0)
    path = tmp_path / "t.csv"
    path.write_text(path.read_text().replace("weights", "# layer a: measured cold\nweights"))
    a_table(tmp_path).add("bf16", "b", 1.0)
    assert written(tmp_path)[:3] == ["# device: NVIDIA H200", "# commit: aaa", "# layer a: measured cold"]


def test_rows_of_another_device_are_not_kept(head, tmp_path, capsys):
    a_table(tmp_path).add("bf16", "a", 1.0)
    head["device"] = "NVIDIA H100"
    a_table(tmp_path).add("bf16", "b", 1.0)
    assert written(tmp_path)[3:] == ["bf16,b,1"] and "another device, NVIDIA H200" in capsys.readouterr().out


def test_the_bound_is_amdahls():
    assert arms.amdahl(0.5, 2.0) == pytest.approx(4 / 3) and arms.amdahl(1.0, 1.5) == 1.5 and arms.amdahl(0.0, 9) == 1


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(512, 0.5), (1024, 0.9), (2048, 1.1), (4096, 1.2)], 1448),
        ([(512, 1.1), (1024, 1.2)], 512),
        ([(512, 0.5), (1024, 0.9)], None),
        ([(512, 1.1), (1024, 0.9), (2048, 1.1)], 1448),  # noise before the last crossing does not count
        ([], None),
    ],
)
def test_break_even_is_the_last_crossing(points, expected):
    found = suite.break_even(points)
    # 1448 is the whole part of 512 * 2^1.5 and of 1024 * 2^0.5
    assert found is None if expected is None else found == pytest.approx(expected, abs=1)


def test_own_layer_prints_its_break_even(without_gpu, capsys, tmp_path):
    command.own_layer(4096, 64, 128, True, "bf16", 4, tmp_path)
    text = capsys.readouterr().out
    assert "speed-up of a step: 1.67x" in text and "speed-up of a step of 4 micro-batches:" in text
    assert "break-even with MVUE: at or below 512 tokens a call" in text
    assert "sparsify(tokens=4096, micro_batches=4) expects" in text and "would leave it dense" in text
    rows = (tmp_path / "own.csv").read_text().splitlines()
    assert rows[0] == "# device: none" and len(rows) == 1 + 1 + 5


def test_the_suite_runs_what_is_asked_for(without_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "LAYERS", [suite.ffn_shape("g", 16, 64, 128)])
    monkeypatch.setattr(suite, "BLOCKS", [GATED])
    command.run_suite(("ffn", "block"), False, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.csv", "ffn.csv"]
    with pytest.raises(Sparse24Error, match="no benchmark speed; there are ffn, tokens, block, step"):
        command.run_suite(("speed",), False, None)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((0, 64, 64, 1), "--tokens must be positive, got 0"),
        ((16, 100, 64, 1), "--d-model must be positive, a multiple of 16, got 100"),
        ((16, 64, 8, 1), "--d-ff must be positive, a multiple of 16, got 8"),
        ((16, 64, 64, 0), "--micro-batches must be positive, got 0"),
    ],
)
def test_sizes_that_no_layer_has_are_refused(sizes, message):
    with pytest.raises(Sparse24Error, match=message):
        command.check_sizes(*sizes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(run_cli):
    status, _, err = run_cli("bench")
    assert status == 2 and err.startswith("error: the benchmark needs an NVIDIA GPU")


@pytest.mark.parametrize(
    "kernel, cost",
    [
        ("_ZN7cutlass13device_kernelINS_4gemm6UniversalIN8sparse244gemm4sm9014SparseMainloop", "sparse products"),
        ("void sparse24::gemm::sm80::sparse_gemm_kernel<sparse24::gemm::sm80::Kernel<Mainloop> >", "sparse products"),
        ("void sparse24::(anonymous namespace)::backward_mvue_kernel<true, sparse24::BFloat16>", "activation"),
        ("void sparse24::(anonymous namespace)::forward_stream_kernel<(sparse24::Activation)0, true>", "activation"),
        ("void sparse24::(anonymous namespace)::mvue_kernel<sparse24::BFloat16, (sparse24::Layout)0>", "mvue"),
        ("void sparse24::pack_kernel<sparse24::BFloat16, sparse24::BFloat16, (sparse24::Layout)0>", "pack"),
        ("void sparse24::(anonymous namespace)::unpack_rows_kernel<unsigned short>", "other"),
        ("void sparse24::(anonymous namespace)::masked_decay_kernel<float, float>", "decay"),
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NTT", "dense products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("triton_poi_fused_add_mul_0", "other"),
    ],
)  # fmt: skip
def test_kernels_are_sorted_by_what_they_are_for(kernel, cost):
    assert kernels.cost_of(kernel) == cost


def test_cases_are_chosen_by_name_and_unknown_names_refused():
    arguments = functools.partial(timing.arguments("", select=True).parse_args)
    cases = list(models.SHAPES.values())
    assert timing.chosen(arguments(["--only", "llama-1B,gpt2-124M"]), cases, ())[0].name == "llama-1B"
    assert [c.name for c in timing.chosen(arguments(["--quick"]), cases, ("gpt2-124M",))] == ["gpt2-124M"]
    with pytest.raises(SystemExit, match="no case nothing; there are gpt2-124M"):
        timing.chosen(arguments(["--only", "nothing"]), cases, ())
    assert timing.masters(arguments(["--master", "fp32"])) == ("fp32 master",)
    assert timing.masters(arguments([])) == ("bf16", "fp32 master")
