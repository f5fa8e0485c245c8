"""Time to a loss in seconds, of arms that each had a GPU for themselves.

An arm's time is its steps, each at the median time of its phase, so without compiling, capturing and validation. Arms
of one table share activation, size, tokens of a step, optimizer, text, tokens, device, torch, and whether steps ran as
CUDA graphs. The target is the highest last loss among them, of each seed: what all of them reach.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import NamedTuple

from bench.quality import compare
from bench.quality.arms import parse
from bench.quality.compare import Groups, Runs


class Conditions(NamedTuple):
    text: str
    tokens: int
    device: str
    torch: str
    captured: bool


class Reached(NamedTuple):
    seconds: float
    bound: bool  # there at the first validation already


def conditions(run: dict) -> Conditions:
    by = run["made_by"]
    return Conditions(run["text"], run["tokens"], by["device"], by["torch"], run["captured"])


def is_timed(run: dict) -> bool:
    """Alone on a GPU; and a run that diverged reaches nothing."""
    measured = run.get("alone") and run.get("phases") and run["made_by"]["device"] != "CPU"
    return bool(measured and math.isfinite(run["mean"]))


def tables(groups: Groups) -> list[tuple[tuple, Groups]]:
    """((family, *conditions), arms at the best of their rates), where two arms and more were timed."""
    timed = {group: kept for group, runs in groups.items() if (kept := [run for run in runs if is_timed(run)])}
    found = [(key, compare.at_best_rate(arms)) for key, arms in compare.comparable(timed, conditions)]
    return [(key, arms) for key, arms in found if len(arms) > 1]


def seconds_at(run: dict, step: float) -> float:
    """What the first `step` of a run's steps took."""
    spent = 0.0
    for _, steps, ms in run["phases"]:
        spent += min(step, steps) * ms / 1e3
        step = max(0.0, step - steps)
    return spent


def whole(run: dict) -> float:
    return seconds_at(run, run["steps"])


def targets(groups: Groups) -> dict[int, tuple[float, str]]:
    """Seed -> the highest last loss, and whose it is."""
    highest: dict[int, tuple[float, str]] = {}
    for group, runs in groups.items():
        for run in runs:
            highest[run["seed"]] = max(highest.get(run["seed"], (0.0, "")), (run["mean"], group))
    return highest


def reached(runs: Runs, goals: dict[int, tuple[float, str]]) -> dict[int, Reached]:
    """Seed -> when its target was reached, which each run does, at its end if not before."""
    times = {}
    for run in runs:
        step, bound = compare.first_step(run, goals[run["seed"]][0])
        times[run["seed"]] = Reached(seconds_at(run, step), bound)
    return times


def in_words(value: str, at_most: bool, at_least: bool = False) -> str:
    if at_most and at_least:
        return "-"
    return f"{'at most ' if at_most else 'at least ' if at_least else ''}{value}"


def of_base(times: dict[int, Reached], base: dict[int, Reached]) -> str:
    """The mean over seeds that both have of one time over the other."""
    seeds = sorted(times.keys() & base.keys())
    if not seeds:
        return "-"
    ratio = mean(times[seed].seconds / base[seed].seconds for seed in seeds)
    return in_words(f"{ratio:.2f}", *(any(each[seed].bound for seed in seeds) for each in (times, base)))


HEADER = [
    "arm", "seeds", "time to the target, s", "of dense", "last loss", "whole training, s", "of dense", "ms a step",
]  # fmt: skip


def rows(groups: Groups) -> list[list[str]]:
    """A row an arm of one table, the shortest time to the target first."""
    goals, base = targets(groups), compare.best_dense(groups, parse(next(iter(groups))))
    times = {group: reached(runs, goals) for group, runs in groups.items()}
    ends = {group: {run["seed"]: Reached(whole(run), False) for run in runs} for group, runs in groups.items()}
    table = []
    for group in sorted(groups, key=lambda group: mean(time.seconds for time in times[group].values())):
        runs, own = groups[group], times[group].values()
        to_target = in_words(f"{mean(time.seconds for time in own):.0f}", any(time.bound for time in own))
        trained = mean(whole(run) for run in runs)
        step_ms = mean(1e3 * whole(run) / run["steps"] for run in runs)
        against = ["1" if group == base else of_base(each[group], each.get(base, {})) for each in (times, ends)]
        at_end = [f"{compare.loss(runs):.4f}", f"{trained:.0f}", against[1]]
        table.append([group, str(len(runs)), to_target, against[0], *at_end, f"{step_ms:.1f}"])
    return table


def in_sentences(groups: Groups, of: Conditions) -> str:
    """What the arms of a table share, and what they are to reach."""
    goals = targets(groups)
    of_seed = [
        f"{goal:.4f}, the last loss of {group}" + (f", with seed {seed}" if len(goals) > 1 else "")
        for seed, (goal, group) in sorted(goals.items())
    ]
    steps = "whole steps as CUDA graphs" if of.captured else "steps launched one by one"
    what = f"{of.device}, torch {of.torch}, {steps}, {of.tokens / 1e6:.0f} million tokens"
    return f"{what}.\nThe target: {'; '.join(of_seed)}.\n"
