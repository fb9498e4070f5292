"""Draw speed.png, memory.png and growth.png from the saved JSON.

python -m experiments.bench.plot [folder]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

HERE = Path(__file__).parent
PEERS = {"nflows": "tab:orange", "zuko": "tab:green", "normflows": "tab:red", "pyro": "tab:purple"}
Run = dict[str, Any]


def speed(runs: dict[str, Run]) -> Figure:
    """A panel a capability: how many times longer each peer takes, eager, with quartiles."""
    fig = Figure(figsize=(6.5 * len(runs), 10), layout="constrained")
    for axes, (capability, run) in zip(fig.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        records = [r for r in run["records"] if r["mode"] == "eager"][::-1]
        for name, colour in PEERS.items():
            there = [(i, r["ratios"][name]) for i, r in enumerate(records) if name in r["ratios"]]
            middle = [v["median"] for _, v in there]
            error = [[v["median"] - v["low"] for _, v in there], [v["high"] - v["median"] for _, v in there]]
            axes.errorbar(middle, [i for i, _ in there], xerr=error, fmt="o", ms=4, color=colour, label=name)
        axes.axvline(1.0, color="grey", lw=0.8)
        axes.set_yticks(range(len(records)), [f"{r['case']}: {r['operation']}" for r in records], fontsize=7)
        axes.set(xscale="log", xlabel="times flowpath's CPU time", title=f"eager, {capability.upper()}")
        axes.set_xticks([1, 2, 3, 5, 10, 20, 50], ["1", "2", "3", "5", "10", "20", "50"])
        axes.legend(fontsize=8)
    return fig


def memory(run: Run) -> Figure:
    """Peak growth of the resident set in a training step."""
    fig = Figure(figsize=(7, 3), layout="constrained")
    axes, steps = fig.subplots(), run["steps"][::-1]
    axes.barh([s["name"] for s in steps], [s["peak_mib"] / 1024 for s in steps])
    axes.set_xlabel("GiB")
    fig.suptitle(f"peak of a training step: {run['shape']}, {steps[0]['rows']:,} rows", fontsize=10)
    return fig


def growth(sweeps: dict[str, list[Run]]) -> Figure:
    """A panel a sweep, time left, memory right where it was read."""
    fig = Figure(figsize=(13, 8), layout="constrained")
    panels = iter(fig.subplots(2, 4).flat)
    for what, rows in sweeps.items():
        if rows:
            _panel(next(panels), what, rows)
    for axes in panels:
        axes.set_axis_off()
    return fig


def _panel(axes: Axes, what: str, rows: list[Run]) -> None:
    at = [r["at"] for r in rows]
    if what == "rows":
        axes.plot(at, [1e6 * r["seconds"] / r["at"] for r in rows], "o-")
        axes.set(title="fit: microseconds a row", ylim=(0, None), xscale="log", xlabel="rows")
        return
    axes.plot(at, [r["milliseconds"] for r in rows], "o-", label="draws" if "sampling" in what else "time")
    axes.set(xscale="log", yscale="log", xlabel="features" if "sampling" in what else what, ylabel="ms")
    axes.set_title(what if "sampling" in what else f"training step against {what}")
    if "log_prob_milliseconds" in rows[0]:
        axes.plot(at, [r["log_prob_milliseconds"] for r in rows], "s--", label="log_prob")
        lines = axes.lines
    else:
        right = axes.twinx()
        right.plot(at, [max(r["peak_mib"], 0.1) for r in rows], "s--", color="tab:orange", label="peak memory, right")
        right.set(yscale="log", ylabel="MiB")
        _write_plainly(right.yaxis)
        lines = [*axes.lines, *right.lines]
    axes.legend(handles=lines, fontsize=8)
    shown = at if len(at) <= 5 else at[::2]
    axes.set_xticks(shown, [f"{v:,}" for v in shown], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    _write_plainly(axes.yaxis)


def _write_plainly(axis: Axis) -> None:
    """The numbers of a logarithmic axis without powers of ten."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def main(folder: Path) -> None:
    """Draw what is there."""
    found = {p.stem.removeprefix("speed-"): json.loads(p.read_text("utf-8")) for p in sorted(folder.glob("speed-*"))}
    if found:
        speed(found).savefig(folder / "speed.png", dpi=90)
    if (folder / "memory.json").exists():
        memory(json.loads((folder / "memory.json").read_text("utf-8"))).savefig(folder / "memory.png", dpi=90)
    if (folder / "growth.json").exists():
        growth(json.loads((folder / "growth.json").read_text("utf-8"))["sweeps"]).savefig(folder / "growth.png", dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
