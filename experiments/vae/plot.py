"""Draw vae.png from the saved lines: variance of each estimator, test bound against time, posteriors compared.

Prints the same as a table.

    python experiments/vae/plot.py [folder]

Means over seeds with their standard errors. The score function without a baseline is below the right panel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.runner import load, mean_and_error

HERE = Path(__file__).parent
COLOURS = {
    "pathwise": "tab:blue",
    "path": "tab:green",
    "score": "tab:red",
    "leave-one-out": "tab:orange",
    "iaf": "tab:purple",
    "spline": "tab:brown",
}
Lines = list[dict[str, Any]]


def curve(axes: Axes, chosen: Lines, x: str, y: Any, name: str) -> None:
    """The mean over lines (seeds) of y(row), snapshot by snapshot, against the mean of row[x]."""
    snapshots = list(zip(*(line["rows"] for line in chosen), strict=True))
    place = [np.mean([row[x] for row in rows]) for rows in snapshots]
    mean, error = np.array([mean_and_error(y(row) for row in rows) for rows in snapshots]).T
    axes.errorbar(place, mean, error, fmt="o-", color=COLOURS[name], ms=4, lw=1.2, label=name)


def figure(lines: Lines) -> Figure:
    """The three panels."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    by = {m: [line for line in lines if line["method"] == m] for m in methods}
    fig = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    if "pathwise" in by:
        for name in by["pathwise"][0]["rows"][0]["variance"]:
            curve(left, by["pathwise"], "step", lambda row, name=name: row["variance"][name], name)
    left.set(yscale="log", xlabel="step of the pathwise training", title="gradient variance, Gaussian posterior")
    left.set_ylabel("per sample and row, encoder")
    left.legend(fontsize=7)
    for name in methods:
        curve(middle, by[name], "time", lambda row: row["bound"], name)
    best = max(row["bound"] for line in lines for row in line["rows"])
    middle.set(ylim=(2.2 * best, 0.95 * best), xlabel="seconds of training", title="test bound, nats an image")
    if "score" in by:
        end, _ = mean_and_error(line["rows"][-1]["bound"] for line in by["score"])
        middle.text(0.35, 0.45, f"score: {end:.0f} at the end", color=COLOURS["score"], transform=middle.transAxes)
    middle.legend(fontsize=7)
    shown = [m for m in ("leave-one-out", "pathwise", "iaf", "spline") if m in by]
    places = {m: i for i, m in enumerate(shown)}
    for name, place in places.items():
        for key, shift, marker in (("bound", -0.1, "o"), ("log_p", 0.1, "s")):
            mean, error = mean_and_error(line[key] for line in by[name])
            label = {"bound": "bound", "log_p": "log p(x), importance weighted"}[key] if not place else None
            right.errorbar(place + shift, mean, error, fmt=marker, color=COLOURS[name], ms=6, label=label)
    right.set_xticks(range(len(shown)), shown, fontsize=8)
    right.set(ylim=(1.4 * best, 0.93 * best), title="after training, nats an image")
    right.legend(fontsize=7)
    return fig


def tables(lines: Lines) -> Iterator[str]:
    """What the figure shows, in numbers: mean ± standard error over seeds."""

    def shown(values: Iterable[float]) -> str:
        mean, error = mean_and_error(values)
        return f"{mean:.5g} ± {error:.2g}"

    for method in dict.fromkeys(line["method"] for line in lines):
        found = [line for line in lines if line["method"] == method]
        last = [line["rows"][-1] for line in found]
        pairs = (f"{k} {shown(line[k] for line in found)}" for k in ("log_p", "bound", "gap", "ess", "cpu_seconds"))
        yield f"{method}: test bound {shown(r['bound'] for r in last)} after {shown(r['time'] for r in last)} s"
        yield f"    weighted: {', '.join(pairs)}"
        snapshots = list(zip(*(line["rows"] for line in found), strict=True))
        course = (f"{shown(r['bound'] for r in s)} at {np.mean([r['time'] for r in s]):.3g} s" for s in snapshots)
        yield f"    on the way: {', '.join(course)}"
        pairs = (f"{k} {shown(r['variance'][k] for r in last)}" for k in last[0]["variance"])
        yield f"    variance at the end: {', '.join(pairs)}"


def main(folder: Path) -> None:
    """Read a folder that run.py filled, leave vae.png in it and print the table."""
    lines = load(folder)
    figure(lines).savefig(folder / "vae.png", dpi=110)
    print("\n".join(tables(lines)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
