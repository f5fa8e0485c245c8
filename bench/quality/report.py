"""Results of the study as a page and a picture: bench/results/quality/*.json -> docs/results/quality.md, quality.png.

    python -m bench.quality.report [--time-ratio 1.54]

Time is that of the feed-forward layers: a dense step of width 1 takes 1, a dense one of width w takes w, a 2:4 one
w / time-ratio, the speed that bench_equal_time has for a layer of 4096 x 16384.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from bench.quality.arms import Arm, parse
from bench.tables import markdown

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE, PICTURE = (
    ROOT / p for p in ("bench/results/quality", "docs/results/quality.md", "docs/results/quality.png")
)
MARKS = ("<!-- results of the study -->\n", "<!-- end of results -->")


def read() -> dict[str, list[dict]]:
    """Runs by the arm's name without its seed."""
    groups = defaultdict(list)
    for path in sorted(RESULTS.glob("*.json")):
        run = json.loads(path.read_text())
        groups[run["group"]].append(run)
    return dict(groups)


def ffn_time(arm: Arm, ratio: float) -> float:
    """Time of all steps of an arm, with that of dense ones of width 1 as 1."""
    if not arm.sparse:
        return arm.wide
    return arm.wide * ((1 - arm.dense) / ratio + arm.dense)


def rows(groups: dict[str, list[dict]], ratio: float) -> list[list[str]]:
    """A row an arm; what it is compared with is the dense arm of width 1 of its activation."""
    table = []
    for group, runs in sorted(groups.items(), key=lambda item: mean(run["mean"] for run in item[1])):
        arm, losses = parse(group), [run["mean"] for run in runs]
        base = baseline(groups, arm)
        spread = f"± {stdev(losses):.4f}" if len(losses) > 1 else "one seed"
        against = f"{100 * (mean(losses) / mean(base) - 1):+.2f} %" if base else "-"
        table.append([group, f"{mean(losses):.4f}", spread, str(len(losses)), f"{ffn_time(arm, ratio):.2f}", against])
    return table


def baseline(groups: dict[str, list[dict]], arm: Arm) -> list[float]:
    """Losses of the dense runs of width 1 and of the arm's activation."""
    dense = {name: parse(name) for name in groups if not parse(name).sparse}
    fitting = [name for name, other in dense.items() if other.activation == arm.activation and other.wide == 1]
    return [run["mean"] for name in fitting for run in groups[name]]


def smooth(curve: list, window: int = 5) -> tuple[list[float], list[float]]:
    """Steps and losses, each the mean of its neighbours."""
    steps, losses = zip(*curve, strict=True)
    near = [losses[max(0, i - window) : i + window + 1] for i in range(len(losses))]
    return list(steps), [mean(part) for part in near]


def draw(groups: dict[str, list[dict]], ratio: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, facecolor="white")
    for group, runs in groups.items():
        arm, (steps, losses) = parse(group), smooth(runs[0]["curve"])
        sparse_until = (1 - arm.dense) * runs[0]["steps"] if arm.sparse else 0
        times = [
            arm.wide * (min(s, sparse_until) / ratio + max(0.0, s - sparse_until)) / runs[0]["steps"] for s in steps
        ]
        for axis, x in zip(axes, (steps, times), strict=True):
            axis.plot(x, losses, label=group, linewidth=1.2)
    late = [loss for runs in groups.values() for loss in smooth(runs[0]["curve"])[1][len(runs[0]["curve"]) // 4 :]]
    axes[0].set(xlabel="optimizer steps", ylabel="training loss", ylim=(min(late) - 0.02, max(late)))
    axes[1].set(xlabel=f"time of the feed-forward layers, 2:4 at {ratio:g}x (dense = 1)")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time-ratio", type=float, default=1.54, help="speed of a 2:4 layer over a dense one")
    args = parser.parse_args()
    groups = read()
    header = ["arm", "validation loss", "spread", "seeds", "time of its FFNs", "against dense"]
    table = markdown(header, rows(groups, args.time_ratio))
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table + MARKS[1] + rest.partition(MARKS[1])[2])
    draw(groups, args.time_ratio)
    print(table)


if __name__ == "__main__":
    main()
