"""The tables of docs/when-it-pays.md are those of the results, and no others."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("bench_tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_results(tables):
    page = tables.PAGE.read_text()
    assert tables.fill(page) == page, "run python -m bench.tables"


@pytest.mark.parametrize("name", ["ffn", "ffn_costs", "tokens", "block", "step"])
def test_every_table_is_on_the_page_and_has_rows(tables, name):
    assert f"<!-- table: {name} -->" in tables.PAGE.read_text()
    assert len(tables.read(name)) >= 2 and tables.TABLES[name]().count("\n") >= 4


def test_marked_tables_are_replaced_and_nothing_else(tables, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "ffn", lambda: "| new |\n")
    text = "before\n<!-- table: ffn -->\n| old |\n<!-- end of table -->\nafter | old |\n"
    assert tables.fill(text) == "before\n<!-- table: ffn -->\n| new |\n<!-- end of table -->\nafter | old |\n"
