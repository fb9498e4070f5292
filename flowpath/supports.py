"""Supports: where the values of a column can lie, as objects, as text, and from torch constraints."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributions import constraints

_EXACT, _ROUNDED = 1e-6, 1e-2  # how far off its lattice point a value may lie, in steps


@dataclass(frozen=True)
class Support:
    """Where the values of one column can lie; made by `real`, `positive`, `interval`, `above`, `below`, `integer`,
    `lattice`.

    A support without a step is an open interval: its bounds do not belong to it. One with a step is the lattice
    {offset + k step} within its bounds, which do.

    Args:
        lower, upper: the bounds.
        step: distance of neighbouring values, 0 for a continuum.
        offset: one of the values.
        tolerance: how far off a lattice point a value may lie and still count as it, in steps.

    Raises:
        ValueError: bounds that leave no room, a step below zero, or numbers that are not finite.

    Example:
        >>> import flowpath as fp
        >>> fp.integer(0, 10), fp.interval(-1, 1)
        (integer(0, 10), interval(-1.0, 1.0))
    """

    lower: float = -math.inf
    upper: float = math.inf
    step: float = 0.0
    offset: float = 0.0
    tolerance: float = _EXACT

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"a support expects a lower bound below the upper one, got {self.lower} and {self.upper}")
        if not (0 <= self.step < math.inf and math.isfinite(self.offset) and 0 <= self.tolerance < 0.5):
            raise ValueError(
                f"a support expects a finite step and offset and a tolerance in [0, 0.5), got step {self.step}, "
                f"offset {self.offset}, tolerance {self.tolerance}"
            )

    @property
    def is_lattice(self) -> bool:
        """Whether the values are discrete."""
        return self.step > 0

    @property
    def is_integer(self) -> bool:
        """Whether all values are whole numbers."""
        return self.is_lattice and self.step.is_integer() and self.offset.is_integer()

    @property
    def cells(self) -> tuple[float, float]:
        """The open interval that the cells of a lattice fill; that of a continuum itself."""
        half = 0.5 * self.step
        return self.lower - half, self.upper + half

    def constraint(self) -> Any:
        """The torch constraint of `cells`."""
        lower, upper = self.cells
        if math.isfinite(lower) and math.isfinite(upper):
            return constraints.interval(lower, upper)
        if math.isfinite(lower):
            return constraints.greater_than(lower) if lower else constraints.positive
        return constraints.less_than(upper) if math.isfinite(upper) else constraints.real

    def __repr__(self) -> str:
        """The words that make it, as `as_support` and a TOML file read them."""
        lower, upper = math.isfinite(self.lower), math.isfinite(self.upper)
        if self.is_lattice:
            return self._lattice_words(lower, upper)
        if lower and upper:
            return f"interval({self.lower!r}, {self.upper!r})"
        if lower:
            return f"above({self.lower!r})" if self.lower else "positive()"
        return f"below({self.upper!r})" if upper else "real()"

    def _lattice_words(self, lower: bool, upper: bool) -> str:
        if (self.step, self.offset, self.tolerance) == (1.0, 0.0, _EXACT):
            bounds = [f"{self.lower:.0f}"] if lower else []
            return f"integer({', '.join(bounds + ([('' if lower else 'hi=') + f'{self.upper:.0f}'] if upper else []))})"
        words = [repr(self.step), repr(self.offset)]
        words += [f"lo={self.lower!r}"] if lower else []
        words += [f"hi={self.upper!r}"] if upper else []
        words += [f"tolerance={self.tolerance!r}"] if self.tolerance != _ROUNDED else []
        return f"lattice({', '.join(words)})"


def real() -> Support:
    """Any number."""
    return Support()


def positive() -> Support:
    """Numbers above 0, mapped by the logarithm."""
    return Support(lower=0.0)


def above(a: float) -> Support:
    """Numbers above a, mapped by log(x - a)."""
    return Support(lower=_finite("above", "a", a))


def below(b: float) -> Support:
    """Numbers below b, mapped by log(b - x)."""
    return Support(upper=_finite("below", "b", b))


def interval(a: float, b: float) -> Support:
    """Numbers between a and b, mapped by logit((x - a) / (b - a))."""
    return Support(_finite("interval", "a", a), _finite("interval", "b", b))


def integer(lo: int | None = None, hi: int | None = None) -> Support:
    """Whole numbers from lo to hi, both belonging to it; None is no bound."""
    bounds = [sign * math.inf if v is None else float(v) for v, sign in ((lo, -1), (hi, 1))]
    for name, v in zip(("lo", "hi"), bounds, strict=True):
        if math.isnan(v) or (math.isfinite(v) and not v.is_integer()):
            raise ValueError(f"integer expects {name} to be a whole number, got {v}")
    return Support(*_bounds(bounds[0], bounds[1], 1.0), step=1.0)


def lattice(
    step: float, offset: float = 0.0, *, lo: float | None = None, hi: float | None = None, tolerance: float = _ROUNDED
) -> Support:
    """The values offset + k step, k whole: a centred integer, a rounded measurement.

    Args:
        step: distance of neighbouring values.
        offset: any one of the values.
        lo, hi: the smallest and largest value, or None.
        tolerance: how far off a lattice point a value may lie and still count as it, in steps.

    Raises:
        ValueError: a step that is not above 0, or bounds that are no values of the lattice.

    Example:
        >>> import flowpath as fp
        >>> fp.lattice(0.5, 0.25, lo=0.25)
        lattice(0.5, 0.25, lo=0.25)
    """
    if not 0 < step < math.inf:
        raise ValueError(f"lattice expects a step above 0, got {step}")
    for name, v in (("lo", lo), ("hi", hi)):
        k = 0.0 if v is None or math.isinf(v) else (v - offset) / step
        if not abs(k - round(k)) <= tolerance:
            raise ValueError(
                f"lattice expects {name} to be one of its values, got {v} for step {step}, offset {offset}"
            )
    low, high = -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi)
    return Support(*_bounds(low, high, step), float(step), float(offset), float(tolerance))


def _bounds(low: float, high: float, step: float) -> tuple[float, float]:
    if not low + 0.5 * step < high:
        raise ValueError(f"a lattice expects at least two values, got lo {low:g} and hi {high:g}")
    return low, high


def _finite(who: str, name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{who} expects a finite {name}, got {value}")
    return float(value)


_WORDS: dict[str, Callable[..., Support]] = {
    f.__name__: f for f in (real, positive, interval, above, below, integer, lattice)
}
_CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*")


def as_support(value: Any, column: str = "a column") -> Support:
    """A Support from one, from its words such as "interval(0, 1)", or from a torch constraint on single numbers.

    Raises:
        TypeError, ValueError: nothing that describes one; the column and the words known are named.
    """
    if isinstance(value, Support):
        return value
    if isinstance(value, str):
        return _from_words(value, column)
    if isinstance(value, constraints.Constraint):
        return _from_constraint(value, column)
    raise TypeError(
        f"the support of {column} is expected as fp.real(), fp.positive(), ..., as words or as a torch constraint, "
        f"got {type(value).__name__}"
    )


def _from_words(text: str, column: str) -> Support:
    found = _CALL.fullmatch(text)
    name = found[1] if found else text
    if found is None or name not in _WORDS:
        near = get_close_matches(name, _WORDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"the support of {column} is {text!r}; known are {', '.join(_WORDS)}{hint}")
    args, kwargs = [], {}
    for word in filter(None, (w.strip() for w in (found[2] or "").split(","))):
        key, _, number = word.rpartition("=")
        value = _number(number, text, column)
        if key:
            kwargs[key.strip()] = value
        else:
            args.append(value)
    try:
        return _WORDS[name](*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the support of {column} is {text!r}: {error}") from None


def _number(word: str, text: str, column: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"the support of {column} is {text!r}; {word.strip()!r} in it is no number") from None


def _from_constraint(c: Any, column: str) -> Support:
    """Closed bounds of a continuum are taken for open ones: a density does not see the difference."""
    while isinstance(c, constraints.independent):
        c = c.base_constraint
    if type(c) is type(constraints.real):
        return real()
    if type(c) is type(constraints.boolean):
        return integer(0, 1)
    ends = [getattr(c, name, None) for name in ("lower_bound", "upper_bound")]
    if ends == [None, None] or any(isinstance(e, Tensor) and e.numel() > 1 for e in ends):
        raise ValueError(
            f"the support of {column} is the constraint {c}, which is not about single numbers; a column takes real, "
            "positive, interval, greater_than, less_than, boolean or an integer one"
        )
    low, high = (None if e is None else float(e) for e in ends)
    if c.is_discrete:
        return integer(*(None if v is None else int(v) for v in (low, high)))
    return Support(-math.inf if low is None else low, math.inf if high is None else high)


def read_supports(path: str | os.PathLike[str]) -> dict[str, Support]:
    """Supports from a TOML file: lines such as `z = "positive"`, `"n det" = "integer(0)"`, at the top or in [supports].

    Raises:
        FileNotFoundError: no such file. ImportError: Python 3.10 without tomli.
        ValueError: no TOML, or a line that describes no support.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"supports: there is no file {path}")
    toml = _toml()
    try:
        held = toml.loads(path.read_text(encoding="utf-8"))
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"supports: {path} is no TOML ({error})") from None
    if isinstance(held.get("supports"), Mapping):
        held = held["supports"]
    wrong = [f"{k} = {v!r}" for k, v in held.items() if not isinstance(v, str)]
    if wrong:
        raise ValueError(
            f'supports: {path} expects lines such as z = "positive", got {wrong[0]}; put names with dots or '
            "spaces, and supports, in quotes"
        )
    return {name: as_support(text, f"{name!r} in {path}") for name, text in held.items()}


def _toml() -> Any:
    """Python's own reader from 3.11 on."""
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError("supports from a TOML file need Python 3.11, or: pip install tomli") from None
