"""When does a 2:4 feed-forward layer train faster than a dense one? An estimate from measured rates.

A step of a layer is a handful of kernels, and each is bound by the tensor cores or by memory. So its time is estimated
as a sum: products by their multiplications and their waves of tiles, passes over memory by their bytes.

The rates below were measured on an NVIDIA H200 and an H100 (bench/results and bench/results/h100: gemm.csv, ffn.csv,
tokens.csv, activation.csv, mvue.csv, packing.csv; epilogue.csv and grad_weight.csv on the H100 alone). The H200 ran
older, slower kernels, and its constants include what those took longer. `rates_for` scales the rates of the GPU with
the more similar memory to other GPUs. `python -m bench.fit_cost_model` fits the rates again, and prints how far the
estimates are off. We have not measured Ampere and Ada: their rates are parts of published peaks (`cost_published`).

The dense side is the layer as `torch.compile` makes it; an eager one is slower than estimated here. An estimate
covers both passes of the layer and, for 2:4, all that it adds to a step: re-packing, masked decay, a mask search every
40 steps, MVUE. These are pure functions of numbers: no GPU is asked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: `sparsify(backend="auto")` converts a layer from this estimated speed-up on: on an H100 estimates are off by less
MARGIN = 1.08
#: the same where rates are guesses, since nobody has measured how far off those are
MARGIN_OF_GUESSES = 1.2
#: tokens a forward call that are assumed where the caller says nothing
ASSUMED_TOKENS = 8192


@dataclass(frozen=True)
class Rates:
    """What a chip does when it is hot. Times in microseconds, bandwidths of passes over memory in TB/s."""

    multiprocessors: int
    memory_bandwidth: float  # bytes a second, by the clock and the width of the memory's bus
    # Dense products: a line through the times of cuBLAS.
    dense_us_per_gflop: float
    dense_us: float
    # Sparse products: waves of 128 x 256 tiles (or narrower) over the chip; each takes its K loop and an epilogue.
    sparse_us_per_wave_and_1024_k: float
    sparse_us_per_wave: float
    sparse_us: float
    # Passes over memory.
    activation_backward: float
    activation_backward_mvue: float
    mvue: float
    pack: float
    decay: float
    dense_pass: float  # what torch.compile's kernels reach
    launch_us: float = 3.0
    # How much longer a product takes for a million elements of h, or of a weight gradient that it adds to.
    activation_us: float = 1.2
    accumulation_us: float = 0.75
    measured: bool = True  # else guessed, from published peaks

    @property
    def margin(self) -> float:
        """The estimated speed-up from which on `sparsify(backend="auto")` converts."""
        return MARGIN if self.measured else MARGIN_OF_GUESSES

    def on(self, multiprocessors: int, memory_bandwidth: float) -> Rates:
        """The same on a chip of so many multiprocessors, whose memory could move so many bytes a second (0: unknown).

        Products go with the multiprocessors and passes over memory with the bandwidth; clocks and limits of power are
        taken to be alike.
        """
        memory = memory_bandwidth / self.memory_bandwidth if memory_bandwidth > 0 else 1.0
        return replace(
            self,
            multiprocessors=multiprocessors,
            memory_bandwidth=memory_bandwidth if memory_bandwidth > 0 else self.memory_bandwidth,
            dense_us_per_gflop=self.dense_us_per_gflop * self.multiprocessors / multiprocessors,
            activation_us=self.activation_us * self.multiprocessors / multiprocessors,
            accumulation_us=self.accumulation_us / memory,
            **{name: getattr(self, name) * memory for name in PASSES},
        )


#: rates of passes over memory
PASSES = ("activation_backward", "activation_backward_mvue", "mvue", "pack", "decay", "dense_pass")

H200 = Rates(
    multiprocessors=132, memory_bandwidth=4.9e12, dense_us_per_gflop=1.588, dense_us=3.75,
    sparse_us_per_wave_and_1024_k=8.36, sparse_us_per_wave=1.43, sparse_us=7.5,
    activation_backward=4.2, activation_backward_mvue=4.1, mvue=3.95, pack=3.85, decay=4.1, dense_pass=4.1,
)  # fmt: skip
H100 = Rates(
    multiprocessors=132, memory_bandwidth=3.35e12, dense_us_per_gflop=1.538, dense_us=4.89,
    sparse_us_per_wave_and_1024_k=8.82, sparse_us_per_wave=1.32, sparse_us=5.2,
    activation_backward=2.95, activation_backward_mvue=2.93, mvue=2.94, pack=2.8, decay=2.93, dense_pass=2.95,
)  # fmt: skip


def rates_for(multiprocessors: int, memory_bandwidth: float) -> Rates:
    """Rates of the measured chip with memory closest to this one (0: unknown, taken as the slower), scaled to it."""
    middle = (H100.memory_bandwidth * H200.memory_bandwidth) ** 0.5
    return (H200 if memory_bandwidth > middle else H100).on(multiprocessors, memory_bandwidth)


@dataclass(frozen=True)
class Training:
    """How a layer is trained: tokens of a forward call, calls an optimizer step, bytes a weight, settings.

    precision  None: 16-bit products; "fp8-hybrid" and "fp8" are estimated by `cost_float8`
    """

    tokens: int
    micro_batches: int = 1
    master_bytes: int = 2
    mvue: bool = True
    precision: str | None = None

    def of(self, **changes) -> Training:
        return replace(self, **changes)


@dataclass(frozen=True)
class Times:
    """Microseconds of one optimizer step of a layer, estimated."""

    dense_us: float
    sparse_us: float

    @property
    def speedup(self) -> float:
        return self.dense_us / self.sparse_us

    def __add__(self, other: Times) -> Times:
        return Times(self.dense_us + other.dense_us, self.sparse_us + other.sparse_us)

    def __mul__(self, count: float) -> Times:
        return Times(self.dense_us * count, self.sparse_us * count)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def dense_product_us(m: int, n: int, k: int, rates: Rates) -> float:
    return rates.dense_us_per_gflop * 2e-9 * m * n * k + rates.dense_us


#: widths of the tiles that are compiled, by 128 rows: weight gradients of narrow layers would leave the chip half empty
WIDTHS, WEIGHT_GRADIENT_WIDTHS = (256,), (256, 192)


def waves(m: int, n: int, k: int, rates: Rates, widths: tuple[int, ...] = WIDTHS) -> tuple[float, float]:
    """How many rounds of tiles the chip takes, for K loops and for epilogues, in units of 128 x 256 tiles.

    Tiles come in pairs along m. Of the `widths`, the one with the shorter loops is taken. Multiprocessors that have no
    tile in the last round share its K loops (stream-K): a tenth more time, and a fixed cost like 512 more of k.
    """

    def of(width: int) -> tuple[float, float]:
        whole, rest = divmod(2 * _ceil(m, 256) * _ceil(n, width), rates.multiprocessors)
        shared = min(1.0, 1.1 * rest / rates.multiprocessors + 512 / max(k, 1)) if rest else 0.0
        return (whole + shared) * width / WIDTHS[0], (whole + (rest > 0)) * width / WIDTHS[0]

    return min(of(width) for width in widths)


def sparse_product_us(m: int, n: int, k: int, rates: Rates, widths: tuple[int, ...] = WIDTHS) -> float:
    """out(m, n) = lhs(m, k) rhs(k, n) with lhs 2:4."""
    loops, epilogues = waves(m, n, k, rates, widths)
    in_loops = rates.sparse_us_per_wave_and_1024_k * k / 1024
    return loops * in_loops + epilogues * rates.sparse_us_per_wave + rates.sparse_us


def pass_us(bytes_moved: float, rate: float, rates: Rates) -> float:
    """A pass over memory, at `rate` TB/s."""
    return bytes_moved / rate / 1e6 + rates.launch_us


def linear(out_features: int, in_features: int, training: Training, rates: Rates = H200) -> Times:
    """A linear layer on its own: three products, and what 2:4 adds to them."""
    t, m, k = training.tokens, out_features, in_features
    products = ((m, t, k), (k, t, m), (m, k, t))
    dense = sum(dense_product_us(*mnk, rates) for mnk in products)
    sparse = sum(sparse_product_us(*mnk, rates) for mnk in products[:2])
    sparse += _weight_gradient_us(m, k, training, rates)
    if training.mvue:
        sparse += pass_us(3.125 * t * m, rates.mvue, rates)
    return Times(dense, sparse) * training.micro_batches + weight_step_us(m * k, training, rates)


def feed_forward(d_model: int, d_ff: int, gated: bool, training: Training, rates: Rates = H200) -> Times:
    """A whole feed-forward layer, fused as sparse24/layers/fused/feedforward.py does it, against torch.compile."""
    t, up = training.tokens, d_ff * (2 if gated else 1)
    shapes = ((up, d_model), (d_model, d_ff))  # as (out_features, in_features)
    dense = sparse = 0.0
    for m, k in shapes:
        dense += sum(dense_product_us(*mnk, rates) for mnk in ((m, t, k), (k, t, m), (m, k, t)))
        sparse += sparse_product_us(m, t, k, rates) + sparse_product_us(k, t, m, rates)
        sparse += _weight_gradient_us(m, k, training, rates)
    elements = t * d_ff
    forward, backward = (6, 10) if gated else (4, 6)  # bytes an element of h that must move
    dense += pass_us(forward * elements, rates.dense_pass, rates) + pass_us(
        backward * elements, rates.dense_pass, rates
    )
    sparse += 1e-6 * elements * rates.activation_us
    if training.mvue:
        packed = 1.125 * up / d_ff
        sparse += pass_us((backward + packed) * elements, rates.activation_backward_mvue, rates)
        sparse += pass_us(3.125 * t * d_model, rates.mvue, rates)
    else:
        sparse += pass_us(backward * elements, rates.activation_backward, rates)
    once = weight_step_us(sum(m * k for m, k in shapes), training, rates)
    return Times(dense, sparse) * training.micro_batches + once


def feed_forward_of_activations(d_model: int, d_ff: int, training: Training, rates: Rates = H200) -> Times:
    """A plain feed-forward layer whose activation is the 2:4 operand (functional/sparse_activation.py)."""
    t, elements, weights = training.tokens, training.tokens * d_ff, 2 * d_model * d_ff
    dense = feed_forward(d_model, d_ff, False, training.of(micro_batches=1), rates).dense_us
    dense -= dense_weight_us(weights, training.of(micro_batches=1), rates)
    sparse = 2 * dense_product_us(d_ff, t, d_model, rates) + 2 * sparse_product_us(t, d_model, d_ff, rates)
    sparse += 2 * sparse_product_us(d_ff, d_model, t, rates, WEIGHT_GRADIENT_WIDTHS)
    # Forward reads u and writes h twice, at 1.125 bytes; backward reads dh and u, and writes du without its metadata.
    sparse += pass_us(4.25 * elements, rates.mvue, rates)
    sparse += pass_us(6.125 * elements, rates.activation_backward_mvue, rates)
    once = Times(dense_weight_us(weights, training, rates), _pruned_weight_us(weights, training, rates))
    return Times(dense, sparse) * training.micro_batches + once


def break_even_tokens(d_model: int, d_ff: int, gated: bool, training: Training, rates: Rates = H200) -> int | None:
    """The break-even token count: tokens a call, in steps of 256, above which 2:4 is estimated faster; None: never."""
    counts = range(256, 2**16 + 1, 256)
    behind = [t for t in counts if feed_forward(d_model, d_ff, gated, training.of(tokens=t), rates).speedup <= 1]
    return None if counts[-1] in behind else max(behind, default=0) + 256


def _weight_gradient_us(m: int, k: int, training: Training, rates: Rates) -> float:
    if training.mvue:
        return sparse_product_us(m, k, training.tokens, rates, WEIGHT_GRADIENT_WIDTHS)
    return dense_product_us(m, k, training.tokens, rates)


def weight_step_us(weights: int, training: Training, rates: Rates, packed_bytes: float = 2.375) -> Times:
    """What a step pays for its weights, however many tokens it has. packed_bytes: both packed forms and the mask."""
    sparse = _sparse_weight_us(weights, training, rates, packed_bytes)
    return Times(dense_weight_us(weights, training, rates), sparse)


def dense_weight_us(weights: int, training: Training, rates: Rates) -> float:
    """A step's passes over a dense weight: casts of fp32 masters and their gradients, sums of micro-batches."""
    casts = 12.0 * training.micro_batches if training.master_bytes == 4 else 0.0
    sums = 3.0 * training.master_bytes * (training.micro_batches - 1)
    return (casts + sums) * weights / rates.dense_pass / 1e6


def _sparse_weight_us(weights: int, training: Training, rates: Rates, packed_bytes: float) -> float:
    """A step's passes over a 2:4 weight."""
    size = training.master_bytes
    # A search costs about what packing costs: it is the same pass.
    pack = (size + packed_bytes) * weights / rates.pack / 1e6 + rates.launch_us
    decay = (3 * size + 0.125) * weights / rates.decay / 1e6 + rates.launch_us
    casts = 6.0 * training.micro_batches if size == 4 and not training.mvue else 0.0
    return pack + decay + sums_us(weights, training, rates) + casts * weights / rates.dense_pass / 1e6


def _pruned_weight_us(weights: int, training: Training, rates: Rates) -> float:
    """A step's passes over a dense weight between pruned activations: fp32 masters are cast; products add gradients."""
    casts = 6.0 * training.micro_batches if training.master_bytes == 4 else 0.0
    return sums_us(weights, training, rates) + casts * weights / rates.dense_pass / 1e6


def sums_us(weights: int, training: Training, rates: Rates) -> float:
    """What products take longer that add a weight gradient to those of earlier micro-batches."""
    return 1e-6 * weights * rates.accumulation_us * (training.micro_batches - 1)
