"""A posterior's files: a flow, and the draws that it was judged on, without pickle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowpath.io import load, save, storage
from flowpath.svi.climbing import Judgement
from flowpath.svi.density import ModelDensity
from flowpath.svi.promotion import promoted

if TYPE_CHECKING:
    from flowpath.svi.posterior import Posterior

_KEY, _FORMAT = "flowpath-posterior", 1
_FLOW, _REST = "flow.safetensors", "posterior.safetensors"
_PLAIN = ("history", "notes", "unjudged", "missed", "reason", "seconds", "steps", "others")


def write(posterior: Posterior, folder: Path) -> None:
    """See `Posterior.save`."""
    folder.mkdir(parents=True, exist_ok=True)
    save(posterior.flow, folder / _FLOW)
    held = posterior.held
    tensors = {"u": held.u, **{f"value/{n}": v for n, v in held.values.items()}}
    if held.log_weights is not None:
        tensors["log_weights"] = held.log_weights
    judged = None if posterior.judgement is None else vars(posterior.judgement)
    config = {"format": _FORMAT, "judgement": judged, **{key: getattr(posterior, key) for key in _PLAIN}}
    storage.write(folder / _REST, tensors, _KEY, config)


def read(
    folder: Path, model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a Posterior is made of. See `Posterior.load`."""
    from flowpath.svi.posterior import Held

    tensors, config = storage.read(folder / _REST, _KEY, "Posterior.load")
    storage.check_format(config, _FORMAT, folder / _REST, "Posterior.load")
    flow = load(folder / _FLOW)
    density = None if model is None else promoted(ModelDensity(model, args, kwargs))
    if density is not None and torch.Size([density.dim]) != flow.event_shape:
        raise ValueError(
            f"Posterior.load: the model has {density.dim} unconstrained latents with these arguments, the "
            f"posterior {flow.event_shape[0]}"
        )
    if density is not None:
        flow, tensors = flow.to(density.device), {n: t.to(density.device) for n, t in tensors.items()}
    values = {n.removeprefix("value/"): v for n, v in tensors.items() if n.startswith("value/")}
    judged = config["judgement"]
    return {
        "flow": flow,
        "judgement": None if judged is None else Judgement(**judged),
        "held": Held(tensors["u"], values, tensors.get("log_weights")),
        "density": density,
        **{key: config[key] for key in _PLAIN},
    }
