"""Draws of a model's other sites, given draws of its latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from flowpath.svi.handlers import Message


class Given(Messenger):
    """Gives latents the values of one posterior draw, wherever they fit the site's shape."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.used: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"] or msg["fn"].batch_shape + msg["fn"].event_shape != value.shape:
            return
        msg["value"], msg["done"] = value, True
        self.used.add(msg["name"])


@torch.no_grad()
def predict(
    model: Callable[..., Any], draws: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """One run of the model for each draw: site -> `(n, *shape)`, for all sites that are not given."""
    found: dict[str, list[Tensor]] = {}
    for i in range(len(next(iter(draws.values())))):
        given = Given({name: v[i] for name, v in draws.items()})
        with poutine.block(), poutine.trace() as tracer, given:
            model(*args, **kwargs)
        nodes: dict[str, Any] = tracer.trace.nodes
        for name, site in nodes.items():
            if site["type"] == "sample" and not isinstance(site["fn"], _Subsample) and name not in given.used:
                found.setdefault(name, []).append(site["value"])
    return {name: torch.stack(rows) for name, rows in found.items()}
