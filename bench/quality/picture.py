"""Pictures of the study: quality.png, fp8.png, time-to-loss.png. What is drawn comes from `report`."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from bench.quality import compare, seconds
from bench.quality.arms import Arm, parse, text_of

MOST_DRAWN = 7  # arms with a line of their own: more lines hide one another


def smooth(curve: list, window: int = 5) -> tuple[list[float], list[float]]:
    """Steps and losses, each the mean of its neighbours."""
    steps, losses = zip(*curve, strict=True)
    near = [losses[max(0, i - window) : i + window + 1] for i in range(len(losses))]
    return list(steps), [mean(part) for part in near]


def drawn(groups: dict[str, list[dict]], ratios: compare.Ratios) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The main arms, those with most seeds first and then by loss; and what is left, for a point each.

    Arms that have a time, at the best of their learning rates, of the family that most of the study is about.
    """
    timed = {
        group: runs
        for group, runs in compare.at_best_rate(groups).items()
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
        bases = {compare.batches_of(run): run for run in groups[base] if run["curve"]}
        for run in (run for run in runs if compare.batches_of(run) in bases):
            (steps, ours), (_, theirs) = smooth(run["curve"]), smooth(bases[compare.batches_of(run)]["curve"])
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


def draw_seconds(path: Path, tables: list[tuple[str, dict[str, list[dict]]]]) -> None:
    """Loss against measured seconds, a row for each (title, arms): of training, and of validation with the target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(tables), 2, figsize=(10, 3.8 * len(tables)), facecolor="white", squeeze=False, layout="constrained"
    )
    colors = plt.get_cmap("tab10").colors
    for (title, groups), (trained, validated) in zip(tables, axes, strict=True):
        late = []
        for i, (group, runs) in enumerate(groups.items()):
            look = dict(color=colors[i % len(colors)], linewidth=1.2, label=words(parse(group)))
            steps, losses = smooth(runs[0]["curve"], len(runs[0]["curve"]) // 20)
            late += losses[len(losses) // 4 :]
            trained.plot([seconds.seconds_at(runs[0], step) for step in steps], losses, **look)
            at, losses = zip(*runs[0]["valid_curve"], strict=True)
            validated.plot([seconds.seconds_at(runs[0], step) for step in at], losses, marker=".", **look)
        seed = next(iter(groups.values()))[0]["seed"]
        validated.axhline(seconds.targets(groups)[seed][0], color="black", linewidth=0.8, linestyle="--")
        trained.set(ylim=(min(late) - 0.02, max(late) + 0.02), ylabel="training loss", title=title)
        validated.set(ylabel="validation loss", title="from 0.6 of the steps on, and the target")
        validated.legend(fontsize=7)
    for panel in axes.flat:
        panel.set(xlabel="seconds of training steps")
    figure.savefig(path, dpi=120)
    plt.close(figure)
