"""The names under which parts are saved and rebuilt, and the arguments each part was built with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_parts: dict[str, type] = {}


def register(name: str) -> Callable[[T], T]:
    """Enter a class in flowpath's registry, so that `fp.save` and `fp.load` know it by `name`.

    The decorated class remembers the arguments it was built with. They must be JSON values, tensors, activation
    classes of `torch.nn`, or other registered parts; `fp.save` says which argument is not.

    Args:
        name: a name no other class holds; files carry it, so keep it stable.

    Raises:
        ValueError: the name is taken by another class.

    Example:
        >>> import torch, flowpath as fp
        >>> @fp.register("my-shift")
        ... class Shift(fp.Transform):
        ...     context = None
        ...     def __init__(self, features):
        ...         super().__init__(features)
        ...         self.shift = torch.nn.Parameter(torch.zeros(features))
        ...     def _forward(self, x, context):
        ...         return x + self.shift, x.new_zeros(x.shape[:-1])
        ...     def _inverse(self, z, context):
        ...         return z - self.shift, z.new_zeros(z.shape[:-1])
        >>> flow = fp.Flow(Shift(2), fp.StandardNormal(2))
    """

    def enter(cls: T) -> T:
        held = _parts.get(name)
        if held is not None and held.__qualname__ != cls.__qualname__:
            raise ValueError(f"register: the name {name!r} belongs to {held.__qualname__}; choose another")
        _parts[name] = cls
        _remember_arguments(cls, name)
        return cls

    return enter


def registered(name: str) -> type | None:
    """The class registered under `name`, or None."""
    return _parts.get(name)


def registered_names() -> list[str]:
    """All names in the registry."""
    return sorted(_parts)


def description(part: Any) -> tuple[str, dict[str, Any]] | None:
    """The registered name of `part` and the arguments it was built with, or None where it is no registered part."""
    found = getattr(part, "_built_as", None)
    return found if found is not None and _parts.get(found[0]) is type(part) else None


def _kept(value: Any) -> Any:
    """An argument that can be read twice: a generator becomes a tuple."""
    return tuple(value) if isinstance(value, Iterator) else value


def _remember_arguments(cls: type, name: str) -> None:
    original = vars(cls).get("__init__", cls.__init__)  # type: ignore[misc]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()  # a file must not change its meaning when a default does
            arguments = {k: _kept(v) for k, v in list(bound.arguments.items())[1:]}
            object.__setattr__(self, "_built_as", (name, arguments))
            bound.arguments.update(arguments)
            args, kwargs = bound.args[1:], bound.kwargs
        original(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
