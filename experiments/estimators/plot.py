"""Draw the four figures from the saved lines, dimension.png, cost.png, training.png, accuracy.png; print their tables.

    python experiments/estimators/plot.py [folder]

Lines are closed forms, dots with bars are means over seeds with their standard error (often smaller than the dot).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.estimators import closed
from experiments.runner import load, mean_and_error

HERE = Path(__file__).parent
COLOURS = {
    "score": "tab:red",
    "leave-one-out": "tab:orange",
    "pathwise": "tab:blue",
    "total": "tab:blue",
    "path": "tab:green",
    "auto": "black",
}
GROUP = 8  # samples of a leave-one-out baseline, when no line says otherwise
Lines = list[dict[str, Any]]
Truth = Callable[[float], dict[str, float]]


def rows_of(lines: Lines, part: str, **wanted: Any) -> Lines:
    """The rows of a part's lines, each with what `wanted` names."""
    rows = [{**row, "target": line.get("target")} for line in lines if line["part"] == part for row in line["rows"]]
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def against(axes: Axes, rows: Lines, x: str, values: str, names: Iterable[str], *, joined: bool) -> None:
    """Means over seeds against x with their standard errors."""
    places = sorted({r[x] for r in rows})
    for name in names:
        found = [mean_and_error(r[values][name] for r in rows if r[x] == p) for p in places]
        mean, error = np.array(found).T
        style = "o" if not joined else "o--" if name == "auto" else "o-"
        size = 2.5 if name == "auto" else 4.5  # "auto" often lies on "path": both must show
        axes.errorbar(places, mean, error, fmt=style, color=COLOURS[name], ms=size, lw=1.2, label=name)


def lines_of(axes: Axes, grid: np.ndarray, truth: Truth, names: Iterable[str]) -> None:
    """Closed forms on a fine grid."""
    for name in names:
        axes.plot(grid, [truth(g)[name] for g in grid], color=COLOURS[name], lw=1)


def widths(d: int) -> np.ndarray:
    return np.where(np.arange(d) % 2 == 0, 0.5, 1.25)


def dimension(lines: Lines, group: int) -> Figure:
    """|z|^2 and KL against the dimension, KL against misfit."""
    fig = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    every, whole = np.arange(1, 101), np.geomspace(1, 100, 60)
    names: tuple[str, ...] = ("score", "leave-one-out", "pathwise")
    lines_of(left, whole, lambda d: closed.norm(d, 1.0, group), names)  # type: ignore[arg-type]
    against(left, rows_of(lines, "dimension", cost="norm"), "x", "measured", names, joined=False)
    left.set(xscale="log", yscale="log", xlabel="dimension D", title="f = |z|², q = N(0, I)")
    left.set_ylabel("variance per sample and coordinate")
    names = ("score", "leave-one-out", "total", "path", "auto")
    even = every[every % 2 == 0]
    lines_of(middle, even, lambda d: closed.divergence(widths(int(d)), group), names)
    rows = [r for r in rows_of(lines, "dimension", cost="kl") if r["x"] % 2 == 0]
    against(middle, rows, "x", "measured", names, joined=False)
    middle.set(xscale="log", yscale="log", xlabel="dimension D", title="KL(q | N(0, I)), s = 0.5 and 1.25")
    names = ("total", "path", "auto", "score")
    lines_of(right, np.linspace(0.28, 1.55, 200), lambda s: closed.divergence(np.full(2, s), group), names)
    against(right, rows_of(lines, "dimension", cost="misfit"), "x", "measured", names, joined=False)
    right.axvline(2**-0.5, color="0.7", lw=0.8)
    right.set(ylim=(-0.4, 12), xlabel="s", title="KL(N(0, s²) | N(0, 1)), D = 2")
    for axes in (left, middle, right):
        axes.legend(fontsize=7)
    return fig


def cost(lines: Lines, group: int) -> Figure:
    """Mohamed's three costs against k."""
    fig = Figure(figsize=(11, 3.6), layout="constrained")
    names = ("score", "leave-one-out", "pathwise")
    panels: list[tuple[str, str, Any, Any, np.ndarray]] = [
        ("square", "(z - k)²", closed.square, lambda z, k: (z - k) ** 2, np.linspace(-3, 3, 61)),
        ("cosine", "cos(k z)", closed.cosine, lambda z, k: np.cos(k * z), np.geomspace(0.25, 5, 80)),
        ("bump", "exp(-k z²)", closed.bump, lambda z, k: np.exp(-k * z**2), np.geomspace(0.1, 10, 80)),
    ]
    for axes, (name, title, formula, f, grid) in zip(fig.subplots(1, 3), panels, strict=True):

        def truth(k: float, formula: Any = formula, f: Any = f) -> dict[str, float]:
            path, score = formula(k, 1.0, 1.0)
            loo = closed.leave_one_out(lambda z: f(z, k), 1.0, 1.0, group)
            return {"pathwise": path, "score": score, "leave-one-out": loo}

        lines_of(axes, grid, truth, names)
        against(axes, rows_of(lines, "cost", cost=name), "x", "measured", names, joined=False)
        axes.set(yscale="log", xlabel="k", title=f"f = {title}, q = N(1, 1)")
        if name != "square":
            axes.set_xscale("log")
            ticks = (0.25, 0.5, 1, 2, 5) if name == "cosine" else (0.1, 0.3, 1, 3, 10)
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.xaxis.minorticks_off()
    axes = fig.axes[0]
    axes.set_ylabel("variance per sample in the mean")
    axes.legend(fontsize=7)
    return fig


