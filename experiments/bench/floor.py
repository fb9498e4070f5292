"""What no flow of this shape can undercut: the matrix products of its conditioners, alone.

    python -m experiments.bench.floor

For every Linear of flowpath's flow, W h, W' g and g h' of the case's batch, one thread, float32, in turns with nflows'
step; their sum is the least time of a training step, that of the first kind alone the least of a log_prob. nflows' time
over it is a ratio that no flow with these conditioners can pass. Saved as `results/floor.json`; `table.py` sets the
ratios that were reached beside it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.bench.cases import CASES, LOG_PROB, TRAIN, Case, operation
from experiments.bench.measure import Work, side_by_side
from experiments.bench.peers import LIBRARIES

SHOWN = ("small", "coupling D=2", "coupling D=6", "coupling D=43", "autoregressive D=6", "autoregressive D=43")


def products(case: Case) -> dict[tuple[int, int], int]:
    """(outputs, inputs) of the flow's Linear layers, with how many there are of each."""
    found: dict[tuple[int, int], int] = {}
    for m in LIBRARIES["flowpath"][case.kind](case.shape).module.modules():
        if isinstance(m, nn.Linear):
            shape = m.out_features, m.in_features
            found[shape] = found.get(shape, 0) + 1
    return found


def works(outputs: int, inputs: int, rows: int) -> dict[str, Work]:
    """The three products of a layer, forward first."""
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs, 1)
    h, g = torch.randn(inputs, rows), torch.randn(outputs, rows)

    def forward() -> Tensor:
        return torch.addmm(bias, weight, h)

    return {"forward": forward, "to input": lambda: weight.t() @ g, "to weight": lambda: g @ h.t()}


def measure(case: Case) -> dict[str, dict[str, float]]:
    """Milliseconds of the products of a log_prob and of a training step, and of nflows' own."""
    nflows = LIBRARIES["nflows"][case.kind](case.shape)
    turns: dict[str, Work] = {name: operation(nflows, name, case, "cpu", fused=False) for name in (LOG_PROB, TRAIN)}
    counts = products(case)
    for shape in counts:
        turns |= {f"{shape} {name}": work for name, work in works(*shape, case.batch).items()}
    times = {name: 1e3 * statistics.median(values) for name, values in side_by_side(turns, rounds=9).items()}
    kinds = {LOG_PROB: ("forward",), TRAIN: ("forward", "to input", "to weight")}
    return {
        name: {
            "products": sum(n * times[f"{shape} {kind}"] for shape, n in counts.items() for kind in kinds[name]),
            "nflows": times[name],
        }
        for name in (LOG_PROB, TRAIN)
    }


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for case in [c for c in CASES if c.name in SHOWN]:
        found[case.name] = measure(case)
        print(
            case.name,
            {k: {who: round(ms, 2) for who, ms in v.items()} for k, v in found[case.name].items()},
            flush=True,
        )
    capability = torch.backends.cpu.get_cpu_capability()
    path = Path(__file__).parent / "results" / "floor.json"
    path.write_text(json.dumps({"capability": capability, "milliseconds": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
