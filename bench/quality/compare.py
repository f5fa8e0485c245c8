"""Arms of the study against one another: paired differences, time of feed-forward layers, time to a loss.

Time is that of the feed-forward layers: a dense step of width 1 takes 1, a dense one of width w takes w, a 2:4 one
w / ratio, the speed over dense that bench_equal_time has for a layer of real size. An arm whose ratio is not known has
no time.

Differences are paired: an arm's loss less that of its base with the same seed on the same text, which begins with the
same weights and sees the same batches; the mean over the seeds that both have, and its standard error. A table has arms
that share a family (arms.py), a text and the number of its tokens.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from bench import measured
from bench.quality.arms import Arm, parse

Runs = list[dict]
Groups = dict[str, Runs]
#: what a layer is called in KINDS -> how many times as fast as dense it is
Ratios = dict[str, float | None]

MAIN = parse("relu2 dense").family
PLAIN_LAYER, GATED_LAYER = "4096 x 16384", "llama-8B"  # of bench_equal_time
#: 2:4 layers -> layer and side of bench_equal_time that have their time
KINDS = {
    "plain": (PLAIN_LAYER, "2:4"),
    "plain mvue=False": (PLAIN_LAYER, "2:4 mvue=False"),
    "plain activation": (f"{PLAIN_LAYER} relu2", "2:4 activation"),
    "plain activation fp8": (f"{PLAIN_LAYER} relu2", "fp8 2:4 activation"),
    "plain dense fp8": (f"{PLAIN_LAYER} relu2", "FP8 dense tensorwise"),
    "plain fp8": (PLAIN_LAYER, "fp8"),
    "plain fp8-hybrid": (PLAIN_LAYER, "fp8-hybrid"),
    "gated": (GATED_LAYER, "2:4"),
    "gated mvue=False": (GATED_LAYER, "2:4 mvue=False"),
    "gated fp8": (GATED_LAYER, "fp8"),
    "gated fp8-hybrid": (GATED_LAYER, "fp8-hybrid"),
    "350m plain": ("2048 x 8192 relu2", "2:4"),
    "350m plain activation": ("2048 x 8192 relu2", "2:4 activation"),
    "350m plain activation fp8": ("2048 x 8192 relu2", "fp8 2:4 activation"),
    "350m plain dense fp8": ("2048 x 8192 relu2", "FP8 dense tensorwise"),
}
#: sizes whose own layers were measured: an arm of another kind of layer has no time
MEASURED_SIZES = ("350m",)
FEWEST_FOR_T = 3  # pairs; two have one degree of freedom


def read(folder: Path) -> Groups:
    """Runs by what their arms are called without a seed, in the one spelling of it."""
    groups = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        groups[parse(run["arm"]).group].append(run)
    return dict(groups)


def measured_ratio(layer: str, side: str) -> float | None:
    """How many times as fast as dense a layer of bench/results/equal_time.csv is; None where it has no such row."""
    for row in measured.read("equal_time"):
        if (row["layer"], row["side"], float(row["width"])) == (layer, side, 1.0):
            return round(1 / float(row["of dense"]), 2)
    return None


def measured_ratios() -> Ratios:
    return {kind: measured_ratio(*where) for kind, where in KINDS.items()}


def ratio_of(arm: Arm, ratios: Ratios) -> float | None:
    """How much faster than dense ones of 16 bits the layers of an arm are, of a 2:4 one while they are sparse."""
    if arm.is_dense_16_bit:
        return 1.0
    size = arm.size if arm.size in MEASURED_SIZES else ""
    layers = "" if arm.layers == "weight" else arm.layers
    method = "method=mvue" if arm.method == "mvue" else "mvue=False" if arm.mvue == "False" else ""
    kind = (size, "gated" if arm.gated else "plain", layers, arm.precision, method if arm.has_recipe else "")
    return ratios.get(" ".join(filter(None, kind)))


def spent(arm: Arm, step: float, steps: int, ratios: Ratios) -> float | None:
    """Time of the first `step` of an arm's `steps`, with that of all of dense ones of width 1 as 1."""
    ratio = ratio_of(arm, ratios)
    if ratio is None:
        return None
    fast = min(step, (1 - arm.dense) * steps) if arm.has_recipe else step
    return arm.wide * (fast / ratio + step - fast) / steps


def ffn_time(arm: Arm, ratios: Ratios) -> float | None:
    """Time of all steps of an arm."""
    return spent(arm, 1, 1, ratios)


def loss(runs: Runs) -> float:
    return mean(run["mean"] for run in runs)


def batches_of(run: dict) -> tuple:
    """Runs that have this in common saw the same batches."""
    return run["seed"], run.get("text"), run.get("tokens")


def percents(runs: Runs, base: Runs) -> list[float]:
    """By how much the loss of `runs` is above that of `base`, seed by seed."""
    bases = {batches_of(run): run["mean"] for run in base}
    return [100 * (run["mean"] / bases[batches_of(run)] - 1) for run in runs if batches_of(run) in bases]


