"""The targets: how many times faster than a peer, case by case, and what was measured against each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BEST = "the best peer"
ELSEWHERE = "eight schools"  # not a case of this bench
Record = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A claim: in this case and operation at least these ratios to the peer, in the columns of the table."""

    claim: str
    case: str
    operation: str
    peer: str
    avx512: float | None
    avx2: float | None
    compiled: float | None


def _coupling(operation: str, claim: str, peer: str, rows: dict[str, tuple[Any, Any, Any]]) -> list[Target]:
    return [Target(f"{claim}, {case}", case, operation, peer, *limits) for case, limits in rows.items()]


TARGETS = [
    *_coupling(
        "train",
        "training step",
        "nflows",
        {
            "coupling D=2": (1.8, 1.6, 5.0),
            "coupling D=6": (2.1, 1.7, 4.0),
            "coupling D=43": (2.5, 1.7, 3.1),
            "small": (2.3, 2.0, 9.0),
        },
    ),
    *_coupling(
        "train",
        "training step",
        "zuko",
        {"coupling D=2": (1.7, 1.5, 1.3), "coupling D=6": (2.0, 1.5, 1.3), "coupling D=43": (2.2, 1.5, 1.3)},
    ),
    *_coupling(
        "log_prob",
        "log_prob",
        "nflows",
        {"coupling D=2": (2.0, 1.8, None), "coupling D=6": (2.4, 1.8, None), "coupling D=43": (3.5, 1.8, 4.7)},
    ),
    *_coupling(
        "rsample+log q+Adam",
        "draw, log q, step",
        "nflows",
        {"coupling D=2": (1.8, 1.6, None), "coupling D=6": (2.1, 1.6, None), "coupling D=43": (2.3, 1.6, 3.0)},
    ),
    *_coupling(
        "rsample+log q+Adam",
        "draw, log q, step",
        "zuko",
        {"coupling D=2": (2.9, 2.6, None), "coupling D=6": (3.5, 2.6, None), "coupling D=43": (3.7, 2.6, None)},
    ),
    *_coupling(
        "train",
        "training step",
        "nflows",
        {"autoregressive D=6": (1.6, 1.4, 2.0), "autoregressive D=43": (1.9, 1.4, 2.0)},
    ),
    *_coupling(
        "sample",
        "sampling",
        BEST,
        {"autoregressive D=6": (5.0, None, 10.0), "autoregressive D=43": (26.0, None, 40.0)},
    ),
    *_coupling("sample", "sampling", BEST, {"affine D=6": (5.0, None, None), "affine D=43": (22.0, None, None)}),
    *_coupling(
        "rsample+backward",
        "draw and backward",
        "nflows",
        {"autoregressive D=6": (1.9, None, 3.0), "autoregressive D=43": (11.0, None, 20.0)},
    ),
    # Measured where compiled SVI is: a record of this name in results/speed-*.json fills the row.
    *_coupling("svi step", "SVI step, 16 particles", "pyro", {ELSEWHERE: (3.0, None, 8.0)}),
    *_coupling("train", "training step", BEST, {"affine D=6": (1.1, 1.05, 1.2), "affine D=43": (1.1, 1.05, 1.2)}),
]

COLUMNS = ("avx512", "avx2", "compiled")
LEAST = 0.95  # of every peer, in every eager cell


def _record(target: Target, column: str, runs: dict[str, dict[str, Any]]) -> Record | None:
    mode, capability = ("compiled", "avx512") if column == "compiled" else ("eager", column)
    wanted = (target.case, target.operation, mode)
    records = runs.get(capability, {}).get("records", [])
    return next((r for r in records if (r["case"], r["operation"], r["mode"]) == wanted), None)


def _beside(target: Target, column: str, ratios: dict[str, dict[str, float]]) -> dict[str, float] | None:
    """The ratio of the target's peer; of zuko compiled in the compiled column."""
    if target.peer == BEST:
        others = [v for k, v in ratios.items() if not k.startswith("flowpath")]
        return min(others, key=lambda v: v["median"])
    return ratios.get("zuko, compiled" if (column, target.peer) == ("compiled", "zuko") else target.peer)


def reached(target: Target, column: str, runs: dict[str, dict[str, Any]]) -> tuple[float, float, float] | None:
    """Median ratio and its quartiles in a column; None where it was not measured."""
    record = _record(target, column, runs)
    best = None if record is None else _beside(target, column, record["ratios"])
    return None if best is None else (best["median"], best["low"], best["high"])


def fused(target: Target, column: str, runs: dict[str, dict[str, Any]]) -> float | None:
    """The same with fused Adam, which `fp.fit` uses, in flowpath alone; None where nothing is trained."""
    record = _record(target, column, runs)
    best = _beside(target, column, record["ratios_fused"]) if record and "ratios_fused" in record else None
    return None if best is None else best["median"]


def slower(runs: dict[str, dict[str, Any]]) -> list[tuple[str, str, str, str, float]]:
    """Cells in which a peer takes less than `LEAST` of flowpath's time: capability, case, operation, peer, ratio."""
    return [
        (capability, r["case"], r["operation"], peer, ratio["median"])
        for capability, run in runs.items()
        for r in run["records"]
        if r["mode"] == "eager"
        for peer, ratio in r["ratios"].items()
        if not peer.startswith("flowpath") and ratio["median"] < LEAST
    ]
