"""Draw density.png from the saved results: one row a set, the truth first, then each architecture.

    python experiments/toy2d/plot.py [folder]

The grey level is the square root of the density, so that faint bridges show. Under each panel: gap in nats, and the
share of samples that stray.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent


def panel(axes: Axes, density: np.ndarray, top: float, caption: str) -> None:
    """One density `(pixels, pixels)`, black where it reaches `top`."""
    shade = np.sqrt(np.clip(density.astype(float) / top, 0.0, 1.0))
    axes.imshow(shade, origin="lower", cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, fontsize=7, labelpad=2)


def figure(lines: list[dict], maps: dict[str, np.ndarray]) -> Figure:
    """All panels; the lines of results.jsonl and the arrays of densities.npz."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    kinds = list(dict.fromkeys(line["architecture"] for line in lines))
    found = {(line["set"], line["architecture"]): line for line in lines}
    fig = Figure(figsize=(1.35 * (len(kinds) + 1), 1.5 * len(sets)), layout="constrained")
    grid = fig.subplots(len(sets), len(kinds) + 1, squeeze=False)
    for axes, name in zip(grid, sets, strict=True):
        truth = maps[f"{name}/true"]
        top = float(truth.max())
        panel(axes[0], truth, top, "")
        axes[0].set_ylabel(name, fontsize=8)
        for ax, kind in zip(axes[1:], kinds, strict=True):
            line = found[name, kind]
            panel(ax, maps[f"{name}/{kind}"], top, f"{line['gap']:.3f} nats, {line['stray']:.1%}")
    for ax, title in zip(grid[0], ["truth", *kinds], strict=True):
        ax.set_title(title, fontsize=8)
    return fig


def main(folder: Path) -> None:
    """Read a folder that run.py filled and leave density.png in it."""
    text = (folder / "results.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    with np.load(folder / "densities.npz") as maps:
        figure(lines, dict(maps)).savefig(folder / "density.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
