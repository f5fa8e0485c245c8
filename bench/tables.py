"""Writes the tables of docs/when-it-pays.md from the CSVs of bench/results, between the marks that name them.

`<!-- table: ffn -->` is filled from bench/results/ffn.csv, `<!-- table: ffn h100 -->` from bench/results/h100/ffn.csv:
the device that the page is about, and any other.

    python -m bench.tables          # after new results
"""

from __future__ import annotations

import re

from bench import simulate_gpus
from bench.measured import RESULTS, ROOT, markdown, milliseconds, percent, ratio, read

PAGE = ROOT / "docs" / "when-it-pays.md"
MARK = re.compile(r"(<!-- table: (\w+)(?: (\w+))? -->\n).*?(<!-- end of table -->)", re.DOTALL)
THEIRS = "PyTorch's 2:4 over dense"


def ffn(device: str = "") -> str:
    header = [
        "weights", "layer", "dense, ms", "2:4, ms", "speed-up", "8 micro-batches", "`mvue=False`", "`lean=True`",
        '`decay_in="backward"`', "PyTorch's own 2:4",
    ]  # fmt: skip
    rows = [
        [
            row["weights"], row["layer"], milliseconds(row["dense_us"]), milliseconds(row["sparse_us"]),
            ratio(row["speedup"]), ratio(row["speedup 8 micro-batches"]), ratio(row["speedup mvue=False"]),
            ratio(row.get("speedup lean", "")), ratio(row.get("speedup decay in backward", "")), ratio(row[THEIRS]),
        ]
        for row in read("ffn", device)
    ]  # fmt: skip
    return markdown(header, rows, 2)


COSTS = ["sparse products", "dense products", "activation", "mvue", "pack", "search / 40", "decay"]


def ffn_costs(device: str = "") -> str:
    shares: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in read("ffn_costs", device):
        cost = row["cost"] if row["cost"] in COSTS else "other"
        found = shares.setdefault((row["weights"], row["layer"], row["mvue"]), {})
        found[cost] = found.get(cost, 0.0) + float(row["share"])
    rows = [
        [weights, layer, "yes" if mvue == "True" else "no"]
        + [f"{abs(100 * found[cost]):.1f}" if cost in found else "-" for cost in (*COSTS, "other")]
        for (weights, layer, mvue), found in shares.items()
    ]
    return markdown(["weights", "layer", "MVUE", *COSTS, "other"], rows, 3)


def tokens(device: str = "") -> str:
    names, counts = [], []
    cells = {}
    for row in read("tokens", device):
        names += [row["layer"]] * (row["layer"] not in names)
        counts += [row["tokens"]] * (row["tokens"] not in counts)
        cells[row["layer"], row["tokens"]] = (ratio(row["speedup"]), ratio(row["speedup mvue=False"]))
    rows = [
        [name, mvue] + [cells.get((name, count), ("-", "-"))[index] for count in counts]
        for name in names
        for index, mvue in enumerate(("yes", "no"))
    ]
    return markdown(["layer", "MVUE", *(f"{int(count):,} tokens" for count in counts)], rows, 2)


def block(device: str = "") -> str:
    header = [
        "weights", "block", "dense, ms", "2:4, ms", "speed-up", "bound", "FFN's share", "FFN", "`mvue=False`",
        "PyTorch's own 2:4",
    ]  # fmt: skip
    rows = [
        [
            row["weights"], row["block"], milliseconds(row["dense_us"]), milliseconds(row["sparse_us"]),
            ratio(row["speedup"]), ratio(row["bound"]), percent(row["ffn share"]), ratio(row["ffn speedup"]),
            ratio(row["speedup mvue=False"]), ratio(row.get(THEIRS, "")),
        ]
        for row in read("block", device)
    ]  # fmt: skip
    return markdown(header, rows, 2)


def step(device: str = "") -> str:
    header = [
        "weights", "model", "calls a step", "dense, ms", "2:4, ms", "speed-up", "bound", "FFN's share", "`mvue=False`",
        '`decay_in="backward"`', "PyTorch's own 2:4", "tokens/s, dense", "2:4", "MFU, dense", "2:4", "GB, dense", "2:4",
    ]  # fmt: skip
    rows = [
        [
            row["weights"], row["model"], row["micro-batches"], f"{float(row['dense_ms']):.1f}",
            f"{float(row['sparse_ms']):.1f}", ratio(row["speedup"]), ratio(row["bound"]), percent(row["ffn share"]),
            ratio(row["speedup mvue=False"]), ratio(row.get("speedup decay in backward", "")),
            ratio(row.get(THEIRS, "")), f"{float(row['dense tokens/s']):,.0f}",
            f"{float(row['sparse tokens/s']):,.0f}", percent(row["dense MFU"]), percent(row["sparse MFU"]),
            f"{float(row['dense GB']):.1f}", f"{float(row['sparse GB']):.1f}",
        ]
        for row in read("step", device)
    ]  # fmt: skip
    return markdown(header, rows, 2)


