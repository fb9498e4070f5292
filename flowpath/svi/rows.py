"""The density of all the data of a model that subsamples, in blocks of the model's own size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowpath.svi.handlers import Block
from flowpath.svi.looking import ModelError, Rows, scores

if TYPE_CHECKING:
    from flowpath.svi.density import ModelDensity


def all_rows(density: ModelDensity) -> Callable[[Tensor], Tensor]:
    """log p at u `(P, D)` with every row of the plate that subsamples. See `ModelDensity.of_all_data`."""
    if len(density.subsampled) > 1:
        raise ModelError(f"several plates subsample ({', '.join(density.subsampled)})")
    (name, rows), *_ = density.subsampled.items()
    _refuse_minibatch(density, name, rows)

    def whole(u: Tensor) -> Tensor:
        return sum(
            (_add(density, u, name, block, fresh) for block, fresh in _blocks(rows, density.device)),
            torch.zeros((), dtype=u.dtype, device=u.device),
        )

    return whole


def _blocks(rows: Rows, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Row numbers `(shown,)`, and which of them no block before had: the last block overlaps the one before it."""
    for start in range(0, rows.size, rows.shown):
        first = min(start, rows.size - rows.shown)
        block = torch.arange(first, first + rows.shown, device=device)
        yield block, block >= start


def _add(density: ModelDensity, u: Tensor, name: str, block: Tensor, fresh: Tensor) -> Tensor:
    """What a block adds to log p at u `(P, D)`: its fresh rows, and with the first block the sites outside."""
    if density.mode == "plate":
        return _add_of(density, u, name, block, fresh)
    return torch.stack([_add_of(density, row, name, block, fresh) for row in u])


def _add_of(density: ModelDensity, u: Tensor, name: str, block: Tensor, fresh: Tensor) -> Tensor:
    trace, place = density.run(u, Block({name: block}))
    first = int(block[0]) == 0
    total = place.ladj if first else torch.zeros_like(place.ladj)
    for site in scores(trace):
        frame = next((f for f in site["cond_indep_stack"] if f.name == name), None)
        if frame is not None:
            total = total + density.by_point(_share(site["log_prob"], frame, fresh, density.subsampled[name]), u)
        elif first:
            total = total + density.by_point(site["log_prob"], u)
    return total


def _share(log_prob: Tensor, frame: Any, fresh: Tensor, rows: Rows) -> Tensor:
    """The log density without the plate's scale, 0 in rows that are not fresh."""
    if frame.vectorized:
        counted = fresh.reshape(-1, *(1,) * (-frame.dim - 1))
    else:  # a loop over rows, with a site for each
        counted = fresh[frame.counter - 1]
    return torch.where(counted, log_prob * (rows.shown / rows.size), 0.0)


def _refuse_minibatch(density: ModelDensity, name: str, rows: Rows) -> None:
    """Whether the model takes its rows by the plate's indices, seen by its densities of other blocks of rows."""
    first: list[Tensor] | None = None
    for block, _ in _blocks(rows, density.device):
        with torch.no_grad():
            trace, _ = density.run(density.start, Block({name: block}))
        found = [s["log_prob"] for s in scores(trace) if any(f.name == name for f in s["cond_indep_stack"])]
        first = found if first is None else first
        if len(found) != len(first) or not all(map(torch.equal, first, found)):
            return
    raise ModelError(
        f"the model is given a minibatch of plate {name!r} instead of taking its rows by the plate's indices, so the "
        "density of all the data cannot be had"
    )
