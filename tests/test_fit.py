"""fit and log_prob: what they reach, keep and say, and that a stopped fit goes on as if it never had."""

from __future__ import annotations

import csv
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.distributions import biject_to, constraints
from torch.utils.data import DataLoader, TensorDataset

import flowpath as fp
from flowpath.io import storage
from flowpath.training.loop import State
from flowpath.training.schedules import Schedule


def rows(n: int = 200, d: int = 2, seed: int = 0) -> torch.Tensor:
    """Draws of correlated normals, mean 10 and scale 3, float64."""
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 10 + 3 * z + z.flip(-1)


def tiny(features: int = 2, context: int = 0, **options: Any) -> fp.Flow:
    return fp.nsf(features, context, transforms=1, hidden_features=(8,), bins=4, **options)


def quick(flow: Any = "gaussian", x: Any = None, **options: Any) -> fp.FitResult:
    """A fit of a few steps."""
    options = {"seed": 0, "epochs": 2, "batch_size": 32, **options}
    return fp.fit(flow, rows() if x is None else x, **options)


def weights_of(flow: fp.Flow) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in flow.state_dict().values()])


# --- what it reaches ---


def test_fit_reaches_the_maximum_likelihood_gaussian() -> None:
    x = rows(500)
    result = fp.fit("gaussian", x, validation=None, seed=0, epochs=150, batch_size=500, learning_rate=0.05)
    scale = torch.linalg.cholesky(torch.cov(x.T, correction=0))
    best = torch.distributions.MultivariateNormal(x.mean(0), scale_tril=scale).log_prob(x).mean()
    assert float(fp.log_prob(result.flow, x).mean()) == pytest.approx(float(best), abs=2e-3)


def test_spline_flow_beats_the_gaussian_on_a_ring() -> None:
    angle = 2 * math.pi * torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * rows(600) / 3
    options: dict[str, Any] = {"test": 0.2, "seed": 0, "epochs": 15, "learning_rate": 5e-3}
    flow = fp.fit(fp.nsf(2, transforms=2, hidden_features=(16,)), x, **options)
    assert flow.test_log_prob > fp.fit("gaussian", x, **options).test_log_prob + 0.1


def test_weights_move_the_fit_to_the_weighted_mean() -> None:
    x, w = rows(), torch.linspace(0, 1, 200)
    options: dict[str, Any] = {"validation": None, "epochs": 150, "batch_size": 200, "learning_rate": 0.05}
    flow = quick("gaussian", x, weights=w, **options).flow
    mean = flow.to_data(torch.zeros(1, 2))[0].double()
    assert torch.allclose(mean, (w.double() @ x) / w.double().sum(), atol=0.05)


def test_negative_weights_subtract_rows() -> None:
    x = torch.cat([rows(), rows(50, seed=1) + 20])
    w = torch.cat([torch.ones(250), -torch.ones(50)])
    x = torch.cat([x, x[200:]])  # the fifty far rows come once with weight 1, once with -1
    options: dict[str, Any] = {"epochs": 150, "batch_size": 300, "learning_rate": 0.05, "patience": None}
    flow = quick("gaussian", x, weights=w, validation=rows(seed=2), **options).flow
    mean = flow.to_data(torch.zeros(1, 2))[0].double()
    assert torch.allclose(mean, rows().mean(0), atol=0.4)


def test_negative_weights_need_validation() -> None:
    w = torch.ones(200)
    w[0] = -1
    with pytest.raises(ValueError, match="weights below 0 .* validation rows"):
        quick(weights=w, validation=None)


def test_held_out_rows_must_weigh_something() -> None:
    w = torch.ones(200)
    w[1:] = 0
    w[1:3] = 1
    with pytest.raises(ValueError, match="weights of the validation rows sum to 0"):
        quick(x=rows(), weights=w, validation=0.01, seed=2)


