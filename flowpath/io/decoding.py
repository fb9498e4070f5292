"""Parts from JSON: builds what an Encoder wrote, from known names only. Nothing is evaluated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent

from flowpath import bases, flow, foreign_bases, interop, nets, standardize, transforms  # noqa: F401  parts
from flowpath.io.encoding import SPACES, TRANSFORMS_BY_NAME
from flowpath.registry import registered, registered_names


class Decoder:
    """Builds parts from what an Encoder wrote: registered ones, torch.nn's, torch's transforms and distributions.

    Args:
        tensors: those the JSON names.
        source: the file, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self._tensors, self._source = tensors, source
        self._seen: dict[int, Any] = {}

    def decode(self, value: Any) -> Any:
        """The value or part.

        Raises:
            ValueError: a name that is not known, or a description that makes no sense.
        """
        if isinstance(value, list):
            return [self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        kind = next(iter(value), "")
        build = self._builders().get(kind)
        if build is None:
            raise ValueError(f"load: the description in {self._source} holds {kind!r}, which means nothing here")
        built = build(value)
        if "id" in value:
            self._seen[value["id"]] = built
        return built

    def _builders(self) -> dict[str, Callable[[dict[str, Any]], Any]]:
        return {
            "float": lambda v: float(v["float"]),
            "tensor": lambda v: self._tensor(v["tensor"]),
            "array": lambda v: self._tensor(v["array"]).numpy(),
            "tuple": lambda v: tuple(map(self.decode, v["tuple"])),
            "dict": lambda v: self._arguments(v["dict"]),
            "dtype": lambda v: self._of(torch, v["dtype"], torch.dtype),
            "torch.nn": lambda v: self._of(nn, v["torch.nn"], type),
            "class": lambda v: self._registered(v["class"]),
            "partial": lambda v: functools.partial(
                self.decode(v["partial"]), *self.decode(v["args"]), **self._arguments(v["kwargs"])
            ),
            "same": lambda v: self._seen[v["same"]],
            "part": lambda v: self._call(self._registered(v["part"]), v),
            "sequential": self._sequential,
            "module": lambda v: self._call(self._module(v["module"]), v),
            "inverse transform": lambda v: self.decode(v["inverse transform"]).inv,
            "transform": lambda v: self._call(self._transform(v["transform"]), v),
            "distribution": self._distribution,
        }

    def _arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {k: self.decode(v) for k, v in arguments.items()}

    def _call(self, cls: type, value: Mapping[str, Any]) -> Any:
        """Build from arguments by name; those of a *args or **kwargs are spread again."""
        arguments = self._arguments(value["arguments"])
        kinds = {p.name: p.kind for p in inspect.signature(cls).parameters.values()}
        rest = next((n for n, k in kinds.items() if k is inspect.Parameter.VAR_POSITIONAL), None)
        named = next((n for n, k in kinds.items() if k is inspect.Parameter.VAR_KEYWORD), None)
        try:
            if rest is None:
                return cls(**{k: v for k, v in arguments.items() if k != named}, **arguments.get(named or "", {}))
            before = [n for n in kinds if kinds[n] is inspect.Parameter.POSITIONAL_OR_KEYWORD]
            after = {k: v for k, v in arguments.items() if k not in (*before, rest, named)}
            positional = [arguments[n] for n in before]
            return cls(*positional, *arguments.get(rest, ()), **after, **arguments.get(named or "", {}))
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"load: {self._source} builds a {cls.__name__} from {sorted(arguments)}, which does not fit its "
                f"present version ({error})"
            ) from None

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise ValueError(f"load: {self._source} names a tensor {name!r} it does not hold")
        return self._tensors[name]

    def _registered(self, name: str) -> type:
        found = registered(name)
        if found is None:
            near = get_close_matches(name, registered_names(), 1)
            hint = f" (did the name change from {near[0]!r}?)" if near else ""
            raise ValueError(
                f"load: {self._source} holds a part {name!r} that is not registered{hint}; import the module that "
                f'defines it with @fp.register("{name}") first'
            )
        return found

    def _of(self, space: Any, name: str, kind: type) -> Any:
        found = getattr(space, name, None)
        if not isinstance(found, kind):
            raise ValueError(f"load: {self._source} names {name!r}, which {space.__name__} does not have")
        return found

    def _module(self, name: str) -> type:
        found = self._of(nn, name, type)
        if not issubclass(found, nn.Module):
            raise ValueError(f"load: {self._source} names {name!r}, which is no module of torch.nn")
        return found

    def _sequential(self, value: dict[str, Any]) -> nn.Sequential:
        built = nn.Sequential()
        for name, child in value["sequential"].items():
            built.add_module(name, self.decode(child))
        return built

    def _transform(self, name: str) -> type:
        if name not in TRANSFORMS_BY_NAME:
            raise ValueError(f"load: {self._source} names {name!r}, a transform flowpath does not build")
        return TRANSFORMS_BY_NAME[name]

    def _distribution(self, value: dict[str, Any]) -> Distribution:
        cls = self._of(SPACES.get(value["space"]), value["distribution"], type)
        if not issubclass(cls, Distribution):
            raise ValueError(f"load: {self._source} names {value['distribution']!r}, which is no distribution")
        d = self._call(cls, value)
        return Independent(d, value["event_dims"]) if value["event_dims"] else d
