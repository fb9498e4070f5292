"""`fp.check` finds what is wrong with a flow, and does not find what is not."""

from __future__ import annotations

import json

import pytest
import torch

import flowpath as fp


def two_bumps(n: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (n, 1), generator=g) * 2.0 - 1.0
    return torch.cat([2 * side, side], 1) + 0.4 * torch.randn(n, 2, generator=g)


@pytest.fixture(scope="module")
def fitted() -> fp.Flow:
    x = two_bumps(4000)
    return fp.fit("nsf", x, seed=0, epochs=15, transforms=3, hidden_features=(32,), compile=False).flow


def test_a_good_fit_is_called_good(fitted: fp.Flow) -> None:
    report = fp.check(fitted, two_bumps(3000, seed=2))
    assert report.sound
    assert report.part("beside Gaussian and mixture").numbers["ahead of Gaussian"] > 0.3
    assert report.part("classifier two-sample test").numbers["accuracy"] < 0.6
    assert report.verdict.startswith("sound")


def test_a_poor_fit_is_sound_but_doubted() -> None:
    report = fp.check(fp.gaussian(2), two_bumps(3000))
    assert report.sound
    assert report.part("classifier two-sample test").grade == "warn"
    assert "a classifier tells its draws from the rows" in report.verdict


class ClippedSampler(fp.Transform):
    """An inverse on a fixed bracket: exact inside, silently clipped outside, as numerical inverses of peers are."""

    context = None

    def _forward(self, x, context):
        return x / 10.0, x.new_full(x.shape[:-1], -x.shape[-1] * 2.302585093)

    def _inverse(self, z, context):
        return (10.0 * z).clamp(-10.0, 10.0), z.new_full(z.shape[:-1], z.shape[-1] * 2.302585093)


class WrongSign(ClippedSampler):
    """A sampler that adds the log-det where it must subtract it."""

    def _inverse(self, z, context):
        return 10.0 * z, z.new_full(z.shape[:-1], -z.shape[-1] * 2.302585093)


class Stale(fp.Transform):
    """A density that remembers an old scale while the sampler uses the new one."""

    context = None

    def _forward(self, x, context):
        return x * 0.5, x.new_full(x.shape[:-1], -x.shape[-1] * 0.693147)

    def _inverse(self, z, context):
        return z * 2.2, z.new_full(z.shape[:-1], z.shape[-1] * 0.788457)


@pytest.mark.parametrize("plant", [ClippedSampler, WrongSign, Stale], ids=lambda p: p.__name__)
def test_a_sampler_that_is_not_of_the_density_is_caught(plant: type[fp.Transform]) -> None:
    flow = fp.Flow(plant(2), fp.StandardNormal(2))
    report = fp.check(flow, torch.randn(500, 2))
    assert not report.sound
    assert report.verdict.startswith("not sound")


def test_few_rows_tell_nothing(fitted: fp.Flow) -> None:
    assert "cannot be told from n = 56" in fp.check(fitted, two_bumps(56)).verdict


def test_the_verdict_names_rows_the_fit_has_used(fitted: fp.Flow) -> None:
    assert "on the early-stopping rows" in fp.check(fitted, two_bumps(1000), rows="early-stopping").verdict


def test_weights_are_honoured_or_the_part_is_skipped(fitted: fp.Flow) -> None:
    x = two_bumps(2000)
    w = (x[:, 0] > 0).float() + 0.1
    report = fp.check(fitted, x, weights=w)
    assert report.part("classifier two-sample test").grade == "skipped"
    assert report.part("calibration").grade != "skipped"


def test_a_conditional_flow_is_checked_under_its_contexts() -> None:
    c = torch.rand(2000, 1)
    y = c + (0.1 + c) * torch.randn(2000, 1)
    flow = fp.fit("gaussian", y, context=c, seed=0, epochs=30, hidden_features=(16,), compile=False).flow
    report = fp.check(flow, y, c)
    assert report.sound
    assert report.part("beside Gaussian and mixture").grade == "skipped"
    assert report.part("calibration").grade == "pass"


def test_a_classifier_gains_and_loses_nothing_by_knowing_the_contexts() -> None:
    """Rows and draws share their contexts; seen with one label in training, a context must not return in a test."""
    flow = fp.gaussian(1, context=2)
    part = fp.check(flow, torch.randn(2000, 1), torch.rand(2000, 2)).part("classifier two-sample test")
    assert part.numbers["accuracy"] == pytest.approx(0.5, abs=4 * part.numbers["error"])


def test_more_columns_than_rows_to_fit_a_rival_to() -> None:
    assert fp.check(fp.gaussian(120), torch.randn(200, 120)).part("beside Gaussian and mixture").grade == "pass"


def test_rows_beyond_the_box_are_counted(fitted: fp.Flow) -> None:
    part = fp.check(fp.nsf(2, transforms=1, bound=1.0), 3 * torch.randn(500, 2)).part("spline box")
    assert part.grade == "warn"
    assert part.numbers["share"] > 0.5


def test_a_report_is_text_a_dict_and_html(fitted: fp.Flow) -> None:
    report = fp.check(fitted, two_bumps(500))
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == report.verdict
    assert report.verdict in str(report)
    assert "<table" in report.to_html()


def test_levels_of_a_flows_own_draws_are_uniform(fitted: fp.Flow) -> None:
    levels = fp.hpd_level(fitted, fitted.sample(4000)).sort().values
    assert (levels - torch.linspace(0, 1, 4000)).abs().max() < 0.06


@pytest.mark.parametrize(
    ("x", "weights", "message"),
    [(torch.zeros(0, 2), None, "got none"), (torch.zeros(5, 2), torch.ones(4), "weights for each")],
)
def test_bad_input_is_named(fitted: fp.Flow, x: torch.Tensor, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.check(fitted, x, weights=weights)