def test_context_is_used() -> None:
    c = torch.linspace(-1, 1, 300)[:, None].double() + 1000
    x = 5 * (c - 1000) + 0.1 * rows(300, 1, seed=1)
    result = quick(fp.gaussian(1, 1, hidden_features=(16,)), x, context=c, epochs=60, learning_rate=1e-2)
    means = result.flow.requires_grad_(False).to_data(torch.zeros(2, 1), torch.tensor([[999.0], [1001.0]]))
    assert (means[1] - means[0]).item() == pytest.approx(10, abs=1.0)


def test_julian_dates_keep_their_order() -> None:
    day = 2459000 + 1e-5 * torch.arange(1.0, 101.0, dtype=torch.float64)[:, None]
    flow = quick(tiny(1), day).flow
    assert next(flow.parameters()).dtype == torch.float32
    scores = fp.log_prob(flow, day)
    assert len(scores.unique()) > 90


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_keeps_the_dtype_of_the_flow(dtype: torch.dtype) -> None:
    assert {p.dtype for p in quick(tiny().to(dtype)).flow.parameters()} == {dtype}


def test_actnorm_is_set_by_the_fit() -> None:
    flow = fp.Flow(fp.Chain([fp.ActNorm(2), fp.LU(2)]), fp.StandardNormal(2))
    assert bool(quick(flow).flow.transform.transforms[0].is_set)


@pytest.mark.parametrize("architecture", ["realnvp", "maf", "nsf", "nsf_autoregressive", "gaussian"])
def test_every_name_builds_and_fits(architecture: str) -> None:
    options = {} if architecture == "gaussian" else {"transforms": 2}
    result = quick(architecture, rows(100, 3), epochs=1, hidden_features=(8,), **options)
    assert result.flow.event_shape == (3,)


# --- what it returns and leaves ---


def test_flow_is_trained_in_place_and_returned_in_eval_mode() -> None:
    flow = tiny()
    before = weights_of(flow)
    result = quick(flow)
    assert result.flow is flow and not flow.training
    assert not torch.equal(weights_of(flow), before)
    assert all(p.grad is None for p in flow.parameters())


def test_best_weights_are_kept() -> None:
    validation = rows(50, seed=3)
    result = quick(tiny(), validation=validation, epochs=8, learning_rate=0.2, schedule="constant")
    best = max(row["validation"] for row in result.history)
    assert result.best_epoch == 1 + [row["validation"] for row in result.history].index(best)
    assert float(fp.log_prob(result.flow, validation).mean()) == pytest.approx(best, abs=1e-6)


def test_held_out_score_has_its_standard_error() -> None:
    test = rows(50, seed=3)
    result = quick(test=test)
    scores = fp.log_prob(result.flow, test)
    assert result.test_log_prob == pytest.approx(float(scores.mean()))
    assert result.test_se == pytest.approx(float(scores.std(correction=0)) / 50**0.5)


def test_test_rows_are_never_seen() -> None:
    first, second = (quick("nsf", test=rows(50, seed=s), transforms=1, hidden_features=(8,)) for s in (3, 4))
    assert torch.equal(weights_of(first.flow), weights_of(second.flow))


def test_shares_are_held_out() -> None:
    assert quick(validation=0.1, test=0.2).rows == {"train": 140, "validation": 20, "test": 40}


def test_without_validation_the_last_weights_stay() -> None:
    result = quick(validation=None)
    assert result.best_epoch == 0 and result.validation_log_prob is None
    assert "no held-out score" in repr(result)


def test_history_has_a_row_an_epoch() -> None:
    history = quick(epochs=3).history
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert [row["step"] for row in history] == [5, 10, 15]
    assert all(math.isfinite(v) for row in history for v in row.values())


def test_train_score_is_in_the_units_of_the_data() -> None:
    flow = fp.gaussian(2)
    quick(flow, epochs=1)
    result = fp.fit(flow, rows(), validation=None, epochs=1, learning_rate=1e-12, batch_size=200)
    assert result.history[0]["train"] == pytest.approx(float(fp.log_prob(flow, rows()).mean()), abs=1e-4)


