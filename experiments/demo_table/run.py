"""Claim: of the tables that ship with scikit-learn, the dequantised digits are one on which a flow can be judged.

Five splits of each: the mean held-out log density in nats a row of a full Gaussian, a mixture and a flow, with the
standard deviation over the splits, and how far the flow is ahead of the mixture in each, with paired errors.

    python experiments/demo_table/run.py [--smoke]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import polars as pl
import torch
from sklearn import datasets

from flowpath.demo import FLOW, GAUSSIAN, MIXTURE, SHARES, TABLE, Effort, compare, density, digits


def rows(name: str, seed: int) -> torch.Tensor:
    """A table's rows."""
    return digits(seed)[0] if name == "digits" else torch.from_numpy(getattr(datasets, f"load_{name}")().data)


def line(name: str, splits: int, effort: Effort) -> str:
    """The table's line of Markdown."""
    found = []
    for seed in range(splits):
        x = rows(name, seed)
        with contextlib.redirect_stdout(io.StringIO()):
            model = density(effort, seed, **SHARES).fit(pl.DataFrame(x.numpy()))
            found.append(compare(model, x, x[model.rows_["test"]], effort, seed))
    means = [[s.mean(rival) for s in found] for rival in (GAUSSIAN, MIXTURE, FLOW)]
    spread = [f"{statistics.mean(m):.1f} ({statistics.stdev(m):.1f})" for m in means]
    ahead = ", ".join("{:.1f} ± {:.1f}".format(*s.ahead(FLOW, MIXTURE)) for s in found)
    return f"| {name} | {len(model.rows_['train'])} x {x.shape[1]} | {' | '.join(spread)} | {ahead} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small table, two epochs")
    smoke = parser.parse_args().smoke
    for name in ("wine",) if smoke else ("wine", "breast_cancer", "digits"):
        print(line(name, 2 if smoke else 5, TABLE.quick() if smoke else TABLE), flush=True)


if __name__ == "__main__":
    main()
