"""Rates of GPUs that we have not measured, from what NVIDIA publishes of them: Ampere and Ada.

We assume that a chip reaches the same part of its published peaks as a hot H100 does. Nobody has timed these kernels
on such GPUs yet; if you have one, you can: `python -m sparse24 bench --report FILE` (docs/when-it-pays.md).

Dense peaks are those of bf16 with fp32 sums, from NVIDIA's white papers of GA100, GA102 and AD102; sparse ones are
twice that. GeForce cards have half the rate of professional ones of the same chip where sums are fp32. Ada's products
of 8 bits are twice as fast as those of 16, as Hopper's are, so `cost_float8` takes the same parts of their time there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cost_model import H100, PASSES, Rates, rates_for

#: NVIDIA H100 SXM, as the chips below
H100_DENSE_TFLOPS = 989.4


@dataclass(frozen=True)
class Published:
    """Of one GPU: multiprocessors, dense bf16 TFLOP/s with fp32 sums, bytes a second of its memory."""

    multiprocessors: int
    dense_tflops: float
    memory_bandwidth: float

    def rates(self) -> Rates:
        """The H100's, carried over by peaks."""
        products = H100_DENSE_TFLOPS / self.dense_tflops
        memory = self.memory_bandwidth / H100.memory_bandwidth
        # Waves are rounds of one tile a multiprocessor: by what one of them computes.
        wave = products * self.multiprocessors / H100.multiprocessors
        return replace(
            H100,
            multiprocessors=self.multiprocessors,
            memory_bandwidth=self.memory_bandwidth,
            dense_us_per_gflop=H100.dense_us_per_gflop * products,
            sparse_us_per_wave_and_1024_k=H100.sparse_us_per_wave_and_1024_k * wave,
            sparse_us_per_wave=H100.sparse_us_per_wave * wave,
            activation_us=H100.activation_us * products,
            accumulation_us=H100.accumulation_us / memory,
            measured=False,
            **{name: getattr(H100, name) * memory for name in PASSES},
        )


#: compute capability -> a GPU of it
PUBLISHED = {
    (8, 0): Published(108, 312.0, 1.555e12),  # A100 40 GB; the 80 GB one has up to 2.04e12
    (8, 6): Published(82, 71.0, 0.936e12),  # RTX 3090
    (8, 9): Published(128, 165.2, 1.008e12),  # RTX 4090
}


def rates_of_gpu(capability: tuple[int, int], multiprocessors: int, memory_bandwidth: float, name: str = "") -> Rates:
    """Rates on a GPU: measured ones on Hopper, else those of the published GPU of its kind, scaled to this one.

    memory_bandwidth  bytes a second; 0: unknown
    name              as the driver has it: "GeForce" in it halves products from sm_86 on
    """
    published = PUBLISHED.get(capability)
    if published is None:
        return rates_for(multiprocessors, memory_bandwidth)
    if capability != (8, 0) and "GeForce" not in name:
        published = replace(published, dense_tflops=2 * published.dense_tflops)
    return published.rates().on(multiprocessors, memory_bandwidth)
