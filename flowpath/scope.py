"""What a fit borrows and gives back: the flow's device and mode, torch's random state."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from flowpath.flow import Flow


@contextmanager
def random(seed: int | None, resumed: bool, device: torch.device) -> Iterator[None]:
    """With a seed, or where a checkpoint brings its own: torch's random state, put back afterwards."""
    if seed is None and not resumed:
        yield
        return
    cuda = None if device.type != "cuda" else torch.cuda.get_rng_state(device)
    cpu = torch.get_rng_state()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if cuda is not None:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


@contextmanager
def lent(flow: Flow, home: torch.device, away: torch.device) -> Iterator[None]:
    """The flow on the training device and in training mode; at home, in eval mode and without gradients afterwards."""
    flow.to(away).train()
    try:
        yield
    finally:
        flow.to(home).eval()
        flow.zero_grad(set_to_none=True)


def devices(flow: Flow | str, device: str | torch.device) -> tuple[torch.device, torch.device]:
    """Where the flow is, and where it will be trained."""
    if not isinstance(flow, str | Flow):
        raise TypeError(f"fit expects a Flow or the name of an architecture, got {type(flow).__name__}")
    held = [] if isinstance(flow, str) else sorted({str(t.device) for t in chain(flow.parameters(), flow.buffers())})
    if len(held) > 1:
        raise ValueError(f"fit: the flow is on more than one device ({', '.join(held)}); move it with .to(device)")
    home = torch.device(held[0] if held else "cpu")
    if device == "auto":
        return home, _own_gpu() if home.type == "cpu" and torch.cuda.is_available() else home
    away = torch.device(device)
    if away.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"fit: device={str(device)!r}, but torch {torch.__version__} sees no CUDA device here")
    return home, _own_gpu() if away == torch.device("cuda") else away


def _own_gpu() -> torch.device:
    """The GPU; under torchrun, which sets LOCAL_RANK, one for each process."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or processes() == 1:
        return torch.device("cuda")
    if int(rank) >= torch.cuda.device_count():
        raise ValueError(
            f"fit: process {rank} of this machine finds {torch.cuda.device_count()} GPUs; start one process a GPU "
            '(torchrun --nproc-per-node=gpu), or fit with device="cpu"'
        )
    return torch.device("cuda", int(rank))


def versions() -> dict[str, str]:
    """flowpath, torch and Python."""
    from flowpath import __version__

    return {"flowpath": __version__, "torch": torch.__version__, "python": platform.python_version()}


def leads() -> bool:
    """Whether this process prints and writes: under torchrun rank 0 alone, otherwise always."""
    return processes() == 1 or os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes fit together: those of a process group that is there, or that torchrun started."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE") or 1)
