"""The columns of a table: picked by name, remembered with their dtypes, and given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from flowpath.supports import Support
from flowpath.training.rows import more

Kind = Literal["array", "pandas", "polars"]
_MOST_NAMED = 12


def is_frame(value: Any) -> bool:
    """Whether value is a pandas or polars DataFrame."""
    return hasattr(value, "columns") and hasattr(value, "to_numpy")


def labels_of(frame: Any) -> dict[str, Any]:
    """The columns' names as text, and the labels behind them: pandas also takes numbers for labels."""
    return {str(label): label for label in frame.columns}


def near(name: str, names: Sequence[str]) -> str:
    """A hint at a name like this one, case aside, or what there is."""
    lower = {n.lower(): n for n in names}
    found = get_close_matches(name.lower(), lower, 1, 0.5)
    if found:
        return f"; did you mean {lower[found[0]]!r}?"
    shown = ", ".join(map(repr, names[:_MOST_NAMED]))
    return f"; there is {shown}{' ...' if len(names) > _MOST_NAMED else ''}" if names else ""


def pick(frame: Any, names: Sequence[str], who: str = "the table") -> Any:
    """The named columns of a pandas or polars DataFrame, in the order of names; others are left out.

    Raises:
        ValueError: a column is not there; the message names one like it.

    Example:
        >>> import polars as pl, flowpath as fp
        >>> fp.tables.pick(pl.DataFrame({"a": [1], "b": [2], "c": [3]}), ["c", "a"]).columns
        ['c', 'a']
    """
    there = labels_of(frame)
    missing = [n for n in names if n not in there]
    if missing:
        hint = near(missing[0], [n for n in there if n not in names] or list(there))
        word = "column" if len(missing) == 1 else "columns"
        named = ", ".join(map(repr, missing[:3])) + more(len(missing))
        raise ValueError(f"{who}: there is no {word} {named}{hint}")
    return frame[[there[n] for n in names]]


@dataclass(frozen=True)
class Schema:
    """What kind of table it was, and its columns.

    Attributes:
        kind: "array", "pandas" or "polars".
        labels: of the columns: text, or for arrays and some pandas frames numbers.
        dtypes: of the columns, as the table's own library calls them.
    """

    kind: Kind
    labels: tuple[Any, ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, value: Any) -> Schema:
        """The schema of a frame, or of an array `(N, D)`."""
        if not is_frame(value):
            return cls("array", tuple(range(value.shape[1])), (str(value.dtype),) * value.shape[1])
        kind: Kind = "pandas" if hasattr(value, "iloc") else "polars"
        labels = tuple(int(c) if isinstance(c, np.integer) else c for c in value.columns)
        return cls(kind, labels, tuple(str(d) for d in value.dtypes))

    @property
    def names(self) -> tuple[str, ...]:
        """The labels as text."""
        return tuple(map(str, self.labels))

    @property
    def quoted(self) -> tuple[str, ...]:
        """The names as messages call them."""
        return self.names if self.kind == "array" else tuple(map(repr, self.names))

    def restore(self, values: np.ndarray, supports: Sequence[Support]) -> Any:
        """Values `(N, D)` as such a table again; columns of whole numbers in their dtype where it holds them."""
        whole = [s.is_integer for s in supports]
        if self.kind == "array":
            return values.astype(np.int64) if all(whole) else values
        held = [values[:, j].astype(np.int64) if w else values[:, j] for j, w in enumerate(whole)]
        if self.kind == "pandas":
            return self._pandas(held, whole)
        return self._polars(held, whole)

    def _pandas(self, held: list[np.ndarray], whole: list[bool]) -> Any:
        import pandas as pd

        dtypes = [pd.api.types.pandas_dtype(d) if w else None for d, w in zip(self.dtypes, whole, strict=True)]
        series = [
            pd.Series(v) if d is None or not _holds(getattr(d, "numpy_dtype", d), v) else pd.Series(v).astype(d)
            for v, d in zip(held, dtypes, strict=True)
        ]
        frame = pd.concat(series, axis=1)
        frame.columns = pd.Index(self.labels)
        return frame

    def _polars(self, held: list[np.ndarray], whole: list[bool]) -> Any:
        import polars as pl

        dtypes = [_numpy_dtype(d) if w else None for d, w in zip(self.dtypes, whole, strict=True)]
        values = [v if d is None or not _holds(d, v) else v.astype(d) for v, d in zip(held, dtypes, strict=True)]
        return pl.DataFrame(dict(zip(self.labels, values, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"kind": self.kind, "labels": list(self.labels), "dtypes": list(self.dtypes)}

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> Schema:
        """From what `to_json` gave."""
        return cls(held["kind"], tuple(held["labels"]), tuple(held["dtypes"]))


def _numpy_dtype(polars_name: str) -> np.dtype | None:
    """NumPy's dtype of a polars column, where there is one of numbers."""
    try:
        return np.dtype("bool" if polars_name == "Boolean" else polars_name.lower())
    except TypeError:
        return None


def _holds(dtype: Any, values: np.ndarray) -> bool:
    """Whether an integer or bool dtype holds all of these whole numbers."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iub" or not len(values):
        return isinstance(dtype, np.dtype) and dtype.kind in "iub"
    low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return bool(low <= values.min() and values.max() <= high)
