"""What every test gets: a seed, and a check that it leaves nothing global behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch.distributions import Distribution

SEED = 20240229


def global_state() -> dict[str, object]:
    """What no call of the library and no test may change.

    torch's generator may be drawn from (a layer's initial weights are), but not seeded anew; NumPy's and Python's are
    nobody's business.
    """
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "torch's seed": torch.initial_seed(),
        "torch's grad mode": torch.is_grad_enabled(),
        "torch's threads": torch.get_num_threads(),
        "torch's determinism": torch.are_deterministic_algorithms_enabled(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "torch's anomaly mode": torch.is_anomaly_enabled(),
        "validation of distributions": Distribution._validate_args,
        "Pyro's settings": pyro.settings.get(),
        "Pyro's parameters": sorted(pyro.get_param_store()),
        "Pyro's handlers": len(_PYRO_STACK),
        "NumPy's generator": str(np.random.get_state()),
        "Python's generator": hash(random.getstate()),
    }


def restore(state: dict[str, object]) -> None:
    """Put back what another test could stumble over."""
    torch.set_default_dtype(state["torch's default dtype"])  # type: ignore[arg-type]
    torch.set_default_device(None if state["torch's default device"] == "cpu" else state["torch's default device"])
    torch.set_grad_enabled(bool(state["torch's grad mode"]))
    torch.set_num_threads(int(str(state["torch's threads"])))
    torch.use_deterministic_algorithms(bool(state["torch's determinism"]))
    torch.set_float32_matmul_precision(str(state["torch's matmul precision"]))
    torch.autograd.set_detect_anomaly(bool(state["torch's anomaly mode"]))
    pyro.settings.set(**state["Pyro's settings"])  # type: ignore[arg-type]
    Distribution.set_default_validate_args(bool(state["validation of distributions"]))
    pyro.clear_param_store()
    del _PYRO_STACK[:]


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    return [f"{k}: {before[k]} -> {after[k]}"[:200] for k in before if before[k] != after[k]]


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Seed torch, and fail a test after which something global is not as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        before = global_state()
        yield
        found = changes(before, global_state())
    if found:
        restore(before)
        pytest.fail("the test leaves behind a changed " + "; ".join(found))


@pytest.fixture
def pyro_store() -> Iterator[None]:
    """For tests that fill Pyro's parameter store: it is empty before and after."""
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def keeps_rng() -> Callable[[], object]:
    """A context manager: inside it nothing may draw from, or seed, torch's global generator."""

    @contextmanager
    def block() -> Iterator[None]:
        before = torch.get_rng_state()
        yield
        assert torch.equal(before, torch.get_rng_state()), "torch's global generator moved"

    return block


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """An empty cache; and torch.compile switches the validation of distributions off for good, so it is put back."""
    validate = Distribution._validate_args
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    Distribution.set_default_validate_args(validate)
