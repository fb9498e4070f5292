"""The demonstration: it leaves what it promises, and its words follow from its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import flowpath as fp
from flowpath import cli, demo, plot
from flowpath.demo import FLOW, GAUSSIAN, MIXTURE, TRUTH, Folded, Mixture, Scores


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return folder, demo.main(folder, seed=0, quick=True)


def test_leaves_every_file(quick: tuple[Path, dict]) -> None:
    folder, _ = quick
    tables = {"flow.safetensors", "table.json", "samples.csv", "scores.csv", "history.csv", "summary.json"}
    figures = {"known_log_density.png", "known_pairs.png", "histories.png", "digits.png", "report.html"}
    figures |= {"eight_schools.png"}
    left = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert tables | figures <= set(left)
    assert min(left.values()) > 0


def test_summary_is_what_was_returned(quick: tuple[Path, dict]) -> None:
    folder, summary = quick
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_saved_estimator_draws_the_samples(quick: tuple[Path, dict]) -> None:
    folder, _ = quick
    samples = fp.tables.read(folder / "samples.csv")
    again = fp.FlowDensity.load(folder).sample(len(samples))
    assert samples.shape == (1000, 64)
    assert np.allclose(samples.to_numpy(), again.to_numpy(), atol=1e-3)


def test_scores_are_those_of_the_rows_held_out(quick: tuple[Path, dict]) -> None:
    folder, summary = quick
    scores, held = fp.tables.read(folder / "scores.csv"), fp.tables.read(folder / "held_out.parquet")
    again = fp.FlowDensity.load(folder).score_samples(held)
    assert np.allclose(scores["log_prob"].to_numpy(), again)
    assert float(scores["log_prob"].mean()) == pytest.approx(summary["handwritten digits"]["mean log density"][FLOW])
    assert torch.equal(demo.digits(0)[0][scores["row"].to_torch()], held.to_torch())


def test_a_demonstration_is_a_run(quick: tuple[Path, dict], tmp_path: Path) -> None:
    assert cli.main(["sample", str(quick[0]), "-n", "3", "--out", str(tmp_path / "mock.csv")]) == 0
    assert 'class="verdict' in (quick[0] / "report.html").read_text()


def test_the_schools_posterior_is_saved_and_told(quick: tuple[Path, dict], capsys: pytest.CaptureFixture[str]) -> None:
    """Posterior means of a run of NUTS, 10,000 draws of posteriordb, within half of what a quick fit is off by."""
    folder, summary = quick
    told = summary["eight schools"]
    again = fp.svi.Posterior.load(folder / "schools", model=demo.schools.model, args=demo.schools.data())
    assert again.verdict() == told["verdict"] and again.log_evidence == told["log evidence"]
    assert told["log evidence"] == pytest.approx(-31.31, abs=0.3)
    assert told["means"]["mu"] == pytest.approx(4.4, abs=0.8) and len(told["means"]["theta"]) == 8
    assert again.predictive(torch.ones(2), num_samples=5)["effect"].shape == (5, 2)


@pytest.mark.parametrize("part", ["known density", "handwritten digits"])
def test_conclusion_agrees_with_the_numbers(quick: tuple[Path, dict], part: str) -> None:
    report = quick[1][part]
    means = report["mean log density"]
    reference = TRUTH if part == "known density" else FLOW
    for name, gap in report[f"{reference} ahead of"].items():
        assert gap["mean"] == pytest.approx(means[reference] - means[name])
    ahead = min(means[FLOW] - means[name] for name in (MIXTURE, GAUSSIAN))
    if report["conclusion"].startswith("The flow wins"):
        assert ahead > 0
    for name in (MIXTURE, GAUSSIAN):
        if f"loses to the {name}" in report["conclusion"]:
            assert means[FLOW] < means[name]


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (1.0, "The flow wins: it beats the Gaussian mixture and it beats the full Gaussian."),
        (-1.0, "The flow does not win: it loses to the Gaussian mixture and it loses to the full Gaussian."),
        (0.0, "The flow does not win: it cannot be told from the Gaussian mixture and it cannot be told from the full"),
    ],
)
def test_conclusion_follows_the_numbers(shift: float, words: str) -> None:
    noise = torch.tensor([0.5, -0.5]).repeat(50)
    scores = Scores({FLOW: noise + shift, MIXTURE: torch.zeros(100), GAUSSIAN: torch.zeros(100)}, ("full", 1, 0.1))
    assert demo.conclusion(scores).startswith(words)


def test_paired_standard_error() -> None:
    common = 100.0 * torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    gap = torch.tensor([1.0, 3.0]).repeat(200).double()
    mean, se = Scores({FLOW: common + gap, MIXTURE: common}, ("full", 1, 0.1)).ahead(FLOW, MIXTURE)
    assert mean == pytest.approx(2.0)
    assert se == pytest.approx(1.0 / math.sqrt(399))


def test_known_density_is_normalised() -> None:
    """For draws x of p and any density q, the mean of q(x) / p(x) is 1: draws and log density belong together."""
    x = Folded.draw(400_000, torch.Generator().manual_seed(0))
    centre = torch.tensor([1.5, 0.25, 0.5, 0.0, 0.0], dtype=x.dtype)
    ratio = (torch.distributions.Normal(centre, 0.2).log_prob(x).sum(1) - Folded.log_prob(x)).exp()
    se = float(ratio.std()) / math.sqrt(len(x))
    assert se < 0.05
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * se)


def test_mixture_of_one_is_the_gaussian() -> None:
    mix = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.3]]).double()
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)).double() @ mix + 5.0
    ours = Mixture.fit(x, ("full", 1, 1e-9), seed=0).log_prob(x)
    exact = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov(correction=0)).log_prob(x)
    assert torch.allclose(ours, exact, atol=1e-6)


def test_mixture_is_chosen_by_validation_rows() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(200, 2, generator=g) - 5.0, torch.randn(200, 2, generator=g) + 5.0]).double()
    kinds = [("full", 1, 1e-3), ("full", 2, 1e-3), ("full", 1000, 1e-3)]
    assert demo.choose_mixture(x[::2], x[1::2], kinds, seed=0) == ("full", 2, 1e-3)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.history({}), "at least one fit"),
        (lambda: plot.log_densities(torch.zeros(3), torch.zeros(4)), "two vectors of one length"),
        (lambda: plot.pairs(torch.zeros(3, 2), torch.zeros(3, 3)), "the same columns"),
        (lambda: plot.calibration(torch.zeros(3, 2), draws=10), "a vector of levels"),
        (lambda: plot.pairs(torch.zeros(3, 2), torch.zeros(3, 2), ["a"]), "expects 2 names, got 1"),
        (lambda: plot.density(torch.zeros(3), (0, 1, 0, 1)), "a matrix of log densities"),
        (lambda: plot.density(torch.zeros(3, 3), (0, 1, 0, 1), torch.zeros(3)), "points with 2 columns"),
        (lambda: plot.images(torch.zeros(3, 5), torch.zeros(3, 5), (2, 2)), "2 x 2 pixels"),
    ],
)
def test_plots_refuse_other_shapes(draw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()  # type: ignore[operator]


def test_density_plot_takes_points() -> None:
    figure = plot.density(torch.zeros(4, 5), (-1, 1, -1, 1), torch.zeros(7, 2))
    assert len(figure.axes[0].lines) == 1
