"""Results of the study as a page and pictures: bench/results/quality/*.json -> docs/results/quality.md, quality.png.

Arms of bench/results/quality/fp8 are compared with the same arm in 16 bits, seed by seed: a table of their own, and
fp8.png. Seeds 0 and 1 of them were trained on another text, so their twins in 16 bits lie beside them.

    python -m bench.quality.report [--time-ratio 1.54] [--fp8-ratio R] [--hybrid-ratio R] [--mvue-ratio R]

Time is that of the feed-forward layers: a dense step of width 1 takes 1, a dense one of width w takes w, a 2:4 one
w / ratio, the speed over dense that bench_equal_time has for a layer of 4096 x 16384. An arm whose ratio is not given
has no time.

Differences are paired: an arm's loss less that of its base with the same seed, which begins with the same weights and
sees the same batches; the mean over the seeds that both have, and its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from bench.measured import markdown
from bench.quality.arms import Arm, parse

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE, PICTURE = (
    ROOT / p for p in ("bench/results/quality", "docs/results/quality.md", "docs/results/quality.png")
)
FLOAT8, FLOAT8_PICTURE = RESULTS / "fp8", PICTURE.with_name("fp8.png")
MARKS = ("<!-- results of the study -->\n", "<!-- end of results -->")
FLOAT8_MARKS = ("<!-- results in 8 bits -->\n", "<!-- end of results in 8 bits -->")


def read(folder: Path = RESULTS) -> dict[str, list[dict]]:
    """Runs by what their arms are called without a seed, in the one spelling of it."""
    groups = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        groups[parse(run["arm"]).group].append(run)
    return dict(groups)


def ratio_of(arm: Arm, ratios: dict[str, float | None]) -> float | None:
    """How much faster than dense the layers of a 2:4 arm are while they are sparse."""
    return ratios.get("mvue" if arm.method == "mvue" else arm.precision)


def ffn_time(arm: Arm, ratios: dict[str, float | None]) -> float | None:
    """Time of all steps of an arm, with that of dense ones of width 1 as 1."""
    if not arm.sparse:
        return arm.wide
    ratio = ratio_of(arm, ratios)
    return None if ratio is None else arm.wide * ((1 - arm.dense) / ratio + arm.dense)


def difference(runs: list[dict], base: list[dict]) -> str:
    """By how much the loss of `runs` is above that of `base`, seed by seed, in percent."""
    bases = {run["seed"]: run["mean"] for run in base}
    percent = [100 * (run["mean"] / bases[run["seed"]] - 1) for run in runs if run["seed"] in bases]
    if not percent:
        return "-"
    error = f" ± {stdev(percent) / math.sqrt(len(percent)):.2f}" if len(percent) > 1 else ""
    return f"{mean(percent):+.2f}{error} %"


def loss(runs: list[dict]) -> float:
    return mean(run["mean"] for run in runs)


def best_dense(groups: dict[str, list[dict]], arm: Arm) -> str | None:
    """The dense arm of width 1 with the arm's activation, at the best of the learning rates that were tried."""
    arms = {name: parse(name) for name in groups}
    fitting = [n for n, a in arms.items() if not a.sparse and a.activation == arm.activation and a.wide == 1]
    return min(fitting, key=lambda name: loss(groups[name]), default=None)


def rows(groups: dict[str, list[dict]], ratios: dict[str, float | None]) -> list[list[str]]:
    """A row an arm, the lowest loss first."""
    table = []
    for group, runs in sorted(groups.items(), key=lambda item: loss(item[1])):
        arm, base = parse(group), best_dense(groups, parse(group))
        spread = f"± {stdev(run['mean'] for run in runs):.4f}" if len(runs) > 1 else "one seed"
        time = ffn_time(arm, ratios)
        against = "-" if base is None else "0" if base == group else difference(runs, groups[base])
        shown = "-" if time is None else f"{time:.2f}"
        table.append([group, f"{loss(runs):.4f}", spread, str(len(runs)), shown, against])
    return table


def in_16_bits(group: str, groups: dict[str, list[dict]]) -> str | None:
    """The arm that differs from an 8-bit one in its precision alone; None for others, and where it was not run."""
    arm = parse(group)
    twin = replace(arm, precision="").group
    return twin if arm.precision and twin in groups else None


def precision_rows(groups: dict[str, list[dict]]) -> list[list[str]]:
    """A row an 8-bit arm, against the same one in 16 bits."""
    table = []
    for group, runs in sorted(groups.items()):
        if base := in_16_bits(group, groups):
            seeds = {run["seed"] for run in runs} & {run["seed"] for run in groups[base]}
            losses = [f"{loss(each):.4f}" for each in (runs, groups[base])]
            table.append([group, *losses, str(len(seeds)), difference(runs, groups[base])])
    return table


