"""flowpath beside nflows, zuko, normflows and Pyro: the same flows, timed in turns, saved as JSON.

    python -m experiments.bench [--quick | --smoke] [--mode eager|compiled|both]
                                  [--capability default|avx2|both] [--device cpu|cuda] [--only NAME] [--operation NAME]

First the agreement with nflows on the same weights is checked. On a CPU the run is repeated in a child process with
ATEN_CPU_CAPABILITY=avx2, since part of the gain is special to AVX-512. Results: `results/speed-<capability>.json`
beside this file, which `plot.py` draws and `table.py` prints. One thread; about half an hour, `--quick` 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from experiments.bench import speed
from experiments.bench.cases import CASES, SMOKE, Case
from experiments.runner import surroundings

HERE = Path(__file__).parent


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, nothing compiled; results under runs/quick")
    parser.add_argument("--smoke", action="store_true", help="one tiny case, seconds; results under runs/smoke")
    parser.add_argument("--mode", choices=("eager", "compiled", "both"), default="both", help="of one kind: merged")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--capability", choices=("default", "avx2", "both"), default="both", help="of the CPU's kernels"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this; results are merged")
    parser.add_argument("--operation", default="", help="this one alone")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    if args.capability in ("default", "both") or args.device == "cuda" or args.smoke:
        run(args)
    if args.capability in ("avx2", "both") and args.device == "cpu" and not args.smoke:
        in_child(sys.argv[1:] if words is None else words)


def in_child(words: list[str]) -> None:
    """The same run with AVX2 kernels: the choice is made when torch is loaded."""
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        raise SystemExit("ATEN_CPU_CAPABILITY is set already: use --capability default")
    command = [sys.executable, "-m", "experiments.bench", *words, "--capability", "default"]
    root = str(HERE.parents[1])
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": root}
    subprocess.run(command, env=environment, check=True, cwd=root)


def run(args: argparse.Namespace) -> None:
    """Measure in this process and save."""
    torch.set_num_threads(1)
    cases = SMOKE if args.smoke else [c for c in CASES if (c.quick or not args.quick) and args.only in c.name]
    cases = [_with(c, args.operation) for c in cases]
    timing = {"rounds": 3, "block": 0.001} if args.smoke else {"rounds": 7} if args.quick else {}
    found = {"agreement": speed.agreement(cases), "records": []}
    print(f"agreement with nflows, float64: worst {max(found['agreement']['worst'].values()):.1e}", flush=True)
    for case in cases:
        counts = {name: r.parameters for name, r in speed.rivals(case, "cpu").items()}
        print(f"{case.name}: parameters {counts}", flush=True)
        if args.mode != "compiled":
            found["records"] += speed.eager(case, args.device, **timing)
        if args.mode != "eager" and not (args.quick or args.smoke):
            found["records"] += speed.compiled(case, args.device, **timing)
        if args.only or args.operation or args.mode != "both":
            save(found, args)
    save(found, args)


def _with(case: Case, operation: str) -> Case:
    """The case with one operation, or with all of them."""
    kept = {k: tuple(o for o in getattr(case, k) if operation in ("", o)) for k in ("operations", "compiled")}
    return replace(case, **kept)


def save(found: dict, args: argparse.Namespace) -> None:
    """Write the JSON; a run of one mode or of some cases leaves the rest of an earlier run as it was."""
    found = found | {"surroundings": speed.surroundings(args.device) | {"commit": surroundings()["commit"]}}
    where = HERE / ("runs/smoke" if args.smoke else "runs/quick" if args.quick else "results")
    where.mkdir(parents=True, exist_ok=True)
    name = args.device if args.device == "cuda" else found["surroundings"]["capability"].lower()
    path = where / f"speed-{name}.json"
    if (args.only or args.operation or args.mode != "both") and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        fresh = {(r["case"], r["operation"], r["mode"]) for r in found["records"]}
        kept = [r for r in before["records"] if (r["case"], r["operation"], r["mode"]) not in fresh]
        worst = before["agreement"]["worst"] | found["agreement"]["worst"]
        found |= {"records": kept + found["records"], "agreement": found["agreement"] | {"worst": worst}}
    found["records"].sort(key=_place)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(HERE.parents[1])}")


def _place(record: dict) -> tuple[int, int, bool]:
    """Where a record stands: as the cases do, and their operations."""
    cases = {c.name: (i, c.operations) for i, c in enumerate((*CASES, *SMOKE))}
    place, operations = cases.get(record["case"], (len(cases), (record["operation"],)))
    return place, operations.index(record["operation"]), record["mode"] == "compiled"


if __name__ == "__main__":
    main()
