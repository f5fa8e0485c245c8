"""The tables of docs/when-it-pays.md are those of the results, and no others."""

import re
from pathlib import Path

import pytest

from bench import measured, tables

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_has_the_results():
    page = tables.PAGE.read_text()
    assert tables.fill(page) == page, "run python -m bench.tables"


@pytest.mark.parametrize("name", ["ffn", "ffn_costs", "tokens", "block", "step"])
def test_every_table_is_on_the_page_and_has_rows(name):
    assert f"<!-- table: {name} -->" in tables.PAGE.read_text()
    assert len(measured.read(name)) >= 2 and tables.TABLES[name]().count("\n") >= 4


def test_marked_tables_are_replaced_and_nothing_else(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "ffn", lambda device: f"| new {device} |\n")
    for mark, device in (("ffn", ""), ("ffn h100", "h100")):
        text = f"before\n<!-- table: {mark} -->\n| {{}} |\n<!-- end of table -->\nafter | old |\n"
        assert tables.fill(text.format("old")) == text.format(f"new {device}")


def test_a_device_has_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    (tmp_path / "h100").mkdir()
    for folder, time_us in (("", 1000), ("h100", 2000)):
        (tmp_path / folder / "tokens.csv").write_text(
            f"# device: one\nweights,layer,tokens,speedup,speedup mvue=False\nbf16,1 x 2,{time_us},2.0,nan\n"
        )
    text = tables.fill("<!-- table: tokens h100 -->\n<!-- end of table -->")
    assert "2,000 tokens" in text and "1,000 tokens" not in text
    with pytest.raises(SystemExit, match="no bench/results/h100/ffn.csv; .* --csv bench/results/h100"):
        tables.fill("<!-- table: ffn h100 -->\n<!-- end of table -->")
    with pytest.raises(SystemExit, match="no table ffm; there are ffn, "):
        tables.fill("<!-- table: ffm -->\n<!-- end of table -->")


def test_columns_that_nothing_was_measured_for_are_left_out():
    assert measured.markdown(["a", "b", "c"], [["x", "-", "1"], ["y", "-", "-"]]) == (
        "| a | c |\n|---|---:|\n| x | 1 |\n| y | - |\n"
    )


def test_results_of_devices_are_not_mixed():
    """Those beside one another are of one device, those in a folder of the device that it is named after."""
    devices = {}
    for path in measured.RESULTS.rglob("*.csv"):
        device = re.search("^# device: (.*)$", path.read_text(), re.MULTILINE)
        assert device and "# commit: " in path.read_text(), path
        devices.setdefault(path.parent, set()).add(device[1])
    for folder, names in devices.items():
        assert len(names) == 1, names
        assert folder == measured.RESULTS or folder.name in names.pop().lower()
