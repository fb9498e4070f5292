"""The same density in float64, where a model allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from flowpath.svi.density import ModelDensity
from flowpath.svi.handlers import default_dtype
from flowpath.svi.locating import DENSE


def promoted(density: ModelDensity) -> ModelDensity:
    """The same density in float64, where the model runs and agrees with itself there; else the density itself.

    Above 300 latents it stays as it is: no Hessian needs the digits there, and they would double the cost.
    """
    if density.dtype == torch.float64 or density.dim > DENSE:
        return density
    args, kwargs = pytree.tree_map(_double, (density.args, density.kwargs))
    try:
        with default_dtype(torch.float64):
            wide = ModelDensity(density.model, args, kwargs)
        wide.asked = density.dtype
        u = density.start.unsqueeze(0)
        agrees = torch.isclose(wide(u.double()), density(u).double(), rtol=1e-3, atol=1e-3)
        return wide if wide.dtype == torch.float64 and wide.dim == density.dim and bool(agrees.all()) else density
    except Exception:  # a model with float32 tensors of its own may raise anything
        return density


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
