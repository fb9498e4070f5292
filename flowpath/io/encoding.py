"""Parts as JSON: how a file says what a flow is made of. Nothing is pickled."""

from __future__ import annotations

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro.distributions
import torch
from pyro.distributions.transforms import OrderedTransform
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal
from torch.distributions import transforms as tt

from flowpath.registry import description, registered, registered_names

# torch transforms by the attributes that hold their arguments
_TRANSFORMS: dict[type, dict[str, str]] = {
    tt.AffineTransform: {"loc": "loc", "scale": "scale", "event_dim": "_event_dim"},
    tt.CatTransform: {"tseq": "transforms", "dim": "dim", "lengths": "lengths"},
    tt.ComposeTransform: {"parts": "parts"},
    tt.CorrCholeskyTransform: {},
    tt.ExpTransform: {},
    tt.IndependentTransform: {
        "base_transform": "base_transform",
        "reinterpreted_batch_ndims": "reinterpreted_batch_ndims",
    },
    tt.LowerCholeskyTransform: {},
    tt.PositiveDefiniteTransform: {},
    tt.PowerTransform: {"exponent": "exponent"},
    tt.ReshapeTransform: {"in_shape": "in_shape", "out_shape": "out_shape"},
    tt.SigmoidTransform: {},
    tt.SoftplusTransform: {},
    tt.StickBreakingTransform: {},
    tt.TanhTransform: {},
    OrderedTransform: {},
}
TRANSFORMS_BY_NAME = {cls.__name__: cls for cls in _TRANSFORMS}
SPACES: dict[str, Any] = {"torch.distributions": torch.distributions, "pyro.distributions": pyro.distributions}
_PLACES = ("device", "dtype")  # arguments of torch.nn modules that say where, not what


