"""FlowDensity: scikit-learn's contract, units, lattices against enumeration, missing values, files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.distributions import AffineTransform, MultivariateNormal

import flowpath as fp
from flowpath.tables.layout import Layout, cell_points
from flowpath.tables.scores import log_mass

TINY: dict[str, Any] = {"hidden_features": (8,), "compile": False, "device": "cpu", "random_state": 0}
QUICK: dict[str, Any] = {**TINY, "transforms": 1, "epochs": 2}
GAUSS: dict[str, Any] = {"architecture": "gaussian", "compile": False, "device": "cpu", "random_state": 0}
SUPPORTS = {"z": fp.positive(), "n": fp.integer(0)}


def frame(rows: int = 120, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    held = {"z": rng.exponential(size=rows), "e": rng.normal(size=rows), "n": rng.poisson(3, rows)}
    return pd.DataFrame(held)


@pytest.fixture(scope="module")
def model() -> fp.FlowDensity:
    return fp.FlowDensity(SUPPORTS, **QUICK).fit(frame())


@parametrize_with_checks([fp.FlowDensity(**{**QUICK, "random_state": None})])
def test_scikit_learn_finds_its_contract_kept(estimator: Any, check: Any) -> None:
    state = np.random.get_state()  # one of the checks shuffles by NumPy's own generator
    check(estimator)
    np.random.set_state(state)


def test_bounded_densities_integrate_to_one_in_the_users_units() -> None:
    rng = np.random.default_rng(0)
    x = np.c_[100 + 50 * rng.exponential(size=300)]
    model = fp.FlowDensity([fp.above(100)], **GAUSS, steps=200).fit(x)
    grid = 100 + np.exp(np.linspace(-20, 14, 4001))
    density = np.exp(model.score_samples(grid[:, None]))
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)
    assert model.score_samples([[100.0], [99.0]]).tolist() == [-math.inf, -math.inf]


def test_rescaling_a_column_shifts_its_log_density_by_the_log_of_the_unit() -> None:
    x = frame()[["z", "e"]].to_numpy()
    a = fp.FlowDensity([fp.positive(), fp.real()], **QUICK).fit(x).score_samples(x)
    b = fp.FlowDensity([fp.positive(), fp.real()], **QUICK).fit(x * 1000).score_samples(x * 1000)
    np.testing.assert_allclose(a - b, 2 * math.log(1000), atol=1e-3)


def test_the_mass_of_cells_is_that_of_a_known_model_in_one_column() -> None:
    flow = fp.Flow(fp.from_torch(AffineTransform(2.3, 1.7)), fp.StandardNormal(1)).double()
    x = torch.arange(-12.0, 18.0, dtype=torch.float64)
    found = log_mass(flow, Layout([fp.integer()]), x[:, None], None, cell_points(16, 1)).numpy()
    want = stats.norm(2.3, 1.7).cdf(x.numpy() + 0.5) - stats.norm(2.3, 1.7).cdf(x.numpy() - 0.5)
    np.testing.assert_allclose(np.exp(found), want, atol=1e-4)
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-6)


def test_the_mass_of_cells_is_that_of_a_known_model_in_two_columns() -> None:
    loc, cov = torch.tensor([1.0, 0.6]), torch.tensor([[2.0, 0.5], [0.5, 0.4]])
    flow = fp.Flow(fp.Permutation(range(2)), MultivariateNormal(loc.double(), cov.double())).double()
    layout = Layout([fp.integer(), fp.lattice(0.5, 0.25)])
    grid = torch.cartesian_prod(torch.arange(-6.0, 9.0), torch.arange(-11.0, 15.0) * 0.5 + 0.25).double()
    found = log_mass(flow, layout, grid, None, cell_points(16, 2)).exp()
    u = (torch.arange(48, dtype=torch.float64) + 0.5) / 48
    exact = log_mass(flow, layout, grid, None, torch.cartesian_prod(u, u)).exp()
    assert float((found - exact).abs().max()) < 3e-3
    assert float((found - exact).abs().sum()) < 0.03
    assert float(found.sum()) == pytest.approx(1, abs=2e-3)


def test_mixed_columns_give_density_times_mass() -> None:
    flow = fp.Flow(fp.Permutation(range(2)), MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([])).double()
    x = torch.tensor([[0.4, 1.0]], dtype=torch.float64)
    found = log_mass(flow, Layout([fp.real(), fp.integer()]), x, None, cell_points(16, 1))
    want = stats.norm.logpdf(0.4) + math.log(stats.norm.cdf(1.5) - stats.norm.cdf(0.5))
    assert float(found[0]) == pytest.approx(want, abs=1e-3)


def test_a_discrete_law_is_learnt_and_its_masses_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    x = rng.binomial(4, 0.3, size=(800, 1))
    options = {"options": {"bins": 8}, "steps": 400, "learning_rate": 1e-2}
    model = fp.FlowDensity([fp.integer(0, 4)], **{**TINY, **options, "transforms": 1}).fit(x)
    mass = np.exp(model.score_samples(np.arange(5)[:, None]))
    assert mass.sum() == pytest.approx(1, abs=0.02)
    assert np.abs(mass - stats.binom(4, 0.3).pmf(np.arange(5))).sum() < 0.1
    drawn = model.sample(500, random_state=1)
    assert drawn.dtype == np.int64
    assert set(np.unique(drawn)) <= set(range(5))


def test_scores_are_the_same_each_time_and_minus_infinity_outside(model: fp.FlowDensity) -> None:
    df = frame(5)
    df.loc[1, "z"] = -1.0
    df["n"] = df["n"].astype(float)
    df.loc[2, "n"] = 2.5
    df.loc[3, "z"] = 0.0
    scores = model.score_samples(df)
    assert np.isneginf(scores).tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(scores, model.score_samples(df))


@pytest.mark.parametrize("make", [pl.DataFrame, pd.DataFrame], ids=["polars", "pandas"])
def test_frames_are_matched_by_name(model: fp.FlowDensity, make: Any) -> None:
    df = frame(6)
    other = make({"extra": df["n"].to_numpy() * 2, **{c: df[c].to_numpy() for c in ("n", "z", "e")}})
    np.testing.assert_array_equal(model.score_samples(other), model.score_samples(df))


def test_a_missing_column_is_named_with_the_near_miss(model: fp.FlowDensity) -> None:
    with pytest.raises(ValueError, match=r"score_samples: there is no column 'z'; did you mean 'Z'"):
        model.score_samples(frame(5).rename(columns={"z": "Z"}))


def test_columns_by_position_where_there_are_no_names() -> None:
    x = frame().to_numpy()
    model = fp.FlowDensity({0: fp.positive(), 2: fp.integer(0)}, **QUICK).fit(x)
    assert not hasattr(model, "feature_names_in_")
    assert isinstance(model.sample(2), np.ndarray)
    assert torch.equal(
        torch.from_numpy(model.score_samples(torch.from_numpy(x))), torch.from_numpy(model.score_samples(x))
    )


@pytest.mark.parametrize("make", [lambda d: d, lambda d: pl.DataFrame(d.to_dict("list"))], ids=["pandas", "polars"])
def test_samples_are_a_table_like_the_one_fitted(make: Any) -> None:
    table = make(frame())
    model = fp.FlowDensity(SUPPORTS, **QUICK).fit(table)
    drawn = model.sample(50, random_state=3)
    assert type(drawn) is type(table)
    assert list(drawn.columns) == ["z", "e", "n"]
    assert [str(d).lower() for d in drawn.dtypes] == ["float64", "float64", "int64"]
    assert float(drawn["z"].min()) > 0
    assert int(drawn["n"].min()) >= 0
    again, other = model.sample(50, random_state=3), model.sample(50, random_state=4)
    assert drawn.equals(again)
    assert not drawn.equals(other)


def test_narrow_dtypes_come_back_and_flags_are_flags() -> None:
    df = frame().assign(
        n=lambda d: d["n"].astype("int16"), flag=lambda d: d["e"] > 0, k=lambda d: d["n"].astype("Int64")
    )
    supports = {"n": "integer(0)", "flag": torch.distributions.constraints.boolean, "k": fp.integer()}
    drawn = fp.FlowDensity(supports, **QUICK).fit(df).sample(20)
    assert [str(d) for d in drawn.dtypes] == ["float64", "float64", "int16", "bool", "Int64"]


def test_data_outside_the_support_raise_with_rows_and_columns() -> None:
    df = frame()
    df.loc[7, "z"] = -2.0
    with pytest.raises(ValueError, match=r"1 value outside the support, 'z' of positive\(\): row 7 column 'z' \(-2\)"):
        fp.FlowDensity(SUPPORTS, **QUICK).fit(df)


def test_values_on_an_open_bound_raise_or_are_nudged_and_counted() -> None:
    df = frame()
    df.loc[[3, 9], "z"] = 0.0
    with pytest.raises(ValueError, match=r"2 values on an open bound .* row 3 column 'z' \(0\).*at_bound='nudge'"):
        fp.FlowDensity(SUPPORTS, **QUICK).fit(df)
    model = fp.FlowDensity(SUPPORTS, at_bound="nudge", **QUICK).fit(df)
    assert model.counts_["nudged"] == 2
    assert any("'z': 2 values on the bound 0 moved to" in note for note in model.notes_)
    assert np.isfinite(model.score_samples(df)).all()


def test_missing_values_raise_or_are_dropped_and_counted() -> None:
    df = frame()
    df.loc[[3, 9], "z"], df.loc[9, "e"] = np.nan, np.nan
    with pytest.raises(ValueError, match=r"\(NaN\) in 2 rows: 'z' \(2\), 'e' \(1\); pass missing='drop'"):
        fp.FlowDensity(SUPPORTS, **QUICK).fit(df)
    model = fp.FlowDensity(SUPPORTS, missing="drop", **QUICK).fit(df, sample_weight=np.ones(len(df)))
    assert (model.counts_["rows"], model.counts_["missing"], model.counts_["used"]) == (120, 2, 118)
    assert not {3, 9} & set(np.concatenate(list(model.rows_.values())).tolist())
    assert np.isnan(model.score_samples(df)).nonzero()[0].tolist() == [3, 9]
    assert math.isfinite(model.score(df))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"at_bound": "warn"}, "at_bound to be one of"),
        ({"missing": "fill"}, "missing to be one of"),
        ({"regularise": "yes"}, "regularise"),
        ({"cell_points": 10}, "power of two"),
        ({"architecture": "nfs"}, "did you mean 'nsf'"),
        ({"options": {"bin": 4}}, "takes no bin; did you mean 'bins'"),
        ({"supports": {"zz": fp.real()}}, "did you mean 'z'"),
        ({"validation": 1.5}, "share"),
        ({"random_state": -1}, "whole number"),
        ({"fit_options": {"optimiser": 1}}, "optimiser"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_wrong_setting_is_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fp.FlowDensity(**{**QUICK, **settings}).fit(frame())


def test_constant_columns_and_words_are_named() -> None:
    with pytest.raises(ValueError, match=r"column 'c' \(1\) is constant"):
        fp.FlowDensity(**QUICK).fit(frame().assign(c=1.0))
    with pytest.raises(TypeError, match="'c'"):
        fp.FlowDensity(**QUICK).fit(frame().assign(c="a"))


def test_weights_count() -> None:
    x = np.r_[np.zeros(100), np.ones(100)][:, None] + np.random.default_rng(0).normal(size=(200, 1)) * 0.1
    w = np.r_[np.full(100, 1.0), np.full(100, 3.0)]
    model = fp.FlowDensity(**GAUSS, steps=300, learning_rate=0.02).fit(x, sample_weight=w)
    assert float(model.sample(4000, random_state=0).mean()) == pytest.approx(0.75, abs=0.05)
    values = model.score_samples(x)
    assert model.score(x, sample_weight=w) == pytest.approx(np.average(values, weights=w))


def test_a_context_is_matched_by_name_and_conditions_samples() -> None:
    rng = np.random.default_rng(0)
    c = pl.DataFrame({"a": rng.normal(size=400), "b": rng.normal(size=400)})
    x = pl.DataFrame({"y": 3 * c["a"].to_numpy() + 0.1 * rng.normal(size=400)})
    model = fp.FlowDensity(**GAUSS, steps=400, learning_rate=0.01).fit(x, context=c)
    np.testing.assert_array_equal(model.score_samples(x, context=c[["b", "a"]]), model.score_samples(x, context=c))
    drawn = model.sample(200, context={"b": 0.0, "a": 1.0}, random_state=0)
    assert float(drawn["y"].mean()) == pytest.approx(3, abs=0.5)
    assert model.sample(400, context=c).height == 400
    with pytest.raises(ValueError, match="fitted with a context of a, b; pass context="):
        model.score_samples(x)
    with pytest.raises(ValueError, match="lacks 'b'"):
        model.sample(2, context={"a": 1.0})
    with pytest.raises(ValueError, match="of 1 row, or of one for each of 3 draws"):
        model.sample(3, context=c)


def test_columns_with_many_digits_keep_them() -> None:
    x = np.random.default_rng(0).normal(2459000.0, 1e-4, size=(300, 1))
    model = fp.FlowDensity(**GAUSS, steps=200, learning_rate=0.02).fit(x)
    assert float(model.sample(1000).std()) == pytest.approx(1e-4, rel=0.2)
    assert model.score(x) == pytest.approx(stats.norm.logpdf(x, x.mean(), x.std()).mean(), abs=0.1)


@pytest.mark.parametrize("name", ["run", "one.safetensors"])
def test_what_is_saved_is_loaded_whole(model: fp.FlowDensity, tmp_path: Path, name: str) -> None:
    path = model.save(tmp_path / name)
    again = fp.FlowDensity.load(path)
    df = frame(8, seed=1)
    np.testing.assert_array_equal(again.score_samples(df), model.score_samples(df))
    pd.testing.assert_frame_equal(again.sample(5, random_state=1), model.sample(5, random_state=1))
    for attribute in ("supports_", "schema_", "counts_", "notes_", "n_features_in_", "context_names_"):
        assert getattr(again, attribute) == getattr(model, attribute)
    assert again.feature_names_in_.tolist() == ["z", "e", "n"]
    assert again.result_.history == model.result_.history
    assert again.get_params()["hidden_features"] == [8]
    y = model.to_cells(df)
    assert torch.equal(fp.load(path).log_prob(y), model.flow_.log_prob(y))


def test_the_sidecar_states_columns_supports_and_units(model: fp.FlowDensity, tmp_path: Path) -> None:
    model.save(tmp_path)
    held = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [c["support"] for c in held["columns"]] == ["positive()", "real()", "integer(0)"]
    assert held["units"].startswith("nats")
    assert held["cell_points"] == 16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fit.json", "flow.safetensors", "history.csv", "table.json"]


def test_a_bare_flow_is_no_density(tmp_path: Path) -> None:
    fp.save(fp.gaussian(2), tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="read it with fp.load"):
        fp.FlowDensity.load(tmp_path / "f.safetensors")


def test_cells_suit_the_flow(model: fp.FlowDensity) -> None:
    df = frame()
    y = model.to_cells(df)
    assert bool(((y[:, 2] - torch.tensor(df["n"].to_numpy())).abs() <= 0.5).all())
    assert bool(model.flow_.log_prob(y).isfinite().all())


def test_held_out_scores_are_those_of_score_samples() -> None:
    df = frame()
    model = fp.FlowDensity(SUPPORTS, test=0.2, **QUICK).fit(df)
    assert model.counts_["test"] == 24
    held = df.iloc[model.rows_["test"]]
    assert model.score(held) == pytest.approx(model.result_.test_log_prob, abs=1e-6)


def test_the_same_seed_gives_the_same_model(keeps_rng: Any) -> None:
    with keeps_rng():
        a, b = (fp.FlowDensity(SUPPORTS, **QUICK).fit(frame()).score(frame()) for _ in range(2))
    assert a == b


def test_processes_that_fit_together_need_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each of the 2 processes would split .* random_state=0"):
        fp.FlowDensity().fit(np.eye(3))


def test_epochs_of_dequantised_rows_are_explained() -> None:
    x = np.random.default_rng(0).poisson(3, (100, 1))
    model = fp.FlowDensity([fp.integer(0)], "gaussian", epochs=5, random_state=0).fit(x)
    assert model.result_.epochs == 2
    assert model.notes_[-1].startswith("lattices were dequantised 4 times over, so an epoch is 4 passes over the rows;")


def test_a_random_state_may_be_numpys() -> None:
    settings = {**QUICK, "random_state": np.random.RandomState(3)}
    a = clone(fp.FlowDensity(**settings)).fit(frame()).score(frame())
    b = clone(fp.FlowDensity(**settings)).fit(frame()).score(frame())
    assert a == b


def test_small_tables_get_the_preset_and_others_do_not() -> None:
    def flow(**settings: Any) -> fp.FlowDensity:
        return fp.FlowDensity(**{"steps": 1, "compile": False, "random_state": 0, **settings}).fit(frame())

    small, large = flow(), flow(regularise=False)
    assert any("few rows" in note for note in small.notes_)
    assert not large.notes_
    asked = flow(transforms=2, dropout=0.1)
    assert any("dropout=0.1" in note and "transforms=2" in note for note in asked.notes_)


def test_pipelines_and_grid_searches_take_it() -> None:
    x = frame()[["z", "e"]].to_numpy()
    pipe = make_pipeline(StandardScaler(), fp.FlowDensity(**QUICK))
    assert isinstance(pipe, Pipeline)
    assert math.isfinite(pipe.fit(x).score(x))
    search = GridSearchCV(
        fp.FlowDensity(**QUICK), {"transforms": [1, 2], "supports": [None, ["positive", "real"]]}, cv=2
    )
    assert math.isfinite(search.fit(x).best_score_)


def test_metadata_is_routed() -> None:
    import sklearn

    x = frame()[["z", "e"]].to_numpy()
    seen = []

    class Spy(fp.FlowDensity):
        def fit(self, X: Any, y: Any = None, sample_weight: Any = None, context: Any = None) -> Any:
            seen.append((len(X), len(sample_weight), len(context)))
            return super().fit(X, y, sample_weight, context)

        __init__ = fp.FlowDensity.__init__

    with sklearn.config_context(enable_metadata_routing=True):
        model = Spy(**QUICK).set_fit_request(sample_weight=True, context=True)
        model.set_score_request(sample_weight=True, context=True)
        search = GridSearchCV(model, {"transforms": [1]}, cv=2, refit=False)
        search.fit(x, sample_weight=np.ones(len(x)), context=x[:, :1])
    assert seen == [(60, 60, 60)] * 2
    assert math.isfinite(search.cv_results_["mean_test_score"][0])


def test_the_page_fit_a_table_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "tables.md"
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, str(page), "exec"), space)
