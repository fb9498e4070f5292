"""Supports: their words, torch constraints, TOML files, and what they say of values."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import constraints

import flowpath as fp
from flowpath.supports import as_support, read_supports
from flowpath.tables.layout import Layout, cell_points, resolve

INF = math.inf
toml = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no reader of TOML")

SUPPORTS = {
    "real": fp.real(),
    "positive": fp.positive(),
    "above": fp.above(-2.5),
    "below": fp.below(3.0),
    "interval": fp.interval(-1, 2),
    "integer": fp.integer(),
    "integer from 0": fp.integer(0),
    "integer to 3": fp.integer(hi=3),
    "flag": fp.integer(0, 1),
    "lattice": fp.lattice(0.1, 0.05),
    "lattice within": fp.lattice(2.0, 0.5, lo=-1.5, hi=4.5, tolerance=0.1),
}
each_support = pytest.mark.parametrize("support", [pytest.param(s, id=n) for n, s in SUPPORTS.items()])


@each_support
def test_words_make_the_support_again(support: fp.Support) -> None:
    assert as_support(repr(support)) == support


@each_support
def test_draws_lie_in_the_support(support: fp.Support) -> None:
    layout = Layout([support])
    flow = layout.transform()
    z = 5 * torch.randn(500, 1, dtype=torch.float64)
    x = layout.settle(z if flow is None else flow.inverse(z)[0])
    assert not (layout.outside(x) | layout.on_bound(x)).any()


@each_support
def test_ladj_is_that_of_autodiff(support: fp.Support) -> None:
    t = Layout([support, fp.positive()]).transform()
    x = t.inverse(torch.randn(2, dtype=torch.float64))[0]
    jacobian = torch.autograd.functional.jacobian(lambda v: t(v)[0], x)
    torch.testing.assert_close(t(x)[1], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize(
    ("constraint", "support"),
    [
        (constraints.real, fp.real()),
        (constraints.positive, fp.positive()),
        (constraints.nonnegative, fp.positive()),
        (constraints.greater_than(2.0), fp.above(2)),
        (constraints.less_than(2.0), fp.below(2)),
        (constraints.interval(torch.tensor(0.0), 3.0), fp.interval(0, 3)),
        (constraints.unit_interval, fp.interval(0, 1)),
        (constraints.boolean, fp.integer(0, 1)),
        (constraints.nonnegative_integer, fp.integer(0)),
        (constraints.integer_interval(1, 6), fp.integer(1, 6)),
        (constraints.independent(constraints.positive, 1), fp.positive()),
    ],
    ids=str,
)
def test_torch_constraints_are_understood(constraint: object, support: fp.Support) -> None:
    assert as_support(constraint) == support


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("postive", "did you mean 'positive'"),
        ("interval(1)", "interval"),
        ("interval(2, 1)", "below the upper one, got 2.0 and 1.0"),
        ("above(nan)", "finite a"),
        ("above(x)", "'x' in it is no number"),
        ("integer(0.5)", "whole number, got 0.5"),
        ("integer(3, 3)", "at least two values"),
        ("lattice(0)", "step above 0"),
        ("lattice(1, 0, lo=0.5)", "one of its values, got 0.5"),
        ("__import__('os')", "known are real"),
        (constraints.simplex, "not about single numbers"),
        (3.0, "got float"),
    ],
)
def test_a_wrong_support_is_explained(value: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        as_support(value, "'z'")


@toml
def test_supports_come_from_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "supports.toml"
    path.write_text('[supports]\nz = "positive"\n"n det" = "integer(0)"\n', encoding="utf-8")
    assert read_supports(path) == {"z": fp.positive(), "n det": fp.integer(0)}
    assert resolve(str(path), ["n det", "e", "z"]) == (fp.integer(0), fp.real(), fp.positive())


@toml
@pytest.mark.parametrize(
    ("text", "message"), [("z = positive", "no TOML"), ("z = 3", "in quotes"), ('z = "integr"', "'z' in .*integer")]
)
def test_a_wrong_toml_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_supports(path)


def test_a_missing_toml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.toml"):
        read_supports(tmp_path / "none.toml")


def test_columns_that_are_not_there_are_named_with_the_near_miss() -> None:
    with pytest.raises(ValueError, match="'mgg' that is not there; did you mean 'mag'"):
        resolve({"mgg": fp.real()}, ["z", "mag"])
    with pytest.raises(ValueError, match="one a column, 2, got 1"):
        resolve([fp.real()], ["z", "mag"])
    with pytest.raises(TypeError, match="got int"):
        resolve(3, ["z"])


def test_outside_bounds_and_off_lattice() -> None:
    layout = Layout([fp.positive(), fp.integer(0, 3), fp.lattice(0.1, 0.05)])
    x = torch.tensor([[1.0, 2.0, 0.15], [-1.0, 4.0, 0.1], [0.0, 1.5, 0.1504], [2.0, -1.0, -7.95]], dtype=torch.float64)
    assert layout.outside(x).tolist() == [[False] * 3, [True] * 3, [False, True, False], [False, True, False]]
    assert layout.on_bound(x).tolist() == [[False] * 3, [False] * 3, [True, False, False], [False] * 3]
    assert layout.snap(x)[2, 2] == pytest.approx(0.15)


def test_values_on_a_bound_move_halfway_to_the_nearest_inside() -> None:
    layout = Layout([fp.interval(0, 1)])
    x = torch.tensor([[0.0], [0.02], [0.9], [1.0]], dtype=torch.float64)
    moved = layout.nudge(x, layout.nudges(x))
    assert moved.flatten().tolist() == pytest.approx([0.01, 0.02, 0.9, 0.95])


def test_lattice_values_come_back_with_their_own_digits() -> None:
    layout = Layout([fp.lattice(0.1, 0.0)])
    x = layout.settle(torch.tensor([[0.31], [0.69]], dtype=torch.float64))
    assert x.flatten().tolist() == [0.3, 0.7]


def test_dequantised_values_stay_in_their_cells_and_fill_them() -> None:
    layout = Layout([fp.lattice(2.0, 1.0), fp.real()])
    x = torch.tensor([[3.0, 0.5]], dtype=torch.float64).expand(2000, 2)
    y = layout.dequantise(x, torch.Generator().manual_seed(0))
    assert bool((y[:, 1] == 0.5).all())
    assert 2.0 < float(y[:, 0].min()) < 2.02
    assert 3.98 < float(y[:, 0].max()) < 4.0


@pytest.mark.parametrize("lattices", [0, 1, 2, 7])
def test_cell_points_are_fixed_and_even_in_each_coordinate(lattices: int) -> None:
    u = cell_points(16, lattices)
    assert torch.equal(u, cell_points(16, lattices))
    middles = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    for j in range(lattices):
        assert torch.equal(u[:, j].sort().values, middles)


def test_cell_points_want_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two, got 12"):
        cell_points(12, 1)
