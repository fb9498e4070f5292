"""The experiments on estimators and the VAE run at toy size; the runner they share keeps its promises."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import runner
from experiments.bench import path_cost
from experiments.estimators import closed, plot
from experiments.estimators import run as estimators
from experiments.vae import data
from experiments.vae import plot as vae_plot
from experiments.vae import run as vae


@pytest.fixture(autouse=True)
def own_seed() -> Iterator[None]:
    """An experiment seeds torch; the seed of the tests stays."""
    with torch.random.fork_rng(devices=[]):
        yield


@dataclass(frozen=True)
class Toy:
    steps: int = 5
    rate: float = 0.1
    full: bool = False
    names: tuple[str, ...] = ("a", "b")
    data: Path = Path()


def test_the_runner_reads_a_command_line() -> None:
    words = ["steps=7", "rate=1e-3", "full=true", "names=c", "--seeds", "2..4"]
    command = runner.parse(words, Toy, {})
    assert command.config == Toy(steps=7, rate=1e-3, full=True, names=("c",))
    assert command.seeds == [2, 3, 4] and not command.smoke
    smoke = runner.parse(["--smoke", "--seeds=0,9", "rate=2"], Toy, {"steps": 1})
    assert smoke.config == Toy(steps=1, rate=2.0) and smoke.seeds == [0, 9] and smoke.smoke


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("stepz=3", "steps, rate, full, names, data"),
        ("steps", "key=value"),
        ("steps=x", "steps expects a value like 5"),
        ("full=yes", "full expects"),
        ("--seeds=a", "0..4"),
    ],
)
def test_the_runner_refuses_what_it_does_not_know(word: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        runner.parse([word], Toy, {})


def test_the_runner_appends_a_line_a_run(tmp_path: Path) -> None:
    words = [f"data={tmp_path / 'images.npz'}", "--seeds=3,4"]
    for _ in range(2):
        runner.run_all(lambda c, seed: [{"x": seed}], Toy, {}, tmp_path, words)
    found = runner.load(tmp_path)
    assert [line["x"] for line in found] == [3, 4, 3, 4]
    assert {"seed", "seconds", "cpu_seconds", "commit", "torch", "cpu", "config"} < set(found[0])
    assert found[0]["config"]["data"] == "images.npz" and str(tmp_path) not in json.dumps(found)


def test_mean_and_error() -> None:
    assert runner.mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert runner.mean_and_error([1.0]) == (1.0, 0.0)


def lines(module: Any, folder: Path, *words: str) -> list[dict[str, Any]]:
    """Lines of a smoke run."""
    runner.run_all(module.run, module.Config, module.SMOKE, folder, ["--smoke", *words])
    return runner.load(folder / "runs" / "smoke")


def test_the_estimators_run_at_toy_size(tmp_path: Path) -> None:
    found = lines(estimators, tmp_path)
    assert {line["part"] for line in found} == set(estimators.Config().parts)
    plot.main(tmp_path / "runs" / "smoke")
    assert len(list(tmp_path.rglob("*.png"))) == 4


def test_measured_variances_are_the_closed_forms() -> None:
    c = estimators.Config(replicates=4000)
    for row in estimators.cost(c):
        for name, value in row["closed"].items():
            assert row["measured"][name] == pytest.approx(value, rel=0.15), (row["cost"], row["x"], name)


def test_auto_is_the_best_weight() -> None:
    s = np.array([0.5, 1.25, 0.8, 2.0])
    assert closed.divergence(s, 8)["auto"] <= min(closed.divergence(s, 8)[k] for k in ("total", "path"))
    assert estimators.estimated_weight(s) == pytest.approx(closed.best_weight(s), abs=0.1)


def test_the_vae_runs_on_blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWPATH_DATA", raising=False)
    found = lines(vae, tmp_path)
    assert [line["method"] for line in found] == list(vae.Config().methods)
    assert all(line["log_p"] >= line["bound"] for line in found)
    vae_plot.main(tmp_path / "runs" / "smoke")
    assert (tmp_path / "runs" / "smoke" / "vae.png").is_file()


def test_without_images_the_vae_says_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOWPATH_DATA", str(tmp_path))
    runner.run_all(vae.run, vae.Config, {}, tmp_path, [])
    assert "mnist_full.npz" in capsys.readouterr().out
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("form", ["split", "npz", "npy"])
def test_any_28_by_28_set_will_do(tmp_path: Path, form: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (70, 28, 28)).astype(np.uint8)
    if form == "split":
        np.savez(tmp_path / "set.npz", x_train=grey[:60], x_test=grey[60:])
    elif form == "npz":
        np.savez(tmp_path / "set.npz", labels=np.zeros(70), images=grey)
    else:
        np.save(tmp_path / "set.npy", grey)
    path = next(tmp_path.glob("set.*"))
    found = data.images(path, 50, 5)
    assert found is not None
    name, train, test = found
    assert (name, tuple(train.shape), tuple(test.shape)) == ("set", (50, 784), (5, 784))
    assert set(train.unique().tolist()) == {0.0, 1.0}


def test_the_cost_bench_prints_a_case() -> None:
    small = path_cost.Case("small", lambda: path_cost.iaf(4, 8), 16, 10.0)
    text = path_cost.measure(small, 0.3, 2)
    assert "two passes, a pass a feature" in text and "target 10" in text
