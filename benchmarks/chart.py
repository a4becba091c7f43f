"""Draw the figures of the benchmarks: ``python benchmarks/chart.py FOLDER chart.png``.

The folder holds what ``--json`` wrote: ``attention.json`` and ``attention_losses.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

OURS, OTHERS, PLAIN = "#1b6ca8", "#b8c4ce", "#c2703d"
BARS = {
    "+ AttentionMSE": ("AttentionMSE", OURS),
    "+ RelationKL": ("RelationKL", OURS),
    "+ AttentionKL": ("AttentionKL", OURS),
    "+ AttentionKL, from scores": ("AttentionKL, from kept scores", OTHERS),
    "+ AttentionKL, as usual": ("AttentionKL, output_attentions", OTHERS),
    "+ attention, TextBrewer": ("TextBrewer", OTHERS),
}


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["rows"]
    return rows


def steps(axes: Axes, rows: list[dict[str, Any]], batch: str) -> None:
    found = {row["objectives"]: row["of LogitsKL alone"] for row in rows if row["batch"] == batch}
    shown = [(label, found[name], colour) for name, (label, colour) in BARS.items() if name in found]
    bars = axes.barh([label for label, _, _ in shown], [x for _, x, _ in shown], color=[c for _, _, c in shown])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0, 1.12 * max(x for _, x, _ in shown))
    axes.invert_yaxis()
    axes.set_title(f"Training step, batch {batch.replace('x', '×')}\n(1 = distilling logits alone)", fontsize=10)


def lines(axes: Axes, rows: list[dict[str, Any]], key: str, title: str) -> None:
    for loss, marker in (("AttentionKL", "o"), ("AttentionMSE", "s")):
        for backend, colour in (("plain", PLAIN), ("ours", OURS)):
            chosen = [row for row in rows if row["loss"] == loss and row["backend"] == backend]
            lengths = [int(row["batch"].split("x")[1]) for row in chosen]
            label = f"{loss}, {'score maps' if backend == 'plain' else 'ours'}"
            axes.plot(lengths, [row[key] for row in chosen], marker=marker, markersize=4, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a text (8,192 in a batch)")
    axes.set_title(title, fontsize=10)


def main(folder: Path, path: Path) -> None:
    attention, kernels = rows_of(folder, "attention"), rows_of(folder, "attention_losses")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    steps(axes[0, 0], attention, "8 x 512")
    steps(axes[0, 1], attention, "32 x 128")
    lines(axes[1, 0], kernels, "ms", "Loss of one layer, forward and backward: ms")
    lines(axes[1, 1], kernels, "peak MiB", "Peak memory beyond its inputs: MiB")
    axes[1, 1].legend(fontsize=8, frameon=False, loc="center right")  # where there are no lines
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    figure.get_layout_engine().set(hspace=0.08)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
