"""The fixed layers nearest the data, run in float64 ahead of the flow: whitening keeps the digits of raw columns."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowpath.flow import Flow, leaves
from flowpath.interop import TorchTransform
from flowpath.standardize import Standardize
from flowpath.training.rows import Rows
from flowpath.transform import Chain, Transform
from flowpath.transforms.linear import Permutation
from flowpath.transforms.normalization import Whiten

_FIXED = (Whiten, Permutation, TorchTransform)
_CHUNK = 65_536  # rows taken through the front at a time


class Prepared(NamedTuple):
    """Rows behind the front: x and context in the flow's dtype, weights likewise, ladj `(N,)` in float64."""

    x: Tensor
    context: Tensor | None
    weights: Tensor | None
    ladj: Tensor


class Front:
    r"""A flow split in two: the fixed layers nearest the data, run in float64, and `inner`, the Flow behind them.

    .. math:: \log q(x \mid c) = \log q_{inner}(z \mid c') + \text{ladj}, \qquad z = W(x),\; c' = S(c)

    W is the run of leading layers without parameters that ends in a Whiten, S a leading Standardize of the context.
    `inner` shares every module with the flow, so training it trains the flow.

    Args:
        flow: any Flow; without such layers W and S are the identity and `inner` is the flow.
    """

    def __init__(self, flow: Flow) -> None:
        layers = leaves("transform", flow.transform)
        fixed = next((i for i, (_, t) in enumerate(layers) if type(t) not in _FIXED), len(layers))
        last = max((i + 1 for i in range(fixed) if isinstance(layers[i][1], Whiten)), default=0)
        self.flow = flow
        self.layers: list[Transform] = [t for _, t in layers[:last]]
        self.context_layer, embedding = _split_embedding(flow.embedding)
        self.names = [f"{name} {type(t).__name__}" for name, t in layers[last:]]
        self.inner = flow
        if last or self.context_layer is not None:
            rest = [t for _, t in layers[last:]] or [Permutation(range(flow.event_shape[0]))]
            self.inner = Flow(Chain(rest), flow.base, embedding)
            self.inner.checkpoint_layers = flow.checkpoint_layers
        self._warned = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the inner flow computes."""
        held = next(self.flow.parameters(), self.flow.base.like)
        return held.dtype

    @property
    def device(self) -> torch.device:
        """Where the flow is."""
        return next(self.flow.parameters(), self.flow.base.like).device

    def parts(self) -> list[nn.Module]:
        """The modules of the front."""
        return [*self.layers, *([] if self.context_layer is None else [self.context_layer])]

    @torch.no_grad()
    def set_from(self, rows: Rows) -> None:
        """Set each layer that is not yet set from training rows; those set already are kept (a warm start)."""
        x = rows.x.to(self.device)
        for t in self.layers:
            if isinstance(t, Whiten) and not bool(t.is_set):
                t.set_from(x, rows.weights)
            x = t._forward(x, None)[0]
        if self.context_layer is not None and rows.context is not None and not bool(self.context_layer.is_set):
            self.context_layer.set_from(rows.context)

    @torch.no_grad()
    def prepare(self, rows: Rows) -> Prepared:
        """Rows through the front: tensors on the flow's device. Says once where a cast loses digits."""
        whole = [self._chunk(rows, start) for start in range(0, max(len(rows), 1), _CHUNK)]
        columns = list(zip(*whole, strict=True))
        return Prepared(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]

    def _chunk(self, rows: Rows, start: int) -> Prepared:
        part = slice(start, start + _CHUNK)
        x = rows.x[part].to(self.device)
        ladj = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        for t in self.layers:
            x, step = t._forward(x, None)
            ladj = ladj + step
        context = None if rows.context is None else rows.context[part].to(self.device)
        if context is not None and self.context_layer is not None:
            context = self.context_layer(context)
        weights = None if rows.weights is None else rows.weights[part].to(self.device, self.dtype)
        return Prepared(
            self._cast(x, rows.names, "x", "fp.Whiten first in the Chain"),
            None if context is None else self._cast(context, rows.context_names, "context", "embedding=fp.Standardize"),
            weights,
            ladj,
        )

    def _cast(self, values: Tensor, names: tuple[str, ...], what: str, cure: str) -> Tensor:
        cast = values.to(self.dtype)
        if self._warned or self.dtype == torch.float64 or len(values) < 2:
            return cast
        flat = values.flatten(1)
        lost = (flat - cast.double().flatten(1)).abs().amax(0)
        spread = flat.std(0)
        blurred = (lost > 1e-2 * spread).nonzero().flatten().tolist()
        if blurred:
            self._warned = True
            warnings.warn(
                f"column {', '.join(names[i] if names else str(i) for i in blurred[:3])} of {what} loses digits that "
                f"tell its rows apart when cast to {self.dtype}; build the flow with {cure}, or make it .double()",
                stacklevel=2,
            )
        return cast


def _split_embedding(embedding: nn.Module | None) -> tuple[Standardize | None, nn.Module | None]:
    """A leading Standardize, and what remains of the embedding."""
    if isinstance(embedding, Standardize):
        return embedding, None
    if type(embedding) is nn.Sequential and len(embedding) > 1 and isinstance(embedding[0], Standardize):
        return embedding[0], nn.Sequential(*list(embedding)[1:])
    return None, embedding
