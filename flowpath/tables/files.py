"""Reading and writing tables: CSV, Parquet and NPY, told apart by their ending."""

from __future__ import annotations

import contextlib
import csv
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowpath.tables.columns import is_frame, pick

if TYPE_CHECKING:
    import polars as pl

ENDINGS = (".csv", ".csv.gz", ".parquet", ".npy")
_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]

_Path = str | os.PathLike[str]


def read(path: _Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A table from a file whose ending says what it is: .csv, .csv.gz, .parquet or .npy.

    A CSV file begins with a line of names. An NPY file holds an array `(N, D)`, whose columns are called "0", "1", ...,
    or a structured array. Cells that are empty or hold NA, NaN, null or None are missing.

    Args:
        path: the file.
        columns: the ones to keep, in this order; None for all.

    Returns:
        A polars DataFrame.

    Raises:
        FileNotFoundError: no such file; names like it are listed.
        ValueError: an ending that is not known, a file that is not what its ending says, no rows, no line of names, a
            name held twice, or a column that is not there.

    Example:
        >>> import tempfile, polars as pl, flowpath as fp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = fp.tables.write(pl.DataFrame({"z": [0.5, 1.5], "n": [3, 4]}), folder + "/rows.csv.gz")
        ...     fp.tables.read(path, ["n"])["n"].to_list()
        [3, 4]
    """
    path = Path(path)
    ending = _ending(path, "read")
    _check_there(path)
    frame = _READERS[ending](path)
    if not frame.height:
        raise ValueError(f"read: {path} holds no rows")
    return frame if columns is None else pick(frame, columns, str(path))


def write(table: Any, path: _Path, *, overwrite: bool = False) -> Path:
    """Write a table to a file whose ending says how: .csv, .csv.gz, .parquet or .npy; whole, or not at all.

    Args:
        table: a polars or pandas DataFrame, or an array `(N, D)`.
        path: the file; its folder is made.
        overwrite: whether a file that is there may be replaced.

    Returns:
        The path.

    Raises:
        FileExistsError: the file is there. ValueError: an ending that is not known. OSError: it cannot be written.
    """
    path = Path(path)
    ending = _ending(path, "write")
    if path.exists() and not overwrite:
        raise FileExistsError(f"write: {path} is there already; choose another name or pass overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            _WRITERS[ending](as_polars(table), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def as_polars(table: Any) -> pl.DataFrame:
    """A polars, pandas or NumPy table as a polars DataFrame."""
    import polars as pl

    if isinstance(table, pl.DataFrame):
        return table
    if is_frame(table):
        return pl.DataFrame({str(c): table.iloc[:, i].to_numpy() for i, c in enumerate(table.columns)})
    return _from_array(np.asarray(table), "the array")


def _ending(path: Path, who: str) -> str:
    name = path.name.lower()
    found = next((e for e in sorted(ENDINGS, key=len, reverse=True) if name.endswith(e)), None)
    if found is None:
        raise ValueError(
            f"{who}: {path} ends in {path.suffix or 'nothing'}; a table's file ends in {', '.join(ENDINGS)}"
        )
    return found


def _check_there(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise FileNotFoundError(f"read: {path} is a folder, not a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"read: there is no folder {path.parent}")
    names = sorted(p.name for p in path.parent.iterdir())
    like = get_close_matches(path.name, names, 3, 0.6) or [n for n in names if n.lower().endswith(ENDINGS)][:3]
    hint = f"; there is {', '.join(like)}" if like else ""
    raise FileNotFoundError(f"read: there is no file {path.name} in {path.parent}{hint}")


@contextlib.contextmanager
def _as_value_error(path: Path, kind: str) -> Iterator[None]:
    """Whatever a reader says of a file's content, in one line with the file's name."""
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, EOFError, UnicodeDecodeError, OSError, csv.Error) as error:
        line = str(error).strip().splitlines()
        raise ValueError(
            f"read: {path} cannot be read as {kind} ({line[0] if line else type(error).__name__})"
        ) from None


def _read_csv(path: Path) -> pl.DataFrame:
    import polars as pl

    with _as_value_error(path, "CSV"):
        _check_header(path)
        return pl.read_csv(path, null_values=_MISSING, infer_schema_length=None)


def _check_header(path: Path) -> None:
    """The first line holds names, each once: polars would rename the second one without a word."""
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    if not names:
        raise ValueError(f"read: {path} is empty")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"read: {path} has more than one column called {', '.join(map(repr, twice))}; rename them")
    if all(map(_is_number, names)):
        raise ValueError(
            f"read: {path} begins with numbers ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) where names "
            "of the columns are expected; add a line of names, or save it as .npy"
        )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> pl.DataFrame:
    import polars as pl

    with _as_value_error(path, "Parquet"):
        return pl.read_parquet(path)


def _read_npy(path: Path) -> pl.DataFrame:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):  # NumPy's own words advise to allow pickle, which runs code
        with open(path, "rb") as file:
            begins_right = file.read(6) == b"\x93NUMPY"
        why = "it is cut short, or holds Python objects" if begins_right else "it does not begin as one does"
        raise ValueError(f"read: {path} cannot be read as NPY ({why}); write it with np.save, of numbers") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"read: {path} is an archive of arrays (NPZ); save the one you mean with np.save")
    return _from_array(array, str(path))


def _from_array(array: np.ndarray, source: str) -> pl.DataFrame:
    import polars as pl

    if array.dtype.names:
        return pl.DataFrame({name: np.ascontiguousarray(array[name]) for name in array.dtype.names})
    if array.ndim not in (1, 2) or array.dtype.kind not in "biuf":
        raise ValueError(
            f"read: {source} is an array of shape {array.shape} and dtype {array.dtype}; a table is (N, D), of numbers"
        )
    wide = array[:, None] if array.ndim == 1 else array
    return pl.DataFrame({str(j): np.ascontiguousarray(wide[:, j]) for j in range(wide.shape[1])})


def _write_gz(frame: pl.DataFrame, file: Any) -> None:
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed:
        packed.write(frame.write_csv().encode())


def _write_npy(frame: pl.DataFrame, file: Any) -> None:
    wordy = [name for name, dtype in frame.schema.items() if not (dtype.is_numeric() or str(dtype) == "Boolean")]
    if wordy:
        raise ValueError(f"write: column {wordy[0]!r} holds no numbers, an NPY file holds nothing else; write a .csv")
    np.save(file, frame.to_numpy(), allow_pickle=False)


_READERS: dict[str, Callable[[Path], Any]] = {
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
    ".npy": _read_npy,
}
_WRITERS: dict[str, Callable[[Any, Any], None]] = {
    ".csv": lambda frame, file: frame.write_csv(file),
    ".csv.gz": _write_gz,
    ".parquet": lambda frame, file: frame.write_parquet(file),
    ".npy": _write_npy,
}
