"""Figures from data: each function takes numbers and returns a matplotlib Figure, ready for `figure.savefig(path)`.

No pyplot, hence no global state, no window and no backend to choose: a Figure shows itself in a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = Tensor | np.ndarray

_DATA, _MODEL = "0.35", "tab:red"  # grey for what was given, red for what was fitted
_POINTS = 4000  # dots of a scatter plot; more only darken it


def history(fits: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Training and validation score by epoch, one panel a fit.

    Args:
        fits: for each title the rows of a `FitResult.history`.

    Raises:
        ValueError: no fit, or one without rows.

    Example:
        >>> from flowpath import plot
        >>> rows = [{"epoch": 1, "train": -3.0, "validation": -3.1}, {"epoch": 2, "train": -2.5, "validation": -2.8}]
        >>> len(plot.history({"a fit": rows}).axes)
        1
    """
    if not fits or not all(fits.values()):
        raise ValueError("history expects at least one fit, each with at least one epoch")
    fig = _figure(4.5 * len(fits), 3.2)
    for axes, (title, rows) in zip(fig.subplots(1, len(fits), squeeze=False)[0], fits.items(), strict=True):
        epochs = [row["epoch"] for row in rows]
        for name, colour in (("train", _DATA), ("validation", _MODEL)):
            axes.plot(epochs, [row[name] for row in rows], color=colour, label=name)
        axes.set(title=title, xlabel="epoch", ylabel="log density (nats a row)")
        axes.legend(frameon=False)
    return fig


def calibration(levels: Array, *, draws: int) -> Figure:
    """The share of rows within each credible level beside the diagonal, with the band that noise alone keeps to.

    Args:
        levels: of `fp.hpd_level`, `(N,)` in [0, 1].
        draws: by which they were estimated.

    Raises:
        ValueError: no vector of levels.

    Example:
        >>> import torch
        >>> from flowpath import plot
        >>> figure = plot.calibration(torch.rand(500), draws=1000)
    """
    u = _numbers(levels)
    if u.ndim != 1 or not len(u):
        raise ValueError(f"calibration expects a vector of levels, got shape {u.shape}")
    fig = _figure(4.5, 3.2)
    axes = fig.subplots()
    grid = np.linspace(0, 1, 101)
    noise = 1.63 / np.sqrt(len(u)) + 1.0 / np.sqrt(draws)  # as `fp.check` has it
    axes.fill_between(grid, (grid - noise).clip(0, 1), (grid + noise).clip(0, 1), color="0.85", label="noise alone")
    axes.plot(np.sort(u), np.arange(1, len(u) + 1) / len(u), color=_MODEL, label="rows")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="credible level", ylabel="share of rows")
    axes.legend(frameon=False, loc="upper left")
    return fig


def log_densities(true: Array, fitted: Array) -> Figure:
    """Fitted against true log density of the same rows, each `(N,)`; a perfect fit lies on the line.

    Raises:
        ValueError: arrays that are no two vectors of one length.

    Example:
        >>> import torch
        >>> from flowpath import plot
        >>> x = torch.randn(100)
        >>> figure = plot.log_densities(x, x + 0.1)
    """
    p, q = _numbers(true), _numbers(fitted)
    if p.ndim != 1 or p.shape != q.shape:
        raise ValueError(f"log_densities expects two vectors of one length, got shapes {p.shape} and {q.shape}")
    fig = _figure(4.5, 4.2)
    axes = fig.subplots()
    low, high = np.quantile(p, [0.001, 1.0])  # of the true one: what the fit gets wrong may leave the frame
    margin = 0.08 * (high - low) + 1e-9
    shown = axes.hexbin(p, q, gridsize=70, extent=(low, high, low, high), bins="log", mincnt=1, cmap="Greys")
    axes.axline((low, low), slope=1.0, color=_MODEL, linewidth=1)
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
    axes.set(xlabel="true log density (nats)", ylabel="fitted log density (nats)")
    fig.colorbar(shown, ax=axes, label="rows")
    return fig


def pairs(data: Array, samples: Array, names: Sequence[str] | None = None) -> Figure:
    """Every pair of columns: data `(N, d)` in grey below the diagonal, samples `(M, d)` in red above, both on it.

    Args:
        data, samples: rows of the same columns; the frame is that of the data.
        names: one a column; by default x1, x2, ...

    Raises:
        ValueError: tables of different width, or names that do not fit.

    Example:
        >>> import torch
        >>> from flowpath import plot
        >>> len(plot.pairs(torch.randn(50, 3), torch.randn(60, 3)).axes)
        9
    """
    x, y = _numbers(data), _numbers(samples)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"pairs expects two tables with the same columns, got shapes {x.shape} and {y.shape}")
    d = x.shape[1]
    titles = [f"x{i + 1}" for i in range(d)] if names is None else list(names)
    if len(titles) != d:
        raise ValueError(f"pairs expects {d} names, got {len(titles)}")
    fig = _figure(1.6 * d + 0.4, 1.6 * d + 0.4)
    for row, panels in enumerate(fig.subplots(d, d, squeeze=False)):
        for column, axes in enumerate(panels):
            frames = _frame(x[:, column]), _frame(x[:, row])
            if row == column:
                _histograms(axes, x[:, row], y[:, row], frames[0])
            else:
                _cloud(axes, *((x, _DATA) if row > column else (y, _MODEL)), column, row)
                axes.set(xlim=frames[0], ylim=frames[1])
            axes.set(xticks=[], yticks=[])
            axes.set(xlabel=titles[column] if row == d - 1 else "", ylabel=titles[row] if column == 0 else "")
    return fig


