"""What a fit to a table is built with where the user does not say."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flowpath.architectures import architectures
from flowpath.flow import Flow
from flowpath.tables.columns import near
from flowpath.tables.layout import Layout
from flowpath.transform import Chain

SMALL = 2000  # rows below which a table is small
# Chosen by held-out score, see docs/tables.md. With this dropout, full whitening was worse on all three tables there.
_SMALL_FLOW = {"dropout": 0.4, "hidden_features": (64, 64), "transforms": 3}

Architecture = str | Callable[..., Flow]


def build(
    architecture: Architecture, layout: Layout, context: int, asked: Mapping[str, Any], small: bool
) -> tuple[Flow, list[str]]:
    """A flow over the cells of a table, and notes on what was chosen for it.

    Args:
        architecture: the name of one, or a function (features, context, **options) -> Flow.
        layout: the columns' supports, whose map becomes the flow's first layer.
        context: width of the context.
        asked: options the user set; they win over the preset's.
        small: whether to take the preset of small tables.

    Raises:
        ValueError: no such architecture; an option it does not take. TypeError: no Flow came out.
    """
    make = _function(architecture)
    takes = inspect.signature(make).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    wrong = [name for name in asked if name not in takes and not free]
    if wrong:
        raise ValueError(f"FlowDensity: {make.__name__} takes no {wrong[0]}{near(wrong[0], [*takes])}")
    options = {**({k: v for k, v in _SMALL_FLOW.items() if k in takes} if small else {}), **asked}
    notes = ["few rows: built with " + ", ".join(f"{k}={v!r}" for k, v in options.items())] if small and options else []
    flow = make(len(layout.supports), context, **options)
    if not isinstance(flow, Flow):
        raise TypeError(f"FlowDensity expects architecture to give a Flow, got {type(flow).__name__}")
    first = layout.transform()
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
