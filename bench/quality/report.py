"""Results of the study as a page and pictures: bench/results/quality/*.json -> docs/results/quality.md, quality.png.

Results of arms that had a GPU for themselves make a section of seconds, and time-to-loss.png (seconds.py).

Arms of bench/results/quality/fp8 are compared with the same arm in 16 bits, seed by seed: a table of their own, and
fp8.png. Seeds 0 and 1 of them were trained on another text, so their twins in 16 bits lie beside them.

    python -m bench.quality.report [--ratio "gated=1.54" ...]

How much faster than dense 2:4 layers are (a kind of compare.py and its ratio) is what bench/results/equal_time.csv has,
or what is given. What times and differences are stands in compare.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import stdev

from bench.measured import markdown
from bench.quality import picture, seconds
from bench.quality.arms import parse
from bench.quality.compare import (
    MAIN,
    Groups,
    Ratios,
    batches_of,
    best_dense,
    comparable,
    difference,
    ffn_time,
    in_16_bits,
    loss,
    loss_targets,
    measured_ratios,
    paired_t,
    read,
    time_to,
    with_twins,
)

ROOT = Path(__file__).parent.parent.parent
RESULTS, PAGE, PICTURE = (
    ROOT / p for p in ("bench/results/quality", "docs/results/quality.md", "docs/results/quality.png")
)
FLOAT8, FLOAT8_PICTURE = RESULTS / "fp8", PICTURE.with_name("fp8.png")
SECONDS_PICTURE = PICTURE.with_name("time-to-loss.png")
MARKS = ("<!-- results of the study -->\n", "<!-- end of results -->")
OTHER_MARKS = ("<!-- results of other families -->\n", "<!-- end of other families -->")
LOSS_MARKS = ("<!-- time to a loss -->\n", "<!-- end of time to a loss -->")
SECONDS_MARKS = ("<!-- time to loss, measured -->\n", "<!-- end of time to loss, measured -->")
FLOAT8_MARKS = ("<!-- results in 8 bits -->\n", "<!-- end of results in 8 bits -->")
NOT_RUN = "Not run yet.\n"
WORDS = {
    "relu2": "squared ReLU", "gelu": "GELU", "swiglu": "SwiGLU", "60m": "64 million parameters",
    "350m": "352 million parameters", "muon": "Muon",
}  # fmt: skip


def rows(groups: Groups, ratios: Ratios) -> list[list[str]]:
    """A row an arm, the lowest loss first."""
    table = []
    for group, runs in sorted(groups.items(), key=lambda item: loss(item[1])):
        arm, base = parse(group), best_dense(groups, parse(group))
        spread = f"± {stdev(run['mean'] for run in runs):.4f}" if len(runs) > 1 else "one seed"
        time = ffn_time(arm, ratios)
        against = "-" if base is None else "0" if base == group else difference(runs, groups[base])
        t = "-" if base in (None, group) else paired_t(runs, groups[base])
        shown = "-" if time is None else f"{time:.2f}"
        table.append([group, f"{loss(runs):.4f}", spread, str(len(runs)), shown, against, t])
    return table


def title(key: tuple, usual: tuple = ()) -> str:
    """What arms of (family, text, tokens, ...) share, as a heading; text or tokens where these are not `usual`."""
    (activation, *of_arms), text, tokens, *_ = key
    other = [WORDS.get(value, f"{value} tokens a step") for value in of_arms if value not in MAIN]
    if usual and millions(tokens) != millions(usual[2]):
        other.append(f"{millions(tokens)} million tokens")
    elif usual and text != usual[1]:
        other.append(f"text {text}")
    return ", ".join([WORDS[activation], *other])


def millions(tokens: int | None) -> int:
    return round((tokens or 0) / 1e6)


def main_and_others(groups: Groups) -> tuple[Groups, list[tuple[str, Groups]]]:
    """The arms that most of the study is about, and (heading, arms) of each other family, text and number of tokens."""
    every = comparable(groups)
    main = every[0][1] if every and every[0][0][0] == MAIN else {}
    usual = every[0][0] if main else ()
    return main, [(title(key, usual), arms) for key, arms in every[1 if main else 0 :]]


def study_table(groups: Groups, ratios: Ratios) -> str:
    header = ["arm", "validation loss", "spread", "seeds", "time of its FFNs", "against dense", "paired t (df)"]
    return markdown(header, rows(groups, ratios))


def other_tables(groups: Groups, ratios: Ratios) -> str:
    """A heading and a table for each family but that which most of the study is about."""
    parts = [f"### {heading}\n\n{study_table(arms, ratios)}" for heading, arms in main_and_others(groups)[1]]
    return "\n".join(parts) or NOT_RUN


def loss_rows(groups: Groups, ratios: Ratios) -> list[list[str]]:
    """A row an arm of one family whose validation curves were kept: the time to each of `loss_targets`."""
    targets = loss_targets(groups)
    table = [
        [group, *(time_to(runs, groups[target], ratios) for target in targets)]
        for group, runs in sorted(groups.items(), key=lambda item: loss(item[1]))
    ]
    return [row for row in table if set(row[1:]) - {"-"}]


def loss_tables(groups: Groups, ratios: Ratios) -> str:
    main, others = main_and_others(groups)
    parts = []
    for heading, own in [("", main), *((f"### {words}: time to a loss\n\n", arms) for words, arms in others)]:
        if own and (table := loss_rows(own, ratios)):
            parts.append(heading + markdown(["arm", *(f"to the last loss of {t}" for t in loss_targets(own))], table))
    return "\n".join(parts) or NOT_RUN


SECONDS_TEXT = """## Time to loss, measured

