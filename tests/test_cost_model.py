"""The estimate that decides which layers train 2:4: pure numbers, held against what was measured."""

import csv
from pathlib import Path

import pytest

from sparse24 import cost_model
from sparse24.cost_model import MARGIN, Training, break_even_tokens, feed_forward, linear

RESULTS = Path(__file__).parent.parent / "bench" / "results"
SHAPES = {"124M-like": (16384, 768, 2048), "1.5B-like": (8192, 1600, 4288), "llama-7B": (8192, 4096, 11008),
          "llama-8B": (16384, 4096, 14336)}  # fmt: skip


def rows(name):
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def measured():
    """(measured speed-up, estimated speed-up) of every layer of ffn.csv, with MVUE and without."""
    for row in rows("ffn"):
        if row["layer"] not in SHAPES:
            continue
        tokens, d_model, d_ff = SHAPES[row["layer"]]
        training = Training(tokens, master_bytes=2 if row["weights"] == "bf16" else 4)
        for column, mvue in (("speedup", True), ("speedup mvue=False", False)):
            yield float(row[column]), feed_forward(d_model, d_ff, True, training.of(mvue=mvue)).speedup


def test_what_auto_converts_was_never_measured_slower_than_dense():
    """The rule of backend="auto", over every layer of the benchmark."""
    converted = [speedup for speedup, estimate in measured() if estimate >= MARGIN]
    assert len(converted) >= 8 and min(converted) > 0.99, converted


def test_estimates_of_large_layers_are_near_what_was_measured():
    near = [abs(estimate / speedup - 1) for speedup, estimate in measured() if speedup > 1.2]
    assert len(near) >= 5 and max(near) < 0.15, near


def test_products_are_near_what_was_measured():
    rates = cost_model.Rates()
    errors = []
    for row in rows("gemm"):
        m, n, k = int(row["m"]), int(row["n"]), int(row["k"])
        took = 2 * m * n * k / 1e6 / float(row["sparse TFLOP/s"])
        widths = cost_model.WEIGHT_GRADIENT_WIDTHS if row["pass"].startswith("dW") else cost_model.WIDTHS
        errors.append(abs(cost_model.sparse_product_us(m, n, k, rates, widths) / took - 1))
    assert len(errors) >= 36 and sorted(errors)[len(errors) // 2] < 0.15, errors


@pytest.mark.parametrize("gated", [True, False])
def test_more_tokens_and_more_micro_batches_never_hurt_a_large_layer(gated):
    by_tokens = [feed_forward(4096, 11008, gated, Training(t)).speedup for t in (512, 1024, 2048, 4096, 8192, 16384)]
    assert by_tokens == sorted(by_tokens) and by_tokens[0] < MARGIN < by_tokens[-1]
    by_calls = [feed_forward(4096, 11008, gated, Training(2048, calls)).speedup for calls in (1, 2, 4, 8)]
    assert by_calls == sorted(by_calls)


def test_break_even_is_where_the_estimate_crosses_one():
    tokens = break_even_tokens(4096, 11008, True, Training(0))
    ahead, behind = (feed_forward(4096, 11008, True, Training(t)).speedup for t in (tokens, tokens - 256))
    assert behind <= 1 < ahead
    assert break_even_tokens(64, 256, False, Training(0)) is None


def test_fp32_masters_cost_both_sides_more():
    half, full = (feed_forward(4096, 11008, True, Training(8192, master_bytes=size)) for size in (2, 4))
    assert full.dense_us > half.dense_us and full.sparse_us > half.sparse_us


def test_small_layers_are_estimated_slower():
    assert linear(1024, 256, Training(8192)).speedup < 1 < linear(14336, 4096, Training(8192)).speedup
