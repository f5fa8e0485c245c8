"""Time to a loss in seconds: which results count, where a loss is met, and the section and picture of it."""

import json
import sys

import pytest

from bench.quality import compare, picture, report, seconds
from bench.quality.arms import parse

DENSE, FP8 = "relu2 dense lr=1e-3 size=350m", "relu2 dense lr=1e-3 precision=fp8 size=350m"
SPARSE = "relu2 2:4 wide=1.25 lr=1e-3 size=350m operand=activation"
WEIGHTS = "relu2 2:4 dense=0.5 lr=1e-3 size=350m"


def run(group, *losses, ms=100.0, seed=0, device="NVIDIA H200", **other):
    """1000 steps with these losses after 600, 800 and 1000 of them."""
    return {
        "arm": f"{group} seed={seed}", "seed": seed, "steps": 1000, "tokens": 64_000_000, "text": "aa",
        "mean": losses[-1], "valid_curve": [[600, losses[0]], [800, losses[1]], [1000, losses[2]]],
        "curve": [[0, 9.0], [500, 4.0], [900, 3.0]], "phases": [["dense", 1000, ms]], "alone": True, "captured": True,
        "made_by": {"device": device, "torch": "2.11.0"},
    } | other  # fmt: skip


def grouped(*runs):
    groups = {}
    for each in runs:
        groups.setdefault(parse(each["arm"]).group, []).append(each)
    return groups


def rows_of(*runs):
    ((_, arms),) = seconds.tables(grouped(*runs))
    return {row[0]: row[1:] for row in seconds.rows(arms)}


def test_time_to_the_highest_last_loss_is_steps_times_the_arms_own_step_time():
    """FP8 ends highest, at 2.8: dense is there after 900 of its steps of 100 ms, 2:4 after 800 of its of 80 ms."""
    rows = rows_of(
        run(DENSE, 3.4, 3.0, 2.6), run(FP8, 3.5, 3.2, 2.8, ms=95.0), run(SPARSE, 3.3, 2.8, 2.5, ms=80.0)
    )  # fmt: skip
    assert rows == {
        SPARSE: ["1", "64", "0.71", "2.5000", "80", "0.80", "80.0"],
        DENSE: ["1", "90", "1", "2.6000", "100", "1", "100.0"],
        FP8: ["1", "95", "1.06", "2.8000", "95", "0.95", "95.0"],
    }
    assert list(rows) == [SPARSE, DENSE, FP8]


def test_an_arm_that_is_below_the_target_when_validation_begins_has_a_bound():
    rows = rows_of(run(DENSE, 3.4, 3.2, 3.0), run(SPARSE, 2.9, 2.8, 2.5, ms=80.0))
    assert rows[SPARSE][1:3] == ["at most 48", "at most 0.48"] and rows[DENSE][1:3] == ["100", "1"]
    rows = rows_of(run(DENSE, 2.9, 2.8, 2.5), run(SPARSE, 3.4, 3.2, 3.0, ms=80.0), run(FP8, 2.9, 2.9, 2.9))
    assert rows[SPARSE][1:3] == ["80", "at least 1.33"] and rows[FP8][1:3] == ["at most 60", "-"]


def test_a_dense_phase_takes_its_own_time():
    weights = run(WEIGHTS, 3.4, 3.0, 2.6, phases=[["sparse", 500, 60.0], ["dense", 500, 100.0]])
    rows = rows_of(run(DENSE, 3.4, 3.2, 2.8), weights)
    assert rows[WEIGHTS] == ["1", "70", "0.70", "2.6000", "80", "0.80", "80.0"]  # 900 steps: 500 at 60, 400 at 100
    assert seconds.seconds_at(weights, 250) == 15.0


