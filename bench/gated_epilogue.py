"""Would gating inside the epilogue of the gate-and-up product beat a separate pass? An estimate from measurements.

Training needs gate_up for its backward pass, so such an epilogue writes gate_up and h; what it saves is the separate
pass (4 B read and 2 B written an element of h), what it costs is an epilogue with half as much again to write.
That cost is measured on a product with the same multiplications and 1.5 times the output: 3*d_ff rows of two thirds
of the depth. The activation's arithmetic moves into the epilogue too, where no product runs beside it: at least the two
special functions (exponential and reciprocal) of each element, of which an SM does 16 a cycle.

    cost = product of 1.5 times the output - product
    gain = (separate pass - cost - arithmetic) / forward of the FFN

Hot chip, candidates interleaved; the clock is read while the product runs.

    python -m bench.gated_epilogue [--csv FOLDER] [--append]
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

from bench.common import arguments, header, open_table, time_hot
from sparse24 import ops
from sparse24.benchmark.suite import LAYERS

COLUMNS = ["shape", "gate_up_us", "activation_us", "down_us", "forward_us", "output_x1.5_us"]
COLUMNS += ["cost_us", "clock_MHz", "arithmetic_us", "gain without arithmetic", "gain"]
SPECIAL_FUNCTIONS = 2  # an element of h: exponential and reciprocal of SiLU
SPECIAL_FUNCTIONS_A_CYCLE = 16  # of an SM


def sparse_weight(rows: int, cols: int):
    """Packed values and metadata of a random weight."""
    w = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * cols**-0.5
    return ops.prune_compress(w)[1:3]


def hot_clock_mhz(call: Callable, time_us: float) -> float:
    """The SM clock while `call` runs again and again for about half a second."""
    for _ in range(int(5e5 / time_us)):
        call()
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "-i", "0"]
    clock = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    torch.cuda.synchronize()
    return float(clock.split()[0])


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    print(header())
    table = open_table(args, "gated_epilogue", COLUMNS)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for layer in (layer for layer in LAYERS if layer.gated):
        name, tokens, d_model, d_ff = layer.name, layer.tokens, layer.d_model, layer.d_ff
        depth = max(64, round(d_model * 2 / 3 / 64) * 64)
        x = torch.randn(tokens, d_model, device="cuda", dtype=torch.bfloat16)
        short = x[:, :depth].contiguous()
        up, down, wide = sparse_weight(2 * d_ff, d_model), sparse_weight(d_model, d_ff), sparse_weight(3 * d_ff, depth)
        gate_up = ops.sparse_mm(x, *up, 2 * d_ff)
        h = ops.gated_activation(gate_up, "silu")

        def forward(x=x, up=up, down=down, d_model=d_model, d_ff=d_ff):
            hidden = ops.gated_activation(ops.sparse_mm(x, *up, 2 * d_ff), "silu")
            return ops.sparse_mm(hidden, *down, d_model)

        calls = {
            "gate_up": lambda x=x, up=up, rows=2 * d_ff: ops.sparse_mm(x, *up, rows),
            "activation": lambda gate_up=gate_up: ops.gated_activation(gate_up, "silu"),
            "down": lambda h=h, down=down, rows=d_model: ops.sparse_mm(h, *down, rows),
            "forward": forward,
            "wide": lambda short=short, wide=wide, rows=3 * d_ff: ops.sparse_mm(short, *wide, rows),
        }
        time_us = time_hot(calls, rounds=15, calls=3)
        time_us["wide"] *= 2 * d_ff * d_model / (3 * d_ff * depth)  # the same number of multiplications
        cost = time_us["wide"] - time_us["gate_up"]
        clock = hot_clock_mhz(calls["gate_up"], time_us["gate_up"])
        cycles = tokens * d_ff * SPECIAL_FUNCTIONS / (SPECIAL_FUNCTIONS_A_CYCLE * sms)
        saved = time_us["activation"] - cost
        gains = [saved / time_us["forward"], (saved - cycles / clock) / time_us["forward"]]
        table.add(name, *(time_us[key] for key in calls), cost, clock, cycles / clock, *gains)


if __name__ == "__main__":
    main()