#: costs of ffn_costs.csv -> what a reader calls them
PASS_NAMES = {
    "activation": "activation's backward with MVUE", "mvue": "MVUE", "pack": "re-packing", "decay": "decay",
    "search / 40": "mask search", "copies": "copies and clears", "other": "sums of biases and others",
}  # fmt: skip


def limits(device: str = "") -> str:
    """What keeps layers from more: the speed-up were all passes free, what they take, and the two largest."""
    header = ["layer", "speed-up", "with free passes", "passes, of the dense time", "the largest"]
    rows = []
    for layer in read("ffn", device):
        if layer["weights"] != "bf16":
            continue
        costs = {
            row["cost"]: float(row["share"])
            for row in read("ffn_costs", device)
            if row["layer"] == layer["layer"] and row["weights"] == "bf16" and row["mvue"] == "True"
        }
        speedup = float(layer["speedup"])
        passes = {name: share / speedup for name, share in costs.items() if "products" not in name}
        free = speedup / sum(share for name, share in costs.items() if "products" in name)
        largest = sorted(passes, key=passes.get, reverse=True)[:2]
        told = "; ".join(f"{PASS_NAMES[name]}, {100 * passes[name]:.0f} %" for name in largest)
        rows.append([layer["layer"], ratio(str(speedup)), ratio(str(free)), percent(str(sum(passes.values()))), told])
    return markdown(header, rows)


def ffn_fp8(device: str = "") -> str:
    """8-bit layers beside both dense rivals."""
    header = [
        "layer", "bf16 dense, ms", "FP8 dense, ms", "2:4 bf16, ms", "fp8-hybrid, ms", "fp8, ms",
        "2:4 bf16 / bf16 dense", "fp8-hybrid / bf16 dense", "fp8 / bf16 dense", "fp8 / FP8 dense",
    ]  # fmt: skip
    rows = []
    for row in read("ffn_fp8", device):
        bf16, fp8_dense = float(row["bf16 dense us"]), float(row["FP8 dense tensorwise us"])
        ours = [float(row[f"{kind} us"]) for kind in ("2:4", "fp8-hybrid", "fp8")]
        times = [milliseconds(str(us)) for us in (bf16, fp8_dense, *ours)]
        ratios = [f"{bf16 / us:.2f}x" for us in ours] + [f"{fp8_dense / ours[-1]:.2f}x"]
        rows.append([row["layer"], *times, *ratios])
    return markdown(header, rows)


PEER_ARMS = ("dense, eager", "paper, sm_80 fp16", "2:4, as sm80", "2:4")


def paper_peer(device: str = "") -> str:
    """The paper's way and ours: speed over compiled dense, with one micro-batch a step and with eight."""
    if not (RESULTS / device / "paper_peer.csv").exists():
        return "Not measured yet.\n"
    layers: dict[str, dict[str, dict[str, str]]] = {}
    for row in read("paper_peer", device):
        layers.setdefault(row["layer"], {})[row["arm"]] = row
    rows = []
    for layer, arms in layers.items():
        cells = [layer, milliseconds(arms["dense, compiled"]["step_us"])]
        for row in (arms.get(arm) for arm in PEER_ARMS):
            speeds = ("speedup", "speedup 8 micro-batches")
            cells.append("-" if row is None else ", ".join(ratio(row[column]) for column in speeds))
        over = [ratio(arms.get(arm, {}).get("over the paper's", "")) for arm in PEER_ARMS[2:]]
        rows.append([*cells, *over])
    header = ["layer", "dense, compiled, ms", *PEER_ARMS, "as sm80 over the paper's", "2:4 over the paper's"]
    return markdown(header, rows)


TABLES = {
    "ffn": ffn,
    "ffn_fp8": ffn_fp8,
    "ffn_costs": ffn_costs,
    "limits": limits,
    "tokens": tokens,
    "block": block,
    "step": step,
    "paper_peer": paper_peer,
    "simulated": simulate_gpus.markdown,  # 8, 64 and 512 GPUs, from the results of one
}


def fill(text: str) -> str:
    """The page with every marked table made anew."""

    def table(match: re.Match) -> str:
        mark, name, device, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"error: no table {name}; there are {', '.join(TABLES)}")
        return mark + TABLES[name](device or "") + end

    return MARK.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
    print("wrote", PAGE)
