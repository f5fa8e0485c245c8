"""loss.png and flip_rate.png, from the rows of metrics.csv."""

from __future__ import annotations

import math
from pathlib import Path

from .metrics import Row

COLOURS = {"dense": "#4C72B0", "sparse": "#DD8452", "half": "#55A868"}
NAMES = {"dense": "dense", "sparse": "2:4 sparse", "half": "dense, half-width FFN"}


def new_axes(title: str, x_label: str, y_label: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=140, layout="constrained")  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def by_arm(rows: list[Row]) -> dict[str, list[Row]]:
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row["arm"], []).append(row)
    return arms


def points(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    have = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    return [step for step, _ in have], [value for _, value in have]


def searches(rows: list[Row]) -> list[Row]:
    """The rows after whose step masks were searched and compared with those before."""
    return [r for r in rows if r["step"] and r["mask_age"] == 0 and r["flip_rate"] is not None]


def smooth(values: list[float], steps: float) -> list[float]:
    """Exponential mean over about `steps` values, without the bias of its start."""
    keep, total, weight, result = math.exp(-1 / max(steps, 1e-9)), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def mark_phases(axes, rows: list[Row]) -> None:
    """A line at each step where the sparse arm goes from one phase to the other."""
    own = [r for r in rows if r["arm"] == "sparse" and r["step"]]
    for before, after in zip(own, own[1:], strict=False):
        if before["phase"] != after["phase"]:
            axes.axvline(before["step"], color="0.35", linewidth=1, linestyle=":", zorder=1)
            where = dict(xycoords=("data", "axes fraction"), xytext=(4, -4), textcoords="offset points", va="top")
            axes.annotate(f"{after['phase']} phase", (before["step"], 1), **where, fontsize=8, color="0.35")


def plot_loss(rows: list[Row], path: Path, title: str) -> None:
    """Training loss (thin, smoothed over it) and validation loss (marked) of every arm."""
    figure, axes = new_axes(f"{title}: loss", "optimizer step", "cross-entropy (nats per token)")
    seen: list[float] = []
    for arm, own in by_arm(rows).items():
        colour = COLOURS[arm]
        steps, loss = points(own, "loss")
        smoothed = smooth(loss, len(loss) / 50)
        axes.plot(steps, loss, color=colour, alpha=0.22, linewidth=0.7)
        axes.plot(steps, smoothed, color=colour, linewidth=1.2, label=f"{NAMES[arm]}, training")
        at, valid = points(own, "valid_loss")
        axes.plot(at, valid, color=colour, linestyle="--", marker="o", markersize=4, linewidth=1,
                  markeredgecolor="white", markeredgewidth=0.6, label=f"{NAMES[arm]}, validation")  # fmt: skip
        seen += smoothed[len(smoothed) // 20 :] + valid[1:]
    if seen:  # the first steps would press everything else together
        low, high = min(seen), max(seen)
        axes.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
    mark_phases(axes, rows)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def plot_flip_rate(rows: list[Row], path: Path, title: str, mask_interval: int) -> None:
    """Flip rate at each mask search; of a dense arm, whose masks are only probed, too."""
    figure, axes = new_axes(
        f"{title}: flip rate", "optimizer step", f"part of the mask changed per search (every {mask_interval} steps)"
    )
    for arm, own in by_arm(rows).items():
        steps, rates = points(searches(own), "flip_rate")
        label = NAMES[arm] if arm == "sparse" else f"{NAMES[arm]} (probed)"
        axes.plot(steps, rates, color=COLOURS[arm], marker="o", markersize=3, linewidth=1.3, label=label)
    axes.set_ylim(bottom=0)
    mark_phases(axes, rows)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)
