"""Standardising layers: Whiten, set once from data, and ActNorm, learnt from its first batch on."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowpath.registry import register
from flowpath.standardize import Float64Scale
from flowpath.transform import Record, Transform


@register("Whiten")
class Whiten(Float64Scale, Transform):
    r"""z = (x - m) / s, or with mode "full" z = L^{-1}(x - m), LL^T the covariance: fixed once set from data.

    The identity until `set_from(x)`. Its numbers are kept, and its arithmetic done, in float64 whatever the dtype of
    the flow, so that columns like Julian dates (2459000.00001) keep their digits; the result has x's dtype.

    Args:
        features: width of the event.
        mode: "diagonal" or "full".

    Raises:
        ValueError: another mode; `set_from`: fewer than two rows, a constant column or, with "full", duplicate columns.

    Example:
        >>> import torch, flowpath as fp
        >>> x = 5 + 3 * torch.randn(1000, 2)
        >>> z, _ = fp.Whiten(2).set_from(x)(x)
        >>> bool((z.mean(0).abs() < 1e-4).all()), bool((z.std(0) - 1 < 1e-3).all())
        (True, True)
    """

    context = None
    loc: Tensor
    scale: Tensor
    is_set: Tensor

    def __init__(self, features: int, mode: Literal["diagonal", "full"] = "diagonal") -> None:
        super().__init__(features)
        if mode not in ("diagonal", "full"):
            raise ValueError(f'Whiten expects mode "diagonal" or "full", got {mode!r}')
        self.mode = mode
        one = torch.ones(features, dtype=torch.float64)
        self.register_buffer("loc", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("scale", one if mode == "diagonal" else torch.diag(one))
        self.register_buffer("is_set", torch.tensor(False))

    @torch.no_grad()
    def set_from(self, x: Tensor, weights: Tensor | None = None) -> Whiten:
        """Take mean and scale from rows x `(N, features)`, weighted by `weights` `(N,)`; returns self."""
        rows = x.detach().to(self.loc.device, torch.float64).reshape(-1, self.loc.shape[0])
        w = _row_weights(rows, weights)
        if len(rows) < 2:
            raise ValueError(f"Whiten.set_from expects at least 2 rows, got {len(rows)}")
        loc = w @ rows
        centred = rows - loc
        std = (w @ centred.square()).sqrt()
        _refuse_constant(std, loc)
        scale = std if self.mode == "diagonal" else _cholesky(centred, w, std)
        return self.set_to(loc, scale)

    @torch.no_grad()
    def set_to(self, loc: Tensor, scale: Tensor) -> Whiten:
        """Take a location and a scale, standard deviations `(features,)` or with "full" the factor L; returns self."""
        if loc.shape != self.loc.shape or scale.shape != self.scale.shape:
            raise ValueError(
                f"Whiten.set_to expects loc {tuple(self.loc.shape)} and scale {tuple(self.scale.shape)}, got "
                f"{tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        size = scale if self.mode == "diagonal" else scale.diagonal()
        if not bool(loc.isfinite().all() and scale.isfinite().all() and (size > 0).all()):
            raise ValueError(
                f"Whiten.set_to expects a finite loc and a scale that is finite and positive, got {loc} and {scale}"
            )
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.is_set.fill_(True)
        return self

    def pull_score(self, record: Record, score: Tensor) -> Tensor:
        """score J^-1 for the constant Jacobian J of the direction."""
        wide = score.double()
        if record.direction == "forward":
            pulled = wide * self.scale if self.mode == "diagonal" else wide @ self.scale
        elif self.mode == "diagonal":
            pulled = wide / self.scale
        else:
            rows = wide if wide.dim() > 1 else wide.unsqueeze(0)
            pulled = torch.linalg.solve_triangular(self.scale, rows, upper=False, left=False).reshape(wide.shape)
        return pulled.to(score.dtype)

    def _log_scale(self) -> Tensor:
        return (self.scale if self.mode == "diagonal" else self.scale.diagonal()).log().sum()

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        centred = x.double() - self.loc
        if self.mode == "diagonal":
            z = centred / self.scale
        else:
            rows = centred if centred.dim() > 1 else centred.unsqueeze(0)
            z = torch.linalg.solve_triangular(self.scale.T, rows, upper=True, left=False).reshape(centred.shape)
        return z.to(x.dtype), -self._log_scale().to(x.dtype).expand(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = z.double()
        x = wide * self.scale if self.mode == "diagonal" else wide @ self.scale.T
        return (x + self.loc).to(z.dtype), self._log_scale().to(z.dtype).expand(z.shape[:-1])


def _row_weights(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Weights that sum to one; negative ones do not help to place a scale and count as zero."""
    if weights is None:
        return rows.new_full((len(rows),), 1.0 / max(len(rows), 1))
    w = weights.detach().to(rows).clamp_min(0.0)
    return w / w.sum()


def _refuse_constant(std: Tensor, loc: Tensor) -> None:
    constant = (std <= 1e-14 * loc.abs()).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"Whiten.set_from: columns {constant} are constant, so a density has no width there; drop them, or use "
            "them as context"
        )


def _cholesky(centred: Tensor, w: Tensor, std: Tensor) -> Tensor:
    unit = centred / std
    correlation = (unit * w.unsqueeze(-1)).T @ unit
    lower, info = torch.linalg.cholesky_ex(correlation)
    if int(info) or float(lower.diagonal().min()) < 1e-6:
        first = int(info) - 1 if int(info) else int(lower.diagonal().argmin())
        raise ValueError(
            f"Whiten.set_from: column {first} is, to rounding, a linear function of the columns before it (a "
            'duplicate?); drop it, or use mode="diagonal"'
        )
    return lower * std.unsqueeze(-1)


@register("ActNorm")
class ActNorm(Transform):
    r"""z = (x - m) / s with learnt m and s, set from the first batch it sees in training mode.

    ladj = -sum log s. "Glow" (Kingma, Dhariwal 2018, arXiv:1807.03039), section 3.1.

    Args:
        features: width of the event.

    Raises:
        ValueError: the first training batch has a single row, from which no scale can be taken.

    Example:
        >>> import torch, flowpath as fp
        >>> z, _ = fp.ActNorm(2)(3 + 2 * torch.randn(500, 2))
        >>> bool((z.std(0) - 1 < 1e-3).all())
        True
    """

    context = None
    is_set: Tensor

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.loc = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.register_buffer("is_set", torch.tensor(False))
        self._waiting = True  # the buffer's negation, on the host: reading the buffer would sync a GPU each call

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._waiting = not bool(self.is_set)

    @torch.no_grad()
    def set_from(self, x: Tensor) -> ActNorm:
        """Take mean and scale from rows x `(*batch, features)`; returns self."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if len(rows) < 2:
            raise ValueError(f"ActNorm takes its scale from its first training batch: expected 2 rows, got {len(rows)}")
        self.loc.copy_(rows.mean(0))
        self.log_scale.copy_(rows.std(0).clamp_min(1e-6).log())
        self.is_set.fill_(True)
        self._waiting = False
        return self

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._waiting and self.training:
            self.set_from(x)
        z = (x - self.loc) * (-self.log_scale).exp()
        return z, -self.log_scale.sum().expand(x.shape[:-1])

    def _inverse(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return z * self.log_scale.exp() + self.loc, self.log_scale.sum().expand(z.shape[:-1])
