"""Rows: what may be passed as data, and the message for what may not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import flowpath as fp
from flowpath.training.front import Front
from flowpath.training.rowchecks import check_fits, check_trainable
from flowpath.training.rows import is_stream, parts, read

TABLE = np.array([[1.0, 10.0], [2.0, 30.0], [3.0, 20.0]])


class Pairs(Dataset):
    """Three items (x, context)."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.as_tensor(TABLE[i]), torch.tensor([float(i)])


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.zeros(0))


SOURCES = {
    "tensor": torch.tensor(TABLE),
    "float32": torch.tensor(TABLE).float(),
    "integers": torch.tensor(TABLE).int(),
    "needs grad": torch.tensor(TABLE, requires_grad=True),
    "array": TABLE,
    "big endian": TABLE.astype(">f8"),
    "read-only": np.broadcast_to(TABLE, TABLE.shape),
    "list": TABLE.tolist(),
    "pandas": pd.DataFrame(TABLE, columns=["a", "b"]),
    "pandas nullable": pd.DataFrame({"a": pd.array([1, 2, 3], dtype="Int64"), "b": TABLE[:, 1]}),
    "polars": pl.DataFrame({"a": [1, 2, 3], "b": TABLE[:, 1]}),
    "structured": np.array([tuple(r) for r in TABLE], dtype=[("a", "f8"), ("b", "f4")]),
    "data set": TensorDataset(torch.tensor(TABLE)),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_gives_the_same_float64_rows(source: Any) -> None:
    x = read(source).x
    assert x.dtype == torch.float64
    assert torch.equal(x, torch.tensor(TABLE))


@pytest.mark.parametrize("kind", ["pandas", "polars", "structured"])
def test_names_of_columns_are_kept(kind: str) -> None:
    assert read(SOURCES[kind]).names == ("'a'", "'b'")


def test_data_set_brings_its_context() -> None:
    assert torch.equal(read(Pairs()).context, torch.tensor([[0.0], [1.0], [2.0]]).double())


@pytest.mark.parametrize("weights", [[1, 2, 3], np.ones((3, 1)), pd.Series([1.0, 2, 3]), pl.Series([1, 2, 3])])
def test_weights_come_as_any_column(weights: Any) -> None:
    assert read(TABLE, weights=weights).weights.shape == (3,)


@pytest.mark.parametrize("item", [(1,), {"x": 1}, 1, [1, None]], ids=["tuple", "dict", "bare", "list"])
def test_batches_come_in_several_shapes(item: Any) -> None:
    assert parts(item) == (1, None, None)


@pytest.mark.parametrize(
    ("source", "stream"),
    [
        (TABLE, False),
        (SOURCES["pandas"], False),
        (SOURCES["polars"], False),
        (TABLE.tolist(), False),
        (Pairs(), False),
        (DataLoader(Pairs()), True),
        (Endless(), True),
        (iter([TABLE]), True),
        ("abc", False),
    ],
    ids=["array", "pandas", "polars", "list", "data set", "loader", "iterable set", "iterator", "text"],
)
def test_streams_are_told_from_rows(source: Any, stream: bool) -> None:
    assert is_stream(source) is stream


BAD = {
    "text": ("abc", TypeError, "expects x to be a tensor, an array, a DataFrame.* got str"),
    "number": (3, TypeError, "got int"),
    "strings": (np.array([["a", "b"]]), TypeError, "expects x to hold numbers, got <U1"),
    "ragged": ([[1, 2], [3]], TypeError, "rows of one length"),
    "complex": (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "expects x to be real"),
    "string column": (pd.DataFrame({"z": [1.0], "name": ["M31"]}), TypeError, r"words or dates .* 'name' \(str\)"),
    "polars strings": (pl.DataFrame({"z": [1.0], "name": ["M31"]}), TypeError, r"'name' \("),
    "dates": (pd.DataFrame({"day": pd.to_datetime(["2020-01-01"])}), TypeError, r"'day' \(datetime64"),
    "lazy frame": (pl.LazyFrame({"z": [1.0]}), TypeError, "collect"),
    "names twice": (pd.DataFrame(TABLE, columns=["a", "a"]), ValueError, "more than one column called 'a'"),
    "one dim": (np.zeros(3), ValueError, r"rows \(N, features\), got shape \(3,\); .* pass x\[:, None\]"),
    "no rows": (np.zeros((0, 2)), ValueError, r"x is empty: shape \(0, 2\)"),
    "no columns": (pd.DataFrame(index=[1, 2]), ValueError, "it has no columns"),
    "empty data set": (TensorDataset(torch.zeros(0, 2)), ValueError, "a TensorDataset of no items"),
    "nan": (
        pd.DataFrame({"z": [1.0, 2.0], "mag": [3.0, np.nan]}),
        ValueError,
        r"x holds 1 number that is not finite, in 1 row: row 1 column 'mag' \(nan\)",
    ),
    "inf": (np.array([[1, np.inf], [np.nan, 2]]), ValueError, r"2 numbers .* in 2 rows: row 0 column 1 \(inf\)"),
    "polars null": (pl.DataFrame({"z": [1.0, None]}), ValueError, "row 1 column 'z'"),
}  # fmt: skip


@pytest.mark.parametrize(("x", "error", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(x)


BESIDE = {
    "short context": ({"context": np.zeros((2, 1))}, "x has 3 rows, context has 2"),
    "short weights": ({"weights": [1.0]}, "x has 3 rows, weights has 1"),
    "wide weights": ({"weights": np.ones((3, 2))}, r"one weight a row, got weights of shape \(3, 2\)"),
    "nan weights": ({"weights": [1.0, np.nan, 1.0]}, "weights are not finite in 1 row, first in row 1"),
    "no weight": ({"weights": [1.0, -1.0, 0.0]}, "weights with a positive sum, got 0"),
    "nan context": ({"context": [[1.0], [np.nan], [2.0]]}, "context holds 1 number .* row 1 column 0"),
}


@pytest.mark.parametrize(("beside", "message"), BESIDE.values(), ids=BESIDE)
def test_bad_context_and_weights_are_named(beside: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(TABLE, **beside)


def test_data_set_takes_no_second_context() -> None:
    with pytest.raises(ValueError, match="a Dataset brings its own context"):
        read(Pairs(), np.zeros((3, 1)))


def test_rows_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="x on cpu, context on meta; move them to one"):
        read(torch.zeros(2, 2), torch.zeros(2, 1, device="meta"))


@pytest.mark.parametrize("item", [{"y": 1}, (1, 2, 3, 4)], ids=["key", "four"])
def test_batches_of_another_form_are_refused(item: Any) -> None:
    with pytest.raises(ValueError, match="expects"):
        parts(item)


def test_wrong_columns_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("the flow has 3 features, x has 2 columns ('a', 'b')")):
        check_fits(read(SOURCES["pandas"]), fp.gaussian(3))


@pytest.mark.parametrize(
    ("width", "context", "message"),
    [
        (2, None, "expects a context with 2 features, got none; pass context="),
        (0, np.zeros((3, 1)), "takes no context, got one; build it with context=1"),
        (2, np.zeros((3, 1)), "expects a context with 2 features, the context has 1 column"),
    ],
    ids=["missing", "superfluous", "narrow"],
)
def test_wrong_context_is_named(width: int, context: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fits(read(TABLE, context), fp.gaussian(2, width, hidden_features=(4,)))


UNFIT = {
    "constant": ({"a": [1.0, 2, 3], "z": [4.0, 4, 4]}, None, r"column 'z' \(4\) is constant"),
    "constants": ({"a": [1.0, 1, 1], "z": [4.0, 4, 4]}, None, "columns 'a' .* are constant"),
    "duplicate": ({"a": [1.0, 2, 3], "b": [3.0, 1, 2], "c": [1.0, 2, 3]}, None, "columns 'a' and 'c' are identical"),
    "one row": ({"a": [1.0]}, None, "too few rows: at least 2 are needed to train on, got 1"),
    "one weight": ({"a": [1.0, 2, 3]}, [1.0, 0, 0], "at least 2 need a positive weight, got 1"),
}


@pytest.mark.parametrize(("columns", "weights", "message"), UNFIT.values(), ids=UNFIT)
def test_rows_without_a_density_are_named(columns: dict[str, list[float]], weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_trainable(read(pd.DataFrame(columns), weights=weights))


def test_duplicates_are_found_in_many_rows() -> None:
    x = np.random.default_rng(0).normal(size=(20_000, 2))
    with pytest.raises(ValueError, match="columns 0 and 2 are identical"):
        check_trainable(read(np.c_[x, x[:, 0]]))


def julian() -> np.ndarray:
    """Two columns, the first Julian dates that differ in the fifth decimal."""
    day = 2459000.0 + 1e-5 * np.arange(1, 10)
    return np.c_[day, np.cos(day * 1e5)]


def test_front_keeps_the_order_of_julian_dates() -> None:
    rows = read(julian())
    front = Front(fp.nsf(2, transforms=1))
    front.set_from(rows)
    z = front.prepare(rows).x
    assert z.dtype == torch.float32
    assert bool((z[1:, 0] > z[:-1, 0]).all())


def test_front_keeps_the_order_of_julian_dates_in_a_context() -> None:
    rows = read(julian()[:, 1:], julian()[:, :1])
    front = Front(fp.nsf(1, 1, transforms=1))
    front.set_from(rows)
    c = front.prepare(rows).context
    assert bool((c[1:, 0] > c[:-1, 0]).all())


def test_front_says_where_a_cast_loses_digits() -> None:
    with pytest.warns(UserWarning, match="column 0 of x loses digits .* fp.Whiten"):
        Front(fp.nsf(2, transforms=1, whiten="none")).prepare(read(julian()))


def test_front_and_inner_flow_make_the_flow() -> None:
    positive = torch.distributions.biject_to(torch.distributions.constraints.positive)
    layers = [fp.from_torch(positive), fp.Whiten(2), fp.Permutation([1, 0]), fp.TriangularAffine(2)]
    flow = fp.Flow(fp.Chain(layers), fp.StandardNormal(2)).double()
    rows = read(np.exp(np.random.default_rng(0).normal(size=(50, 2))))
    front = Front(flow)
    front.set_from(rows)
    x, _, _, ladj = front.prepare(rows)
    assert len(front.layers) == 2
    assert torch.allclose(front.inner.log_prob(x) + ladj, flow.log_prob(rows.x))


def test_front_keeps_a_whitening_that_is_set() -> None:
    flow = fp.gaussian(2)
    Front(flow).set_from(read(TABLE))
    Front(flow).set_from(read(TABLE + 5))
    assert torch.allclose(flow.transform.transforms[0].loc, torch.tensor(TABLE.mean(0)))


def test_front_of_a_flow_that_only_whitens() -> None:
    flow = fp.Flow(fp.Chain([fp.Whiten(2)]), fp.DiagonalNormal(2))
    rows = read(TABLE)
    front = Front(flow)
    front.set_from(rows)
    x, _, _, ladj = front.prepare(rows)
    assert torch.allclose(front.inner.log_prob(x).double() + ladj, flow.log_prob(rows.x.float()).double())
