"""Draw kl.png from the saved results: KL of every method on every posterior, with the targets.

python experiments/posteriors/plot.py [folder]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matplotlib.figure import Figure

from experiments.posteriors.table import NAMES, last
from experiments.runner import load

HERE = Path(__file__).parent
STYLES = {
    "fit_posterior": ("o", "tab:red"),
    "autoflow": ("D", "tab:orange"),
    "traced": ("d", "gold"),
    "diagonal": ("v", "0.65"),
    "multivariate": ("^", "0.45"),
    "iaf": ("s", "tab:blue"),
    "spline": ("P", "tab:cyan"),
    "affine_ar": ("X", "tab:green"),
}
LEAST, MOST = 1e-3, 1e5  # nats; what lies beyond, or failed, stands at the edge


def place(line: dict[str, Any]) -> float:
    """Where on the axis a line stands."""
    kl = line.get("kl", math.inf)
    return MOST if not math.isfinite(kl) else min(max(kl, LEAST), MOST)


def figure(lines: list[dict[str, Any]]) -> Figure:
    """A row a posterior, a mark a method and seed, float64 where there is more than one dtype."""
    lines = last(lines)
    dtype = max(x["dtype"] for x in lines)
    lines = [x for x in lines if x["dtype"] == dtype]
    best = {x["posterior"]: min(place(y) for y in lines if y["posterior"] == x["posterior"]) for x in lines}
    names = sorted(best, key=lambda n: best[n])
    fig = Figure(figsize=(9, 1.6 + 0.42 * len(names)), layout="constrained")
    axes = fig.subplots()
    for method, (marker, color) in STYLES.items():
        mine = [x for x in lines if x["method"] == method]
        if mine:
            front = 3 if method == "fit_posterior" else 2
            axes.scatter(
                [place(x) for x in mine],
                [names.index(x["posterior"]) for x in mine],
                marker=marker, s=42, color=color, edgecolors="white", linewidths=0.5, label=NAMES[method], zorder=front,
            )  # fmt: skip
    for target, side in ((0.02, "right"), (0.05, "left")):
        axes.axvline(target, color="black", linewidth=0.8, linestyle="--", zorder=1)
        axes.annotate(f"{target:g}", (target, 1.0), xycoords=("data", "axes fraction"), ha=side, va="bottom")
    axes.set_xscale("log")
    axes.set_xlim(LEAST / 1.4, MOST * 1.4)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", color="0.9", zorder=0)
    axes.set_xlabel(
        f"KL = log Z - ELBO, nats ({dtype}; at the edges: less than {LEAST:g}, more than {MOST:g} or failed)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return fig


def main(folder: Path) -> None:
    """Read a folder that run.py filled and leave kl.png in it."""
    figure(load(folder)).savefig(folder / "kl.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