def test_a_set_whitening_is_kept() -> None:
    flow = tiny()
    flow.transform.transforms[0].set_from(rows() + 7)
    before = flow.transform.transforms[0].loc.clone()
    quick(flow)
    assert torch.equal(flow.transform.transforms[0].loc, before)


def test_whitening_is_set_from_training_rows_alone() -> None:
    flow = tiny()
    quick(flow, validation=rows(50) + 1e3, test=rows(50) - 1e3)
    assert torch.allclose(flow.transform.transforms[0].loc, rows().mean(0))


def test_frozen_parameters_stay() -> None:
    flow = fp.Flow(fp.Chain([fp.LU(2), fp.TriangularAffine(2)]), fp.StandardNormal(2))
    flow.transform.transforms[0].requires_grad_(False)
    before = [p.clone() for p in flow.transform.transforms[0].parameters()]
    quick(flow)
    for p, b in zip(flow.transform.transforms[0].parameters(), before, strict=True):
        assert torch.equal(p, b) and not p.requires_grad


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "no parameters"])
def test_nothing_to_train_is_said(frozen: bool) -> None:
    flow = tiny().requires_grad_(False) if frozen else fp.Flow(fp.Chain([fp.Whiten(2)]), fp.StandardNormal(2))
    with pytest.raises(ValueError, match="nothing to train .*frozen" if frozen else "it has no parameters"):
        quick(flow)


def test_flow_on_two_devices_is_refused() -> None:
    flow = fp.Flow(fp.Chain([fp.LU(2), fp.TriangularAffine(2).to("meta")]), fp.StandardNormal(2))
    with pytest.raises(ValueError, match="more than one device"):
        quick(flow)


