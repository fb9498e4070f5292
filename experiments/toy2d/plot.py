"""Draw density.png from the saved results: one row a set, the truth first, then each architecture.

    python experiments/toy2d/plot.py [folder]

The shade of grey is the square root of the density, so that faint bridges show. Under each panel: the gap in nats, and
the share of samples that stray.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.runner import load

HERE = Path(__file__).parent


def panel(axes: Axes, shades: np.ndarray, caption: str) -> None:
    """One density as shades of grey `(pixels, pixels)`, the first row lowest."""
    axes.imshow(shades, origin="lower", cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=7, labelpad=2)


def figure(lines: list[dict], maps: dict[str, np.ndarray]) -> Figure:
    """All panels, from the lines of results.jsonl and the arrays of shades.npz."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    kinds = list(dict.fromkeys(line["architecture"] for line in lines))
    found = {(line["set"], line["architecture"]): line for line in lines if line["seed"] == lines[0]["seed"]}
    fig = Figure(figsize=(1.35 * (len(kinds) + 1), 1.5 * len(sets)), layout="constrained")
    grid = fig.subplots(len(sets), len(kinds) + 1, squeeze=False)
    for axes, name in zip(grid, sets, strict=True):
        panel(axes[0], maps[f"{name}/truth"], "")
        axes[0].set_ylabel(name, fontsize=8)
        for ax, kind in zip(axes[1:], kinds, strict=True):
            line = found[name, kind]
            panel(ax, maps[f"{name}/{kind}"], f"{line['gap']:.3f} nats, {line['stray']:.1%}")
    for ax, title in zip(grid[0], ["truth", *kinds], strict=True):
        ax.set_title(title, fontsize=8)
    return fig


def main(folder: Path) -> None:
    """Read a folder that run.py filled and leave density.png in it."""
    lines = load(folder)
    with np.load(folder / "shades.npz") as maps:
        figure(lines, dict(maps)).savefig(folder / "density.png", dpi=100)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
