"""When does a 2:4 layer of 8-bit products train faster than dense ones, in bf16 and in FP8?

It works as `cost_model` does, with the same rates for passes over memory and for launches.

How long 8-bit products take, compared with 16-bit ones, was measured on an H200: this library's main loop in e4m3 and
`torch._scaled_mm`, in one interleaved run.

    PFLOP/s, dense count                              Llama's products   GPT-2 774M up
    2:4, sums by the tensor cores                        1.91 to 2.02
    2:4, sums promoted to fp32                           1.61 to 1.67         1.62
    torch._scaled_mm                                     1.28

The passes around products are estimated by their bytes. What FP8 dense training adds to its products is fitted to
torchao's tensorwise layers (0.18, compiled, the same GPU): with a gate 7.5 ms at Llama 7B, 18.1 ms at 8B, 6.6 ms for
2048 x 8192 with 16,384 tokens; plain ones with squared ReLU in bench/results/equal_time.csv.
"""

from __future__ import annotations

from dataclasses import replace

from .cost_model import (
    H200,
    WEIGHT_GRADIENT_WIDTHS,
    WIDTHS,
    Rates,
    Times,
    Training,
    dense_product_us,
    dense_weight_us,
    pass_us,
    sparse_product_us,
    sums_us,
    weight_step_us,
)

#: time of an 8-bit product's K loop over a 16-bit one's: sums by the tensor cores alone, and promoted to fp32
FAST, PROMOTED = 0.484, 0.60
#: the same ratio for a dense product
DENSE = 0.488
#: the bandwidth of torch.compile's casts, as a part of what a pass with one read and one write reaches: with a gate,
#: and in plain layers without biases, where they become one with the activation
GATED_CASTS, PLAIN_CASTS = 0.48, 1.0
#: launches of a block that prunes its activation, besides its products: a scale takes two, or with a memset three
LAUNCHES_OF_ACTIVATIONS = 26
#: widths of the tiles that promote their sums
PROMOTED_WIDTHS = (192,)


def _fast(m: int, n: int, k: int, rates: Rates) -> float:
    eight = replace(rates, sparse_us_per_wave_and_1024_k=FAST * rates.sparse_us_per_wave_and_1024_k)
    # Sizes that do not fit the kernels are padded (ops/gemm/padding.py): copies of both operands, and of the result.
    copied = (2 * n * k + m * k if k % 32 else 0) + (4 * m * n if m % 8 else 0)
    return sparse_product_us(m, n, k, eight, WIDTHS) + (pass_us(copied, rates.dense_pass, rates) if copied else 0)


def _weight_gradient(m: int, k: int, training: Training, rates: Rates) -> float:
    if not training.mvue:
        return dense_product_us(m, k, training.tokens, rates)
    if training.precision == "fp8-hybrid":
        return sparse_product_us(m, k, training.tokens, rates, WEIGHT_GRADIENT_WIDTHS)
    return _promoted(m, k, training.tokens, rates)


def _promoted(m: int, n: int, k: int, rates: Rates) -> float:
    eight = replace(rates, sparse_us_per_wave_and_1024_k=PROMOTED * rates.sparse_us_per_wave_and_1024_k)
    return sparse_product_us(m, n, k, eight, PROMOTED_WIDTHS)


def _dense8(m: int, n: int, k: int, rates: Rates) -> float:
    return dense_product_us(m, n, k, replace(rates, dense_us_per_gflop=DENSE * rates.dense_us_per_gflop))


def _layer_us(product, m: int, k: int, tokens: int, rates: Rates) -> float:
    """The three products of a layer (out_features, in_features) = (m, k)."""
    return sum(product(*mnk, rates) for mnk in ((m, tokens, k), (k, tokens, m), (m, k, tokens)))


def _sparse_layer_us(m: int, k: int, training: Training, rates: Rates) -> float:
    t = training.tokens
    return _fast(m, t, k, rates) + _fast(k, t, m, rates) + _weight_gradient(m, k, training, rates)


def _gradient_bytes(training: Training) -> float:
    """Written for an element of an output gradient: its 8 bits, and its pruned form in 8 or 16 bits."""
    return 1 + (0 if not training.mvue else 1.125 if training.precision == "fp8-hybrid" else 0.625)


