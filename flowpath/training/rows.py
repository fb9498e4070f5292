"""Rows: what users bring as data, turned into float64 tensors on the CPU, and checked with names and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

SHOWN = 3  # so many examples a message gives


@dataclass(frozen=True)
class Rows:
    """Rows in float64 on the CPU.

    Attributes:
        x: `(N, *event)`.
        context: `(N, C)` or None.
        weights: `(N,)` or None.
        names: of x's columns, as messages call them: a frame's own names in quotes, or "0", "1", ...
        context_names: of the context's columns.
    """

    x: Tensor
    context: Tensor | None = None
    weights: Tensor | None = None
    names: tuple[str, ...] = ()
    context_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Tensor) -> Rows:
        """The rows at `index`."""
        context, weights = (None if t is None else t[index] for t in (self.context, self.weights))
        return Rows(self.x[index], context, weights, self.names, self.context_names)


def read(x: Any, context: Any = None, weights: Any = None, *, who: str = "fit") -> Rows:
    """Rows from what a user passes.

    Args:
        x: a tensor, NumPy array (a structured one too), pandas or polars DataFrame, nested list, or a torch Dataset of
            x, (x, context) or (x, context, weights), which is read whole.
        context: rows likewise, or None.
        weights: one number a row, or None.
        who: the function that asks, for messages.

    Raises:
        TypeError: not numbers (columns named), or nothing rows can be read from.
        ValueError: empty, NaN or infinite numbers (row and column named), lengths that differ, or two devices.
    """
    if isinstance(x, Dataset):
        x, context, weights = _whole(x, context, weights, who)
    _check_one_device({"x": x, "context": context, "weights": weights}, who)
    values, names = table(x, who, "x")
    rows = Rows(values, names=names)
    if context is not None:
        values, names = table(context, who, "context")
        rows = Rows(rows.x, values, None, rows.names, names)
    if weights is not None:
        rows = Rows(rows.x, rows.context, row_weights(weights, who), rows.names, rows.context_names)
    _check_lengths(rows, who)
    _check_finite(rows.x, rows.names, who, "x")
    if rows.context is not None:
        _check_finite(rows.context, rows.context_names, who, "context")
    return rows


def is_stream(x: Any) -> bool:
    """Whether x comes in batches: a DataLoader, an IterableDataset, an iterator, or an iterable of tensors."""
    if isinstance(x, DataLoader | IterableDataset) or hasattr(x, "__next__"):
        return True
    known = (Tensor, np.ndarray, Dataset, list, tuple, dict, str, bytes)
    return isinstance(x, Iterable) and not isinstance(x, known) and not hasattr(x, "columns") and not is_array(x)


def is_array(x: Any) -> bool:
    """Whether NumPy can take x for an array by a protocol."""
    return hasattr(x, "__array__") or hasattr(x, "__array_interface__")


def parts(item: Any) -> tuple[Any, Any, Any]:
    """A batch or a data set's item as (x, context, weights): x, a tuple of up to three, or a dict with these keys."""
    if isinstance(item, dict):
        unknown = sorted(set(item) - {"x", "context", "weights"})
        if unknown or "x" not in item:
            raise ValueError(f'a batch given as a dict expects the keys "x", "context", "weights", got {sorted(item)}')
        return item["x"], item.get("context"), item.get("weights")
    if isinstance(item, tuple | list):
        if not 1 <= len(item) <= 3:
            raise ValueError(f"a batch expects x, (x, context) or (x, context, weights), got {len(item)} values")
        return tuple([*item, None, None][:3])
    return item, None, None


def table(value: Any, who: str, what: str) -> tuple[Tensor, tuple[str, ...]]:
    """Values `(N, ...)` in float64 and the names of the columns."""
    if type(value).__name__ == "LazyFrame":
        raise TypeError(f"{who} expects {what} to be rows, got a LazyFrame; call .collect()")
    if hasattr(value, "columns") and hasattr(value, "to_numpy"):
        return _named(_frame_columns(value), who, what)
    if isinstance(value, np.ndarray) and value.dtype.names:
        return _named([(n, value[n]) for n in value.dtype.names], who, what)
    values = _numbers(value, who, what)
    if values.dim() < 2:
        raise ValueError(
            f"{who} expects {what} as rows (N, features), got shape {tuple(values.shape)}; for a single feature pass "
            f"{what}[:, None]"
        )
    _check_filled(values, who, what)
    return values, tuple(str(i) for i in range(values[0].numel()))


def _frame_columns(frame: Any) -> list[tuple[str, np.ndarray]]:
    """Name and values of each column of a pandas or polars frame."""
    pick, numbers = (frame.iloc, _pandas_numbers) if hasattr(frame, "iloc") else (frame, lambda c: c.to_numpy())
    return [(str(name), numbers(pick[:, i])) for i, name in enumerate(frame.columns)]


def _pandas_numbers(column: Any) -> np.ndarray:
    """pandas' nullable numbers come as floats, a missing one as NaN, rather than as objects."""
    if getattr(column.dtype, "kind", "O") in "biuf" and not isinstance(column.dtype, np.dtype):
        return column.to_numpy(dtype=np.float64, na_value=np.nan)
    return column.to_numpy()


