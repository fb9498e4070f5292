"""What a fit to a table is built with where the user does not say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowpath.architectures import architectures
from flowpath.flow import Flow
from flowpath.tables.columns import near
from flowpath.tables.layout import Layout
from flowpath.transform import Chain
from flowpath.transforms.normalization import Whiten

SMALL = 2000  # rows below which a table is small
_SMALL_FLOW = {"whiten": "full", "dropout": 0.4, "hidden_features": (64, 64), "transforms": 3}

Architecture = str | Callable[..., Flow]


def build(
    architecture: Architecture, layout: Layout, context: int, asked: Mapping[str, Any], small: bool, x: Tensor
) -> tuple[Flow, list[str]]:
    """A flow over the cells of a table, and notes on what was chosen for it.

    Args:
        architecture: the name of one, or a function (features, context, **options) -> Flow.
        layout: the columns' supports, whose map becomes the flow's first layer.
        context: width of the context.
        asked: options the user set; they win over the preset's.
        small: whether to take the preset of small tables.
        x: training rows, dequantised: full whitening is left where they are linearly dependent.

    Raises:
        ValueError: no such architecture; an option it does not take. TypeError: no Flow came out.
    """
    make = _function(architecture)
    takes = inspect.signature(make).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    wrong = [name for name in asked if name not in takes and not free]
    if wrong:
        raise ValueError(f"FlowDensity: {make.__name__} takes no {wrong[0]}{near(wrong[0], [*takes])}")
    preset = {k: v for k, v in _SMALL_FLOW.items() if k in takes} if small else {}
    options, notes = {**preset, **asked}, []
    if preset:
        notes.append(f"{len(x)} rows are few: built with " + ", ".join(f"{k}={v!r}" for k, v in options.items()))
    first = layout.transform()
    if options.get("whiten") == "full" and "whiten" not in asked and not _independent(x, first):
        options["whiten"] = "diagonal"
        notes.append('columns are linearly dependent: whitened with "diagonal" in place of "full"')
    flow = make(x.shape[1], context, **options)
    if not isinstance(flow, Flow):
        raise TypeError(f"FlowDensity expects architecture to give a Flow, got {type(flow).__name__}")
    if first is None:
        return flow, notes
    return Flow(Chain([first, flow.transform]), flow.base, flow.embedding), notes


def _function(architecture: Architecture) -> Callable[..., Flow]:
    if callable(architecture):
        return architecture
    if architecture not in architectures:
        raise ValueError(
            f"FlowDensity knows no architecture {architecture!r}{near(str(architecture), [*architectures])}"
        )
    return architectures[architecture]


def _independent(x: Tensor, first: Any) -> bool:
    """Whether full whitening is possible: no column, mapped to the whole space, is a linear function of the others."""
    y = x if first is None else first._forward(x, None)[0]
    try:
        Whiten(y.shape[1], "full").set_from(y)
    except ValueError:
        return False
    return True