def linear(out_features: int, in_features: int, training: Training, rates: Rates = H200) -> Times:
    """A linear layer on its own, against the faster of bf16 and FP8 dense."""
    t, m, k = training.tokens, out_features, in_features
    full = training.precision == "fp8" and training.mvue
    sparse = _sparse_layer_us(m, k, training, rates)
    sparse += pass_us((4 if full else 3) * t * k, rates.mvue, rates)
    sparse += pass_us((2 + _gradient_bytes(training)) * t * m, rates.mvue, rates)
    dense16 = _layer_us(dense_product_us, m, k, t, rates)
    dense8 = _layer_us(_dense8, m, k, t, rates) + _casts_us(t * (m + k) + m * k, GATED_CASTS, rates)
    return _whole(dense16, dense8, sparse, m * k, training, rates)


def feed_forward(d_model: int, d_ff: int, gated: bool, training: Training, rates: Rates = H200) -> Times:
    """A whole feed-forward layer, against the faster of bf16 and FP8 dense."""
    t, parts = training.tokens, 2 if gated else 1
    shapes = ((parts * d_ff, d_model), (d_model, d_ff))
    full = training.precision == "fp8" and training.mvue
    elements = t * d_ff
    sparse = sum(_sparse_layer_us(m, k, training, rates) for m, k in shapes)
    sparse += pass_us((4 if full else 3) * t * d_model, rates.mvue, rates)
    sparse += pass_us((2 + _gradient_bytes(training)) * t * d_model, rates.mvue, rates)
    sparse += pass_us((2 * parts + (2 if full else 3)) * elements, rates.dense_pass, rates)
    backward = 2 + parts * (2 + _gradient_bytes(training))
    sparse += pass_us(backward * elements, rates.activation_backward_mvue, rates)
    activation = sum(pass_us(b * elements, rates.dense_pass, rates) for b in ((6, 10) if gated else (4, 6)))
    dense16 = sum(_layer_us(dense_product_us, m, k, t, rates) for m, k in shapes) + activation
    cast = t * (2 * d_model + (1 + parts) * d_ff) + sum(m * k for m, k in shapes)
    casts = GATED_CASTS if gated else PLAIN_CASTS
    dense8 = sum(_layer_us(_dense8, m, k, t, rates) for m, k in shapes) + activation / casts
    dense8 += _casts_us(cast, casts, rates)
    return _whole(dense16, dense8, sparse, sum(m * k for m, k in shapes), training, rates)


def feed_forward_of_activations(d_model: int, d_ff: int, training: Training, rates: Rates = H200) -> Times:
    """A plain feed-forward layer whose activation is the 2:4 operand, against the faster of bf16 and FP8 dense."""
    t, weights = training.tokens, 2 * d_model * d_ff
    elements, once = t * d_ff, training.of(micro_batches=1)
    dense = feed_forward(d_model, d_ff, False, once, rates).dense_us - dense_weight_us(weights, once, rates)
    sparse = 2 * _dense8(d_ff, t, d_model, rates) + 2 * _fast(t, d_model, d_ff, rates)
    sparse += 2 * _promoted(d_ff, d_model, t, rates)
    # A scale is a read more. x and dy are cast both ways; weights along rows in forward, along columns in backward.
    sparse += pass_us((2 + 4) * 2 * t * d_model + (3 * training.master_bytes + 2) * weights, rates.dense_pass, rates)
    sparse += pass_us((2 + 3.25) * elements, rates.mvue, rates)
    sparse += pass_us((4 + 5.125) * elements, rates.activation_backward_mvue, rates)
    sparse += LAUNCHES_OF_ACTIVATIONS * rates.launch_us
    between = Times(dense_weight_us(weights, training, rates), sums_us(weights, training, rates))
    return Times(dense, sparse) * training.micro_batches + between


def _casts_us(elements: int, share: float, rates: Rates) -> float:
    """Largest magnitude and casts both ways of dense FP8 training: 6 bytes an element at the least, at a share of the
    bandwidth.
    """
    return pass_us(6 * elements, rates.dense_pass * share, rates)


def _whole(dense16: float, dense8: float, sparse: float, weights: int, training: Training, rates: Rates) -> Times:
    """A step of all micro-batches. Packed in 8 bits a weight has 1.25 bytes, both ways."""
    once = weight_step_us(weights, training, rates, packed_bytes=1.375)
    return Times(min(dense16, dense8), sparse) * training.micro_batches + once
