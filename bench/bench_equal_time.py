"""How much wider may a 2:4 feed-forward layer be in the time of a dense one? And how narrow is a dense one in its time?

The dense layer, dense ones of less width, and 2:4 ones of more, in 16 bits (also with whole weight gradients, or with
2:4 activations between dense weights) and in FP8, forward and backward, in one loop on a hot chip. Dense is bf16, and
beside 8-bit sides FP8, too: torchao's where that is installed. The 2:4 side pays re-packing, 1/40 of a mask search and
masked decay as in bench_ffn, where weights are 2:4. The width of equal time lies on the line between the two widths
measured around it.

    python -m bench.bench_equal_time [--csv FOLDER] [--append] [--quick] [--only NAMES] [--sides NAMES]
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bench.common import arguments, chosen, header, open_table, time_hot
from sparse24.benchmark import float8_dense, suite
from sparse24.benchmark.arms import Arm, between_us, feed_forward_arm
from sparse24.benchmark.models import ModelShape

LAYERS = [
    suite.ffn_shape("2048 x 8192", 16384, 2048, 8192, gated=False),
    suite.ffn_shape("4096 x 16384", 16384, 4096, 16384, gated=False),
    suite.ffn_shape("llama-8B", 16384, 4096, 14336),
    suite.ffn_shape("4096 x 16384 relu2", 16384, 4096, 16384, kind="relu2"),
    suite.ffn_shape("2048 x 8192 relu2", 16384, 2048, 8192, kind="relu2"),
    suite.ffn_shape("1280 x 5120 relu2", 16384, 1280, 5120, kind="relu2"),
    suite.ffn_shape("768 x 3072 relu2", 16384, 768, 3072, kind="relu2"),
]
ACTIVATION, ACTIVATION_FP8 = "2:4 activation", "fp8 2:4 activation"
NARROW = (0.5, 0.625, 0.75)
#: side -> widths of its layers beside 1
WIDE = {
    "2:4": (1.25, 1.5, 1.75),
    "2:4 mvue=False": (1.125, 1.25, 1.375),
    ACTIVATION: (1.125, 1.25, 1.375),
    ACTIVATION_FP8: (1.375, 1.5, 1.75),
    "fp8-hybrid": (1.75, 2.0, 2.25),
    "fp8": (2.0, 2.25, 2.5),
}
COLUMNS = ["layer", "side", "width", "us", "of dense"]


def arm_of(shape: ModelShape, width: float, side: str) -> Arm:
    shape, sparse = shape.of(d_ff=round(shape.d_ff * width / 128) * 128), side in WIDE
    settings = dict(sparse=sparse, compiled=not sparse, fp8_dense=float8_dense.variants().get(side))
    if side in (ACTIVATION, ACTIVATION_FP8):
        settings |= dict(operand="activation", precision=None if side == ACTIVATION else "fp8")
    elif side.startswith("fp8"):
        settings |= dict(precision=side)
    arm = feed_forward_arm(shape, master=torch.bfloat16, one_gate=True, **settings)
    if side.endswith("mvue=False"):
        arm.set_mvue(False)
    return arm


def measure(shape: ModelShape, sides: Iterable[str] = tuple(WIDE)) -> dict[tuple[str, float], float]:
    """Microseconds of an optimizer step with one micro-batch, by side and width."""
    suite.fresh()
    if shape.kind != "relu2":  # others make no zeros
        sides = [side for side in sides if side not in (ACTIVATION, ACTIVATION_FP8)]
    keys = [("dense", width) for width in (1.0, *NARROW)]
    if any(side.startswith("fp8") for side in sides):
        keys += [(side, 1.0) for side in float8_dense.variants()]
    keys += [(side, width) for side in sides for width in (1.0, *WIDE[side])]
    arms = {(side, width): arm_of(shape, width, side) for side, width in keys}
    calls = {}
    for key, arm in arms.items():
        arm.micro_batch()
        calls[key] = arm.micro_batch
        if arm.layers:
            arm.repack()  # 8-bit scales are known from here on, as after a step
            calls |= {(key, part): getattr(arm, part) for part in ("repack", "search", "decay")}
    times = time_hot(calls, rounds=12, warm_seconds=2.0, calls=2)
    steps = {}
    for key in arms:
        added = {part: times[key, part] for part in ("repack", "search", "decay")} if arms[key].layers else None
        steps[key] = times[key] + (between_us(added) if added else 0.0)
    return steps


def equal_width(points: list[tuple[float, float]], target: float) -> float:
    """The width whose time is `target`, on the lines through (width, time); NaN outside."""
    points = sorted(points)
    for (w0, t0), (w1, t1) in zip(points, points[1:], strict=False):
        if t0 <= target <= t1:
            return w0 + (w1 - w0) * (target - t0) / (t1 - t0)
    return float("nan")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], select=True)
    parser.add_argument("--sides", default=",".join(WIDE), help="of the 2:4 ones, with commas between")
    args = parser.parse_args()
    sides = args.sides.split(",")
    print(header())
    table = open_table(args, "equal_time", COLUMNS, key=3)
    for shape in chosen(args, LAYERS, quick=("4096 x 16384",)):
        steps = measure(shape, sides)
        dense = steps["dense", 1.0]
        for (side, width), us in steps.items():
            table.add(shape.name, side, width, us, us / dense)
        fp8_dense = min((us for (side, _), us in steps.items() if side in float8_dense.variants()), default=dense)
        for kind in dict.fromkeys(side for side, _ in steps if side in WIDE):
            points = [(w, us) for (side, w), us in steps.items() if side == kind]
            narrow = equal_width([(w, us) for (side, w), us in steps.items() if side == "dense"], steps[kind, 1.0])
            wide = equal_width(points, dense), equal_width(points, fp8_dense)
            print(
                f"# {shape.name}, {kind}: {wide[0]:.2f} as wide in dense's time, {wide[1]:.2f} in that of FP8 dense; "
                f"dense is {narrow:.2f} as wide in its time"
            )


if __name__ == "__main__":
    main()