class Encoder:
    """Writes parts as JSON values; tensors go to `tensors` and are named in the JSON.

    A part met twice is written once, so that modules shared in a flow are shared in the loaded one.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[int, int] = {}

    def encode(self, value: Any, where: str) -> Any:
        """One argument or part; `where` names it for messages.

        Raises:
            TypeError: a value no file can hold; it says what to do.
        """
        if value is None or isinstance(value, bool | str | int):
            return value
        if isinstance(value, float | np.generic):
            return self._number(value)
        if isinstance(value, Tensor | np.ndarray):
            return self._tensor(value)
        if isinstance(value, list | nn.ModuleList):
            return [self.encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": [self.encode(v, f"{where}[{i}]") for i, v in enumerate(value)]}
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return {"dict": {k: self.encode(v, f"{where}[{k!r}]") for k, v in value.items()}}
        return self._object(value, where)

    def _number(self, value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        return value if not isinstance(value, float) or math.isfinite(value) else {"float": repr(value)}

    def _tensor(self, value: Tensor | np.ndarray) -> dict[str, str]:
        name = f"argument/{len(self.tensors)}"
        self.tensors[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"tensor" if isinstance(value, Tensor) else "array": name}

    def _object(self, value: Any, where: str) -> Any:
        if isinstance(value, type):
            return self._class(value, where)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, functools.partial):
            return {
                "partial": self.encode(value.func, where),
                "args": self.encode(list(value.args), where),
                "kwargs": self._arguments(value.keywords, where),
            }
        if isinstance(value, tt.Transform):
            return self._transform(value, where)
        if isinstance(value, Distribution):
            return self._distribution(value, where)
        if id(value) in self._seen:
            return {"same": self._seen[id(value)]}
        held = self._part(value, where)
        self._seen[id(value)] = held["id"] = len(self._seen)
        return held

    def _part(self, value: Any, where: str) -> dict[str, Any]:
        found = description(value)
        if found is not None:
            name, arguments = found
            _check_unchanged(value, arguments, where)
            return {"part": name, "arguments": self._arguments(arguments, where)}
        if type(value) is nn.Sequential:
            return {"sequential": {k: self.encode(v, f"{where}.{k}") for k, v in value.named_children()}}
        if isinstance(value, nn.Module) and getattr(nn, type(value).__name__, None) is type(value):
            return {"module": type(value).__name__, "arguments": self._arguments(_torch_arguments(value, where), where)}
        raise TypeError(_unregistered(value, where))

    def _arguments(self, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {k: self.encode(v, f"{where}.{k}") for k, v in arguments.items()}

    def _class(self, value: type, where: str) -> dict[str, str]:
        if getattr(nn, value.__name__, None) is value:
            return {"torch.nn": value.__name__}
        name = next((n for n in registered_names() if registered(n) is value), None)
        if name is None:
            raise TypeError(
                f"save: {where} is the class {value.__qualname__}, which is neither of torch.nn nor registered; put "
                f'@fp.register("{value.__name__}") before it'
            )
        return {"class": name}

    def _transform(self, t: tt.Transform, where: str) -> dict[str, Any]:
        if isinstance(t, tt._InverseTransform):
            return {"inverse transform": self.encode(t.inv, where)}
        if type(t) not in _TRANSFORMS:
            raise TypeError(
                f"save: {where} is a {type(t).__name__}, which flowpath cannot write to a file; it writes "
                f"{', '.join(sorted(TRANSFORMS_BY_NAME))}. Make it an fp.Transform of your own with @fp.register"
            )
        held = {argument: getattr(t, attribute) for argument, attribute in _TRANSFORMS[type(t)].items()}
        return {"transform": type(t).__name__, "arguments": self._arguments(held, where)}

    def _distribution(self, d: Distribution, where: str) -> dict[str, Any]:
        inner, dims = d, 0
        while isinstance(inner, Independent):
            dims, inner = dims + inner.reinterpreted_batch_ndims, inner.base_dist
        name = type(inner).__name__
        space = next((s for s, held in SPACES.items() if getattr(held, name, None) is type(inner)), None)
        if space is None:
            raise TypeError(f"save: {where} is a {name}, which is not of torch.distributions or pyro.distributions")
        names = ["loc", "scale_tril"] if isinstance(inner, MultivariateNormal) else list(inner.arg_constraints)
        held = {n: inner.__dict__[n] for n in names if isinstance(inner.__dict__.get(n), Tensor)}
        return {"distribution": name, "space": space, "event_dims": dims, "arguments": self._arguments(held, where)}


def _check_unchanged(part: Any, arguments: Mapping[str, Any], where: str) -> None:
    """The modules a part was built from are still in it: a file describes it by them."""
    if not isinstance(part, nn.Module):
        return
    held = {id(m) for m in part.modules()}
    for name, value in arguments.items():
        given = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, nn.Module) and not isinstance(v, nn.ModuleList) and id(v) not in held for v in given):
            raise TypeError(
                f"save: {where} ({type(part).__name__}) no longer holds the {name} it was built with; build it anew "
                "from its present parts"
            )


def _torch_arguments(module: nn.Module, where: str) -> dict[str, Any]:
    """The arguments of a torch.nn module, read from its attributes of the same names."""
    found = {}
    for name, p in inspect.signature(type(module)).parameters.items():
        if name in _PLACES:
            continue
        value = getattr(module, name, inspect.Parameter.empty)
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or value is inspect.Parameter.empty:
            raise TypeError(_unregistered(module, where))
        is_flag = value is None or isinstance(value, Tensor)  # Linear(bias=True) keeps a bias, or None
        found[name] = value is not None if is_flag and isinstance(p.default, bool) else value
    return found


def _unregistered(value: Any, where: str) -> str:
    if inspect.isfunction(value) or inspect.isbuiltin(value):
        return f"save: {where} is a function, which no file can hold; pass a class of torch.nn or a registered part"
    return (
        f"save: {where} is a {type(value).__qualname__}, which is not registered, so no file could build it again; put "
        f'@fp.register("{type(value).__name__}") before its class'
    )