def _named(columns: list[tuple[str, np.ndarray]], who: str, what: str) -> tuple[Tensor, tuple[str, ...]]:
    names = [n for n, _ in columns]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{who}: {what} has more than one column called {', '.join(map(repr, twice))}; rename them")
    wordy = [f"{n!r} ({_kind(c)})" for n, c in columns if not _is_number(c)]
    if wordy:
        raise TypeError(
            f"{who}: {what} holds words or dates where numbers are expected, in {plural('column', len(wordy))} "
            f"{', '.join(wordy)}; drop or encode them"
        )
    if not columns:
        raise ValueError(f"{who}: {what} is empty: it has no columns")
    values = torch.from_numpy(np.stack([np.asarray(c, dtype=np.float64) for _, c in columns], axis=1))
    _check_filled(values, who, what)
    return values, tuple(map(repr, names))


def _is_number(values: np.ndarray) -> bool:
    if values.dtype.kind in "biuf":
        return True
    return values.dtype.kind == "O" and all(v is None or isinstance(v, int | float | np.number) for v in values)


def _kind(values: np.ndarray) -> str:
    if values.dtype.kind != "O":
        return str(values.dtype)
    return next((type(v).__name__ for v in values if not isinstance(v, int | float | None)), "object")


def _numbers(value: Any, who: str, what: str) -> Tensor:
    """Anything array-like in float64 on the CPU."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"{who} expects {what} to be real, got {value.dtype}; pass .real and .imag as columns")
        return value.detach().to("cpu", torch.float64)
    if isinstance(value, str | bytes) or not (is_array(value) or isinstance(value, Sequence)):
        raise TypeError(
            f"{who} expects {what} to be a tensor, an array, a DataFrame, a Dataset, a DataLoader or an iterator of "
            f"batches, got {type(value).__name__}"
        )
    try:
        array = np.asarray(value)
        number = _is_number(array.reshape(-1))
        array = array.astype(np.float64) if number else array
    except ValueError as error:
        raise TypeError(f"{who} expects {what} as rows of one length ({error})") from None
    if not number:
        raise TypeError(f"{who} expects {what} to hold numbers, got {_kind(array.reshape(-1))}; drop or encode it")
    return torch.from_numpy(np.array(array, dtype=np.float64))


def row_weights(value: Any, who: str) -> Tensor:
    weights = _numbers(value.to_numpy() if hasattr(value, "to_numpy") else value, who, "weights")
    if weights.dim() == 2 and weights.shape[1] == 1:
        weights = weights[:, 0]
    if weights.dim() != 1:
        raise ValueError(f"{who} expects one weight a row, got weights of shape {tuple(weights.shape)}")
    bad = (~torch.isfinite(weights)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{who}: weights are not finite in {plural('row', len(bad), count=True)}, first in row {bad[0]}; mend or "
            "drop these rows"
        )
    if len(weights) and float(weights.sum()) <= 0:
        raise ValueError(f"{who} expects weights with a positive sum, got {float(weights.sum()):g}")
    return weights


def _check_filled(table: Tensor, who: str, what: str) -> None:
    if table.numel() == 0:
        raise ValueError(f"{who}: {what} is empty: shape {tuple(table.shape)}")


def _check_lengths(rows: Rows, who: str) -> None:
    for what, values in (("context", rows.context), ("weights", rows.weights)):
        if values is not None and len(values) != len(rows):
            raise ValueError(f"{who}: x has {len(rows)} rows, {what} has {len(values)}; they go row by row")


def _check_finite(values: Tensor, names: Sequence[str], who: str, what: str) -> None:
    flat = values.flatten(1)
    if bool(torch.isfinite(flat.sum())):
        return
    bad = (~torch.isfinite(flat)).nonzero()
    if not len(bad):
        return
    first = ", ".join(f"row {i} column {names[j]} ({flat[i, j]:g})" for i, j in bad[:SHOWN].tolist())
    count = len(bad[:, 0].unique())
    raise ValueError(
        f"{who}: {what} holds {plural('number', len(bad), count=True)} that {'is' if len(bad) == 1 else 'are'} not "
        f"finite, in {plural('row', count, count=True)}: {first}{more(len(bad))}; drop these rows or fill them"
    )


def _check_one_device(given: dict[str, Any], who: str) -> None:
    devices = {name: v.device for name, v in given.items() if isinstance(v, Tensor)}
    if len(set(devices.values())) > 1:
        held = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{who}: the rows are on different devices: {held}; move them to one")


def _whole(data: Dataset, context: Any, weights: Any, who: str) -> tuple[Any, Any, Any]:
    """A map-style Dataset read into tensors."""
    if context is not None or weights is not None:
        raise ValueError(f"{who}: a Dataset brings its own context and weights; pass neither beside it")
    count = len(data) if hasattr(data, "__len__") else 0
    if count == 0:
        raise ValueError(f"{who}: x is empty: a {type(data).__name__} of no items")
    batches = [parts(item) for item in DataLoader(data, batch_size=1024)]
    columns = list(zip(*batches, strict=True))
    x, c, w = (None if v[0] is None else torch.cat([torch.as_tensor(part) for part in v]) for v in columns)
    return x, c, w


def plural(word: str, n: int, *, count: bool = False) -> str:
    """A word for n things, the number before it if asked."""
    return (f"{n} " if count else "") + (word if n == 1 else word + "s")


def more(n: int) -> str:
    """How many of n a message leaves out."""
    return f" and {n - SHOWN} more" if n > SHOWN else ""