def training(lines: Lines) -> Figure:
    """A flow's gradient variance along its training."""
    fig = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, target in zip(fig.subplots(1, 2), ("gaussian", "funnel"), strict=True):
        rows = rows_of(lines, "training", target=target)
        against(axes, rows, "step", "variance", ("score", "leave-one-out", "total", "path", "auto"), joined=True)
        axes.set(yscale="log", xlabel="step", title=f"a flow on the {target}, D = 10")
        axes.set_xscale("symlog", linthresh=30)
        axes.set_xlim(-2, None)
    fig.axes[0].set_ylabel("variance per sample, all parameters")
    fig.axes[0].legend(fontsize=7)
    return fig


def accuracy(lines: Lines) -> Figure:
    """What the estimators buy at equal steps."""
    found = [line for line in lines if line["part"] == "accuracy"]
    cases = list(dict.fromkeys((line["target"], line["features"]) for line in found))
    fig = Figure(figsize=(11, 3.9), layout="constrained")
    titles = {"kl": "KL(q | p), nats", "ess": "ESS of importance weights", "w1": "marginal W1, sd of p"}
    for axes, (key, title) in zip(fig.subplots(1, 3), titles.items(), strict=True):
        for shift, kind in zip((-0.2, 0.0, 0.2), ("total", "path", "auto"), strict=True):
            chosen = [
                [x[key] for x in found if (x["target"], x["features"], x["estimator"]) == (*c, kind)] for c in cases
            ]
            mean, error = np.array([mean_and_error(v) for v in chosen]).T
            axes.errorbar(np.arange(len(cases)) + shift, mean, error, fmt="o", color=COLOURS[kind], ms=5, label=kind)
        if key == "w1":
            floor = [np.mean([x["w1_floor"] for x in found if (x["target"], x["features"]) == c]) for c in cases]
            axes.plot(np.arange(len(cases)), floor, "_", color="0.5", ms=22, label="two exact samples")
        axes.set_xticks(range(len(cases)), [f"{t}\n{d}" for t, d in cases], fontsize=7)
        axes.set(yscale="log", title=title)
    fig.legend(*fig.axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return fig


def shown(values: Iterable[float]) -> str:
    """Mean and standard error over seeds as text."""
    mean, error = mean_and_error(values)
    return f"{mean:.3g} ± {error:.1g}"


def tables(lines: Lines) -> Iterator[str]:
    """What the figures show, in numbers."""
    for part in ("dimension", "cost"):
        rows = rows_of(lines, part)
        for cost, x in dict.fromkeys((r["cost"], r["x"]) for r in rows):
            found = [r for r in rows if (r["cost"], r["x"]) == (cost, x)]
            pairs = (f"{k} {v:.3g} ({shown(r['measured'][k] for r in found)})" for k, v in found[0]["closed"].items())
            yield f"{cost:8s} {x:<6.3g} closed form (measured): {', '.join(pairs)}"
    rows = rows_of(lines, "noise")
    for d, n in dict.fromkeys((r["features"], r["num_samples"]) for r in rows):
        gains = [r["gain"] for r in rows if (r["features"], r["num_samples"]) == (d, n)]
        pairs = (f"{k} {shown(g[k] for g in gains)}" for k in gains[0])
        yield f"Sobol, D = {d}, {n} samples, variance divided by: {', '.join(pairs)}"
    rows = rows_of(lines, "training")
    for target, step in dict.fromkeys((r["target"], r["step"]) for r in rows):
        found = [r for r in rows if (r["target"], r["step"]) == (target, step)]
        for key in ("variance", "milliseconds"):
            pairs = (f"{k} {shown(r[key][k] for r in found)}" for k in found[0][key])
            yield f"{target} step {step}, {key}: {', '.join(pairs)}"
    runs = [line for line in lines if line["part"] == "accuracy"]
    for case in dict.fromkeys((r["target"], r["features"], r["estimator"]) for r in runs):
        found = [r for r in runs if (r["target"], r["features"], r["estimator"]) == case]
        pairs = (f"{k} {shown(r[k] for r in found)}" for k in ("kl", "ess", "khat", "w1", "cpu_seconds"))
        yield f"{case[0]} D = {case[1]} {case[2]}: {', '.join(pairs)}"


def main(folder: Path) -> None:
    """Read a folder that run.py filled; leave the figures of the parts that are there in it, and print the tables."""
    lines = load(folder)
    print("\n".join(tables(lines)))
    group = lines[-1]["config"]["group"] if lines else GROUP
    parts = {line["part"] for line in lines}
    if "dimension" in parts:
        dimension(lines, group).savefig(folder / "dimension.png", dpi=110)
    if "cost" in parts:
        cost(lines, group).savefig(folder / "cost.png", dpi=110)
    if "training" in parts:
        training(lines).savefig(folder / "training.png", dpi=110)
    if "accuracy" in parts:
        accuracy(lines).savefig(folder / "accuracy.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
