"""The posteriors experiment runs without data; with data, its models are the posteriors that the references are of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import runner
from experiments.posteriors import plot, posteriordb, run, table
from flowpath.svi.density import ModelDensity

pytestmark = pytest.mark.usefixtures("pyro_store")

# log p of each model, unconstrained and with all constants, at the first reference draw; the log evidences hang on it
AT_FIRST_DRAW = {
    "eight_schools_noncentered": -46.548815,
    "eight_schools_centered": -51.224159,
    "arK": 71.730053,
    "garch11": -451.592860,
    "kidscore_interaction": -1876.297682,
    "logmesquite": -14.335758,
    "earn_height": -13417.205744,
    "sblrc": -162.340548,
    "gp_pois_regr": -49.784922,
    "low_dim_gauss_mix": -2104.202273,
    "hmm_drive_0": -1899.313499,
}


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """An experiment sets the number of threads; the tests' stays."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def lines(folder: Path, *words: str) -> list[dict[str, Any]]:
    """Lines of a smoke run."""
    runner.run_all(run.run, run.Config, run.SMOKE, folder, ["--smoke", *words])
    return runner.load(folder / "runs" / "smoke")


def test_every_method_runs_on_the_toy(tmp_path: Path) -> None:
    found = lines(tmp_path)
    assert [x["method"] for x in found] == list(run.Config().methods)
    assert [x["error"] for x in found if "error" in x] == []
    fitted = found[0]
    assert abs(fitted["kl"]) < 0.02 and fitted["khat"] < 0.7 and fitted["corrected_mean_error_max"] < 0.1
    left = tmp_path / "runs" / "smoke"
    table.main(left)
    plot.main(left)
    assert (left / "kl.png").stat().st_size > 0
    text = (left / "table.md").read_text()
    assert "KL at most .02: 1 of 1" in text and "AutoIAFNormal" in text


def test_a_method_that_fails_leaves_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any) -> Any:
        raise NotImplementedError("no such guide")

    monkeypatch.setitem(run.GUIDES, "iaf", broken)
    (line,) = lines(tmp_path, "methods=iaf")
    assert line["error"] == "NotImplementedError: no such guide"
    assert "fails" in table.divergences([line]) and plot.place(line) == plot.MOST


def test_without_data_it_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOWPATH_DATA", str(tmp_path))
    for words in ([], ["posteriors=arK"]):
        runner.run_all(run.run, run.Config, {}, tmp_path, words)
        assert "stan-dev/posteriordb" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()


def test_unknown_methods_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown method nuts; there are fit_posterior"):
        lines(tmp_path, "methods=nuts")


def test_the_last_line_of_a_run_counts() -> None:
    same = {"posterior": "arK", "method": "iaf", "dtype": "float64"}
    found = table.last([same | {"seed": 1, "kl": 3.0}, same | {"seed": 0, "kl": 1.0}, same | {"seed": 1, "kl": 2.0}])
    assert [x["kl"] for x in found] == [1.0, 2.0]


def test_a_target_missed_is_not_counted() -> None:
    good = {
        "posterior": "arK",
        "kl": 0.01,
        "kl_se": 0.001,
        "khat": 0.4,
        "corrected_mean_error_max": 0.02,
        "corrected_sd_ratio_min": 0.97,
        "corrected_sd_ratio_max": 1.01,
        "fit_cpu": 50.0,
    }
    found = table.targets([good, good | {"kl": 0.03, "corrected_sd_ratio_min": 0.9, "fit_cpu": 80.0}])
    assert "KL at most .02: 1 of 2; KL at most .05: 2 of 2" in found
    assert "sds within 5 %: 1 of 2" in found and "60 s (costly likelihoods: 90): 1 of 2" in found


def test_the_readme_names_the_experiment() -> None:
    assert "posteriors/run.py" in (Path(run.__file__).parents[1] / "README.md").read_text(encoding="utf-8")


# -- the models


def prepared(name: str, dtype: torch.dtype = torch.float64) -> tuple[posteriordb.Problem, ModelDensity]:
    if name != "toy" and name not in posteriordb.available():
        pytest.skip(posteriordb.MISSING)
    problem = posteriordb.load(name, dtype)
    return problem, ModelDensity(problem.model, problem.args)


def points(problem: posteriordb.Problem, density: ModelDensity, rows: int) -> Tensor:
    """The first reference draws, unconstrained `(rows, D)`."""
    return torch.stack([density.pack({k: v[i] for k, v in problem.reference.items()}) for i in range(rows)])


each = pytest.mark.parametrize("name", ["toy", *posteriordb.SOURCES])


@pytest.mark.parametrize("name", posteriordb.SOURCES)
def test_log_density_has_its_constants(name: str) -> None:
    problem, density = prepared(name)
    assert float(density(points(problem, density, 1))) == pytest.approx(AT_FIRST_DRAW[name], abs=1e-5)


@each
def test_models_broadcast_and_follow_the_dtype(name: str) -> None:
    """Many points at once as one by one; float32 as float64, where the float32 data and points are a hair off."""
    problem, density = prepared(name)
    narrow = prepared(name, torch.float32)[1]
    assert (density.mode, narrow.mode) == ("plate", "plate")
    assert (density.dtype, narrow.dtype) == (torch.float64, torch.float32)
    u = points(problem, density, 3)
    assert torch.allclose(density(u), torch.cat([density(row[None]) for row in u]), rtol=1e-9)
    assert torch.allclose(narrow(u.float()).double(), density(u), rtol=1e-5, atol=1e-2)


@each
def test_reference_draws_are_draws_of_the_model(name: str) -> None:
    """Stein's identities, E[score] = 0 and E[score u^T] = -I in whitened coordinates, within five standard errors."""
    problem, density = prepared(name)
    values = {k: v[::20] for k, v in problem.reference.items()}
    u = torch.stack(
        [density.pack({k: v[i] for k, v in values.items()}) for i in range(len(next(iter(values.values()))))]
    )
    scale = torch.linalg.cholesky(u.T.cov())
    white = torch.linalg.solve_triangular(scale, (u - u.mean(0)).T, upper=False).T
    score = torch.cat([density.value_and_grad(part)[1] for part in u.split(500)]) @ scale
    product = score[:, :, None] * white[:, None, :]
    for terms, mean in ((score, torch.zeros(density.dim)), (product, -torch.eye(density.dim))):
        z = (terms.mean(0) - mean) / (terms.std(0) / math.sqrt(len(u)))
        assert float(z.abs().max()) < 5.0