def density(log_density: Array, extent: tuple[float, float, float, float], points: Array | None = None) -> Figure:
    """A density in the plane, shaded by its square root so that faint bridges between modes show.

    Args:
        log_density: `(H, W)` in nats, on the centres of a grid; the first row is the lowest.
        extent: left, right, bottom, top of the grid.
        points: rows `(N, 2)` to lay over it, or None.

    Raises:
        ValueError: `log_density` is no matrix, or `points` no table of two columns.

    Example:
        >>> import torch
        >>> from flowpath import plot
        >>> figure = plot.density(-torch.rand(8, 8), (-1, 1, -1, 1))
    """
    shade = np.exp(0.5 * _numbers(log_density))
    if shade.ndim != 2:
        raise ValueError(f"density expects a matrix of log densities, got shape {shade.shape}")
    fig = _figure(4.2, 4.2)
    axes = fig.subplots()
    axes.imshow(shade, origin="lower", extent=extent, cmap="Greys", vmin=0.0, aspect="equal")
    if points is not None:
        xy = _numbers(points)
        if xy.ndim != 2 or xy.shape[1] != 2:
            raise ValueError(f"density expects points with 2 columns, got shape {xy.shape}")
        axes.plot(xy[:_POINTS, 0], xy[:_POINTS, 1], ".", color=_MODEL, markersize=1.5, alpha=0.5)
        axes.set(xlim=extent[:2], ylim=extent[2:])
    return fig


def images(data: Array, samples: Array, shape: tuple[int, int]) -> Figure:
    """Rows as small grey pictures, up to 100 data on the left and 100 samples on the right, on one scale of grey.

    Args:
        data, samples: `(N, H * W)` and `(M, H * W)`.
        shape: (H, W).

    Raises:
        ValueError: rows that are no pictures of that shape.

    Example:
        >>> import torch
        >>> from flowpath import plot
        >>> figure = plot.images(torch.rand(30, 64), torch.rand(30, 64), (8, 8))
    """
    x, y = _numbers(data), _numbers(samples)
    for rows in (x, y):
        if rows.ndim != 2 or rows.shape[1] != shape[0] * shape[1]:
            raise ValueError(f"images expects rows of {shape[0]} x {shape[1]} pixels, got shape {rows.shape}")
    fig = _figure(8.4, 4.5)
    for axes, title, rows in zip(fig.subplots(1, 2), ("data", "samples"), (x, y), strict=True):
        axes.imshow(_sheet(rows, shape), cmap="Greys", vmin=x.min(), vmax=x.max())
        axes.set(title=title, xticks=[], yticks=[])
    return fig


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("flowpath.plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def _numbers(x: Array) -> np.ndarray:
    values: Any = x.detach().cpu() if isinstance(x, torch.Tensor) else x
    return np.asarray(values, dtype=float)


def _histograms(axes: Axes, x: np.ndarray, y: np.ndarray, frame: tuple[float, float]) -> None:
    edges = np.linspace(*frame, 41).tolist()
    axes.hist(x, edges, density=True, color=_DATA, alpha=0.4)
    axes.hist(y, edges, density=True, color=_MODEL, histtype="step")


def _cloud(axes: Axes, rows: np.ndarray, colour: str, i: int, j: int) -> None:
    axes.plot(rows[:_POINTS, i], rows[:_POINTS, j], ".", color=colour, markersize=1.5, alpha=0.3)


def _frame(x: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(x, [0.001, 0.999])
    margin = 0.1 * (high - low) + 1e-9
    return float(low - margin), float(high + margin)


def _sheet(rows: np.ndarray, shape: tuple[int, int], side: int = 10) -> np.ndarray:
    """Up to side^2 pictures laid out as one, with a blank line between them."""
    sheet = np.full((side, side, shape[0] + 1, shape[1] + 1), np.nan)
    for k, row in enumerate(rows[: side * side]):
        sheet[k // side, k % side, :-1, :-1] = row.reshape(shape)
    return sheet.swapaxes(1, 2).reshape(side * (shape[0] + 1), side * (shape[1] + 1))
