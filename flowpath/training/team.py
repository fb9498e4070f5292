"""The processes that fit together under torchrun: they split each batch and decide as one. One alone is a team too."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from flowpath.scope import processes
from flowpath.training.batches import Batch, Batches, RowBatches
from flowpath.training.compiling import CompileMode

T = TypeVar("T")
_PATIENCE = timedelta(minutes=10)  # how long the others wait for one process, in a callback or a slow read, say
_FROM_TORCHRUN = ("RANK", "MASTER_ADDR", "MASTER_PORT")
_CPU = torch.device("cpu")
_meetings = count()


@dataclass(frozen=True)
class Team:
    """One of `size` processes that fit together. Where `size` is one, every method is what it is without others.

    The methods are collective: all processes call them in the same order.

    Args:
        rank, size: of torch.distributed.
        device: where this process trains, and where what it sends lies.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    _wrapped: list[DistributedDataParallel] = field(default_factory=list, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes, prints and calls the user's functions."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This process's rows out of n."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def share(self, value: T) -> T:
        """The value that rank 0 has."""
        if self.size == 1:
            return value
        held = [value]
        distributed.broadcast_object_list(held, src=0, device=self.device)
        return held[0]

    def gather(self, value: T) -> list[T]:
        """The values of all, by rank."""
        held = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(held, value)
        return held

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def level(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's numbers for all, in place."""
        if self.size > 1:
            for t in tensors:
                distributed.broadcast(t.detach(), src=0)

    def same_weights(self, module: nn.Module) -> None:
        """Rank 0's weights for all, and what a layer remembers of them."""
        if self.size > 1:
            module.load_state_dict(self.share({k: v.cpu() for k, v in module.state_dict().items()}))

    def lead(self, act: Callable[[], T]) -> T | None:
        """Rank 0 acts, the others wait and get None; what goes wrong there is raised everywhere."""
        if self.size == 1:
            return act()
        made: T | None = None
        error: Exception | None = None
        if self.leads:
            try:
                made = act()
            except Exception as raised:
                error = raised
        told = self.share(_portable(error))
        if told is not None:
            raise told if error is None else error
        return made

    def agree(self, settings: dict[str, Any]) -> None:
        """The same settings everywhere.

        Raises:
            ValueError: in all processes, where those of one differ; it says which.
        """
        for rank, other in enumerate(held := self.gather(settings)):
            names = [name for name in settings if other.get(name) != held[0].get(name)]
            if names:
                raise ValueError(
                    f"fit: process {rank} was called with another {', '.join(names)} than process 0; under torchrun "
                    "every process passes fit the same rows and settings (and fit gives each its part of every batch)"
                )

    def measure(self, loss: Tensor, norm: Tensor, seconds: float, received: int | None) -> tuple[Any, ...]:
        """A step's numbers, agreed on: the sum of the shares of the loss, rank 0's gradient norm and clock, any signal.

        What is not finite in one process is so in all. So they skip, stop and set learning rates as one.

        Returns:
            (loss, norm, seconds, signal): floats; the signal is a number or None.
        """
        if self.size == 1:
            return *torch.stack([loss.detach().double(), norm.double()]).tolist(), seconds, received
        mine = torch.tensor(
            [0.0, 0.0, seconds * self.leads, received == signal.SIGINT, received == signal.SIGTERM],
            dtype=torch.float64,
        ).to(loss.device)
        mine[0] = loss.detach() / self.size
        if self.leads:
            mine[1] = norm
        value, length, clock, interrupted, terminated = self.total(mine).tolist()
        heard = signal.SIGTERM if terminated else signal.SIGINT if interrupted else None
        return value, length, clock, heard

    def share_out(self, objective: nn.Module, batches: Batches) -> nn.Module:
        """The objective such that the mean over the processes of its loss on their parts is its loss on the batch.

        Layers that set themselves from their first batch are set from the whole of it.
        """
        if self.size == 1 or not isinstance(batches, RowBatches):
            return objective
        mine = self.part(batches.size)
        scale = self.size * (mine.stop - mine.start) / batches.size
        unused = _some_unused(objective, batches.first(), self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # new versions of torch rename broadcast_buffers
            wrapped = DistributedDataParallel(
                _Part(objective, scale),
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # masks and permutations stay; `level` takes care of the others
                find_unused_parameters=unused,
            )
        self._wrapped.append(wrapped)
        return wrapped

    def disband(self) -> None:
        """Let go of the process group: its end blocks where a reducer, not Python, is the last to hold it."""
        for wrapped in self._wrapped:
            del wrapped.reducer, wrapped.logger
        self._wrapped.clear()

    def compiles(self, mode: CompileMode) -> CompileMode:
        """Several processes compile only when told to: each would time its own pace and begin at another step."""
        return False if mode == "auto" and self.size > 1 else mode

    def part_ways(self, seed: int) -> None:
        """Random numbers of its own for each process but rank 0: dropout must not repeat over the parts of a batch."""
        if not self.leads:
            torch.default_generator.manual_seed((seed + 1_000_003 * self.rank) % 2**63)
            if self.device.type == "cuda":
                torch.cuda.manual_seed((seed + 1_000_003 * self.rank) % 2**63)


class _Part(nn.Module):
    """An objective times a constant."""

    def __init__(self, objective: nn.Module, scale: float) -> None:
        super().__init__()
        self.objective, self._scale = objective, scale

    def forward(self, *batch: Tensor | None) -> Tensor:
        """The loss of a part of a batch, a scalar."""
        loss = self.objective(*batch)
        return loss if self._scale == 1.0 else loss * self._scale


@contextmanager
def together(device: torch.device) -> Iterator[Team]:
    """The team this process is in: all processes of a torchrun, or of a process group that is there; else it alone.

    A process group that is made here (NCCL on GPUs, gloo on CPUs) ends here. All but rank 0 keep their warnings.

    Raises:
        ValueError: WORLD_SIZE says there are several processes, and what torchrun tells them is missing.
    """
    if processes() == 1:
        yield Team(device=device)
        return
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if not distributed.is_initialized():
            _meet(device)
            stack.callback(distributed.destroy_process_group)
        team = Team(distributed.get_rank(), distributed.get_world_size(), device)
        stack.callback(team.disband)
        if not team.leads:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield team


def _meet(device: torch.device) -> None:
    size = os.environ["WORLD_SIZE"]
    if not distributed.is_available():
        raise ValueError(f"fit: WORLD_SIZE is {size}, but this build of torch has no torch.distributed; unset it")
    missing = [name for name in _FROM_TORCHRUN if name not in os.environ]
    if missing:
        raise ValueError(
            f"fit: WORLD_SIZE is {size}, but {', '.join(missing)} not set; start the processes with torchrun, or unset "
            "WORLD_SIZE to fit in this one alone"
        )
    store, rank, world = _rendezvous()
    place = distributed.PrefixStore(f"flowpath/{next(_meetings)}", store)  # what an earlier fit left there is stale
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE, store=place, rank=rank, world_size=world)


@cache
def _rendezvous() -> tuple[Any, int, int]:
    """Where the processes find each other: kept, for a second fit would have to bind the same port again."""
    return next(iter(distributed.rendezvous("env://", timeout=_PATIENCE)))


def _portable(error: Exception | None) -> Exception | None:
    """The error as it can be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _some_unused(objective: nn.Module, batch: Batch, device: torch.device) -> bool:
    """Whether a trainable parameter has no part in the loss. Random numbers are left as they were."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        grads = torch.autograd.grad(objective(*batch), parameters, allow_unused=True)
    return any(g is None for g in grads)
