"""The training step as a long `fp.fit` takes it, as one graph, beside the same step without and beside nflows.

    python -m experiments.bench.fit_step [--only NAME]

All steps of flowpath with fused Adam, nflows with torch's default; CPU time, one thread, in turns. Saved as
`results/fit_step-<capability>.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowpath as fp
from experiments.bench import speed
from experiments.bench.agreement import matched
from experiments.bench.cases import CASES, TRAIN, Case, operation
from experiments.bench.measure import ratios, side_by_side, spread
from flowpath.training.joint import JointStep

HERE = Path(__file__).parent
GRAPH = "flowpath, one graph"


class Graph:
    """Differentiates by the graph of a step, which is made at the first call."""

    def __init__(self, flow: Any) -> None:
        self.goal = fp.MaximumLikelihood(flow)
        self.step: JointStep | None = None
        self.seconds = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if self.step is None:
            begun = time.process_time()
            self.step = JointStep(self.goal, (x,))
            self.seconds = time.process_time() - begun
        return self.step((x,))


def measure(case: Case) -> dict[str, Any]:
    """A record of the case."""
    torch.manual_seed(0)
    ours, nflows = matched(case.kind, case.shape)
    graph = Graph(ours.module)
    works = {
        GRAPH: operation(ours, TRAIN, case, "cpu", fused=True, differentiate=graph),
        speed.FUSED: operation(ours, TRAIN, case, "cpu", fused=True),
        "nflows": operation(nflows, TRAIN, case, "cpu", fused=False),
    }
    times = side_by_side(works)
    return {
        "case": case.name,
        "batch": case.batch,
        "seconds_to_trace": graph.seconds,
        "milliseconds": {who: spread([1e3 * s for s in values]) for who, values in times.items()},
        "ratios": ratios(times, GRAPH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    records = []
    for case in [c for c in CASES if TRAIN in c.operations and only in c.name]:
        records.append(measure(case))
        shown = {who: round(v["median"], 3) for who, v in records[-1]["milliseconds"].items()}
        print(f"{case.name}: ms {shown}, traced in {records[-1]['seconds_to_trace']:.1f} s", flush=True)
    if not only:
        around = speed.surroundings("cpu")
        path = HERE / "results" / f"fit_step-{around['capability'].lower()}.json"
        path.write_text(json.dumps({"records": records, "surroundings": around}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
