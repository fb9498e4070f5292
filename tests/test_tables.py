"""Tables: files in and out, columns picked by name, and what values show of their supports."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

import flowpath as fp

FRAME = pl.DataFrame({"z": [0.1, 1 / 3, 1e-300], "n": [1, 2, 3], "id": ["a", "b", "c"]})


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet", ".CSV"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = fp.tables.write(FRAME, tmp_path / "new" / f"rows{ending}")
    assert fp.tables.read(path).equals(FRAME)
    assert fp.tables.read(path, ["n", "z"]).columns == ["n", "z"]


@pytest.mark.parametrize(
    "table",
    [np.arange(6.0).reshape(3, 2), pd.DataFrame(np.arange(6.0).reshape(3, 2)), FRAME.select("z", "n")],
    ids=["array", "pandas", "polars"],
)
def test_numbers_go_through_npy(tmp_path: Path, table: Any) -> None:
    path = fp.tables.write(table, tmp_path / "rows.npy")
    np.testing.assert_array_equal(fp.tables.read(path).to_numpy(), np.asarray(table))


def test_structured_arrays_have_names(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array([(1.0, 2)], dtype=[("z", float), ("n", int)]))
    assert fp.tables.read(tmp_path / "s.npy").columns == ["z", "n"]


def test_missing_cells_are_missing_numbers(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("a,b\n1,NA\n,2.5\nNaN,3\n", encoding="utf-8")
    frame = fp.tables.read(tmp_path / "m.csv")
    assert [str(d) for d in frame.dtypes] == ["Int64", "Float64"]
    assert frame.null_count().row(0) == (2, 1)


def wrong(folder: Path) -> dict[str, Path]:
    texts = {
        "twice.csv": b"a,b,a\n1,2,3\n",
        "headless.csv": b"1.5,2\n3,4\n",
        "empty.csv": b"",
        "norows.csv": b"a,b\n",
        "ragged.csv": b"a,b\n1,2,3\n",
        "notgz.csv.gz": b"a,b\n1,2\n",
        "cut.csv.gz": gzip.compress(b"a,b\n1,2\n" * 100)[:20],
        "not.parquet": b"hello",
        "not.npy": b"hello",
        "rows.txt": b"a\n1\n",
        "latin.csv": "a,b\n\xe9,1\n".encode("latin-1"),
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    np.save(folder / "cube.npy", np.zeros((2, 2, 2)))
    np.save(folder / "words.npy", np.array([["a"]]))
    return {name: folder / name for name in [*texts, "cube.npy", "words.npy"]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice.csv", "more than one column called 'a'"),
        ("headless.csv", "begins with numbers \\(1.5, 2\\)"),
        ("empty.csv", "is empty"),
        ("norows.csv", "holds no rows"),
        ("ragged.csv", "cannot be read as CSV"),
        ("notgz.csv.gz", "cannot be read as CSV"),
        ("cut.csv.gz", "cannot be read as CSV"),
        ("latin.csv", "cannot be read as CSV"),
        ("not.parquet", "cannot be read as Parquet"),
        ("not.npy", "cannot be read as NPY"),
        ("cube.npy", "shape \\(2, 2, 2\\)"),
        ("words.npy", "of numbers"),
        ("rows.txt", "ends in .txt; a table's file ends in .csv"),
    ],
)
def test_a_wrong_file_is_explained_in_one_line(tmp_path: Path, name: str, message: str) -> None:
    path = wrong(tmp_path)[name]
    with pytest.raises(ValueError, match=message) as caught:
        fp.tables.read(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_is_named_with_the_near_miss(tmp_path: Path) -> None:
    fp.tables.write(FRAME, tmp_path / "catalogue.csv")
    with pytest.raises(FileNotFoundError, match=r"no file catalog.csv in .*; there is catalogue.csv"):
        fp.tables.read(tmp_path / "catalog.csv")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fp.tables.read(tmp_path / "nowhere" / "catalog.csv")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        (tmp_path / "folder.csv").mkdir()
        fp.tables.read(tmp_path / "folder.csv")


def test_a_missing_column_is_named_with_the_near_miss(tmp_path: Path) -> None:
    path = fp.tables.write(FRAME, tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="there is no column 'Z'; did you mean 'z'"):
        fp.tables.read(path, ["n", "Z"])


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = fp.tables.write(FRAME, tmp_path / "rows.csv")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fp.tables.write(FRAME, path)
    fp.tables.write(FRAME.head(1), path, overwrite=True)
    assert fp.tables.read(path).height == 1


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = fp.tables.write(FRAME.select("n"), tmp_path / "rows.npy")
    with pytest.raises(ValueError, match="column 'id' holds no numbers"):
        fp.tables.write(FRAME, path, overwrite=True)
    assert fp.tables.read(path).height == 3
    assert [p.name for p in tmp_path.iterdir()] == ["rows.npy"]


def rounded_table() -> tuple[pl.DataFrame, dict[str, fp.Support]]:
    rng = np.random.default_rng(0)
    n = 600
    count = rng.poisson(4, n)
    held = {
        "real": (rng.normal(size=n), None),
        "far from 0": (rng.normal(2459000, 3, n), None),
        "count": (count, fp.integer(0)),
        "signed": (rng.integers(-3, 4, n), fp.integer()),
        "flag": (rng.random(n) < 0.3, fp.integer(0, 1)),
        "centred count": ((count - count.mean()).astype(np.float32), "lattice"),
        "rounded": (rng.normal(size=n).round(1), fp.lattice(0.1, 0.0)),
        "shifted flag": (np.where(rng.random(n) < 0.5, -0.25, 0.75), fp.lattice(1.0, -0.25, lo=-0.25, hi=0.75)),
        "positive": (rng.exponential(size=n), fp.positive()),
        "share": (rng.random(n), fp.interval(0, 1)),
        "odd levels": (rng.choice([-7.3, 1.1, 7.77, 9.0, 12.34], n), None),
    }
    return pl.DataFrame({k: v for k, (v, _) in held.items()}), {k: s for k, (_, s) in held.items() if s is not None}


def test_supports_are_proposed_where_values_show_them() -> None:
    frame, want = rounded_table()
    found = fp.infer_supports(frame, show=False)
    lattice = found.pop("centred count")
    want.pop("centred count")
    assert found == want
    assert lattice.step == 1.0
    assert not lattice.is_integer


def test_proposals_are_printed_and_each_fits_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    frame, _ = rounded_table()
    found = fp.infer_supports(frame)
    text = capsys.readouterr().out
    assert [line.split("  ")[0] for line in text.splitlines()] == ["column", *frame.columns]
    assert "21% of the rows share the value" in text.splitlines()[-1]
    assert not any("outside" in c.note for c in fp.tables.columns(frame, found))


def test_the_column_table_tells_of_trouble() -> None:
    frame = pd.DataFrame({"a": [0.0, 1.0, 2.5, np.nan], "b": [1.0, 1.0, 1.0, 1.0], "c": [1.5, 2.0, 3.0, -1.0]})
    lines = fp.tables.describe(frame, {"a": fp.positive(), "c": fp.integer()}).splitlines()
    assert "1 values on the open bound" in lines[1]
    assert lines[2].endswith("constant: drop it, or use it as context")
    assert lines[3].endswith("1 row outside")


def test_columns_that_hold_no_numbers_are_named() -> None:
    with pytest.raises(TypeError, match=r"'id' \(str\)"):
        fp.infer_supports(FRAME, show=False)
