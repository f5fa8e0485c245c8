"""Results of the study as a page and pictures: bench/results/quality/*.json -> docs/results/quality.md, quality.png.

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
from bench.quality import picture
from bench.quality.arms import parse
from bench.quality.compare import (
    MAIN,
    Groups,
    Ratios,
    best_dense,
    difference,
    families,
    ffn_time,
    in_16_bits,
    loss,
    loss_targets,
    measured_ratios,
    of_family,
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
MARKS = ("<!-- results of the study -->\n", "<!-- end of results -->")
OTHER_MARKS = ("<!-- results of other families -->\n", "<!-- end of other families -->")
LOSS_MARKS = ("<!-- time to a loss -->\n", "<!-- end of time to a loss -->")
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


def title(family: tuple) -> str:
    """What arms of a family have in common, as a heading."""
    activation, size, tokens, optimizer = family
    other = [WORDS.get(value, f"{value} tokens a step") for value in (size, tokens, optimizer) if value not in MAIN]
    return ", ".join([WORDS[activation], *other])


def study_table(groups: Groups, ratios: Ratios) -> str:
    header = ["arm", "validation loss", "spread", "seeds", "time of its FFNs", "against dense", "paired t (df)"]
    return markdown(header, rows(groups, ratios))


def other_tables(groups: Groups, ratios: Ratios) -> str:
    """A heading and a table for each family but that which most of the study is about."""
    parts = [
        f"### {title(family)}\n\n{study_table(of_family(groups, family), ratios)}"
        for family in families(groups)
        if family != MAIN
    ]
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
    parts = []
    for family in families(groups):
        own = of_family(groups, family)
        if table := loss_rows(own, ratios):
            heading = "" if family == MAIN else f"### {title(family)}: time to a loss\n\n"
            parts.append(heading + markdown(["arm", *(f"to the last loss of {t}" for t in loss_targets(own))], table))
    return "\n".join(parts) or NOT_RUN


def precision_rows(groups: Groups) -> list[list[str]]:
    """A row an 8-bit arm, against the same one in 16 bits."""
    table = []
    for group, runs in sorted(groups.items()):
        if base := in_16_bits(group, groups):
            seeds = {run["seed"] for run in runs} & {run["seed"] for run in groups[base]}
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
    tables = {
        MARKS: study_table(of_family(groups, MAIN), ratios), OTHER_MARKS: other_tables(groups, ratios),
        LOSS_MARKS: loss_tables(groups, ratios), FLOAT8_MARKS: float8_table(float8),
    }  # fmt: skip
    page = PAGE.read_text()
    for marks, table in tables.items():
        page = fill(page, marks, table)
    PAGE.write_text(page)
    picture.draw(PICTURE, groups, ratios)
    picture.draw_float8(FLOAT8_PICTURE, float8)
    print(*tables.values(), sep="\n")


if __name__ == "__main__":
    main()