Seconds of training, of arms that each had the GPU for themselves: an arm's steps, each at the median time that its own
steps took. Compiling and validation are not in it. The target is the highest last loss among the arms of a table, each
at the best of its learning rates: a loss that all of them reach. An arm's time to it lies on the line between two
validations; one that is there at the first of them has "at most" its time. `of dense` is against dense layers of width
1 in 16 bits.

Read the time to the target with care. Validation begins at 0.6 of a run, and learning rates fall along a cosine until
the end of each arm's own run. The arm that sets the target meets it at the end of its schedule. One that meets it in
the middle of its run has a higher rate there, and a schedule that ended there would have brought it lower. Two losses,
one of the middle and one of an end, are not of the same kind: times of the better arms are rather too long than too
short. The last loss and the time of the whole training, in the same rows, are both taken at an end.
"""


def seconds_section(tables: list[tuple[tuple, Groups]]) -> str:
    """A section of its own, or nothing where no arms had a GPU for themselves."""
    parts = [
        f"### {title(key)}: measured\n\n{seconds.in_sentences(arms, seconds.Conditions(*key[1:]))}\n"
        + markdown(seconds.HEADER, seconds.rows(arms))
        for key, arms in tables
    ]
    shown = f"![loss against measured seconds]({SECONDS_PICTURE.name})\n"
    return "\n".join([SECONDS_TEXT, *parts, shown]) if parts else ""


def precision_rows(groups: Groups) -> list[list[str]]:
    """A row an 8-bit arm, against the same one in 16 bits."""
    table = []
    for group, runs in sorted(groups.items()):
        if base := in_16_bits(group, groups):
            seeds = {batches_of(run) for run in runs} & {batches_of(run) for run in groups[base]}
            losses = [f"{loss(each):.4f}" for each in (runs, groups[base])]
            compared = [difference(runs, groups[base]), paired_t(runs, groups[base])]
            table.append([group, *losses, str(len(seeds)), *compared])
    return table


def float8_table(groups: Groups) -> str:
    header = ["arm", "validation loss", "of the same in 16 bits", "seeds", "against 16 bits", "paired t (df)"]
    return markdown(header, precision_rows(groups))


def fill(page: str, marks: tuple[str, str], table: str) -> str:
    """The page with what stands between the marks replaced."""
    before, _, rest = page.partition(marks[0])
    return before + marks[0] + table + marks[1] + rest.partition(marks[1])[2]


def given_ratio(text: str) -> tuple[str, float]:
    kind, _, ratio = text.rpartition("=")
    return kind, float(ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", action="append", default=[], type=given_ratio, help="KIND=SPEED over a dense layer")
    ratios = measured_ratios() | dict(parser.parse_args().ratio)
    groups = read(RESULTS)
    float8 = with_twins(read(FLOAT8), groups)
    main_groups, in_seconds = main_and_others(groups)[0], seconds.tables(groups)
    tables = {
        MARKS: study_table(main_groups, ratios), OTHER_MARKS: other_tables(groups, ratios),
        LOSS_MARKS: loss_tables(groups, ratios), SECONDS_MARKS: seconds_section(in_seconds),
        FLOAT8_MARKS: float8_table(float8),
    }  # fmt: skip
    page = PAGE.read_text()
    for marks, table in tables.items():
        page = fill(page, marks, table)
    PAGE.write_text(page)
    picture.draw(PICTURE, main_groups, ratios)
    if in_seconds:
        picture.draw_seconds(SECONDS_PICTURE, [(title(key), arms) for key, arms in in_seconds])
    picture.draw_float8(FLOAT8_PICTURE, float8)
    print(*tables.values(), sep="\n")


if __name__ == "__main__":
    main()
