"""Draw speed.png from the saved results: steps per second of every way, a panel a problem and device.

python experiments/svi_speed/plot.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.runner import load

HERE = Path(__file__).parent
NAMES = {
    "pyro": "Pyro's SVI, its guide",
    "eager": "Pyro's SVI, our guide",
    "theirs": "traced, Pyro's guide",
    "traced": "traced, our guide",
    "compiled": "compiled, our guide",
    "path": "compiled, PathELBO",
}
SHADES = {"pyro": "0.45", "eager": "0.65", "theirs": "tab:cyan", "traced": "tab:blue", "compiled": "tab:orange"}


def panel(axes: Axes, lines: list[dict[str, Any]]) -> None:
    """Bars for the ways of one problem, with the ratio to Pyro behind each."""
    rates = [line["steps_per_second"] for line in lines]
    bars = axes.barh(
        [NAMES[line["way"]] for line in lines], rates, color=[SHADES.get(line["way"], "tab:red") for line in lines]
    )
    axes.bar_label(bars, [f"{r:,.0f}  ({line['ratio']:.1f}x)" for r, line in zip(rates, lines, strict=True)], padding=3)
    axes.set_xlim(0, 1.35 * max(rates))
    axes.invert_yaxis()
    axes.set_title(f"{lines[0]['problem']} ({lines[0]['guide']}, {lines[0]['device']})", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def figure(lines: list[dict[str, Any]]) -> Figure:
    """One panel a problem and device, from the lines with steps per second; the last run of each counts."""
    kept = {(line["problem"], line["device"], line["way"]): line for line in lines if "steps_per_second" in line}
    groups = list(dict.fromkeys((problem, device) for problem, device, _ in kept))
    fig = Figure(figsize=(8, 2.1 * len(groups)), layout="constrained")
    for axes, group in zip(fig.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        panel(axes, [line for key, line in kept.items() if key[:2] == group])
        axes.set_xlabel("steps per second")
    return fig


def main(folder: Path) -> None:
    """Read a folder that run.py filled and leave speed.png in it."""
    figure(load(folder)).savefig(folder / "speed.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