def test_each_seed_has_its_own_target_and_ratios_are_of_equal_seeds():
    rows = rows_of(
        run(DENSE, 3.4, 3.0, 2.6), run(DENSE, 4.4, 4.0, 3.6, seed=1),
        run(SPARSE, 3.4, 3.0, 2.8, ms=50.0), run(SPARSE, 4.4, 3.6, 3.5, ms=50.0, seed=1),
    )  # fmt: skip
    # dense after 900 and 1000 steps of 100 ms, 2:4 after 1000 and 800 of 50
    assert rows[DENSE][:3] == ["2", "95", "1"] and rows[SPARSE][:3] == ["2", "45", f"{(50 / 90 + 40 / 100) / 2:.2f}"]
    ((key, arms),) = seconds.tables(grouped(run(DENSE, 3, 3, 2), run(SPARSE, 3, 3, 1), run(DENSE, 3, 3, 2.5, seed=1)))
    said = seconds.in_sentences(arms, seconds.Conditions(*key[1:]))
    assert f"2.0000, the last loss of {DENSE}, with seed 0; 2.5000, the last loss of {DENSE}, with seed 1" in said
    assert said.startswith("NVIDIA H200, torch 2.11.0, whole steps as CUDA graphs, 64 million tokens.\nThe target: ")


def test_only_arms_that_were_alone_on_a_gpu_and_share_their_conditions_are_compared():
    dense, others = run(DENSE, 3.4, 3.2, 3.0), [
        run(SPARSE, 3, 3, 2, alone=False), run(SPARSE, 3, 3, 2, device="CPU"), run(SPARSE, 3, 3, 2, text="bb"),
        run(SPARSE, 3, 3, 2, tokens=1), run(SPARSE, 3, 3, 2, captured=False),
        run(SPARSE, 3, 3, 2, device="NVIDIA H100"), run(SPARSE.replace("350m", "60m"), 3, 3, 2),
    ]  # fmt: skip
    for other in others:
        assert seconds.tables(grouped(dense, other)) == []
    assert seconds.tables(grouped(dense, run(SPARSE, 3, 3, float("nan")))) == []
    old = {key: value for key, value in others[0].items() if key not in ("alone", "phases")}
    assert seconds.tables(grouped(dense, old)) == []
    assert len(seconds.tables(grouped(dense, *others, run(FP8, 3, 3, 2)))) == 1


def test_a_rate_that_is_too_high_sets_no_target():
    rows = rows_of(
        run(DENSE, 3.4, 3.2, 3.0), run(DENSE.replace("1e-3", "6e-3"), 9.0, 9.0, 9.0), run(SPARSE, 3.4, 3.2, 2.9)
    )
    assert set(rows) == {DENSE, SPARSE} and rows[DENSE][1] == "100"


def test_without_a_dense_arm_there_is_no_ratio():
    rows = rows_of(run(FP8, 3.4, 3.2, 3.0), run(SPARSE, 3.4, 3.2, 2.9))
    assert {(row[2], row[5]) for row in rows.values()} == {("-", "-")}


# -- the page ------


@pytest.fixture
def page(monkeypatch, tmp_path):
    """report(*runs): the page that `python -m bench.quality.report` makes of these results."""
    pytest.importorskip("matplotlib", reason="no matplotlib here")
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir(), docs.mkdir()
    marks = [value for name, value in vars(report).items() if name.endswith("MARKS")]
    (docs / "quality.md").write_text("\n".join(f"{start}{end}\n" for start, end in marks))
    names = {"RESULTS": results, "FLOAT8": results / "fp8", "PAGE": docs / "quality.md"}
    names |= {"PICTURE": docs / "quality.png", "SECONDS_PICTURE": docs / "time-to-loss.png"}
    for name, path in names.items():
        monkeypatch.setattr(report, name, path)
    monkeypatch.setattr(report.picture, "draw", lambda *given: None)
    monkeypatch.setattr(report.picture, "draw_float8", lambda *given: None)
    monkeypatch.setattr(sys, "argv", ["report"])

    def made(*runs):
        for each in runs:
            (results / f"{parse(each['arm']).slug}.json").write_text(json.dumps(each))
        report.main()
        return (docs / "quality.md").read_text()

    return made


MAIN = [run("relu2 dense", 3.4, 3.0, 2.6, alone=False), run("relu2 2:4", 3.4, 3.0, 2.6, alone=False)]


def test_the_section_is_there_with_its_results_and_gone_without(page, tmp_path):
    start, end = report.SECONDS_MARKS
    picture_file = tmp_path / "docs" / "time-to-loss.png"
    assert start + end in page(*MAIN) and not picture_file.exists()
    text = page(run(DENSE, 3.4, 3.0, 2.6), run(SPARSE, 3.4, 2.9, 2.5, ms=80.0))
    section = text.partition(start)[2].partition(end)[0]
    assert section.startswith("## Time to loss, measured\n") and "](time-to-loss.png)" in section
    assert "### squared ReLU, 352 million parameters: measured" in section and "0.6 of a run" in section
    assert f"| {SPARSE} | 1 | 76 | 0.76 | 2.5000 | 80 | 0.80 | 80.0 |" in section
    assert picture_file.stat().st_size > 10_000
    assert page() == text  # it is written once, not added to


