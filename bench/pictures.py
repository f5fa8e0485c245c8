"""Draws docs/results/ffn.png from bench/results/ffn_fp8.csv: speed of whole feed-forward layers over bf16 dense.

python -m bench.pictures          # after new results
"""

from __future__ import annotations

from bench.measured import ROOT, read
from bench.tables import ffn_fp8

PICTURE = ROOT / "docs" / "results" / "ffn.png"
#: arm -> (colour, column of the table with its time in milliseconds)
ARMS = {
    "FP8 dense (torchao)": ("#999999", 2),
    "2:4 bf16": ("#88ccee", 3),
    "2:4 fp8-hybrid": ("#4477aa", 4),
    "2:4 fp8": ("#223366", 5),
}


def speeds() -> dict[str, list[float]]:
    """Layer -> speed of each arm over bf16 dense, from the rows of the table in docs/when-it-pays.md."""
    rows = [line.strip("| ").split(" | ") for line in ffn_fp8().splitlines()[2:]]
    return {row[0]: [float(row[1]) / float(row[column]) for _, column in ARMS.values()] for row in rows}


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = speeds()
    figure, axes = plt.subplots(figsize=(1.2 * len(layers) + 2.2, 4), facecolor="white")
    width = 0.8 / len(ARMS)
    for index, (name, (colour, _)) in enumerate(ARMS.items()):
        places = [at + (index - (len(ARMS) - 1) / 2) * width for at in range(len(layers))]
        bars = axes.bar(places, [values[index] for values in layers.values()], width, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(layers)), list(layers))
    axes.set_ylabel("speed over torch.compile'd bf16 dense")
    axes.legend(fontsize=8, ncols=2, loc="upper right")
    axes.set_ylim(0, 1.25 * max(max(values) for values in layers.values()))
    header = (ROOT / "bench" / "results" / "ffn_fp8.csv").read_text().splitlines()
    facts = [line.split(": ", 1)[1] for line in header if line.startswith(("# device", "# commit", "# date"))]
    axes.set_title(f"forward and backward of a feed-forward layer, everything counted\n{', '.join(facts)}", fontsize=9)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)
    print("wrote", PICTURE)


if __name__ == "__main__":
    read("ffn_fp8")  # says how to measure where there is nothing to draw
    main()
