"""Pictures of the study: quality.png and fp8.png. What is drawn comes from `report`, which has the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import mean

from bench.quality import compare
from bench.quality.arms import Arm, parse, text_of

MOST_DRAWN = 7  # arms with a line of their own: more lines hide one another


def smooth(curve: list, window: int = 5) -> tuple[list[float], list[float]]:
    """Steps and losses, each the mean of its neighbours."""
    steps, losses = zip(*curve, strict=True)
    near = [losses[max(0, i - window) : i + window + 1] for i in range(len(losses))]
    return list(steps), [mean(part) for part in near]


def at_best_rate(groups: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The arms without those that another learning rate makes better: a rate too high says nothing of a method."""
    best: dict[Arm, str] = {}
    for group in sorted(groups, key=lambda name: compare.loss(groups[name])):
        best.setdefault(replace(parse(group), name="", lr=0.0), group)
    return {group: runs for group, runs in groups.items() if group in best.values()}


def drawn(groups: dict[str, list[dict]], ratios: compare.Ratios) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The main arms, those with most seeds first and then by loss; and what is left, for a point each.

    Arms that have a time, at the best of their learning rates, of the family that most of the study is about.
    """
    timed = {
        group: runs
        for group, runs in at_best_rate(groups).items()
        if parse(group).family == compare.MAIN and compare.ffn_time(parse(group), ratios) is not None
    }
    order = sorted(timed, key=lambda group: (-len(timed[group]), compare.loss(timed[group])))
    main, others = order[:MOST_DRAWN], order[MOST_DRAWN:]
    return {group: timed[group] for group in main}, {group: timed[group] for group in others}


def words(arm: Arm) -> str:
    """What an arm of the main family is, without its rate, which is its best."""
    kind = {"dense": "dense", "weight": "2:4 weights", "activation": "2:4 activations"}[arm.layers]
    bits = f", {arm.precision}" if arm.precision else ""
    wide = "" if arm.wide == 1 else f", {text_of(arm.wide)} as wide"
    last = f", last {text_of(arm.dense)} dense" if arm.has_recipe else ""
    gradients = "" if not arm.has_recipe or arm.mvue == "h" else f", mvue={arm.mvue}"
    return f"{kind}{bits}{wide}{last}{gradients}"


def draw(path: Path, groups: dict[str, list[dict]], ratios: compare.Ratios) -> None:
    """Training loss against steps and against time, and what is left at the end against what it took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), facecolor="white")
    colors = plt.get_cmap("tab10").colors
    shown, others = drawn(groups, ratios)
    for i, (group, runs) in enumerate(shown.items()):
        arm = parse(group)
        look = dict(color=colors[i % len(colors)], label=words(arm))
        marker = "o" if arm.sparse else "s"
        axes[2].plot(compare.ffn_time(arm, ratios), compare.loss(runs), marker, markersize=7, **look)
        run = next((run for run in runs if run["curve"]), None)
        if run is None:
            continue
        steps, losses = smooth(run["curve"])
        axes[0].plot(steps, losses, linewidth=1.2, **look)
        axes[1].plot([compare.spent(arm, s, run["steps"], ratios) for s in steps], losses, linewidth=1.2, **look)
    for group, runs in others.items():
        arm = parse(group)
        marker = "o" if arm.sparse else "s"
        axes[2].plot(compare.ffn_time(arm, ratios), compare.loss(runs), marker, markersize=4, color="#bbbbbb")
    every = shown | others
    arms = {parse(group): runs for group, runs in every.items()}
    dense = sorted((arm.wide, compare.loss(runs)) for arm, runs in arms.items() if arm.is_dense_16_bit)
    axes[2].plot(*zip(*dense, strict=True), color="black", linewidth=0.8, linestyle="--", label="dense, by width")
    curves = [smooth(run["curve"])[1] for runs in shown.values() for run in runs[:1] if run["curve"]]
    late = [loss for losses in curves for loss in losses[len(losses) // 4 :]]
    for panel in axes[:2]:
        panel.set(ylim=(min(late) - 0.02, max(late)), ylabel="training loss")
    time = "time of the feed-forward layers (dense = 1)"
    axes[0].set(xlabel="optimizer steps")
    axes[1].set(xlabel=time)
    axes[2].set(xlabel=time, ylabel="validation loss at the end")
    axes[2].legend(fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_float8(path: Path, groups: dict[str, list[dict]]) -> None:
    """Training loss in 8 bits less that of the same seed in 16, on the same batches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5), facecolor="white")
    colors = {"fp8": "#223366", "fp8-hybrid": "#4477aa"}
    for group, runs in groups.items():
        if (base := compare.in_16_bits(group, groups)) is None:
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
    figure.savefig(path, dpi=120)
    plt.close(figure)
