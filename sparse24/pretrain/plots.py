"""loss.png and flip_rate.png, from the rows of metrics.csv."""

from __future__ import annotations

import math
from pathlib import Path

from ..convert.to_sparse_activations import ACTIVATION
from ..files import write_atomically
from .equal_time import SPARSE_KINDS, ffn_seconds, layer_time, training_seconds
from .metrics import Row
from .settings import Settings, kind_of

COLOURS = {
    "dense": "#4C72B0", "sparse": "#DD8452", "half": "#55A868", "narrow": "#8172B3", "wide": "#C44E52",
    ACTIVATION: "#937860",
}  # fmt: skip
NAMES = {
    "dense": "dense", "sparse": "2:4", "half": "dense, half as wide", "narrow": "dense, narrow", "wide": "2:4, wide",
    ACTIVATION: "2:4 activations, wide",
}  # fmt: skip


def colour_of(arm: str) -> str:
    return COLOURS[kind_of(arm)]


def name_of(arm: str) -> str:
    kind, _, rate = arm.partition("@")
    return f"{NAMES[kind]}, lr {rate}" if rate else NAMES[kind]


def new_figure(title: str, panels: int = 1):
    """A figure and its panels, beside one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: no global state, no window
    figure = Figure(figsize=(8 if panels == 1 else 6 * panels, 4.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    every = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axes in every:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def save_picture(figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


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


def mark_phases(axes, arms: dict[str, list[Row]]) -> None:
    """A line at each step where a 2:4 arm goes from one phase to the other; all of a run do so at the same one."""
    own = next((rows for arm, rows in arms.items() if kind_of(arm) in SPARSE_KINDS), [])
    own = [row for row in own if row["step"]]
    for before, after in zip(own, own[1:], strict=False):
        if before["phase"] != after["phase"]:
            axes.axvline(before["step"], color="0.35", linewidth=1, linestyle=":", zorder=1)
            where = dict(xycoords=("data", "axes fraction"), xytext=(4, -4), textcoords="offset points", va="top")
            axes.annotate(f"{after['phase']} phase", (before["step"], 1), **where, fontsize=8, color="0.35")


def loss_axes(arms: dict[str, list[Row]], s: Settings) -> list[tuple[str, dict[str, list[float]]]]:
    """What the loss is drawn against: (label, the place of each arm's rows). Time as measured on a GPU only."""
    axes = [("optimizer step", {arm: [row["step"] for row in rows] for arm, rows in arms.items()})]
    ffn = {arm: ffn_seconds(rows, s, kind_of(arm)) for arm, rows in arms.items()}
    axes.append((f"FFN time (s)\n{layer_time(s).source}", ffn))
    measured = {arm: training_seconds(rows) for arm, rows in arms.items()}
    if s.device.startswith("cuda") and all(measured.values()):
        axes.append(("training time on this GPU (s), without evaluation", measured))
    return axes


def plot_loss(rows: list[Row], path: Path, title: str, s: Settings) -> None:
    """Training loss (thin, smoothed over it) and validation loss (marked) of every arm, against steps and time."""
    arms = by_arm(rows)
    kinds = loss_axes(arms, s)
    figure, panels = new_figure(f"{title}: loss", len(kinds))
    for axes, (label, places) in zip(panels, kinds, strict=True):
        axes.set_xlabel(label)
        for arm, own in arms.items():
            draw_losses(axes, arm, own, places[arm])
    panels[0].set_ylabel("cross-entropy (nats per token)")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    limit_losses(panels[0], arms)
    mark_phases(panels[0], arms)
    if arms:
        panels[0].legend(frameon=False, fontsize=9)
    save_picture(figure, path)


def draw_losses(axes, arm: str, rows: list[Row], places: list[float]) -> None:
    colour = colour_of(arm)
    have = [(x, row["loss"]) for x, row in zip(places, rows, strict=True) if row["loss"] is not None]
    x, loss = [x for x, _ in have], [loss for _, loss in have]
    axes.plot(x, loss, color=colour, alpha=0.22, linewidth=0.7)
    axes.plot(x, smooth(loss, len(loss) / 50), color=colour, linewidth=1.2, label=f"{name_of(arm)}, training")
    valid = [(x, row["valid_loss"]) for x, row in zip(places, rows, strict=True) if row["valid_loss"] is not None]
    dots = dict(marker="o", markersize=4, markeredgecolor="white", markeredgewidth=0.6, linestyle="--", linewidth=1)
    x, loss = [x for x, _ in valid], [loss for _, loss in valid]
    axes.plot(x, loss, color=colour, label=f"{name_of(arm)}, validation", **dots)


def limit_losses(axes, arms: dict[str, list[Row]]) -> None:
    """The first steps would press everything else together."""
    seen: list[float] = []
    for own in arms.values():
        loss = smooth(points(own, "loss")[1], len(own) / 50)
        seen += loss[len(loss) // 20 :] + points(own, "valid_loss")[1][1:]
    if seen:
        low, high = min(seen), max(seen)
        axes.set_ylim(low - 0.05 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))


def plot_flip_rate(rows: list[Row], path: Path, title: str, mask_interval: int) -> None:
    """Flip rate at each mask search; of a dense arm, whose masks a probe watches, too."""
    figure, (axes,) = new_figure(f"{title}: flip rate")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"part of the mask changed per search (every {mask_interval} steps)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    arms = by_arm(rows)
    for arm, own in arms.items():
        steps, rates = points(searches(own), "flip_rate")
        label = name_of(arm) if kind_of(arm) in SPARSE_KINDS else f"{name_of(arm)} (probed)"
        axes.plot(steps, rates, color=colour_of(arm), marker="o", markersize=3, linewidth=1.3, label=label)
    axes.set_ylim(bottom=0)
    mark_phases(axes, arms)
    if arms:
        axes.legend(frameon=False, fontsize=9)
    save_picture(figure, path)