def with_error(values: list[float], form: str) -> str:
    """Their mean and, of several, its standard error."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.2f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{error}"


def difference(runs: Runs, base: Runs) -> str:
    values = percents(runs, base)
    return f"{with_error(values, '+.2f')} %" if values else "-"


def paired_t(runs: Runs, base: Runs) -> str:
    """The mean difference over its standard error, with the degrees of freedom; of three pairs and more."""
    values = percents(runs, base)
    if len(values) < FEWEST_FOR_T or stdev(values) == 0:
        return "-"
    return f"{mean(values) / (stdev(values) / math.sqrt(len(values))):+.1f} ({len(values) - 1})"


def text_and_tokens(run: dict) -> tuple:
    return run.get("text"), run.get("tokens")


def comparable(groups: Groups, shared=text_and_tokens) -> list[tuple[tuple, Groups]]:
    """((family, *shared), its arms): runs that have the family and what `shared` gives of them in common.

    What most of the study is about comes first, and of a family what has most runs.
    """
    found: dict[tuple, Groups] = defaultdict(lambda: defaultdict(list))
    for group, runs in groups.items():
        for run in runs:
            found[(parse(group).family, *shared(run))][group].append(run)
    most = {key: sum(map(len, arms.values())) for key, arms in found.items()}
    order = sorted(found, key=lambda key: (key[0] != MAIN, key[0], -most[key], str(key)))
    return [(key, dict(found[key])) for key in order]


def at_best_rate(groups: Groups) -> Groups:
    """The arms without those that another learning rate makes better: a rate too high says nothing of a method."""
    best: dict[Arm, str] = {}
    for group in sorted(groups, key=lambda name: loss(groups[name])):
        best.setdefault(replace(parse(group), name="", lr=0.0), group)
    return {group: runs for group, runs in groups.items() if group in best.values()}


def best_dense(groups: Groups, arm: Arm) -> str | None:
    """The dense arm of width 1 of the arm's family at the best rate, of those with two or more seeds if any."""
    arms = {name: parse(name) for name in groups}
    fitting = [n for n, a in arms.items() if a.is_dense_16_bit and a.family == arm.family and a.wide == 1]
    return min(fitting, key=lambda name: (len(groups[name]) < 2, loss(groups[name])), default=None)


def in_16_bits(group: str, groups: Groups) -> str | None:
    """The arm that differs from an 8-bit one in its precision alone; None for others, and where it was not run."""
    arm = parse(group)
    twin = replace(arm, precision="").group
    return twin if arm.precision and twin in groups else None


def with_twins(float8: Groups, groups: Groups) -> Groups:
    """8-bit arms and those they are compared with: what lies beside them, and the study's runs of other seeds."""
    twins = {replace(parse(group), precision="").group for group in float8}
    for twin in twins & groups.keys():
        there = {batches_of(run) for run in float8.get(twin, [])}
        float8 = float8 | {twin: float8.get(twin, []) + [run for run in groups[twin] if batches_of(run) not in there]}
    return float8


# -- time to a loss ---------------------------------------------------------------------------------------------------


def first_step(run: dict, target: float) -> tuple[float, bool] | None:
    """When a run's validation loss first is at most `target`: on the line between two points of its curve.

    True beside it: the first point of the curve is that low already, and the step is an upper bound. None: never.
    """
    before = None
    for step, value in run["valid_curve"]:
        if value <= target:
            if before is None:
                return step, True
            from_step, from_value = before
            return from_step + (step - from_step) * (from_value - target) / (from_value - value), False
        before = step, value
    return None


def time_to(runs: Runs, targets: Runs, ratios: Ratios) -> str:
    """FFN time at which `runs` first reach the last loss of `targets` with the same seed; words where they do not."""
    last = {batches_of(run): run["mean"] for run in targets}
    pairs = [(parse(run["arm"]), run) for run in runs if run.get("valid_curve") and batches_of(run) in last]
    if not pairs or ffn_time(pairs[0][0], ratios) is None:
        return "-"
    reached = [(arm, run["steps"], *found) for arm, run in pairs if (found := first_step(run, last[batches_of(run)]))]
    if not reached:
        return "not reached"
    times = [spent(arm, step, steps, ratios) for arm, steps, step, _ in reached]
    at_most = "at most " if any(bound for *_, bound in reached) else ""
    of = f" ({len(reached)} of {len(pairs)} seeds)" if len(reached) < len(pairs) else ""
    return f"{at_most}{with_error(times, '.2f')}{of}"


def loss_targets(groups: Groups) -> list[str]:
    """Arms of one family whose last loss others are to reach: dense, and narrower ones, the widest first."""
    dense = [group for group in groups if parse(group).is_dense_16_bit and parse(group).wide < 1]
    base = best_dense(groups, parse(next(iter(groups))))
    return [*([base] if base else []), *sorted(dense, key=lambda group: -parse(group).wide)]
