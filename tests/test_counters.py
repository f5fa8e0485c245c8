"""How the profiler's tables become records, with a stand-in for ncu that prints what ncu prints."""

import math
import stat
import sys

import pytest

from bench import profile
from bench.counters import READ, TIME_NS, WRITTEN, counters

NCU = """#!{python}
import sys
if "--query-metrics" in sys.argv:
    print("Device NVIDIA\\n{known}")
    sys.exit()
assert "unheard_of__metric.sum" not in " ".join(sys.argv)
print("==PROF== Connected to process 1")
print('"ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum"')
print('"","","nsecond","byte","byte"')
for row in {rows!r}:
    print(",".join(f'"{{cell}}"' for cell in row))
"""
ROWS = [
    (0, "stray", "9", "9", "9"),
    (1, "spin_kernel", "1", "0", "0"),
    (2, "ours", "1,500", "2,000", "500"),
    (3, "ours too", "500", "1,000", "n/a"),
    (4, "at::spin_kernel", "1", "0", "0"),
    (5, "theirs", "7", "8", "9"),
]


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    known = "\\n".join(f"{name.split('.')[0]}  what it counts" for name in (TIME_NS, READ, WRITTEN))
    file = tmp_path / "ncu"
    file.write_text(NCU.format(python=sys.executable, known=known, rows=ROWS))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_kernels_are_grouped_by_the_marker_and_unknown_metrics_are_nan(ncu):
    first, second = counters("module", [TIME_NS, READ, WRITTEN, "unheard_of__metric.sum"])
    assert [kernel[TIME_NS] for kernel in first] == [1500, 500] and first[0][READ] == 2000
    assert math.isnan(first[1][WRITTEN]) and math.isnan(first[0]["unheard_of__metric.sum"])
    assert len(second) == 1 and second[0][WRITTEN] == 9


def test_a_missing_profiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="ncu .* is not on the PATH"):
        counters("module", [TIME_NS])


def test_counts_are_added_and_shares_are_the_longest_kernels():
    names = [TIME_NS, READ, WRITTEN, profile.INSTRUCTIONS, *profile.STALLS]
    names += [name for shares in profile.SHARES.values() for name in shares]
    short, long = dict.fromkeys(names, 1.0), dict.fromkeys(names, math.nan)
    long |= {TIME_NS: 10.0, READ: 5.0, WRITTEN: 6.0, profile.INSTRUCTIONS: 7.0}
    long |= {"smsp__issue_active.avg.pct_of_peak_sustained_active": 42.0, profile.SHARES["tensor %"][1]: 77.0}
    long |= {profile.STALLS[0]: 3.0, profile.STALLS[2]: 1.0}
    record = profile.combine([short, long])
    assert (record[TIME_NS], record[READ], record[WRITTEN], record[profile.INSTRUCTIONS]) == (11, 6, 7, 8)
    assert record["issue %"] == 42 and record["tensor %"] == 77 and math.isnan(record["dram %"])
    assert record["stall"] == "long_scoreboard 75% barrier 25%"