def test_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda', but torch .* sees no CUDA device"):
        quick(device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flow_comes_back_from_the_gpu() -> None:
    result = quick(tiny(), device="cuda", test=0.2)
    assert next(result.flow.parameters()).device.type == "cpu" and result.device.startswith("cuda")


def test_result_is_saved_in_a_folder(tmp_path: Path) -> None:
    result = quick(test=0.2)
    folder = result.save(tmp_path / "run")
    x = rows(5)
    assert torch.equal(fp.log_prob(fp.load(folder), x), fp.log_prob(result.flow, x))
    assert json.loads((folder / "fit.json").read_text())["test_log_prob"] == result.test_log_prob
    with open(folder / "history.csv", newline="") as file:
        assert [float(r["validation"]) for r in csv.DictReader(file)] == [r["validation"] for r in result.history]


def test_summary_says_score_rows_and_end() -> None:
    text = quick(test=0.2).summary()
    assert "nats" in text and "40 test" in text and "all epochs done" in text


# --- seeds ---


def test_seed_gives_the_same_weights_and_restores_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second = quick("maf", transforms=1, hidden_features=(8,)), quick("maf", transforms=1, hidden_features=(8,))
    assert torch.equal(weights_of(first.flow), weights_of(second.flow))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_generator_rules() -> None:
    found = []
    state = torch.get_rng_state()
    for _ in range(2):
        torch.set_rng_state(state)
        found.append(weights_of(quick("gaussian", seed=None).flow))
    assert torch.equal(*found)
    assert not torch.equal(torch.get_rng_state(), state)


def test_seed_changes_the_fit() -> None:
    assert not torch.equal(weights_of(quick(seed=0).flow), weights_of(quick(seed=1).flow))


# --- when it ends ---


ENDS: dict[str, tuple[dict[str, Any], str, int]] = {
    "epochs": ({"epochs": 3}, "all epochs done", 15),
    "steps": ({"epochs": None, "steps": 7}, "all steps done", 7),
    "patience": ({"epochs": None, "steps": 900, "patience": 1, "learning_rate": 1e-12}, "no better", 400),
    "time": ({"epochs": None, "time_limit": 1e-9}, "time limit", 1),
    "callback": ({"epochs": 9, "callbacks": lambda s: setattr(s, "stop", s.epoch == 2)}, "stopped by a callback", 10),
}


@pytest.mark.parametrize(("options", "reason", "steps"), ENDS.values(), ids=ENDS)
def test_fit_ends_and_says_why(options: dict[str, Any], reason: str, steps: int) -> None:
    result = quick(**options)
    assert reason in result.stop_reason
    assert result.steps == steps or (reason == "no better" and steps <= result.steps < 900)


def test_last_part_of_an_epoch_is_scored() -> None:
    history = quick(epochs=None, steps=7).history
    assert [row["step"] for row in history] == [5, 7]


@pytest.mark.parametrize("by", ["signal", "exception"])
def test_interrupt_returns_the_result_so_far(by: str) -> None:
    def stop(state: State) -> None:
        if state.epoch == 2:
            if by == "exception":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    result = quick(epochs=50, callbacks=stop)
    assert result.stop_reason == "interrupted" and result.epochs <= 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_termination_is_passed_on_after_the_checkpoint(tmp_path: Path) -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        stop = lambda state: signal.raise_signal(signal.SIGTERM) if state.epoch == 1 else None  # noqa: E731
        result = quick(epochs=50, callbacks=stop, checkpoint=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] and result.stop_reason == "interrupted"
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_error_in_a_callback_leaves_the_best_weights() -> None:
    flow, best = tiny(), []

    def fail(state: State) -> None:
        best.append(state.best)
        if state.epoch == 2:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        quick(flow, epochs=5, callbacks=[fail], validation=rows(50, seed=3))
    assert not flow.training
    assert float(fp.log_prob(flow, rows(50, seed=3)).mean()) == pytest.approx(best[-1], abs=1e-6)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "epochs": ({"epochs": 0}, ValueError, "epochs to be a whole number of at least 1, got 0"),
    "clip": ({"clip": -1.0}, ValueError, "clip > 0 or None, got -1"),
    "time": ({"time_limit": 0.0}, ValueError, "time_limit > 0 or None"),
    "rate": ({"learning_rate": 0.0}, ValueError, "learning_rate > 0, got 0"),
    "batch": ({"batch_size": 0}, ValueError, "batch_size to be a whole number"),
    "share": ({"validation": 1.5}, ValueError, "validation as a share between 0 and 1, or as rows, got 1.5"),
    "schedule": ({"schedule": "cosin"}, ValueError, "schedule .* got 'cosin'"),
    "scheduler": ({"schedule": lambda optimizer: 3}, TypeError, "LRScheduler stepped every step, got int"),
    "compile": ({"compile": "yes"}, ValueError, "compile=True, False or"),
    "callbacks": ({"callbacks": [3]}, TypeError, "callbacks to be functions of the state, got int"),
    "columns": ({"validation": rows(9, 3)}, ValueError, "the flow has 2 features, x has 3 columns"),
    "options": ({"bins": 3}, TypeError, "bins"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quick(**options)


@pytest.mark.parametrize(
    ("flow", "options", "error", "message"),
    [
        ("nfs", {}, ValueError, "no architecture 'nfs', .* did you mean 'nsf'"),
        (3, {}, TypeError, "a Flow or the name of an architecture, got int"),
        (fp.gaussian(2), {"bins": 3}, TypeError, "bins: options build a flow from a name"),
    ],
    ids=["name", "kind", "options"],
)
def test_wrong_flows_are_named(flow: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quick(flow, **options)


def test_bad_rows_are_refused_before_training() -> None:
    frame = pd.DataFrame({"z": np.arange(30.0), "flag": np.ones(30)})
    with pytest.raises(ValueError, match=r"column 'flag' \(1\) is constant in the training rows"):
        quick(x=frame)


# --- steps ---


def test_user_optimizer_and_schedule_are_used() -> None:
    seen: list[Any] = []

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        seen.extend(parameters)
        return torch.optim.SGD(parameters, lr=0.5)

    def halve(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)

    result = quick(optimizer=sgd, schedule=halve, epochs=3)
    assert seen and [row["learning_rate"] for row in result.history] == [0.5, 0.25, 0.125]


def test_clip_bounds_the_step() -> None:
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    flow = tiny()
    before = torch.cat([p.detach().flatten() for p in flow.parameters()])
    quick(flow, optimizer=sgd, schedule="constant", clip=1e-3, epochs=None, steps=1, validation=None)
    moved = torch.cat([p.detach().flatten() for p in flow.parameters()]) - before
    assert float(moved.norm()) <= 1.001e-3


@pytest.mark.parametrize(
    ("spec", "rates"), [("constant", [1.0, 1.0, 1.0]), ("cosine", [1.0, 0.5, 0.0])], ids=["constant", "cosine"]
)
def test_schedules_follow_the_budget(spec: Any, rates: list[float]) -> None:
    schedule = Schedule(spec, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert [schedule.apply(p) for p in (0.0, 0.5, 1.0)] == pytest.approx(rates)


def test_plateau_lowers_the_rate_after_half_the_patience() -> None:
    schedule = Schedule("plateau", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), patience=4)
    rates = []
    for since_best in (0, 1, 2, 3, 4, 0):
        schedule.judged(since_best)
        rates.append(schedule.apply(0.0))
    assert rates == pytest.approx([1, 1, 0.3, 0.3, 0.09, 0.09])


def test_plateau_ends_at_zero() -> None:
    schedule = Schedule("plateau", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    assert [schedule.apply(p) for p in (0.8, 0.9, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_callbacks_see_the_state() -> None:
    seen = []
    flow = tiny()
    quick(flow, callbacks=lambda s: seen.append((s.epoch, s.step, s.flow is flow, math.isfinite(s.validation))))
    assert seen == [(1, 5, True, True), (2, 10, True, True)]


def test_iaf_warns_with_the_factor_to_expect() -> None:
    with pytest.warns(UserWarning, match="a step on 2 features costs about 3 times a MAF's"):
        quick(fp.iaf(2, transforms=1, hidden_features=(8,)), epochs=1)


# --- numbers that are not finite ---


def positive() -> fp.Flow:
    layer = fp.from_torch(biject_to(constraints.positive))
    return fp.Flow(fp.Chain([layer, fp.TriangularAffine(2)]), fp.StandardNormal(2))


def frame(outside: int) -> pd.DataFrame:
    """200 rows in column names, the first few outside the support in 'flux'."""
    values = rows().abs().numpy()
    values[:outside, 1] = -1.0 - np.arange(outside)
    return pd.DataFrame(values, columns=["z", "flux"])


def test_non_finite_batches_are_skipped_and_explained() -> None:
    result = quick(positive(), frame(1), validation=None)
    assert result.skipped == 2 and all(math.isfinite(v) for v in weights_of(result.flow).tolist())
    assert "1 of 32 rows, first at the layer transform.transforms.0 TorchTransform" in result.notes[0]
    assert "2 batches were not finite" in result.summary()


def test_many_non_finite_batches_end_the_fit() -> None:
    with pytest.warns(UserWarning, match="20 of 20 batches were not finite .* try a lower learning_rate"):
        result = quick(positive(), frame(199), validation=None, epochs=50)
    assert result.stop_reason == "too many non-finite batches"


def test_columns_of_non_finite_rows_are_named() -> None:
    values = rows().numpy()
    values[7, 1] = 1e30
    data = pd.DataFrame(values, columns=["z", "flux"])
    flow = tiny()
    flow.transform.transforms[0].set_from(rows())
    result = quick(flow, data, validation=None, epochs=1)
    assert result.skipped == 1
    assert "farthest out in columns 'flux' (up to" in result.notes[0]


def test_a_gradient_that_is_not_finite_names_its_parameters() -> None:
    flow = tiny()
    parameter = next(p for n, p in flow.named_parameters() if n.endswith("bias"))
    parameter.register_hook(lambda g: g * math.inf)
    result = quick(flow, epochs=1, validation=None)
    assert result.skipped == 6
    assert "the gradient of parameter" in result.notes[0]


# --- streams ---


def simulator(n: int = 64, shape: str = "x") -> Iterator[Any]:
    seed = 0
    while True:
        seed += 1
        x = rows(n, seed=seed).float()
        yield {"x": x, "dict": {"x": x, "weights": torch.ones(n)}, "context": (x, x[:, :1])}[shape]


@pytest.mark.parametrize("shape", ["x", "dict"])
def test_iterator_is_fitted(shape: str) -> None:
    result = fp.fit("gaussian", simulator(shape=shape), steps=300, learning_rate=0.05, validation=rows(50), seed=0)
    assert result.steps == 300 and result.rows == {"validation": 50}
    assert result.validation_log_prob == pytest.approx(-5.0, abs=0.3)


def test_iterator_brings_its_context() -> None:
    result = fp.fit("gaussian", simulator(shape="context"), steps=3, seed=0, hidden_features=(4,))
    assert result.flow.context == 1


def test_batches_that_set_the_whitening_are_trained_on() -> None:
    result = fp.fit("gaussian", iter([rows(32, seed=s) for s in range(5)]), steps=9, seed=0)
    assert result.steps == 5 and result.stop_reason == "the data ended"
    assert bool(result.flow.transform.transforms[0].is_set)


def test_loader_is_passed_once_an_epoch() -> None:
    loader = DataLoader(TensorDataset(rows()), batch_size=50, shuffle=True)
    result = fp.fit("gaussian", loader, epochs=3, validation=rows(50, seed=1), seed=0)
    assert [row["step"] for row in result.history] == [4, 8, 12]


def test_data_set_is_split_like_rows() -> None:
    assert quick(x=TensorDataset(rows(), rows(200, 1)), hidden_features=(4,)).rows["validation"] == 20


STREAMS: dict[str, tuple[dict[str, Any], str]] = {
    "endless": ({}, "may never end; pass steps= or time_limit="),
    "share": ({"steps": 5, "test": 0.1}, "no share of a stream can be held out; pass test=rows"),
    "context": ({"steps": 5, "context": rows()}, "a stream brings its own context"),
}


@pytest.mark.parametrize(("options", "message"), STREAMS.values(), ids=STREAMS)
def test_wrong_streams_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.fit(fp.gaussian(2), simulator(), **options)


def test_empty_stream_is_named() -> None:
    with pytest.raises(ValueError, match="the stream gave no batch"):
        fp.fit(fp.gaussian(2), iter([]), steps=3)


# --- checkpoints ---


class Stopped(Exception):
    pass


def stop_after(epoch: int) -> Callable[[State], None]:
    def stop(state: State) -> None:
        if state.epoch == epoch:
            raise Stopped

    return stop


def dropped(**options: Any) -> fp.FitResult:
    """A fit in which everything that a checkpoint must hold matters: dropout, Adam, plateaus, split, order."""
    settings: dict[str, Any] = {"epochs": 6, "learning_rate": 0.02, "compile": False, "patience": 2}
    return quick("nsf", transforms=1, hidden_features=(8,), dropout=0.3, test=0.2, **{**settings, **options})


@pytest.mark.parametrize("schedule", ["cosine", "plateau", "theirs"])
@pytest.mark.parametrize("epoch", [2, 5])
def test_resumed_fit_ends_bit_for_bit_like_one_never_stopped(schedule: str, epoch: int, tmp_path: Path) -> None:
    theirs = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)  # noqa: E731
    options: dict[str, Any] = {"schedule": theirs if schedule == "theirs" else schedule}
    whole = dropped(**options)
    with pytest.raises(Stopped):
        dropped(**options, checkpoint=tmp_path, callbacks=stop_after(epoch))
    resumed = dropped(**options, checkpoint=tmp_path, resume=tmp_path)
    assert torch.equal(weights_of(resumed.flow), weights_of(whole.flow))
    assert resumed.test_log_prob == whole.test_log_prob
    assert [r["validation"] for r in resumed.history] == [r["validation"] for r in whole.history]


def test_fit_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": None, "schedule": "constant"}
    whole = dropped(**options, steps=11)
    dropped(**options, steps=6, checkpoint=tmp_path)
    resumed = dropped(**options, steps=11, resume=tmp_path)
    assert torch.equal(weights_of(resumed.flow), weights_of(whole.flow))


def test_resumed_warm_start_keeps_its_whitening(tmp_path: Path) -> None:
    flow = tiny()
    flow.transform.transforms[0].set_from(rows() + 7)
    with pytest.raises(Stopped):
        quick(flow, checkpoint=tmp_path, callbacks=stop_after(2), epochs=4)
    resumed = quick(tiny(), resume=tmp_path, epochs=4)
    assert torch.equal(resumed.flow.transform.transforms[0].loc, flow.transform.transforms[0].loc)


def test_finished_fit_is_not_trained_further(tmp_path: Path) -> None:
    done = dropped(checkpoint=tmp_path)
    again = dropped(resume=tmp_path)
    assert torch.equal(weights_of(done.flow), weights_of(again.flow)) and again.steps == done.steps


def test_resuming_restores_the_random_state(tmp_path: Path) -> None:
    quick(checkpoint=tmp_path)
    before = torch.get_rng_state()
    quick(resume=tmp_path, seed=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_iterator_goes_on_with_what_it_gives_next(tmp_path: Path) -> None:
    fp.fit("gaussian", simulator(), steps=30, seed=0, checkpoint=tmp_path)
    assert fp.fit("gaussian", simulator(), steps=50, seed=0, resume=tmp_path).steps == 50


RESUMED: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"x": rows(seed=9)}, "was written with fingerprint"),
    "batch": ({"batch_size": 16}, "with batch_size = 32, this fit has 16"),
    "flow": ({"flow": tiny()}, "are of another flow"),
    "optimizer": (
        {"optimizer": lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:]}])},
        "the optimizer has 2 groups",
    ),
}


