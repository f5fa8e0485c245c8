"""Fits the rates of sparse24/convert/cost_model.py to the results of the benchmarks, and says how far off they are.

The rates of products follow from single ones (gemm.csv) by least squares of relative errors, and what each costs beside
from whole layers (ffn.csv, tokens.csv). All others are taken as the model has them, from the tables of single kernels.

    python -m bench.fit_cost_model
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench.measured import read
from sparse24.benchmark.suite import LAYERS
from sparse24.convert import cost_model
from sparse24.convert.cost_model import H100, H200, Rates, Training, feed_forward

#: name of a device -> folder in bench/results, and the rates that the model has
DEVICES = {"H200": ("", H200), "H100": ("h100", H100)}
FITTED = ("dense_us_per_gflop", "dense_us", "sparse_us_per_wave_and_1024_k", "sparse_us_per_wave", "sparse_us")


def measured(folder: str) -> list[tuple[int, int, bool, Training, float, float, float]]:
    """(d_model, d_ff, gated, training, dense_us, sparse_us, sparse_us without MVUE) of every layer that was timed."""
    shapes = {layer.name: layer for layer in LAYERS}
    rows = []
    for row in read("ffn", folder):
        shape = shapes[row["layer"]]
        rows.append((row, shape.d_model, shape.d_ff, shape.gated, shape.tokens))
    for row in read("tokens", folder):
        d_model, d_ff = (int(extent) for extent in row["layer"].split(" x "))
        rows.append((row, d_model, d_ff, d_ff != 4 * d_model or d_model == 2048, int(row["tokens"])))
    found = []
    for row, d_model, d_ff, gated, tokens in rows:
        training = Training(tokens, master_bytes=2 if row["weights"] == "bf16" else 4)
        dense, sparse = float(row["dense_us"]), float(row["sparse_us"])
        found.append((d_model, d_ff, gated, training, dense, sparse, dense / float(row["speedup mvue=False"])))
    return found


def least_squares(columns: list[list[float]], times: list[float]) -> np.ndarray:
    """Coefficients that make the relative errors least."""
    scaled = np.array(columns) / np.array(times)[:, None]
    return np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]


def rates_of_products(folder: str, rates: Rates) -> tuple[float, float, float]:
    """(dense us a GFLOP, sparse us a wave and 1024 of k, sparse us a wave), from single products (gemm.csv).

    Each was timed between two events, which adds some microseconds to both sides: the constant of these fits, left out.
    """
    dense_columns, dense_times, sparse_columns, sparse_times = [], [], [], []
    for row in read("gemm", folder):
        m, n, k = (int(row[name]) for name in "mnk")
        widths = cost_model.WEIGHT_GRADIENT_WIDTHS if row["pass"].startswith("dW") else cost_model.WIDTHS
        gflop, (loops, epilogues) = 2e-9 * m * n * k, cost_model.waves(m, n, k, rates, widths)
        dense_columns.append([gflop, 1.0])
        dense_times.append(1e3 * gflop / float(row["dense TFLOP/s"]))
        sparse_columns.append([loops * k / 1024, epilogues, 1.0])
        sparse_times.append(1e3 * gflop / float(row["sparse TFLOP/s"]))
    slope, _ = least_squares(dense_columns, dense_times)
    per_k, per_wave, _ = least_squares(sparse_columns, sparse_times)
    return float(slope), float(per_k), float(per_wave)


def fit(folder: str, rates: Rates) -> Rates:
    slope, per_k, per_wave = rates_of_products(folder, rates)
    rates = replace(
        rates, dense_us_per_gflop=slope, sparse_us_per_wave_and_1024_k=per_k, sparse_us_per_wave=per_wave,
        dense_us=0.0, sparse_us=0.0,
    )  # fmt: skip
    # What is left of whole layers, a product: six of them each.
    columns, dense_left, sparse_left = [], [], []
    for d_model, d_ff, gated, training, dense, sparse, _ in measured(folder):
        expected = feed_forward(d_model, d_ff, gated, training, rates)
        columns.append((6 / dense, 6 / sparse))
        dense_left.append(1 - expected.dense_us / dense)
        sparse_left.append(1 - expected.sparse_us / sparse)
    weights = np.array(columns)
    dense_us, sparse_us = (
        float(weights[:, i] @ left / (weights[:, i] @ weights[:, i]))
        for i, left in enumerate((dense_left, sparse_left))
    )
    return replace(rates, dense_us=max(dense_us, 0.0), sparse_us=max(sparse_us, 0.0))


def report(folder: str, rates: Rates) -> None:
    wrong, errors = 0, []
    for d_model, d_ff, gated, training, dense, sparse, no_mvue in measured(folder):
        for mvue, took in ((True, sparse), (False, no_mvue)):
            expected = feed_forward(d_model, d_ff, gated, training.of(mvue=mvue), rates)
            converted = expected.speedup >= cost_model.MARGIN
            wrong += converted and dense / took < 1
            errors.append(abs(expected.speedup * took / dense - 1))
            print(
                f"{d_model:5} x {d_ff:<6}{'gated' if gated else '     '} {training.tokens:6} tokens, "
                f"{training.master_bytes} B, MVUE {'on ' if mvue else 'off'}: {dense / took:.2f}x measured, "
                f"{expected.speedup:.2f}x estimated{', converted' if converted else ''}"
            )
    print(f"errors: {100 * np.mean(errors):.1f} % in the mean, {100 * max(errors):.1f} % at most")
    print(f"{wrong} layers would be converted that were measured slower than dense")


if __name__ == "__main__":
    for name, (folder, now) in DEVICES.items():
        found = fit(folder, now)
        print(f"# {name}")
        report(folder, found)
        for field in FITTED:
            print(f"{field}: {getattr(found, field):.4g} (now {getattr(now, field):.4g})")
