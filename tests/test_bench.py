"""The bench is a script: it runs, agrees with nflows before it times, and the page says what it saved."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.bench import fit_step, floor, growth, memory, plot, table, targets
from experiments.bench.agreement import TOLERANCE, worst_difference
from experiments.bench.cases import CASES, SMOKE
from experiments.bench.measure import ratios, side_by_side, spread
from experiments.bench.peers import LIBRARIES, Shape

BENCH = Path(__file__).resolve().parents[1] / "experiments" / "bench"


@pytest.mark.parametrize("kind", ["coupling", "autoregressive", "affine"])
@pytest.mark.parametrize("features", [2, 3])
def test_the_matched_flow_is_the_flow_of_nflows(kind: str, features: int) -> None:
    assert worst_difference(kind, Shape(features, transforms=2, hidden=(16, 16))) < TOLERANCE


def test_a_round_gives_every_work_its_turn() -> None:
    seen: list[str] = []
    times = side_by_side({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=4, block=0.0)
    assert [len(t) for t in times.values()] == [4, 4]
    assert "".join(seen[-8:]) == "abbaabba"


def test_ratios_are_of_the_same_round() -> None:
    found = ratios({"ours": [1.0, 2.0, 4.0], "theirs": [3.0, 6.0, 12.0]}, "ours")
    assert found == {"theirs": spread([3.0, 3.0, 3.0])}


def test_smoke_runs_and_draws(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "run.py"), "--smoke"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (BENCH / "runs" / "smoke").glob("speed-*.json")
    run = json.loads(path.read_text("utf-8"))
    assert {r["operation"] for r in run["records"]} == {"log_prob", "train"}
    for record in run["records"]:
        assert all(math.isfinite(v["median"]) for v in record["ratios"].values())
        assert {"nflows", "pyro"} <= set(record["milliseconds"])
    (tmp_path / path.name).write_text(path.read_text("utf-8"), encoding="utf-8")
    plot.main(tmp_path)
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_growth_sweeps_every_size() -> None:
    with torch.random.fork_rng(devices=[]):
        found = list(growth.measure(growth.SWEEPS["smoke"]))
    assert {"batch", "features", "transforms", "bins", "sampling maf"} <= {what for what, _ in found}
    assert all(row["milliseconds"] > 0 for _, row in found)


def test_a_child_tells_its_peak() -> None:
    with torch.random.fork_rng(devices=[]):
        plain, graph, checked = (memory.step(name, 500) for name in ("flowpath", memory.GRAPHED, memory.CHECKPOINTED))
    assert 0 < checked["kept_mib"] < plain["kept_mib"] / 3
    assert graph["kept_mib"] is None and graph["peak_mib"] >= 0


def test_a_step_as_one_graph_is_timed_beside_the_plain_one() -> None:
    with torch.random.fork_rng(devices=[]):
        record = fit_step.measure(SMOKE[0])
    assert set(record["ratios"]) == {"flowpath, fused Adam", "nflows"}
    assert record["seconds_to_trace"] > 0


def test_products_alone_take_less_than_a_step() -> None:
    with torch.random.fork_rng(devices=[]):
        for times in floor.measure(SMOKE[0]).values():
            assert 0 < times["products"] < times["nflows"]


def test_every_library_has_every_kind() -> None:
    assert all(set(kinds) == {"coupling", "autoregressive", "affine"} for kinds in LIBRARIES.values())
    assert {t.case for t in targets.TARGETS} <= {c.name for c in CASES} | {targets.ELSEWHERE}


def test_the_page_says_what_the_results_say() -> None:
    page = table.PAGE.read_text("utf-8")
    assert table.filled(page) == page, "run python -m experiments.bench.table"
    assert "<!-- bench: targets -->" in page


def test_every_number_of_the_page_has_its_figures() -> None:
    for name in ("speed.png", "memory.png", "growth.png"):
        assert (BENCH / "results" / name).exists()
        assert name in table.PAGE.read_text("utf-8")