@pytest.mark.parametrize(("options", "message"), RESUMED.values(), ids=RESUMED)
def test_resuming_another_fit_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    quick(checkpoint=tmp_path)
    with pytest.raises(ValueError, match=message):
        quick(**options, resume=tmp_path)


def test_unfinished_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        quick(checkpoint=tmp_path, epochs=5, callbacks=stop_after(2))
    with pytest.raises(FileExistsError, match="holds an unfinished fit .* resume="):
        quick(checkpoint=tmp_path)


def test_finished_checkpoint_may_be_overwritten(tmp_path: Path) -> None:
    quick(checkpoint=tmp_path)
    assert quick(checkpoint=tmp_path).epochs == 2


def test_file_of_another_kind_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="a file of another kind"):
        quick(checkpoint=path)
    assert path.read_text() == "mine"


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file checkpoint.safetensors"):
        quick(resume=tmp_path)


def test_flow_and_checkpoint_are_told_apart(tmp_path: Path) -> None:
    quick(checkpoint=tmp_path / "c.safetensors").save(tmp_path)
    with pytest.raises(ValueError, match="a checkpoint of a fit: go on with fp.fit"):
        fp.load(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds a saved flow, not a checkpoint"):
        quick(resume=tmp_path / "flow.safetensors")


def test_full_disk_is_told_once_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = storage.write, []

    def filling(*args: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("No space left on device")
        write(*args)

    monkeypatch.setattr(storage, "write", filling)
    monkeypatch.setattr("flowpath.training.checkpoint._SHARE", 0.0)
    with pytest.warns(UserWarning, match="the one before stays: No space left") as caught:
        result = quick(checkpoint=tmp_path, epochs=4)
    assert len(caught) == 1 and result.epochs == 4
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_state_no_checkpoint_can_hold_is_named(tmp_path: Path) -> None:
    def odd(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        scheduler.mine = object()  # type: ignore[attr-defined]
        return scheduler

    with pytest.raises(TypeError, match="a state no checkpoint can hold"):
        quick(checkpoint=tmp_path, schedule=odd)


# --- who looks on ---


def test_progress_is_silent_off_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    quick()
    assert capfd.readouterr() == ("", "")


def test_progress_shows_scores_when_asked(capfd: pytest.CaptureFixture[str]) -> None:
    quick(progress=True)
    assert "validation=" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scalars_are_written_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    quick(log_dir=tmp_path)
    assert [p.name.startswith("events") for p in tmp_path.iterdir()] == [True]


def test_missing_tensorboard_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        quick(log_dir=tmp_path)


# --- log_prob ---


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_scores_do_not_depend_on_the_chunks(batch_size: int) -> None:
    flow = quick(fp.maf(2, transforms=2, hidden_features=(8,))).flow
    x = rows(50)
    assert torch.allclose(fp.log_prob(flow, x, batch_size=batch_size), fp.log_prob(flow, x), atol=1e-5)


def test_scores_agree_with_the_flow() -> None:
    flow = quick(fp.nsf(2, 1, transforms=1, hidden_features=(8,)), rows(), context=rows(200, 1)).flow
    x, c = rows(20).float(), rows(20, 1).float()
    assert torch.allclose(fp.log_prob(flow, x, c), flow.log_prob(x, c).double(), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_mode_and_the_graph_alone(training: bool) -> None:
    flow = tiny(dropout=0.5).train(training)
    flow.transform.transforms[1].eval()
    scores = fp.log_prob(flow, rows(5))
    assert flow.training is training and not flow.transform.transforms[1].training
    assert not scores.requires_grad
    assert torch.equal(scores, fp.log_prob(flow, rows(5)))


def test_batches_are_scored_one_after_another() -> None:
    flow = tiny()
    batches = DataLoader(TensorDataset(rows(10)), batch_size=4)
    assert torch.allclose(fp.log_prob(flow, batches), fp.log_prob(flow, rows(10)), atol=1e-5)


def test_scoring_names_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"log_prob: x holds 1 number .* row 1 column 0 \(nan\)"):
        fp.log_prob(tiny(), [[1.0, 2.0], [math.nan, 2.0]])


def test_float64_tensor_is_refused_by_a_float32_flow() -> None:
    with pytest.raises(TypeError, match=r"Flow holds torch.float32 numbers, got x of torch.float64"):
        tiny().log_prob(rows(5))


# --- the objective ---


def test_objective_is_the_weighted_mean() -> None:
    flow, x = tiny(), rows(4).float()
    w = torch.tensor([1.0, 2.0, 0.0, -0.5])
    objective = fp.MaximumLikelihood(flow)
    assert torch.allclose(objective(x, weights=w), -(w * flow.log_prob(x)).mean())
    assert torch.equal(objective.last, flow.log_prob(x).detach()) and objective.last.grad_fn is None


def test_rows_without_weight_may_have_no_density() -> None:
    loss = fp.MaximumLikelihood(positive())(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]), weights=torch.tensor([1.0, 0.0]))
    assert bool(torch.isfinite(loss))


def test_objective_wants_a_weight_a_row() -> None:
    with pytest.raises(ValueError, match=r"a weight for each row, shape \(4,\), got \(4, 1\)"):
        fp.MaximumLikelihood(tiny())(rows(4).float(), weights=torch.ones(4, 1))
