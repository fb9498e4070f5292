"""Import Pyro without its side effect: it switches the validation of all torch distributions on, for everyone."""

from torch.distributions import Distribution

_validate_args = Distribution._validate_args

import pyro.distributions  # noqa: E402, F401

Distribution.set_default_validate_args(_validate_args)
