"""The compiler that torch calls: whether there is one, and what it must not leave behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch.distributions import Distribution


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can work here: a C++ compiler for a CPU, Triton for a GPU."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++", "cl") if name)


def name_of_compiler(device: torch.device) -> str:
    """What `has_compiler` looked for, in words."""
    return "Triton" if device.type == "cuda" else "g++ or clang++"


@contextmanager
def validation_kept() -> Iterator[None]:
    """torch.compile switches the validation of all torch distributions off, for good: put it back."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
