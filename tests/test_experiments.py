"""Each experiment runs end to end at a tiny size, and the densities they judge by are exact."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.toy2d.sets import SETS

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
RUNS = [EXPERIMENTS / name / "run.py" for name in ("nflows_parity", "toy2d")]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", [pytest.param(p, id=p.parent.name) for p in RUNS])
def test_unknown_setting_is_refused(script: Path) -> None:
    done = run(script, "--smoke", "no_such_key=1")
    assert done.returncode
    assert "no_such_key" in done.stderr


@pytest.mark.parametrize("script", [pytest.param(p, id=p.parent.name) for p in RUNS])
def test_readme_names_the_experiment(script: Path) -> None:
    assert script.parent.name in (EXPERIMENTS / "README.md").read_text(encoding="utf-8")


def test_parity_with_nflows() -> None:
    done = run(EXPERIMENTS / "nflows_parity" / "run.py", "--smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass" in done.stdout.splitlines()[-1]


def test_parity_fails_loudly() -> None:
    done = run(EXPERIMENTS / "nflows_parity" / "run.py", "--smoke", "tolerance=1e-30")
    assert done.returncode == 1
    assert "FAIL" in done.stdout.splitlines()[-1]


def test_toy2d_runs_and_draws() -> None:
    done = run(EXPERIMENTS / "toy2d" / "run.py", "--smoke")
    assert done.returncode == 0, done.stderr
    left = EXPERIMENTS / "toy2d" / "runs" / "smoke"
    lines = [json.loads(line) for line in (left / "results.jsonl").read_text().splitlines()]
    assert {line["set"] for line in lines} == {"two moons", "checkerboard"}
    assert all(math.isfinite(line["gap"]) and line["config"]["pixels"] == 10 for line in lines)
    drawn = run(EXPERIMENTS / "toy2d" / "plot.py", left)
    assert drawn.returncode == 0, drawn.stderr
    assert (left / "density.png").stat().st_size > 0


@pytest.mark.parametrize("name", SETS)
def test_toy_density_is_exact(name: str) -> None:
    """It integrates to 1, and draws from it have the mean log density that quadrature gives."""
    density, side, cells = SETS[name](), 4.5, 180  # the board's edges are edges of cells
    step = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 * side - side
    log_p = density.log_prob(torch.cartesian_prod(step, step))
    mass = log_p.exp() * (2 * side / cells) ** 2
    expected = float((mass * log_p).nan_to_num(0.0).sum())
    drawn = density.log_prob(density.draw(5000, torch.Generator().manual_seed(0)).double())
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-4)
    assert float(drawn.mean()) == pytest.approx(expected, abs=4 * float(drawn.std()) / 5000**0.5 + 1e-4)
