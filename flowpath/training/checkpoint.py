"""Checkpoints of a fit: all that is needed to go on as if it had never been stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowpath.io import storage

if TYPE_CHECKING:
    from flowpath.training.loop import Loop, State

KEY, FORMAT = "flowpath-checkpoint", 1
_SHARE = 10.0  # a checkpoint is written when the training since the last one took so many times its cost
_WITHIN_EPOCH = 60.0  # seconds between checkpoints inside a long epoch


def file_of(path: str | os.PathLike[str]) -> Path:
    """The checkpoint's file: the path itself, or checkpoint.safetensors in the folder it names."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "checkpoint.safetensors"


class Checkpoint:
    """Writes a loop's state to one safetensors file, atomically: after epochs, each minute of a long one, and last.

    Cheap fits are not slowed: it waits until training took ten times what the last writing took.

    Args:
        path: a folder, or a file that ends in .safetensors.
        identity: numbers and words that must be the same when the fit goes on: rows, batch size, ...
        resumed: the file this fit goes on from, which it may overwrite.

    Raises:
        FileExistsError: there is a checkpoint of an unfinished fit, or a file of another kind.
        OSError: the folder cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], identity: dict[str, Any], resumed: str | os.PathLike[str] | None = None
    ) -> None:
        self.path, self._identity = file_of(path), identity
        self._last, self._cost, self._written, self._complained = time.perf_counter(), 0.0, False, False
        mine = resumed is not None and file_of(resumed).resolve() == self.path.resolve()
        if self.path.exists() and not mine:
            _refuse_overwriting(self.path)
        _try_folder(self.path.parent)

    def due(self, at: str) -> bool:
        """Whether to write at this "step", "epoch" or "end"."""
        wait = _SHARE * self._cost if at == "epoch" else max(_SHARE * self._cost, _WITHIN_EPOCH)
        return at == "end" or time.perf_counter() - self._last >= wait

    def write(self, loop: Loop) -> None:
        """Write where the loop stands. A later writing that fails is told once, and what was there stays."""
        started = time.perf_counter()
        try:
            storage.write(self.path, _tensors(loop), KEY, self._config(loop))
        except TypeError as error:
            raise TypeError(f"fit: the optimizer or schedule has a state no checkpoint can hold: {error}") from None
        except OSError as error:
            if not self._written:
                raise
            if not self._complained:
                warnings.warn(f"fit: no checkpoint written, the one before stays: {error}", stacklevel=2)
            self._complained = True
        self._last, self._written = time.perf_counter(), True
        self._cost = self._last - started

    def _config(self, loop: Loop) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in loop.optimizer.state_dict()["param_groups"]]
        return {
            "format": FORMAT,
            "identity": self._identity,
            "state": loop.state.as_json(),
            "schedule": loop.schedule.state_dict(),
            "optimizer": {"groups": groups, "scalars": _optimizer_scalars(loop.optimizer)},
        }


@dataclass(frozen=True)
class Resumed:
    """A checkpoint that was read: `identity` is what its fit was called with."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Resumed:
        """Read a checkpoint.

        Raises:
            FileNotFoundError, ValueError: there is none, or it is damaged, foreign or newer.
        """
        file = file_of(path)
        tensors, config = storage.read(file, KEY, "fit")
        storage.check_format(config, FORMAT, file, "fit")
        return cls(file, tensors, config)

    @property
    def identity(self) -> dict[str, Any]:
        return self.config["identity"]

    def check(self, identity: dict[str, Any]) -> None:
        """The same rows and sizes as the fit that wrote it, or an error that says what differs."""
        for name, now in identity.items():
            then = self.identity.get(name)
            if then != now:
                raise ValueError(
                    f"fit: {self.path} was written with {name} = {then}, this fit has {now}; resume with the same "
                    "rows and sizes, or start anew without resume="
                )

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def weights_into(self, kept: nn.Module) -> None:
        """Put the weights in place; a flow built otherwise is refused."""
        try:
            kept.load_state_dict(self.part("now/"))
        except RuntimeError as error:
            raise ValueError(
                f"fit: the weights in {self.path} are of another flow; build it as for the fit that wrote them: {error}"
            ) from None

    def into(self, loop: Loop) -> None:
        """Set loop, optimizer, schedule and random numbers to where the fit stood."""
        self.weights_into(loop.kept)
        device = next(iter(loop.parameters)).device
        loop.best = {k: v.to(device) for k, v in self.part("best/").items()}
        held = {f.name for f in fields(loop.state)}
        for name, value in self.config["state"].items():
            if name in held:
                setattr(loop.state, name, value)
        _reopen(loop.state)
        loop.optimizer.load_state_dict(self._optimizer_state(loop.optimizer))
        loop.schedule.load_state_dict(self.config["schedule"])
        torch.set_rng_state(self.tensors["rng/cpu"])
        if device.type == "cuda" and "rng/cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["rng/cuda"], device)

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        groups = optimizer.state_dict()["param_groups"]
        kept = self.config["optimizer"]
        if len(groups) != len(kept["groups"]):
            raise ValueError(f"fit: the optimizer has {len(groups)} groups, {self.path} holds {len(kept['groups'])}")
        state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in kept["scalars"].items()}
        for name, tensor in self.part("optimizer/").items():
            i, _, slot = name.partition("/")
            state.setdefault(int(i), {})[slot] = tensor
        merged = [{**k, "params": g["params"]} for g, k in zip(groups, kept["groups"], strict=True)]
        return {"state": state, "param_groups": merged}


def _reopen(state: State) -> None:
    state.stop, state.stop_reason = False, None


def _tensors(loop: Loop) -> dict[str, Tensor]:
    held = {f"now/{k}": v for k, v in loop.kept.state_dict().items()}
    held |= {f"best/{k}": v for k, v in loop.best.items()}
    for i, slots in loop.optimizer.state_dict()["state"].items():
        held |= {f"optimizer/{i}/{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
    held["rng/cpu"] = torch.get_rng_state()
    device = next(iter(loop.parameters)).device
    if device.type == "cuda":
        held["rng/cuda"] = torch.cuda.get_rng_state(device)
    return held


def _optimizer_scalars(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    state = optimizer.state_dict()["state"]
    return {str(i): {k: v for k, v in slots.items() if not isinstance(v, Tensor)} for i, slots in state.items()}


def _refuse_overwriting(path: Path) -> None:
    config = storage.read_config(path, KEY)
    if config is None:
        raise FileExistsError(f"fit: checkpoint={path} is a file of another kind, not overwritten; name another")
    state = config.get("state", {})
    if state.get("stop_reason") in (None, "interrupted"):
        raise FileExistsError(
            f"fit: {path} holds an unfinished fit ({state.get('epoch', 0)} epochs); go on with "
            f"resume={str(path)!r}, or delete the file to start anew"
        )


def _try_folder(folder: Path) -> None:
    """Find out before training, not an hour into it, that nothing can be written."""
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f".flowpath-{os.getpid()}.tmp"
    trial.touch()
    trial.unlink()


class Signals:
    """While entered, Ctrl-C and SIGTERM are noted for the loop to end at its next step; a second one acts at once.

    Handlers are put back on leaving. Outside the main thread nothing is caught.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def pass_on(self, heard: int | None = None) -> None:
        """Hand a SIGTERM to the handler that was there: the process was asked to end, and the work is safe now.

        `heard` is one that another process of the fit received.
        """
        if signal.SIGTERM in (self.received, heard):
            signal.raise_signal(signal.SIGTERM)
