"""Fitting a flow to the rows of a table: dequantised, split, and scored as the estimator scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowpath.scope import random
from flowpath.tables.intake import Taken
from flowpath.tables.layout import Layout
from flowpath.tables.presets import SMALL, Architecture, build
from flowpath.tables.scores import log_mass
from flowpath.training.fitting import fit
from flowpath.training.results import FitResult
from flowpath.training.rowchecks import check_trainable
from flowpath.training.rows import Rows, plural

_COPIES, _COPIED = 4, 100_000  # rows with lattices are dequantised so many times, up to so many rows in all
_EPOCHS, _LEAST_STEPS, _BATCH = 100, 2000, 256  # as `fit` has them


@dataclass(frozen=True)
class Plan:
    """What to fit, and how.

    Attributes:
        architecture, options: of the flow.
        regularise: the preset of small tables: True, False or "auto".
        settings: of `fp.fit`.
        dtype: of the fitted flow.
        seed: of weights, noise and training.
    """

    architecture: Architecture
    options: Mapping[str, Any]
    regularise: bool | str
    settings: Mapping[str, Any]
    dtype: torch.dtype
    seed: int


def learn(
    plan: Plan, taken: Taken, rows: Mapping[str, Tensor], layout: Layout, points: Tensor, names: Sequence[str]
) -> tuple[FitResult, list[str]]:
    """Fit to the training rows; returns the result, its held-out scores those of `log_mass`, and notes.

    Args:
        rows: positions of the training, validation and test rows.
        points: of `cell_points`.
        names: of the columns, for messages.

    Raises:
        TypeError, ValueError: as `build` and `fp.fit`.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    copies = max(1, min(_COPIES, _COPIED // max(len(taken.x), 1))) if layout.lattices else 1
    parts = {name: _part(taken, i, layout, copies, generator) for name, i in rows.items() if len(i)}
    train = parts.pop("train", None)
    if train is None:
        count = plural("row", len(taken.x), count=True)
        raise ValueError(f"FlowDensity.fit: of {count} none is left to train on; hold out fewer")
    check_trainable(Rows(train[0], weights=train[2], names=tuple(names)), "FlowDensity.fit")
    small = len(taken.x) < SMALL if plan.regularise == "auto" else bool(plan.regularise)
    width = 0 if taken.context is None else taken.context.shape[1]
    with random(plan.seed, False, torch.device("cpu")):
        flow, notes = build(plan.architecture, layout, width, plan.options, small)
    held = {"validation": parts.get("validation"), "test": parts.get("test")}
    settings = {"progress": False, **_budget(plan.settings, len(train[0]), copies), **held}
    result = fit(flow, train[0], context=train[1], weights=train[2], seed=plan.seed, **settings)
    result.flow.to(plan.dtype)
    if not layout.lattices:
        return result, notes
    notes.append(_counted(copies) + "the history's scores bound those of the cells from below")
    return _rescored(result, taken, rows, layout, points), notes


def _counted(copies: int) -> str:
    again = f" {copies} times over, so an epoch is {copies} passes over the rows" if copies > 1 else ""
    return f"lattices were dequantised{again}; "


def _part(
    taken: Taken, index: Tensor, layout: Layout, copies: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows of one use, dequantised so many times over."""
    index = index.repeat(copies)
    x = layout.dequantise(taken.x[index], generator) if layout.lattices else taken.x[index]
    context, weights = (None if t is None else t[index] for t in (taken.context, taken.weights))
    return x, context, weights


def _budget(settings: Mapping[str, Any], count: int, copies: int) -> dict[str, Any]:
    """Settings of `fit` for rows copied so many times: epochs and patience are counted in passes over the table."""
    held = dict(settings)
    if copies == 1:
        return held
    if held.get("patience") is not None:
        held["patience"] = math.ceil(held["patience"] / copies)
    if held.get("epochs") is not None:
        held["epochs"] = math.ceil(held["epochs"] / copies)
    elif not (held.get("steps") or held.get("time_limit")):
        batches = max(1, count // (held.get("batch_size") or _BATCH))
        held["epochs"] = max(math.ceil(_EPOCHS / copies), math.ceil(_LEAST_STEPS / batches))
    return held


def _rescored(result: FitResult, taken: Taken, rows: Mapping[str, Tensor], layout: Layout, points: Tensor) -> FitResult:
    """The result with held-out scores that are those of cells, not of dequantised rows."""
    found: dict[str, Any] = {"rows": {name: len(i) for name, i in rows.items() if len(i)}}
    for name in ("validation", "test"):
        i = rows[name]
        if len(i):
            context = None if taken.context is None else taken.context[i]
            values = log_mass(result.flow, layout, taken.x[i], context, points)
            w = torch.ones_like(values) if taken.weights is None else taken.weights[i]
            found[f"{name}_log_prob"], found[f"{name}_se"] = _mean_and_error(values, w)
    return replace(result, **found)


def _mean_and_error(values: Tensor, w: Tensor) -> tuple[float, float]:
    """The weighted mean and its standard error."""
    values = torch.where(w == 0, 0.0, values)
    mean = (w * values).sum() / w.sum()
    return float(mean), float((w * (values - mean)).square().sum().sqrt() / w.sum().abs())
