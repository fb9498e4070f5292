"""flowpath's flows as nflows'."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowpath.flow import Flow

if TYPE_CHECKING:
    from flowpath.interop.nflows_flow import NflowsFlow


def to_nflows(flow: Flow) -> NflowsFlow:
    """A flow as an `nflows.flows.Flow`, for sbi, nessai and whatever else calls one.

    It has nflows' `log_prob(inputs, context)`, `sample(n, context)` of shape `(n, *event)` or `(C, n, *event)` for C
    rows of context, `sample_and_log_prob`, `transform_to_noise`, and the parts that libraries reach for: `_transform`,
    `_distribution`, `_embedding_net`. Unlike nflows' own, it samples in the flow's dtype, and draws in batches come out
    in the right shape. It holds the flow itself as `.flow`, so training one trains the other, and it is pickled and
    copied as modules are. A transform needs no adapter: nflows' containers take it as it is.

    Args:
        flow: any Flow.

    Returns:
        A module; `.flow` is the flow, and `fp.from_nflows` gives it back.

    Raises:
        TypeError: no Flow. ImportError: nflows is not installed.

    Example:
        >>> import torch, flowpath as fp
        >>> flow = fp.to_nflows(fp.nsf(2, context=3))
        >>> flow.sample(10, context=torch.randn(4, 3)).shape
        torch.Size([4, 10, 2])
    """
    if not isinstance(flow, Flow):
        hint = "; nflows' containers take a Transform as it is" if hasattr(flow, "inverse") else ""
        raise TypeError(f"to_nflows expects a flowpath Flow, got {type(flow).__name__}{hint}")
    try:
        from flowpath.interop.nflows_flow import NflowsFlow
    except ModuleNotFoundError as error:
        raise ImportError(f"to_nflows needs {error.name}; pip install nflows") from error
    return NflowsFlow(flow)