def with_twins(float8: dict[str, list[dict]], groups: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """8-bit arms and those they are compared with: what lies beside them, and the study's runs of other seeds."""
    twins = {replace(parse(group), precision="").group for group in float8}
    for twin in twins & groups.keys():
        seeds = {run["seed"] for run in float8.get(twin, [])}
        float8 = float8 | {twin: float8.get(twin, []) + [run for run in groups[twin] if run["seed"] not in seeds]}
    return float8


def study_table(groups: dict[str, list[dict]], ratios: dict[str, float | None]) -> str:
    header = ["arm", "validation loss", "spread", "seeds", "time of its FFNs", "against dense"]
    return markdown(header, rows(groups, ratios))


def float8_table(groups: dict[str, list[dict]]) -> str:
    header = ["arm", "validation loss", "of the same in 16 bits", "seeds", "against 16 bits"]
    return markdown(header, precision_rows(groups))


def smooth(curve: list, window: int = 5) -> tuple[list[float], list[float]]:
    """Steps and losses, each the mean of its neighbours."""
    steps, losses = zip(*curve, strict=True)
    near = [losses[max(0, i - window) : i + window + 1] for i in range(len(losses))]
    return list(steps), [mean(part) for part in near]


def at_best_rate(groups: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The arms without those that another learning rate makes better: a rate too high says nothing of a method."""
    best: dict[Arm, str] = {}
    for group in sorted(groups, key=lambda name: loss(groups[name])):
        best.setdefault(replace(parse(group), name="", lr=0.0), group)
    return {group: runs for group, runs in groups.items() if group in best.values()}


def draw(groups: dict[str, list[dict]], ratios: dict[str, float | None]) -> None:
    """Training loss against steps and against time, and what is left at the end against what it took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), facecolor="white")
    colors = plt.get_cmap("tab10").colors
    shown = {group: runs for group, runs in at_best_rate(groups).items() if ffn_time(parse(group), ratios) is not None}
    for i, (group, runs) in enumerate(shown.items()):
        arm, time = parse(group), ffn_time(parse(group), ratios)
        look = dict(color=colors[i % len(colors)], label=group)
        axes[2].plot(time, loss(runs), "o" if arm.sparse else "s", markersize=7, **look)
        if not runs[0]["curve"]:
            continue
        steps, losses = smooth(runs[0]["curve"])
        axes[0].plot(steps, losses, linewidth=1.2, **look)
        sparse_until = (1 - arm.dense) * runs[0]["steps"] if arm.sparse else 0
        ratio = ratio_of(arm, ratios) if arm.sparse else 1.0
        spent = [arm.wide * (min(s, sparse_until) / ratio + max(0.0, s - sparse_until)) for s in steps]
        axes[1].plot([time / runs[0]["steps"] for time in spent], losses, linewidth=1.2, **look)
    dense = sorted((parse(group).wide, loss(runs)) for group, runs in shown.items() if not parse(group).sparse)
    axes[2].plot(*zip(*dense, strict=True), color="black", linewidth=0.8, linestyle="--", label="dense, by width")
    curves = [smooth(runs[0]["curve"])[1] for runs in shown.values() if runs[0]["curve"]]
    late = [loss for losses in curves for loss in losses[len(losses) // 4 :]]
    for panel in axes[:2]:
        panel.set(ylim=(min(late) - 0.02, max(late)), ylabel="training loss")
    time = f"time of the feed-forward layers, 2:4 at {ratios['']:g}x (dense = 1)"
    axes[0].set(xlabel="optimizer steps")
    axes[1].set(xlabel=time)
    axes[2].set(xlabel=time, ylabel="validation loss at the end")
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def draw_float8(groups: dict[str, list[dict]]) -> None:
    """Training loss in 8 bits less that of the same seed in 16, on the same batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), facecolor="white")
    colors = {"fp8": "#223366", "fp8-hybrid": "#4477aa"}
    for group, runs in groups.items():
        if (base := in_16_bits(group, groups)) is None:
            continue
        bases = {run["seed"]: run for run in groups[base] if run["curve"]}
        for run in (run for run in runs if run["seed"] in bases):
            (steps, ours), (_, theirs) = smooth(run["curve"]), smooth(bases[run["seed"]]["curve"])
            percent = [100 * (a / b - 1) for a, b in zip(ours, theirs, strict=True)]
            precision = parse(group).precision
            label = None if run["seed"] else precision
            axes.plot(steps, percent, color=colors[precision], linewidth=1.2, label=label)
    axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="optimizer steps", ylabel="training loss against 16 bits, %", ylim=(-1, 1))
    axes.legend(title="a line a seed")
    figure.tight_layout()
    figure.savefig(FLOAT8_PICTURE, dpi=120)


def fill(page: str, marks: tuple[str, str], table: str) -> str:
    """The page with what stands between the marks replaced."""
    before, _, rest = page.partition(marks[0])
    return before + marks[0] + table + marks[1] + rest.partition(marks[1])[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time-ratio", type=float, default=1.54, help="speed of a 2:4 layer over a dense one")
    parser.add_argument("--fp8-ratio", type=float, help="the same with precision=fp8")
    parser.add_argument("--hybrid-ratio", type=float, help="the same with precision=fp8-hybrid")
    parser.add_argument("--mvue-ratio", type=float, help="the same with method=mvue")
    args = parser.parse_args()
    ratios = {
        "": args.time_ratio, "fp8": args.fp8_ratio, "fp8-hybrid": args.hybrid_ratio, "mvue": args.mvue_ratio
    }  # fmt: skip
    groups = read()
    float8 = with_twins(read(FLOAT8), groups)
    study, eight_bits = study_table(groups, ratios), float8_table(float8)
    PAGE.write_text(fill(fill(PAGE.read_text(), MARKS, study), FLOAT8_MARKS, eight_bits))
    draw(groups, ratios)
    draw_float8(float8)
    print(study, eight_bits, sep="\n")


if __name__ == "__main__":
    main()
