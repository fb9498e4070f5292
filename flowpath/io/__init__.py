"""Saving and loading flows: one safetensors file, weights and a JSON description. No pickle anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowpath.flow import Flow
from flowpath.io import storage
from flowpath.io.decoding import Decoder
from flowpath.io.encoding import Encoder
from flowpath.registry import register
from flowpath.scope import versions

__all__ = ["load", "register", "save"]

KEY, FORMAT = "flowpath", 1
_ARGUMENT = "argument/"


def save(flow: Flow, path: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None) -> Path:
    """Write a flow to one .safetensors file: its weights, and in the metadata, as JSON, what it is made of.

    The file is tried before it is written: a flow is built from the description and must hold the same tensors. It
    is written whole or not at all.

    Args:
        flow: a Flow of registered parts; torch.nn modules, torch transforms and torch distributions are known too.
        path: where to; a folder means flow.safetensors in it.
        training: JSON values to keep with it, such as `FitResult.training()`.

    Returns:
        The file written.

    Raises:
        TypeError: no Flow, or a part that is not registered; it is named, and `@fp.register` is what to add.
        ValueError: the description does not give the flow again, because a part was changed after it was built.
        OSError: the place cannot be written; what was there stays.

    Example:
        >>> import tempfile, torch, flowpath as fp
        >>> flow = fp.nsf(3, transforms=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = fp.load(fp.save(flow, folder + "/flow.safetensors"))
        >>> torch.equal(again.log_prob(torch.ones(1, 3)), flow.log_prob(torch.ones(1, 3)))
        True
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"save expects a Flow, got {type(flow).__name__}")
    encoder = Encoder()
    config = {
        "format": FORMAT,
        "versions": versions(),
        "flow": encoder.encode(flow, "flow"),
        "dtype": str(_dtype(flow)).removeprefix("torch."),
        "frozen": [name for name, p in flow.named_parameters() if not p.requires_grad],
        "training": None if training is None else dict(training),
    }
    state = flow.state_dict()
    taken = [name for name in state if name.startswith(_ARGUMENT)]
    tensors = {**state, **encoder.tensors}
    if taken:
        raise ValueError(f"save: the flow has a tensor {taken[0]!r}; names that begin with {_ARGUMENT!r} are taken")
    _check_rebuilds(flow, json.loads(json.dumps(config)), tensors)
    path = _file_of(Path(path))
    storage.write(path, tensors, KEY, config)
    return path


def load(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> Flow:
    """The flow that `save` wrote, in eval mode.

    Only parts in flowpath's registry are built, so a file can run no code of its own; a file with parts of yours needs
    the module that registers them to be imported first.

    Args:
        path: the file, or a folder with flow.safetensors in it.
        map_location: the device to put it on, whatever device it was saved from.

    Raises:
        FileNotFoundError: no such file; names like it are listed.
        ValueError: a file that is cut short, foreign, damaged or of a newer format; an unknown part; a tensor that is
            missing or has another shape.
    """
    path = _file_of(Path(path))
    tensors, config = storage.read(path, KEY, "load")
    storage.check_format(config, FORMAT, path, "load")
    flow = _rebuilt(config, tensors, str(path))
    return flow.to(map_location).eval()


def _file_of(path: Path) -> Path:
    return path / "flow.safetensors" if path.is_dir() else path


def _dtype(flow: Flow) -> torch.dtype:
    return next((p.dtype for p in flow.parameters() if p.is_floating_point()), flow.base.like.dtype)


def _check_rebuilds(flow: Flow, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    on_cpu = {name: t.detach().cpu() for name, t in tensors.items()}
    try:
        _rebuilt(config, on_cpu, "the flow")
    except ValueError as error:
        raise ValueError(
            "save: this flow cannot be built again from the arguments its parts were made with, so nothing was "
            f"written ({error}); build it anew from its present parts"
        ) from None


def _rebuilt(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> Flow:
    """A flow from its description, the tensors put in place bit for bit."""
    missing = [key for key in ("flow", "dtype", "frozen") if key not in config]
    if missing:
        raise ValueError(f"load: the description in {source} is damaged: no {missing[0]!r}")
    with _random_state_kept():
        flow = Decoder(tensors, source).decode(config["flow"])
    if not isinstance(flow, Flow):
        raise ValueError(f"load: {source} describes a {type(flow).__name__}, not a Flow")
    flow.to(getattr(torch, config["dtype"]))
    state = {name: t for name, t in tensors.items() if not name.startswith(_ARGUMENT)}
    _check_tensors(flow, state, source)
    flow.load_state_dict({name: t.clone() for name, t in state.items()}, assign=True)
    _freeze(flow, config["frozen"])
    return flow


def _check_tensors(flow: nn.Module, state: dict[str, Tensor], source: str) -> None:
    want = flow.state_dict()
    for name in want.keys() ^ state.keys():
        there = "lacks" if name in want else "holds, unasked,"
        raise ValueError(f"load: {source} {there} the tensor {name!r}")
    for name, t in want.items():
        if state[name].shape != t.shape:
            raise ValueError(
                f"load: {source} holds {name!r} of shape {tuple(state[name].shape)}, the flow it describes expects "
                f"{tuple(t.shape)}"
            )


def _freeze(flow: nn.Module, frozen: list[str]) -> None:
    held = set(frozen)
    for name, p in flow.named_parameters():
        p.requires_grad_(name not in held)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Building draws initial weights, which are replaced: torch's random state is put back."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