def test_a_row_for_each_table_in_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="no matplotlib here")
    arms = grouped(run(DENSE, 3.4, 3.0, 2.6), run(SPARSE, 3.4, 2.9, 2.5), run(FP8, 3.4, 3.1, 2.7))
    sizes = []
    for tables in ([("one", arms)], [("one", arms), ("two", arms)]):
        picture.draw_seconds(tmp_path / "time.png", tables)
        sizes.append((tmp_path / "time.png").stat().st_size)
    assert sizes[0] < sizes[1]


# -- equal text ------


def test_arms_of_another_text_or_of_fewer_tokens_have_tables_of_their_own():
    most = [run("relu2 dense", 3, 3, 2.0), run("relu2 dense", 3, 3, 2.0, seed=1), run("relu2 2:4", 3, 3, 2.02)]
    fewer = [
        run("relu2 dense", 3, 3, 3.0, text="bb", tokens=6_000_000, seed=2),
        run("relu2 2:4", 3, 3, 3.03, text="bb", tokens=6_000_000, seed=2),
    ]
    other = [run("relu2 dense wide=1/2", 3, 3, 5.0, text="cc")]
    main, rest = report.main_and_others(grouped(*most, *fewer, *other))
    assert main == grouped(*most)
    assert rest == [
        ("squared ReLU, 6 million tokens", grouped(*fewer)), ("squared ReLU, text cc", grouped(*other)),
    ]  # fmt: skip
    text = report.other_tables(grouped(*most, *fewer), {})
    assert "| relu2 2:4 | 3.0300 | one seed | 1 | - | +1.00 % |" in text and "2.0" not in text


def test_the_same_seed_on_another_text_is_no_pair():
    ours, theirs = [run("relu2 2:4", 3, 3, 2.02)], [run("relu2 dense", 3, 3, 2.0, text="bb")]
    assert compare.difference(ours, theirs) == "-" and compare.time_to(ours, theirs, {"plain": 1.5}) == "-"
    assert compare.difference(ours, [run("relu2 dense", 3, 3, 2.0)]) == "+1.00 %"
    fp8 = [run("relu2 2:4 mvue=True precision=fp8", 3, 3, 2.02)]
    twins = compare.with_twins(grouped(*fp8), grouped(run("relu2 2:4 mvue=True", 3, 3, 2.0, text="bb")))
    assert report.precision_rows(twins)[0][-3:] == ["0", "-", "-"]


def test_layers_have_the_time_that_was_measured_of_them_and_dense_fp8_is_no_base():
    groups = grouped(
        run("relu2 dense", 3, 3, 2.0), run("relu2 dense precision=fp8", 3, 3, 1.9), run("relu2 2:4", 3, 3, 2)
    )
    assert compare.best_dense(groups, parse("relu2 2:4")) == "relu2 dense"
    assert compare.ffn_time(parse("relu2 dense precision=fp8"), {"plain": 1.5}) is None
    assert compare.ffn_time(parse("relu2 dense precision=fp8"), {"plain dense fp8": 1.25}) == 0.8
    assert compare.ffn_time(parse("relu2 2:4 operand=activation precision=fp8"), {"plain activation": 1.5}) is None
    own = {"plain activation": 1.5, "350m plain activation": 1.25, "plain": 2.0, "350m plain": 1.6}
    assert compare.ffn_time(parse(SPARSE), own) == 1.0  # 1.25 as wide, by the layer of its own size
    assert compare.ffn_time(parse("relu2 2:4 dense=0 size=350m"), own) == 1 / 1.6
    assert compare.ffn_time(parse("relu2 2:4 mvue=False size=350m"), own | {"plain mvue=False": 1.5}) is None
    assert compare.loss_targets(grouped(run("relu2 dense wide=1/2 precision=fp8", 3, 3, 2))) == []
    assert picture.words(parse("relu2 dense precision=fp8")) == "dense, fp8"
